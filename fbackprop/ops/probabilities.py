"""Softmax, its logarithm, and logsumexp, over an axis (or several) of x; sums Σ run over it, for each row.

softmax                                       log_softmax

    p = exp(x − m) / s                            y = (x − m) − log s

    dx = p (dy − Σ dy p)                          dx = dy − p Σ dy

with m = max x and s = Σ exp(x − m).

Derivation for softmax: ∂p_i/∂x_j = p_i (δ_ij − p_j), so dx_j = Σ_i dy_i p_i (δ_ij − p_j) = p_j (dy_j − Σ_i dy_i p_i).
For its logarithm ∂y_i/∂x_j = δ_ij − p_j.

logsumexp, with factors b that may be negative (1 if not given):

    y = m + log |S|,   S = Σ b e,   e = exp(a − m)          da = dy b e / S          db = dy e / S

softmax keeps p. The others keep e = exp(x − m), which the compiler forms for the sum in any case, and s or S: the backward
then only multiplies. Where e would be wider than x, or has factors, they keep x (a, b), m and s: not m + log s, whose
rounding is the larger part of p's error for logits of some hundreds. Where S = 0, as for a row of nothing but −inf, the
gradient is 0. With ``where``, elements that are left out have p = 0 (y = −∞ for log_softmax) and receive no cotangent.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import canonical_axes, float_type, nbytes, ranked, shapes, sum_to, wide, wide_type
from fbackprop.rules import rule
from fbackprop.samples import mask, normal, sample

__all__ = ["log_softmax", "logsumexp", "softmax"]

Axis = int | Sequence[int] | None


class Normalizer(NamedTuple):
    """What log Σ exp(x) = top + log(total) is made of, for each row. The sum is not formed: next to a large top the other
    part is lost. A row of nothing but −inf has the total 1, so that its probabilities are zero and not NaN."""

    top: jax.Array
    total: jax.Array

    def log_probability(self, x: jax.Array) -> jax.Array:
        """x − log Σ exp(x)."""
        return (x - self.top) - jnp.log(self.total)

    def probability(self, x: jax.Array) -> jax.Array:
        """exp(x) / Σ exp(x)."""
        return jnp.exp(x - self.top) * (1 / self.total)


def highest(x: jax.Array, axis: Any, where: jax.Array | None = None, most: float = math.inf) -> jax.Array:
    """The largest of x over ``axis``, which stays with length 1, in float32 or wider, but no more than ``most``; 0 for nothing
    but −inf, so that exp(x − highest) is then 0 and not NaN. A constant for derivatives: what is shifted by it gets it back."""
    # The largest is taken before x is widened: that is exact, and the wide x is then read by one reduction alone.
    top = wide(jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf)))
    top = jnp.minimum(top, most)
    return jnp.where(jnp.isfinite(top), top, 0)


def included(x: jax.Array, where: ArrayLike | None) -> jax.Array:
    """x, and −inf for what is left out: the logarithm of no probability."""
    return x if where is None else jnp.where(where, x, -jnp.inf)


def shifted_exp(x: jax.Array, top: jax.Array, where: ArrayLike | None) -> jax.Array:
    """exp(x − top), 0 for what is left out; for x in float32 or wider."""
    return jnp.exp(included(x, where) - top)


def log_normalizer(x: jax.Array, axis: Any, where: jax.Array | None = None) -> Normalizer:
    """log Σ exp(x) over ``axis``, which stays with length 1, in float32 or wider."""
    top = highest(x, axis, where)
    total = jnp.sum(shifted_exp(wide(x), top, where), axis, keepdims=True)
    return Normalizer(top, jnp.where(total == 0, 1, total))


def _softmax(x: ArrayLike, axis: Axis, where: ArrayLike | None) -> jax.Array:
    x_ = wide(x)
    top = jax.lax.stop_gradient(jnp.max(x_, axis, keepdims=True, where=where, initial=-jnp.inf))
    e = shifted_exp(x_, top, where)
    p = e / jnp.sum(e, axis, keepdims=True)
    return (p if where is None else jnp.where(where, p, 0)).astype(float_type(x))


class _SoftmaxSaved(NamedTuple):
    p: jax.Array


def _softmax_forward(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> tuple[jax.Array, _SoftmaxSaved]:
    p = _softmax(x, axis, where)
    return p, _SoftmaxSaved(p)


def softmax_pullback(p: jax.Array, g: jax.Array, axis: Axis) -> jax.Array:
    """p (g − Σ g p), for p as it was kept and g in float32 or wider."""
    exact = wide(p)
    mean = jnp.sum(g * exact, axis, keepdims=True)
    if p.dtype != exact.dtype:
        # A rounded p does not sum to one, and where one p is near 1, g − Σ g p would be the difference of two close
        # numbers with different errors. Dividing by the sum of what was kept takes that error out.
        total = jnp.sum(exact, axis, keepdims=True)
        mean = mean / jnp.where(total == 0, 1, total)
    return exact * (g - mean)


def _softmax_backward(saved: _SoftmaxSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    return softmax_pullback(saved.p, wide(dy), axis), None


_SAMPLES = [
    sample(normal(5, 7)),
    sample(normal(4, 3, 5, scale=3.0), axis=1),
    sample(normal(4, 3, 5), axis=(0, 2)),
    sample(normal(6, 8), where=mask(6, 8)),
    sample(normal(9, 7, scale=8.0)),
    sample(normal(6, 8), where=mask(6, 8, keep=0.1)),
]


@rule(
    forward=_softmax_forward,
    backward=_softmax_backward,
    static=["axis"],
    samples=_SAMPLES,
    workloads=[sample(normal(8192, 1024), dtype=d) for d in ("float32", "bfloat16")],
    keeps="y",
    minimum=lambda y: nbytes(y),
)
def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Turns logits into probabilities: y = exp(x) / Σ exp(x), each row positive and summing to one.

    x [...] -> y [...], of the same dtype.

    Args:
      axis: the dimension or dimensions to sum over; None is all.
      where: elements to include, of a shape that broadcasts with x; the others get 0.
    """
    canonical_axes("softmax", axis, jnp.ndim(x))
    return _softmax(x, axis, where)


