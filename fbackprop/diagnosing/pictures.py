"""Pictures of the health of a step, and of a run."""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fbackprop.drawing import BLUE, FAINT, GREEN, INK, ORANGE, RED, picture, plain

if TYPE_CHECKING:
    from fbackprop.diagnosing.record import Health
    from fbackprop.diagnosing.trials import Trial

__all__ = ["draw", "draw_course", "draw_depth", "draw_rates"]

_MOST_NAMES = 26


def draw(health: "Health", path: pathlib.Path) -> None:
    """Gradient and gain over depth, updates, the trials and the rates, as far as there are any."""
    trials = list({t.change: t for f in health.findings for t in f.trials}.values())
    wanted = {
        "depth": True,
        "gain": any(math.isfinite(row.gain) for row in health.layers),
        "update": health.after is not None,
        "trials": bool(trials),
        "rates": bool(health.rates),
    }
    panels = [name for name, is_wanted in wanted.items() if is_wanted]
    count = len(health.findings)
    title = (
        f"health: {', '.join(dict.fromkeys(f.kind for f in health.findings))}" if count else "health: nothing wrong was found"
    )
    rows = -(-len(panels) // 2)
    with picture(path, 10.5, 0.6 + 3.3 * rows, title) as figure:
        axes = list(np.atleast_1d(figure.subplots(rows, 2)).ravel())
        for axis in axes[len(panels) :]:
            axis.remove()
        for name, axis in zip(panels, axes):
            _PANELS[name](axis, health, trials)


def _depth(axis: Any, health: "Health", trials: Any) -> None:
    draw_depth(axis, {"": [row.gradient for row in health.layers]}, [row.name for row in health.layers])


def _gain(axis: Any, health: "Health", trials: Any) -> None:
    values = [row.gain for row in health.layers]
    axis.axhline(1, color=FAINT, linewidth=1, linestyle="--")
    _over_layers(axis, values, [row.name for row in health.layers], GREEN)
    plain(axis, "gain: gradient of what a layer reads / of what it gives")
    _log(axis, values)


def _update(axis: Any, health: "Health", trials: Any) -> None:
    values = [row.ratio for row in health.layers]
    axis.axhline(1e-3, color=FAINT, linewidth=1, linestyle="--")
    _over_layers(axis, values, [row.name for row in health.layers], ORANGE)
    plain(axis, "update / weight of the next step (dashed: 0.001, usual)")
    _log(axis, [*values, 1e-3])


def _trials(axis: Any, health: "Health", trials: "Sequence[Trial]") -> None:
    colors = (BLUE, ORANGE, GREEN, "#7a5195", "#667788", "#b8860b")
    if health.as_it_is is not None:
        axis.plot(_known(health.as_it_is.losses), color=INK, linewidth=2.2, label="as it is")
    for trial, color in zip(trials, colors * len(trials)):
        label = _short(trial.change) + ("" if trial.helped else "  (no help)")
        axis.plot(_known(trial.losses), color=color, linewidth=1.6, linestyle="-" if trial.helped else ":", label=label)
    plain(axis, "what was tried: loss over the steps, on one batch")
    axis.set_xlabel("step", color=INK)
    _log(axis, [v for t in (health.as_it_is, *trials) if t is not None for v in t.losses], spread=30)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=7.5, loc="best")


def _rates(axis: Any, health: "Health", trials: Any) -> None:
    steps = health.as_it_is.steps if health.as_it_is is not None else 0
    draw_rates(axis, {"": health.rates}, float(health.now.loss), steps, health.rate if health.rate is not None else 1.0)
    axis.set_xlabel("rate" if health.rate is not None else "times the rate", color=INK)


_PANELS = {"depth": _depth, "gain": _gain, "update": _update, "trials": _trials, "rates": _rates}


def draw_depth(axis: Any, lines: dict[str, Sequence[float]], names: Sequence[str]) -> None:
    """Norms of the layers' gradients over depth, a line for each label."""
    for (label, values), color in zip(lines.items(), (BLUE, ORANGE, GREEN, RED, "#7a5195", INK)):
        _over_layers(axis, values, names, color, label)
    plain(axis, "norm of the gradient of each layer's parameters, input to output")
    _log(axis, [v for values in lines.values() for v in values])
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=8.5)


