"""Compositions over time: a sequence read in both directions, and an lstm whose matrices are convolutions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.ops._arithmetic import require_float, shapes, wide_type

__all__ = ["bidirectional", "conv_lstm"]


def bidirectional(
    recurrent: Any,
    x: ArrayLike,
    forward: Sequence[ArrayLike | None],
    backward: Sequence[ArrayLike | None],
    *,
    carry: tuple[Any, Any] = (None, None),
    lengths: ArrayLike | None = None,
    merge: str = "concatenate",
    **options: Any,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Reads a sequence from both ends with two sets of weights. A composition of two calls of lstm, gru or rnn.

    x [T, B, F] -> (h [T, B, 2 H], or [T, B, H] for a sum; the last carries of both directions).

    Args:
      recurrent: ``fb.lstm``, ``fb.gru`` or ``fb.rnn``.
      forward, backward: the weights of each direction: (kernel, recurrent_kernel, bias).
      carry: what each direction begins with; zeros by default.
      lengths: [B] integers: how many steps of each sequence count; both directions read these alone.
      merge: "concatenate" or "sum", of what the two give at each step.
      options: others of the op, such as ``segments``.
    Raises:
      ValueError: where merge is neither, or weights do not fit. TypeError: where an option is unknown.
    Source: Schuster & Paliwal 1997.
    """
    if merge not in ("concatenate", "sum"):
        raise ValueError(f"bidirectional: merge is {merge!r}, expected 'concatenate' or 'sum'.")
    given = {"lengths": lengths, **options}
    there, last = recurrent(x, *forward, carry=carry[0], **given)
    back, first = recurrent(x, *backward, carry=carry[1], reverse=True, **given)
    h = jnp.concatenate([there, back], -1) if merge == "concatenate" else there + back
    return h, (last, first)


def conv_lstm(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    padding: Any = "SAME",
    reverse: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A long short-term memory over images: its matrix products are convolutions. A composition of conv and a scan.

    x [T, B, *space, C], kernel [*window, C, 4 H], recurrent_kernel [*window', H, 4 H], bias [4 H] ->
    (h [T, B, *space', H], (c, h) after the last step), gates in the order i, f, g, o, as in ``lstm``.

    All steps' inputs are one convolution; the state's, which must keep its size, is one a step.

    Args:
      carry: (c, h) to begin with, [B, *space', H] each; zeros by default.
      padding: of the input's convolution, as for ``conv``. reverse: from the last step to the first.
    Raises:
      ValueError: where shapes do not fit. TypeError: where an array is not floating-point.
    Source: Shi et al. 2015, arXiv:1506.04214.
    """
    require_float("conv_lstm", x=x, kernel=kernel, recurrent_kernel=recurrent_kernel, bias=bias)
    dims = jnp.ndim(kernel) - 2
    given = shapes(x=x, kernel=kernel, recurrent_kernel=recurrent_kernel)
    if jnp.ndim(x) != dims + 3 or jnp.ndim(recurrent_kernel) != dims + 2:
        raise ValueError(f"conv_lstm: expected x [T, B, *space, C] and kernels [*window, in, 4 H], got {given}.")
    hidden, gates = jnp.shape(recurrent_kernel)[-2:]
    if gates != 4 * hidden or jnp.shape(kernel)[-1] != gates:
        raise ValueError(f"conv_lstm: expected kernels with 4 H features each, H = {hidden} ({given}).")
    inputs = ops.conv(x, kernel, bias, padding=padding)
    dtype = jnp.result_type(inputs, recurrent_kernel)
    if carry is None:
        zeros = jnp.zeros((*inputs.shape[1:-1], hidden), dtype)
        carry = zeros, zeros
    shape = (*inputs.shape[1:-1], hidden)
    if any(jnp.shape(part) != shape for part in carry):
        raise ValueError(f"conv_lstm: expected (c, h) of {shape} each, got {shapes(c=carry[0], h=carry[1])}.")

    def step(carry: tuple[jax.Array, jax.Array], a: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        z = (a + ops.conv(h, recurrent_kernel)).astype(wide_type(a))
        i, f, g, o = jnp.split(z, 4, -1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = (ops.sigmoid(o) * ops.tanh(c)).astype(dtype)
        return (c.astype(dtype), h), h

    start = jnp.asarray(carry[0], dtype), jnp.asarray(carry[1], dtype)
    last, h = jax.lax.scan(step, start, inputs, reverse=reverse)
    return h, last
