"""A drawing of boxes and arrows, as SVG and as PNG."""

import dataclasses
import functools
import io
from html import escape
from typing import Any

__all__ = ["Arrow", "Box", "Drawing", "Line", "has_hangul", "png", "svg"]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line in a box, and at its right the norm of a gradient."""

    words: str
    kind: str = "ink"  # or "faint"
    gradient: str = ""


@dataclasses.dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[Line, ...]
    kind: str  # "linear", "activation", "norm", "loss", "other"
    tip: str = ""
    link: str = ""


@dataclasses.dataclass(frozen=True)
class Arrow:
    """Four points are a curve; eight are three straight lines with two rounded corners."""

    points: tuple[tuple[float, float], ...]
    backward: bool
    label: str
    at: tuple[float, float]
    anchor: str  # "start", "end" or "turned"


@dataclasses.dataclass(frozen=True)
class Drawing:
    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    legend: tuple[str, str]  # of forward and backward arrows
    title: str


_COLOURS = {
    "ground": "#ffffff", "box": "#f6f8fa", "line": "#d0d7de", "ink": "#1f2328", "faint": "#656d76", "forward": "#1f5fa8",
    "backward": "#b45309", "linear": "#2f6fb5", "activation": "#3a8f6f", "norm": "#8250df", "loss": "#c0392b",
    "other": "#8b949e",
}  # fmt: skip
_DARK = {
    "ground": "#0d1117", "box": "#161b22", "line": "#3d444d", "ink": "#e6edf3", "faint": "#9198a1", "forward": "#6cb0ff",
    "backward": "#f0a04b",
}  # fmt: skip


def _path(points: tuple[tuple[float, float], ...]) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    """As commands: M, L, C and Q with their points."""
    if len(points) == 4:
        return [("M", points[:1]), ("C", points[1:])]
    return [
        ("M", points[:1]), ("L", points[1:2]), ("Q", points[2:4]), ("L", points[4:5]), ("Q", points[5:7]), ("L", points[7:]),
    ]  # fmt: skip


def svg(drawing: Drawing) -> str:
    """A drawing as SVG, light or dark as the reader's settings are."""

    def rules(colours: dict[str, str]) -> str:
        return " ".join(f"--fg-{name}:{value};" for name, value in colours.items())

    style = (
        f".fg {{ {rules(_COLOURS)} font: 12px system-ui, 'Noto Sans KR', sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ .fg {{ {rules(_DARK)} }} }} "
        ".fg .title { font-weight: 600; font-size: 13px; } .fg .small { font-size: 11px; } .fg a { text-decoration: none; } "
        ".fg a:focus rect, .fg a:hover rect { stroke: var(--fg-ink); } "
        ".fg .label { paint-order: stroke; stroke: var(--fg-ground); stroke-width: 4px; stroke-linejoin: round; }"
    )
    marks = "".join(
        f'<marker id="fg-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.8 L8 4 L0 7.2 z" style="fill:var(--fg-{name})"/></marker>'
        for name in ("forward", "backward")
    )
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fg" {size}><title>{escape(drawing.title)}</title>',
        f'<style>{style}</style><defs>{marks}</defs><rect width="100%" height="100%" style="fill:var(--fg-ground)"/>',
        *(_svg_arrow(arrow) for arrow in drawing.arrows),
        *(_svg_label(arrow) for arrow in drawing.arrows),
        *(_svg_box(box) for box in drawing.boxes),
    ]
    for i, (name, words) in enumerate(zip(("forward", "backward"), drawing.legend)):
        dash = ";stroke-dasharray:5 3" if i else ""
        parts.append(
            f'<path d="M12 {12 + 16 * i} H40" style="stroke:var(--fg-{name});stroke-width:1.8;fill:none{dash}" '
            f'marker-end="url(#fg-{name})"/><text class="small" x="47" y="{16 + 16 * i}" style="fill:var(--fg-{name})">'
            f"{escape(words)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _kind(arrow: Arrow) -> str:
    return "backward" if arrow.backward else "forward"


def _svg_arrow(arrow: Arrow) -> str:
    data = " ".join(command + " ".join(f"{x:.1f} {y:.1f}" for x, y in points) for command, points in _path(arrow.points))
    name, dash = _kind(arrow), ";stroke-dasharray:5 3" if arrow.backward else ""
    return (
        f'<path d="{data}" style="stroke:var(--fg-{name});stroke-width:1.6;fill:none{dash}" marker-end="url(#fg-{name})">'
        f"<title>{escape(arrow.label)}</title></path>"
    )


def _svg_label(arrow: Arrow) -> str:
    (x, y), anchor, turn = arrow.at, arrow.anchor, ""
    if anchor == "turned":
        anchor, turn = "middle", f' transform="rotate(-90 {x:.1f} {y:.1f})"'
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"{turn}'
    return f'<text class="small label" {place} style="fill:var(--fg-{_kind(arrow)})">{escape(arrow.label)}</text>'


def _svg_box(box: Box) -> str:
    x, y = box.x, box.y
    tip = f' data-tip="{escape(box.tip)}"' if box.tip else ""
    rows = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6" '
        'style="fill:var(--fg-box);stroke:var(--fg-line)"/>',
        f'<rect x="{x:.1f}" y="{y + 5:.1f}" width="4" height="{box.height - 10:.1f}" rx="2" '
        f'style="fill:var(--fg-{box.kind});stroke:none"/>',
        f'<text class="title" x="{x + 12:.1f}" y="{y + 17:.1f}" style="fill:var(--fg-ink)">{escape(box.title)}</text>',
    ]
    for i, line in enumerate(box.lines):
        at = y + 33 + 16 * i
        rows.append(
            f'<text class="small" x="{x + 12:.1f}" y="{at:.1f}" style="fill:var(--fg-{line.kind})">{escape(line.words)}</text>'
        )
        if line.gradient:
            rows.append(
                f'<text class="small" x="{x + box.width - 9:.1f}" y="{at:.1f}" text-anchor="end" '
                f'style="fill:var(--fg-backward)">{escape(line.gradient)}</text>'
            )
    inside = "".join(rows)
    return f'<a href="{escape(box.link)}"{tip}>{inside}</a>' if box.link else f"<g{tip}>{inside}</g>"


