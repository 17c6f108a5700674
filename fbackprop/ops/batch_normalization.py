"""Batch normalization: zero mean and unit variance for every feature over the examples of a batch.

    x̂ = (x − μ) r,   r = 1 / √(σ² + ε),   y = γ x̂ + β          μ, σ² over the n elements of a feature that are counted

In training, with k = γ r, and m = 1 where an element is counted (everywhere, unless ``where`` leaves some out):

    dβ = Σ dy          dγ = Σ dy x̂ = r Σ dy (x − μ)
    dx = k dy − m (k r dγ/n (x − μ) + k dβ/n)

γ is the same for the elements that are normalized together, so the two means that a normalization subtracts are dβ and dγ
over n, and dx reads x and dy once more with three numbers a feature. The running averages m' = ρ m + (1 − ρ) μ and
v' = ρ v + (1 − ρ) σ² are outputs; where they have cotangents,

    dx += m (1 − ρ) (dm'/n + 2 (x − μ) dv'/n),   dm = ρ dm',   dv = ρ dv'

In inference μ and σ² are the arguments m and v, constants as far as x is concerned:

    dx = k dy,   dm = −k Σ dy,   dv = −½ γ r² Σ dy x̂

Over devices (``axis_name``) the sums over examples run over all of them. Kept: x, γ, and μ and r, two numbers a feature, in
float32 or wider like all statistics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _normalizing as norm
from fbackprop.ops._arithmetic import count, nbytes, require_between, require_epsilon, require_float, shapes, wide, wide_type
from fbackprop.rules import Static, rule
from fbackprop.samples import mask, normal, positive, sample

__all__ = ["batch_norm"]


class _BatchSaved(NamedTuple):
    x: jax.Array
    mean: jax.Array  # [features]: of the batch in training, the running one in inference
    rstd: jax.Array  # [features]
    scale: jax.Array | None
    where: jax.Array | None
    averaged: Static  # whether there are running averages to move


class _BatchStatistics(NamedTuple):
    mean: jax.Array
    var: jax.Array


def _centred(x: jax.Array, mean: jax.Array) -> jax.Array:
    return x - mean.reshape((1,) * (x.ndim - 1) + (-1,))


def _number(x: jax.Array, where: jax.Array | None, axis_name: Any) -> Any:
    """How many elements of a feature are counted: a number, or with a mask [features] of them; of all devices."""
    rows = tuple(range(x.ndim - 1))
    n = count(x.shape, rows) if where is None else norm.number(where, x, rows).reshape(-1)
    if axis_name is None:
        return n
    return jax.lax.psum(n, axis_name) if where is not None else n * jax.lax.axis_size(axis_name)


def _batch_statistics(x: jax.Array, where: jax.Array | None, axis_name: Any) -> _BatchStatistics:
    """The definition: mean and variance over all axes but the last, and over the devices; where nothing is counted 0 and 1."""
    n = _number(x, where, axis_name)

    def average(values: jax.Array) -> jax.Array:
        total = jnp.sum(norm.counted(where, values), tuple(range(x.ndim - 1)))
        return norm.average(total if axis_name is None else jax.lax.psum(total, axis_name), n)

    mean = average(x)
    var = average(jnp.square(_centred(x, mean)))
    return _BatchStatistics(mean, var if where is None else jnp.where(n > 0, var, 1))


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
    return _BatchStatistics(mean, jax.lax.cond(near, lambda: var, lambda: _batch_statistics(x, None, None).var))


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
    where: ArrayLike | None = None,
) -> tuple[Any, _BatchSaved]:
    x = jnp.asarray(x)
    where = None if where is None else jnp.asarray(where)

    def statistics(x: jax.Array) -> _BatchStatistics:
        if axis_name is not None or where is not None or x.size < _LARGE:
            return _batch_statistics(x, where, axis_name)
        return jax.lax.platform_dependent(x, cpu=_cpu_statistics, default=lambda x: _batch_statistics(x, None, None))

    result, used_mean, rstd = _batch(x, scale, bias, mean, var, train, epsilon, momentum, statistics)
    if train:
        result = norm.tied(result, scale, bias, mean, var)
    scale = None if scale is None else jnp.asarray(scale)
    return result, _BatchSaved(x, used_mean, rstd, scale, where if train else None, Static(mean is not None))


def _batch_backward(saved: _BatchSaved, dy: Any, *, train: bool, momentum: float, axis_name: Any) -> tuple[Any, ...]:
    x, mean, rstd, scale, where, averaged = saved
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
        return k.reshape(features) * g, dscale, dbias, -k * dbias, dvar, None
    # The means over the batch, of all devices where there are several.
    n = _number(x, where, axis_name)
    n = n if where is None else jnp.maximum(n, 1)
    total_dbias, total_dscale = dbias, dscale
    dnew_mean, dnew_var = wide(dy[1]), wide(dy[2])
    dmean, dvar = momentum * dnew_mean, momentum * dnew_var
    if axis_name is not None:
        total_dbias, total_dscale = jax.lax.psum((dbias, dscale), axis_name)
        dnew_mean, dnew_var = jax.lax.psum((dnew_mean, dnew_var), axis_name)
    share = 1 - momentum if averaged.value else 1.0
    # dx = k dy + m ((slope along x − μ) (x − μ) + offset)
    slope = -k * rstd * total_dscale / n + share * 2 * dnew_var / n
    offset = -k * total_dbias / n + share * dnew_mean / n
    direct = k.reshape(features) * g
    through_statistics = slope.reshape(features) * _centred(wide_x, mean) + offset.reshape(features)
    return direct + norm.counted(where, through_statistics), dscale, dbias, dmean, dvar, None


@rule(
    forward=_batch_forward,
    backward=_batch_backward,
    static=["train", "epsilon", "momentum", "axis_name"],
    samples=[
        sample(normal(6, 4, mean=1.0), normal(4), normal(4), normal(4), positive(4), train=True),
        sample(normal(3, 4, 5, 2, scale=3.0), normal(2), normal(2), normal(2), positive(2), train=True, momentum=0.9),
        sample(normal(3, 4, 5, 2), normal(2), normal(2), normal(2), positive(2)),
        sample(normal(6, 4), normal(4), train=True, where=mask(6, 4)),
    ],
    workloads=[
        sample(normal(64, 28, 28, 64), normal(64), normal(64), normal(64), positive(64), train=True, note="training"),
    ],
    keeps="x, scale, two numbers a feature",
    minimum=lambda x, scale, where: nbytes(x, scale, where) + 2 * x.shape[-1] * jnp.dtype(wide_type(x)).itemsize,
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
    where: ArrayLike | None = None,
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
      where: a mask that broadcasts to x: the elements that the statistics of the batch are taken of, on all devices together.
        The output is computed for all. A feature without any has mean 0 and variance 1.
    Raises:
      ValueError: where shapes do not fit, the batch is empty, or inference has no mean and var.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    require_float("batch_norm", x=x)
    x = jnp.asarray(x)
    where = None if where is None else jnp.asarray(where)
    if x.ndim < 2:
        raise ValueError(f"batch_norm: x must be [batch, …, features], got {shapes(x=x)}.")
    require_epsilon("batch_norm", epsilon)
    require_between("batch_norm", 0.0, 1.0, momentum=momentum)
    norm.check("batch_norm", x, x.shape[-1:], where, scale=scale, bias=bias, mean=mean, var=var)
    if train and count(x.shape, range(x.ndim - 1)) == 0:
        raise ValueError(f"batch_norm: no elements to average over ({shapes(x=x)}).")
    if (mean is None) != (var is None):
        raise ValueError("batch_norm: mean and var are given together or not at all.")
    if not train and mean is None:
        raise ValueError("batch_norm: inference needs the running averages mean and var; with train=True the batch's are used.")
    return _batch(x, scale, bias, mean, var, train, epsilon, momentum, lambda x: _batch_statistics(x, where, axis_name))[0]
