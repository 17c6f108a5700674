"""Max and average pooling over sliding windows.

One spatial dimension; o counts windows of w elements, k a place in the window, s the stride, P = o s + k a place in the
padded input:

    max   y[o] = max_k X[o s + k],       K[o] = the first k that attains it
          dX[P] = Σ_o dy[o] [o s + K[o] = P]

    mean  y[o] = (1/n[o]) Σ_k X[o s + k],   n[o] = w, or the elements of the window that are not padding
          dX[P] = Σ_o (dy[o] / n[o]) [0 ≤ P − o s < w]

Which windows does a place meet? Write P = q s + r with 0 ≤ r < s, and k = r + m s: then o = q − m. So

    dX[q s + r] = Σ_m dy[q − m] [K[q − m] = r + m s],   m = 0 … ⌈w/s⌉ − 1

Every place *gathers* from ⌈w/s⌉ windows at fixed offsets (one, where windows do not overlap) and nothing is scattered: the
compiler makes one loop of it. Autodiff's select-and-scatter compares all windows again, element by element.

Kept by max is K alone, one byte a window (two beyond 256 places); the mean keeps nothing. Ties go to the first place, as in
JAX. A maximum over several dimensions is found dimension by dimension, the last one first: w₁ + w₂ comparisons and not w₁ w₂,
and the first place in row-major order still wins.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import batched, require_float, wide, wide_type
from fbackprop.ops._windows import Padding, Pads, check_fits, pads, per_dimension
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, sample

__all__ = ["avg_pool", "max_pool"]


class _Plan(NamedTuple):
    """One number for each spatial dimension."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: Pads
    sizes: tuple[int, ...]  # of the padded input
    out: tuple[int, ...]  # how many windows


