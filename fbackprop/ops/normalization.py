"""Layer and batch normalization: zero mean and unit variance, then a scale and a shift that are learned.

    x̂ = (x − μ) r,   r = 1 / √(σ² + ε),   y = γ x̂ + β          μ, σ² over the n elements that are normalized together

    dβ = Σ dy          dγ = Σ dy x̂          summed over everything that shares a γ

and, with g = γ dy and means over the elements that are normalized together,

    dx = r (g − mean(g) − x̂ mean(g x̂))

Derivation: dx̂ = g. Through x̂ = (x − μ) r the variance receives dσ² = −½ r² Σ g x̂ and the mean dμ = −r Σ g, and
∂σ²/∂x = 2 (x − μ)/n, ∂μ/∂x = 1/n. The two subtracted terms are the projections of g onto 1 and onto x̂: the directions that
the normalization took away, along which no cotangent passes.

layer_norm    over the last axis (or several) of each example. Kept: x, γ, and μ and r, two numbers a row.
batch_norm    over all axes but the last, in training. Kept: x, γ, and μ and r, two numbers a feature. γ is the same for the
              elements that are normalized together, so the two means are dβ and dγ over n, and with k = γ r

                  dx = k dy − (k r dγ/n) (x − μ) − k dβ/n

              reads x and dy once more with three numbers a feature. The running averages
              m' = ρ m + (1 − ρ) μ and v' = ρ v + (1 − ρ) σ² are outputs; where they have cotangents,

                  dx += (1 − ρ) (dm'/n + 2 (x − μ) dv'/n),   dm = ρ dm',   dv = ρ dv'

              In inference μ and σ² are the arguments m and v, constants as far as x is concerned:

                  dx = k dy,   dm = −k Σ dy,   dv = −½ γ r² Σ dy x̂

              Over devices (``axis_name``) the sums over examples run over all of them.

Statistics are computed in float32 or wider, the variance from the centred values where E[x²] − μ² would cancel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import canonical_axes, count, require_float, shapes, wide
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, positive, sample

__all__ = ["batch_norm", "layer_norm"]

Axis = int | Sequence[int]


def _along(axes: tuple[int, ...], parameter: ArrayLike | None, ndim: int) -> jax.Array | None:
    """A parameter of the shape of the normalized axes, ready to broadcast with x."""
    if parameter is None:
        return None
    sizes = iter(jnp.shape(parameter))
    return wide(parameter).reshape([next(sizes) if i in axes else 1 for i in range(ndim)])


def _scaled(xhat: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    y = xhat if scale is None else xhat * scale
    return y if bias is None else y + bias


def _check_parameters(who: str, expected: tuple[int, ...], **parameters: ArrayLike | None) -> None:
    require_float(who, **{n: p for n, p in parameters.items() if p is not None})
    for name, parameter in parameters.items():
        if parameter is not None and jnp.shape(parameter) != expected:
            raise ValueError(f"{who}: {name} has shape {jnp.shape(parameter)}, expected {expected}, that of the features of x.")


class _LayerSaved(NamedTuple):
    x: jax.Array
    mean: jax.Array  # [..., 1]
    rstd: jax.Array  # [..., 1], 1 / √(σ² + ε)
    scale: jax.Array | None


def _layer_statistics(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(x, axes, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    return mean, jax.lax.rsqrt(var + epsilon)


def _layer_forward(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-6,
    *,
    axis: Axis = -1,
) -> tuple[jax.Array, _LayerSaved]:
    x = jnp.asarray(x)
    axes = canonical_axes("layer_norm", axis, x.ndim)
    mean, rstd = _layer_statistics(wide(x), axes, epsilon)
    y = _scaled((wide(x) - mean) * rstd, _along(axes, scale, x.ndim), _along(axes, bias, x.ndim)).astype(x.dtype)
    return y, _LayerSaved(x, mean, rstd, None if scale is None else jnp.asarray(scale))


def _layer_backward(saved: _LayerSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    x, mean, rstd, scale = saved
    axes = canonical_axes("layer_norm", axis, x.ndim)
    rows = tuple(i for i in range(x.ndim) if i not in axes)
    dy, xhat = wide(dy), (wide(x) - mean) * rstd
    product = dy * xhat
    g = _scaled(dy, _along(axes, scale, x.ndim), None)
    dx = rstd * (g - _weighted_mean(dy, scale, axes) - xhat * _weighted_mean(product, scale, axes))
    return dx, jnp.sum(product, rows), jnp.sum(dy, rows)


def _weighted_mean(values: jax.Array, scale: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """mean(γ · values) over the axes. As a product of matrix and vector: that reads the values once and forms no γ · values."""
    if scale is None:
        return jnp.mean(values, axes, keepdims=True)
    total = jnp.tensordot(values, wide(scale), (axes, tuple(range(scale.ndim))), precision=jax.lax.Precision.HIGHEST)
    return jnp.expand_dims(total, axes) / scale.size


@rule(
    forward=_layer_forward,
    backward=_layer_backward,
    static=["epsilon", "axis"],
    samples=[
        sample(normal(5, 8, mean=1.0, scale=2.0), normal(8), normal(8)),
        sample(normal(2, 3, 7)),
        sample(normal(2, 3, 7, mean=5.0), normal(3, 7), normal(3, 7), 1e-3, axis=(1, 2)),
    ],
    workloads=[sample(normal(8192, 768), normal(768), normal(768), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, scale, two numbers a row",
)
def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-6,
    *,
    axis: Axis = -1,
) -> jax.Array:
    """Gives each vector zero mean and unit variance, then scales and shifts it.

    x [..., d], scale [d], bias [d] -> [..., d], of the dtype of x.

    Args:
      epsilon: added to the variance.
      axis: the dimension, or dimensions, to normalize over; scale and bias have their shape.
    Raises:
      ValueError: where scale or bias do not have the shape of the normalized dimensions.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    require_float("layer_norm", x=x)
    x = jnp.asarray(x)
    axes = canonical_axes("layer_norm", axis, x.ndim)
    _check_parameters("layer_norm", tuple(x.shape[a] for a in axes), scale=scale, bias=bias)
    mean, rstd = _layer_statistics(wide(x), axes, epsilon)
    return _scaled((wide(x) - mean) * rstd, _along(axes, scale, x.ndim), _along(axes, bias, x.ndim)).astype(x.dtype)


