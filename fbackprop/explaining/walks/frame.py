"""The frame of a walk: sections of blocks in the reader's language, with every number under a key.

A walk runs a document's example with the library's ops, takes its numbers from the record of that run, and tells what each of
them is. ``Telling`` collects; ``Walk`` is what comes out. The same sentence stands in both languages side by side, so that
they cannot drift apart.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from fbackprop.explaining.blocks import Block, Formula, Heading, Note, Numbers, Paragraph, Picture, Table
from fbackprop.explaining.presenting import kept_table
from fbackprop.explaining.record import Explanation
from fbackprop.explaining.words import LANGUAGES

__all__ = ["Section", "Telling", "Walk", "arrays", "descend", "local"]

_DECIMALS = 12  # as many as the worked examples have


@dataclasses.dataclass(frozen=True)
class Section:
    """What a reader takes in at once."""

    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Walk:
    """An example, told step by step. ``numbers`` has all of its numbers, by key, in nested dicts."""

    name: str
    title: str
    sections: tuple[Section, ...]
    numbers: dict[str, Any]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The title and all sections, for a form of output that shows the whole."""
        told: list[Block] = [Heading(self.title, 1)]
        for section in self.sections:
            told += [Heading(section.title), *section.blocks]
        return tuple(told)


class Telling:
    """Collects a walk in one language."""

    def __init__(self, name: str, language: str):
        if language not in LANGUAGES:
            raise ValueError(f"walk: there is no language {language!r}; known are {', '.join(LANGUAGES)}.")
        self.name, self.language = name, language
        self._sections: list[tuple[str, list[Block]]] = []
        self._numbers: dict[str, Any] = {}

    def say(self, english: str, korean: str) -> str:
        """The one in the reader's language."""
        return english if self.language == "en" else korean

    def section(self, english: str, korean: str) -> None:
        """Begins a section."""
        self._sections.append((self.say(english, korean), []))

    def add(self, *blocks: Block) -> None:
        self._sections[-1][1].extend(blocks)

    def text(self, english: str, korean: str) -> None:
        self.add(Paragraph(self.say(english, korean)))

    def note(self, english: str, korean: str) -> None:
        self.add(Note(self.say(english, korean)))

    def formula(self, text: str, latex: str) -> None:
        self.add(Formula(text, latex))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        self.add(Table(tuple(columns), tuple(tuple(row) for row in rows), caption))

    def picture(self, svg: str, words: str) -> None:
        self.add(Picture(svg, words))

    def number(self, key: str, values: Any, formula: str = "", name: str = "") -> None:
        """Shows an array and keeps it under ``key``, such as "gradients/W1"; by default the last part is its name."""
        self.keep(key, values)
        self.show(name or key.rpartition("/")[2], values, formula)

    def show(self, name: str, values: Any, formula: str = "") -> None:
        """Shows an array that is kept under another key, or that is no part of the example."""
        self.add(numbers(name, values, formula))

    def keep(self, key: str, values: Any) -> None:
        """Keeps numbers under a key without showing them."""
        *path, last = key.split("/")
        place = self._numbers
        for part in path:
            place = place.setdefault(part, {})
        place[last] = np.asarray(values).tolist()

    def given(self, values: Mapping[str, Any]) -> None:
        """The numbers that an example begins with."""
        for name, value in values.items():
            self.number(f"inputs/{name}", value)

    def kept(self, record: Explanation) -> None:
        """What each op call keeps for its backward."""
        self.add(kept_table(record, self.language))

    def agreement(self, record: Explanation) -> None:
        """Says that the gradients of the record are those of ``jax.grad``, or that they are not."""
        worst = max((float(d) for d in record.differences.values()), default=0.0)
        if record.agrees:
            self.text(
                f"These are the gradients that training uses: `jax.grad` of the same function differs by at most {worst:.1g}.",
                f"학습에 쓰이는 기울기와 같은 값이다. 같은 함수의 `jax.grad`와의 차이는 최대 {worst:.1g}이다.",
            )
        else:
            self.note(
                f"`jax.grad` of the same function differs by {worst:.3g}: a rule does not do what it did outside of the "
                "record.",
                f"같은 함수의 `jax.grad`와 {worst:.3g}만큼 다르다. 기록할 때와 다르게 동작하는 규칙이 있다.",
            )

    def finished(self, title: str) -> Walk:
        return Walk(self.name, title, tuple(Section(t, tuple(blocks)) for t, blocks in self._sections), self._numbers)


def numbers(name: str, values: Any, formula: str = "") -> Numbers:
    """A block with so many digits that there are 12 behind the point; where all are tiny, as many as a double has. Of single
    precision only a few are shown."""
    values = np.asarray(values)
    if values.dtype == np.float32:
        return Numbers(name, values, formula, digits=3 if values.ndim > 1 else 6)
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest or not math.isfinite(largest):
        return Numbers(name, values, formula)
    digits = _DECIMALS + 1 + math.floor(math.log10(largest))
    return Numbers(name, values, formula, digits=digits if 10 <= digits <= 17 else 16)


def arrays(system: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers as arrays in float64, the documents' precision, in their order."""
    return {name: jnp.asarray(value, jnp.float64) for name, value in system.items()}


def descend(params: Any, gradient: Any, rate: Any) -> Any:
    """One step of plain gradient descent, by optax."""
    optimizer = optax.sgd(rate)
    changes, _ = optimizer.update(gradient, optimizer.init(params))
    return optax.apply_updates(params, changes)


def local(op: Any, *inputs: Any) -> Any:
    """The derivative of an elementwise op at each element: its own backward with ones."""
    y, saved = op.forward(*inputs)
    return op.backward(saved, jnp.ones_like(y))[0]
