"""The functions of the gated ops, each with its slope: (φ(z), φ'(z)). Nothing here is an op."""

import math

import jax
import jax.numpy as jnp


def sigmoid_and_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """σ(z) and σ (1 − σ), which is e / (1 + e)² with e = exp(−|z|): so its tail to the right is kept."""
    e = jnp.exp(-jnp.abs(z))
    return jax.lax.logistic(z), e / jnp.square(1 + e)


def silu_and_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    s = jax.nn.sigmoid(z)
    return z * s, s + z * s * (1 - s)


def gelu_and_slope(z: jax.Array, approximate: bool) -> tuple[jax.Array, jax.Array]:
    # Beyond |z| = 40 the share is 0 or 1 to the last bit of float64, and z³ must not overflow into inf · 0.
    c = jnp.clip(z, -40, 40)
    if approximate:
        t = jnp.tanh(math.sqrt(2 / math.pi) * (c + 0.044715 * c**3))
        share = 0.5 * (1 + t)
        slope = 0.5 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * c**2)
    else:
        share = 0.5 * jax.lax.erfc(-c * math.sqrt(0.5))
        slope = jnp.exp(-0.5 * c * c) / math.sqrt(2 * math.pi)
    return z * share, share + c * slope


def relu_and_slope(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(z > 0, z, 0), (z > 0).astype(z.dtype)
