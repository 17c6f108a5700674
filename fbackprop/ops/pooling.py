"""Max, min, average and sum pooling over sliding windows.

One spatial dimension; o counts windows of w taps, k a tap, s the stride, d the window's dilation, P = o s + k d a place in the
padded input:

    max   y[o] = max_k X[o s + k d],       K[o] = the first k that attains it; min alike
          dX[P] = Σ_o dy[o] [o s + K[o] d = P]

    sum   y[o] = Σ_k X[o s + k d]          mean: divided by n[o] = w, or by the elements of the window that are not padding
          dX[P] = Σ_o dy[o] Σ_k [o s + k d = P],        mean: dy[o] / n[o]

Which windows does a place meet? Write P = q s + r with 0 ≤ r < s, and k d = m s + r: then o = q − m. So

    dX[q s + r] = Σ_m dy[q − m] [K[q − m] d = m s + r],   m = 0 … ⌊(w − 1) d / s⌋

Every place *gathers* from windows at a few fixed offsets m (one, where windows do not overlap) and nothing is scattered: the
compiler makes one loop of it. Autodiff's select-and-scatter compares all windows again, element by element, and knows no
dilation.

Kept by max and min is K alone, one byte a window (two beyond 256 taps); sum and mean keep nothing. Ties go to the first tap,
as in JAX. A maximum over several dimensions is found dimension by dimension, the last one first, and the first tap in
row-major order still wins.
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
    Sliding,
    first_best,
    gather,
    images,
    place_type,
    sliding,
    unbatched,
    window_counts,
    window_sums,
)  # fmt: skip
from fbackprop.ops._windows import Padding
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, sample

__all__ = ["avg_pool", "max_pool", "min_pool", "sum_pool"]

Sizes = Sequence[int]
_OPTIONS = ["window_shape", "strides", "padding", "window_dilation"]


def _check(who: str, inputs: ArrayLike, *options: Any) -> tuple[jax.Array, Sliding]:
    require_float(who, inputs=inputs)
    return jnp.asarray(inputs), sliding(who, jnp.shape(inputs), *options)


def _reduce_windows(x: jax.Array, windows: Sliding, initial: float, combine: Any) -> jax.Array:
    """XLA's reduce-window: x [..., *spatial, features] -> [..., *windows, features]."""
    y = jax.lax.reduce_window(
        images(x, windows),
        np.asarray(initial, x.dtype),  # not traced: JAX knows the gradient of max and add by their initial value
        combine,
        (1, *windows.taps, 1),
        (1, *windows.strides, 1),
        ((0, 0), *windows.pads, (0, 0)),
        window_dilation=(1, *windows.dilation, 1),
    )
    return unbatched(y, x)


class _ExtremeSaved(NamedTuple):
    place: jax.Array  # [n, *windows, features]: the tap of the extreme, flattened
    shape: Static  # of the input


def _extreme(inputs: jax.Array, windows: Sliding, largest: bool) -> jax.Array:
    """The definition. JAX has no gradient for a dilated reduce-window; there all taps are laid side by side."""
    if max(windows.dilation) == 1:
        initial, combine = (-np.inf, jax.lax.max) if largest else (np.inf, jax.lax.min)
        return _reduce_windows(inputs, windows, initial, combine)
    x, taps = windows.padded(images(inputs, windows), -np.inf if largest else np.inf), []
    for k in np.ndindex(*windows.taps):
        tap = x
        for dimension, own in enumerate(k):
            tap = windows.tap(tap, own, dimension)
        taps.append(tap)
    every = jnp.stack(taps)
    first = (jnp.argmax if largest else jnp.argmin)(every, 0, keepdims=True)
    return unbatched(jnp.take_along_axis(every, first, 0)[0], inputs)


def _extreme_forward(who: str, largest: bool, inputs: ArrayLike, *options: Any) -> tuple[jax.Array, _ExtremeSaved]:
    x, windows = _check(who, inputs, *options)
    y, place = first_best(images(x, windows), windows, largest)
    return unbatched(y, x), _ExtremeSaved(place, Static(x.shape))


def _extreme_backward(
    saved: _ExtremeSaved, dy: jax.Array, *, window_shape: Sizes, strides: Sizes | None, padding: Padding,
    window_dilation: Sizes | None,
) -> tuple[Any, ...]:  # fmt: skip
    windows = sliding("max_pool", saved.shape.value, window_shape, strides, padding, window_dilation)
    g = dy if windows.is_apart else wide(dy)  # where windows overlap, cotangents add up in at least float32
    return (gather(images(g, windows), windows, saved.place).reshape(saved.shape.value),)


def _extreme_minimum(y: Any, window_shape: Sizes) -> int:
    return math.prod(y.shape) * np.dtype(place_type(window_shape)).itemsize


_SAMPLES = [
    sample(normal(2, 4, 6, 3), (2, 2), (2, 2)),
    sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME", window_dilation=(1, 2)),
    sample(normal(5, 7, 2), (2, 3), (3, 2), ((1, 0), (0, 2))),
    sample(normal(2, 9, 3), (3,), window_dilation=(3,)),
]


