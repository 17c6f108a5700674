"""What the pictures share: colours, a figure without windows, and a file that is replaced in one move."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from fbackprop.files import write_atomically

__all__ = ["BLUE", "FAINT", "GREEN", "GRID", "INK", "ORANGE", "RED", "kind_of", "picture", "plain"]

INK, FAINT, GRID = "#22272e", "#8b949e", "#e3e6ea"
BLUE, ORANGE, GREEN, RED = "#2f6fb5", "#d9822b", "#3a8f6f", "#c0392b"


def kind_of(path: pathlib.Path) -> str:
    """ "svg" or "png", as the name of a picture ends.

    Raises:
      ValueError: where it ends otherwise.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a picture is written as .svg or .png.")
    return path.suffix[1:]


@contextlib.contextmanager
def picture(path: pathlib.Path, width: float, height: float, title: str) -> Iterator[Any]:
    """A figure of so many inches, written to ``path`` at the end: PNG or SVG, as the name ends."""
    kind = kind_of(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot: no global state, no windows. The settings hold for this picture alone.
    with matplotlib.rc_context({"font.size": 9.5, "font.family": "DejaVu Sans", "axes.edgecolor": FAINT, "text.color": INK}):
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.015, ha="left", fontsize=11.5, fontweight="bold")
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format=kind)
    write_atomically(path, content.getvalue())


def plain(axis: Any, title: str) -> None:
    """A title at the left, a faint grid, no frame at the top and the right."""
    axis.set_title(title, loc="left", fontsize=9.5, color=INK, pad=5)
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=INK, length=3, color=FAINT)
