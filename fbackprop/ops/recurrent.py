"""Recurrent networks over a whole sequence, rnn and lstm: backpropagation through time as one rule.

With a_t = x_t W + b, the share of the input, and u_t = h_{t−1} U, that of the state (s the sigmoid, · between vectors by
element, ′ a part of a or u that belongs to one gate), step t of the forward and of the backward are

rnn     h_t = φ(a_t + u_t)                          da = du = dh · φ'          tanh' = 1 − h², relu' = [h > 0]

lstm    i, f, o = s(a′ + u′)                        dc += dh · o · (1 − tanh²(c_t))
        g = tanh(a′ + u′)                           da = du = (dc · g · i (1 − i),  dc · c_{t−1} · f (1 − f),
        c_t = f · c_{t−1} + i · g                              dc · i · (1 − g²),   dh · tanh(c_t) · o (1 − o))
        h_t = o · tanh(c_t)                         dc_{t−1} = dc · f

and in both dh_{t−1} += du_t Uᵀ: one matmul a step. Every other matmul is one for the whole sequence, after the loop, with
the steps of all sequences as rows:

    dx = da Wᵀ     dW = xᵀ da     db = Σ da     dU = Σ h_{t−1}ᵀ du_t

(Autodiff adds to dW and dU in every step.) Kept beside the arguments: for rnn h alone; for lstm i, f, g, o and c_{t−1}, from
which c_t and h_t follow by element. Below float32 the gates are kept in float32 (and for rnn φ′ beside h): a gate that is
rounded to 1 has lost its slope. With ``segments`` only the carry before each segment is kept, and the segments are run
forward once more, one at a time: with about √T of them memory grows with √T.

The carry has the dtype of the result, as in Flax; within a step, and for sums, everything is in float32 or wider.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _sequences as parts
from fbackprop.ops import _time_loop as loop
from fbackprop.ops._arithmetic import nbytes, wide
from fbackprop.rules import Static, rule
from fbackprop.samples import labels, normal, sample

__all__ = ["lstm", "rnn"]


class _RnnKept(NamedTuple):
    slope: jax.Array  # of tanh, where h is too narrow to tell it


def _rnn_cell(activation: str, narrow: bool) -> loop.Cell:
    keeps_slope = narrow and activation == "tanh"

    def step(a: jax.Array, u: jax.Array, carry: parts.Carry) -> tuple[parts.Carry, _RnnKept | None]:
        h = jnp.tanh(a + u) if activation == "tanh" else jnp.maximum(a + u, 0)
        return (h,), _RnnKept(parts.tanh_slope(h)) if keeps_slope else None

    def back(read: Any, dcarry: parts.Carry) -> tuple[jax.Array, jax.Array, parts.Carry]:
        (dh,) = dcarry
        if activation == "relu":
            da = jnp.where(read > 0, dh, 0)
        else:
            da = dh * (read.slope if keeps_slope else parts.tanh_slope(read))
        return da, da, (jnp.zeros_like(dh),)

    def reads(kept: Any, h: jax.Array, before: jax.Array) -> Any:
        return kept if keeps_slope else h

    return loop.Cell(step, back, reads, narrow=("slope",) if keeps_slope else ())


def _rnn_forward(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: ArrayLike | None = None,
    *,
    activation: str = "tanh",
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
) -> tuple[tuple[jax.Array, jax.Array], loop.Saved]:
    x, weights, given = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias), None if carry is None else (carry,)
    cell = _rnn_cell(activation, parts.is_narrow(jnp.result_type(x, *weights[:2])))
    h, (last,), saved = loop.forward_sequence(cell, 1, x, weights, given, lengths, reverse, segments)
    return (h, last), saved


def _rnn_backward(saved: loop.Saved, dy: Any, *, activation: str, reverse: bool) -> tuple[Any, ...]:
    cell = _rnn_cell(activation, parts.is_narrow(dy[0].dtype))
    dx, dweights, (dcarry,) = loop.backward_sequence(cell, saved, dy[0], (dy[1],), reverse)
    return dx, *dweights[:3], dcarry, None


@rule(
    forward=_rnn_forward,
    backward=_rnn_backward,
    static=["activation", "reverse", "segments"],
    samples=[
        sample(normal(5, 3, 4), normal(4, 6, scale=0.5), normal(6, 6, scale=0.4), normal(6), normal(3, 6)),
        sample(normal(4, 3, 2), normal(2, 3), normal(3, 3), lengths=labels(3, classes=5), activation="relu", reverse=True),
        sample(normal(5, 2, 3), normal(3, 4), normal(4, 4), normal(4), segments=2),
    ],
    workloads=[
        sample(
            normal(256, 32, 256), normal(256, 256, scale=1 / 16), normal(256, 256, scale=1 / 16), normal(256), normal(32, 256),
            note="256 steps",
        ),
    ],
    keeps="x, kernels, h; with segments x, kernels, a carry a segment",
    minimum=lambda x, kernel, recurrent_kernel, bias, carry, activation, lengths, segments, y: (
        nbytes(x, kernel, recurrent_kernel, lengths) + parts.kept_bytes(
            y[0], carry, segments, 0, 1 + (activation == "tanh" and parts.is_narrow(y[0].dtype)), nbytes(bias)
        )
    ),
)  # fmt: skip
def rnn(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: ArrayLike | None = None,
    *,
    activation: str = "tanh",
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A simple recurrent network over a sequence: h_t = φ(x_t · kernel + h_{t−1} · recurrent_kernel + bias).

    x [T, B, F], kernel [F, H], recurrent_kernel [H, H], bias [H], carry [B, H] -> (h [T, B, H], last h [B, H]).

    Args:
      carry: h before the first step; zeros by default.
      activation: "tanh" or "relu".
      lengths: [B] integers: a sequence ends after that many steps (below 0 counts as 0, above T as T). Beyond its end h is
        zero and the last h is that of its last step, as the carry of ``flax.linen.RNN`` is; no cotangent passes there.
      reverse: run from the last step of each sequence to its first. h keeps the order of x, as in Flax with ``keep_order``.
      segments: keep only the carry before each of so many parts of the sequence, and run each forward once more in the
        backward; about √T of them keep the least.
    Raises:
      ValueError: where shapes do not fit or there are no steps. TypeError: where dtypes do not.
    Source: Elman 1990; Werbos 1990 (backpropagation through time); Chen et al. 2016, arXiv:1604.06174 (segments).
    """
    parts.require_sequence("rnn", 1, x, kernel, recurrent_kernel, bias, lengths, segments)
    parts.require_carry("rnn", carry, x, recurrent_kernel)
    if activation not in ("tanh", "relu"):
        raise ValueError(f'rnn: activation must be "tanh" or "relu", got {activation!r}.')
    act = jnp.tanh if activation == "tanh" else jax.nn.relu

    def cell(x: jax.Array, carry: parts.Carry) -> parts.Carry:
        return (act(parts.linear(x, kernel, bias) + parts.linear(carry[0], recurrent_kernel)),)

    x, weights = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias)
    first = parts.first_carry(None if carry is None else (carry,), 1, x, weights, lengths)
    h, (last,) = parts.scan_cell(cell, x, first, lengths, reverse)
    return h, last


