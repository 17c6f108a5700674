"""Dropout: y = x · m / (1 − p) with a mask m that is 1 with probability 1 − p.

    dx = dy · m / (1 − p)

The mask is a constant, so the backward is the forward again, applied to dy. Kept is the mask alone, a byte an element.
(The key alone would do and cost nothing, but the bits would be drawn again, which takes longer than reading them.)
The bits are of fixed width, so the mask is the same in every precision, and it is the mask that Flax draws from the key.
"""

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
    mask: jax.Array | None


def _mask(x: jax.Array, rate: float, key: Any, broadcast_dims: tuple[int, ...], deterministic: bool) -> jax.Array | None:
    """None where nothing is dropped."""
    if deterministic or rate == 0.0:
        return None
    shape = tuple(1 if i in {d % x.ndim for d in broadcast_dims} else n for i, n in enumerate(x.shape))
    return jax.random.uniform(key, shape, jnp.float32) < jnp.float32(1.0 - rate)


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
) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    mask = _mask(x, rate, key, broadcast_dims, deterministic)
    return _apply(x, mask, rate), _Saved(mask)


def _backward(saved: _Saved, dy: jax.Array, *, rate: float) -> tuple[Any, ...]:
    return _apply(dy, saved.mask, rate), None


@rule(
    forward=_forward,
    backward=_backward,
    static=["rate", "broadcast_dims", "deterministic"],
    samples=[
        sample(normal(6, 8), 0.3, random_key(1)),
        sample(normal(4, 3, 5), 0.5, random_key(2), broadcast_dims=(1,)),
        sample(normal(6, 8), 0.3, deterministic=True),
    ],
    workloads=[sample(normal(4096, 3072), 0.1, random_key(0), note="rate 0.1", dtype=d) for d in ("float32", "bfloat16")],
    keeps="mask (a byte an element)",
)
def dropout(
    x: ArrayLike,
    rate: float,
    key: Any = None,
    *,
    broadcast_dims: tuple[int, ...] = (),
    deterministic: bool = False,
) -> jax.Array:
    """Zeroes each element with probability ``rate`` and scales the others by 1 / (1 − rate).

    x [...], key a random key -> y [...], of the same dtype.

    Args:
      rate: in [0, 1]; a Python number, static.
      key: needed unless ``deterministic`` or ``rate`` is 0.
      broadcast_dims: dimensions along which one decision is shared.
      deterministic: pass x through (inference).
    Raises:
      ValueError: where rate is outside of [0, 1] or the key is missing.
    Source: Srivastava et al. 2014.
    """
    require_float("dropout", x=x)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout: rate must lie in [0, 1], got {rate}.")
    if key is None and not deterministic and rate > 0.0:
        raise ValueError("dropout: a random key is needed; pass key=jax.random.key(…), or deterministic=True for inference.")
    x = jnp.asarray(x)
    if bad := [d for d in broadcast_dims if not -x.ndim <= d < x.ndim]:
        raise ValueError(f"dropout: broadcast_dims names dimension {bad[0]}, x has {x.ndim}.")
    return _apply(x, _mask(x, rate, key, broadcast_dims, deterministic), rate)
