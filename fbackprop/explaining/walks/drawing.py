"""Small pictures for walks, as SVG with its text as text, by matplotlib."""

import io
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fbackprop.drawing import BLUE, FAINT, GREEN, INK, ORANGE, RED, plain

__all__ = ["images", "lines"]

_COLOURS = (BLUE, ORANGE, GREEN, RED)


def lines(curves: Mapping[str, Any], across: str, up: str, logarithmic: bool = False, first: int = 0) -> str:
    """One line for each name, over 0, 1, 2, … (or from ``first`` on), with its name at its end."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        plain(axis, "")
        for (name, values), colour in zip(curves.items(), _COLOURS):
            at = first + np.arange(len(values))
            axis.plot(at, values, color=colour, linewidth=1.6, marker="o" if len(values) <= 40 else None, markersize=3)
            axis.annotate(name, (at[-1], values[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center",
                          annotation_clip=False)  # fmt: skip
        if logarithmic:
            axis.set_yscale("log")
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.margins(x=0.02)
        most = first + max(len(values) for values in curves.values()) - 1
        axis.set_xlim(None, most + 0.16 * (most - first or 1))

    return _svg(draw, 5.6, 2.8)


def images(pictures: Mapping[str, Any], signed: Collection[str]) -> str:
    """Images side by side, each under its name; those named in ``signed`` in blue (below zero), white and red (above)."""

    def draw(figure: Any) -> None:
        for axis, (name, values) in zip(np.ravel(figure.subplots(1, len(pictures), squeeze=False)), pictures.items()):
            values = np.asarray(values, np.float64)
            most = float(np.max(np.abs(values))) or 1.0
            scale = (
                {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
                if name in signed
                else {"cmap": "gray_r", "vmin": 0, "vmax": most}
            )
            axis.imshow(values, interpolation="nearest", **scale)
            axis.set_title(name, fontsize=9.5, color=INK)
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_color(FAINT)

    return _svg(draw, 1.9 * len(pictures), 2.2)


def _svg(draw: Any, width: float, height: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 9.5, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",
        "svg.hashsalt": "fbackprop", "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, and whoever shows the picture has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = content.getvalue()
    return text[text.index("<svg") :]
