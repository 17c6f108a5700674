"""Dropout: y = x · m / (1 − p) with a mask m that is 1 with probability 1 − p.

    dx = dy · m / (1 − p)

The mask is a constant, so the backward is the forward again, applied to dy. Kept is the mask alone, a byte an element. With
``save="key"`` the key alone is kept, which costs nothing, and the same bits are drawn again, which takes longer than reading
them.
The bits are of fixed width, so the mask is the same in every precision, and it is the mask that Flax draws from the key.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import require_float, wide
from fbackprop.rules import rule
from fbackprop.samples import key as random_key
from fbackprop.samples import normal, sample

__all__ = ["dropout"]


class _Saved(NamedTuple):
    mask: jax.Array | None  # None where nothing is dropped, and where it is drawn again
    key: Any


def _mask_shape(shape: tuple[int, ...], broadcast_dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in {d % len(shape) for d in broadcast_dims} else n for i, n in enumerate(shape))


def _mask(x: jax.Array, rate: float, key: Any, broadcast_dims: tuple[int, ...], deterministic: bool) -> jax.Array | None:
    """None where nothing is dropped."""
    if deterministic or rate == 0.0:
        return None
    return jax.random.uniform(key, _mask_shape(x.shape, broadcast_dims), jnp.float32) < jnp.float32(1.0 - rate)


def _apply(x: jax.Array, mask: jax.Array | None, rate: float) -> jax.Array:
    if mask is None:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    return jnp.where(mask, wide(x) / (1.0 - rate), 0.0).astype(x.dtype)


def _forward(
    x: ArrayLike,
    rate: float,
    key: Any = None,
    *,
    broadcast_dims: tuple[int, ...] = (),
    deterministic: bool = False,
    save: str = "mask",
) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    mask = _mask(x, rate, key, broadcast_dims, deterministic)
    again = save == "key" and mask is not None
    return _apply(x, mask, rate), _Saved(None if again else mask, key if again else None)


def _backward(saved: _Saved, dy: jax.Array, *, rate: float, broadcast_dims: tuple[int, ...]) -> tuple[Any, ...]:
    mask = saved.mask if saved.key is None else _mask(dy, rate, saved.key, broadcast_dims, False)
    return _apply(dy, mask, rate), None


def _minimum(x: Any, rate: float, key: Any, broadcast_dims: tuple[int, ...], deterministic: bool, save: str) -> int:
    if deterministic or rate == 0.0:
        return 0
    if save == "key":
        return math.prod(key.shape) * key.dtype.itemsize
    return math.prod(_mask_shape(x.shape, broadcast_dims))


@rule(
    forward=_forward,
    backward=_backward,
    static=["rate", "broadcast_dims", "deterministic", "save"],
    samples=[
        sample(normal(6, 8), 0.3, random_key(1)),
        sample(normal(4, 3, 5), 0.5, random_key(2), broadcast_dims=(1,)),
        sample(normal(6, 8), 0.3, deterministic=True),
        sample(normal(4, 3, 5), 0.5, random_key(2), broadcast_dims=(0,), save="key"),
    ],
    workloads=[sample(normal(4096, 3072), 0.1, random_key(0), note="rate 0.1", dtype=d) for d in ("float32", "bfloat16")],
    keeps="mask (a byte an element), or the key",
    minimum=_minimum,
)
def dropout(
    x: ArrayLike,
    rate: float,
    key: Any = None,
    *,
    broadcast_dims: tuple[int, ...] = (),
    deterministic: bool = False,
    save: str = "mask",
) -> jax.Array:
    """Zeroes each element with probability ``rate`` and scales the others by 1 / (1 − rate).

    x [...], key a random key -> y [...], of the same dtype.

    Args:
      rate: in [0, 1]; a Python number, static.
      key: needed unless ``deterministic`` or ``rate`` is 0.
      broadcast_dims: dimensions along which one decision is shared.
      deterministic: pass x through (inference).
      save: what is kept for the backward. "mask": a byte an element; "key": the key alone, from which the backward draws the
        same mask again.
    Raises:
      ValueError: where rate is outside of [0, 1], the key is missing, or save is neither.
    Source: Srivastava et al. 2014.
    """
    require_float("dropout", x=x)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout: rate must lie in [0, 1], got {rate}.")
    if key is None and not deterministic and rate > 0.0:
        raise ValueError("dropout: a random key is needed; pass key=jax.random.key(…), or deterministic=True for inference.")
    if save not in ("mask", "key"):
        raise ValueError(f'dropout: save must be "mask" or "key", got {save!r}.')
    x = jnp.asarray(x)
    if bad := [d for d in broadcast_dims if not -x.ndim <= d < x.ndim]:
        raise ValueError(f"dropout: broadcast_dims names dimension {bad[0]}, x has {x.ndim}.")
    return _apply(x, _mask(x, rate, key, broadcast_dims, deterministic), rate)
