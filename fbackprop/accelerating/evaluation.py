"""A region evaluated in float64 by NumPy, with every axis that is only looped over made short.

What a program computes is found out by running it. To run it cheaply at any size, axes are put into classes: two axes are of
one class where an equation walks along both of them together. A class that nothing reduces, orders or counts is *parallel*: the
program does the same for each of its elements, so two or three elements tell as much as a million. All other axes keep their
length, since what is divided by a length, or compared with a position, depends on it.

Casts between floating-point types are the identity here. Only what is in the tables below is evaluated; a region with anything
else in it is nobody's.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from fbackprop.accelerating.program import Equation, Program, Region, Value, inside, scan_counts

__all__ = ["ELEMENTWISE", "FULL", "Axes", "Lengths", "OneShape", "Unknown", "evaluate", "groups", "is_elementwise"]


class Unknown(Exception):
    """A region that cannot be evaluated; says why."""


def _elementwise() -> dict[str, Callable[..., Any]]:
    special: Any = scipy.special
    table: dict[str, Callable[..., Any]] = {
        "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
        "neg": np.negative, "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "square": np.square,
        "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt,
        "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "pow": np.power, "is_finite": np.isfinite,
        "logistic": special.expit, "erf": special.erf, "erfc": special.erfc, "erf_inv": special.erfinv,
        "rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt, "atan2": np.arctan2,
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        "not": np.logical_not, "stop_gradient": lambda x: x, "copy": lambda x: x, "copy_p": lambda x: x,
        "pvary": lambda x: x, "optimization_barrier": lambda x: x, "reduce_precision": lambda x: x,
    }  # fmt: skip
    return table


_PLAIN = _elementwise()
_LOGICAL = {
    "and": (np.logical_and, np.bitwise_and), "or": (np.logical_or, np.bitwise_or), "xor": (np.logical_xor, np.bitwise_xor),
}  # fmt: skip
ELEMENTWISE = frozenset(
    (*_PLAIN, *_LOGICAL, "div", "rem", "integer_pow", "convert_element_type", "select_n", "clamp", "custom_jvp_call")
)
_REDUCE = {
    "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_and": np.all, "reduce_or": np.any,
}  # fmt: skip


def is_elementwise(equation: Equation) -> bool:
    """Whether each element of the output is a function of the elements at its own place."""
    if equation.name == "custom_jvp_call":
        return all(is_elementwise(e) for p in inside(equation) for e in Program.of(p).equations)
    return equation.name in ELEMENTWISE


# ----------------------------------------------------------------------------------------------------- classes of axes


class Lengths(Protocol):
    """The lengths that the values of a region are evaluated at."""

    def shape(self, value: Value) -> tuple[int, ...]: ...

    def shortened(self, value: Value) -> np.ndarray:
        """A constant at these lengths."""
        ...


class _Full:
    def shape(self, value: Value) -> tuple[int, ...]:
        return value.shape

    def shortened(self, value: Value) -> np.ndarray:
        return np.asarray(value.known)


FULL: Lengths = _Full()
"""The lengths of the program itself."""


class OneShape:
    """The axes of an elementwise program: its values have one shape, or none."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape

    def shape(self, value: Value) -> tuple[int, ...]:
        return self._shape if value.shape else ()

    def shortened(self, value: Value) -> np.ndarray:
        return np.asarray(value.known)


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
            if value.known is not None and value.size > 1:
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
        elif name in _REDUCE or name in ("argmax", "argmin"):
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


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(region: Region, lengths: Lengths, arguments: Sequence[np.ndarray], stopped: float = 0.0) -> list[np.ndarray]:
    """The outputs of a region. Noise of the size ``stopped`` is added to every element under a stop_gradient: where that
    changes nothing, stopping takes nothing from the derivative either."""
    noise = np.random.default_rng(3)
    known: dict[int, np.ndarray] = dict(zip(map(id, region.inputs), arguments))

    def read(value: Value) -> np.ndarray:
        if id(value) in known:
            return known[id(value)]
        array = lengths.shortened(value)
        return array.astype(np.float64) if value.is_float else array

    with np.errstate(all="ignore"):
        for equation in region.equations:
            arrays = [read(v) for v in equation.inputs]
            results = _results(equation, arrays, [lengths.shape(v) for v in equation.outputs])
            if equation.name == "stop_gradient" and equation.outputs[0].is_float:
                results = [r + stopped * noise.normal(size=np.shape(r)) for r in results]
            known.update(zip(map(id, equation.outputs), results))
        return [np.asarray(read(v)) for v in region.outputs]


def _results(equation: Equation, arrays: list[np.ndarray], shapes: list[tuple[int, ...]]) -> list[Any]:
    name, p = equation.name, equation.params
    if name == "custom_jvp_call":
        program = Program.of(p["call_jaxpr"])
        inner = Region(program.inputs, program.outputs, program.equations, set())
        return evaluate(inner, OneShape(shapes[0]), arrays)
    if name == "scan":
        return _scan(p, arrays)
    if name == "split":
        return np.split(arrays[0], np.cumsum([int(n) for n in p["sizes"]])[:-1], int(p["axis"]))
    if name in _PLAIN:
        if name == "not" and arrays[0].dtype != np.bool_:
            return [np.bitwise_not(arrays[0])]
        return [_PLAIN[name](*arrays)]
    return [_single(name, p, arrays, shapes[0], equation)]


