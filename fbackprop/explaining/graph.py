"""The graph of a backward pass as a picture: op calls with their parameters as cards, values going down, gradients coming up.

Cards stand in rows, an op below those whose values it takes (the longest way counts), so the flow reads from top to bottom.
Solid arrows go forward and bear the shape of the value, dashed ones backward with the norm of the gradient. An arrow over
several rows runs in a lane at the right. In long models, repetitions of a group of ops between the first and the last are
folded into one card.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from fbackprop.drawing import kind_of
from fbackprop.explaining import digits
from fbackprop.explaining.drawing import Arrow, Box, Drawing, Line, has_hangul, png, svg
from fbackprop.explaining.record import Explanation, Source, Step
from fbackprop.explaining.words import said
from fbackprop.files import write_atomically

__all__ = ["drawing", "graph_svg", "write_graph"]

_GAP, _BESIDE, _LANE, _LINE, _HEAD = 54, 70, 26, 16, 24  # pixels
_SMALL = 6.6  # the width of a small letter
_MANY = 24  # steps, above which repetitions are folded


def write_graph(explanation: Explanation, file: str | os.PathLike[str], lang: str = "en") -> pathlib.Path:
    """Writes the picture, as SVG or PNG by the name of the file.

    Raises:
      ValueError: where the name ends otherwise.
    """
    file = pathlib.Path(file)
    kind = kind_of(file)
    if kind == "png" and lang != "en" and not has_hangul():
        lang = "en"  # an image holds its letters, and no font here has these
    picture = drawing(explanation, lang)
    write_atomically(file, svg(picture).encode() if kind == "svg" else png(picture))
    return file


def graph_svg(explanation: Explanation, lang: str = "en") -> str:
    """The picture as SVG."""
    return svg(drawing(explanation, lang))


@dataclasses.dataclass
class _Card:
    """One op call, several folded ones, or the output."""

    title: str
    kind: str
    lines: list[Line]
    tip: str
    link: str = ""
    rank: int = 0
    box: Box | None = None


@dataclasses.dataclass
class _Flow:
    """What goes from one card to another, and comes back."""

    start: int
    end: int
    forward: list[str]
    backward: list[str]


def drawing(explanation: Explanation, lang: str = "en") -> Drawing:
    """Where everything stands."""
    steps = explanation.steps
    cards, place = _cards(steps, lang)
    flows = _flows(explanation, place)
    _output(explanation, cards, flows, place)
    for card, rank in zip(cards, _ranks(len(cards), flows)):
        card.rank = rank
    return _placed(cards, flows, explanation.name, lang)


# What there is to draw.


def _cards(steps: tuple[Step, ...], lang: str) -> tuple[list[_Card], list[int]]:
    """The cards, and for each step the number of its card."""
    folded = _repetition(steps) if len(steps) > _MANY else None
    cards: list[_Card] = []
    place: list[int] = []
    for step in steps:
        if folded and folded[0] <= step.index < folded[1]:
            if step.index == folded[0]:
                count = (folded[1] - folded[0]) // folded[2]
                ops = [s.op for s in steps[folded[0] : folded[0] + folded[2]]]
                lines = [Line(op, "faint") for op in ops[:8]] + ([Line("…", "faint")] if len(ops) > 8 else [])
                tip = said("folded", lang, count=count, ops=", ".join(ops))
                cards.append(_Card("⋮  " + said("repeated", lang, count=count), "other", lines, tip))
        else:
            cards.append(_card(step))
        place.append(len(cards) - 1)
    return cards, place


def _card(step: Step) -> _Card:
    lines = []
    for name, source in step.sources:
        if not source.steps and step.inputs[name] is not None:
            d = step.cotangents[name]
            words = f"{name} {digits.shape_text(np.shape(step.inputs[name]))}"
            lines.append(Line(words, "ink" if d is not None else "faint", "" if d is None else f"‖d‖ {_norm(d)}"))
    title = f"{step.index}. {step.op}"
    return _Card(title, _kind(step.op), lines, f"{title} {step.layer}\n{step.summary}", f"#backward-{step.index}")


def _kind(op: str) -> str:
    from fbackprop.rules import RULES

    module = (RULES[op].reference.__module__ if op in RULES else "").rpartition(".")[2]
    if op.endswith(("entropy", "squares", "square", "error", "entropy_with_integer_labels")):
        return "loss"
    if module in ("activations", "piecewise", "probabilities", "straight_through", "gating"):
        return "activation"
    return "norm" if "norm" in module or op.endswith("norm") else "linear"


def _flows(explanation: Explanation, place: list[int]) -> list[_Flow]:
    found: dict[tuple[int, int], _Flow] = {}
    for step in explanation.steps:
        for name, source in step.sources:
            d = step.cotangents[name]
            shape = digits.shape_text(np.shape(step.inputs[name]))
            _join(found, source, place, place[step.index], shape, "" if d is None else _norm(d))
    return list(found.values())


def _join(found: dict[tuple[int, int], _Flow], source: Source, place: list[int], end: int, shape: str, back: str) -> None:
    for start in dict.fromkeys(place[i] for i, _ in source.steps):
        if start == end:
            continue
        flow = found.setdefault((start, end), _Flow(start, end, [], []))
        names = [name for name in source.through if not name.startswith("[")]
        flow.forward.append(shape + (f" ({names[0]}{', …' if len(names) > 1 else ''})" if names else ""))
        if back:
            flow.backward.append(back)


def _output(explanation: Explanation, cards: list[_Card], flows: list[_Flow], place: list[int]) -> None:
    outputs = jax.tree.leaves(explanation.output)
    found: dict[tuple[int, int], _Flow] = {}
    for i, (value, source, d) in enumerate(zip(outputs, explanation.sources, explanation.cotangent)):
        if d is None and len(outputs) > 1:
            continue
        name = "L" if len(outputs) == 1 else f"L{i}"
        array = digits.plain_array(value)
        text = digits.number(array[()]) if array.ndim == 0 else digits.shape_text(array.shape)
        cards.append(_Card(f"{name} = {text}", "loss", [], name))
        _join(found, source, place, len(cards) - 1, digits.shape_text(array.shape), "" if d is None else _norm(d))
    flows.extend(found.values())


def _norm(array: Any) -> str:
    return digits.number(digits.norm(array), 2)


def _repetition(steps: tuple[Step, ...]) -> tuple[int, int, int] | None:
    """The steps between the first and the last repetition of a group: (first, end, length of the group)."""

    def sign(step: Step) -> Any:
        shapes = tuple(np.shape(v) for v in step.inputs.values())
        return step.op, shapes, tuple(step.index - i for _, s in step.sources for i, _ in s.steps[-1:])

    signs = [sign(step) for step in steps]
    best, found = 0, None
    for length in range(1, len(signs) // 4 + 1):
        start = 0
        while start + length < len(signs):
            end = start + length
            while end < len(signs) and signs[end] == signs[end - length]:
                end += 1
            count = (end - start) // length
            if count >= 4 and count * length > best:
                best, found = count * length, (start + length, start + (count - 1) * length, length)
            start = max(start + 1, end - length)
    return found


# Where it stands.


def _ranks(count: int, flows: list[_Flow]) -> list[int]:
    """The longest way to each card; what has nothing above stands right above what takes it."""
    ranks = [0] * count
    for flow in sorted(flows, key=lambda f: (f.start, f.end)):
        ranks[flow.end] = max(ranks[flow.end], ranks[flow.start] + 1)
    fed = {flow.end for flow in flows}
    for i in range(count):
        below = [ranks[f.end] for f in flows if f.start == i]
        if i not in fed and below:
            ranks[i] = min(below) - 1
    return ranks


def _placed(cards: list[_Card], flows: list[_Flow], name: str, lang: str) -> Drawing:
    rows: dict[int, list[_Card]] = {}
    for card in cards:
        rows.setdefault(card.rank, []).append(card)
    lanes = _lanes(cards, flows)
    # Labels stand beside arrows, so in rows of one card half of the width must have room for one.
    beside = max((12 + _SMALL * len(text) for f in flows for text in (_label(f.forward), _gradient(f))), default=0)
    width = max(2 * beside, *(sum(_width(c) for c in row) + _BESIDE * (len(row) - 1) for row in rows.values()))
    y = 44.0
    for _, row in sorted(rows.items()):
        x = (width - sum(_width(c) for c in row) - _BESIDE * (len(row) - 1)) / 2 + 12
        for card in row:
            height = _HEAD + _LINE * len(card.lines) + (6 if card.lines else 4)
            card.box = Box(x, y, _width(card), height, card.title, tuple(card.lines), card.kind, card.tip, card.link)
            x += _width(card) + _BESIDE
        y += max(c.box.height for c in row if c.box) + _GAP
    ports = _ports(cards, flows, lanes)
    arrows: list[Arrow] = []
    for i, flow in enumerate(flows):
        arrows += _across(cards, flow, ports[i], 30 + width + _LANE * lanes[i]) if i in lanes else _down(cards, flow, flows)
    total = 24 + width + _LANE * (max(lanes.values(), default=-1) + 1) + (8 if lanes else 0)
    words = (said("legend_forward", lang), said("legend_backward", lang))
    boxes = tuple(card.box for card in cards if card.box)
    return Drawing(max(total, 300), y - _GAP + 16, boxes, tuple(arrows), words, said("title", lang, name=name))


def _width(card: _Card) -> float:
    lines = (_SMALL * (len(line.words) + len(line.gradient)) + 38 for line in card.lines)
    return min(max([8 * len(card.title) + 24, *lines, 120]), 400)


def _lanes(cards: list[_Card], flows: list[_Flow]) -> dict[int, int]:
    """A lane for each flow over several rows, such that flows in one lane do not meet."""
    long = [i for i, f in enumerate(flows) if cards[f.end].rank - cards[f.start].rank > 1]
    found: dict[int, int] = {}
    for i in sorted(long, key=lambda i: cards[flows[i].end].rank - cards[flows[i].start].rank):
        ours = (cards[flows[i].start].rank, cards[flows[i].end].rank)
        taken = {
            found[j] for j in found
            if ours[0] < cards[flows[j].end].rank and cards[flows[j].start].rank < ours[1]
        }  # fmt: skip
        found[i] = next(n for n in range(len(flows) + 1) if n not in taken)
    return found


def _ports(cards: list[_Card], flows: list[_Flow], lanes: dict[int, int]) -> dict[int, tuple[float, float]]:
    """Where the flows of lanes leave and enter their cards: what enters above, what leaves below, each at its own height."""
    found: dict[int, tuple[float, float]] = {}
    heights: dict[tuple[int, bool], float] = {}
    for i, card in enumerate(cards):
        entering = sorted((n for n in lanes if flows[n].end == i), key=lambda n: lanes[n])
        leaving = sorted((n for n in lanes if flows[n].start == i), key=lambda n: -lanes[n])
        for k, (n, enters) in enumerate([*((n, True) for n in entering), *((n, False) for n in leaving)]):
            assert card.box
            heights[n, enters] = card.box.y + card.box.height * (k + 0.5) / (len(entering) + len(leaving))
    for n in lanes:
        found[n] = heights[n, False], heights[n, True]
    return found


def _label(texts: list[str]) -> str:
    unique = list(dict.fromkeys(texts))
    return ", ".join(unique[:3]) + (", …" if len(unique) > 3 else "")


def _gradient(flow: _Flow) -> str:
    return f"‖d‖ {_label(flow.backward)}" if flow.backward else ""


def _down(cards: list[_Card], flow: _Flow, flows: list[_Flow]) -> list[Arrow]:
    start, end = cards[flow.start].box, cards[flow.end].box
    assert start
    assert end
    x0, x1 = start.x + start.width / 2, end.x + end.width / 2
    near = [cards[f.start] for f in flows if f.end == flow.end and cards[f.end].rank - cards[f.start].rank == 1]
    starts = sorted({card.box.x for card in near if card.box})
    shift = (starts.index(start.x) - (len(starts) - 1) / 2) * min(34, end.width / (len(starts) + 1))
    y0, y1 = start.y + start.height, end.y
    middle, bend = (x0 + x1 + shift) / 2, (y1 - y0) * 0.45
    down = ((x0 - 5, y0), (x0 - 5, y0 + bend), (x1 + shift - 5, y1 - bend), (x1 + shift - 5, y1))
    up = ((x1 + shift + 5, y1), (x1 + shift + 5, y1 - bend), (x0 + 5, y0 + bend), (x0 + 5, y0))
    middle_y = (y0 + y1) / 2
    forward = _label(flow.forward)
    if len(starts) > 1:  # several arrows meet: each label stands where its own begins
        middle, middle_y, forward = x0, y0 + 11, _label([text.split(" ")[0] for text in flow.forward])
    found = [Arrow(down, False, forward, (middle - 11, middle_y), "end")]
    if flow.backward:
        found.append(Arrow(up, True, _gradient(flow), (middle + 11, middle_y), "start"))
    return found


def _across(cards: list[_Card], flow: _Flow, ports: tuple[float, float], lane: float) -> list[Arrow]:
    start, end = cards[flow.start].box, cards[flow.end].box
    assert start
    assert end
    (y0, y1), x0, x1, turn = ports, start.x + start.width, end.x + end.width, 8.0

    def way(x: float, y0: float, y1: float) -> tuple[tuple[float, float], ...]:
        return ((x0, y0), (x - turn, y0), (x, y0), (x, y0 + turn), (x, y1 - turn), (x, y1), (x - turn, y1), (x1, y1))

    found = [Arrow(way(lane, y0 + 2.5, y1 - 2.5), False, _label(flow.forward), (lane, (y0 + y1) / 2), "turned")]
    if flow.backward:
        words = 12 + _SMALL * (len(_gradient(flow)) + len(_label(flow.forward)))
        back = way(lane + 9, y0 - 2.5, y1 + 2.5)[::-1]
        found.append(Arrow(back, True, _gradient(flow), (lane + 9, (y0 + y1) / 2 + min(words / 1.8, (y1 - y0) / 3)), "turned"))
    return found