def _max_forward(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> tuple[jax.Array, _ExtremeSaved]:  # fmt: skip
    return _extreme_forward("max_pool", True, inputs, window_shape, strides, padding, window_dilation)


@rule(
    forward=_max_forward,
    backward=_extreme_backward,
    static=_OPTIONS,
    samples=[
        *_SAMPLES,
        sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME"),
        sample(normal(1, 4, 5, 4, 2), (2, 2, 3), (2, 1, 2)),
    ],
    workloads=[
        sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID"),
        sample(normal(16, 56, 56, 64), (3, 3), (2, 2), "SAME", note="window 3×3, strides 2×2, SAME"),
    ],
    keeps="place of each maximum (a byte a window)",
    minimum=_extreme_minimum,
)
def max_pool(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> jax.Array:  # fmt: skip
    """The largest element of each window.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none. Padding never
    wins. Equal elements: the first in row-major order receives the cotangent.

    Args:
      window_shape: size of the window, a tuple with one number for each spatial dimension.
      strides: steps between windows, a tuple; None is 1, as in Flax.
      padding: "VALID", "SAME", an integer, or an integer or (before, behind) for each spatial dimension.
      window_dilation: steps between the elements of a window, a tuple; None is 1.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    return _extreme(*_check("max_pool", inputs, window_shape, strides, padding, window_dilation), largest=True)


def _min_forward(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> tuple[jax.Array, _ExtremeSaved]:  # fmt: skip
    return _extreme_forward("min_pool", False, inputs, window_shape, strides, padding, window_dilation)


@rule(
    forward=_min_forward,
    backward=_extreme_backward,
    static=_OPTIONS,
    samples=_SAMPLES,
    workloads=[sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID")],
    keeps="place of each minimum (a byte a window)",
    minimum=_extreme_minimum,
)
def min_pool(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> jax.Array:  # fmt: skip
    """The smallest element of each window.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none. Padding never
    wins. Equal elements: the first in row-major order receives the cotangent.

    Args:
      window_shape, strides, padding, window_dilation: as in ``max_pool``.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    return _extreme(*_check("min_pool", inputs, window_shape, strides, padding, window_dilation), largest=False)


class _SumSaved(NamedTuple):
    shape: Static  # of the input


def _sum_forward(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> tuple[jax.Array, _SumSaved]:  # fmt: skip
    x, windows = _check("sum_pool", inputs, window_shape, strides, padding, window_dilation)
    total = window_sums(images(wide(x), windows), windows)
    return unbatched(total, x).astype(x.dtype), _SumSaved(Static(x.shape))


def _sum_backward(
    saved: _SumSaved, dy: jax.Array, *, window_shape: Sizes, strides: Sizes | None, padding: Padding,
    window_dilation: Sizes | None,
) -> tuple[Any, ...]:  # fmt: skip
    windows = sliding("sum_pool", saved.shape.value, window_shape, strides, padding, window_dilation)
    return (gather(images(wide(dy), windows), windows).reshape(saved.shape.value),)


@rule(
    forward=_sum_forward,
    backward=_sum_backward,
    static=_OPTIONS,
    samples=_SAMPLES,
    workloads=[sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID")],
    keeps="nothing",
    minimum=lambda: 0,
)
def sum_pool(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *,
    window_dilation: Sizes | None = None,
) -> jax.Array:  # fmt: skip
    """The sum of each window, in float32 or wider.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none.

    Args:
      window_shape, strides, padding, window_dilation: as in ``max_pool``.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    x, windows = _check("sum_pool", inputs, window_shape, strides, padding, window_dilation)
    return _reduce_windows(wide(x), windows, 0.0, jax.lax.add).astype(x.dtype)


def _avg_forward(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID",
    count_include_pad: bool = True, *, window_dilation: Sizes | None = None,
) -> tuple[jax.Array, _SumSaved]:  # fmt: skip
    x, windows = _check("avg_pool", inputs, window_shape, strides, padding, window_dilation)
    total = window_sums(images(wide(x), windows), windows)
    y = total / window_counts(windows, count_include_pad, total.dtype)
    return unbatched(y, x).astype(x.dtype), _SumSaved(Static(x.shape))


def _avg_backward(
    saved: _SumSaved, dy: jax.Array, *, window_shape: Sizes, strides: Sizes | None, padding: Padding,
    count_include_pad: bool, window_dilation: Sizes | None,
) -> tuple[Any, ...]:  # fmt: skip
    windows = sliding("avg_pool", saved.shape.value, window_shape, strides, padding, window_dilation)
    g = images(wide(dy), windows)
    share = g * (1 / window_counts(windows, count_include_pad, np.float64)).astype(g.dtype)
    return (gather(share, windows).reshape(saved.shape.value),)


@rule(
    forward=_avg_forward,
    backward=_avg_backward,
    static=[*_OPTIONS, "count_include_pad"],
    samples=[
        *_SAMPLES,
        sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME", False),
        sample(normal(5, 7, 2), (2, 3), (3, 2), ((1, 0), (0, 2)), False, window_dilation=(1, 2)),
    ],
    workloads=[sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID")],
    keeps="nothing",
    minimum=lambda: 0,
)
def avg_pool(
    inputs: ArrayLike, window_shape: Sizes, strides: Sizes | None = None, padding: Padding = "VALID",
    count_include_pad: bool = True, *, window_dilation: Sizes | None = None,
) -> jax.Array:  # fmt: skip
    """The mean of each window, in float32 or wider.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none.

    Args:
      window_shape, strides, padding, window_dilation: as in ``max_pool``.
      count_include_pad: divide by the size of the window; False: by the number of its elements that are not padding.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    x, windows = _check("avg_pool", inputs, window_shape, strides, padding, window_dilation)
    total = _reduce_windows(images(wide(x), windows), windows, 0.0, jax.lax.add)
    return unbatched(total / window_counts(windows, count_include_pad, total.dtype), x).astype(x.dtype)
