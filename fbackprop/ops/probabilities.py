"""Softmax and its logarithm, over an axis (or several) of x; sums Σ run over it, for each row.

softmax                                       log_softmax

    p = exp(x − m) / s                            y = (x − m) − log s

    dx = p (dy − Σ dy p)                          dx = dy − p Σ dy

with m = max x and s = Σ exp(x − m).

Derivation for softmax: ∂p_i/∂x_j = p_i (δ_ij − p_j), so dx_j = Σ_i dy_i p_i (δ_ij − p_j) = p_j (dy_j − Σ_i dy_i p_i).
For its logarithm ∂y_i/∂x_j = δ_ij − p_j.

softmax keeps p. log_softmax keeps y, as p = exp(y); below float32, where p would be off by the rounding of y, it keeps x and
two numbers a row in float32, m and s: not m + log s, whose rounding is the larger part of p's error for logits of some
hundreds. With ``where``, elements that are left out have p = 0 (y = −∞ for log_softmax) and receive no cotangent.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import canonical_axes, float_type, wide
from fbackprop.rules import rule
from fbackprop.samples import mask, normal, sample

__all__ = ["log_softmax", "softmax"]

Axis = int | Sequence[int] | None


class Normalizer(NamedTuple):
    """What log Σ exp(x) = top + log(total) is made of, for each row. The sum is not formed: next to a large top the other
    part is lost. A row of nothing but −inf has the total 1, so that its probabilities are zero and not NaN."""

    top: jax.Array
    total: jax.Array

    def log_probability(self, x: jax.Array) -> jax.Array:
        """x − log Σ exp(x)."""
        return (x - self.top) - jnp.log(self.total)

    def probability(self, x: jax.Array) -> jax.Array:
        """exp(x) / Σ exp(x)."""
        return jnp.exp(x - self.top) * (1 / self.total)


def log_normalizer(x: jax.Array, axis: Any, where: jax.Array | None = None) -> Normalizer:
    """log Σ exp(x) over ``axis``, which stays with length 1; x in float32 or wider."""
    top = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)  # a row of −inf: exp(−inf − 0) = 0, not exp(−inf + inf)
    inside = x if where is None else jnp.where(where, x, -jnp.inf)
    total = jnp.sum(jnp.exp(inside - top), axis, keepdims=True)
    return Normalizer(top, jnp.where(total == 0, 1, total))


def _softmax(x: ArrayLike, axis: Axis, where: ArrayLike | None) -> jax.Array:
    x_ = wide(x)
    inside = x_ if where is None else jnp.where(where, x_, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(x_, axis, keepdims=True, where=where, initial=-jnp.inf))
    e = jnp.exp(inside - top)
    p = e / jnp.sum(e, axis, keepdims=True)
    return (p if where is None else jnp.where(where, p, 0)).astype(float_type(x))


class _SoftmaxSaved(NamedTuple):
    p: jax.Array


def _softmax_forward(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> tuple[jax.Array, _SoftmaxSaved]:
    p = _softmax(x, axis, where)
    return p, _SoftmaxSaved(p)


def _softmax_backward(saved: _SoftmaxSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    p, g = wide(saved.p), wide(dy)
    mean = jnp.sum(g * p, axis, keepdims=True)
    if saved.p.dtype != p.dtype:
        # A rounded p does not sum to one, and where one p is near 1, dy − Σ dy p would be the difference of two close
        # numbers with different errors. Dividing by the sum of what was kept takes that error out.
        total = jnp.sum(p, axis, keepdims=True)
        mean = mean / jnp.where(total == 0, 1, total)
    return p * (g - mean), None


_SAMPLES = [
    sample(normal(5, 7)),
    sample(normal(4, 3, 5, scale=3.0), axis=1),
    sample(normal(4, 3, 5), axis=(0, 2)),
    sample(normal(6, 8), where=mask(6, 8)),
    sample(normal(5, 7, scale=8.0)),
    sample(normal(6, 8), where=mask(6, 8, keep=0.1)),
]


@rule(
    forward=_softmax_forward,
    backward=_softmax_backward,
    static=["axis"],
    samples=_SAMPLES,
    workloads=[sample(normal(8192, 1024), dtype=d) for d in ("float32", "bfloat16")],
    keeps="y",
)
def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Turns logits into probabilities: y = exp(x) / Σ exp(x), each row positive and summing to one.

    x [...] -> y [...], of the same dtype.

    Args:
      axis: the dimension or dimensions to sum over; None is all.
      where: elements to include, of a shape that broadcasts with x; the others get 0.
    """
    canonical_axes("softmax", axis, jnp.ndim(x))
    return _softmax(x, axis, where)


class _LogSoftmaxSaved(NamedTuple):
    x: jax.Array | None  # below float32, with
    normalizer: Normalizer | None
    y: jax.Array | None  # in float32 and wider, where x and the normalizer are not needed
    where: jax.Array | None


def _log_softmax_forward(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> tuple[jax.Array, _LogSoftmaxSaved]:
    x_ = wide(x)
    where = None if where is None else jnp.asarray(where)
    normalizer = log_normalizer(x_, axis, where)
    y = normalizer.log_probability(x_)
    y = (y if where is None else jnp.where(where, y, -jnp.inf)).astype(float_type(x))
    if jnp.result_type(x) == x_.dtype:
        return y, _LogSoftmaxSaved(None, None, y, where)
    return y, _LogSoftmaxSaved(jnp.asarray(x), normalizer, None, where)


def _log_softmax_backward(saved: _LogSoftmaxSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    g, where = wide(dy), saved.where
    if saved.y is not None:
        p = jnp.exp(saved.y)  # 0 where left out
    else:
        assert saved.x is not None
        assert saved.normalizer is not None
        p = saved.normalizer.probability(wide(saved.x))
        p = p if where is None else jnp.where(where, p, 0)
    g = g if where is None else jnp.where(where, g, 0)
    dx = g - p * jnp.sum(g, axis, keepdims=True)
    return (dx if saved.x is None or jnp.issubdtype(saved.x.dtype, jnp.inexact) else None), None


@rule(
    forward=_log_softmax_forward,
    backward=_log_softmax_backward,
    static=["axis"],
    samples=_SAMPLES,
    workloads=[sample(normal(8192, 1024), dtype=d) for d in ("float32", "bfloat16")],
    keeps="y (x and two numbers a row below float32)",
)
def log_softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """The logarithm of softmax: y = x − log Σ exp(x), without overflow and without log(0).

    x [...] -> y [...], of the same dtype.

    Args:
      axis: the dimension or dimensions to sum over; None is all.
      where: elements to include, of a shape that broadcasts with x; the others get −inf.
    """
    canonical_axes("log_softmax", axis, jnp.ndim(x))
    x_ = wide(x)
    where = None if where is None else jnp.asarray(where)
    y = log_normalizer(x_, axis, where).log_probability(x_)
    return (y if where is None else jnp.where(where, y, -jnp.inf)).astype(float_type(x))