class _BatchSaved(NamedTuple):
    x: jax.Array
    mean: jax.Array  # [features]: of the batch in training, the running one in inference
    rstd: jax.Array  # [features]
    scale: jax.Array | None
    averaged: Static  # whether there are running averages to move


class _BatchStatistics(NamedTuple):
    mean: jax.Array
    var: jax.Array


def _centred(x: jax.Array, mean: jax.Array) -> jax.Array:
    return x - mean.reshape((1,) * (x.ndim - 1) + (-1,))


def _batch_statistics(x: jax.Array, axis_name: Any) -> _BatchStatistics:
    """The definition: mean and variance over all axes but the last, and over the devices."""

    def average(values: jax.Array) -> jax.Array:
        own = jnp.mean(values, tuple(range(x.ndim - 1)))
        return own if axis_name is None else jax.lax.pmean(own, axis_name)

    mean = average(x)
    return _BatchStatistics(mean, average(jnp.square(_centred(x, mean))))


# On a CPU a large array of centred values, written and read again, costs more than the sums over it. There the variance is
# E[x²] − μ², and Σ dy (x − μ) is Σ dy x − μ Σ dy, as long as that cancels no more than one bit: μ² ≤ σ² for every feature,
# as it is behind a convolution. Where it would cancel more, the values are centred after all. (Small arrays stay in the
# cache and are always centred: it costs nothing, and rounds a little less.)
_LARGE = 2**18


