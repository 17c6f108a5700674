"""Dropout of attention's weights: which of them are kept, a function of the random key and of the place of a weight alone.

Forward and backward cut attention into blocks, in ways that differ between platforms; each block draws just its own part of the
mask, and both draw the same. So the bits are not taken from a stream, whose order would be that of the blocks. Each row (batch,
head, query) has two words a and b of 32 random bits, from JAX's generator: as many numbers as the row's maximum and sum. The
word of key j in this row is a hash of a + j · γ, keyed with b, and the weight is kept where

    word < (1 − rate) · 2³²

rounded to a whole number, so that the rate is exact to 2⁻³². The hash is the finalizer that SplitMix (Steele, Lea & Flood 2014)
puts behind the same counter, in 32 bits: nine operations a weight, in the loop that computes the exponential, where JAX's own
threefry takes more than fifty and an array to put them in. Integers alone: the mask is the same in every precision.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.ops._attention import WHO, WORDS, Inputs, Options
from fbackprop.ops._attention_blocks import Block, cut

__all__ = ["check_dropout", "dropped", "kept", "seed_of", "with_rows"]


def check_dropout(rate: Any, key: Any, broadcast: Any) -> None:
    """Refuses what does not fit, with a sentence."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{WHO}: dropout_rate must lie in [0, 1], got {rate}.")
    if not isinstance(broadcast, bool):
        raise TypeError(f"{WHO}: broadcast_dropout must be True or False, got {broadcast!r}.")
    if rate == 0:
        return
    if key is None:
        raise ValueError(
            f"{WHO}: with dropout_rate {rate} a random key is needed; pass dropout_key=jax.random.key(…), or dropout_rate=0.0 "
            "for inference."
        )
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and len(shape) == 1):
        raise TypeError(f"{WHO}: dropout_key must be one random key, as of jax.random.key(0), got {dtype} of shape {shape}.")


def seed_of(key: Any) -> jax.Array:
    """Two words, all that has to be kept of a key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def with_rows(inputs: Inputs, seed: jax.Array | None, broadcast: bool) -> Inputs:
    """The inputs with the words of their rows; of the rows of one head where all share its mask."""
    if seed is None:
        return inputs
    b, t, k, g, _ = inputs.query.shape
    b, k, g = (1, 1, 1) if broadcast else (b, k, g)
    words = jax.random.bits(jax.random.wrap_key_data(seed, impl="threefry2x32"), (2, b, k, g, t), jnp.uint32)
    return inputs._replace(rows=words.swapaxes(-1, -2))


def kept(rows: jax.Array, rate: float, start: Any, keys: int) -> jax.Array:
    """Which weights are kept: rows [2, ...] and keys from ``start`` on -> booleans [..., keys]."""
    a, b = rows[..., None]
    j = jnp.asarray(start, jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, (*(1,) * (a.ndim - 1), keys), a.ndim - 1)
    word = a + j * jnp.uint32(0x9E3779B9)
    word = (word ^ (word >> 16)) * jnp.uint32(0x21F0AAAD) ^ b
    word = (word ^ (word >> 15)) * jnp.uint32(0xD35A2D97)
    # One more shift would change low bits alone, of which the comparison sees nothing.
    return word < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))


def dropped(weights: jax.Array, inputs: Inputs, options: Options, block: Block) -> jax.Array:
    """weights ∘ M, for the weights of a block, [b, k, t, g, s]; from the cotangents of weights ∘ M, those of the weights."""
    if inputs.rows is None:
        return weights
    start, _ = block.get("s", (0, 0))
    factor = 0.0 if options.rate == 1 else 1 / (1 - options.rate)
    mask = kept(cut(inputs.rows, WORDS, block), options.rate, start, weights.shape[-1])
    return jnp.where(mask, weights * factor, 0)
