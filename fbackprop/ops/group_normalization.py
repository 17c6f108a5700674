"""Group and instance normalization: zero mean and unit variance within each example, for every group of channels.

    x̂ = (x − μ) r,   r = 1 / √(σ² + ε),   y = γ x̂ + β          μ, σ² over the n elements of a group in an example

group_norm divides the channels into groups; instance_norm is the case of one channel a group. With the sums of each channel
over the places of one example, b = Σ dy and s = Σ dy (x − μ),

    dβ = Σ b          dγ = Σ r s                                summed over the examples
    dx = γ r dy − m (r² r (Σ γ s) (x − μ) + r Σ γ b) / n         where Σ runs over the channels of the group

and m = 1 where an element is counted (everywhere, unless ``where`` leaves some out). Derivation: that of layer normalization
with g = γ dy. γ is the same at every place of a channel, so the sums over a group are sums over its channels of γ times the
two that dβ and dγ need anyway: dx reads x and dy once more, with a few numbers an example and channel.

Kept: x as it came, γ, and μ and r, two numbers an example and group, in float32 or wider like all statistics.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _normalizing as norm
from fbackprop.ops._arithmetic import count, nbytes, require_epsilon, require_float, shapes, wide, wide_type
from fbackprop.rules import rule
from fbackprop.samples import mask, normal, sample

__all__ = ["group_norm", "instance_norm"]


class _Saved(NamedTuple):
    x: jax.Array
    mean: jax.Array  # [batch, groups]
    rstd: jax.Array  # [batch, groups]
    scale: jax.Array | None
    where: jax.Array | None


def _check(who: str, x: ArrayLike, scale: Any, bias: Any, where: Any) -> None:
    require_float(who, x=x)
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"{who}: x must be [batch, …, channels], got {shapes(x=x)}.")
    norm.check(who, x, x.shape[-1:], where, scale=scale, bias=bias)


def _groups(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups, from either way to tell it."""
    if (num_groups is None) == (group_size is None):
        given = "neither" if num_groups is None else f"num_groups {num_groups} and group_size {group_size}"
        raise ValueError(
            f"group_norm: one of num_groups and group_size is expected, got {given} (num_groups is 32 by default: pass "
            "num_groups=None with group_size)."
        )
    name, value = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if value is None or value < 1 or channels % value:
        raise ValueError(f"group_norm: {name} {value} must divide the {channels} channels of x.")
    return value if group_size is None else channels // value


