"""Products of rows with a matrix, and the two products that are their backward. Nothing here is an op."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fbackprop.ops._arithmetic import batched, wide


def product(x: jax.Array, matrix: jax.Array, precision: Any, preferred: DTypeLike | None = None) -> jax.Array:
    """x W: x [..., k], W [k, n] -> [..., n], in the preferred dtype, by default that which both promote to."""
    return _contract(x, matrix, (x.ndim - 1, 0), precision, preferred)


def product_transposed(dy: jax.Array, matrix: jax.Array, precision: Any) -> jax.Array:
    """dy Wᵀ, the cotangent of x: dy [..., n], W [k, n] -> [..., k]. (As rows of a matrix: so the layouts are those of x W.)"""
    return _contract(batched(dy, 1), matrix, (1, 1), precision).reshape(*dy.shape[:-1], matrix.shape[0])


def outer_sum(x: jax.Array, dy: jax.Array, precision: Any) -> jax.Array:
    """xᵀ dy summed over all rows, the cotangent of W: x [..., k], dy [..., n] -> [k, n]."""
    return _contract(batched(x, 1), batched(dy, 1), (0, 0), precision)


def row_sum(dy: jax.Array) -> jax.Array:
    """Σ dy over all rows, the cotangent of a bias, in float32 or wider: dy [..., n] -> [n]."""
    return wide(batched(dy, 1)).sum(0)


def _contract(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any, preferred: DTypeLike | None = None
) -> jax.Array:
    dtype = jnp.result_type(a, b)
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), numbers, precision=precision, preferred_element_type=preferred)
