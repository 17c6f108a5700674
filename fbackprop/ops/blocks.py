"""A normalization together with what stands next to it in a transformer: norm_dense and residual_norm.

    x̂ = (x − μ) r,   r = 1 / √(σ² + ε)   (layer)        x̂ = x r,   r = 1 / √(mean x² + ε)   (rms)
    n = γ x̂ + β                                          over the last axis

norm_dense, the projection after a norm       residual_norm, the norm after an addition

    y = n W + b                                   s = x + residual,   y = n(s)

    dn = dy Wᵀ                                    dn = dy
    dW = nᵀ dy,   db = Σ dy
    dγ = Σ dn x̂,  dβ = Σ dn                       dγ = Σ dn x̂,  dβ = Σ dn
    dx = r (g − mean(g) − x̂ mean(g x̂))            dx = dresidual = ds + r (g − mean(g) − x̂ mean(g x̂))

with g = γ dn and means over the row; the RMS norm has no mean(g), as it takes no mean away. Derivation: normalization.py.

Kept are x (residual_norm: s, which is an output), the parameters, and μ and r, two numbers a row (RMS: r alone). x̂ and n are
computed again, which is elementwise; n exists only as the operand of a matrix product. Statistics and sums are computed in
float32 or wider.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import batched, nbytes, require_epsilon, require_float, shapes, wide, wide_type, with_bias
from fbackprop.ops._matrices import outer_sum, product, product_transposed, row_sum
from fbackprop.ops._normalizing import tied
from fbackprop.ops._order import again, in_turn
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["norm_dense", "residual_norm"]


class _Statistics(NamedTuple):
    mean: jax.Array | None  # [..., 1]; None for the RMS norm
    rstd: jax.Array  # [..., 1]


def _statistics(x: jax.Array, norm: str, epsilon: float) -> _Statistics:
    mean = _row_mean(x, None) if norm == "layer" else None
    return _Statistics(mean, jax.lax.rsqrt(_row_mean(jnp.square(_centred(x, mean)), None) + epsilon))


def _row_mean(values: jax.Array, weight: ArrayLike | None) -> jax.Array:
    """mean(weight · values) over the last axis, which stays as an axis of size 1."""
    n = values.shape[-1]
    weight = jnp.ones(n, values.dtype) if weight is None else wide(weight).astype(values.dtype)

    def product(values: jax.Array, weight: jax.Array) -> jax.Array:
        # On a CPU a product of matrix and vector reads the values once; a sum is fused there with what comes after it, for
        # which the mean is written out in full.
        return jnp.matmul(values, weight, precision=jax.lax.Precision.HIGHEST)[..., None] / max(n, 1)

    def plain(values: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(values * _along(weight, values.ndim), -1, keepdims=True) / max(n, 1)

    return jax.lax.platform_dependent(values, weight, cpu=product, default=plain)


def _centred(x: jax.Array, mean: jax.Array | None) -> jax.Array:
    return x if mean is None else x - mean


def _normalized(x: jax.Array, statistics: _Statistics) -> jax.Array:
    return _centred(wide(x), statistics.mean) * statistics.rstd


def _along(parameter: ArrayLike, ndim: int) -> jax.Array:
    return wide(parameter).reshape((1,) * (ndim - 1) + (-1,))


def _scaled(xhat: jax.Array, scale: ArrayLike | None, bias: ArrayLike | None) -> jax.Array:
    y = xhat if scale is None else xhat * _along(scale, xhat.ndim)
    return y if bias is None else y + _along(bias, xhat.ndim)


def _norm_backward(
    x: jax.Array, statistics: _Statistics, scale: jax.Array | None, dn: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx, dγ, dβ from the cotangent of n = γ x̂ + β."""
    dn, xhat = wide(dn), _normalized(x, statistics)
    g = _scaled(dn, scale, None)
    product = dn * xhat
    dx = g - xhat * _row_mean(product, scale)
    if statistics.mean is not None:
        dx = dx - _row_mean(dn, scale)
    return statistics.rstd * dx, batched(product, 1).sum(0), row_sum(dn)