def draw_rates(
    axis: Any, lines: dict[str, Sequence[tuple[float, float]]], before: float, steps: int, chosen: float | None = None
) -> None:
    """The loss after some steps over the rate, a line for each label. What ended above three times the loss before, or in
    numbers that are not finite, is a cross at the upper edge."""
    for (label, points), color in zip(lines.items(), (BLUE, ORANGE, GREEN, RED, "#7a5195", INK)):
        rates, losses = np.array(points, float).T
        fine = losses <= 3 * before  # False for NaN
        axis.plot(
            rates, np.where(fine, losses, np.nan), color=color, marker="o", markersize=4, linewidth=1.6, label=label or None
        )
        high = np.full((~fine).sum(), 1.0)
        axis.plot(
            rates[~fine], high, transform=axis.get_xaxis_transform(), color=color, marker="x", linestyle="none", clip_on=False
        )
    axis.axhline(before, color=FAINT, linewidth=1, linestyle="--")
    if chosen is not None:
        axis.axvline(chosen, color=FAINT, linewidth=1)
    axis.set_xscale("log")
    plain(axis, f"loss after {steps} steps on one batch, over the rate (dashed: before)")
    _log(axis, [loss for points in lines.values() for _, loss in points if loss <= 3 * before] + [before], spread=30)
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=8.5)


def draw_course(rows: Sequence[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Of a run: the layers' gradients and updates over the steps as heat maps, and dead and saturated shares as lines."""
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    shares = {name: _largest(rows, name) for name in ("dead", "saturated")}
    shares = {name: values for name, values in shares.items() if np.isfinite(values).any()}
    height = min(0.9 + 0.16 * len(names), 4.6)
    with picture(path, 8.2, 0.8 + 2 * height + (1.9 if shares else 0), f"{title}: health") as figure:
        axes = figure.subplots(2 + bool(shares), 1, height_ratios=[height, height, *([1.6] if shares else [])])
        steps = [row["step"] for row in rows]
        _heat(figure, axes[0], rows, names, "gradient", "norm of the gradient, layer by layer (input at the top)", "viridis")
        _heat(figure, axes[1], rows, names, "ratio", "update / weight", "cividis")
        if shares:
            axis = axes[2]
            for (name, values), color in zip(shares.items(), (RED, ORANGE)):
                what = "dead units" if name == "dead" else "saturated outputs"
                axis.plot(range(len(rows)), values, color=color, marker="o", markersize=3.5, linewidth=1.6, label=what)
            plain(axis, "largest share in a layer")
            axis.set_ylim(-0.02, 1.02)
            axis.set_xlim(-0.5, len(rows) - 0.5)
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axis.legend(frameon=False, fontsize=8.5)
        for axis in axes:
            _step_ticks(axis, steps)
        axes[-1].set_xlabel("step", color=INK)


def _heat(figure: Any, axis: Any, rows: Any, names: list[str], column: str, title: str, colors: str) -> None:
    values = np.full((len(names), len(rows)), np.nan)
    for j, row in enumerate(rows):
        for name, value in zip(row["layers"], row[column]):
            values[names.index(name), j] = math.nan if value is None else value
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(values > 0, np.log10(values), np.nan)
    logs = np.where(np.isfinite(logs), logs, np.nan)
    axis.set_facecolor("#f3d9d6")  # zero, or not finite
    shown = axis.imshow(logs, aspect="auto", interpolation="nearest", cmap=colors)
    bar = figure.colorbar(shown, ax=axis, pad=0.01, fraction=0.05)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    bar.outline.set_visible(False)
    axis.set_title(title, loc="left", fontsize=9.5, color=INK, pad=5)
    every = -(-len(names) // _MOST_NAMES)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    axis.tick_params(colors=INK, length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _step_ticks(axis: Any, steps: list[int]) -> None:
    every = -(-len(steps) // 12)
    axis.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])


def _largest(rows: Sequence[dict[str, Any]], column: str) -> np.ndarray:
    found = []
    for row in rows:
        known = [v for v in row[column] if v is not None and math.isfinite(v)]
        found.append(max(known) if known else math.nan)
    return np.array(found)


def _over_layers(axis: Any, values: Sequence[float], names: Sequence[str], color: str, label: str = "") -> None:
    axis.plot(_known(values), color=color, marker="o", markersize=4, linewidth=1.6, label=label or None)
    every = -(-len(names) // _MOST_NAMES)
    long = max(map(len, names), default=0) > 3
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "fontsize": 7.5} if long else {}
    axis.set_xticks(range(0, len(names), every), names[::every], **slant)


def _known(values: Sequence[float]) -> np.ndarray:
    found = np.array(values, float)
    return np.where(np.isfinite(found), found, np.nan)


def _log(axis: Any, values: Sequence[float], spread: float = 15.0) -> None:
    """A logarithmic scale where the values spread by more than this factor; zeros are left out there."""
    from matplotlib.ticker import LogLocator

    known = [v for v in values if math.isfinite(v) and v > 0]
    if not known or max(known) <= spread * min(known):
        axis.set_ylim(bottom=0) if known and max(known) > 1.5 * min(known) else axis.margins(y=0.15)
        return
    axis.set_yscale("log", nonpositive="mask")
    if max(known) < 200 * min(known):
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()


def _short(text: str) -> str:
    return text if len(text) <= 62 else text[:60] + "…"
