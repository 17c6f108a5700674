"""A picture of what is kept for the backward: bars by op and name, and the rivals."""

import pathlib
from typing import Any

from fbackprop.drawing import BLUE, FAINT, GREEN, INK, ORANGE, picture, plain
from fbackprop.explaining.digits import size

__all__ = ["draw"]

MOST = 18
"""Rows that are drawn one by one."""

COLOURS = {"op": BLUE, "jax": ORANGE, "parameter": FAINT, "argument": GREEN}
WORDS = {"op": "made by an op", "jax": "made by JAX's operations", "parameter": "parameters", "argument": "other arguments"}


def draw(keeping: Any, path: pathlib.Path) -> None:
    """Writes the picture of a ``Keeping``."""
    from matplotlib.patches import Patch

    rows = sorted(keeping.rows, key=lambda row: -row.bytes)
    bars = [(_label(row), row.bytes, row.origin) for row in rows[:MOST]]
    if rest := rows[MOST:]:
        bars.append((f"{len(rest)} more", sum(row.bytes for row in rest), ""))
    height = 1.6 + 0.24 * (len(bars) + len(keeping.rivals))
    title = f"kept for the backward of {keeping.name}: {size(keeping.total)}"
    with picture(path, 9.0, height, title) as figure:
        heights = [len(bars) + 1, len(keeping.rivals) + 1]
        upper, lower = figure.subplots(2, 1, height_ratios=heights)
        _bars(upper, [(label, value, COLOURS.get(origin, FAINT)) for label, value, origin in bars])
        plain(upper, "by op and name")
        upper.grid(False, axis="y")
        origins = dict.fromkeys(origin for _, _, origin in bars if origin)
        patches = [Patch(color=COLOURS[origin], label=WORDS[origin]) for origin in origins]
        upper.legend(handles=patches, loc="lower right", frameon=False, fontsize=8.5)
        _bars(lower, [(r.name, r.bytes, BLUE if i == 0 else FAINT) for i, r in enumerate(keeping.rivals)])
        plain(lower, "the same gradient in other ways")
        lower.grid(False, axis="y")


def _label(row: Any) -> str:
    name = row.name if row.origin in ("parameter", "argument") else f"{row.op} · {row.name}" if row.name else f"JAX's {row.op}"
    return f"{name}  {'×'.join(map(str, row.shape))}" + (f" ({row.times} times)" if row.times > 1 else "")


def _bars(axis: Any, bars: list[tuple[str, int, str]]) -> None:
    places = range(len(bars))
    drawn = axis.barh(places, [value for _, value, _ in bars], color=[colour for _, _, colour in bars], height=0.72)
    axis.bar_label(drawn, [size(value) for _, value, _ in bars], padding=3, fontsize=8.5, color=INK)
    axis.set_yticks(places, [label for label, _, _ in bars], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.margins(x=0.12)
    axis.spines["bottom"].set_visible(False)
