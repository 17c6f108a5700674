"""Lengths of vectors, with a gradient that is finite at zero: safe_norm, l2_normalize, weight_norm.

safe_norm over an axis (or all), with the p-norm n = (Σ |x|ᵖ)^(1/p):

    y = max(n, m)          dx = dy sign(x) (|x| / n)^(p−1) where n > m, else 0          dm = Σ dy where n ≤ m

For p = 2 that is dy x / n, for p = 1 dy sign(x) with sign(0) = 1, JAX's slope of |x|; for p = ∞ the largest share dy evenly.
(∂n/∂x = n^(1−p) |x|^(p−1) sign x.)

l2_normalize and weight_norm, with r = 1 / √max(Σ x², ε) and r = 1 / √(Σ v² + ε):

    l2_normalize    y = x r                dx = r (dy − y Σ dy y), without the second term where Σ x² ≤ ε
    weight_norm     y = s v̂,  v̂ = v r      dv = r (g − v̂ Σ g v̂),  g = s dy          ds = Σ dy v̂

Derivation: r depends on x through q = Σ x² alone, dr/dq = −½ r³, dq/dx = 2 x, so dx = r g − r³ x Σ g x. The subtracted term is
the projection of the cotangent onto the direction of the vector, along which the length does not change.

Kept: x (v, s) and one number a vector, in float32 or wider: n or r.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _normalizing as norm
from fbackprop.ops._arithmetic import (
    canonical_axes,
    float_type,
    nbytes,
    require_epsilon,
    require_float,
    sum_to,
    wide,
    wide_type,
)
from fbackprop.rules import rule
from fbackprop.samples import constant, normal, positive, sample

__all__ = ["l2_normalize", "safe_norm", "weight_norm"]

Axis = int | Sequence[int] | None


def _rows(x: Any, axes: Sequence[int]) -> int:
    """The bytes of one number a vector."""
    return math.prod(n for i, n in enumerate(x.shape) if i not in axes) * jnp.dtype(wide_type(x)).itemsize


class _NormSaved(NamedTuple):
    x: jax.Array
    length: jax.Array  # max(n, m), with the axes of length 1
    least: jax.Array  # m


def _order(ord: Any) -> float:
    """p. Matrix norms, and orders whose gradient is no use, get a sentence."""
    if ord is None or (isinstance(ord, str) and ord == "fro"):
        return 2.0
    if isinstance(ord, str) or ord < 1:
        raise ValueError(f"safe_norm: ord is {ord!r}, expected None, 'fro', or a number from 1 to inf: a norm of vectors.")
    return float(ord)


def _norm_axes(x: Any, axis: Axis, ord: Any) -> tuple[int, ...]:
    axes = canonical_axes("safe_norm", axis, jnp.ndim(x))
    if len(axes) > 1 and ord not in (None, "fro"):
        raise ValueError(f"safe_norm: ord {ord!r} over {len(axes)} axes would be a norm of matrices; expected one axis.")
    return axes


def _length(x: jax.Array, axes: tuple[int, ...], p: float) -> jax.Array:
    a = jnp.abs(x)
    if p == math.inf:
        return jnp.max(a, axes, keepdims=True)
    if p == 2:
        return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
    if p == 1:
        return jnp.sum(a, axes, keepdims=True)
    top = jnp.max(a, axes, keepdims=True)
    top = jnp.where(top > 0, top, 1)
    return top * jnp.sum((a / top) ** p, axes, keepdims=True) ** (1 / p)


def _at_least(x: jax.Array, min_norm: ArrayLike, axes: tuple[int, ...], p: float) -> jax.Array:
    """max(n, m), the axes with length 1. A vector that is short is replaced first: the slope of its root may be infinite."""
    short = _length(jax.lax.stop_gradient(x), axes, p) <= min_norm
    return jnp.where(short, min_norm, _length(jnp.where(short, 1, x), axes, p))


def _norm_forward(
    x: ArrayLike, min_norm: ArrayLike, ord: Any = None, axis: Axis = None, keepdims: bool = False
) -> tuple[jax.Array, _NormSaved]:
    axes = _norm_axes(x, axis, ord)
    length = _at_least(wide(x), min_norm, axes, _order(ord))
    y = length.astype(float_type(x))
    return y if keepdims else jnp.squeeze(y, axes), _NormSaved(jnp.asarray(x), length, jnp.asarray(min_norm))


def _norm_backward(saved: _NormSaved, dy: jax.Array, *, ord: Any, axis: Axis, keepdims: bool) -> tuple[Any, ...]:
    x, n, least = wide(saved.x), saved.length, saved.least
    axes, p = _norm_axes(x, axis, ord), _order(ord)
    g = wide(dy) if keepdims else jnp.expand_dims(wide(dy), axes)
    short = n <= least
    dleast = sum_to(jnp.where(short, g, 0), least.shape) if jnp.issubdtype(least.dtype, jnp.inexact) else None
    if not jnp.issubdtype(saved.x.dtype, jnp.inexact):
        return None, dleast
    g, safe = jnp.where(short, 0, g), jnp.where(short, 1, n)
    if p == 2:
        return g * (x / safe), dleast
    sign = jnp.where(x < 0, -1, 1)  # at 0 as JAX's slope of |x|
    if p == math.inf:
        top = jnp.abs(x) == n
        return jnp.where(top, sign * (g / jnp.sum(top, axes, keepdims=True)), 0), dleast
    return g * sign * ((jnp.abs(x) / safe) ** (p - 1) if p != 1 else 1), dleast


def _norm_minimum(x: Any, min_norm: Any, ord: Any, axis: Axis) -> int:
    return nbytes(x) + _rows(x, _norm_axes(x, axis, ord)) + (nbytes(min_norm) if hasattr(min_norm, "shape") else 4)


@rule(
    forward=_norm_forward,
    backward=_norm_backward,
    static=["ord", "axis", "keepdims"],
    samples=[
        sample(normal(5, 7), constant(2.8), axis=-1),
        sample(normal(4, 6), constant(2.0, 4, 1), 3, axis=1, keepdims=True),
        sample(normal(4, 6), 0.0, 1, axis=0),
        sample(normal(3, 5), 0.0, float("inf"), axis=-1),
        sample(constant(0.0, 3, 4), 0.0, axis=-1),
    ],
    workloads=[sample(normal(8192, 768), 1e-6, axis=-1)],
    keeps="x, one number a vector",
    minimum=_norm_minimum,
)
def safe_norm(
    x: ArrayLike,
    min_norm: ArrayLike,
    ord: int | float | str | None = None,
    axis: tuple[int, ...] | int | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """The length of vectors, or a least value where they are shorter, with a gradient of 0 there and no NaN at 0.

    x [...] -> y, without the axes of the vectors, of the same dtype. Signature and meaning are those of ``optax.safe_norm``.

    Args:
      min_norm: the least, a number or an array that broadcasts with y (with the axes of length 1).
      ord: p of the p-norm, from 1 to inf; None is 2, the Euclidean length (over two axes: Frobenius).
      axis: of the vectors; None is all. keepdims: whether the axes stay, with length 1.
    Raises:
      ValueError: where ord is another norm of matrices, or an axis is out of range.
    """
    axes, p = _norm_axes(x, axis, ord), _order(ord)
    y = _at_least(wide(x), min_norm, axes, p).astype(float_type(x))
    return y if keepdims else jnp.squeeze(y, axes)


class _L2Saved(NamedTuple):
    x: jax.Array
    r: jax.Array  # with the axes of length 1


def _l2_forward(x: ArrayLike, axis: Axis = -1, epsilon: float = 1e-12) -> tuple[jax.Array, _L2Saved]:
    x_ = wide(x)
    r = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_), canonical_axes("", axis, x_.ndim), keepdims=True), epsilon))
    return (x_ * r).astype(jnp.result_type(x)), _L2Saved(jnp.asarray(x), r)


def _l2_backward(saved: _L2Saved, dy: jax.Array, *, axis: Axis, epsilon: float) -> tuple[Any]:
    axes, g = canonical_axes("", axis, saved.x.ndim), wide(dy)
    y = wide(saved.x) * saved.r
    square = jnp.sum(jnp.square(wide(saved.x)), axes, keepdims=True)
    # As in jax.numpy.maximum, half of the second term passes where both are equal.
    share = jnp.where(square > epsilon, 1, jnp.where(square == epsilon, 0.5, 0))
    return (saved.r * (g - y * (share * jnp.sum(g * y, axes, keepdims=True))),)


@rule(
    forward=_l2_forward,
    backward=_l2_backward,
    static=["axis", "epsilon"],
    samples=[sample(normal(5, 7)), sample(normal(4, 3, 2), axis=(0, 2), epsilon=4.0), sample(constant(0.0, 3, 4))],
    workloads=[sample(normal(8192, 768), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, one number a vector",
    minimum=lambda x, axis: nbytes(x) + _rows(x, canonical_axes("", axis, x.ndim)),
)
def l2_normalize(x: ArrayLike, axis: int | Sequence[int] | None = -1, epsilon: float = 1e-12) -> jax.Array:
    """Gives each vector the length 1: y = x / √max(Σ x², epsilon).

    x [...] -> y [...], of the same dtype. At zero y is 0, and the gradient dy / √epsilon.

    Args:
      axis: the dimension, or dimensions, of a vector; None is all. epsilon: below this squared length a vector is only scaled.
    Raises:
      TypeError: where x is not of floating-point numbers. ValueError: where an axis is out of range.
    """
    require_float("l2_normalize", x=x)
    require_epsilon("l2_normalize", epsilon)
    x_ = wide(x)
    square = jnp.sum(jnp.square(x_), canonical_axes("l2_normalize", axis, x_.ndim), keepdims=True)
    return (x_ * jax.lax.rsqrt(jnp.maximum(square, epsilon))).astype(jnp.result_type(x))


class _WeightSaved(NamedTuple):
    v: jax.Array
    scale: jax.Array | None
    r: jax.Array


def _reduced(v: Any, feature_axes: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that scale has, and those of a vector."""
    features = () if feature_axes is None else canonical_axes("weight_norm", feature_axes, jnp.ndim(v))
    return features, tuple(i for i in range(jnp.ndim(v)) if i not in features)