def _row_bytes(x: Any, axis: Axis) -> int:
    """The bytes of one number for each row."""
    axes = canonical_axes("", axis, x.ndim)
    return math.prod(n for i, n in enumerate(x.shape) if i not in axes) * wide_type(x).itemsize


class _LogSoftmaxSaved(NamedTuple):
    e: jax.Array | None  # exp(x − m) in float32 and wider: the compiler forms it for the sum anyway
    x: jax.Array | None  # below float32, with m
    top: jax.Array | None
    total: jax.Array
    where: jax.Array | None


def _log_total(x: jax.Array, normalizer: Normalizer, axis: Axis) -> jax.Array:
    """log s, also where all but the largest element are so small that s = 1 + the rest forgets them.

    Such rows are summed again without their largest (they have only one), if there are any.
    """
    top, total = normalizer
    nearly_one = (total < 1 + 2**-4) & (total >= 1)

    def of_the_rest(x: jax.Array) -> jax.Array:
        rest = jnp.sum(jnp.where(x == top, 0, jnp.exp(x - top)), axis, keepdims=True)
        return jnp.where(nearly_one, jnp.log1p(rest), jnp.log(total))

    return jax.lax.cond(jnp.any(nearly_one), of_the_rest, lambda x: jnp.log(total), x)