def _cpu_statistics(x: jax.Array) -> _BatchStatistics:
    rows = tuple(range(x.ndim - 1))
    mean, square = jnp.mean(x, rows), jnp.mean(jnp.square(x), rows)
    var = square - jnp.square(mean)
    near = jnp.all(jnp.square(mean) <= var)
    return _BatchStatistics(mean, jax.lax.cond(near, lambda: var, lambda: _batch_statistics(x, None).var))


def _cpu_centred_sum(g: jax.Array, x: jax.Array, mean: jax.Array, rstd: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    apart = jnp.sum(g * x, rows) - mean * jnp.sum(g, rows)
    near = jnp.all(jnp.square(mean * rstd) <= 1)
    return jax.lax.cond(near, lambda: apart, lambda: jnp.sum(g * _centred(x, mean), rows))


def _batch(
    x: jax.Array,
    scale: Any,
    bias: Any,
    mean: Any,
    var: Any,
    train: bool,
    epsilon: float,
    momentum: float,
    statistics: Callable[[jax.Array], _BatchStatistics],
) -> tuple[Any, jax.Array, jax.Array]:
    """What batch_norm returns, and the mean and the reciprocal deviation that it used."""
    features = (1,) * (x.ndim - 1) + (-1,)
    used = statistics(wide(x)) if train else _BatchStatistics(wide(mean), wide(var))
    rstd = jax.lax.rsqrt(used.var + epsilon)
    slope = rstd if scale is None else rstd * wide(scale)
    y = _centred(wide(x), used.mean) * slope.reshape(features)
    y = (y if bias is None else y + wide(bias).reshape(features)).astype(x.dtype)
    if not train:
        return y, used.mean, rstd
    new = [
        own if old is None else (momentum * wide(old) + (1 - momentum) * own).astype(jnp.result_type(old))
        for old, own in zip((mean, var), used)
    ]
    return (y, *new), used.mean, rstd


def _tied(result: Any, *parameters: ArrayLike | None) -> Any:
    """Lets every output depend on every parameter, by a choice between equals that the compiler drops. Under vmap over some
    of the parameters alone JAX counts the cotangent of an output that does not depend on them once for each member."""
    for parameter in parameters:
        if parameter is not None:
            same = jnp.equal(parameter, parameter)
            result = jax.tree.map(lambda v, same=same: jnp.where(same.reshape((1,) * (v.ndim - 1) + (-1,)), v, v), result)
    return result


def _batch_forward(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    *,
    train: bool = False,
    epsilon: float = 1e-5,
    momentum: float = 0.99,
    axis_name: Any = None,
) -> tuple[Any, _BatchSaved]:
    x = jnp.asarray(x)

    def statistics(x: jax.Array) -> _BatchStatistics:
        if axis_name is not None or x.size < _LARGE:
            return _batch_statistics(x, axis_name)
        return jax.lax.platform_dependent(x, cpu=_cpu_statistics, default=lambda x: _batch_statistics(x, None))

    result, used_mean, rstd = _batch(x, scale, bias, mean, var, train, epsilon, momentum, statistics)
    if train:
        result = _tied(result, scale, bias, mean, var)
    return result, _BatchSaved(x, used_mean, rstd, None if scale is None else jnp.asarray(scale), Static(mean is not None))


def _batch_backward(saved: _BatchSaved, dy: Any, *, train: bool, momentum: float, axis_name: Any) -> tuple[Any, ...]:
    x, mean, rstd, scale, averaged = saved
    rows, features = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1) + (-1,)
    g, wide_x = wide(dy[0] if train else dy), wide(x)
    dbias = jnp.sum(g, rows)
    if axis_name is None and x.size >= _LARGE:
        centred_sum = jax.lax.platform_dependent(
            g, wide_x, mean, rstd, cpu=_cpu_centred_sum, default=lambda g, x, mean, _: jnp.sum(g * _centred(x, mean), rows)
        )
    else:
        centred_sum = jnp.sum(g * _centred(wide_x, mean), rows)
    dscale = rstd * centred_sum
    k = rstd if scale is None else rstd * wide(scale)
    if not train:
        dvar = -0.5 * k * rstd * dscale
        return k.reshape(features) * g, dscale, dbias, -k * dbias, dvar
    # The means over the batch, of all devices where there are several.
    n = count(x.shape, rows)
    total_dbias, total_dscale = dbias, dscale
    dnew_mean, dnew_var = wide(dy[1]), wide(dy[2])
    dmean, dvar = momentum * dnew_mean, momentum * dnew_var
    if axis_name is not None:
        n = n * jax.lax.axis_size(axis_name)
        total_dbias, total_dscale = jax.lax.psum((dbias, dscale), axis_name)
        dnew_mean, dnew_var = jax.lax.psum((dnew_mean, dnew_var), axis_name)
    share = 1 - momentum if averaged.value else 1.0
    # dx = k dy + (slope along x − μ) (x − μ) + offset
    slope = -k * rstd * total_dscale / n + share * 2 * dnew_var / n
    offset = -k * total_dbias / n + share * dnew_mean / n
    dx = k.reshape(features) * g + slope.reshape(features) * _centred(wide_x, mean) + offset.reshape(features)
    return dx, dscale, dbias, dmean, dvar


