"""Small arithmetic that several derivations share. Nothing here is an op."""

import math
import operator
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def wide_type(*arrays: ArrayLike) -> Any:
    """The dtype to compute in: at least float32, so that in float64 a definition really is float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def wide(array: ArrayLike) -> jax.Array:
    """The array in at least float32."""
    array = jnp.asarray(array)
    return array.astype(wide_type(array))


def operand_type(*arrays: ArrayLike) -> Any:
    """What matrix products of small numbers multiply; they add up in float32 or wider. The probabilities of a large vocabulary,
    and the cotangents behind gates that are shut, lie below what float16 can tell from zero: there they stay in float32."""
    dtype = jnp.result_type(*arrays)
    return wide_type(*arrays) if dtype == jnp.float16 else dtype


def float_type(*arrays: ArrayLike) -> Any:
    """The dtype of the result of a function of real numbers: that of its inputs, the default float for integers."""
    dtype = jnp.result_type(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(dtype, jnp.float32)


def require_float(who: str, **arrays: ArrayLike | None) -> None:
    """Refuses arrays that are not of a floating-point dtype, by name."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(f"{who}: {name} must be of a floating-point dtype, got {jnp.result_type(array)}.")


def require_between(who: str, least: float, most: float, **numbers: Any) -> None:
    """Refuses Python numbers that are not from ``least`` to ``most``, by name; NaN among them."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not least <= value <= most:
            expected = f"a number from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
            raise ValueError(f"{who}: {name} is {value!r}, expected {expected}.")


def require_epsilon(who: str, epsilon: Any) -> None:
    """Refuses what is added below a root or a quotient, where it is no number from 0."""
    require_between(who, 0.0, float("inf"), epsilon=epsilon)


def require_fit(who: str, shape: tuple[int, ...], told: str, **numbers: ArrayLike) -> None:
    """Refuses arrays of numbers that would make the result larger."""
    for name, value in numbers.items():
        have = jnp.shape(value)
        if len(have) > len(shape) or any(n not in (1, want) for n, want in zip(have[::-1], shape[::-1])):
            raise ValueError(
                f"{who}: {name} has shape {have}, expected a number, or a shape that broadcasts to {shape}, {told}."
            )


@overload
def ranked(array: ArrayLike, like: jax.Array) -> jax.Array: ...
@overload
def ranked(array: None, like: jax.Array) -> None: ...
@overload
def ranked(array: ArrayLike | None, like: jax.Array) -> jax.Array | None: ...
def ranked(array: ArrayLike | None, like: jax.Array) -> jax.Array | None:
    """An array that broadcasts, with as many dimensions as the other."""
    return None if array is None else jnp.reshape(array, (1,) * (like.ndim - jnp.ndim(array)) + jnp.shape(array))


def shapes(**arrays: Any) -> str:
    """``x (32, 5), kernel (7, 10)``, for messages."""
    return ", ".join(f"{name} {jnp.shape(a)}" for name, a in arrays.items() if a is not None)


def canonical_axes(who: str, axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """``axis`` as sorted indices from the front; None means all."""
    try:
        axes = range(ndim) if axis is None else [operator.index(a) for a in (axis if isinstance(axis, Sequence) else [axis])]
    except TypeError:
        raise TypeError(f"{who}: axis is {axis!r}, expected an integer, a tuple of integers or None.") from None
    if bad := [a for a in axes if not -ndim <= a < ndim]:
        raise ValueError(f"{who}: axis {bad[0]} is out of range for an array with {ndim} dimensions.")
    found = sorted({a % ndim for a in axes})
    if len(found) != len(axes):
        raise ValueError(f"{who}: axis {axis} names a dimension twice.")
    return tuple(found)


def count(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[a] for a in axes)


def with_bias(y: jax.Array, bias: ArrayLike | None) -> jax.Array:
    """y [..., n] + bias [n]; y where there is no bias."""
    return y if bias is None else y + jnp.asarray(bias).reshape((1,) * (y.ndim - 1) + (-1,))


def varying_like(tree: Any, *others: Any) -> Any:
    """Inside shard_map: arrays that vary over the mesh axes of the others too, as what a loop begins with must."""
    axes: set[Any] = set().union(*(jax.typeof(other).mat.varying for other in jax.tree.leaves(others)))

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).mat.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def still(value: jax.Array, where: jax.Array) -> jax.Array:
    """The value itself, but a constant to derivatives ``where`` this is true."""
    return jnp.where(where, jax.lax.stop_gradient(value), value)


def nbytes(*arrays: Any) -> int:
    """Bytes of arrays, or of whatever has a shape and a dtype as they have; None has none."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays if a is not None)


def batched(array: jax.Array, keep: int) -> jax.Array:
    """All but the last ``keep`` axes as one. (``reshape(-1, …)`` cannot tell its length where another axis is empty.)"""
    lead = array.ndim - keep
    return array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:])


def sum_to(array: jax.Array, shape: Sequence[int], dtype: DTypeLike | None = None) -> jax.Array:
    """Sums over the axes along which an argument of ``shape`` was broadcast: the adjoint of broadcasting."""
    lead = array.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and array.shape[lead + i] != 1)
    if axes:
        array = array.sum(axes, keepdims=True).reshape(shape)
    return array if dtype is None else array.astype(dtype)
