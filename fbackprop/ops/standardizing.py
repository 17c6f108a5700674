"""standardize, to zero mean and unit variance, where mean or variance may also be given: as in jax.nn.

    y = (x − μ) r,   r = 1 / √(v + ε)

    through y alone        dx = r dy        dμ = −Σ r dy        dv = −½ Σ r³ dy (x − μ)

With the mean E over the n elements of a row that are counted (w = 1 for these, else 0) what is not given is

    μ = E[x]                                dx += w dμ / n
    v = E[(x − μ)²], μ not given or         dx += w 2 (x − μ) dv / n         dμ −= 2 E[x − μ] dv, which is 0 for μ = E[x]
      algorithm "stable"
    v = max(E[x²] − μ², 0), μ given and     dx += w 2 x dv / n               dμ −= 2 μ dv
      algorithm "fast"

Where neither is given both algorithms mean the same, and the sum of the centred squares is taken: E[x²] − μ² would cancel.
Kept: x, μ and r, in float32 or wider.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _normalizing as norm
from fbackprop.ops._arithmetic import canonical_axes, nbytes, require_epsilon, require_float, shapes, sum_to, wide, wide_type
from fbackprop.rules import Static, rule
from fbackprop.samples import mask, normal, positive, sample

__all__ = ["standardize"]

Axis = int | Sequence[int] | None


class _Saved(NamedTuple):
    x: jax.Array
    mean: jax.Array
    r: jax.Array
    where: jax.Array | None
    given: Static  # shapes of the mean and of the variance that were given, or None


def _terms(
    x: jax.Array, axis: Axis, mean: Any, variance: Any, epsilon: float, where: Any, algorithm: str
) -> tuple[jax.Array, jax.Array]:
    """μ and r; what is not given with the axes of length 1."""
    axes = canonical_axes("standardize", axis, x.ndim)
    n = norm.number(where, x, axes)

    def average(values: jax.Array) -> jax.Array:
        return norm.average(jnp.sum(norm.counted(where, values), axes, keepdims=True), n)

    def ranked(given: Any) -> jax.Array:
        return jnp.asarray(given, x.dtype).reshape((1,) * (x.ndim - jnp.ndim(given)) + jnp.shape(given))

    centre = average(x) if mean is None else ranked(mean)
    if variance is not None:
        v = ranked(variance)
    elif mean is None or algorithm == "stable":
        v = average(jnp.square(x - centre))
    else:
        v = jnp.maximum(average(jnp.square(x)) - jnp.square(centre), 0)
    return centre, jax.lax.rsqrt(v + epsilon)


def _shape(array: Any) -> tuple[int, ...] | None:
    return None if array is None else jnp.shape(array)


def _forward(
    x: ArrayLike,
    axis: Axis = -1,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    *,
    algorithm: str = "fast",
) -> tuple[jax.Array, _Saved]:
    where = None if where is None else jnp.asarray(where)
    centre, r = _terms(wide(x), axis, mean, variance, epsilon, where, algorithm)
    saved = _Saved(jnp.asarray(x), centre, r, where, Static((_shape(mean), _shape(variance))))
    return ((wide(x) - centre) * r).astype(jnp.result_type(x)), saved


def _backward(saved: _Saved, dy: jax.Array, *, axis: Axis, epsilon: float, algorithm: str) -> tuple[Any, ...]:
    x, mean, r, where = wide(saved.x), saved.mean, saved.r, saved.where
    mean_shape, variance_shape = saved.given.value
    axes, g = canonical_axes("", axis, x.ndim), wide(dy)
    row = tuple(1 if i in axes else size for i, size in enumerate(x.shape))
    n = norm.number(where, x, axes)
    dx = r * g
    dmean = -dx
    dv = -0.5 * r**3 * g * (x - mean)
    if variance_shape is not None:
        dvariance = sum_to(dv, variance_shape)
    elif mean_shape is not None and algorithm == "fast":
        dv, dvariance = sum_to(dv, jnp.broadcast_shapes(row, mean.shape)), None
        square = norm.average(jnp.sum(norm.counted(where, jnp.square(x)), axes, keepdims=True), n) - jnp.square(mean)
        dv = dv * jnp.where(square > 0, 1, jnp.where(square == 0, 0.5, 0))
        dmean = sum_to(dmean, mean_shape) - sum_to(2 * mean * dv, mean_shape)
        dx = dx + norm.counted(where, 2 * x * norm.average(sum_to(dv, row), n))
    else:
        share, dvariance = norm.counted(where, norm.average(2 * (x - mean) * sum_to(dv, row), n)), None
        dx = dx + share
        dmean = dmean if mean_shape is None else dmean - share
    if mean_shape is None:
        return dx + norm.counted(where, norm.average(sum_to(dmean, row), n)), None, dvariance, None
    return dx, sum_to(dmean, mean_shape), dvariance, None


def _minimum(x: Any, axis: Axis, mean: Any, variance: Any, where: Any) -> int:
    """x, the mask, and μ and r in float32 or wider, each of the shape that was given or one a row."""
    axes = canonical_axes("", axis, x.ndim)
    row = jax.ShapeDtypeStruct(tuple(1 if i in axes else n for i, n in enumerate(x.shape)), wide_type(x))
    kept = [row if a is None else jax.ShapeDtypeStruct(jnp.shape(a), row.dtype) for a in (mean, variance)]
    return nbytes(x, where, *kept)


@rule(
    forward=_forward,
    backward=_backward,
    static=["axis", "epsilon", "algorithm"],
    samples=[
        sample(normal(5, 8, mean=1.0, scale=2.0)),
        sample(normal(5, 8), -1, normal(5, 1, scale=0.1), None, 1e-3, mask(5, 8)),
        sample(normal(4, 6), 0, normal(6), positive(1, 6)),
        sample(normal(4, 6), -1, normal(4, 1), where=mask(4, 6), algorithm="stable"),
        sample(normal(4, 2, 3), (0, 2), None, positive(2, 1), where=mask(4, 2, 3)),
    ],
    workloads=[sample(normal(8192, 768), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x, two numbers a row",
    minimum=_minimum,
)
def standardize(
    x: ArrayLike,
    axis: Axis = -1,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    *,
    algorithm: str = "fast",
) -> jax.Array:
    """Gives each row zero mean and unit variance: y = (x − mean) / √(variance + epsilon).

    x [...] -> y [...], of the same dtype; mean and variance of shapes that broadcast with x.

    Args:
      axis: the dimension, or dimensions, of a row; None is all.
      mean, variance: to use in place of those of the rows; both have a gradient.
      epsilon: added to the variance; a Python number.
      where: booleans, of the dimensions of x: the elements that mean and variance are taken of.
      algorithm: with a mean and no variance, E[x²] − mean² ("fast") or E[(x − mean)²] ("stable"), as in jax.nn.
    Raises:
      ValueError: where a shape does not fit or the algorithm is unknown. TypeError: where x is not floating-point.
    """
    require_float("standardize", x=x, mean=mean, variance=variance)
    if algorithm not in ("fast", "stable"):
        raise ValueError(f"standardize: algorithm is {algorithm!r}, expected 'fast' or 'stable'.")
    x, where = jnp.asarray(x), None if where is None else jnp.asarray(where)
    require_epsilon("standardize", epsilon)
    norm.check("standardize", x, (), where)
    for name, given in (("mean", mean), ("variance", variance)):
        if given is not None and not _fits(jnp.shape(given), x.shape):
            raise ValueError(f"standardize: {name} does not broadcast to x ({shapes(**{name: given, 'x': x})}).")
    centre, r = _terms(wide(x), axis, mean, variance, epsilon, where, algorithm)
    return ((wide(x) - centre) * r).astype(x.dtype)


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    return len(shape) <= len(into) and all(a in (1, b) for a, b in zip(shape[::-1], into[::-1]))