def _weight_forward(
    v: ArrayLike, scale: ArrayLike | None = None, *, feature_axes: Axis = -1, epsilon: float = 1e-12
) -> tuple[jax.Array, _WeightSaved]:
    features, axes = _reduced(v, feature_axes)
    v_ = wide(v)
    r = jax.lax.rsqrt(jnp.sum(jnp.square(v_), axes, keepdims=True) + epsilon)
    y = norm.scaled(v_ * r, norm.along(features, scale, v_.ndim), None)
    return y.astype(jnp.result_type(v)), _WeightSaved(jnp.asarray(v), None if scale is None else jnp.asarray(scale), r)


def _weight_backward(saved: _WeightSaved, dy: jax.Array, *, feature_axes: Axis) -> tuple[Any, ...]:
    features, axes = _reduced(saved.v, feature_axes)
    unit, g = wide(saved.v) * saved.r, wide(dy)
    along = jnp.sum(g * unit, axes, keepdims=True)  # Σ dy v̂, also the cotangent of scale
    scale = norm.along(features, saved.scale, g.ndim)
    dv = norm.scaled(saved.r * (g - unit * along), scale, None)
    return dv, None if saved.scale is None else along.reshape(saved.scale.shape)


@rule(
    forward=_weight_forward,
    backward=_weight_backward,
    static=["feature_axes", "epsilon"],
    samples=[sample(normal(5, 4), positive(4)), sample(normal(3, 2, 4), positive(3, 4), feature_axes=(0, 2))],
    workloads=[sample(normal(4096, 4096), positive(4096))],
    keeps="v, scale, one number a vector",
    minimum=lambda v, scale, feature_axes: nbytes(v, scale) + _rows(v, _reduced(v, feature_axes)[1]),
)
def weight_norm(
    v: ArrayLike, scale: ArrayLike | None = None, *, feature_axes: int | Sequence[int] | None = -1, epsilon: float = 1e-12
) -> jax.Array:
    """Weights as a direction and a length: y = scale · v / √(Σ v² + epsilon), the sum over all axes but those of features.

    v [..., out], scale [out] -> [..., out], of the dtype of v. Formula and defaults are those of ``flax.linen.WeightNorm``.

    Args:
      feature_axes: the axes of v that scale has; None: one length for all of v, and scale is a number.
    Raises:
      ValueError: where scale does not have the shape of the features. TypeError: where an array is not floating-point.
    Source: Salimans & Kingma 2016, arXiv:1602.07868.
    """
    require_float("weight_norm", v=v, scale=scale)
    features, axes = _reduced(v, feature_axes)
    require_epsilon("weight_norm", epsilon)
    norm.check("weight_norm", jnp.asarray(v), tuple(jnp.shape(v)[a] for a in features), None, scale=scale)
    v_ = wide(v)
    unit = v_ * jax.lax.rsqrt(jnp.sum(jnp.square(v_), axes, keepdims=True) + epsilon)
    return norm.scaled(unit, norm.along(features, scale, v_.ndim), None).astype(jnp.result_type(v))
