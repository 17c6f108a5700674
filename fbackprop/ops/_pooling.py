"""Windows over an image as pooling sees them: their elements tap by tap, and for each place the windows that meet it.

Two ways to lay windows, with the same four questions (``taps``, ``tap``, ``views``, ``finish``): ``Sliding``, with strides,
padding and dilation, answered by slices; ``Adaptive``, as many windows as are asked for, answered by tables of positions.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.ops._arithmetic import batched
from fbackprop.ops._windows import Padding, Pads, check_fits, pads, per_dimension

Look = Callable[[jax.Array], jax.Array]
View = tuple[Look, np.ndarray, np.ndarray]
"""How a place sees one of the windows that may meet it: ``look`` lays what belongs to windows out over the places; the tap,
flattened, that the place is in that window; and whether it is one at all."""


class Sliding(NamedTuple):
    """Windows of one size at equal steps. One number for each spatial dimension."""

    taps: tuple[int, ...]  # of a window
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: Pads
    sizes: tuple[int, ...]  # of the padded input
    out: tuple[int, ...]  # how many windows

    def padded(self, x: jax.Array, value: float) -> jax.Array:
        config = [(0, 0, 0), *((a, b, 0) for a, b in self.pads), (0, 0, 0)]
        return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)

    def tap(self, x: jax.Array, k: int, dimension: int) -> jax.Array:
        """Element k of every window along a dimension."""
        start, stride = k * self.dilation[dimension], self.strides[dimension]
        return jax.lax.slice_in_dim(x, start, start + (self.out[dimension] - 1) * stride + 1, stride, dimension + 1)

    def counts(self, with_padding: bool) -> list[np.ndarray]:
        """Along each dimension, how many elements a window has."""
        every = zip(self.taps, self.strides, self.dilation, self.pads, self.sizes, self.out)
        counts = []
        for w, s, d, (a, b), size, out in every:
            place = np.arange(out)[:, None] * s + np.arange(w) * d
            counts.append(((place >= a) & (place < size - b) | with_padding).sum(1))
        return counts

    def views(self) -> Iterator[View]:
        """A place q s + r is tap k of window q − m, where k d = m s + r: for each m, over all r of a tile of s places."""
        dims = len(self.taps)
        tables: list[dict[int, np.ndarray]] = []
        for w, s, d in zip(self.taps, self.strides, self.dilation):
            table: dict[int, np.ndarray] = {}
            for k in range(w):
                m, r = divmod(k * d, s)
                table.setdefault(m, np.full(s, -1))[r] = k
            tables.append(table)
        # [n, *windows, features] -> n, tile₁, r₁, tile₂, r₂, …, features
        spread = [2 + 2 * i for i in range(dims)]
        apart = (0, *(1 + 2 * i for i in range(dims)), 1 + 2 * dims)
        for m in itertools.product(*tables):
            wanted, inside = _flattened([table[i] for table, i in zip(tables, m)], self.taps)
            config = [(0, 0, 0), *((i, t - o - i, 0) for i, t, o in zip(m, self._tiles, self.out)), (0, 0, 0)]

            def look(array: jax.Array, config: Any = config) -> jax.Array:
                return jnp.expand_dims(jax.lax.pad(array, jnp.zeros((), array.dtype), config), spread)

            yield look, np.expand_dims(wanted, apart), np.expand_dims(inside, apart)

    @property
    def _tiles(self) -> list[int]:
        return [-(-n // s) for n, s in zip(self.sizes, self.strides)]

    @property
    def is_apart(self) -> bool:
        """Whether no place is met by two windows, as far as the sizes alone tell."""
        return all((w - 1) * d < s for w, d, s in zip(self.taps, self.dilation, self.strides))

    def interleaved(self, value: jax.Array) -> jax.Array:
        """Each window's value at the places of its taps, summed tap by tap with nothing between. For a few taps and vectors of
        features the compiler makes a faster loop of this than of the views: it computes the value for a whole vector. The two
        signs change nothing but that: values that are only copied would be copied one by one."""
        value = -value
        total: Any = None
        for k in np.ndindex(*self.taps):
            starts = [i * d for i, d in zip(k, self.dilation)]
            every = zip(starts, self.strides, self.pads, self.sizes, self.out)
            config = [(i - a, n - b - i - (o - 1) * s - 1, s - 1) for i, s, (a, b), n, o in every]
            part = jax.lax.pad(value, jnp.zeros((), value.dtype), [(0, 0, 0), *config, (0, 0, 0)])
            total = part if total is None else total + part
        return -total

    def finish(self, total: jax.Array) -> jax.Array:
        """Tiles as places, without the padding. They may end before the last place (which no window meets) or behind it."""
        full = [t * s for t, s in zip(self._tiles, self.strides)]
        config = [(0, 0, 0), *((-a, n - b - f, 0) for (a, b), n, f in zip(self.pads, self.sizes, full)), (0, 0, 0)]
        dx = total.reshape(total.shape[0], *full, total.shape[-1])
        return jax.lax.pad(dx, jnp.zeros((), dx.dtype), config)


class Adaptive(NamedTuple):
    """``out`` windows along each dimension, the i-th from ⌊i n / out⌋ up to ⌈(i + 1) n / out⌉; neighbours may overlap."""

    sizes: tuple[int, ...]
    out: tuple[int, ...]

    def _edges(self, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        n, out = self.sizes[dimension], self.out[dimension]
        i = np.arange(out)
        return i * n // out, -(-(i + 1) * n // out)

    @property
    def taps(self) -> tuple[int, ...]:
        """The size of the largest window."""
        return tuple(int(np.max(stop - start)) for start, stop in map(self._edges, range(len(self.out))))

    def padded(self, x: jax.Array, value: float) -> jax.Array:
        """An element of the neutral value behind, for the taps that a smaller window does not have."""
        return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0), *[(0, 1, 0)] * len(self.out), (0, 0, 0)])

    def tap(self, x: jax.Array, k: int, dimension: int) -> jax.Array:
        start, stop = self._edges(dimension)
        place = np.where(start + k < stop, start + k, self.sizes[dimension])
        return jnp.take(x, place, axis=dimension + 1, mode="clip")

    def counts(self, with_padding: bool) -> list[np.ndarray]:
        return [stop - start for start, stop in map(self._edges, range(len(self.out)))]

    def views(self) -> Iterator[View]:
        """For each place the windows from start to stop that hold it, one after the other."""
        dims, covers = len(self.out), []
        for dimension, n in enumerate(self.sizes):
            start, stop = self._edges(dimension)
            holds = [np.flatnonzero((start <= p) & (p < stop)) for p in range(n)]
            covers.append([[(int(own[j]), p - int(start[own[j]])) if j < len(own) else (0, -1) for p, own in enumerate(holds)]
                           for j in range(max(map(len, holds)))])  # fmt: skip
        for cover in itertools.product(*covers):
            windows = [np.array([i for i, _ in own]) for own in cover]
            wanted, inside = _flattened([np.array([k for _, k in own]) for own in cover], self.taps)

            def look(array: jax.Array, windows: Sequence[np.ndarray] = windows) -> jax.Array:
                for dimension, own in enumerate(windows):
                    array = jnp.take(array, own, axis=dimension + 1, mode="clip")
                return array

            yield look, np.expand_dims(wanted, (0, 1 + dims)), np.expand_dims(inside, (0, 1 + dims))

    def finish(self, total: jax.Array) -> jax.Array:
        return total


Windows = Sliding | Adaptive


def _flattened(taps: Sequence[np.ndarray], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Taps along each dimension (−1 for none) as one row-major number, and whether there is a tap in all dimensions."""
    wanted, inside = np.zeros((), np.int64), np.ones((), bool)
    for k, w in zip(taps, sizes):
        wanted, inside = wanted[..., None] * w + np.maximum(k, 0), inside[..., None] & (k >= 0)
    return wanted, inside


