"""Blocks of logits z = x · kernel + bias, their sums over the vocabulary, and the gradient that each block sends back."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fbackprop.ops._arithmetic import operand_type


class Head(NamedTuple):
    """The projection to the vocabulary and its options; ``kernel`` as [features, classes], or the other way round."""

    kernel: jax.Array
    bias: jax.Array | None
    transposed: bool
    soft_cap: float | None

    @property
    def features(self) -> int:
        return self.kernel.shape[1 if self.transposed else 0]

    @property
    def classes(self) -> int:
        return self.kernel.shape[0 if self.transposed else 1]

    def block(self, start: Any, length: int) -> "Head":
        """The columns from ``start`` on."""
        if length == self.classes:
            return self
        kernel = jax.lax.dynamic_slice_in_dim(self.kernel, start, length, 0 if self.transposed else 1)
        bias = None if self.bias is None else jax.lax.dynamic_slice_in_dim(self.bias, start, length)
        return self._replace(kernel=kernel, bias=bias)


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """The product that sums over one axis of a and one of b: operands of ``dtype``, the sum in float32 or wider."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    sums = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), numbers, preferred_element_type=sums)


def logits(x: jax.Array, head: Head) -> jax.Array:
    """z [tokens, classes] of x [tokens, features], in float32 or wider."""
    z = product(x, head.kernel, (1, 1 if head.transposed else 0), operand_type(x, head.kernel))
    z = z if head.bias is None else z + head.bias.astype(z.dtype)[None]
    return z if head.soft_cap is None else head.soft_cap * jnp.tanh(z / head.soft_cap)


class Columns(NamedTuple):
    """Which classes a block of logits holds. The last block of a vocabulary that blocks do not divide begins early enough to
    be full; ``fresh`` [1, classes] tells what no block before it held, None where all is."""

    start: Any
    length: int
    fresh: jax.Array | None

    @classmethod
    def of(cls, number: Any, length: int, classes: int) -> "Columns":
        start = jnp.minimum(number * length, classes - length)
        even = classes % length == 0
        return cls(start, length, None if even else (start + jnp.arange(length) >= number * length)[None])

    def only(self, values: jax.Array, otherwise: Any) -> jax.Array:
        return values if self.fresh is None else jnp.where(self.fresh, values, otherwise)


class Sums(NamedTuple):
    """What of a row of logits the loss is made of, over the classes seen so far; None where nobody asked."""

    top: jax.Array  # max z
    total: jax.Array  # Σ exp(z − top)
    label: jax.Array  # z of the label, 0 where it was not seen
    mean: jax.Array | None  # Σ (z / classes), for label smoothing
    moment: jax.Array | None  # Σ exp(z − top) (z − top), for the entropy

    def normalizer(self) -> "tuple[jax.Array, jax.Array]":
        """top and total; a row of nothing but −inf has the total 1, so that its probabilities are 0 and not NaN."""
        return self.top, jnp.where(self.total == 0, 1, self.total)


def sums(z: jax.Array, labels: jax.Array, columns: Columns, classes: int, smooth: bool, entropy: bool) -> Sums:
    inside = columns.only(z, -jnp.inf)
    lowest = jnp.finfo(z.dtype).min / 2  # above −inf, so that differences of tops are never NaN
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(inside, -1), lowest))
    e = jnp.exp(inside - top[:, None])
    position = labels - columns.start
    here = (position >= 0) & (position < columns.length)
    position = jnp.clip(position, 0, columns.length - 1)
    if columns.fresh is not None:
        here &= columns.fresh[0, position]
    picked = jnp.take_along_axis(z, position[:, None], axis=-1)[:, 0]
    return Sums(
        top,
        jnp.sum(e, -1),
        jnp.where(here, picked, 0),
        jnp.sum(columns.only(z, 0) * (1 / classes), -1) if smooth else None,
        jnp.sum(jnp.where(e > 0, e * jnp.where(e > 0, inside - top[:, None], 0), 0), -1) if entropy else None,
    )


def merged(a: Sums, b: Sums) -> Sums:
    """The sums over the classes of both."""
    top = jnp.maximum(a.top, b.top)
    fa, fb = jnp.exp(a.top - top), jnp.exp(b.top - top)
    moment = None
    if a.moment is not None and b.moment is not None:
        moment = (a.moment + a.total * (a.top - top)) * fa + (b.moment + b.total * (b.top - top)) * fb
    mean = None if a.mean is None or b.mean is None else a.mean + b.mean
    return Sums(top, a.total * fa + b.total * fb, a.label + b.label, mean, moment)


