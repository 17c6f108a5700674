"""Divergences between a predicted distribution, given by its logarithms l, and a target t: sums over an axis of single terms.

    op                                 term                                cotangents
    kl_divergence                      t (log t − l)                       dl = −t dL             dt = (log t − l + 1) dL
    generalized_kl_divergence          t (log t − l) + exp(l) − t          dl = (exp(l) − t) dL   dt = (log t − l) dL
    kl_divergence_with_log_targets     exp(t) (t − l)                      dl = −exp(t) dL        dt = exp(t) (t − l + 1) dL

Of a target of probability 0 only exp(l) counts, however impossible the prediction holds it (0 log 0 = 0), and it receives no
cotangent, nor does its zero where the backward is differentiated. Elements that ``where`` leaves out count nothing. Kept are l
and t; for logarithms of targets exp(t) (t where it is narrower than float32) and t − l, which the sum is made of: in place
of l and t, these would be written to memory beside them. Sums are in float32 or wider.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import canonical_axes, nbytes, require_float, shapes, still, sum_to, wide, wide_type
from fbackprop.rules import Static, rule
from fbackprop.samples import impossible, mask, normal, probabilities, sample

__all__ = ["generalized_kl_divergence", "kl_divergence", "kl_divergence_with_log_targets"]

Axis = int | Sequence[int] | None
Term = Callable[[jax.Array, jax.Array], jax.Array]


def _log(t: jax.Array) -> jax.Array:
    """log t, and a constant where t = 0."""
    return jnp.log(jnp.where(t == 0, 1, t))


def _excess(l: jax.Array, t: jax.Array) -> jax.Array:
    """log t − l, 0 where the target is impossible."""
    return jnp.where(t == 0, 0, _log(t) - l)


def _kl(l: jax.Array, t: jax.Array) -> jax.Array:
    return t * _excess(l, t)


def _generalized(l: jax.Array, t: jax.Array) -> jax.Array:
    # The choice comes last: of a sum the compiler would write both terms to memory before it adds them up.
    # And p is not of l itself, or it would be written, too, for the backward of the same program.
    p = jnp.exp(jnp.maximum(l, -1e30))
    return jnp.where(t == 0, p, t * (_log(t) - l) - t + p)


def _gap(l: jax.Array, t: jax.Array) -> jax.Array:
    """t − l, 0 where the target is impossible."""
    return jnp.where(t == -jnp.inf, 0, t - l)


def _with_log(l: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.exp(t) * _gap(l, t)


class _Saved(NamedTuple):
    log_predictions: jax.Array
    targets: jax.Array
    where: jax.Array | None


def _sum(term: Term, log_predictions: ArrayLike, targets: ArrayLike, axis: Axis, where: ArrayLike | None) -> jax.Array:
    value = jnp.sum(term(wide(log_predictions), wide(targets)), axis, where=None if where is None else jnp.asarray(where))
    return value.astype(jnp.result_type(log_predictions, targets))


def _check(who: str, axis: Axis, where: ArrayLike | None, **arrays: ArrayLike) -> None:
    require_float(who, **arrays)
    try:
        shape = jnp.broadcast_shapes(*map(jnp.shape, (*arrays.values(), *(() if where is None else (where,)))))
    except ValueError:
        raise ValueError(f"{who}: shapes that do not broadcast together: {shapes(**arrays, where=where)}.") from None
    canonical_axes(who, axis, len(shape))


def _cotangents(saved: Any, dy: jax.Array, axis: Axis, sizes: Sequence[Any], *slopes: jax.Array) -> tuple[Any, ...]:
    """The cotangents of l and t, of these shapes, from the slopes for them."""
    shape = jnp.broadcast_shapes(*(s.shape for s in slopes), () if saved.where is None else saved.where.shape)
    g = jnp.broadcast_to(jnp.expand_dims(wide(dy), canonical_axes("", axis, len(shape))), shape)
    g = g if saved.where is None else jnp.where(saved.where, g, 0)
    products = (g * s if saved.where is None else jnp.where(saved.where, g * s, 0) for s in slopes)
    return *(sum_to(d, own) for d, own in zip(products, sizes)), None


def _backward(predicted: Term, target: Term) -> Callable[..., tuple[Any, ...]]:
    """The backward of a sum of terms, from their slopes for l and for t."""

    def backward(saved: _Saved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
        l, t = wide(saved.log_predictions), wide(saved.targets)
        return _cotangents(saved, dy, axis, (l.shape, t.shape), predicted(l, t), target(l, t))

    return backward


def _forward(term: Term, log_predictions: Any, targets: Any, axis: Axis, where: Any) -> tuple[jax.Array, _Saved]:
    kept = _Saved(jnp.asarray(log_predictions), jnp.asarray(targets), None if where is None else jnp.asarray(where))
    return _sum(term, log_predictions, targets, axis, where), kept


def _bytes(log_predictions: Any, targets: Any, where: Any) -> int:
    return nbytes(log_predictions, targets, where)


_OF_TARGETS: Any = {
    "static": ["axis"],
    "samples": [
        sample(normal(6, 5), probabilities(6, 5)),
        sample(normal(3, 5, 4), probabilities(1, 5, 4), axis=(0, 2), where=mask(3, 5, 4)),
        sample(impossible(-2.0, 6, 5), impossible(0.0, 6, 5)),
    ],
    "workloads": [sample(normal(4096, 3072), probabilities(4096, 3072))],
    "keeps": "log_predictions, targets",
    "minimum": _bytes,
}


def _kl_forward(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _Saved]:
    return _forward(_kl, log_predictions, targets, axis, where)


@rule(
    forward=_kl_forward,
    backward=_backward(lambda l, t: -still(t, t == 0), lambda l, t: jnp.where(t == 0, 0, _excess(l, t) + 1)),
    **_OF_TARGETS,
)
def kl_divergence(log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """The Kullback-Leibler divergence of the predicted distribution from the target: Σ t (log t − log p).

    log_predictions [..., n], targets [..., n] of a shape that broadcasts with it -> [...]. A target of 0 costs nothing.
    Source: Kullback & Leibler 1951.

    Args:
      axis: the dimension of the distribution, several, or None for all.
      where: elements to include, of a shape that broadcasts with log_predictions.
    """
    _check("kl_divergence", axis, where, log_predictions=log_predictions, targets=targets)
    return _sum(_kl, log_predictions, targets, axis, where)


def _generalized_forward(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _Saved]:
    return _forward(_generalized, log_predictions, targets, axis, where)


@rule(
    forward=_generalized_forward,
    backward=_backward(lambda l, t: jnp.exp(l) - still(t, t == 0), _excess),
    **_OF_TARGETS,
)
def generalized_kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """The Kullback-Leibler divergence of measures that need not sum to one: Σ t (log t − log p) + p − t.

    log_predictions [..., n], targets [..., n] of a shape that broadcasts with it -> [...]. Of a target of 0 only p counts.
    Source: Bregman 1967.

    Args:
      axis: the dimension of the measure, several, or None for all.
      where: elements to include, of a shape that broadcasts with log_predictions.
    """
    _check("generalized_kl_divergence", axis, where, log_predictions=log_predictions, targets=targets)
    return _sum(_generalized, log_predictions, targets, axis, where)


class _LogSaved(NamedTuple):
    targets: jax.Array  # exp(t); below float32, where that would be rounded, or overflow, t
    gap: jax.Array  # t − l
    where: jax.Array | None
    shapes: Static  # of l and t


def _with_log_forward(
    log_predictions: ArrayLike, log_targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _LogSaved]:
    l, t = jnp.asarray(log_predictions), jnp.asarray(log_targets)
    targets = jnp.exp(t) if t.dtype == wide_type(t) else t
    gap = _gap(wide(l), wide(t)).astype(jnp.result_type(l, t))
    where = None if where is None else jnp.asarray(where)
    return _sum(_with_log, l, t, axis, where), _LogSaved(targets, gap, where, Static((l.shape, t.shape)))


def _with_log_backward(saved: _LogSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    t = saved.targets
    e = t if t.dtype == wide_type(t) else jnp.exp(wide(t))
    return _cotangents(saved, dy, axis, saved.shapes.value, -e, e * (wide(saved.gap) + 1))


def _with_log_bytes(log_predictions: Any, log_targets: Any, where: Any) -> int:
    shape = jnp.broadcast_shapes(log_predictions.shape, log_targets.shape)
    gap = jax.ShapeDtypeStruct(shape, jnp.result_type(log_predictions, log_targets))
    return nbytes(log_targets, gap, where)


@rule(
    forward=_with_log_forward,
    backward=_with_log_backward,
    static=["axis"],
    samples=[
        sample(normal(6, 5), normal(6, 5, mean=-2.0)),
        sample(normal(3, 5, 4), normal(1, 5, 4), axis=(0, 2), where=mask(3, 5, 4)),
        sample(normal(6, 5), impossible(-jnp.inf, 6, 5)),
    ],
    workloads=[sample(normal(4096, 3072), normal(4096, 3072))],
    keeps="exp(log_targets) (log_targets below float32), log_targets − log_predictions",
    minimum=_with_log_bytes,
)
def kl_divergence_with_log_targets(
    log_predictions: ArrayLike, log_targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """The Kullback-Leibler divergence of the predicted distribution from a target that is given by its logarithms.

    log_predictions [..., n], log_targets [..., n] of a shape that broadcasts with it -> [...]. A target of −inf costs nothing.

    Args:
      axis: the dimension of the distribution, several, or None for all.
      where: elements to include, of a shape that broadcasts with log_predictions.
    """
    _check("kl_divergence_with_log_targets", axis, where, log_predictions=log_predictions, log_targets=log_targets)
    return _sum(_with_log, log_predictions, log_targets, axis, where)