class _LstmKept(NamedTuple):
    i: jax.Array
    f: jax.Array
    g: jax.Array
    o: jax.Array
    c: jax.Array  # before the step


def _lstm_step(a: jax.Array, u: jax.Array, carry: parts.Carry) -> tuple[parts.Carry, _LstmKept]:
    c, _ = carry
    i, f, g, o = jnp.split(a + u, 4, -1)
    kept = _LstmKept(jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o), c)
    after = kept.f * c + kept.i * kept.g
    return (after, kept.o * jnp.tanh(after)), kept


def _lstm_back(kept: _LstmKept, dcarry: parts.Carry) -> tuple[jax.Array, jax.Array, parts.Carry]:
    (i, f, g, o, c), (dc, dh) = kept, dcarry
    t = jnp.tanh(f * c + i * g)
    dc = dc + dh * o * parts.tanh_slope(t)
    da = jnp.concatenate([dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * parts.tanh_slope(g), dh * t * o * (1 - o)], -1)
    return da, da, (dc * f, jnp.zeros_like(dh))


def _lstm_hidden(kept: _LstmKept) -> jax.Array:
    i, f, g, o, c = map(wide, kept)
    return o * jnp.tanh(f * c + i * g)


_LSTM = loop.Cell(_lstm_step, _lstm_back, reads=lambda kept, h, before: kept, hidden=_lstm_hidden, narrow=("c",))


def _lstm_carry(carry: Any) -> parts.Carry | None:
    return None if carry is None else (jnp.asarray(carry[0]), jnp.asarray(carry[1]))


