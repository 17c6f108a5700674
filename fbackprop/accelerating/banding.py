"""Tells of a mask or an additive bias made of constants whether it is a band: causal, a window of keys around each query, or
nothing at all. Every element is looked at, in a compiled program that keeps none of them."""

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

    def looked_at() -> jax.Array:
        (first, _), (last, _), (seen, hidden) = (rows(slice(*of)) for of in ((0, 1), (t - 1, t), (0, t)))
        right, left = s - 1 - jnp.argmax(first[0, 0, ::-1]), t - 1 - jnp.argmax(last[0, 0])
        i, j = jnp.arange(t)[:, None], jnp.arange(s)[None]
        band = (j >= i - left) & (j <= i + right)
        same = jnp.where(jnp.broadcast_to(band, seen.shape), seen, hidden).all() & band.any(-1).all()
        return jnp.stack([same.astype(left.dtype), left, right])

    with jax.default_device(jax.devices("cpu")[0]):  # compiled as a whole, also while something else is traced
        same, left, right = map(int, np.asarray(jax.jit(looked_at).lower().compile()()))
    if not same or left < 0:
        return None
    if left == t - 1 and right in (0, s - 1):
        return {"is_causal": True} if right == 0 else {}
    return {"local_window_size": (left, right)}


def _value(found: Region) -> Any:
    """The constant itself, from its equations."""
    known: dict[int, Any] = {}
    for equation in found.equations:
        again, given = equation.again, [known.get(id(v), v.constant) for v in equation.inputs]
        out = again.primitive.bind(*given, **again.primitive.get_bind_params(again.params))
        known.update(zip(map(id, equation.outputs), out if again.primitive.multiple_results else [out]))
    (value,) = found.outputs
    return jnp.asarray(known.get(id(value), value.constant))
