"""A region evaluated in float64 by NumPy, at lengths that may be shorter than the program's.

Casts between floating-point types are the identity here. Only what is in the tables below is evaluated; a region with anything
else in it is nobody's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from fbackprop.accelerating.program import Equation, Program, Region, Value, inside, scan_counts

__all__ = ["ELEMENTWISE", "FULL", "REDUCE", "Lengths", "OneShape", "Unknown", "evaluate", "is_elementwise"]


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
REDUCE = {
    "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_and": np.all, "reduce_or": np.any,
}  # fmt: skip


def is_elementwise(equation: Equation) -> bool:
    """Whether each element of the output is a function of the elements at its own place."""
    if equation.name == "custom_jvp_call":
        return all(is_elementwise(e) for p in inside(equation) for e in Program.of(p).equations)
    return equation.name in ELEMENTWISE


# -------------------------------------------------------------------------------------------------------------- lengths


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
    if name in REDUCE:
        return REDUCE[name](x, axis=tuple(int(a) for a in p["axes"]))
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