def place_type(taps: Sequence[int]) -> Any:
    """The smallest dtype that numbers the taps of a window."""
    return next(d for d, n in ((np.uint8, 2**8), (np.uint16, 2**16), (np.uint32, 2**32)) if math.prod(taps) <= n)


def first_best(x: jax.Array, windows: Windows, largest: bool) -> tuple[jax.Array, jax.Array]:
    """The largest (or smallest) element of each window and its tap, the first of equals, dimension by dimension.

    x [n, *spatial, features] -> two arrays [n, *windows, features].
    """
    dtype = place_type(windows.taps)
    exact = np.dtype(dtype).itemsize <= 2  # float32 counts so far, and beyond; selects are fastest where widths agree
    best: jax.Array = windows.padded(x, -np.inf if largest else np.inf)
    place: Any = None
    below = 1  # taps in the dimensions that are done
    for dimension in reversed(range(len(windows.taps))):
        values, places = best, place
        for k in range(windows.taps[dimension]):
            value = windows.tap(values, k, dimension)
            here = jnp.asarray(k * below, jnp.float32 if exact else dtype)
            if places is not None:
                here = windows.tap(places, k, dimension) + here
            if k == 0:
                best, place = value, jnp.broadcast_to(here, value.shape)
            else:
                better = value > best if largest else value < best  # strictly: the first of equals stays
                best = jnp.maximum(best, value) if largest else jnp.minimum(best, value)
                place = jnp.where(better, here, place)
        below *= windows.taps[dimension]
    if exact:
        # √(p² + p + ¼) = p + ½, whose whole part is p. A root is what the compiler holds for too dear to compute twice; without
        # it, it would find the places again for every place that gathers.
        place = jnp.sqrt(place * (place + 1) + 0.25).astype(dtype)
    return best, place


