"""Tells of a mask or an additive bias made of constants whether it is a band: causal, a window of keys around each query, or
nothing at all. Every element is looked at, in a compiled program that keeps none of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.accelerating.axes import Axes
from fbackprop.accelerating.evaluation import Unknown
from fbackprop.accelerating.program import Region, Value, region
from fbackprop.accelerating.sites import structure
from fbackprop.accelerating.walking import constant

__all__ = ["Band", "band_of"]

Band = dict[str, Any]
"""Options of ``fb.dot_product_attention`` that stand for a mask."""

MOST = 2**30  # queries times keys that are looked at
LOW = -1e4  # what is added to logits of keys that are hidden, at most

_bands: dict[Any, Band | None] = {}


def band_of(value: Value, queries: int | None, keys: int | None, told: int) -> Band | None:
    """The options for a mask or bias along these two of its axes, where each query sees some key; None where it is no band.

    Args:
      told: what a mask says of a key that is seen; the sign of a bias, which is 0 there and very low for all others.
    """
    if queries is None or keys is None or not constant(value) or value.shape[queries] * value.shape[keys] > MOST:
        return None
    found = region([], [value])
    if found is None:
        return None
    key = (structure(found), queries, keys, told)
    if key not in _bands:
        if len(_bands) > 256:
            _bands.clear()
        try:
            _bands[key] = _band(found, queries, keys, told)
        except Unknown:
            _bands[key] = None
    return _bands[key]


def _band(found: Region, queries: int, keys: int, told: int) -> Band | None:
    (value,) = found.outputs
    t, s = (value.shape[a] for a in (queries, keys))
    # Along an axis that no position and no number of the program tells apart, the first element is as good as all.
    lengths = Axes(found, short=(1,)).shape(value) if found.equations else value.shape
    alike = tuple(slice(None if a in (queries, keys) else n) for a, n in enumerate(lengths))

    def rows(of: slice) -> tuple[jax.Array, jax.Array]:
        """Of queries and all keys whether a key is seen, and whether it is hidden."""
        array = jnp.moveaxis(_value(found)[alike], (queries, keys), (-2, -1)).reshape(-1, t, s)[:, of]
        if array.dtype == jnp.bool_:
            return array == bool(told), array != bool(told)
        return array == 0, told * array <= LOW

    first, last = _run(lambda: jnp.stack([rows(slice(n, n + 1))[0][0, 0] for n in (0, t - 1)]))
    if not first.any() or not last.any():
        return None
    right = None if first.all() else int(np.flatnonzero(first)[-1])
    left = None if last[0] else t - 1 - int(np.flatnonzero(last)[0])
    if t > s + (s if left is None else left):  # the last queries would see nothing
        return None

    def same() -> jax.Array:
        i, j = jnp.arange(t)[:, None], jnp.arange(s)[None]
        seen, hidden = rows(slice(None))
        band = (True if left is None else j >= i - left) & (True if right is None else j <= i + right)
        return jnp.where(jnp.broadcast_to(band, (t, s))[None], seen, hidden).all()

    if not _run(same):
        return None
    if left is None and right in (None, 0):
        return {} if right is None else {"is_causal": True}
    return {"local_window_size": (t if left is None else left, s if right is None else right)}


def _run(fn: Callable[[], jax.Array]) -> np.ndarray:
    """What a function gives, compiled as a whole, also while something else is traced."""
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(fn).lower().compile()())


def _value(found: Region) -> Any:
    """The constant itself, from its equations."""
    known: dict[int, Any] = {}
    for equation in found.equations:
        again, given = equation.again, [known.get(id(v), v.constant) for v in equation.inputs]
        out = again.primitive.bind(*given, **again.primitive.get_bind_params(again.params))
        known.update(zip(map(id, equation.outputs), out if again.primitive.multiple_results else [out]))
    (value,) = found.outputs
    return jnp.asarray(known.get(id(value), value.constant))
