"""Layer and RMS normalization: every example by itself, to zero mean and unit variance, or to a mean square of one.

    layer_norm    x̂ = (x − μ) r,   r = 1 / √(σ² + ε),        y = γ x̂ + β
    rms_norm      x̂ = x r,         r = 1 / √(mean(x²) + ε),   y = γ x̂

With m = 1 for the n elements of a row that are counted (all, unless ``where`` leaves some out) and g = γ dy:

    dβ = Σ dy          dγ = Σ dy x̂          summed over the rows
    layer_norm    dx = r (g − m (Σ g + x̂ Σ g x̂) / n)
    rms_norm      dx = r (g − m x̂ Σ g x̂ / n)

Derivation: dx̂ = g. Through x̂ = (x − μ) r the variance receives dσ² = −½ r² Σ g x̂ and the mean dμ = −r Σ g, and for the
elements that are counted ∂σ²/∂x = 2 (x − μ)/n, ∂μ/∂x = 1/n. The two subtracted terms are the projections of g onto 1 and
onto x̂: the directions that the normalization took away, along which no cotangent passes.

Kept: x as it came, γ, r and μ: two numbers a row (one for RMS norm), in float32 or wider like all statistics. The variance
is that of the centred values: E[x²] − μ² would cancel.

The sums over a row are products of a matrix and a vector, Σ g x̂ = (dy x̂) · γ. On a CPU that reads an array once and forms
nothing; a sum of a product is fused there with what comes after it, and then x − μ, r and x̂ are written out in full.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _normalizing as norm
from fbackprop.ops._arithmetic import canonical_axes, nbytes, require_epsilon, require_float, wide, wide_type
from fbackprop.rules import rule
from fbackprop.samples import mask, normal, sample

__all__ = ["layer_norm", "rms_norm"]

Axis = int | Sequence[int]


class _Saved(NamedTuple):
    x: jax.Array
    mean: jax.Array | None  # [..., 1]; RMS norm has none
    rstd: jax.Array  # [..., 1]
    scale: jax.Array | None
    where: jax.Array | None


def _row_sum(values: jax.Array, weight: ArrayLike | None, axes: tuple[int, ...]) -> jax.Array:
    """Σ weight · values over the axes, which stay as axes of size 1."""
    shape = [values.shape[a] for a in axes]
    weight = jnp.ones(shape, values.dtype) if weight is None else wide(weight).astype(values.dtype)

    def product(values: jax.Array, weight: jax.Array) -> jax.Array:
        total = jnp.tensordot(values, weight, (axes, tuple(range(weight.ndim))), precision=jax.lax.Precision.HIGHEST)
        return jnp.expand_dims(total, axes)

    def plain(values: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(norm.scaled(values, norm.along(axes, weight, values.ndim), None), axes, keepdims=True)

    return jax.lax.platform_dependent(values, weight, cpu=product, default=plain)


def _forward(who: str, x: ArrayLike, scale: Any, bias: Any, epsilon: float, axis: Axis, where: Any) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    scale, where = (None if a is None else jnp.asarray(a) for a in (scale, where))
    axes, x_ = canonical_axes(who, axis, x.ndim), wide(x)
    n = norm.number(where, x, axes)
    mean = norm.average(_row_sum(norm.counted(where, x_), None, axes), n) if who == "layer_norm" else None
    centred = x_ if mean is None else x_ - mean
    var = norm.average(_row_sum(norm.counted(where, jnp.square(centred)), None, axes), n)
    rstd = norm.reciprocal_deviation(var, n, epsilon)
    y = norm.scaled(centred * rstd, norm.along(axes, scale, x.ndim), norm.along(axes, bias, x.ndim))
    return y.astype(x.dtype), _Saved(x, mean, rstd, scale, where)


def _backward(saved: _Saved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    """Cotangents of x, scale and bias (for RMS norm the last one has no use)."""
    x, mean, rstd, scale, where = saved
    axes = canonical_axes("", axis, x.ndim)
    rows = tuple(i for i in range(x.ndim) if i not in axes)
    n = norm.number(where, x, axes)
    dy = wide(dy)
    if mean is None:
        xhat, mean_g = wide(x) * rstd, None
    else:
        mean_g = norm.average(_row_sum(dy, scale, axes), n)
        # Adds nothing, but orders the two passes: wide(dy) and the product below need not be in memory at the same time.
        xhat = (wide(x) - (mean + jnp.where(mean_g > jnp.inf, mean_g, 0))) * rstd
    product = dy * xhat
    passed = xhat * norm.average(_row_sum(product, scale, axes), n)
    passed = passed if mean_g is None else passed + mean_g
    g = norm.scaled(dy, norm.along(axes, scale, x.ndim), None)
    if mean is not None and (where is not None or n == 1):
        # A single element is its own mean. What rounding of its product leaves of the difference, 1 / √ε would make large.
        g = passed if where is None else jnp.where(where & (n == 1), passed, g)
    dx = rstd * (g - norm.counted(where, passed))
    return dx, jnp.sum(product, rows), jnp.sum(dy, rows)


def _layer_forward(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-6,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, _Saved]:
    return _forward("layer_norm", x, scale, bias, epsilon, axis, where)


def _layer_backward(saved: _Saved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    return *_backward(saved, dy, axis=axis), None


def _minimum(x: Any, scale: Any, where: Any, axis: Axis, numbers: int) -> int:
    """x, scale, the mask and some numbers a row."""
    rows = math.prod(n for i, n in enumerate(x.shape) if i not in canonical_axes("", axis, len(x.shape)))
    return nbytes(x, scale, where) + numbers * rows * jnp.dtype(wide_type(x)).itemsize


@rule(
    forward=_layer_forward,
    backward=_layer_backward,
    static=["epsilon", "axis"],
    samples=[
        sample(normal(5, 8, mean=1.0, scale=2.0), normal(8), normal(8)),
        sample(normal(2, 3, 7, mean=5.0), normal(3, 7), normal(3, 7), 1e-3, axis=(1, 2)),
        sample(normal(4, 9), normal(9), where=mask(4, 9)),
    ],
    workloads=[sample(normal(8192, 768), normal(768), normal(768), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, scale, two numbers a row",
    minimum=lambda x, scale, where, axis: _minimum(x, scale, where, axis, 2),
)
def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-6,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Gives each vector zero mean and unit variance, then scales and shifts it.

    x [..., d], scale [d], bias [d] -> [..., d], of the dtype of x.

    Args:
      epsilon: added to the variance.
      axis: the dimension, or dimensions, to normalize over; scale and bias have their shape.
      where: a mask that broadcasts to x: the elements that mean and variance are taken of. The output is computed for all.
        Where a vector has none, the mean is 0 and the variance 1.
    Raises:
      ValueError: where scale, bias or the mask do not have the shape that x asks for.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    require_float("layer_norm", x=x)
    x = jnp.asarray(x)
    where = None if where is None else jnp.asarray(where)
    axes = canonical_axes("layer_norm", axis, x.ndim)
    require_epsilon("layer_norm", epsilon)
    norm.check("layer_norm", x, tuple(x.shape[a] for a in axes), where, scale=scale, bias=bias)
    mean, rstd = norm.statistics(wide(x), axes, where, epsilon)
    y = norm.scaled((wide(x) - mean) * rstd, norm.along(axes, scale, x.ndim), norm.along(axes, bias, x.ndim))
    return y.astype(x.dtype)


def _rms_forward(
    x: ArrayLike, scale: ArrayLike | None = None, epsilon: float = 1e-6, *, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _Saved]:
    return _forward("rms_norm", x, scale, None, epsilon, axis, where)


def _rms_backward(saved: _Saved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    dx, dscale, _ = _backward(saved, dy, axis=axis)
    return dx, dscale, None


@rule(
    forward=_rms_forward,
    backward=_rms_backward,
    static=["epsilon", "axis"],
    samples=[
        sample(normal(5, 8, mean=1.0, scale=2.0), normal(8)),
        sample(normal(2, 3, 7), normal(2, 7), 1e-3, axis=(0, -1), where=mask(2, 1, 7)),
    ],
    workloads=[sample(normal(8192, 768), normal(768), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, scale, one number a row",
    minimum=lambda x, scale, where, axis: _minimum(x, scale, where, axis, 1),
)
def rms_norm(
    x: ArrayLike, scale: ArrayLike | None = None, epsilon: float = 1e-6, *, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Gives each vector a mean square of one, then scales it.

    x [..., d], scale [d] -> [..., d], of the dtype of x.

    Args:
      epsilon: added to the mean square.
      axis: the dimension, or dimensions, to normalize over; scale has their shape.
      where: a mask that broadcasts to x: the elements that the mean square is taken of. The output is computed for all.
        Where a vector has none, the mean square is 1.
    Raises:
      ValueError: where scale or the mask do not have the shape that x asks for.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    require_float("rms_norm", x=x)
    x = jnp.asarray(x)
    where = None if where is None else jnp.asarray(where)
    axes = canonical_axes("rms_norm", axis, x.ndim)
    require_epsilon("rms_norm", epsilon)
    norm.check("rms_norm", x, tuple(x.shape[a] for a in axes), where, scale=scale)
    n = norm.number(where, x, axes)
    square = norm.average(jnp.sum(norm.counted(where, jnp.square(wide(x))), axes, keepdims=True), n)
    y = norm.scaled(wide(x) * norm.reciprocal_deviation(square, n, epsilon), norm.along(axes, scale, x.ndim), None)
    return y.astype(x.dtype)
