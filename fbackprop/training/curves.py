"""The picture of a run: loss, gradient norm, and accuracy where there is one, over the steps."""

import math
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from fbackprop.drawing import BLUE, GREEN, INK, ORANGE, RED, picture, plain

if TYPE_CHECKING:
    from fbackprop.training.fit import History

__all__ = ["draw"]


def draw(history: "History", path: pathlib.Path, title: str) -> None:
    """Draws the curves of a run into a PNG file, replaced in one move."""
    accuracies = [n for n in _names(history) if n.endswith("accuracy")]
    rows = 3 if accuracies else 2
    with picture(path, 7.6, 1.0 + 2.15 * rows, title) as figure:
        axes: list[Any] = list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))
        loss = _series(axes[0], history, "loss", BLUE, "training")
        losses = [loss, *_evaluated(axes[0], history, [n for n in _names(history) if n.endswith("_loss")])]
        _style(axes[0], "loss", losses)
        if accuracies:
            _style(axes[1], "accuracy", [])
            _percent_axis(axes[1], _evaluated(axes[1], history, accuracies, share=True))
        norm = _series(axes[-1], history, "grad_norm", GREEN, "")
        _style(axes[-1], "gradient norm", [norm])
        _mark_skipped(axes[-1], history)
        axes[-1].set_xlabel("step", color=INK)
        axes[-1].set_xlim(0, max(len(history.steps.get("loss", ())), 1))


def _names(history: "History") -> list[str]:
    return [n for n in dict.fromkeys(n for row in history.evaluations for n in row) if n != "step"]


def _series(axis: Any, history: "History", name: str, color: str, label: str) -> np.ndarray:
    """A value of each step: the values, and where they go up and down, those faint and their running mean."""
    values = np.array(history.steps.get(name, ()), float)
    steps = np.arange(len(values))
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) < 100:
        axis.plot(
            steps, values, color=color, linewidth=1.6, marker="o" if len(values) < 20 else None, markersize=3.5, label=label
        )
        return values
    changes = np.diff(values)[np.isfinite(np.diff(values))]
    jagged = np.mean(changes[1:] * changes[:-1] < 0) > 0.1 if len(changes) > 1 else False  # goes up and down
    axis.plot(
        steps,
        values,
        color=color,
        linewidth=0.7 if jagged else 1.6,
        alpha=0.28 if jagged else 1.0,
        label=None if jagged else label,
    )
    if jagged:
        smooth = _running_mean(values, max(5, len(values) // 40))
        axis.plot(steps, smooth, color=color, linewidth=1.6, label=label)
    return values


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the ``width`` values around each, leaving out those that are missing; fewer at the ends."""
    window = np.ones(2 * (width // 2) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    count = np.convolve(known.astype(float), window, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _evaluated(axis: Any, history: "History", names: list[str], share: bool = False) -> list[np.ndarray]:
    """The values of the evaluations; the last one is written beside its point where the axis is one of shares."""
    colors = (ORANGE, "#7a5195", "#667788")
    found = []
    for name, color in zip(names, colors):
        rows = [(row["step"], row[name]) for row in history.evaluations if math.isfinite(row.get(name, math.nan))]
        if not rows:
            continue
        steps, values = np.array(rows).T
        label = name.removesuffix("loss").removesuffix("accuracy").strip("_ ") or "evaluation"
        axis.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=3.5, label=label, clip_on=False, zorder=3)
        if share:
            axis.annotate(
                f"{100 * values[-1]:.1f} %", (steps[-1], values[-1]), xytext=(-2, -14), textcoords="offset points",
                ha="right", color=color, fontweight="bold",
            )  # fmt: skip
        found.append(values)
    return found


def _style(axis: Any, name: str, values: list[np.ndarray]) -> None:
    """The title, the grid and a scale that suits the values."""
    from matplotlib.ticker import LogLocator

    plain(axis, name)
    known = np.concatenate([np.ravel(v) for v in values]) if values else np.empty(0)
    known = known[np.isfinite(known) & (known > 0)]
    if known.size and known.max() > 15 * known.min():
        # Over more than one power of ten a linear scale shows nothing but the beginning.
        axis.set_yscale("log")
        if known.max() < 200 * known.min():
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.minorticks_off()
    elif known.size and known.max() > 1.3 * known.min():
        axis.set_ylim(0, 1.08 * known.max())
    else:
        axis.margins(y=0.15)
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(frameon=False, loc="upper right", ncols=3, fontsize=9, bbox_to_anchor=(1.0, 1.14))


def _percent_axis(axis: Any, values: list[np.ndarray]) -> None:
    low = min((float(v.min()) for v in values), default=0.0)
    axis.set_ylim(max(0.0, 1 - 1.15 * max(1 - low, 0.02)), 1.0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _mark_skipped(axis: Any, history: "History") -> None:
    skipped = np.flatnonzero(np.array(history.steps.get("skipped", ()), float) > 0)
    if len(skipped):
        axis.plot(
            skipped, np.full(len(skipped), 0.03), transform=axis.get_xaxis_transform(), linestyle="none",
            marker="|", color=RED, markersize=9, label="skipped",
        )  # fmt: skip
        axis.legend(frameon=False, loc="upper right", fontsize=9, bbox_to_anchor=(1.0, 1.14))
