"""What recurrent ops share beside their loops: bad input in sentences, the first carry, lengths, and the definition's loop.

Nothing here is an op. A carry is a tuple of arrays [..., H] whose last is h.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, varying_like, wide, wide_type

Carry = tuple[jax.Array, ...]


class Weights(NamedTuple):
    kernel: jax.Array  # W [F, G]
    recurrent_kernel: jax.Array  # U [H, G]
    bias: jax.Array | None = None  # b [G]
    recurrent_bias: jax.Array | None = None  # added to the last columns of u


def as_weights(kernel: ArrayLike, recurrent_kernel: ArrayLike, bias: ArrayLike | None, other: Any = None) -> Weights:
    given = (None if b is None else jnp.asarray(b) for b in (bias, other))
    return Weights(jnp.asarray(kernel), jnp.asarray(recurrent_kernel), *given)


def kept_bytes(h: Any, carry: Any, segments: int | None, gates: int, states: int, biases: int, arrays: int = 1) -> int:
    """The bytes kept beside x, kernels and lengths. Of each step so many gates, in float32 or wider, and so many states, in the
    dtype of h; h before the first where it is given. With segments the biases, and a carry of so many arrays before each."""
    wide_bytes = nbytes(jax.ShapeDtypeStruct(h.shape, wide_type(h)))
    one = nbytes(h) // h.shape[0]
    if segments is not None:
        return biases + segments * arrays * one
    return gates * wide_bytes + states * nbytes(h) + (0 if carry is None else one)


def is_narrow(dtype: Any) -> bool:
    return jnp.finfo(dtype).bits < 32


def require_carry(who: str, carry: ArrayLike | None, x: ArrayLike, recurrent_kernel: ArrayLike) -> None:
    require_float(who, carry=carry)
    expected = (*jnp.shape(x)[1:-1], jnp.shape(recurrent_kernel)[0])
    require_shape(who, "carry", carry, expected, shapes(x=x, recurrent_kernel=recurrent_kernel))


def require_sequence(
    who: str,
    gates: int,
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None,
    lengths: ArrayLike | None,
    segments: int | None,
) -> None:
    """Refuses in a sentence what does not fit: x [T, ..., F], kernel [F, gates·H], recurrent_kernel [H, gates·H]."""
    require_float(who, x=x, kernel=kernel, recurrent_kernel=recurrent_kernel, bias=bias)
    given = shapes(x=x, kernel=kernel, recurrent_kernel=recurrent_kernel)
    width = f"{gates}H" if gates > 1 else "H"
    if jnp.ndim(x) < 2 or jnp.ndim(kernel) != 2 or jnp.ndim(recurrent_kernel) != 2:
        raise ValueError(f"{who}: expected x [T, B, F], kernel [F, {width}] and recurrent_kernel [H, {width}], got {given}.")
    steps, features, hidden = jnp.shape(x)[0], jnp.shape(x)[-1], jnp.shape(recurrent_kernel)[0]
    if steps == 0:
        raise ValueError(f"{who}: x has no time steps ({given}).")
    if features != jnp.shape(kernel)[0]:
        raise ValueError(f"{who}: x has {features} features, kernel expects {jnp.shape(kernel)[0]} ({given}).")
    for name, array in (("kernel", kernel), ("recurrent_kernel", recurrent_kernel)):
        if jnp.shape(array)[1] != gates * hidden:
            raise ValueError(
                f"{who}: {name} has {jnp.shape(array)[1]} columns, expected {gates * hidden}: {gates} for each of the {hidden} "
                f"rows of recurrent_kernel ({given})."
            )
    require_shape(who, "bias", bias, (gates * hidden,), given)
    if lengths is not None:
        if not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
            raise TypeError(f"{who}: lengths must be integers, got {jnp.result_type(lengths)}.")
        require_shape(who, "lengths", lengths, jnp.shape(x)[1:-1], given)
    if segments is not None and not (isinstance(segments, int) and 1 <= segments <= steps):
        raise ValueError(f"{who}: segments must be a number from 1 to the {steps} steps of x, got {segments!r}.")


def require_shape(who: str, name: str, array: ArrayLike | None, expected: tuple[int, ...], given: str) -> None:
    if array is not None and jnp.shape(array) != expected:
        raise ValueError(f"{who}: {name} has shape {jnp.shape(array)}, expected {expected} ({given}).")


def linear(x: jax.Array, kernel: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
    """x W + b in the dtype of both, returned in float32 or wider."""
    dtype = jnp.result_type(x, kernel)
    return add_row(matmul(x.astype(dtype), jnp.asarray(kernel, dtype)), bias)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., m] · [m, n], accumulated and returned in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=wide_type(a, b))


def add_row(z: jax.Array, row: ArrayLike | None) -> jax.Array:
    return z if row is None else z + wide(row).reshape((1,) * (z.ndim - 1) + (-1,))


def tanh_slope(t: jax.Array) -> jax.Array:
    """1 − t², as a product: 1 − t is exact near t = 1, where the square would round away what is left."""
    return (1 - t) * (1 + t)


def first_carry(given: Any, count: int, x: jax.Array, weights: Weights, lengths: Any) -> Carry:
    """The carry before the first step, of the dtype of the result: what is given, or zeros."""
    dtype = jnp.result_type(x, weights.kernel, weights.recurrent_kernel)
    if given is None:
        # Zeros of the type that h has, on a mesh with explicit axes too. (The product is not computed.)
        like = linear(x[0], weights.kernel)[..., : weights.recurrent_kernel.shape[0]].astype(dtype)
        given = (jnp.zeros_like(like),) * count
    return tuple(varying_like(jnp.asarray(c, dtype), x, weights, given, lengths) for c in given)


def within(lengths: ArrayLike | None, steps: int) -> jax.Array | None:
    """[T, ..., 1]: whether a step lies within its sequence; None where all do."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    time = jnp.arange(steps).reshape((steps,) + (1,) * lengths.ndim)
    return (time < lengths[None])[..., None]


def where(valid: jax.Array | None, values: Any, others: Any) -> Any:
    return values if valid is None else jax.tree.map(lambda v, o: jnp.where(valid, v, o), values, others)


def scan_cell(
    cell: Callable[[jax.Array, Carry], Carry], x: jax.Array, carry: Carry, lengths: ArrayLike | None, reverse: bool
) -> tuple[jax.Array, Carry]:
    """The definition: the cell, step after step. Beyond its length a sequence keeps its carry and puts out zeros."""
    dtype = carry[-1].dtype

    def step(carry: Carry, inputs: Any) -> tuple[Carry, jax.Array]:
        x, valid = inputs
        new = where(valid, tuple(c.astype(dtype) for c in cell(x, carry)), carry)
        return new, where(valid, new[-1], jnp.zeros_like(new[-1]))

    carry, h = jax.lax.scan(step, carry, (x, within(lengths, x.shape[0])), reverse=reverse)
    return h, carry
