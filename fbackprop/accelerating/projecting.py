"""Finds the projection to a vocabulary before a softmax cross-entropy: the logits of all tokens need not be formed then.

From the logits back, to the product of x with a kernel, a bias or a soft cap may be on the way, and what only moves tokens: a
slice, a change of shape, other axes first. The moves are made with x instead, whose last axis takes the place of the classes.
From the losses of the tokens on, to their sum, a sign or weights may be on the way.

``linear_cross_entropy`` gives the sum with as many products as before. Where a program uses the loss of each token it would
need one more, so that these are left; and so are vocabularies of which the logits are small, where nothing is gained.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from fbackprop import ops
from fbackprop.accelerating.axes import groups
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.sites import Near, Site, first
from fbackprop.accelerating.walking import SHAPING, integer_constants, integer_sources, peeled, uniform
from fbackprop.ops._vocabulary import accumulates

__all__ = ["BEYOND", "moved", "projected", "within"]

CLASSES = 4096  # fewer are left to the plain cross-entropy
LOGITS = 1 << 22  # and so are fewer logits than these
BEYOND = "nan", "the nearest", "nothing"  # what the loss is of a label that is no class


@dataclasses.dataclass(frozen=True)
class _Head:
    """How logits come from a product: ``moves`` of their tokens from there on, in order."""

    dot: Equation
    side: int  # which operand of the product is x
    bias: Value | None
    cap: float | None
    moves: tuple[Equation, ...]

    @property
    def x(self) -> Value:
        return self.dot.inputs[self.side]

    @property
    def kernel(self) -> tuple[Value, bool]:
        """The kernel, before it was transposed if it was; and whether its classes stand first."""
        value, classes_first = self.dot.inputs[1 - self.side], self.dot.params["dimension_numbers"][0][1 - self.side][0] == 1
        maker = value.maker
        if maker is not None and maker.name == "transpose":
            return maker.inputs[0], not classes_first
        return value, classes_first

    def tokens(self, x: Any) -> Any:
        """x as [tokens, features], the tokens in the order of the logits."""
        (contracted,) = self.dot.params["dimension_numbers"][0][self.side]
        at = x.ndim - 1 if self.side == 0 else 0  # the axis of the classes, of the features here
        x = jnp.moveaxis(x, contracted, at)
        for move in self.moves:
            x, at = moved(move, x, at)
        return jnp.moveaxis(x, at, -1).reshape(-1, x.shape[at])


def moved(move: Equation, x: Any, at: int) -> tuple[Any, int]:
    """x moved as an equation moves the logits, and where its axis ``at``, which need not be as long as theirs, is then."""
    p, shape = move.params, move.inputs[0].shape
    if move.name == "transpose":
        order = [int(a) for a in p["permutation"]]
        return jnp.transpose(x, order), order.index(at)
    if move.name == "slice":
        cuts = zip(p["start_indices"], p["limit_indices"], shape, x.shape)
        return x[tuple(slice(None) if a == at else slice(i, now - (n - j)) for a, (i, j, n, now) in enumerate(cuts))], at
    lengths, to = [1] * len(move.outputs[0].shape), _followed(move, at)
    if to is None:
        raise ValueError("the classes do not stay an axis of their own")
    for inner, outer in groups(shape, move.outputs[0].shape):
        if len(outer) == 1:
            lengths[outer[0]] = math.prod(x.shape[i] for i in inner)
        else:
            for o in outer:
                lengths[o] = move.outputs[0].shape[o]
    lengths[to] = x.shape[at]
    return x.reshape(lengths), to


def _followed(move: Equation, at: int) -> int | None:
    """Where a change of shape brings an axis; None where it does not stay one, or where tokens are repeated."""
    given, made = move.inputs[0].shape, move.outputs[0].shape
    if move.name == "broadcast_in_dim":
        return int(move.params["broadcast_dimensions"][at]) if move.inputs[0].size == move.outputs[0].size else None
    return next((outer[0] for inner, outer in groups(given, made) if inner == [at] and len(outer) == 1), None)


def within(labels: Any, classes: int) -> Any:
    """The class that indexing takes for a label: from the end for one below 0, the nearest one for what is none."""
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    return jnp.clip(jnp.where(labels < 0, labels + classes, labels), 0, classes - 1)


def _head(logits: Value, axis: int) -> _Head | None:
    """Where logits come from, if it is a product with a kernel; ``axis`` is that of the classes."""
    value, bias, squash, moves = logits, None, [], []
    classes = logits.shape[axis]
    for _ in range(24):
        maker = value.maker
        if maker is None:
            return None
        if maker.name == "dot_general":
            side = _side(maker, len(value.shape), axis)
            cap = _cap(squash)
            return None if side is None or cap == 0 else _Head(maker, side, bias, cap, tuple(reversed(moves)))
        if maker.name == "transpose":
            axis = int(maker.params["permutation"][axis])
            moves.append(maker)
        elif maker.name == "slice":
            if maker.params["strides"] is not None or maker.inputs[0].shape[axis] != classes:
                return None
            moves.append(maker)
        elif maker.name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
            places = [a for a, n in enumerate(maker.inputs[0].shape) if n == classes and _followed(maker, a) == axis]
            if not places:
                return None
            axis = places[0]
            moves.append(maker)
        elif maker.name in ("add", "add_any") and bias is None:
            a, b = maker.inputs
            biases = [peeled(v) if peeled(v).size == classes else None for v in (a, b)]
            which = next((i for i in (1, 0) if biases[i] is not None), None)
            if which is None:
                return None
            bias, value = biases[which], maker.inputs[1 - which]
            continue
        elif maker.name in ("mul", "div", "tanh"):
            numbers = [v.number for v in maker.inputs]
            which = 0 if numbers[0] is None else 1
            squash.append((maker.name, None if maker.name == "tanh" else numbers[1 - which]))
            value = maker.inputs[which]
            continue
        elif maker.name not in ("convert_element_type", "copy", "pvary"):
            return None
        value = maker.inputs[0]
    return None


def _side(dot: Equation, rank: int, axis: int) -> int | None:
    """Which operand is x, where the other one is a kernel [features, classes] or [classes, features]."""
    contracted, batch = dot.params["dimension_numbers"]
    side = 0 if axis == rank - 1 else 1
    other = dot.inputs[1 - side]
    if any(map(len, batch)) or len(contracted[0]) != 1 or len(other.shape) != 2 or axis not in (0, rank - 1):
        return None
    return side if dot.inputs[0].dtype == dot.inputs[1].dtype and dot.inputs[0].is_float else None


def _cap(steps: list[tuple[str, float | None]]) -> float | None:
    """c of c · tanh(z / c), whose steps are given the last first; None without steps, 0 where they are something else."""
    if not steps:
        return None
    if [name for name, _ in steps[:2]] == ["mul", "tanh"] and len(steps) == 3 and steps[0][1]:
        return steps[0][1]
    return 0.0


# --------------------------------------------------------------------------------------------------- from losses to a sum


@dataclasses.dataclass(frozen=True)
class _Sum:
    """How the losses of tokens come to their sum."""

    total: Value
    weights: Value | None = None
    kind: str = ""  # "mul", or "where": what is weighted with 0 may be NaN
    inverted: bool = False  # the mask tells what is left out


def _sum(losses: Value) -> _Sum | None:
    """The sum of all losses, with weights or without; None where they are used otherwise."""
    value, found = losses, _Sum(losses)
    for _ in range(16):
        users = {id(u): u for u in value.users}
        if len(users) != 1:
            return None
        (user,) = users.values()
        others = [v for v in user.inputs if v is not value and not uniform(v)]
        if len(user.outputs) != 1 or len(others) > 1:
            return None
        if others:
            entering = next((v for v in (peeled(others[0]), others[0]) if v.size == losses.size), None)
            if entering is None or found.weights is not None:
                return None
            if user.name == "select_n":
                found = dataclasses.replace(found, weights=entering, kind="where", inverted=user.inputs[1] is value)
            elif user.name == "mul":
                found = dataclasses.replace(found, weights=entering, kind="mul")
            else:
                return None
        elif user.name not in SHAPING | {"neg", "reduce_sum", "mul"}:
            return None
        value = user.outputs[0]
        if user.name == "reduce_sum" and value.size == 1:
            return dataclasses.replace(found, total=value)
    return None


# -------------------------------------------------------------------------------------------------------------- the guess


def projected(program: Program, site: Site, axis: int, cuts: Sequence[Equation]) -> Site | Near | None:
    """From a cross-entropy that was found, the linear cross-entropy around it, or why it is none; None where there is nothing
    like it. ``cuts``: slices of its tokens behind the logits."""
    logits = site.inputs[0]
    if logits.shape[axis] < CLASSES or logits.size < LOGITS:
        return None
    head = _head(logits, axis)
    if head is None:
        return None
    head = dataclasses.replace(head, moves=(*head.moves, *cuts))
    near = "linear_cross_entropy"
    kernel, _ = head.kernel
    if head.dot.params["precision"] is not None or head.dot.params.get("out_sharding") is not None:
        return Near(near, "its product asks for a precision or a placement", head.dot)
    if not accumulates(kernel) or kernel.dtype == jnp.float16:
        why = "in float16" if accumulates(kernel) else f"its kernel has {kernel.size / 1e6:.0f} million elements, more than 67"
        return Near(near, f"{why}: it would be leaner, but compute the logits twice", head.dot)
    whole = _sum(site.outputs[0])
    if whole is None:
        return Near(near, "the loss of each token is used, not their sum alone", head.dot)
    found, why = first(program, _guesses(site, head, whole))
    return found or Near(near, why, head.dot)


def _guesses(site: Site, head: _Head, whole: _Sum) -> Iterator[Site]:
    kernel, classes_first = head.kernel
    classes = kernel.shape[0 if classes_first else 1]
    given = [head.x, kernel, *(v for v in (head.bias, whole.weights) if v is not None)]
    rows = math.prod(site.outputs[0].shape)
    for labels in integer_sources([site.inputs[1]], rows) or integer_constants([site.inputs[1]], rows):
        for sign in (-1, 1):
            for beyond in BEYOND:

                def call(labels: Any, x: Any, kernel: Any, *more: Any, sign: int = sign, beyond: str = beyond) -> tuple[Any]:
                    bias = more[0].reshape(-1) if head.bias is not None else None
                    weights = None if whole.weights is None else more[-1].reshape(-1)
                    total = _total(head, whole, head.tokens(x), kernel, labels.reshape(-1), bias, weights, beyond)
                    return ((sign * total).astype(whole.total.dtype).reshape(whole.total.shape),)

                options = (sign, beyond, whole.kind, whole.inverted, classes_first, head.cap)
                yield Site(
                    "linear_cross_entropy", [labels, *given], [whole.total], call, options, head.dot, classes, additive=True
                )


def _total(head: _Head, whole: _Sum, x: Any, kernel: Any, labels: Any, bias: Any, weights: Any, beyond: str) -> Any:
    _, classes_first = head.kernel
    classes = kernel.shape[0 if classes_first else 1]
    if weights is not None and whole.inverted:
        weights = ~weights
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    if beyond == "nan":
        labels = jnp.where(labels < 0, labels + classes, labels)
    elif beyond == "the nearest":
        labels = within(labels, classes)
    total = ops.linear_cross_entropy(
        x, kernel, labels, bias, weights=weights, ignore_index=None,
        soft_cap=head.cap, reduction="sum", transposed=classes_first,
    )  # fmt: skip
    if beyond != "nan":
        return total
    none = (labels < 0) | (labels >= classes)
    none = none & weights if whole.kind == "where" else none
    return jnp.where(jnp.any(none), jnp.nan, total)
