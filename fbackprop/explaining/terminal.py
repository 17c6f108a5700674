"""Blocks in a terminal, by rich; and as plain text."""

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import (
    Block,
    Details,
    Formula,
    Heading,
    Note,
    Numbers,
    Paragraph,
    Picture,
    Table,
    undoubled,
)
from fbackprop.explaining.formulas import is_math
from fbackprop.explaining.words import said

__all__ = ["renderable", "text"]


def renderable(blocks: Sequence[Block], lang: str = "en") -> Any:
    """What ``rich.print`` shows."""
    from rich.console import Group

    return Group(*_spaced(blocks, lang))


def text(blocks: Sequence[Block], lang: str = "en", width: int = 100) -> str:
    """Plain text of so many columns, without colours."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(renderable(blocks, lang))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _spaced(blocks: Sequence[Block], lang: str) -> Iterator[Any]:
    """With an empty line between blocks, but none between formulas and numbers that stand together."""
    from rich.text import Text

    close = (Formula, Numbers)
    blocks = undoubled(blocks)
    for before, block in zip((None, *blocks), blocks):
        if before is not None and not (isinstance(before, close) and isinstance(block, close)):
            yield Text()
        yield _shown(block, lang)


def _shown(block: Block, lang: str) -> Any:
    from rich.console import Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    match block:
        case Heading(words, level):
            return Rule(Text(words, "bold"), style="bright_black") if level <= 1 else Text(words, "bold underline")
        case Paragraph(words):
            return _code(words)
        case Formula(words, _):
            return Padding(Text(words, "cyan"), (0, 0, 0, 2))
        case Numbers():
            return Padding(_numbers(block, lang), (0, 0, 0, 2))
        case Table():
            return _table(block)
        case Note(words):
            return Panel(_code(words), border_style="yellow", expand=False)
        case Picture(_, words):
            return Text(words, "dim")
        case Details(summary, inner):
            return Group(Text(f"▸ {summary}", "bold"), Padding(Group(*_spaced(inner, lang)), (0, 0, 0, 2)))
    raise TypeError(f"explain: expected a block, got {type(block).__name__}.")


def _code(words: str) -> Any:
    from rich.text import Text

    parts = re.split(r"`([^`]+)`", words)
    return Text.assemble(*((part, "cyan" if i % 2 else "") for i, part in enumerate(parts)))


def _numbers(block: Numbers, lang: str) -> Any:
    from rich.table import Table as Grid
    from rich.text import Text

    array = digits.plain_array(block.values)
    name = Text(f"{block.name} =", "bold")
    row = Grid.grid(padding=(0, 1))
    if array.ndim == 0:
        found: list[Any] = [name, Text(digits.number(array[()], block.digits), "green")]
    elif digits.is_small(array):
        found = [name, _Matrix(array, block.digits)]
    else:
        found = [name, _summary(array, lang)]
    if is_math(block.formula) and array.ndim < 2:
        found.append(Text(f"   {block.formula}", "cyan dim"))
    row.add_row(*found)
    return row


class _Matrix:
    """The rows of an array, aligned; columns that do not fit beside the others stand below them."""

    def __init__(self, array: np.ndarray, count: int):
        cells = digits.cells(array, count).reshape(-1, array.shape[-1])
        widths = [max(map(len, column)) for column in cells.T]
        self.columns = [[f"{text:>{width}}" for text in column] for column, width in zip(cells.T, widths)]

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        from rich.measure import Measurement

        widths = [len(column[0]) for column in self.columns]
        return Measurement(max(widths) + 4, sum(widths) + len(widths) + 3)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        groups: list[list[list[str]]] = [[]]
        for column in self.columns:
            if groups[-1] and sum(len(c[0]) + 1 for c in [*groups[-1], column]) + 3 > options.max_width:
                groups.append([])
            groups[-1].append(column)
        for number, group in enumerate(groups):
            last = len(group[0]) - 1
            for i, line in enumerate(zip(*group)):
                left, right = ("[", "]") if last == 0 else ("⎡", "⎤") if i == 0 else ("⎣", "⎦") if i == last else ("⎢", "⎥")
                left, right = left if number == 0 else "…", right if number == len(groups) - 1 else "…"
                yield Text.assemble((left, "dim"), " ", (" ".join(line), "green"), " ", (right, "dim"), no_wrap=True)


def _summary(array: np.ndarray, lang: str) -> Any:
    from rich.text import Text

    found = digits.summary(array)
    parts: list[Any] = [(f"{found.shape} ", "magenta")]
    if array.size:
        for key, value in (("min", found.smallest), ("mean", found.mean), ("max", found.largest), ("norm", found.norm)):
            parts += [(f" {said('statistic_' + key, lang)} ", "dim"), (digits.number(value, 4), "green")]
        parts.append((f"  [{', '.join(found.first)}, …]", "dim"))
    if found.bad:
        parts.append((f"  {said('not_finite', lang, count=found.bad)}", "bold red"))
    return Text.assemble(*parts)


def _table(block: Table) -> Any:
    from rich import box
    from rich.table import Table as Rich
    from rich.text import Text

    shown = Rich(box=box.SIMPLE_HEAD, caption=Text(block.caption, "dim") if block.caption else None, caption_justify="left")
    for column, right in zip(block.columns, digits.right_aligned(block.rows, len(block.columns))):
        shown.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in digits.table_cells(block.rows, len(block.columns)):
        shown.add_row(*map(Text, row))
    return shown