def no_sums(rows: int, dtype: DTypeLike, smooth: bool, entropy: bool) -> Sums:
    zero = jnp.zeros(rows, dtype)
    top = jnp.full(rows, jnp.finfo(dtype).min / 2, dtype)
    return Sums(top, zero, zero, zero if smooth else None, zero if entropy else None)


class Factors(NamedTuple):
    """What a row of logits sends back: dz = p (a − h (log p + H)) − b [class is the label] − c, each [tokens]."""

    a: jax.Array
    b: jax.Array
    c: jax.Array | None
    h: jax.Array | None
    entropy: jax.Array | None  # H


def dlogits(
    z: jax.Array, normalizer: tuple[jax.Array, jax.Array], labels: jax.Array, factors: Factors, columns: Columns, cap: Any
) -> jax.Array:
    """The cotangent of x · kernel + bias, [tokens, columns]; z is after the soft cap."""
    top, total, a, b = (v[:, None] for v in (*normalizer, factors.a, factors.b))
    e = jnp.exp(z - top)
    if factors.h is None or factors.entropy is None:
        d = e * (a / total)
    else:
        p = e / total
        log_p = jnp.where(e > 0, z - top, 0) - jnp.log(total)
        d = p * (a - factors.h[:, None] * (log_p + factors.entropy[:, None]))
    here = labels[:, None] == columns.start + jnp.arange(columns.length)[None]
    d = jnp.where(here, d - b, d)
    d = d if factors.c is None else d - factors.c[:, None]
    d = d if cap is None else d * (1 - jnp.square(z / cap))
    return columns.only(d, 0)


def sent_back(x: jax.Array, head: Head, d: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """dx, dkernel and dbias of the cotangent of a block of logits, in float32 or wider."""
    dtype = operand_type(x, head.kernel)
    dx = product(d, head.kernel, (1, 0 if head.transposed else 1), dtype)
    dkernel = product(d, x, (0, 0), dtype) if head.transposed else product(x, d, (0, 0), dtype)
    return dx, dkernel, None if head.bias is None else jnp.sum(d, 0)


# ------------------------------------------------------------------------------------------------------ sizes of blocks

_LOGITS = 1 << 24  # the elements of a block of logits, 64 MiB in float32
_ACCUMULATOR = 1 << 26  # the most elements of a kernel whose gradient is added up in float32 as a whole, 256 MiB


def accumulates(kernel: Any) -> bool:
    return math.prod(kernel.shape) <= _ACCUMULATOR


def token_blocks(tokens: int, features: int, dtype: DTypeLike) -> tuple[int, int]:
    """How many blocks of how many tokens. Every block adds to all of the kernel's gradient, [features, classes]; so a block of
    logits, [tokens, classes], is made about as large as that. A number of blocks that divides the tokens is taken where
    there is one near."""
    length = max(128, features if jnp.finfo(dtype).bits < 32 else 4 * features // 3)
    about = max(1, round(tokens / length))
    most = (8 * about // 5) if jnp.finfo(dtype).bits < 32 else 4 * about // 3
    number = next((n for n in range(about, most) if tokens % n == 0), about)
    return number, max(1, -(-tokens // number))


def class_blocks(tokens: int, classes: int) -> tuple[int, int]:
    """How many blocks of how many classes; a multiple of 128, which suits the units that multiply matrices."""
    length = max(_LOGITS // max(tokens, 1) // 128, 2) * 128
    if length >= classes:
        return 1, classes
    return -(-classes // length), length


def by_blocks(arrays: Sequence[Any], number: int, length: int) -> list[Any]:
    """Arrays [tokens, ...] as [number, length, ...]: every block takes each number-th token, so that where tokens are spread
    over devices each device has its part of every block. Zeros fill the rest."""

    def one(array: jax.Array) -> jax.Array:
        spare = number * length - array.shape[0]
        array = jnp.pad(array, [(0, spare)] + [(0, 0)] * (array.ndim - 1)) if spare else array
        return array.reshape(length, number, *array.shape[1:]).swapaxes(0, 1)

    return [None if a is None else one(a) for a in arrays]


def from_blocks(array: jax.Array, tokens: int) -> jax.Array:
    array = array.swapaxes(0, 1)
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])[:tokens]