def _check(who: str, x: ArrayLike, norm: str, **parameters: ArrayLike | None) -> None:
    require_float(who, x=x, **parameters)
    if norm not in ("layer", "rms"):
        raise ValueError(f'{who}: norm must be "layer" or "rms", got {norm!r}.')
    if jnp.ndim(x) < 1:
        raise ValueError(f"{who}: expected x [..., features], got {shapes(x=x)}.")
    for name, parameter in parameters.items():
        if parameter is not None and jnp.shape(parameter) != jnp.shape(x)[-1:]:
            raise ValueError(
                f"{who}: {name} has shape {jnp.shape(parameter)}, expected {jnp.shape(x)[-1:]}, that of the features of x "
                f"({shapes(x=x)})."
            )


class _DenseSaved(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    scale: jax.Array | None
    norm_bias: jax.Array | None
    statistics: _Statistics


def _norm_dense_forward(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    norm_bias: ArrayLike | None = None,
    *,
    norm: str = "layer",
    epsilon: float = 1e-6,
    precision: Any = None,
) -> tuple[jax.Array, _DenseSaved]:
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    statistics = _statistics(wide(x), norm, epsilon)
    n = _scaled(_normalized(x, statistics), scale, norm_bias).astype(jnp.result_type(x, kernel))
    y = product(n, kernel, precision)
    y = with_bias(y, bias)
    own = [None if p is None else jnp.asarray(p) for p in (scale, norm_bias)]
    return y, _DenseSaved(x, kernel, own[0], own[1], statistics)


def _norm_dense_backward(saved: _DenseSaved, dy: jax.Array, *, precision: Any) -> tuple[Any, ...]:
    x, kernel, scale, norm_bias, statistics = saved
    n = _scaled(_normalized(again(x, dy), statistics), scale, norm_bias).astype(jnp.result_type(x, kernel))
    dkernel = outer_sum(n, dy, precision)  # nᵀ dy
    (dkernel, dbias), dy = in_turn((dkernel, row_sum(dy)), dy)
    dn = product_transposed(dy, kernel, precision)  # dy Wᵀ
    dx, dscale, dnorm_bias = _norm_backward(again(x, dn), statistics, scale, dn)
    (dscale, dnorm_bias), dx = in_turn((dscale, dnorm_bias), dx.astype(x.dtype))
    return dx, dkernel, dbias, dscale, dnorm_bias


def _row_bytes(x: Any, norm: str) -> int:
    """The statistics: one or two numbers a row, in float32 or wider."""
    return (2 if norm == "layer" else 1) * math.prod(x.shape[:-1]) * jnp.dtype(wide_type(x.dtype)).itemsize


def _norm_dense_minimum(x: Any, kernel: Any, scale: Any, norm_bias: Any, norm: str) -> int:
    return nbytes(x, kernel, scale, norm_bias) + _row_bytes(x, norm)


@rule(
    forward=_norm_dense_forward,
    backward=_norm_dense_backward,
    static=["norm", "epsilon", "precision"],
    samples=[
        sample(normal(5, 8, mean=1.0, scale=2.0), normal(8, 4), normal(4), normal(8), normal(8)),
        sample(normal(2, 3, 7), normal(7, 4)),
        sample(normal(2, 3, 7), normal(7, 4), None, normal(7), norm="rms"),
    ],
    workloads=[sample(normal(2048, 768), normal(768, 2304, scale=768**-0.5), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, kernel, scale, norm_bias, two numbers a row (RMS: one)",
    minimum=_norm_dense_minimum,
)
def norm_dense(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    norm_bias: ArrayLike | None = None,
    *,
    norm: str = "layer",
    epsilon: float = 1e-6,
    precision: Any = None,
) -> jax.Array:
    """Layer norm, or RMS norm, over the last axis and the projection after it: y = norm(x) · kernel + bias.

    x [..., in], kernel [in, out], bias [out], scale [in], norm_bias [in] -> y [..., out].

    Args:
      scale, norm_bias: the parameters of the norm, each optional.
      norm: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
      epsilon: added to the variance, or to the mean square.
      precision: as in ``jax.lax.dot_general``; used by the backward too.
    Raises:
      ValueError: where shapes do not fit or norm is neither. TypeError: where an array is not floating-point.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    require_epsilon("norm_dense", epsilon)
    _check("norm_dense", x, norm, scale=scale, norm_bias=norm_bias)
    require_float("norm_dense", kernel=kernel, bias=bias)
    if jnp.ndim(kernel) != 2:
        raise ValueError(f"norm_dense: expected kernel [in, out], got {shapes(x=x, kernel=kernel)}.")
    if jnp.shape(x)[-1] != jnp.shape(kernel)[0]:
        given = shapes(x=x, kernel=kernel)
        raise ValueError(f"norm_dense: x has {jnp.shape(x)[-1]} features, kernel expects {jnp.shape(kernel)[0]} ({given}).")
    if bias is not None and jnp.shape(bias) != jnp.shape(kernel)[1:]:
        raise ValueError(
            f"norm_dense: bias has shape {jnp.shape(bias)}, expected {jnp.shape(kernel)[1:]} ({shapes(kernel=kernel)})."
        )
    n = _norm(jnp.asarray(x), scale, norm_bias, norm, epsilon).astype(jnp.result_type(x, kernel))
    y = jnp.matmul(n, kernel, precision=precision)
    return with_bias(y, bias)


def _norm(x: jax.Array, scale: ArrayLike | None, bias: ArrayLike | None, norm: str, epsilon: float) -> jax.Array:
    """The definition, in float32 or wider."""
    centred = wide(x) - jnp.mean(wide(x), -1, keepdims=True) if norm == "layer" else wide(x)
    return _scaled(centred / jnp.sqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon), scale, bias)


class _ResidualSaved(NamedTuple):
    sum: jax.Array  # s, an output
    scale: jax.Array | None
    statistics: _Statistics


def _residual_norm_forward(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    norm: str = "layer",
    epsilon: float = 1e-6,
) -> tuple[tuple[jax.Array, jax.Array], _ResidualSaved]:
    # Tied in float32, where the compiler sees that the choice is none.
    s = tied(wide(x) + wide(residual), scale, bias).astype(jnp.result_type(x, residual))
    statistics = _statistics(wide(s), norm, epsilon)
    y = _scaled(_normalized(s, statistics), scale, bias).astype(jnp.result_type(x))
    kept = _ResidualSaved(s, None if scale is None else jnp.asarray(scale), statistics)
    return (y, s), kept


def _residual_norm_backward(saved: _ResidualSaved, dy: Any) -> tuple[Any, ...]:
    s, scale, statistics = saved
    dn, ds = dy
    dx, dscale, dbias = _norm_backward(s, statistics, scale, dn)
    dx = wide(ds) + dx  # through the norm, and past it
    return dx, dx, dscale, dbias


@rule(
    forward=_residual_norm_forward,
    backward=_residual_norm_backward,
    static=["norm", "epsilon"],
    samples=[
        sample(normal(5, 8, mean=1.0), normal(5, 8), normal(8), normal(8)),
        sample(normal(2, 3, 7), normal(2, 3, 7), normal(7), norm="rms"),
        sample(normal(2, 3, 7), normal(2, 3, 7, mean=3.0)),
    ],
    workloads=[
        sample(normal(8192, 768), normal(8192, 768), normal(768), normal(768), dtype=d) for d in ("float32", "bfloat16")
    ],
    keeps="x + residual (an output), scale, two numbers a row (RMS: one)",
    minimum=lambda y, scale, norm: nbytes(y[1], scale) + _row_bytes(y[1], norm),
)
def residual_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    norm: str = "layer",
    epsilon: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Adds what a block computed to the residual stream and normalizes the sum: s = x + residual, y = norm(s).

    x [..., d], residual [..., d], scale [d], bias [d] -> (y [..., d], s [..., d]). y has the dtype of x, so that a stream in
    float32 can feed blocks in bfloat16; s that of the sum.

    Args:
      norm: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
      epsilon: added to the variance, or to the mean square.
    Raises:
      ValueError: where shapes do not fit or norm is neither. TypeError: where an array is not floating-point.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    require_epsilon("residual_norm", epsilon)
    _check("residual_norm", x, norm, scale=scale, bias=bias)
    require_float("residual_norm", residual=residual)
    if jnp.shape(x) != jnp.shape(residual):
        raise ValueError(f"residual_norm: x and residual must have one shape, got {shapes(x=x, residual=residual)}.")
    s = jnp.add(x, residual)
    return _norm(s, scale, bias, norm, epsilon).astype(jnp.result_type(x)), s