@rule(
    forward=_batch_forward,
    backward=_batch_backward,
    static=["train", "epsilon", "momentum", "axis_name"],
    samples=[
        sample(normal(6, 4, mean=1.0), normal(4), normal(4), normal(4), positive(4), train=True),
        sample(normal(3, 4, 5, 2, scale=3.0), normal(2), normal(2), normal(2), positive(2), train=True, momentum=0.9),
        sample(normal(3, 4, 5, 2), normal(2), normal(2), normal(2), positive(2)),
        sample(normal(6, 4), None, None, normal(4), positive(4)),
        sample(normal(6, 4), normal(4), train=True),
    ],
    workloads=[
        sample(normal(64, 28, 28, 64), normal(64), normal(64), normal(64), positive(64), train=True, note="training"),
    ],
    keeps="x, scale, two numbers a feature",
)
def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    *,
    train: bool = False,
    epsilon: float = 1e-5,
    momentum: float = 0.99,
    axis_name: Any = None,
) -> Any:
    """Gives each feature zero mean and unit variance over the batch, then scales and shifts it.

    x [..., features], scale, bias, mean, var [features] -> y [..., features]; in training (y, new_mean, new_var).

    Args:
      mean, var: the running averages. Inference normalizes with them; training moves them towards the statistics of the
        batch, which it normalizes with, or returns those where no averages are given. The biased variance is used for both.
      train: whether the statistics are those of the batch.
      momentum: the share of the old running average in the new one.
      axis_name: the name of a mapped or manual axis over which the batch is spread. (Under ``vmap`` differentiate inside of
        it: JAX does not bind its axis names where it runs the backward of a ``custom_vjp`` from outside.)
    Raises:
      ValueError: where shapes do not fit, the batch is empty, or inference has no mean and var.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    require_float("batch_norm", x=x)
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"batch_norm: x must be [batch, …, features], got {shapes(x=x)}.")
    _check_parameters("batch_norm", x.shape[-1:], scale=scale, bias=bias, mean=mean, var=var)
    if train and count(x.shape, range(x.ndim - 1)) == 0:
        raise ValueError(f"batch_norm: no elements to average over ({shapes(x=x)}).")
    if (mean is None) != (var is None):
        raise ValueError("batch_norm: mean and var are given together or not at all.")
    if not train and mean is None:
        raise ValueError("batch_norm: inference needs the running averages mean and var; with train=True the batch's are used.")
    return _batch(x, scale, bias, mean, var, train, epsilon, momentum, lambda x: _batch_statistics(x, axis_name))[0]
