"""Losses of a margin between scores, the linear models' way of telling classes apart.

    op                            value                                               cotangents
    hinge_loss                    max(0, 1 − o t), each element                       do = −t h dL,  dt = −o h dL
    perceptron_loss               max(0, −o t), each element                          the same
    sparsemax_loss                f(−z) where the label is 1, f(z) where it is 0      dz = ∓ clip((1 ∓ z) / 2, 0, 1) dL
    multiclass_hinge_loss         max_j (s_j + 1 − [j = y]) − s_y, each row           ds = (m − onehot(y)) dL
    multiclass_perceptron_loss    max_j s_j − s_y                                     the same
    multiclass_sparsemax_loss     Σ p (s − s_y) + ½ (1 − Σ p²), p nearest to s        ds = (p − onehot(y)) dL

h is 1 where the loss is positive, 0 where it is not, and ½ where its two pieces meet, as JAX has it for ``maximum``. m is 1 at
the largest element, shared evenly where several tie, as for ``jnp.max``. f(x) = 0 up to −1, x from 1 on, (x + 1)² / 4 between.

multiclass_sparsemax_loss is the Fenchel-Young loss of ½ (Σ p² − 1): p is the point of the probability simplex nearest to s,
max(s − τ, 0) with τ such that it sums to one. Because p maximizes Σ p s + ½ (1 − Σ p²), its own change has no part in the
gradient (the envelope theorem), and what remains is p − onehot(y). All rows of scores are shifted by their largest first.

The three of rows keep one array, the difference p − onehot(y) or where the maxima are (a byte an element), and the labels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.one_line import elementwise
from fbackprop.ops._arithmetic import float_type, nbytes, require_float, shapes, varying_like, wide
from fbackprop.rules import rule
from fbackprop.samples import labels as integer_labels
from fbackprop.samples import mask, normal, sample

__all__ = [
    "hinge_loss",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "perceptron_loss",
    "sparsemax_loss",
]


def _where_open(margin: jax.Array, slope: jax.Array) -> jax.Array:
    """The slope of max(0, margin), where that of the margin is given: nothing where it is closed, however large."""
    return jnp.where(margin > 0, slope, jnp.where(margin == 0, slope / 2, 0))


def _agreement(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    return wide(outputs) * wide(targets)


def _operands(predictor_outputs: Any, targets: Any) -> int:
    return nbytes(predictor_outputs, targets)


_BINARY: Any = {
    "samples": [sample(normal(4, 5), normal(4, 5)), sample(normal(6), integer_labels(6, classes=2))],
    "workloads": [sample(normal(4096, 3072), normal(4096, 3072))],
    "minimum": _operands,
}


@elementwise(
    lambda predictor_outputs, targets: _where_open(1 - predictor_outputs * targets, -targets),
    lambda predictor_outputs, targets: _where_open(1 - predictor_outputs * targets, -predictor_outputs),
    **_BINARY,
)
def hinge_loss(predictor_outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    """The hinge loss of two classes, each element by itself: max(0, 1 − predictor_outputs · targets).

    predictor_outputs [...], targets of a shape that broadcasts with it, each −1 or 1 -> [...].
    """
    require_float("hinge_loss", predictor_outputs=predictor_outputs)
    return jnp.maximum(1 - _agreement(predictor_outputs, targets), 0).astype(float_type(predictor_outputs, targets))


@elementwise(
    lambda predictor_outputs, targets: _where_open(-predictor_outputs * targets, -targets),
    lambda predictor_outputs, targets: _where_open(-predictor_outputs * targets, -predictor_outputs),
    **_BINARY,
)
def perceptron_loss(predictor_outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    """The perceptron loss of two classes, each element by itself: max(0, −predictor_outputs · targets).

    predictor_outputs [...], targets of the same shape, each −1 or 1 -> [...]. Source: Rosenblatt 1958.
    """
    require_float("perceptron_loss", predictor_outputs=predictor_outputs)
    if jnp.shape(predictor_outputs) != jnp.shape(targets):
        got = shapes(predictor_outputs=predictor_outputs, targets=targets)
        raise ValueError(f"perceptron_loss: predictor_outputs and targets must have one shape, got {got}.")
    return jnp.maximum(-_agreement(predictor_outputs, targets), 0).astype(float_type(predictor_outputs, targets))


def _against(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The logit of the other class."""
    return jnp.where(jnp.asarray(labels) != 0, -wide(logits), wide(logits))


