"""What the normalizations share: statistics of elements that a mask may leave out, and parameters lined up with x."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import require_float, wide, wide_type


def along(axes: Sequence[int], parameter: ArrayLike | None, ndim: int) -> jax.Array | None:
    """A parameter of the shape of these axes, wide, ready to broadcast with x."""
    if parameter is None:
        return None
    sizes = iter(jnp.shape(parameter))
    return wide(parameter).reshape([next(sizes) if i in axes else 1 for i in range(ndim)])


def scaled(xhat: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    y = xhat if scale is None else xhat * scale
    return y if bias is None else y + bias


def check(who: str, x: jax.Array, expected: tuple[int, ...], where: ArrayLike | None, **parameters: ArrayLike | None) -> None:
    """Refuses parameters that are not of the shape of the features, and masks that do not fit."""
    require_float(who, **{n: p for n, p in parameters.items() if p is not None})
    for name, parameter in parameters.items():
        if parameter is not None and jnp.shape(parameter) != expected:
            raise ValueError(f"{who}: {name} has shape {jnp.shape(parameter)}, expected {expected}, that of the features of x.")
    if where is None:
        return
    if not jnp.issubdtype(jnp.result_type(where), jnp.bool_):
        raise TypeError(f"{who}: where must be a mask of booleans, got {jnp.result_type(where)}.")
    shape = jnp.shape(where)
    if len(shape) != x.ndim or any(n not in (1, size) for n, size in zip(shape, x.shape)):
        raise ValueError(f"{who}: where must have the dimensions of x, each of its size or 1 (where {shape}, x {x.shape}).")


def counted(where: jax.Array | None, values: jax.Array) -> jax.Array:
    """The values, zero where the mask leaves an element out."""
    return values if where is None else jnp.where(where, values, 0)


def number(where: jax.Array | None, x: jax.Array, axes: Sequence[int]) -> Any:
    """How many elements are counted: a number, or with a mask an array with these axes of size 1."""
    if where is None:
        return math.prod(x.shape[a] for a in axes)
    return jnp.sum(jnp.broadcast_to(where, x.shape), axes, keepdims=True, dtype=wide_type(x))


def average(total: jax.Array, n: Any) -> jax.Array:
    """total / n; zero where nothing is counted."""
    return total / (max(n, 1) if isinstance(n, int) else jnp.maximum(n, 1))


def reciprocal_deviation(var: jax.Array, n: Any, epsilon: float) -> jax.Array:
    """1 / √(σ² + ε), with a variance of 1 where nothing is counted."""
    return jax.lax.rsqrt((var if isinstance(n, int) else jnp.where(n > 0, var, 1)) + epsilon)


def statistics(x: jax.Array, axes: Sequence[int], where: jax.Array | None, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """The definition: μ and 1 / √(σ² + ε) over these axes, which stay as axes of size 1."""
    n = number(where, x, axes)
    mean = average(jnp.sum(counted(where, x), axes, keepdims=True), n)
    var = average(jnp.sum(counted(where, jnp.square(x - mean)), axes, keepdims=True), n)
    return mean, reciprocal_deviation(var, n, epsilon)


def tied(result: Any, *parameters: ArrayLike | None) -> Any:
    """Lets every output depend on every parameter, by a choice between equals that the compiler drops. Under vmap over some
    of the parameters alone JAX counts the cotangent of an output that does not depend on them once for each member."""
    for parameter in parameters:
        if parameter is not None:
            same = jnp.equal(parameter, parameter)
            result = jax.tree.map(lambda v, same=same: jnp.where(same.reshape((1,) * (v.ndim - 1) + (-1,)), v, v), result)
    return result
