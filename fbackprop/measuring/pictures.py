"""The pictures of ``fbackprop bench``: times and bytes of each op, and curves over a size."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from fbackprop.drawing import BLUE, FAINT, GREEN, INK, ORANGE, picture, plain
from fbackprop.measuring.programs import SETTINGS
from fbackprop.measuring.report import Row, opponents, score
from fbackprop.measuring.times import geometric_mean

__all__ = ["draw_gpu", "draw_models", "draw_ops", "draw_scaling"]

_COLORS = {"fused": BLUE, "stored": ORANGE}


def draw_ops(rows: Sequence[Row], path: pathlib.Path, device: str) -> None:
    """Bars for each op: how many times faster than whom it is held against, and bytes kept over the least possible."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    lines = [(op, against) for op in ops for against in opponents([row for row in rows if row["op"] == op])]
    chosen = [[row for row in rows if (row["op"], row["against"]) == line] for line in lines]
    labels = [op if against == "jax.grad" else f"{op} / {against}" for op, against in lines]
    with picture(path, 10.5, 1.3 + 0.32 * len(lines), f"hand-written backward passes ({device})") as figure:
        speed, kept = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        settings = [s for s in SETTINGS if any(row["setting"] == s for row in rows)]
        for i, setting in enumerate(settings):
            offset = (i - (len(settings) - 1) / 2) * 0.38
            values = [score(group, setting) for group in chosen]
            _bars(speed, values, offset, _COLORS[setting], setting)
        plain(speed, "times faster than jax.grad (or as named)")
        bases = [_least(group) for group in chosen]
        for key, name, color, offset in (
            ("residual_bytes", "ours", GREEN, -0.19),
            ("residual_bytes_against", "theirs", FAINT, 0.19),
        ):
            values = [_mean_over(group, key, base) for group, base in zip(chosen, bases)]
            _bars(kept, values, offset, color, name)
        plain(kept, "bytes kept / the least")
        for axis in (speed, kept):
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            axis.set_xlim(min(low, 0.8), max(high, 1.25) * 1.35)
            axis.xaxis.set_major_locator(_ticks(*axis.get_xlim()))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.minorticks_off()
            axis.axvline(1, color=INK, linewidth=0.9)
            axis.legend(frameon=False, loc="lower right", fontsize=9, ncols=2, bbox_to_anchor=(1.0, 1.0), borderaxespad=1.6)
        speed.set_yticks(range(len(labels)), labels)
        speed.set_ylim(len(labels) - 0.4, -0.6)