def _sparse_slope(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    slope = jnp.clip((_against(logits, labels) + 1) / 2, 0, 1)
    return jnp.where(jnp.asarray(labels) != 0, -slope, slope).astype(jnp.result_type(logits))


@elementwise(
    lambda slope: slope,
    lambda: 0.0,
    between={"slope": _sparse_slope},
    samples=[sample(normal(4, 5), mask(4, 5)), sample(normal(4, 5, scale=2.0), integer_labels(1, 5, classes=2))],
    workloads=[sample(normal(4096, 3072), mask(4096, 3072))],
    keeps="the slope",
    minimum=lambda y: nbytes(y),
)
def sparsemax_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The sparsemax loss of two classes, each element by itself: 0 from a margin of 1 on, straight below −1.

    logits [...], labels of a shape that broadcasts with it, 0 or 1 -> [...], of the dtype of the logits. Whatever is not 0
    counts as 1. Source: Blondel, Martins & Niculae 2020, section 4.4.
    """
    require_float("sparsemax_loss", logits=logits)
    x = _against(logits, labels)
    value = jnp.where(x <= -1, 0, jnp.where(x >= 1, x, jnp.square(x + 1) / 4))
    return value.astype(jnp.result_type(logits))


class _RowsSaved(NamedTuple):
    largest: jax.Array  # where the maxima are
    labels: jax.Array


def _check_rows(who: str, scores: ArrayLike, labels: ArrayLike) -> None:
    require_float(who, scores=scores)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {jnp.result_type(labels)}.")
    if not jnp.ndim(scores) or not jnp.shape(scores)[-1] or jnp.shape(labels) != jnp.shape(scores)[:-1]:
        got = shapes(scores=scores, labels=labels)
        raise ValueError(f"{who}: expected scores [..., classes] of at least one class and labels [...], got {got}.")


def _one_hot(scores: jax.Array, labels: ArrayLike) -> jax.Array:
    """Where the label of each row stands; nowhere for a label outside of the classes."""
    classes = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    return classes == jnp.expand_dims(jnp.asarray(labels), -1)


def _largest_minus_own(scores: ArrayLike, labels: ArrayLike, margin: float) -> tuple[jax.Array, _RowsSaved]:
    s, own = wide(scores), _one_hot(jnp.asarray(scores), labels)
    raised = jnp.where(own, s, s + margin) if margin else s
    top = jnp.max(raised, -1, keepdims=True)
    value = jnp.squeeze(top, -1) - jnp.sum(jnp.where(own, s, 0), -1)
    return value.astype(jnp.result_type(scores)), _RowsSaved(raised == top, jnp.asarray(labels))


def _largest_forward(margin: float) -> Any:
    def forward(scores: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, _RowsSaved]:
        return _largest_minus_own(scores, labels, margin)

    return forward


def _largest_backward(saved: _RowsSaved, dy: jax.Array) -> tuple[Any, ...]:
    largest, g = saved.largest, jnp.expand_dims(wide(dy), -1)
    share = g / jnp.sum(largest.astype(g.dtype), -1, keepdims=True)
    return jnp.where(largest, share, 0) - jnp.where(_one_hot(largest, saved.labels), g, 0), None


_ROWS: Any = {
    "samples": [sample(normal(6, 5), integer_labels(6, classes=5)), sample(normal(2, 3, 4), integer_labels(2, 3, classes=4))],
    "workloads": [sample(normal(1024, 50257), integer_labels(1024, classes=50257))],
}
_LARGEST: Any = {**_ROWS, "keeps": "where the maxima are, one byte an element; labels"}


def _largest_bytes(scores: Any, labels: Any) -> int:
    return scores.size + nbytes(labels)


@rule(forward=_largest_forward(1.0), backward=_largest_backward, minimum=_largest_bytes, **_LARGEST)
def multiclass_hinge_loss(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The hinge loss of several classes: how far the label's score is from leading all others by 1.

    scores [..., classes], labels [...] integer -> [...], of the dtype of the scores. As in optax, a label outside of the
    classes stands nowhere: the loss is then the largest score plus 1.
    """
    _check_rows("multiclass_hinge_loss", scores, labels)
    return _largest_minus_own(scores, labels, 1.0)[0]


@rule(forward=_largest_forward(0.0), backward=_largest_backward, minimum=_largest_bytes, **_LARGEST)
def multiclass_perceptron_loss(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The perceptron loss of several classes: how far the label's score is below the largest.

    scores [..., classes], labels [...] integer -> [...], of the dtype of the scores. As in optax, a label outside of the
    classes stands nowhere: the loss is then the largest score. Source: Collins 2002.
    """
    _check_rows("multiclass_perceptron_loss", scores, labels)
    return _largest_minus_own(scores, labels, 0.0)[0]


class _SparseSaved(NamedTuple):
    excess: jax.Array  # p − onehot


def _sparse_value(z: jax.Array, labels: ArrayLike, p: jax.Array) -> jax.Array:
    own = jnp.take_along_axis(z, jnp.expand_dims(jnp.asarray(labels), -1), -1, mode="fill", fill_value=jnp.nan)
    # Σ p = 1, so that of the differences to s_y only one is left; in the support, z lies between −1 and 0.
    return jnp.sum(jnp.where(p > 0, p * z, 0), -1) + 0.5 * (1 - jnp.sum(jnp.square(p), -1)) - jnp.squeeze(own, -1)


def _below_highest(scores: ArrayLike) -> jax.Array:
    s = wide(scores)
    return s - jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True))


def _nearest(z: jax.Array) -> jax.Array:
    """The point of the simplex nearest to rows z whose largest element is 0.

    Without sorting: τ as if a set of elements were the support, then again of those above it. τ only rises, the set only
    shrinks, and when it stays the same it is the support; a handful of passes over rows that are not made to resist.
    """

    def threshold(low: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = z > low
        size = jnp.sum(inside, -1, keepdims=True, dtype=jnp.int32)
        return (jnp.sum(jnp.where(inside, z, 0), -1, keepdims=True) - 1) / size.astype(z.dtype), size

    def again(state: Any) -> Any:
        low, size, _ = state
        return *threshold(low), size

    rows = z[..., :1]
    everything = jnp.full_like(rows, z.shape[-1] + 1, jnp.int32)
    # From −1 on an element is never in the support. The last pass is outside of the loop, which has no reverse mode.
    start = jnp.full_like(rows, -1), everything, everything + 1
    low, _, _ = jax.lax.while_loop(lambda state: jnp.any(state[1] < state[2]), again, varying_like(start, z))
    tau = threshold(jax.lax.stop_gradient(low))[0]
    return jnp.where(z > tau, z - tau, 0)


def _sparse_forward(scores: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, _SparseSaved]:
    z = _below_highest(scores)
    p = _nearest(z)
    label = jnp.asarray(labels)
    own = _one_hot(p, jnp.where(label < 0, label + p.shape[-1], label))
    dtype = jnp.result_type(scores)
    return _sparse_value(z, labels, p).astype(dtype), _SparseSaved((p - own).astype(dtype))


def _sparse_backward(saved: _SparseSaved, dy: jax.Array) -> tuple[Any, ...]:
    return wide(saved.excess) * jnp.expand_dims(wide(dy), -1), None


@rule(
    forward=_sparse_forward,
    backward=_sparse_backward,
    samples=_ROWS["samples"],
    workloads=[sample(normal(1024, 4096), integer_labels(1024, classes=4096))],
    keeps="p − onehot(labels)",
    minimum=lambda scores: nbytes(scores),
)
def multiclass_sparsemax_loss(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The sparsemax loss of several classes: 0 as soon as the label's score leads all others by 1.

    scores [..., classes], labels [...] integer -> [...], of the dtype of the scores. A negative label counts from the end
    and a label beyond the classes gives NaN. Source: Martins & Astudillo 2016, arXiv:1602.02068.
    """
    _check_rows("multiclass_sparsemax_loss", scores, labels)
    z = _below_highest(scores)
    down = -jnp.sort(-z, -1)
    total = jnp.cumsum(jnp.where(down > -1, down, -1), -1)  # from −1 on an element is never in the support
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
    support = jnp.sum(1 + rank * down > total, -1, keepdims=True)
    threshold = (jnp.take_along_axis(total, support - 1, -1) - 1) / support.astype(z.dtype)
    p = jnp.where(z > threshold, z - threshold, 0)
    return _sparse_value(z, labels, p).astype(jnp.result_type(scores))
