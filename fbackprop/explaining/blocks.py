"""What an explanation is shown as: a list of blocks, which each form of output (text, LaTeX, page) renders in its own way.

Who explains something, a record or a walk through an example, makes blocks, already in the reader's language; who renders knows
blocks alone. So each thing is said once and looks alike everywhere.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

__all__ = ["Block", "Details", "Formula", "Heading", "Note", "Numbers", "Paragraph", "Picture", "Table", "undoubled"]


@dataclasses.dataclass(frozen=True)
class Heading:
    """A title; level 1 is the title of the whole."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A sentence or more, plain; `code` stands between backticks."""

    text: str


@dataclasses.dataclass(frozen=True)
class Formula:
    """A formula as a line of Unicode, as the derivations have it, and as LaTeX (math mode, without dollars)."""

    text: str
    latex: str


@dataclasses.dataclass(frozen=True)
class Numbers:
    """An array with its name: ``dW1 = [[…]]``. ``formula``: where its numbers come from, shown when the reader points at it."""

    name: str
    values: Any
    formula: str = ""
    digits: int = 6  # significant ones


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under column titles; numbers are formatted by the renderer, words are left as they are."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Note:
    """What must not be missed: an error in a document, a limit, a warning."""

    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing as SVG, and what it shows in words."""

    svg: str
    words: str


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks that a page folds away under one line. ``anchor``: the name that a picture's links know it by."""

    summary: str
    blocks: tuple["Block", ...]
    anchor: str = ""


Block = Heading | Paragraph | Formula | Numbers | Table | Note | Picture | Details


def undoubled(blocks: Sequence[Block]) -> list[Block]:
    """The same, but numbers below their formula do not repeat it. For output that shows all formulas at once."""
    said = {block.text for block in blocks if isinstance(block, Formula)}
    return [dataclasses.replace(b, formula="") if isinstance(b, Numbers) and b.formula in said else b for b in blocks]
