"""A rule of one's own: root-mean-square normalization, derived, written, checked; and the checker at work on a mistake.

    python examples/own_rule.py

    y = γ x r,   r = 1 / √(mean(x²) + ε)

With g = γ dy: dx = r (g − x r² mean(g x)), because ∂r/∂x = −r³ x / n; and dγ = Σ dy x r over the rows.
"""

import dataclasses
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fbackprop as fb
from fbackprop.rules import rule
from fbackprop.samples import normal, sample


class Saved(NamedTuple):
    x: jax.Array
    rms_reciprocal: jax.Array  # [..., 1]
    scale: jax.Array


def forward(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> tuple[jax.Array, Saved]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    r = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    return (scale * wide * r).astype(x.dtype), Saved(x, r, scale)


def backward(saved: Saved, dy: jax.Array) -> tuple[Any, ...]:
    x, r, scale = saved
    g = scale * dy
    dx = r * (g - x * r * r * jnp.mean(g * x, -1, keepdims=True))
    dscale = jnp.sum(dy * x * r, range(dy.ndim - 1))
    return dx, dscale


@rule(forward=forward, backward=backward, static=["epsilon"], samples=[sample(normal(5, 8), normal(8))], keeps="x, scale")
def my_rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Divides each vector by its root mean square: x [..., d], scale [d] -> [..., d]."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (scale * wide / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)


def forgetful_backward(saved: Saved, dy: jax.Array) -> tuple[Any, ...]:
    """The usual mistake: r is treated as a constant."""
    _, dscale = backward(saved, dy)
    return saved.rms_reciprocal * saved.scale * dy, dscale


def main() -> int:
    (x, scale), _ = my_rms_norm.rule.samples[0].make(seed=0)
    right = fb.check(my_rms_norm, x, scale)
    print(right)
    wrong = fb.check(dataclasses.replace(my_rms_norm.rule, backward=forgetful_backward).op, x, scale)
    print(wrong)
    return 0 if right.ok and not wrong.ok else 1


if __name__ == "__main__":
    sys.exit(main())
