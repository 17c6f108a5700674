"""Finds softmax cross-entropies: before a logarithm of a sum of exponentials the logits, behind it the loss of each row.

Where a large vocabulary's logits come from a product and go nowhere else, ``projecting`` puts a linear cross-entropy in place
of product, cross-entropy and sum.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from fbackprop import ops
from fbackprop.accelerating.evaluation import is_elementwise
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.projecting import BEYOND, moved, projected, within
from fbackprop.accelerating.sites import Near, Site, first
from fbackprop.accelerating.walking import SHAPING, chain, constant, integer_constants, integer_sources, sides, source

__all__ = ["cross_entropies"]


def cross_entropies(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    for anchor in program.equations:
        if anchor.name != "log" or id(anchor) in taken or not anchor.outputs[0].is_float:
            continue
        summed = _back_to(anchor.inputs[0], "reduce_sum")
        exponential = None if summed is None else _back_to(summed.inputs[0], "exp")
        if summed is None or exponential is None or len(summed.params["axes"]) != 1:
            continue
        wanted = exponential.outputs[0].shape
        logits = itertools.islice(source(exponential.inputs[0], functools.partial(_has_shape, wanted)), 3)
        axis = int(summed.params["axes"][0])
        ends = _ends(anchor.outputs[0], wanted, axis)
        if not ends:
            continue
        site, why = first(
            program, _guesses(program, list(logits), ends, axis, anchor), "no labels were found that its rows are picked by"
        )
        if site is not None:
            merged = projected(program, site, axis, next(cuts for v, cuts in ends if v is site.outputs[0]))
            yield from (site,) if merged is None else (merged,) if isinstance(merged, Site) else (merged, site)
        elif any(_enters(v) for v, _ in ends):
            yield Near("softmax_cross_entropy", why, anchor)


def _has_shape(shape: tuple[int, ...], value: Value) -> bool:
    return value.is_float and value.shape == shape


Cuts = tuple[Equation, ...]


def _ends(logarithm: Value, logits: tuple[int, ...], axis: int) -> list[tuple[Value, Cuts]]:
    """What may be the loss of each row, and the slices of rows before it, of arrays in the shape of the logits."""
    found, cuts, rows = [], [], [n for i, n in enumerate(logits) if i != axis]
    for v in chain(logarithm, _onward, most=14):
        maker = v.maker
        if maker is not None and maker.name == "slice":
            given = maker.inputs[0].shape
            if maker.params["strides"] is not None or len(given) != len(logits) or v.shape[axis] != logits[axis]:
                break
            cuts.append(maker)
            rows = [n for i, n in enumerate(v.shape) if i != axis]
        if v.is_float and v.size == math.prod(rows):
            found.append((v, tuple(cuts)))
    return found


def _onward(equation: Equation) -> bool:
    return equation.name in SHAPING | {"reduce_sum", "gather", "slice"} or is_elementwise(equation)


def _enters(value: Value) -> bool:
    return value.maker is not None and value.maker.name in ("gather", "reduce_sum")


def _back_to(value: Value, name: str) -> Equation | None:
    for _ in range(6):
        maker = value.maker
        if maker is None:
            return None
        if maker.name == name:
            return maker
        if maker.name not in SHAPING and maker.name != "abs":
            return None
        value = maker.inputs[0]
    return None


def _guesses(
    program: Program, logits: list[Value], ends: list[tuple[Value, Cuts]], axis: int, anchor: Equation
) -> Iterator[Site]:
    for x, (out, cuts) in itertools.product(logits, reversed(ends)):
        for constants in (False, True):  # labels may be constants, too
            entering = list({id(v): v for v, _ in sides(out, [x], constants) or () if not constants or constant(v)}.values())
            for v in entering if len(entering) <= 3 else ():
                if v.is_float and v.shape == x.shape and not cuts:
                    yield from _soft(x, v, out, axis, anchor)
            sources = integer_constants if constants else integer_sources
            for labels in sources(entering, out.size) if len(entering) <= 3 else ():
                yield from _integer(x, labels, out, axis, anchor, cuts)


def _integer(x: Value, labels: Value, out: Value, axis: int, anchor: Equation, cuts: Cuts) -> Iterator[Site]:
    classes = x.shape[axis]
    for sign, beyond in itertools.product((1, -1), BEYOND[:2]):

        def call(x: Any, labels: Any, sign: int = sign, beyond: str = beyond) -> tuple[Any]:
            for cut in cuts:
                x, _ = moved(cut, x, axis)
            rows = tuple(n for i, n in enumerate(x.shape) if i != axis)
            labels = within(labels.reshape(rows), classes) if beyond == "the nearest" else labels.reshape(rows)
            loss = ops.softmax_cross_entropy_with_integer_labels(x, labels, axis=axis)
            shape = _shape(out, x, axis, rows)
            return ((loss if sign == 1 else -loss).reshape(shape),)

        yield Site(
            "softmax_cross_entropy_with_integer_labels", [x, labels], [out], call, (sign, axis, beyond), anchor, classes,
            additive=True,
        )  # fmt: skip


def _soft(x: Value, labels: Value, out: Value, axis: int, anchor: Equation) -> Iterator[Site]:
    for sign in (1, -1):

        def call(x: Any, labels: Any, sign: int = sign) -> tuple[Any]:
            rows = tuple(n for i, n in enumerate(x.shape) if i != axis)
            loss = ops.softmax_cross_entropy(x, labels, axis=axis)
            return ((loss if sign == 1 else -loss).reshape(_shape(out, x, axis, rows)),)

        yield Site("softmax_cross_entropy", [x, labels], [out], call, (sign, axis), anchor)


def _shape(out: Value, x: Any, axis: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The rows, with an axis of length 1 wherever the program has one."""
    if len(out.shape) == len(rows):
        return rows
    if len(out.shape) == len(x.shape):
        return (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    raise ValueError("a loss of another rank")
