"""Compositions by element or row: other names of ops, and ops with something constant before or after them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.ops._arithmetic import canonical_axes

__all__ = ["hard_swish", "identity", "logmeanexp", "one_hot", "prelu", "softmin", "stochastic_depth", "swish"]

Axis = int | Sequence[int] | None

swish: Any = ops.silu
"""Another name of ``silu``."""

hard_swish: Any = ops.hard_silu
"""Another name of ``hard_silu``."""

one_hot = jax.nn.one_hot
"""jax.nn's own: integers have no gradient."""

identity = jax.nn.identity
"""jax.nn's own: y = x, dx = dy, and nothing to keep."""


def prelu(x: ArrayLike, negative_slope: ArrayLike) -> jax.Array:
    """relu with a slope on the negative side that is learned: y = x where x ≥ 0, else negative_slope · x.

    x [...], negative_slope [] or of a shape that broadcasts with x, such as [channels] -> y [...]. A composition: leaky_relu,
    whose slope is an argument with a cotangent. Source: He et al. 2015, arXiv:1502.01852.
    """
    missing = jnp.ndim(x) - jnp.ndim(negative_slope) if jnp.ndim(negative_slope) else 0
    return ops.leaky_relu(x, jnp.reshape(negative_slope, (1,) * missing + jnp.shape(negative_slope)))


def softmin(x: ArrayLike, axis: int | Sequence[int] | None = -1, where: ArrayLike | None = None) -> jax.Array:
    """The softmax of −x: the smallest element gets the most.

    x [...] -> y [...]. A composition. Args: as for ``softmax``.
    """
    return ops.softmax(jnp.negative(x), axis, where)


def logmeanexp(x: ArrayLike, axis: Axis = None, where: ArrayLike | None = None, keepdims: bool = False) -> jax.Array:
    """The logarithm of a mean of exponentials: y = log (1/n Σ exp(x)), without overflow.

    x [...] -> y, without the axes that are summed. A composition: logsumexp less log n. −inf where nothing is counted.

    Args:
      axis: the dimension or dimensions to sum over; None is all. where: elements to count, of a shape that broadcasts with x.
      keepdims: keep the summed axes, with length 1.
    """
    total = ops.logsumexp(x, axis, keepdims=keepdims, where=where)
    axes = canonical_axes("logmeanexp", axis, jnp.ndim(x))
    counted = jnp.ones(jnp.shape(x), bool) if where is None else jnp.broadcast_to(where, jnp.shape(x))
    n = jnp.sum(counted, axes, keepdims=keepdims, dtype=total.dtype)
    return total - jnp.log(jnp.maximum(n, 1))


def stochastic_depth(x: ArrayLike, rate: float, key: Any = None, *, deterministic: bool = False) -> jax.Array:
    """Drops whole examples of a residual branch with probability ``rate``, and scales the others by 1 / (1 − rate).

    x [batch, ...] -> y [batch, ...]. Also called drop path. A composition: dropout with one decision an example, which keeps a
    byte an example.

    Args:
      key: needed unless ``deterministic`` or ``rate`` is 0.
    Raises:
      ValueError: where x has no batch axis, rate is outside of [0, 1] or the key is missing.
    Source: Huang et al. 2016, arXiv:1603.09382.
    """
    if jnp.ndim(x) < 1:
        raise ValueError("stochastic_depth: x is a single number, expected [batch, ...].")
    return ops.dropout(x, rate, key, broadcast_dims=tuple(range(1, jnp.ndim(x))), deterministic=deterministic)