def _plan(
    who: str, shape: Sequence[int], window_shape: Sequence[int], strides: Sequence[int] | None, padding: Padding
) -> _Plan:
    if isinstance(window_shape, int) or not window_shape:
        raise ValueError(
            f"{who}: window_shape must name a size for each spatial dimension, such as (2, 2); got {window_shape!r}."
        )
    dims = len(window_shape)
    if len(shape) < dims + 1:
        raise ValueError(
            f"{who}: inputs must be [..., *spatial, features] with {dims} spatial dimensions, got inputs {tuple(shape)}."
        )
    window = per_dimension(who, "window_shape", window_shape, dims)
    steps = per_dimension(who, "strides", strides, dims)
    spatial = shape[-1 - dims : -1]
    amount = pads(who, padding, spatial, window, steps)
    check_fits(who, spatial, window, amount)
    sizes = tuple(n + a + b for n, (a, b) in zip(spatial, amount))
    return _Plan(window, steps, amount, sizes, tuple((n - w) // s + 1 for n, w, s in zip(sizes, window, steps)))


def _padded(x: jax.Array, plan: _Plan, value: float) -> jax.Array:
    """[..., *spatial, features] -> [n, *spatial, features], padded with a value."""
    x = batched(x, len(plan.window) + 1)
    config = [(0, 0, 0), *((a, b, 0) for a, b in plan.pads), (0, 0, 0)]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)


def _unpadded(dx: jax.Array, plan: _Plan, shape: Sequence[int]) -> jax.Array:
    """Cuts [n, *places, features] down to the input, with its batch dimensions again."""
    dims = len(plan.window)
    start = [0, *(a for a, _ in plan.pads), 0]
    spatial = shape[-1 - dims : -1]
    limit = [dx.shape[0], *(a + n for (a, _), n in zip(plan.pads, spatial)), dx.shape[-1]]
    return jax.lax.slice(dx, start, limit).reshape(shape)


def _every(x: jax.Array, k: int, axis: int, stride: int, out: int) -> jax.Array:
    """Element k of every window along an axis."""
    return jax.lax.slice_in_dim(x, k, k + (out - 1) * stride + 1, stride, axis)


def _gather_windows(value: jax.Array, plan: _Plan, place: jax.Array | None) -> jax.Array:
    """dX[q s + r] = Σ_m value[q − m] [place[q − m] = r + m s]; without places, all that lie in the window.

    value, place [n, *windows, features] -> [n, *places, features], as many as the padded input has.
    """
    dims = len(plan.window)
    tiles = [-(-n // s) for n, s in zip(plan.sizes, plan.strides)]
    overlaps = [-(-w // s) for w, s in zip(plan.window, plan.strides)]
    total: Any = None
    for m in np.ndindex(*overlaps):
        # The place, flattened, that tile position r has in the window m tiles before, and whether it lies in it.
        wanted, inside = np.zeros((1,) * dims, np.int64), np.ones((1,) * dims, bool)
        for axis, (mi, w, s) in enumerate(zip(m, plan.window, plan.strides)):
            k = (np.arange(s) + mi * s).reshape([-1 if i == axis else 1 for i in range(dims)])
            wanted, inside = wanted * w + np.minimum(k, w - 1), inside & (k < w)
        config = [(0, 0, 0), *((mi, t - o - mi, 0) for mi, t, o in zip(m, tiles, plan.out)), (0, 0, 0)]
        # [n, *tiles, features] against [*r]: n, tile₁, r₁, tile₂, r₂, …, features
        apart = (0, *(1 + 2 * i for i in range(dims)), 1 + 2 * dims)
        spread = [i for i in range(2 + 2 * dims) if i not in apart]

        def tiled(array: jax.Array, config: Any = config, spread: Any = spread) -> jax.Array:
            return jnp.expand_dims(jax.lax.pad(array, jnp.zeros((), array.dtype), config), spread)

        part, inside = tiled(value), np.expand_dims(inside, apart)
        if place is not None:
            part = jnp.where(tiled(place) == jnp.asarray(np.expand_dims(wanted, apart), place.dtype), part, 0)
        part = jnp.broadcast_to(part, jnp.broadcast_shapes(part.shape, inside.shape))
        if not inside.all():
            part = jnp.where(inside, part, 0)
        total = part if total is None else total + part
    full = [t * s for t, s in zip(tiles, plan.strides)]
    dx = total.reshape(value.shape[0], *full, value.shape[-1])
    # Tiles may end before the last place (places that no window meets) or behind it.
    config = [(0, 0, 0), *((0, n - f, 0) for n, f in zip(plan.sizes, full)), (0, 0, 0)]
    return jax.lax.pad(dx, jnp.zeros((), dx.dtype), config)


class _MaxSaved(NamedTuple):
    place: jax.Array  # of the maximum in its window, flattened
    shape: Static  # of the input


def _max(inputs: ArrayLike, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    inputs = jnp.asarray(inputs)
    best = _padded(inputs, plan, -jnp.inf)
    small = next(d for d, n in ((jnp.uint8, 2**8), (jnp.uint16, 2**16), (jnp.uint32, 2**32)) if math.prod(plan.window) <= n)
    place: Any = None
    below = 1  # places in the dimensions that are done
    for axis in reversed(range(1, 1 + len(plan.window))):
        w, s, out = plan.window[axis - 1], plan.strides[axis - 1], plan.out[axis - 1]
        old, old_place, place = best, place, None
        for k in range(w):
            value = _every(old, k, axis, s, out)
            here = jnp.asarray(k * below, small)
            if old_place is not None:
                here = _every(old_place, k, axis, s, out) + here
            if k == 0:
                best, place = value, jnp.broadcast_to(here, value.shape)
            else:
                better = value > best  # strictly: the first of equals stays
                best, place = jnp.maximum(best, value), jnp.where(better, here, place)
        below *= w
    dims = len(plan.window)
    return best.reshape(*inputs.shape[: inputs.ndim - dims - 1], *best.shape[1:]), place


def _max_forward(
    inputs: ArrayLike, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> tuple[jax.Array, _MaxSaved]:
    inputs = jnp.asarray(inputs)
    plan = _plan("max_pool", inputs.shape, window_shape, strides, padding)
    # The barrier asks the compiler not to find the places again for every place that gathers.
    y, place = jax.lax.optimization_barrier(_max(inputs, plan))
    return y, _MaxSaved(place, Static(inputs.shape))


def _max_backward(
    saved: _MaxSaved, dy: jax.Array, *, window_shape: Sequence[int], strides: Sequence[int] | None, padding: Padding
) -> tuple[Any, ...]:
    plan = _plan("max_pool", saved.shape.value, window_shape, strides, padding)
    g = dy.reshape(saved.place.shape)
    overlap = any(w > s for w, s in zip(plan.window, plan.strides))
    g = wide(g) if overlap else g  # sums in at least float32
    return (_unpadded(_gather_windows(g, plan, saved.place), plan, saved.shape.value),)


def _max_primal(
    inputs: ArrayLike, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> jax.Array:
    plan = _check("max_pool", inputs, window_shape, strides, padding)
    return _max(inputs, plan)[0]


def _check(who: str, inputs: ArrayLike, window_shape: Any, strides: Any, padding: Any) -> _Plan:
    require_float(who, inputs=inputs)
    return _plan(who, jnp.shape(inputs), window_shape, strides, padding)


def _reduce_windows(x: jax.Array, plan: _Plan, initial: float, combine: Any) -> jax.Array:
    """The definition by XLA's reduce-window: x [..., *spatial, features] -> [..., *windows, features]."""
    dims = len(plan.window)
    y = jax.lax.reduce_window(
        batched(x, dims + 1),
        np.asarray(initial, x.dtype),  # not traced: JAX knows the gradient of max and add by their initial value
        combine,
        (1, *plan.window, 1),
        (1, *plan.strides, 1),
        ((0, 0), *plan.pads, (0, 0)),
    )
    return y.reshape(*x.shape[: x.ndim - dims - 1], *y.shape[1:])


@rule(
    forward=_max_forward,
    backward=_max_backward,
    primal=_max_primal,
    static=["window_shape", "strides", "padding"],
    samples=[
        sample(normal(2, 4, 6, 3), (2, 2), (2, 2)),
        sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME"),
        sample(normal(5, 7, 2), (2, 3), (3, 2), ((1, 0), (0, 2))),
        sample(normal(2, 9, 3), (3,)),
        sample(normal(1, 4, 5, 4, 2), (2, 2, 3), (2, 1, 2)),
    ],
    workloads=[
        sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID"),
        sample(normal(16, 56, 56, 64), (3, 3), (2, 2), "SAME", note="window 3×3, strides 2×2, SAME"),
    ],
    keeps="place of each maximum (a byte a window)",
)
def max_pool(
    inputs: ArrayLike, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """The largest element of each window.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none. Padding never
    wins. Equal elements: the first in row-major order receives the cotangent.

    Args:
      window_shape: size of the window, a tuple with one number for each spatial dimension.
      strides: steps between windows, a tuple; None is 1, as in Flax.
      padding: "VALID", "SAME", an integer, or an integer or (before, behind) for each spatial dimension.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    plan = _check("max_pool", inputs, window_shape, strides, padding)
    return _reduce_windows(jnp.asarray(inputs), plan, -jnp.inf, jax.lax.max)


class _AvgSaved(NamedTuple):
    shape: Static  # of the input


def _counts(plan: _Plan, count_include_pad: bool) -> np.ndarray:
    """How many elements each window averages, of a shape that broadcasts with [..., *windows, features]."""
    if count_include_pad:
        return np.full((1,) * (1 + len(plan.window)), math.prod(plan.window), np.float64)
    total = np.ones((1,), np.float64)
    for w, s, (a, b), size, out in zip(plan.window, plan.strides, plan.pads, plan.sizes, plan.out):
        begin = np.arange(out) * s
        own = np.minimum(begin + w, size - b) - np.maximum(begin, a)
        total = total[..., None, :] * np.maximum(own, 1)[:, None]  # a window of padding alone averages to 0
    return total


def _mean(inputs: ArrayLike, plan: _Plan, count_include_pad: bool) -> jax.Array:
    inputs = jnp.asarray(inputs)
    counts = _counts(plan, count_include_pad)
    y = _padded(wide(inputs), plan, 0.0)
    for axis, (w, s, out) in enumerate(zip(plan.window, plan.strides, plan.out), start=1):
        parts = [_every(y, k, axis, s, out) for k in range(w)]
        y = parts[0]
        for part in parts[1:]:
            y = y + part
    y = y.reshape(*inputs.shape[: inputs.ndim - len(plan.window) - 1], *y.shape[1:])
    return (y / jnp.asarray(_lead(counts, y.ndim), y.dtype)).astype(inputs.dtype)


def _lead(counts: np.ndarray, ndim: int) -> np.ndarray:
    return counts.reshape((1,) * (ndim - counts.ndim) + counts.shape)


def _avg_forward(
    inputs: ArrayLike,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> tuple[jax.Array, _AvgSaved]:
    inputs = jnp.asarray(inputs)
    plan = _plan("avg_pool", inputs.shape, window_shape, strides, padding)
    y = _mean(inputs, plan, count_include_pad)
    return y, _AvgSaved(Static(inputs.shape))


def _avg_backward(
    saved: _AvgSaved,
    dy: jax.Array,
    *,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
    count_include_pad: bool,
) -> tuple[Any, ...]:
    plan = _plan("avg_pool", saved.shape.value, window_shape, strides, padding)
    share = wide(dy) * jnp.asarray(_lead(1 / _counts(plan, count_include_pad), dy.ndim), wide_type(dy))
    share = batched(share, len(plan.window) + 1)
    return (_unpadded(_gather_windows(share, plan, None), plan, saved.shape.value),)


@rule(
    forward=_avg_forward,
    backward=_avg_backward,
    static=["window_shape", "strides", "padding", "count_include_pad"],
    samples=[
        sample(normal(2, 4, 6, 3), (2, 2), (2, 2)),
        sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME"),
        sample(normal(2, 7, 6, 3), (3, 2), (2, 1), "SAME", False),
        sample(normal(5, 7, 2), (2, 3), (3, 2), ((1, 0), (0, 2)), False),
        sample(normal(2, 9, 3), (3,)),
    ],
    workloads=[sample(normal(64, 28, 28, 32), (2, 2), (2, 2), note="window 2×2, strides 2×2, VALID")],
    keeps="nothing",
)
def avg_pool(
    inputs: ArrayLike,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window.

    inputs [..., *spatial, features] -> [..., *spatial', features]; any number of batch dimensions, also none.

    Args:
      window_shape, strides, padding: as in ``max_pool``.
      count_include_pad: divide by the size of the window; False: by the number of its elements that are not padding.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where inputs are not floating-point.
    """
    plan = _check("avg_pool", inputs, window_shape, strides, padding)
    x = jnp.asarray(inputs)
    total = _reduce_windows(wide(x), plan, 0.0, jax.lax.add)
    return (total / jnp.asarray(_lead(_counts(plan, count_include_pad), total.ndim), total.dtype)).astype(x.dtype)
