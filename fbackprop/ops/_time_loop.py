"""Backpropagation through time, once for all recurrent cells. Nothing here is an op.

A cell is the arithmetic of one step, forward and backward, without its matmuls. Here are the loops over time, the matmuls,
the lengths of sequences and the segments. A carry is a tuple of arrays [..., H] whose last is h. With a_t = x_t W + b and
u_t = h_{t−1} U, the two sums that a step works on, the loop of the backward computes their cotangents and dh_{t−1} += du_t Uᵀ;
after it, with the steps as rows,

    dx = da Wᵀ     dW = xᵀ da     db = Σ da     dU = Σ h_{t−1}ᵀ du_t

Where a cell has ``reset``, the last columns of U multiply r_t · h_{t−1} instead: a second, small matmul in each step.

In segments the same loops run over one part of the sequence after the other, the last first; each is run forward once more
from the carry that it started with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import batched, operand_type, varying_like, wide, wide_type
from fbackprop.ops._sequences import Carry, Weights, add_row, first_carry, matmul, where, within


class Cell(NamedTuple):
    """The arithmetic of a cell, in float32 or wider. ``kept`` is a NamedTuple of arrays [..., H] that the backward needs."""

    # (a, u, carry) -> (carry, kept)
    step: Callable[[jax.Array, jax.Array, Carry], tuple[Carry, Any]]
    # (what a step back reads, dcarry with all of dh_t) -> (da, du, what of dcarry the step before gets without a matmul); with
    # ``reset`` a third argument, which takes the cotangent of the last columns' sum to that of r · h
    back: Callable[..., tuple[jax.Array, jax.Array, Carry]]
    # (kept, h, h one step before), of all steps -> what the steps back read, of all steps
    reads: Callable[[Any, Any, jax.Array], Any]
    # (kept, da) of all steps -> du of all steps
    recurrent: Callable[[Any, jax.Array], jax.Array] = lambda kept, da: da
    # kept of all steps -> h of all steps; None: h itself is kept
    hidden: Callable[[Any], jax.Array] | None = None
    # (a, u without its last H columns) -> r, where these columns of U multiply r · h and not h. Kept then has a field r.
    reset: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # the fields of kept that have the dtype of the result. Others are wide: 1 − s and 1 − tanh² of a rounded s or tanh near
    # 1 say nothing.
    narrow: tuple[str, ...] = ()


class Saved(NamedTuple):
    x: jax.Array
    weights: Weights  # the biases only for segments
    lengths: jax.Array | None
    first: jax.Array | None  # h before the first step, where a carry was given; unless there are segments
    kept: Any  # of all steps, unless there are segments
    h: jax.Array | None  # of all steps, where the cell does not tell it from what it kept
    starts: Carry | None  # [segments, ..., H]: the carry before each segment


# ---------------------------------------------------------------------------------------------------- forward, backward


def forward_steps(
    cell: Cell, x: jax.Array, weights: Weights, carry: Carry, valid: jax.Array | None, reverse: bool, keep: bool
) -> tuple[jax.Array, Carry, Any]:
    """h of all steps, the last carry, and what is kept of all steps (nothing unless ``keep``)."""
    dtype = carry[-1].dtype
    kernel, recurrent_kernel = (w.astype(dtype) for w in weights[:2])
    of_h, of_reset = _columns(cell, recurrent_kernel)

    recurrent_bias = weights.recurrent_bias
    if recurrent_bias is not None:
        recurrent_bias = jnp.pad(recurrent_bias, (recurrent_kernel.shape[1] - recurrent_bias.size, 0))

    def project(x: jax.Array) -> jax.Array:
        return add_row(matmul(x.astype(dtype), kernel), weights.bias)

    def loop(project_before: bool) -> Any:
        def step(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
            own, valid = inputs
            a = own if project_before else project(own)
            u = add_row(matmul(carry[-1], of_h), recurrent_bias)
            if cell.reset is not None:
                scaled = cell.reset(a, u) * wide(carry[-1])
                u = jnp.concatenate([u, matmul(scaled.astype(dtype), of_reset)], -1)
            new, kept = cell.step(a, u, _wide(carry))
            new = tuple(v.astype(dtype) for v in new)
            if cell.narrow:
                kept = kept._replace(**{name: getattr(kept, name).astype(dtype) for name in cell.narrow})
            new = where(valid, new, carry)
            return new, (where(valid, new[-1], jnp.zeros_like(new[-1])), kept if keep else None)

        return jax.lax.scan(step, carry, (project(x) if project_before else x, valid), reverse=reverse)

    # One large matmul before the loop. On a CPU a small one in each step is as fast, and what it gives stays in the cache.
    carry, (h, kept) = jax.lax.platform_dependent(cpu=lambda: loop(False), default=lambda: loop(True))
    return h, carry, kept


def backward_steps(
    cell: Cell,
    x: jax.Array,
    weights: Weights,
    first: jax.Array | None,
    kept: Any,
    h: jax.Array | None,
    dh: jax.Array,
    dcarry: Carry,
    valid: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, Weights, Carry]:
    """dx, the cotangents of the weights, and of the carry before the first step."""
    dtype, operands = dh.dtype, operand_type(dh)
    kernel, recurrent_kernel = (finite(w.astype(dtype)) for w in weights[:2])
    # What stands beyond the length of a sequence may be anything: it must not meet the zeros of da.
    if cell.hidden is not None:
        h = cell.hidden(kept).astype(dtype)
        h = where(valid, h, jnp.zeros_like(h))
    assert h is not None
    before = _before(h, first, valid, reverse)
    of_h, of_reset = (w.T for w in _columns(cell, recurrent_kernel))
    columns = of_h.shape[0]

    def to_reset(du: jax.Array) -> jax.Array:
        return matmul(du.astype(operands), of_reset)

    def step(dcarry: Carry, inputs: Any) -> tuple[Carry, jax.Array]:
        read, dh, valid = inputs
        total = (*dcarry[:-1], dcarry[-1] + where(valid, dh, jnp.zeros_like(dh)))
        da, du, (*direct, dh_direct) = cell.back(_wide(read), total, *(() if cell.reset is None else (to_reset,)))
        previous = (*direct, dh_direct + matmul(du[..., :columns].astype(operands), of_h))
        return where(valid, previous, dcarry), where(valid, da, jnp.zeros_like(da)).astype(operands)

    dcarry, da = jax.lax.scan(step, _wide(dcarry), (cell.reads(kept, h, before), wide(dh), valid), reverse=not reverse)
    du = cell.recurrent(kept, da)
    du = where(valid, du, jnp.zeros_like(du))
    x = finite(where(valid, x, jnp.zeros_like(x)).astype(dtype))
    dx = matmul(da, kernel.T)
    drecurrent = _rows_product(before, du[..., :columns])
    if cell.reset is not None:
        r = where(valid, kept.r, jnp.zeros_like(kept.r))
        scaled = (wide(r) * wide(before)).astype(dtype)
        drecurrent = jnp.concatenate([drecurrent, _rows_product(scaled, du[..., columns:])], -1)
    dweights = Weights(_rows_product(x, da), drecurrent, _rows_sum(da), _rows_sum(du))
    return dx, dweights, dcarry


def _columns(cell: Cell, recurrent_kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those that multiply h, and those that multiply r · h."""
    at = recurrent_kernel.shape[1] - (0 if cell.reset is None else recurrent_kernel.shape[0])
    return recurrent_kernel[:, :at], recurrent_kernel[:, at:]


