"""rotary_embedding: positions as rotations. Pairs of features of a head turn by an angle that grows with the position.

    (y₁, y₂) = (x₁ cos θ − x₂ sin θ, x₂ cos θ + x₁ sin θ)          θ = position · frequency of the pair

    (dx₁, dx₂) = (dy₁ cos θ + dy₂ sin θ, dy₂ cos θ − dy₁ sin θ)

A rotation's inverse is its transpose: the backward turns dy back, by −θ. Kept are the positions alone, and nothing where they
count from 0; the sines are computed again. (The gradient is JAX's own to the letter; only the tables of sines are not kept.)

There are batch × heads features to each sine. A compiler for CPUs that computes it where it is used computes it that often:
there the tables are made in a loop, which is not merged with what follows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide
from fbackprop.rules import rule
from fbackprop.samples import labels, normal, sample

__all__ = ["rotary_embedding"]


class _Saved(NamedTuple):
    positions: jax.Array | None


_PARTS = 8  # turns of the loop that makes the tables


def _tables(positions: jax.Array, rates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines of positions [...] · rates [H/2], [..., H/2]."""
    angles = positions[..., None].astype(rates.dtype) * rates.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def _tables_in_memory(positions: jax.Array, rates: jax.Array) -> tuple[jax.Array, jax.Array]:
    def in_turns(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = -(-positions.shape[-1] // _PARTS)
        made = jax.lax.map(lambda part: _tables(part, rates), jnp.moveaxis(positions, -1, 0), batch_size=size)
        return jax.tree.map(lambda table: jnp.moveaxis(table, 0, -2), made)

    if positions.shape[-1] < _PARTS or jax.typeof(positions).sharding.mesh.explicit_axes:
        return _tables(positions, rates)
    return jax.lax.platform_dependent(positions, cpu=in_turns, default=lambda positions: _tables(positions, rates))


def _turned(
    x: Any,
    positions: Any,
    base: float,
    frequencies: Sequence[float] | None,
    interleaved: bool,
    sign: float = 1,
    tables: Any = _tables_in_memory,
) -> jax.Array:
    dtype, half = wide(x).dtype, jnp.shape(x)[-1] // 2
    rates = base ** -(np.arange(half) / half) if frequencies is None else np.asarray(frequencies, np.float64)
    positions = jnp.arange(jnp.shape(x)[-3]) if positions is None else jnp.asarray(positions)
    lead = jnp.ndim(x) - 2
    cos, sin = tables(positions, jnp.asarray(rates, dtype))
    shape = (1,) * (lead - positions.ndim) + (*positions.shape, 1, half)  # [..., T, 1, H/2]
    cos, sin = cos.reshape(shape), sign * sin.reshape(shape)
    x_ = wide(x)
    one, two = (x_[..., ::2], x_[..., 1::2]) if interleaved else (x_[..., :half], x_[..., half:])
    parts = one * cos - two * sin, two * cos + one * sin
    if interleaved:
        return jnp.stack(parts, -1).reshape(x_.shape).astype(jnp.result_type(x))
    return jnp.concatenate(parts, -1).astype(jnp.result_type(x))


def _forward(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    base: float = 10_000.0,
    frequencies: tuple[float, ...] | None = None,
    interleaved: bool = False,
) -> tuple[jax.Array, _Saved]:
    y = _turned(x, positions, base, frequencies, interleaved)
    return y, _Saved(None if positions is None else jnp.asarray(positions))


def _backward(saved: _Saved, dy: jax.Array, *, base: float, frequencies: Any, interleaved: bool) -> tuple[Any, ...]:
    return _turned(wide(dy), saved.positions, base, frequencies, interleaved, sign=-1), None


@rule(
    forward=_forward,
    backward=_backward,
    static=["base", "frequencies", "interleaved"],
    samples=[
        sample(normal(2, 5, 3, 4), labels(2, 5, classes=50)),
        sample(normal(3, 1, 6), frequencies=(1.0, 0.3, 0.01), interleaved=True),
    ],
    workloads=[sample(normal(8, 1024, 8, 64), dtype=d) for d in ("float32", "bfloat16")],
    keeps="positions, where they are given",
    minimum=lambda positions: nbytes(positions),
    recomputes="sines and cosines",
)
def rotary_embedding(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    base: float = 10_000.0,
    frequencies: tuple[float, ...] | None = None,
    interleaved: bool = False,
) -> jax.Array:
    """Turns the features of each head by angles that grow with the position: the product of two such depends on distance.

    x [..., T, N, H] (queries or keys, H even), positions [..., T] integer -> the same shape and dtype. Also called RoPE.

    Args:
      positions: of the elements along T; 0, 1, 2, … by default.
      base: pair i of H/2 turns by base^(−2 i/H) a position. frequencies: these rates instead, H/2 numbers (Llama 3 has others).
      interleaved: pair neighbours, 2 i with 2 i + 1; by default feature i is paired with i + H/2, as in Llama's weights.
    Raises:
      ValueError: where a shape does not fit. TypeError: where positions are not integers, or x is not floating-point.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    require_float("rotary_embedding", x=x)
    if jnp.ndim(x) < 3 or jnp.shape(x)[-1] % 2:
        raise ValueError(f"rotary_embedding: expected x [..., T, N, H] with an even H, got {shapes(x=x)}.")
    if not base > 0:
        raise ValueError(f"rotary_embedding: base is {base!r}, expected a number above 0.")
    if frequencies is not None and len(frequencies) != jnp.shape(x)[-1] // 2:
        raise ValueError(f"rotary_embedding: {len(frequencies)} frequencies, expected H/2 of them ({shapes(x=x)}).")
    if positions is not None:
        if not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
            raise TypeError(f"rotary_embedding: positions must be integers, got {jnp.result_type(positions)}.")
        lead, given = jnp.shape(x)[:-2], jnp.shape(positions)
        if not given or len(given) > len(lead) or any(a not in (1, b) for a, b in zip(given[::-1], lead[::-1])):
            raise ValueError(f"rotary_embedding: positions do not fit [..., T] of x ({shapes(positions=positions, x=x)}).")
    return _turned(x, positions, base, frequencies, interleaved, tables=_tables)