def _log_softmax_forward(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> tuple[jax.Array, _LogSoftmaxSaved]:
    x_ = wide(x)
    where = None if where is None else jnp.asarray(where)
    normalizer = log_normalizer(x_, axis, where)
    y = (x_ - normalizer.top) - _log_total(included(x_, where), normalizer, axis)
    y = included(y, where).astype(float_type(x))
    top, total = normalizer
    if jnp.result_type(x) == x_.dtype:
        return y, _LogSoftmaxSaved(shifted_exp(x_, top, where), None, None, total, where)
    return y, _LogSoftmaxSaved(None, jnp.asarray(x), top, total, where)


def _log_softmax_backward(saved: _LogSoftmaxSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    e, x, top, total, where = saved
    g = wide(dy) if where is None else jnp.where(where, wide(dy), 0)
    if e is None:
        assert x is not None
        assert top is not None
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return None, None
        e = shifted_exp(wide(x), top, where)
    return g - e * (jnp.sum(g, axis, keepdims=True) / total), None


@rule(
    forward=_log_softmax_forward,
    backward=_log_softmax_backward,
    static=["axis"],
    samples=_SAMPLES,
    workloads=[sample(normal(8192, 1024), dtype=d) for d in ("float32", "bfloat16")],
    keeps="exp(x − m), a number a row; below float32 x, two numbers a row",
    minimum=lambda x, axis, where: nbytes(x, where) + (1 if x.dtype == wide_type(x) else 2) * _row_bytes(x, axis),
)
def log_softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """The logarithm of softmax: y = x − log Σ exp(x), without overflow and without log(0).

    x [...] -> y [...], of the same dtype.

    Args:
      axis: the dimension or dimensions to sum over; None is all.
      where: elements to include, of a shape that broadcasts with x; the others get −inf.
    """
    canonical_axes("log_softmax", axis, jnp.ndim(x))
    x_ = wide(x)
    where = None if where is None else jnp.asarray(where)
    y = log_normalizer(x_, axis, where).log_probability(x_)
    return included(y, where).astype(float_type(x))


class _LogSumExpSaved(NamedTuple):
    a: jax.Array | None  # with its largest, unless there is e
    e: jax.Array | None  # exp(a − m), where that takes no more bytes than a: the compiler forms it for the sum anyway
    b: jax.Array | None
    where: jax.Array | None
    top: jax.Array | None  # m, with the summed axes of length 1
    total: jax.Array  # S, likewise


def _keeps_powers(a: Any, b: Any, where: Any) -> bool:
    return b is None and where is None and a.dtype == wide_type(a)


def _powers(a: jax.Array, b: jax.Array | None, where: jax.Array | None, top: jax.Array) -> jax.Array:
    """e = exp(a − m); 0 where left out. An element with the factor 0 has no part in m: there e is kept finite."""
    x = included(wide(a), where)
    largest = float(jnp.finfo(x.dtype).max)
    difference = jnp.minimum(x, largest) - top  # a = m = +inf: e = 1
    return jnp.exp(difference if b is None else jnp.minimum(difference, math.log(largest) - 1))


def _top_and_total(a: jax.Array, b: jax.Array | None, where: jax.Array | None, axis: Axis) -> tuple[jax.Array, jax.Array]:
    counted = where if b is None else (b != 0) if where is None else where & (b != 0)
    shape = jnp.broadcast_shapes(a.shape, *(v.shape for v in (b, where) if v is not None))
    top = jnp.max(jnp.broadcast_to(a, shape), axis, keepdims=True, where=counted, initial=-jnp.inf)
    top = jnp.minimum(wide(jax.lax.stop_gradient(top)), float(jnp.finfo(wide_type(a)).max))
    top = jnp.where(top == -jnp.inf, 0, top)
    e = jnp.broadcast_to(_powers(a, b, where, top), shape)
    return top, jnp.sum(e if b is None else e * wide(b), axis, keepdims=True)


def _logsumexp(
    a: jax.Array, b: jax.Array | None, where: jax.Array | None, axis: Axis, keepdims: bool, return_sign: bool
) -> tuple[Any, jax.Array, jax.Array]:
    top, total = _top_and_total(a, b, where, axis)
    none = total == 0
    y = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, jnp.abs(total))) + top)
    y = jnp.where(top == float(jnp.finfo(top.dtype).max), jnp.inf, y)
    y = y if b is None or return_sign else jnp.where(total < 0, jnp.nan, y)
    axes = canonical_axes("", axis, top.ndim)
    dtype = float_type(a) if b is None else float_type(a, b)
    parts = [v if keepdims else jnp.squeeze(v, axes) for v in (y.astype(dtype), jnp.sign(total).astype(dtype))]
    return tuple(parts) if return_sign else parts[0], top, total


