"""What a compiler may neither move nor share: the order of a backward, and what it computes again. Nothing here is an op.

A backward makes an array, multiplies by it and is done with it. Compilers do not see the intent. A gradient of weights, for
which nothing waits, they put off until the end of the program, its operands alive meanwhile; and what the backward computes
again they recognize as what the forward had computed, which they then keep. On a CPU neither is held up: there the programs
are small, and a loop over memory that is saved counts for more.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fbackprop.ops._arithmetic import varying_like

T = TypeVar("T")
U = TypeVar("U")


def in_turn(first: T, then: U) -> tuple[T, U]:
    """Both as they are; what is computed of ``then`` waits until all of ``first`` is there. A part of ``first`` that nobody
    uses is not computed."""
    return jax.lax.platform_dependent((first, then), cpu=lambda both: both, default=jax.lax.optimization_barrier)


def again(x: jax.Array, after: jax.Array) -> jax.Array:
    """x as it is, for computing of it what was computed before: once more, and not before ``after`` is there."""

    def anew(x: jax.Array, after: jax.Array) -> jax.Array:
        return x * _unknown(1, x.dtype, after)

    return jax.lax.platform_dependent(x, after, cpu=varying_like, default=anew)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, after: jax.Array) -> jax.Array:
    """Zeros to add to, which are not there before ``after`` is."""

    def late(after: jax.Array) -> jax.Array:
        return jnp.broadcast_to(_unknown(0, dtype, after), shape)

    return jax.lax.platform_dependent(after, cpu=lambda after: varying_like(jnp.zeros(shape, dtype), after), default=late)


def _unknown(number: int, dtype: DTypeLike, after: jax.Array) -> jax.Array:
    """A number that the compiler does not know."""
    return jax.lax.optimization_barrier((varying_like(jnp.asarray(number, dtype), after), after))[0]