def png(drawing: Drawing, scale: float = 2.0) -> bytes:
    """The same drawing as PNG, by matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(drawing.height * scale, 60_000)
    dpi = 72 * height / drawing.height
    with rc_context({"font.family": _fonts()}):
        figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=dpi, facecolor=_COLOURS["ground"])
        FigureCanvasAgg(figure)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        axis.set_xlim(0, drawing.width)
        axis.set_ylim(drawing.height, 0)
        for i, (name, words) in enumerate(zip(("forward", "backward"), drawing.legend)):
            y = 12 + 16 * i
            _png_arrow(axis, [("M", ((12, y),)), ("L", ((40, y),))], name)
            axis.text(47, y, words, color=_COLOURS[name], fontsize=11, va="center")
        for arrow in drawing.arrows:
            _png_arrow(axis, _path(arrow.points), _kind(arrow))
        for arrow in drawing.arrows:
            turned = arrow.anchor == "turned"
            side = {"start": "left", "end": "right", "turned": "center"}[arrow.anchor]
            axis.text(
                *arrow.at, arrow.label, color=_COLOURS[_kind(arrow)], fontsize=10.5, ha=side, rotation=90 if turned else 0,
                va="center", zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
        for box in drawing.boxes:
            _png_box(axis, box)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Title": drawing.title})
    return out.getvalue()


_HANGUL = ("Nanum", "NotoSansCJK", "NotoSansKR", "UnDotum", "malgun", "AppleSDGothic", "AppleGothic", "baekmuk")


@functools.cache
def _fonts() -> list[str]:
    """DejaVu, and an installed font with Hangul where there is one."""
    from matplotlib import font_manager, ft2font

    for path in sorted(
        font_manager.findSystemFonts(), key=lambda path: (not path.endswith(("Regular.ttc", "Gothic.ttf")), path)
    ):
        if any(name in path for name in _HANGUL) and ord("가") in ft2font.FT2Font(path).get_charmap():
            font_manager.fontManager.addfont(path)
            return ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()]
    return ["DejaVu Sans"]


def has_hangul() -> bool:
    """Whether an installed font can draw Korean in an image."""
    return len(_fonts()) > 1


def _png_arrow(axis: Any, commands: list[tuple[str, Any]], name: str) -> None:
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path

    codes = {"M": Path.MOVETO, "L": Path.LINETO, "C": Path.CURVE4, "Q": Path.CURVE3}
    points = [p for _, own in commands for p in own]
    path = Path(points, [codes[c] for c, own in commands for _ in own])
    dash = (0, (4, 2.5)) if name == "backward" else "solid"
    axis.add_patch(PathPatch(path, fill=False, edgecolor=_COLOURS[name], linewidth=1.5, linestyle=dash, zorder=1))
    (x0, y0), (x1, y1) = points[-2:]
    length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
    tail = (x1 - (x1 - x0) / length * 6, y1 - (y1 - y0) / length * 6)
    head = FancyArrowPatch(
        tail, (x1, y1), arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, color=_COLOURS[name], lw=0.5
    )
    axis.add_patch(head)


def _png_box(axis: Any, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    frame = FancyBboxPatch(
        (box.x + 4, box.y + 4), box.width - 8, box.height - 8, boxstyle="round,pad=4,rounding_size=6",
        facecolor=_COLOURS["box"], edgecolor=_COLOURS["line"], linewidth=1, zorder=4,
    )  # fmt: skip
    axis.add_patch(frame)
    axis.add_patch(Rectangle((box.x, box.y + 5), 4, box.height - 10, color=_COLOURS[box.kind], linewidth=0, zorder=5))
    bold = {"fontweight": "bold", "family": "DejaVu Sans"} if box.title.isascii() else {}
    axis.text(box.x + 12, box.y + 17, box.title, fontsize=12, color=_COLOURS["ink"], zorder=6, **bold)
    for i, line in enumerate(box.lines):
        y = box.y + 33 + 16 * i
        axis.text(box.x + 12, y, line.words, fontsize=10, color=_COLOURS[line.kind], zorder=6)
        if line.gradient:
            axis.text(box.x + box.width - 9, y, line.gradient, fontsize=10, color=_COLOURS["backward"], ha="right", zorder=6)