def draw_models(rows: Sequence[Row], path: pathlib.Path, device: str) -> None:
    """Bars for each model and rival: how many times faster ours and the accelerated one are."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = [len({row["against"] for row in rows if row["model"] == model}) for model in models]
    with picture(path, 9.5, 1.2 + 0.34 * sum(counts) + 0.35 * len(models), f"steps of training ({device})") as figure:
        axes = figure.subplots(len(models), 1, squeeze=False, height_ratios=counts, sharex=True)[:, 0]
        for model, axis in zip(models, axes):
            own = [row for row in rows if row["model"] == model]
            names = list(dict.fromkeys(row["against"] for row in own))
            for variant, color, offset in (("ours", GREEN, -0.19), ("accelerated", BLUE, 0.19)):
                found = {row["against"]: row["time_ratio"] for row in own if row["variant"] == variant}
                if found:
                    _bars(axis, [found.get(name, math.nan) for name in names], offset, color, variant)
            plain(axis, f"{model}: times faster than")
            axis.set_xscale("log")
            axis.axvline(1, color=INK, linewidth=0.9)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.4, -0.6)
        low, high = axes[0].get_xlim()
        for axis in axes:
            axis.set_xlim(min(low, 0.6), max(high, 1.5) * 1.2)
            axis.xaxis.set_major_locator(_ticks(*axis.get_xlim()))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.minorticks_off()
        axes[0].legend(frameon=False, loc="lower right", fontsize=9, ncols=2, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


_SIDES = {"ours": GREEN, "accelerated": BLUE, "flax": FAINT}


def draw_gpu(rows: Sequence[Row], path: pathlib.Path, device: str) -> None:
    """Bars for each model and variant: tokens a second, and peak memory."""
    rows = [row for row in rows if "tokens_per_second" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = [sum(row["model"] == model for row in rows) for model in models]
    height = 1.2 + 0.3 * sum(counts) + 0.5 * len(models)
    with picture(path, 9.5, height, f"language models under training ({device})") as figure:
        grid = figure.subplots(len(models), 2, squeeze=False, height_ratios=counts, sharey="row")
        for model, (speed, memory) in zip(models, grid):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: -row["tokens_per_second"])
            colors = [_SIDES[row["variant"].partition(" ")[0]] for row in own]
            tokens = [row["tokens_per_second"] for row in own]
            texts = [f"{row['tokens_per_second']:,.0f}  ({row['mfu']:.0%})" for row in own]
            unit, name = (2**30, "GiB") if max(row["peak_bytes"] or 0 for row in own) >= 2**30 else (2**20, "MiB")
            peaks = [(row["peak_bytes"] or math.nan) / unit for row in own]
            for axis, values, told, title in (
                (speed, tokens, texts, f"{model}: tokens a second (utilization)"),
                (memory, peaks, [f"{peak:.2f}" for peak in peaks], f"peak memory, {name}"),
            ):
                axis.barh(range(len(own)), values, height=0.7, color=colors)
                beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
                for place, (value, text) in enumerate(zip(values, told)):
                    axis.annotate(text, (value, place), fontsize=7.5, color=INK, **beside)
                plain(axis, title)
                axis.set_xlim(0, 1.45 * max(v for v in values if not math.isnan(v)))
                axis.locator_params(axis="x", nbins=5)
                axis.set_yticks(range(len(own)), [row["variant"] for row in own])
            speed.set_ylim(len(own) - 0.4, -0.6)


def _bars(axis: Any, values: Sequence[float], offset: float, color: str, label: str) -> None:
    """Bars from 1 to a value, with the value beside them; a sign where there is none."""
    known = [(i + offset, v) for i, v in enumerate(values) if not math.isnan(v)]
    places, sizes = [y for y, _ in known], [v for _, v in known]
    axis.barh(places, [v - 1 for v in sizes], height=0.36, left=1, color=color, label=label)
    for place, value in known:
        side = 1 if value >= 1 else -1
        text, align = f"{value:.2f}" if value < 9.995 else f"{value:.0f}", "left" if side > 0 else "right"
        beside: dict[str, Any] = {"xytext": (3 * side, 0), "textcoords": "offset points", "ha": align, "va": "center"}
        axis.annotate(text, (value, place), fontsize=7.5, color=INK, **beside)


def _ticks(low: float, high: float) -> Any:
    from matplotlib.ticker import FixedLocator

    steps = (1, 2, 5) if high / low < 100 else (1,)
    return FixedLocator([n * 10.0**k for k in range(-3, 7) for n in steps if low <= n * 10.0**k <= high])


def _least(group: Sequence[Row]) -> str:
    """What bytes are compared with: the least possible where every workload tells it, else our own."""
    return "residual_bytes_minimum" if all(row["residual_bytes_minimum"] for row in group) else "residual_bytes"


def _mean_over(group: Sequence[Row], key: str, base: str) -> float:
    return geometric_mean([row[key] / row[base] for row in group if row[key] and row[base]])


# -------------------------------------------------------------------------------------------------------------- scaling

_CURVES = {"ours": (BLUE, "o", "ours"), "jax.grad": (ORANGE, "s", "jax.grad"), "best": (GREEN, "^", "best checkpoint policy")}
_PANELS = (("temp_bytes", "temporaries, MiB"), ("residual_bytes", "kept for the backward, MiB"), ("milliseconds", "time, ms"))


def draw_scaling(curves: Sequence[Any], path: pathlib.Path, device: str) -> None:
    """A column for each sweep; temporaries, kept bytes and time over its size, on logarithmic axes."""
    with picture(path, max(3.7 * len(curves) + 0.6, 6.2), 8.2, f"value and gradient over size ({device})") as figure:
        grid = figure.subplots(3, len(curves), squeeze=False, sharex="col")
        handles: dict[str, Any] = {}
        for column, curve in zip(grid.T, curves):
            for axis, (key, title) in zip(column, _PANELS):
                for side, (color, marker, label) in _CURVES.items():
                    points = [(p["size"], p["sides"][side][key]) for p in curve["points"] if p["sides"].get(side)]
                    points = [(x, max(y / 2**20, 1e-3) if key.endswith("bytes") else y) for x, y in points if y is not None]
                    if points:
                        style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.6}
                        style["zorder"] = 3 if side == "ours" else 2  # where curves meet, ours is seen
                        (handles[label],) = axis.plot(*zip(*points), **style)
                plain(axis, title)
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(_ticks(*axis.get_ylim()))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.minorticks_off()
            sizes = [p["size"] for p in curve["points"]]
            column[-1].set_xticks(sizes, [_short(n) for n in sizes], rotation=0)
            column[-1].set_xlabel(curve["axis"], color=INK)
            column[0].set_title(f"{curve['op']}\n", loc="left", fontsize=10.5, fontweight="bold", color=INK)
            column[0].text(0, 1.02, _PANELS[0][1], transform=column[0].transAxes, fontsize=9.5, color=INK)
        figure.legend(list(handles.values()), list(handles), frameon=False, loc="outside lower left", ncols=3, fontsize=9)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)
