"""Pooling down to a given size, or to a single element: adaptive and global average and maximum.

One spatial dimension of n places and o windows, the i-th from ⌊i n / o⌋ up to ⌈(i + 1) n / o⌉, so that every place lies in at
least one, and in several where o does not divide n:

    mean  y[i] = (1/n[i]) Σ_{P in window i} x[P]          dx[P] = Σ_{i: P in window i} dy[i] / n[i]
    max   y[i] = max_{P in window i} x[P],  K[i] = the first tap that attains it
                                                          dx[P] = Σ_{i: P in window i} dy[i] [start[i] + K[i] = P]

A place gathers from the windows that hold it, found by tables. Where o divides n these are the windows of ``avg_pool`` and
``max_pool`` with the size and stride n / o.

Globally (one window, all of the image, n places):

    mean  dx[P] = dy / n                                  max   dx[P] = dy [K = P]

Kept are the K alone, in the smallest integers that number the taps; the means keep nothing. Ties go to the first place in
row-major order, as in ``max_pool`` (``jnp.max`` splits them).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import require_float, wide
from fbackprop.ops._pooling import (
    Windows,
    adaptive,
    first_best,
    gather,
    images,
    place_type,
    unbatched,
    window_counts,
    window_sums,
)
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, sample

__all__ = ["adaptive_avg_pool", "adaptive_max_pool", "global_avg_pool", "global_max_pool"]

Sizes = Sequence[int]


class _AvgSaved(NamedTuple):
    shape: Static  # of the input


class _MaxSaved(NamedTuple):
    place: jax.Array  # of the maximum in its window, flattened
    shape: Static  # of the input


def _check(who: str, inputs: ArrayLike, output_size: Any) -> tuple[jax.Array, Windows]:
    require_float(who, inputs=inputs)
    return jnp.asarray(inputs), adaptive(who, jnp.shape(inputs), output_size)


def _each_window(x: jax.Array, output_size: Sizes, pool: Any) -> jax.Array:
    """The definition: ``pool`` of each window [n, places, features] -> [n, features], laid side by side."""
    spatial = x.shape[-1 - len(output_size) : -1]
    batch = x.reshape(math.prod(x.shape[: -1 - len(output_size)]), *spatial, x.shape[-1])
    results = []
    for i in np.ndindex(*output_size):
        edges = [slice(j * n // o, -(-(j + 1) * n // o)) for j, n, o in zip(i, spatial, output_size)]
        window = batch[(slice(None), *edges)]
        results.append(pool(window.reshape(window.shape[0], math.prod(window.shape[1:-1]), window.shape[-1])))
    return jnp.stack(results, 1).reshape(*x.shape[: -1 - len(output_size)], *output_size, x.shape[-1])


def _first_max(window: jax.Array) -> jax.Array:
    first = jnp.argmax(window, 1, keepdims=True)
    return jnp.take_along_axis(window, first, 1)[:, 0]


_SAMPLES = [
    sample(normal(2, 5, 7, 3), (3, 2)),
    sample(normal(2, 6, 4, 3), (3, 2)),
    sample(normal(3, 2), (5,)),
    sample(normal(2, 3, 4, 5, 2), (2, 4, 1)),
]
_WORKLOADS = [
    sample(normal(32, 28, 28, 64), (7, 7), note="28×28 to 7×7"),
    sample(normal(32, 28, 28, 64), (6, 6), note="28×28 to 6×6, windows overlap"),
]


def _adaptive_avg_forward(inputs: ArrayLike, output_size: Sizes) -> tuple[jax.Array, _AvgSaved]:
    x, windows = _check("adaptive_avg_pool", inputs, output_size)
    total = window_sums(images(wide(x), windows), windows)
    y = total / window_counts(windows, True, total.dtype)
    return unbatched(y, x).astype(x.dtype), _AvgSaved(Static(x.shape))


def _adaptive_avg_backward(saved: _AvgSaved, dy: jax.Array, *, output_size: Sizes) -> tuple[Any, ...]:
    windows = adaptive("adaptive_avg_pool", saved.shape.value, output_size)
    g = images(wide(dy), windows)
    share = g * (1 / window_counts(windows, True, np.float64)).astype(g.dtype)
    return (gather(share, windows).reshape(saved.shape.value),)


@rule(
    forward=_adaptive_avg_forward,
    backward=_adaptive_avg_backward,
    static=["output_size"],
    samples=_SAMPLES,
    workloads=_WORKLOADS,
    keeps="nothing",
    minimum=lambda: 0,
)
def adaptive_avg_pool(inputs: ArrayLike, output_size: Sizes) -> jax.Array:
    """The mean of each of ``output_size`` windows that share out the image, in float32 or wider.

    inputs [..., *spatial, features] -> [..., *output_size, features]; any number of batch dimensions, also none. Window i runs
    from ⌊i n / o⌋ up to ⌈(i + 1) n / o⌉, as in PyTorch; it may overlap with its neighbours.

    Args:
      output_size: a tuple with one number for each spatial dimension; it may also be larger than the image.
    Raises:
      ValueError: where shapes do not fit. TypeError: where inputs are not floating-point.
    """
    x, _ = _check("adaptive_avg_pool", inputs, output_size)
    return _each_window(wide(x), output_size, lambda window: window.mean(1)).astype(x.dtype)


def _adaptive_max_forward(inputs: ArrayLike, output_size: Sizes) -> tuple[jax.Array, _MaxSaved]:
    x, windows = _check("adaptive_max_pool", inputs, output_size)
    y, place = first_best(images(x, windows), windows, largest=True)
    return unbatched(y, x), _MaxSaved(place, Static(x.shape))


def _adaptive_max_backward(saved: _MaxSaved, dy: jax.Array, *, output_size: Sizes) -> tuple[Any, ...]:
    windows = adaptive("adaptive_max_pool", saved.shape.value, output_size)
    return (gather(images(wide(dy), windows), windows, saved.place).reshape(saved.shape.value),)


def _adaptive_minimum(inputs: Any, y: Any, output_size: Sizes) -> int:
    taps = adaptive("adaptive_max_pool", inputs.shape, output_size).taps
    return math.prod(y.shape) * np.dtype(place_type(taps)).itemsize


@rule(
    forward=_adaptive_max_forward,
    backward=_adaptive_max_backward,
    static=["output_size"],
    samples=_SAMPLES,
    workloads=_WORKLOADS,
    keeps="place of each maximum (a byte a window)",
    minimum=_adaptive_minimum,
)
def adaptive_max_pool(inputs: ArrayLike, output_size: Sizes) -> jax.Array:
    """The largest element of each of ``output_size`` windows that share out the image.

    inputs [..., *spatial, features] -> [..., *output_size, features]; any number of batch dimensions, also none. Windows as in
    ``adaptive_avg_pool``. Equal elements: the first in row-major order receives the cotangent.

    Args:
      output_size: a tuple with one number for each spatial dimension; it may also be larger than the image.
    Raises:
      ValueError: where shapes do not fit. TypeError: where inputs are not floating-point.
    """
    x, _ = _check("adaptive_max_pool", inputs, output_size)
    return _each_window(x, output_size, _first_max)


def _flat(who: str, inputs: ArrayLike, dims: int | None) -> tuple[jax.Array, int]:
    """The input as [n, places, features], and how many spatial dimensions it had."""
    require_float(who, inputs=inputs)
    x = jnp.asarray(inputs)
    spatial = x.ndim - 2 if dims is None else dims
    if not isinstance(spatial, int) or spatial < 1 or x.ndim < spatial + 1:
        raise ValueError(
            f"{who}: inputs must be [batch, *spatial, features], or [..., *spatial, features] with dims = {dims} positive "
            f"spatial dimensions; got inputs {x.shape}."
        )
    sizes, lead = x.shape[-1 - spatial : -1], x.shape[: x.ndim - 1 - spatial]
    if min(sizes) < 1:
        raise ValueError(f"{who}: an image of {sizes} has an empty spatial dimension.")
    return x.reshape(math.prod(lead), math.prod(sizes), x.shape[-1]), spatial


def _shaped(y: jax.Array, inputs: ArrayLike, spatial: int, keepdims: bool) -> jax.Array:
    """[n, features] with the batch dimensions of the inputs again, and with 1 for each spatial one if they are kept."""
    shape = jnp.shape(inputs)
    return y.reshape(*shape[: len(shape) - 1 - spatial], *(1,) * (spatial * keepdims), shape[-1])


def _global_avg_forward(inputs: ArrayLike, *, dims: int | None = None, keepdims: bool = False) -> tuple[jax.Array, _AvgSaved]:
    x, spatial = _flat("global_avg_pool", inputs, dims)
    y = wide(x).mean(1).astype(x.dtype)
    return _shaped(y, inputs, spatial, keepdims), _AvgSaved(Static((x.shape, jnp.shape(inputs))))


def _global_avg_backward(saved: _AvgSaved, dy: jax.Array) -> tuple[Any, ...]:
    (n, places, features), shape = saved.shape.value
    share = wide(dy).reshape(n, 1, features) / places
    return (jnp.broadcast_to(share.astype(dy.dtype), (n, places, features)).reshape(shape),)


@rule(
    forward=_global_avg_forward,
    backward=_global_avg_backward,
    static=["dims", "keepdims"],
    samples=[sample(normal(2, 3, 4, 3)), sample(normal(3, 4, 2), dims=2, keepdims=True), sample(normal(2, 2, 5, 3), dims=1)],
    workloads=[sample(normal(64, 28, 28, 32), note="28×28")],
    keeps="nothing",
    minimum=lambda: 0,
)
def global_avg_pool(inputs: ArrayLike, *, dims: int | None = None, keepdims: bool = False) -> jax.Array:
    """The mean over all of the image, in float32 or wider.

    inputs [..., *spatial, features] -> [..., features], or [..., 1, …, features] with ``keepdims``.

    Args:
      dims: how many dimensions are spatial; None: all but the first (the batch) and the last.
      keepdims: leave a 1 for each spatial dimension.
    Raises:
      ValueError: where shapes do not fit. TypeError: where inputs are not floating-point.
    """
    x, spatial = _flat("global_avg_pool", inputs, dims)
    return _shaped(wide(x).mean(1).astype(x.dtype), inputs, spatial, keepdims)


def _global_max_forward(inputs: ArrayLike, *, dims: int | None = None, keepdims: bool = False) -> tuple[jax.Array, _MaxSaved]:
    x, spatial = _flat("global_max_pool", inputs, dims)
    y = x.max(1)
    # The first that equals the maximum; a NaN is the maximum and equals nothing.
    number = jnp.arange(x.shape[1], dtype=jnp.uint32)[None, :, None]
    place = jnp.where((x == y[:, None]) | (x != x), number, np.uint32(x.shape[1])).min(1)
    saved = _MaxSaved(place.astype(place_type(x.shape[1:2])), Static((x.shape, jnp.shape(inputs))))
    return _shaped(y, inputs, spatial, keepdims), saved


def _global_max_backward(saved: _MaxSaved, dy: jax.Array) -> tuple[Any, ...]:
    (n, places, features), shape = saved.shape.value
    number = jnp.arange(places, dtype=saved.place.dtype)[None, :, None]
    return (jnp.where(number == saved.place[:, None], dy.reshape(n, 1, features), 0).reshape(shape),)


def _global_minimum(inputs: Any, y: Any) -> int:
    places = math.prod(inputs.shape) // max(math.prod(y.shape), 1)
    return math.prod(y.shape) * np.dtype(place_type((places,))).itemsize


@rule(
    forward=_global_max_forward,
    backward=_global_max_backward,
    static=["dims", "keepdims"],
    samples=[sample(normal(2, 3, 4, 3)), sample(normal(3, 4, 2), dims=2, keepdims=True), sample(normal(2, 2, 5, 3), dims=1)],
    workloads=[sample(normal(64, 28, 28, 32), note="28×28")],
    keeps="place of each maximum (a byte or two an image and feature)",
    minimum=_global_minimum,
)
def global_max_pool(inputs: ArrayLike, *, dims: int | None = None, keepdims: bool = False) -> jax.Array:
    """The largest element of all of the image.

    inputs [..., *spatial, features] -> [..., features], or [..., 1, …, features] with ``keepdims``. Equal elements: the first
    in row-major order receives the cotangent, as in ``max_pool``; ``jnp.max`` shares it out.

    Args:
      dims: how many dimensions are spatial; None: all but the first (the batch) and the last.
      keepdims: leave a 1 for each spatial dimension.
    Raises:
      ValueError: where shapes do not fit. TypeError: where inputs are not floating-point.
    """
    x, spatial = _flat("global_max_pool", inputs, dims)
    return _shaped(_first_max(x), inputs, spatial, keepdims)