def _scan(p: dict[str, Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Step by step, at full lengths."""
    program = Program.of(p["jaxpr"])
    body = Region(program.inputs, program.outputs, program.equations, set())
    fixed, carried = scan_counts(p)
    consts, carry, xs = arrays[:fixed], arrays[fixed : fixed + carried], arrays[fixed + carried :]
    rows = []
    for t in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
        out = evaluate(body, FULL, [*consts, *carry, *(x[t] for x in xs)])
        carry = out[:carried]
        rows.append(out[carried:])
    rows = rows[::-1] if p["reverse"] else rows
    return [*carry, *(np.stack(column) for column in zip(*rows))]


def _single(name: str, p: dict[str, Any], arrays: list[np.ndarray], shape: tuple[int, ...], equation: Equation) -> Any:
    x = arrays[0] if arrays else np.zeros(())
    if name in _LOGICAL:
        return _LOGICAL[name][x.dtype != np.bool_](*arrays)
    if name == "div":
        floats = np.issubdtype(x.dtype, np.floating)
        return x / arrays[1] if floats else np.trunc(x / arrays[1]).astype(x.dtype)
    if name == "rem":
        return np.fmod(*arrays)
    if name == "integer_pow":
        return np.power(x, float(p["y"])) if p["y"] < 0 else np.power(x, p["y"])
    if name == "convert_element_type":
        return _cast(x, p["new_dtype"])
    if name == "select_n":
        which, cases = x, np.broadcast_arrays(*arrays[1:])
        return np.choose(np.broadcast_to(which.astype(np.int64), cases[0].shape), cases)
    if name == "clamp":
        return np.minimum(np.maximum(arrays[1], x), arrays[2])
    if name == "broadcast_in_dim":
        spread = [1] * len(shape)
        for axis, to in enumerate(p["broadcast_dimensions"]):
            spread[int(to)] = x.shape[axis]
        return np.broadcast_to(x.reshape(spread), shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        return x.reshape(shape)
    if name == "concatenate":
        return np.concatenate(arrays, int(p["dimension"]))
    if name == "slice":
        steps = p["strides"] or (1,) * x.ndim
        cut = [n - b for n, b in zip(equation.inputs[0].shape, p["limit_indices"])]  # from the end
        return x[tuple(slice(a, n - c, s) for a, n, c, s in zip(p["start_indices"], x.shape, cut, steps))]
    if name == "transpose":
        return x.transpose([int(a) for a in p["permutation"]])
    if name in _REDUCE:
        return _REDUCE[name](x, axis=tuple(int(a) for a in p["axes"]))
    if name in ("argmax", "argmin"):
        return getattr(np, name)(x, axis=int(p["axes"][0]))
    if name == "iota":
        n = np.arange(shape[p["dimension"]]).astype(np.dtype(p["dtype"]))
        return np.broadcast_to(n.reshape([-1 if a == p["dimension"] else 1 for a in range(len(shape))]), shape)
    if name == "dot_general":
        return _dot(p["dimension_numbers"], *arrays)
    if name == "gather":
        return _gather(equation, arrays)
    raise Unknown(f"{name} is not among what is evaluated")


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    if jnp.issubdtype(dtype, jnp.floating):
        return x.astype(np.float64)
    return x.astype(np.dtype(dtype))


def _dot(numbers: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (left, right), (lefts, rights) = numbers
    a_axes, b_axes = list(range(a.ndim)), list(range(100, 100 + b.ndim))
    for i, j in (*zip(left, right), *zip(lefts, rights)):
        b_axes[j] = a_axes[i]
    out = [a_axes[i] for i in lefts]
    out += [n for i, n in enumerate(a_axes) if i not in (*left, *lefts)]
    out += [n for j, n in enumerate(b_axes) if j not in (*right, *rights)]
    names = {n: k for k, n in enumerate(dict.fromkeys((*a_axes, *b_axes)))}
    return np.einsum(a, [names[n] for n in a_axes], b, [names[n] for n in b_axes], [names[n] for n in out], optimize=True)


def _gather(equation: Equation, arrays: list[np.ndarray]) -> np.ndarray:
    """By JAX itself, with slices of the lengths that the operand now has."""
    p, x = dict(equation.params), equation.inputs[0]
    sizes = [now if size == full else size for size, full, now in zip(p["slice_sizes"], x.shape, arrays[0].shape)]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]), jax.ensure_compile_time_eval():
        out = jax.lax.gather(
            jnp.asarray(arrays[0]), jnp.asarray(arrays[1]), p["dimension_numbers"], sizes, mode=p["mode"],
            fill_value=p["fill_value"],
        )  # fmt: skip
        return np.asarray(out)