def _definition(x: ArrayLike, scale: Any, bias: Any, groups: int, epsilon: float, where: Any) -> jax.Array:
    x = jnp.asarray(x)
    split = (*x.shape[:-1], groups, x.shape[-1] // groups)
    own = None if where is None else jnp.broadcast_to(where, x.shape).reshape(split)
    x_ = wide(x).reshape(split)
    mean, rstd = norm.statistics(x_, (*range(1, x.ndim - 1), x.ndim), own, epsilon)
    xhat = ((x_ - mean) * rstd).reshape(x.shape)
    last = (x.ndim - 1,)
    return norm.scaled(xhat, norm.along(last, scale, x.ndim), norm.along(last, bias, x.ndim)).astype(x.dtype)


def _places(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def _to_groups(sums: jax.Array, groups: int) -> jax.Array:
    """[batch, channels] -> [batch, groups]: sums over the channels of each group."""
    return sums.reshape(*sums.shape[:-1], groups, sums.shape[-1] // groups).sum(-1)


def _to_channels(values: jax.Array, x: jax.Array) -> jax.Array:
    """[batch, groups] -> [batch, 1, …, channels], ready to broadcast with x."""
    repeated = jnp.repeat(values, x.shape[-1] // values.shape[-1], axis=-1)
    return repeated.reshape(x.shape[0], *(1 for _ in _places(x)), x.shape[-1])


def _number(x: jax.Array, where: jax.Array | None, groups: int) -> Any:
    """How many elements of each group are counted: a number, or with a mask [batch, groups] of them."""
    if where is None:
        return count(x.shape, range(1, x.ndim)) // groups
    return _to_groups(norm.number(where, x, _places(x)).reshape(x.shape[0], x.shape[-1]), groups)


def _forward(x: ArrayLike, scale: Any, bias: Any, groups: int, epsilon: float, where: Any) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    scale, where = (None if a is None else jnp.asarray(a) for a in (scale, where))
    x_, places, n = wide(x), _places(x), _number(x, where, groups)
    mean = norm.average(_to_groups(jnp.sum(norm.counted(where, x_), places), groups), n)
    centred = x_ - _to_channels(mean, x)
    var = norm.average(_to_groups(jnp.sum(norm.counted(where, jnp.square(centred)), places), groups), n)
    rstd = norm.reciprocal_deviation(var, n, epsilon)
    last = (x.ndim - 1,)
    k = norm.scaled(_to_channels(rstd, x), norm.along(last, scale, x.ndim), None)
    y = norm.scaled(centred, k, norm.along(last, bias, x.ndim))
    return y.astype(x.dtype), _Saved(x, mean, rstd, scale, where)


def _backward(saved: _Saved, dy: jax.Array) -> tuple[Any, ...]:
    x, mean, rstd, scale, where = saved
    groups, places, last = mean.shape[-1], _places(x), (x.ndim - 1,)
    n = _number(x, where, groups)
    g, centred, r = wide(dy), wide(x) - _to_channels(mean, x), _to_channels(rstd, x)
    own = jnp.sum(g, places)  # b and s of the derivation, [batch, channels]
    with_x = jnp.sum(g * centred, places)
    gamma = None if scale is None else wide(scale)[None]
    slope = rstd * rstd * rstd * norm.average(_to_groups(norm.scaled(with_x, gamma, None), groups), n)
    offset = rstd * norm.average(_to_groups(norm.scaled(own, gamma, None), groups), n)
    direct = norm.scaled(r, norm.along(last, scale, x.ndim), None) * g
    through_statistics = _to_channels(slope, x) * centred + _to_channels(offset, x)
    dscale = jnp.sum(with_x * r.reshape(with_x.shape), 0)
    return direct - norm.counted(where, through_statistics), dscale, jnp.sum(own, 0), None


def _group_forward(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, _Saved]:
    return _forward(x, scale, bias, _groups(jnp.shape(x)[-1], num_groups, group_size), epsilon, where)


def _minimum(x: Any, scale: Any, where: Any, groups: int) -> int:
    """x, scale, the mask, and two numbers an example and group."""
    return nbytes(x, scale, where) + 2 * x.shape[0] * groups * jnp.dtype(wide_type(x)).itemsize


@rule(
    forward=_group_forward,
    backward=_backward,
    static=["num_groups", "group_size", "epsilon"],
    samples=[
        sample(normal(2, 3, 2, 6, mean=1.0, scale=2.0), normal(6), normal(6), num_groups=3),
        sample(normal(2, 5, 4), normal(4), num_groups=None, group_size=2, where=mask(2, 5, 1)),
    ],
    workloads=[sample(normal(32, 28, 28, 64), note="32 groups")],
    keeps="x, scale, two numbers an example and group",
    minimum=lambda x, scale, where, num_groups, group_size: _minimum(
        x, scale, where, _groups(x.shape[-1], num_groups, group_size)
    ),
)
def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Gives each group of channels zero mean and unit variance in each example, then scales and shifts each channel.

    x [batch, ..., channels], scale, bias [channels] -> [batch, ..., channels], of the dtype of x.

    Args:
      num_groups: into how many groups of neighbours the channels are divided; group_size, with num_groups=None, tells instead
        how many channels a group has.
      epsilon: added to the variance.
      where: a mask that broadcasts to x: the elements that mean and variance are taken of. The output is computed for all.
        Where a group has none, the mean is 0 and the variance 1.
    Raises:
      ValueError: where the groups do not divide the channels, or shapes do not fit.
    Source: Wu & He 2018, arXiv:1803.08494.
    """
    require_epsilon("group_norm", epsilon)
    _check("group_norm", x, scale, bias, where)
    return _definition(x, scale, bias, _groups(jnp.shape(x)[-1], num_groups, group_size), epsilon, where)


def _instance_forward(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, _Saved]:
    return _forward(x, scale, bias, jnp.shape(x)[-1], epsilon, where)


@rule(
    forward=_instance_forward,
    backward=_backward,
    static=["epsilon"],
    samples=[sample(normal(2, 3, 4, 3, mean=1.0, scale=2.0), normal(3), normal(3), where=mask(2, 3, 4, 3))],
    workloads=[sample(normal(32, 28, 28, 64), normal(64), normal(64))],
    keeps="x, scale, two numbers an example and channel",
    minimum=lambda x, scale, where: _minimum(x, scale, where, x.shape[-1]),
)
def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Gives each channel of each example zero mean and unit variance, then scales and shifts it.

    x [batch, ..., channels], scale, bias [channels] -> [batch, ..., channels], of the dtype of x.

    Args:
      epsilon: added to the variance.
      where: a mask that broadcasts to x: the elements that mean and variance are taken of. The output is computed for all.
        Where a channel of an example has none, the mean is 0 and the variance 1.
    Raises:
      ValueError: where shapes do not fit.
    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.
    """
    require_epsilon("instance_norm", epsilon)
    _check("instance_norm", x, scale, bias, where)
    return _definition(x, scale, bias, jnp.shape(x)[-1], epsilon, where)