def _rows_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b over all steps and sequences, accumulated in float32 or wider."""
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(batched(a, 1), batched(b, 1), contract, preferred_element_type=wide_type(a, b))


def _rows_sum(a: jax.Array) -> jax.Array:
    return wide(a).sum(tuple(range(a.ndim - 1)))


def _before(h: jax.Array, first: jax.Array | None, valid: jax.Array | None, reverse: bool) -> jax.Array:
    """h before each step. (Steps that are beyond the length of their sequence do not count.)"""
    first = (jnp.zeros_like(h[0]) if first is None else first.astype(h.dtype))[None]
    if not reverse:
        return jnp.concatenate([first, h[:-1]])
    if valid is not None:  # the first step is the last within the length
        h = jnp.where(valid, h, first)
    return jnp.concatenate([h[1:], first])


def _wide(tree: Any) -> Any:
    return jax.tree.map(wide, tree)


def finite(v: jax.Array) -> jax.Array:
    """Zero for what is infinite. An infinite weight or input saturates the gate it meets; where that leaves the value finite,
    the cotangent behind it is 0, and so is what it contributes: not 0 · ∞."""
    return jnp.where(jnp.isfinite(v), v, 0)


# ------------------------------------------------------------------------------------------------------ whole sequences


def forward_sequence(
    cell: Cell,
    size: int,
    x: jax.Array,
    weights: Weights,
    given: Any,
    lengths: ArrayLike | None,
    reverse: bool,
    segments: int | None,
) -> tuple[jax.Array, Carry, Saved]:
    """h of all steps, the last carry of ``size`` arrays, and what the backward needs."""
    lengths = None if lengths is None else jnp.asarray(lengths)
    valid = within(lengths, x.shape[0])
    carry = first_carry(given, size, x, weights, lengths)
    if segments is None:
        h, last, kept = forward_steps(cell, x, weights, carry, valid, reverse, keep=True)
        needed = Weights(weights.kernel, weights.recurrent_kernel)
        first, own = None if given is None else carry[-1], None if cell.hidden else h
        return h, last, Saved(x, needed, lengths, first, kept, own, None)

    def segment(carry: Carry, inputs: Any) -> tuple[Carry, Any]:
        h, after, _ = forward_steps(cell, inputs[0], weights, carry, inputs[1], reverse, keep=False)
        return after, (h, carry)

    last, (h, starts) = jax.lax.scan(segment, carry, _split(x, valid, segments), reverse=reverse)
    return _join(h, x.shape[0]), last, Saved(x, weights, lengths, None, None, None, starts)


def backward_sequence(
    cell: Cell, saved: Saved, dh: jax.Array, dcarry: Carry, reverse: bool
) -> tuple[jax.Array, Weights, Carry]:
    """dx, the cotangents of the weights, and of the first carry."""
    x, weights, lengths, first, kept, h, starts = saved
    valid = within(lengths, x.shape[0])
    if starts is None:
        return backward_steps(cell, x, weights, first, kept, h, dh, dcarry, valid, reverse)

    def segment(sums: Any, inputs: Any) -> tuple[Any, jax.Array]:
        dcarry, dweights = sums
        (x, valid), dh, start = inputs
        h, _, kept = forward_steps(cell, x, weights, start, valid, reverse, keep=True)
        dx, own, dcarry = backward_steps(cell, x, weights, start[-1], kept, h, dh, dcarry, valid, reverse)
        return (dcarry, jax.tree.map(jnp.add, dweights, own)), dx

    dtype, segments = wide_type(dh), starts[0].shape[0]
    columns = weights.kernel.shape[1:]
    shapes_of_sums = (weights.kernel.shape, weights.recurrent_kernel.shape, columns, columns)
    sums = (varying_like(jnp.zeros(shape, dtype), saved, dh, dcarry) for shape in shapes_of_sums)
    parts = (_split(x, valid, segments), _split(dh, None, segments)[0], starts)
    (dcarry, dweights), dx = jax.lax.scan(segment, (_wide(dcarry), Weights(*sums)), parts, reverse=not reverse)
    return _join(dx, x.shape[0]), dweights, dcarry


def _split(x: jax.Array, valid: jax.Array | None, segments: int) -> tuple[jax.Array, jax.Array | None]:
    """[T, ...] -> [segments, steps, ...], with steps added that do not count where the segments do not divide T."""
    steps, missing = x.shape[0], -x.shape[0] % segments
    if missing:
        ones = (1,) * (x.ndim - 1)
        valid = jnp.ones((steps, *ones), bool) if valid is None else valid
        x, valid = (jnp.pad(v, ((0, missing),) + ((0, 0),) * (v.ndim - 1)) for v in (x, valid))

    def split(v: jax.Array) -> jax.Array:
        return v.reshape(segments, v.shape[0] // segments, *v.shape[1:])

    return split(x), None if valid is None else split(valid)


def _join(parts: jax.Array, steps: int) -> jax.Array:
    return parts.reshape(parts.shape[0] * parts.shape[1], *parts.shape[2:])[:steps]
