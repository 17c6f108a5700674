"""Activation functions made of straight pieces: y = f(x), whose slope takes one of two values, so one bit tells dx from dy.

    op              y                                            slope                            bit
    relu            max(x, 0)                                    1 where the bit is set, else 0   x > 0
    relu6           min(max(x, 0), 6)                            1, else 0                        0 < x < 6
    hard_tanh       min(max(x, −1), 1)                           1, else 0                        −1 ≤ x ≤ 1
    hard_sigmoid    relu6(x + 3) / 6                             1/6, else 0                      −3 < x < 3
    leaky_relu      x where x ≥ 0, else a x                      1, else a                        x ≥ 0
    sparse_sigmoid  min(max(x + 1, 0), 2) / 2                    ½, else 0                        −1 < x < 1, half at ±1

    dx = dy · slope         leaky_relu: da = Σ dy · x where x < 0, the only reason to keep x

Kinks, where the slope jumps, equal JAX's choice: relu'(0) = 0, relu6'(0) = relu6'(6) = 0, hard_tanh'(±1) = 1,
leaky_relu'(0) = 1, sparse_sigmoid'(±1) = ¼, which the two bits below have a third value for.

Kept: two bits an element. On a CPU a bit becomes an integer of two bits, and four of those are one byte by a change of type
alone. The compiler undoes a change of type that is followed by its reverse: forward and backward in one program are the
plain choice between dy and 0, with no bits anywhere. One bit an element has to be put in place by shifts, which no compiler
undoes; in one program that costs a second pass over the array, and more time than it saves. Elsewhere the same bytes are
made by shifts: the compiler for TPU does not take integers of two bits through this change of type.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import float_type, nbytes, sum_to, wide
from fbackprop.rules import rule
from fbackprop.samples import constant, normal, sample

__all__ = ["hard_sigmoid", "hard_tanh", "leaky_relu", "relu", "relu6", "sparse_sigmoid"]


def _shifts(ndim: int) -> np.ndarray:
    """Of the four elements in a byte, along the last of ``ndim`` axes."""
    return np.arange(0, 8, 2, dtype=np.uint8).reshape((1,) * (ndim - 1) + (4,))


class _Saved(NamedTuple):
    bits: jax.Array  # uint8 [..., ⌈n / 4⌉], two bits for each of the n elements along the last axis


def _packed(mask: jax.Array) -> jax.Array:
    """Booleans, or numbers from 0 to 3, [..., n] as bytes [..., ⌈n / 4⌉]."""
    mask = jnp.atleast_1d(mask)
    missing = -mask.shape[-1] % 4
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
    fours = padded.reshape(*mask.shape[:-1], (mask.shape[-1] + missing) // 4, 4)

    def by_type(fours: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(fours.astype(jnp.uint2), jnp.uint8)

    def by_shifts(fours: jax.Array) -> jax.Array:
        return jnp.sum(fours.astype(jnp.uint8) << _shifts(fours.ndim), -1, dtype=jnp.uint8)

    return jax.lax.platform_dependent(fours, cpu=by_type, default=by_shifts)


def _unpacked(bits: jax.Array, shape: tuple[int, ...], dtype: Any = bool) -> jax.Array:
    """The booleans of this shape, or in another dtype the numbers from 0 to 3."""

    def by_type(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.uint2).astype(dtype)

    def by_shifts(bits: jax.Array) -> jax.Array:
        return ((bits[..., None] >> _shifts(bits.ndim + 1)) & 3).astype(dtype)

    fours = jax.lax.platform_dependent(bits, cpu=by_type, default=by_shifts)
    mask = fours.reshape(*bits.shape[:-1], bits.shape[-1] * 4)
    return mask[..., : shape[-1]] if shape else mask[0]


def _bytes(x: Any) -> int:
    """Two bits an element."""
    return math.prod(x.shape[:-1]) * math.ceil((x.shape[-1] if x.shape else 1) / 4)


def _where_open(saved: _Saved, dy: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(_unpacked(saved.bits, dy.shape), dy, jnp.zeros((), dy.dtype)),)


_SAMPLES = [sample(normal(5, 7)), sample(constant(0.0, 3, 4))]
_WORKLOADS = [sample(normal(4096, 3072), dtype=d) for d in ("float32", "bfloat16")]
_KEEPS = "two bits an element"


def _relu_forward(x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    return jnp.where(x <= 0, jnp.zeros_like(x), x), _Saved(_packed(x > 0))


@rule(
    forward=_relu_forward,
    backward=_where_open,
    samples=[*_SAMPLES, sample(normal())],
    workloads=_WORKLOADS,
    keeps=_KEEPS,
    minimum=_bytes,
)
def relu(x: ArrayLike) -> jax.Array:
    """The positive part: y = max(x, 0).

    x [...] -> y [...], of the same dtype. relu'(0) = 0. Source: Nair & Hinton 2010.
    """
    x = jnp.asarray(x)
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _relu6_forward(x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    return jnp.minimum(jnp.maximum(x, 0), 6).astype(float_type(x)), _Saved(_packed((x > 0) & (x < 6)))


@rule(
    forward=_relu6_forward,
    backward=_where_open,
    samples=[sample(normal(5, 7, mean=3.0, scale=5.0)), sample(constant(6.0, 3))],
    workloads=_WORKLOADS,
    keeps=_KEEPS,
    minimum=_bytes,
)
def relu6(x: ArrayLike) -> jax.Array:
    """The positive part up to 6: y = min(max(x, 0), 6).

    x [...] -> y [...], of the same dtype (integers give floats). relu6'(0) = relu6'(6) = 0.
    Source: Krizhevsky 2010, Convolutional deep belief networks on CIFAR-10.
    """
    x = jnp.asarray(x).astype(float_type(x))
    return jnp.where(x <= 0, 0, jnp.where(x >= 6, 6, x))


def _hard_tanh_forward(x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    return jnp.minimum(jnp.maximum(x, -1), 1), _Saved(_packed((x >= -1) & (x <= 1)))


@rule(
    forward=_hard_tanh_forward,
    backward=_where_open,
    samples=[sample(normal(5, 7, scale=1.5)), sample(constant(1.0, 3))],
    workloads=_WORKLOADS,
    keeps=_KEEPS,
    minimum=_bytes,
)
def hard_tanh(x: ArrayLike) -> jax.Array:
    """The identity between −1 and 1, and constant beyond: y = min(max(x, −1), 1).

    x [...] -> y [...], of the same dtype. hard_tanh'(±1) = 1. Source: Collobert 2004.
    """
    x = jnp.asarray(x)
    return jnp.where(x < -1, -jnp.ones_like(x), jnp.where(x > 1, jnp.ones_like(x), x))


def _hard_sigmoid_forward(x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    y = jnp.minimum(jnp.maximum(wide(x) + 3, 0), 6) / 6
    return y.astype(float_type(x)), _Saved(_packed((x > -3) & (x < 3)))


def _hard_sigmoid_backward(saved: _Saved, dy: jax.Array) -> tuple[jax.Array]:
    return (_where_open(saved, dy)[0].astype(wide(dy).dtype) / 6,)


@rule(
    forward=_hard_sigmoid_forward,
    backward=_hard_sigmoid_backward,
    samples=[sample(normal(5, 7, scale=4.0)), sample(constant(3.0, 3))],
    workloads=_WORKLOADS,
    keeps=_KEEPS,
    minimum=_bytes,
)
def hard_sigmoid(x: ArrayLike) -> jax.Array:
    """A sigmoid of straight pieces: y = (x + 3) / 6 between −3 and 3, then 0 and 1.

    x [...] -> y [...], of the same dtype (integers give floats). hard_sigmoid'(±3) = 0.
    Source: Howard et al. 2019, arXiv:1905.02244.
    """
    x_ = wide(x)
    return jnp.where(x_ <= -3, 0, jnp.where(x_ >= 3, 1, (x_ + 3) / 6)).astype(float_type(x))


def _sparse_sigmoid_forward(x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)
    quarters = (x >= -1).astype(jnp.uint8) + (x > -1) - (x >= 1) - (x > 1)  # of the slope: 0, 1 or 2
    return (0.5 * jnp.clip(wide(x) + 1, 0, 2)).astype(float_type(x)), _Saved(_packed(quarters.astype(jnp.uint8)))


def _sparse_sigmoid_backward(saved: _Saved, dy: jax.Array) -> tuple[jax.Array]:
    g = wide(dy)
    quarters = _unpacked(saved.bits, dy.shape, g.dtype)
    return (jnp.where(quarters > 0, g, 0) * (quarters / 4),)


@rule(
    forward=_sparse_sigmoid_forward,
    backward=_sparse_sigmoid_backward,
    samples=[sample(normal(5, 7, scale=1.5)), sample(constant(1.0, 3))],
    workloads=_WORKLOADS,
    keeps=_KEEPS,
    minimum=_bytes,
)
def sparse_sigmoid(x: ArrayLike) -> jax.Array:
    """A sigmoid of straight pieces, the slope of sparse_plus: y = (x + 1) / 2 between −1 and 1, then 0 and 1.

    x [...] -> y [...], of the same dtype (integers give floats). sparse_sigmoid'(±1) = ¼.
    Source: Martins & Astudillo 2016, arXiv:1602.02068.
    """
    return (0.5 * jnp.clip(wide(x) + 1, 0, 2)).astype(float_type(x))


class _LeakySaved(NamedTuple):
    open: jax.Array  # the bits of x ≥ 0: all that dx needs
    negative_slope: jax.Array
    x: jax.Array  # for the cotangent of the slope


def _leaky_forward(x: ArrayLike, negative_slope: ArrayLike = 1e-2) -> tuple[jax.Array, _LeakySaved]:
    x = jnp.asarray(x)
    y = jnp.where(x >= 0, x, negative_slope * x)
    bits = _packed(jnp.broadcast_to(x >= 0, y.shape))
    return y, _LeakySaved(bits, jnp.asarray(negative_slope), x)


def _leaky_backward(saved: _LeakySaved, dy: jax.Array) -> tuple[Any, ...]:
    dx = jnp.where(_unpacked(saved.open, dy.shape), dy, saved.negative_slope * dy)
    dslope = jnp.where(saved.x >= 0, 0, wide(saved.x) * wide(dy))
    pairs = ((dx, saved.x), (dslope, saved.negative_slope))
    return tuple(sum_to(d, a.shape) if jnp.issubdtype(a.dtype, jnp.inexact) else None for d, a in pairs)


@rule(
    forward=_leaky_forward,
    backward=_leaky_backward,
    samples=[sample(normal(5, 7), normal(1, 7)), sample(normal(5, 7))],
    workloads=_WORKLOADS,
    keeps=f"{_KEEPS}, negative_slope; x for its cotangent",
    minimum=lambda x, negative_slope: (
        _bytes(x) + 4 if isinstance(negative_slope, float) else _bytes(x) + nbytes(x, negative_slope)
    ),
)
def leaky_relu(x: ArrayLike, negative_slope: ArrayLike = 1e-2) -> jax.Array:
    """relu that lets a share of the negative part through: y = x where x ≥ 0, else negative_slope · x.

    x [...], negative_slope [] or of a shape that broadcasts with x -> y [...]. leaky_relu'(0) = 1.
    """
    x = jnp.asarray(x)
    return jnp.where(x >= 0, x, negative_slope * x)
