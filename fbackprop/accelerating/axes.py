"""The axes of a region, and the lengths to evaluate it at.

What a program computes is found out by running it. To run it cheaply at any size, axes are put into classes: two axes are of
one class where an equation walks along both of them together. A class that nothing reduces, orders or counts is *parallel*: the
program does the same for each of its elements, so two or three elements tell as much as a million. All other axes keep their
length, since what is divided by a length, or compared with a position, depends on it.

Of a site that is *additive* sums mean the same at every length, on both sides of a proof: there axes that are summed, also by a
product, may be short as well. So may axes that are cut (the length of one is that of the other and some) or become one (it is
the product of theirs), with lengths that fit together.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fbackprop.accelerating.evaluation import ELEMENTWISE, REDUCE, Unknown, is_elementwise
from fbackprop.accelerating.program import Equation, Region, Value

__all__ = ["Axes", "groups"]


class _Classes:
    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def of(self, axis: Any) -> Any:
        above = self._above.setdefault(axis, axis)
        while above != self._above[above]:
            self._above[above] = above = self._above[self._above[above]]
        return above

    def join(self, a: Any, b: Any) -> None:
        self._above[self.of(a)] = self.of(b)


class Axes:
    """The classes of the axes of a region, and the lengths to evaluate it at."""

    def __init__(
        self, region: Region, whole: Sequence[tuple[Value, int]] = (), short: Sequence[int] = (2, 3), additive: bool = False
    ):
        self._additive = additive  # sums may be short, and so may axes that are cut or become one
        self._relations: list[tuple[Any, list[Any], int]] = []  # an axis, those of which it is the product, and what more
        self._classes = _Classes()
        self._along = _Classes()  # joined by values that depend on the inputs; a position does not make queries keys
        self._moving = region.moving
        self._fixed: set[Any] = set()
        self._given = set(map(id, region.inputs))
        self._full = {
            (id(v), a): n for v in (*region.inputs, *(v for e in region.equations for v in (*e.inputs, *e.outputs)))
            for a, n in enumerate(v.shape)
        }  # fmt: skip
        for equation in region.equations:
            self._relate(equation)
        self._fixed.update((id(v), a) for v, a in whole)
        self._lengths = self._assigned(short)

    def _assigned(self, short: Sequence[int]) -> dict[Any, int]:
        """A length for each class; a relation that cannot be kept at short lengths is kept at the full ones."""
        of = self._classes.of
        relations = [(of(whole), [of(p) for p in parts], more) for whole, parts, more in self._relations]
        fixed = {of(axis) for axis in self._fixed}
        while True:
            while spreading := [r for r in relations if {r[0], *r[1]} & fixed and not {r[0], *r[1]} <= fixed]:
                fixed.update(root for whole, parts, _ in spreading for root in (whole, *parts))
            made = {whole for whole, *_ in relations}
            turns, lengths = itertools.cycle(short), {}
            for axis, n in self._full.items():
                root = of(axis)
                if root not in lengths and (root in fixed or root not in made):
                    lengths[root] = n if root in fixed else min(n, next(turns))
            broken, pending = [], [r for r in relations if r[0] not in fixed]
            while pending:
                ready = [r for r in pending if all(p in lengths for p in r[1])]
                for whole, parts, more in ready:
                    n = math.prod(lengths[p] for p in parts) + more
                    if lengths.setdefault(whole, n) != n:
                        broken.append(whole)
                broken += [] if ready else [r[0] for r in pending]
                pending = [r for r in pending if r not in ready] if ready else []
            if not broken:
                return lengths
            fixed.update(broken)

    def together(self, a: Value, i: int, b: Value, j: int) -> bool:
        """Whether the program walks along these two axes together."""
        return self._along.of((id(a), i)) == self._along.of((id(b), j))

    def shape(self, value: Value) -> tuple[int, ...]:
        """The lengths to evaluate a value at."""
        return tuple(1 if n == 1 else self._lengths[self._classes.of((id(value), a))] for a, n in enumerate(value.shape))

    def shortened(self, value: Value) -> np.ndarray:
        """A constant at these lengths: the first elements."""
        array = np.asarray(value.known)
        return array[tuple(slice(n) for n in self.shape(value))]

    def _join(self, a: Value, i: int, b: Value, j: int) -> None:
        if a.shape[i] == b.shape[j] != 1:
            self._classes.join((id(a), i), (id(b), j))
            if id(a) in self._moving and id(b) in self._moving:
                self._along.join((id(a), i), (id(b), j))

    def _fix(self, value: Value, axes: Any = None) -> None:
        self._fixed.update((id(value), a) for a in (range(len(value.shape)) if axes is None else axes))

    def _relate(self, equation: Equation) -> None:
        name, p, inputs, outputs = equation.name, equation.params, equation.inputs, equation.outputs
        for value in inputs:
            if value.known is not None and value.size > 1 and id(value) not in self._given:
                self._fix(value)  # its numbers may differ from place to place
        out = outputs[0]
        if name == "custom_jvp_call" and not is_elementwise(equation):
            raise Unknown("a derivative of somebody else's")
        if name in ELEMENTWISE:
            for value in inputs:
                for axis in range(len(value.shape) if len(value.shape) == len(out.shape) else 0):
                    self._join(value, axis, out, axis)
        elif name == "broadcast_in_dim":
            for axis, to in enumerate(p["broadcast_dimensions"]):
                self._join(inputs[0], axis, out, int(to))
        elif name == "transpose":
            for to, axis in enumerate(p["permutation"]):
                self._join(inputs[0], int(axis), out, to)
        elif name in ("reshape", "squeeze", "expand_dims"):
            self._relate_reshape(inputs[0], out)
        elif name in REDUCE or name in ("argmax", "argmin"):
            reduced = [int(a) for a in p["axes"]]
            if not (self._additive and name == "reduce_sum"):
                self._fix(inputs[0], reduced)
            kept = [a for a in range(len(inputs[0].shape)) if a not in reduced]
            for to, axis in enumerate(kept):
                self._join(inputs[0], axis, out, to)
        elif name == "dot_general":
            (left, right), (lefts, rights) = p["dimension_numbers"]
            a, b = inputs
            if not self._additive:
                self._fix(a, left)
                self._fix(b, right)
            for i, j in zip(left, right):
                self._join(a, i, b, j)
            free_a = [i for i in range(len(a.shape)) if i not in (*left, *lefts)]
            free_b = [j for j in range(len(b.shape)) if j not in (*right, *rights)]
            for to, (i, j) in enumerate(zip(lefts, rights)):
                self._join(a, i, out, to)
                self._join(b, j, out, to)
            for to, i in enumerate(free_a, len(lefts)):
                self._join(a, i, out, to)
            for to, j in enumerate(free_b, len(lefts) + len(free_a)):
                self._join(b, j, out, to)
        elif name == "iota":
            self._fix(out, [p["dimension"]])
        elif name == "slice" and self._additive and p["strides"] is None:
            self._relate_cut(inputs[0], out)
        elif name in ("concatenate", "slice", "split"):
            for value in (*inputs, *outputs):
                self._fix(value)
        elif name == "gather":
            self._relate_gather(equation)
        else:
            raise Unknown(f"{name} is not among what is evaluated")

    def _relate_cut(self, x: Value, out: Value) -> None:
        for axis, (n, rest) in enumerate(zip(x.shape, out.shape)):
            if n == rest:
                self._join(x, axis, out, axis)
            elif rest > 1 and n - rest <= 8:
                self._relations.append(((id(x), axis), [(id(out), axis)], n - rest))
            else:
                self._fix(x, [axis])
                self._fix(out, [axis])

    def _relate_reshape(self, x: Value, out: Value) -> None:
        for group, others in groups(x.shape, out.shape):
            if len(group) == len(others) == 1:
                self._join(x, group[0], out, others[0])
            elif self._additive and len(others) == 1:
                self._relations.append(((id(out), others[0]), [(id(x), i) for i in group], 0))
            elif self._additive and len(group) == 1:
                self._relations.append(((id(x), group[0]), [(id(out), j) for j in others], 0))
            else:
                self._fix(x, group)
                self._fix(out, others)

    def _relate_gather(self, equation: Equation) -> None:
        (x, indices), out, d = equation.inputs, equation.outputs[0], equation.params["dimension_numbers"]
        batch = [a for a in range(len(out.shape)) if a not in d.offset_dims]
        for to, axis in zip(batch, range(len(indices.shape) - 1)):
            self._join(indices, axis, out, to)
        for i, j in zip(d.operand_batching_dims, d.start_indices_batching_dims):
            self._join(x, i, indices, j)
        offset = [a for a in range(len(x.shape)) if a not in (*d.collapsed_slice_dims, *d.operand_batching_dims)]
        sizes = equation.params["slice_sizes"]
        for axis, to in zip(offset, d.offset_dims):
            if axis in d.start_index_map or sizes[axis] != x.shape[axis]:
                self._fix(x, [axis])
                self._fix(out, [to])
            else:
                self._join(x, axis, out, to)
        self._fix(x, d.collapsed_slice_dims)
        self._fix(x, d.start_index_map)


def groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Neighbouring axes of two shapes that hold the same elements; axes of length 1 belong to nobody."""
    left, right = [i for i, n in enumerate(a) if n != 1], [j for j, n in enumerate(b) if n != 1]
    groups = []
    while left and right:
        i, j = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(a[k] for k in i)) != (n := math.prod(b[k] for k in j)):
            i, j = ([*i, left.pop(0)], j) if m < n else (i, [*j, right.pop(0)])
        groups.append((i, j))
    return groups