def _lstm_forward(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
) -> tuple[tuple[jax.Array, tuple[jax.Array, jax.Array]], tuple[loop.Saved, Static]]:
    x, weights, given = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias), _lstm_carry(carry)
    h, (c, last), saved = loop.forward_sequence(_LSTM, 2, x, weights, given, lengths, reverse, segments)
    return (h, (c, last)), (saved, Static(jax.tree.structure(carry)))


def _lstm_backward(saved: tuple[loop.Saved, Static], dy: Any, *, reverse: bool) -> tuple[Any, ...]:
    dx, dweights, dcarry = loop.backward_sequence(_LSTM, saved[0], dy[0], dy[1], reverse)
    leaves = saved[1].value.num_leaves
    given = jax.tree.unflatten(saved[1].value, dcarry if leaves == 2 else [jnp.stack(dcarry)] * leaves)
    return dx, *dweights[:3], given, None


@rule(
    forward=_lstm_forward,
    backward=_lstm_backward,
    static=["reverse", "segments"],
    samples=[
        sample(normal(5, 3, 4), normal(4, 20, scale=0.5), normal(5, 20, scale=0.4), normal(20), normal(2, 3, 5)),
        sample(normal(4, 3, 2), normal(2, 12), normal(3, 12), lengths=labels(3, classes=5), reverse=True),
        sample(normal(5, 2, 3), normal(3, 8), normal(2, 8), normal(8), lengths=labels(2, classes=6), segments=2),
    ],
    workloads=[
        sample(
            normal(256, 32, 256), normal(256, 1024, scale=1 / 16), normal(256, 1024, scale=1 / 16), normal(1024),
            normal(2, 32, 256), note="256 steps",
        ),
    ],
    keeps="x, kernels, i, f, g, o, c; with segments x, kernels, a carry a segment",
    minimum=lambda x, kernel, recurrent_kernel, bias, carry, lengths, segments, y: (
        nbytes(x, kernel, recurrent_kernel, lengths) + parts.kept_bytes(y[0], carry, segments, 4, 1, nbytes(bias), arrays=2)
    ),
)  # fmt: skip
def lstm(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A long short-term memory over a sequence.

    x [T, B, F], kernel [F, 4H], recurrent_kernel [H, 4H], bias [4H], carry (c [B, H], h [B, H])
    -> (h [T, B, H], (c [B, H], h [B, H])). The gates stand in the order i, f, g, o.

    Args:
      carry: (c, h) before the first step, or one array [2, B, H] of both; zeros by default.
      lengths: [B] integers: a sequence ends after that many steps (below 0 counts as 0, above T as T). Beyond its end h is
        zero and the carry is kept, as in ``flax.linen.RNN``; no cotangent passes there.
      reverse: run from the last step of each sequence to its first. h keeps the order of x, as in Flax with ``keep_order``.
      segments: keep only the carry before each of so many parts of the sequence, and run each forward once more in the
        backward; about √T of them keep the least.
    Raises:
      ValueError: where shapes do not fit or there are no steps. TypeError: where dtypes do not.
    Source: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate).
    """
    parts.require_sequence("lstm", 4, x, kernel, recurrent_kernel, bias, lengths, segments)
    if carry is not None:
        pair = isinstance(carry, (tuple, list))
        if len(carry) != 2 if pair else jnp.shape(carry)[:1] != (2,):
            raise ValueError(
                f"lstm: carry must be (c, h), or one array [2, B, H] of both, got {jax.tree.map(jnp.shape, carry)}."
            )
        for part in carry:
            parts.require_carry("lstm", part, x, recurrent_kernel)

    def cell(x: jax.Array, carry: parts.Carry) -> parts.Carry:
        c, h = carry
        i, f, g, o = jnp.split(parts.linear(x, kernel, bias) + parts.linear(h, recurrent_kernel), 4, -1)
        c = jax.nn.sigmoid(f) * wide(c) + jax.nn.sigmoid(i) * jnp.tanh(g)
        # Beyond ±20 tanh is ±1 to the last digit. There JAX's derivative of it, (1 − t) + (1 − t) t times dh, is zero only
        # after it has swallowed a dc that is small beside dh.
        return c, jax.nn.sigmoid(o) * jnp.tanh(jnp.clip(c, -20, 20))

    x, weights = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias)
    first = parts.first_carry(_lstm_carry(carry), 2, x, weights, lengths)
    h, (c, last) = parts.scan_cell(cell, x, first, lengths, reverse)
    return h, (c, last)
