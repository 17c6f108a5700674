"""Gated recurrent units over a whole sequence, gru: backpropagation through time as one rule.

With a_t = x_t W + b, the share of the input, and u_t = h_{t−1} U, that of the state (s the sigmoid, · between vectors by
element, ′ a part of a or u that belongs to one gate), step t of the forward and of the backward are

    r, z = s(a′ + u′)                           dn′ = dh · (1 − z) · (1 − n²)
    v = u′ + b_v                                da = (dn′ · v · r (1 − r),  dh · (h_{t−1} − n) · z (1 − z),  dn′)
    n = tanh(a′ + r · v)                        du = (the same,             the same,                       dn′ · r)
    h_t = (1 − z) · n + z · h_{t−1}             dh_{t−1} = dh · z

and dh_{t−1} += du_t Uᵀ: one matmul a step. Every other matmul is one for the whole sequence, after the loop, with the steps
of all sequences as rows:

    dx = da Wᵀ     dW = xᵀ da     db = Σ da     dU = Σ h_{t−1}ᵀ du_t     db_v = Σ dv

With ``reset_after=False`` the reset gate stands before the matmul, v = (r · h_{t−1}) U′ and n = tanh(a′ + v). Then

    dv = dn′        ds = dn′ U′ᵀ        da = du = (ds · h_{t−1} · r (1 − r),  …,  dn′)        dh_{t−1} = dh · z + ds · r

and dU′ = Σ (r · h_{t−1})ᵀ dn′: two matmuls a step, as in the forward.

Kept beside the arguments are r, z, n, v (not where the reset gate stands before the matmul) and h; below float32 the gates are
kept in float32, as one that is rounded to 1 has lost its slope. With ``segments`` only the carry before each segment is kept,
and the segments are run forward once more, one at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _sequences as parts
from fbackprop.ops import _time_loop as loop
from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide
from fbackprop.rules import rule
from fbackprop.samples import labels, normal, sample

__all__ = ["gru"]


class _GruKept(NamedTuple):
    r: jax.Array
    z: jax.Array
    n: jax.Array
    v: jax.Array  # what r multiplies


class _GruRead(NamedTuple):
    kept: _GruKept
    before: jax.Array  # h one step before


def _gru_step(a: jax.Array, u: jax.Array, carry: parts.Carry) -> tuple[parts.Carry, _GruKept]:
    (h,) = carry
    (ar, az, an), (ur, uz, v) = jnp.split(a, 3, -1), jnp.split(u, 3, -1)
    r, z = jax.nn.sigmoid(ar + ur), jax.nn.sigmoid(az + uz)
    n = jnp.tanh(an + r * v)
    return ((1 - z) * n + z * h,), _GruKept(r, z, n, v)


def _gru_back(read: _GruRead, dcarry: parts.Carry) -> tuple[jax.Array, jax.Array, parts.Carry]:
    (r, z, n, v), before = read
    (dh,) = dcarry
    dn = dh * (1 - z) * parts.tanh_slope(n)
    dr, dz = dn * loop.finite(v) * r * (1 - r), dh * (before - n) * z * (1 - z)
    return jnp.concatenate([dr, dz, dn], -1), jnp.concatenate([dr, dz, dn * r], -1), (dh * z,)


def _gru_recurrent(kept: _GruKept, da: jax.Array) -> jax.Array:
    dr, dz, dn = jnp.split(da, 3, -1)
    return jnp.concatenate([dr, dz, (wide(dn) * wide(kept.r)).astype(da.dtype)], -1)


_GRU = loop.Cell(_gru_step, _gru_back, lambda kept, h, before: _GruRead(kept, before), _gru_recurrent, narrow=("v",))


class _ResetKept(NamedTuple):
    r: jax.Array
    z: jax.Array
    n: jax.Array


class _ResetRead(NamedTuple):
    kept: _ResetKept
    before: jax.Array


def _reset(a: jax.Array, u: jax.Array) -> jax.Array:
    hidden = u.shape[-1] // 2
    return jax.nn.sigmoid(a[..., :hidden] + u[..., :hidden])


def _reset_step(a: jax.Array, u: jax.Array, carry: parts.Carry) -> tuple[parts.Carry, _ResetKept]:
    (h,) = carry
    r, z, n = jnp.split(a + u, 3, -1)
    kept = _ResetKept(jax.nn.sigmoid(r), jax.nn.sigmoid(z), jnp.tanh(n))
    return ((1 - kept.z) * kept.n + kept.z * h,), kept


def _reset_back(
    read: _ResetRead, dcarry: parts.Carry, to_reset: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, parts.Carry]:
    (r, z, n), before = read
    (dh,) = dcarry
    dn = dh * (1 - z) * parts.tanh_slope(n)
    ds = to_reset(dn)
    da = jnp.concatenate([ds * before * r * (1 - r), dh * (before - n) * z * (1 - z), dn], -1)
    return da, da, (dh * z + ds * r,)


_RESET_BEFORE = loop.Cell(_reset_step, _reset_back, lambda kept, h, before: _ResetRead(kept, before), reset=_reset)


def _cell(reset_after: bool) -> loop.Cell:
    return _GRU if reset_after else _RESET_BEFORE


def _gru_forward(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: ArrayLike | None = None,
    *,
    recurrent_bias: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
    reset_after: bool = True,
) -> tuple[tuple[jax.Array, jax.Array], loop.Saved]:
    x, weights = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias, recurrent_bias)
    given = None if carry is None else (carry,)
    h, (last,), saved = loop.forward_sequence(_cell(reset_after), 1, x, weights, given, lengths, reverse, segments)
    return (h, last), saved


def _gru_backward(saved: loop.Saved, dy: Any, *, reverse: bool, reset_after: bool) -> tuple[Any, ...]:
    dx, dweights, (dcarry,) = loop.backward_sequence(_cell(reset_after), saved, dy[0], (dy[1],), reverse)
    assert dweights.recurrent_bias is not None
    return dx, *dweights[:3], dcarry, dweights.recurrent_bias[2 * dcarry.shape[-1] :], None


@rule(
    forward=_gru_forward,
    backward=_gru_backward,
    static=["reverse", "segments", "reset_after"],
    samples=[
        sample(
            normal(5, 3, 4), normal(4, 15, scale=0.5), normal(5, 15, scale=0.4), normal(15), normal(3, 5),
            recurrent_bias=normal(5),
        ),
        sample(normal(4, 3, 2), normal(2, 9), normal(3, 9), lengths=labels(3, classes=5), reverse=True),
        sample(normal(5, 2, 3), normal(3, 6), normal(2, 6), normal(6), recurrent_bias=normal(2), segments=2),
        sample(
            normal(5, 3, 4), normal(4, 15, scale=0.5), normal(5, 15, scale=0.4), normal(15), normal(3, 5), reset_after=False,
        ),
    ],
    workloads=[
        sample(
            normal(256, 32, 256), normal(256, 768, scale=1 / 16), normal(256, 768, scale=1 / 16), normal(768), normal(32, 256),
            recurrent_bias=normal(256), note="256 steps",
        ),
    ],
    keeps="x, kernels, r, z, n, v, h (no v with reset_after=False); with segments x, kernels, a carry a segment",
    minimum=lambda x, kernel, recurrent_kernel, bias, carry, recurrent_bias, lengths, segments, reset_after, y: (
        nbytes(x, kernel, recurrent_kernel, lengths)
        + parts.kept_bytes(y[0], carry, segments, 3, 1 + reset_after, nbytes(bias, recurrent_bias))
    ),
)  # fmt: skip
def gru(
    x: ArrayLike,
    kernel: ArrayLike,
    recurrent_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    carry: ArrayLike | None = None,
    *,
    recurrent_bias: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    segments: int | None = None,
    reset_after: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Gated recurrent units over a sequence, with the reset gate behind the matmul, as in Flax and cuDNN, or before it.

    x [T, B, F], kernel [F, 3H], recurrent_kernel [H, 3H], bias [3H], carry [B, H] -> (h [T, B, H], last h [B, H]).
    The gates stand in the order r, z, n; n = tanh(x W_n + b_n + r · (h U_n + recurrent_bias)), h = (1 − z) · n + z · h.

    Args:
      carry: h before the first step; zeros by default.
      recurrent_bias: [H], inside of the reset gate (Flax's ``hn/bias``); for r and z a second bias would add to the first.
      lengths: [B] integers: a sequence ends after that many steps (below 0 counts as 0, above T as T). Beyond its end h is
        zero and the last h is that of its last step, as the carry of ``flax.linen.RNN`` is; no cotangent passes there.
      reverse: run from the last step of each sequence to its first. h keeps the order of x, as in Flax with ``keep_order``.
      segments: keep only the carry before each of so many parts of the sequence, and run each forward once more in the
        backward; about √T of them keep the least.
      reset_after: whether the reset gate stands behind the matmul; else, as in Haiku, n = tanh(x W_n + b_n + (r · h) U_n), and
        there is no recurrent_bias.
    Raises:
      ValueError: where shapes do not fit or there are no steps. TypeError: where dtypes do not.
    Source: Cho et al. 2014, arXiv:1406.1078; the reset gate as in version 1 of the paper and in cuDNN, or as in version 3.
    """
    parts.require_sequence("gru", 3, x, kernel, recurrent_kernel, bias, lengths, segments)
    parts.require_carry("gru", carry, x, recurrent_kernel)
    require_float("gru", recurrent_bias=recurrent_bias)
    hidden = jnp.shape(recurrent_kernel)[:1]
    parts.require_shape("gru", "recurrent_bias", recurrent_bias, hidden, shapes(recurrent_kernel=recurrent_kernel))
    if recurrent_bias is not None and not reset_after:
        raise ValueError("gru: recurrent_bias stands inside of the reset gate; with reset_after=False bias is all there is.")

    def cell(x: jax.Array, carry: parts.Carry) -> parts.Carry:
        (h,) = carry
        ar, az, an = jnp.split(parts.linear(x, kernel, bias), 3, -1)
        ur, uz, v = jnp.split(parts.linear(h, recurrent_kernel), 3, -1)
        z, r = jax.nn.sigmoid(az + uz), jax.nn.sigmoid(ar + ur)
        if reset_after:
            v = r * parts.add_row(v, recurrent_bias)
        else:
            v = parts.linear((r * wide(h)).astype(h.dtype), jnp.asarray(recurrent_kernel)[:, 2 * h.shape[-1] :])
        n = jnp.tanh(an + v)
        return ((1 - z) * n + z * wide(h),)

    x, weights = jnp.asarray(x), parts.as_weights(kernel, recurrent_kernel, bias, recurrent_bias)
    first = parts.first_carry(None if carry is None else (carry,), 1, x, weights, lengths)
    h, (last,) = parts.scan_cell(cell, x, first, lengths, reverse)
    return h, last