def gather(value: jax.Array, windows: Windows, place: jax.Array | None = None) -> jax.Array:
    """dX = Σ over the windows that meet a place of their value; with ``place`` only where the window's tap is this place.

    value, place [n, *windows, features] -> [n, *spatial, features].
    """
    few = place is None and math.prod(windows.taps) <= 4 and value.shape[-1] >= 16
    if few and isinstance(windows, Sliding) and windows.is_apart:
        return windows.interleaved(value)
    total: Any = None
    for look, wanted, inside in windows.views():
        part = look(value)
        if place is not None:
            part = jnp.where(look(place) == jnp.asarray(wanted, place.dtype), part, 0)
        part = jnp.broadcast_to(part, jnp.broadcast_shapes(part.shape, inside.shape))
        if not inside.all():
            part = jnp.where(inside, part, 0)
        total = part if total is None else total + part
    return windows.finish(total)


def window_sums(x: jax.Array, windows: Windows) -> jax.Array:
    """x [n, *spatial, features] -> the sum of each window, [n, *windows, features]; dimension by dimension."""
    total = windows.padded(x, 0.0)
    for dimension, taps in enumerate(windows.taps):
        parts = [windows.tap(total, k, dimension) for k in range(taps)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
    return total


def window_counts(windows: Windows, with_padding: bool, dtype: Any) -> np.ndarray:
    """How many elements each window has, [1, *windows, 1]; 1 where there are none."""
    total = np.ones((), np.float64)
    for count in windows.counts(with_padding):
        total = total[..., None] * np.maximum(count, 1)
    return total[None, ..., None].astype(dtype)


def unbatched(y: jax.Array, inputs: Any) -> jax.Array:
    """[n, *windows, features] with the batch dimensions of the inputs again."""
    spatial = y.ndim - 2
    return y.reshape(*inputs.shape[: len(inputs.shape) - spatial - 1], *y.shape[1:])


def images(inputs: jax.Array, windows: Windows) -> jax.Array:
    """[..., *spatial, features] -> [n, *spatial, features]."""
    return batched(inputs, len(windows.out) + 1)


def require_sizes(who: str, option: str, sizes: Any, such_as: str) -> None:
    """Refuses an option that does not name a size for each spatial dimension, such as a single number."""
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise ValueError(f"{who}: {option} must name a size for each spatial dimension, such as {such_as}; got {sizes!r}.")


def _dimensions(who: str, option: str, sizes: Any, such_as: str, shape: Sequence[int]) -> int:
    """How many spatial dimensions an option has a size for; refuses what has none, and images with fewer."""
    require_sizes(who, option, sizes, such_as)
    if len(shape) < len(sizes) + 1:
        given = f"{len(sizes)} spatial dimensions, got inputs {tuple(shape)}"
        raise ValueError(f"{who}: inputs must be [..., *spatial, features] with {given}.")
    return len(sizes)


def sliding(who: str, shape: Sequence[int], window_shape: Any, strides: Any, padding: Padding, window_dilation: Any) -> Sliding:
    dims = _dimensions(who, "window_shape", window_shape, "(2, 2)", shape)
    taps = per_dimension(who, "window_shape", window_shape, dims)
    steps = per_dimension(who, "strides", strides, dims)
    dilation = per_dimension(who, "window_dilation", window_dilation, dims)
    reach = tuple((w - 1) * d + 1 for w, d in zip(taps, dilation))
    spatial = shape[-1 - dims : -1]
    amount = pads(who, padding, spatial, reach, steps)
    check_fits(who, spatial, reach, amount)
    sizes = tuple(n + a + b for n, (a, b) in zip(spatial, amount))
    return Sliding(taps, steps, dilation, amount, sizes, tuple((n - r) // s + 1 for n, r, s in zip(sizes, reach, steps)))


def adaptive(who: str, shape: Sequence[int], output_size: Any) -> Windows:
    dims = _dimensions(who, "output_size", output_size, "(7, 7)", shape)
    out, spatial = per_dimension(who, "output_size", output_size, dims), tuple(shape[-1 - dims : -1])
    check_fits(who, spatial, (1,) * dims, ((0, 0),) * dims)
    if all(n % o == 0 for n, o in zip(spatial, out)):  # equal windows, side by side
        taps = tuple(n // o for n, o in zip(spatial, out))
        return Sliding(taps, taps, (1,) * dims, ((0, 0),) * dims, spatial, out)
    return Adaptive(spatial, out)