def _logsumexp_forward(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> tuple[Any, _LogSumExpSaved]:
    a, b, where = jnp.asarray(a), *(None if v is None else jnp.asarray(v) for v in (b, where))
    y, top, total = _logsumexp(a, ranked(b, a), ranked(where, a), axis, keepdims, return_sign)
    if _keeps_powers(a, b, where):
        return y, _LogSumExpSaved(None, _powers(a, None, None, top), None, None, None, total)
    return y, _LogSumExpSaved(a, None, b, where, top, total)


def _logsumexp_backward(saved: _LogSumExpSaved, dy: Any, *, axis: Axis, keepdims: bool, return_sign: bool) -> tuple[Any, ...]:
    a, e, b, where, top, total = saved
    g = wide(dy[0] if return_sign else dy)  # the sign is constant almost everywhere
    g = g if keepdims else jnp.expand_dims(g, canonical_axes("", axis, total.ndim))
    flat = total == 0 if b is None or return_sign else total <= 0  # where y is −inf, or NaN
    factor = jnp.where(flat, 0, g / jnp.where(flat, 1, total))
    if e is not None:
        return factor * e, None, None
    assert a is not None
    assert top is not None
    shape = None if b is None else b.shape
    b, where = ranked(b, a), ranked(where, a)
    e = _powers(a, b, where, top)
    da, db = factor * (e if b is None else e * wide(b)), None if b is None else factor * e
    floating = [v is not None and jnp.issubdtype(v.dtype, jnp.inexact) for v in (a, b)]
    da = sum_to(da, a.shape) if floating[0] else None
    db = sum_to(db, shape) if db is not None and shape is not None and floating[1] else None
    return da, db, None


@rule(
    forward=_logsumexp_forward,
    backward=_logsumexp_backward,
    static=["axis", "keepdims", "return_sign"],
    samples=[
        sample(normal(5, 7), axis=-1),
        sample(normal(4, 3, 5, scale=3.0), (0, 2), normal(3, 5), True, True, mask(4, 3, 1)),
        sample(normal(6, 8), where=mask(6, 8)),
    ],
    workloads=[sample(normal(8192, 1024), axis=-1)],
    keeps="exp(a − m), a number a row; with b, where or below float32 a, b, two numbers a row",
    minimum=lambda a, b, where, axis: nbytes(a, b, where) + (1 if _keeps_powers(a, b, where) else 2) * _row_bytes(a, axis),
)
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Any:
    """The logarithm of a sum of exponentials: y = log Σ b exp(a), without overflow.

    a [...] -> y, without the axes that are summed. A row of nothing but −inf, or of nothing at all, gives −inf with a
    gradient of 0.

    Args:
      axis: the dimension or dimensions to sum over; None is all.
      b: factors, of a shape that broadcasts with a; by default 1.
      keepdims: keep the summed axes, with length 1.
      return_sign: return (log |Σ|, sign of Σ); otherwise a negative sum gives NaN.
      where: elements to include, of a shape that broadcasts with a.
    Raises:
      ValueError: where an axis is out of range or the shapes do not fit.
    """
    canonical_axes("logsumexp", axis, jnp.ndim(a))
    try:
        shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in (a, b, where) if v is not None))
    except ValueError:
        raise ValueError(f"logsumexp: shapes that do not broadcast together: {shapes(a=a, b=b, where=where)}.") from None
    if len(shape) != jnp.ndim(a):
        raise ValueError(f"logsumexp: b and where have at most the dimensions of a, got {shapes(a=a, b=b, where=where)}.")
    a = jnp.asarray(a)
    return _logsumexp(a, ranked(b, a), ranked(where, a), axis, keepdims, return_sign)[0]
