"""Losses: squared errors, and cross-entropies on logits z.

    op                       value                                         cotangents
    sum_of_squares           L = Σ (p − t)²                                dp = 2 (p − t) dL        dt = −dp
    half_square              L = ½ Σ (p − t)²                              dp = (p − t) dL          dt = −dp
    mean_squared_error       L = (1/n) Σ (p − t)²                          dp = (2/n) (p − t) dL    dt = −dp

    sigmoid BCE              L = softplus(z) − t z, each element           dz = (σ(z) − t) dL       dt = −z dL
    softmax CE, integer      L = lse(z) − z[t], each row                   dz = (p − onehot(t)) dL
    softmax CE, soft         L = Σ t (lse(z) − z), each row                dz = (p Σt − t) dL       dt = (lse − z) dL

with lse(z) = log Σ exp(z) = m + log s, m = max z, s = Σ exp(z − m), and p = softmax(z) = exp(z − m) / s. The difference
"what was predicted minus what was wanted" is the first factor of every backward pass, and all that the squared errors keep.
So does the sigmoid BCE: σ(z) − t, and z only where labels are differentiated. The softmax cross-entropies keep exp(z − m), so
that the backward only multiplies, and two numbers a row. With integer labels these are s, and p[t] − 1 = exp(−L) − 1 for the
label's own element, which as the difference of a rounded p and 1 would lose its digits. With soft labels m and s, and z too
where labels are differentiated; below float32 z alone, for the same reason. A logit of +inf takes the probability of its row,
which receives a gradient of 0. Sums are in float32 or wider.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import (
    canonical_axes,
    count,
    float_type,
    nbytes,
    require_float,
    shapes,
    still,
    sum_to,
    wide,
    wide_type,
)
from fbackprop.ops.probabilities import Normalizer, highest, log_normalizer, shifted_exp
from fbackprop.rules import rule
from fbackprop.samples import constant, impossible, mask, normal, probabilities, sample, uniform
from fbackprop.samples import labels as integer_labels

__all__ = [
    "half_square",
    "mean_squared_error",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "sum_of_squares",
]


class _SquaredSaved(NamedTuple):
    error: jax.Array


def _check_pair(who: str, predictions: ArrayLike, targets: ArrayLike) -> None:
    require_float(who, predictions=predictions, targets=targets)
    if jnp.shape(predictions) != jnp.shape(targets):
        raise ValueError(
            f"{who}: predictions and targets must have one shape, got {shapes(predictions=predictions, targets=targets)}."
        )


def _squared(predictions: ArrayLike, targets: ArrayLike, factor: float) -> tuple[jax.Array, _SquaredSaved]:
    error = wide(predictions) - wide(targets)
    value = factor * jnp.sum(jnp.square(error))
    dtype = jnp.result_type(predictions, targets)
    return value.astype(dtype), _SquaredSaved(error.astype(dtype))


def _squared_forward(factor: Any) -> Any:
    def forward(predictions: ArrayLike, targets: ArrayLike) -> tuple[jax.Array, _SquaredSaved]:
        return _squared(predictions, targets, factor(predictions))

    return forward


def _squared_backward(factor: Any) -> Any:
    def backward(saved: _SquaredSaved, dy: jax.Array) -> tuple[Any, ...]:
        dpredictions = 2 * factor(saved.error) * wide(saved.error) * wide(dy)
        return dpredictions, -dpredictions

    return backward


def _one(_: ArrayLike) -> float:
    return 1.0


def _half(_: ArrayLike) -> float:
    return 0.5


def _one_over_n(predictions: ArrayLike) -> float:
    return 1.0 / max(jnp.size(predictions), 1)


_PAIRS = {
    "samples": [sample(normal(4, 3), normal(4, 3)), sample(normal(), normal())],
    "workloads": [sample(normal(4096, 3072), normal(4096, 3072))],
    "keeps": "predictions − targets",
    "minimum": lambda predictions, y: nbytes(jax.ShapeDtypeStruct(predictions.shape, y.dtype)),
}


@rule(forward=_squared_forward(_one), backward=_squared_backward(_one), **_PAIRS)
def sum_of_squares(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """The sum of squared errors: Σ (predictions − targets)².

    predictions [...], targets [...] of the same shape -> a scalar.
    """
    _check_pair("sum_of_squares", predictions, targets)
    return _squared(predictions, targets, 1.0)[0]


@rule(forward=_squared_forward(_half), backward=_squared_backward(_half), **_PAIRS)
def half_square(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Half the sum of squared errors: ½ Σ (predictions − targets)², whose derivative is the error itself.

    predictions [...], targets [...] of the same shape -> a scalar.
    """
    _check_pair("half_square", predictions, targets)
    return _squared(predictions, targets, 0.5)[0]


@rule(forward=_squared_forward(_one_over_n), backward=_squared_backward(_one_over_n), **_PAIRS)
def mean_squared_error(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """The mean of squared errors over all elements: (1/n) Σ (predictions − targets)².

    predictions [...], targets [...] of the same shape -> a scalar. Also called MSE.
    """
    _check_pair("mean_squared_error", predictions, targets)
    if math.prod(jnp.shape(predictions)) == 0:
        raise ValueError(f"mean_squared_error: no elements to average over ({shapes(predictions=predictions)}).")
    return _squared(predictions, targets, _one_over_n(predictions))[0]


class _SigmoidSaved(NamedTuple):
    logits: jax.Array | None  # z, for dt
    error: jax.Array | None  # σ(z) − t, for dz
    labels: jax.Array | None  # t in place of the error, where it is smaller than that or of another shape


def _sigmoid_bce(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    z, t = wide(logits), wide(labels)
    # softplus(z) − t z. Where t is 1 this is softplus(−z), and both terms are large: add what does not cancel,
    # max(z, 0) − t z, first.
    # |z| stands as a choice, so that at z = 0 autodiff of this definition takes one side for both terms: σ(0) − t.
    value = jnp.where(z > 0, (1 - t) * z, -t * z) + jnp.log1p(jnp.exp(jnp.where(z > 0, -z, z)))
    return value.astype(jnp.result_type(logits))


def _sigmoid_error(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """σ(z) − t, with the smaller of σ(z) and σ(−z) computed and not 1 minus the larger."""
    z, t = wide(logits), wide(labels)
    return jnp.where(z > 0, (1 - t) - jax.nn.sigmoid(-z), jax.nn.sigmoid(z) - t)


def _keeps_error(logits: Any, labels: Any) -> bool:
    """One array for each cotangent: with labels that are not differentiated, half of what logits and labels would be."""
    return jnp.shape(logits) == jnp.shape(labels)


def _sigmoid_forward(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, _SigmoidSaved]:
    y, logits = _sigmoid_bce(logits, labels), jnp.asarray(logits)
    if not _keeps_error(logits, labels):
        return y, _SigmoidSaved(logits, None, jnp.asarray(labels))
    floating = jnp.issubdtype(jnp.result_type(labels), jnp.inexact)
    return y, _SigmoidSaved(logits if floating else None, _sigmoid_error(logits, labels).astype(logits.dtype), None)


def _sigmoid_backward(saved: _SigmoidSaved, dy: jax.Array) -> tuple[Any, ...]:
    logits, error, labels, g = *saved, wide(dy)
    if error is not None:
        return wide(error) * g, None if logits is None else -wide(logits) * g
    assert logits is not None
    assert labels is not None
    dlabels = None if not jnp.issubdtype(labels.dtype, jnp.inexact) else sum_to(-wide(logits) * g, labels.shape)
    return sum_to(_sigmoid_error(logits, labels) * g, logits.shape), dlabels


@rule(
    forward=_sigmoid_forward,
    backward=_sigmoid_backward,
    samples=[
        sample(normal(4, 5, scale=2.0), uniform(4, 5)),
        sample(normal(6, scale=4.0), mask(6)),
        sample(normal(4, 5), uniform(1, 5)),
        sample(normal(6, mean=20.0), constant(1.0, 6), note="the term that does not cancel"),
        sample(normal(6, mean=-20.0), constant(0.0, 6)),
        sample(normal(6, mean=-20.0), constant(1e-9, 6)),
        sample(normal(6, mean=20.0), mask(6, keep=1.0)),
        sample(normal(6, mean=-20.0), mask(6, keep=0.0)),
        sample(normal(4, 5, mean=20.0), constant(1.0, 1, 5)),
        sample(normal(4, 5, mean=-20.0), constant(0.0, 1, 5)),
    ],
    workloads=[sample(normal(4096, 3072), uniform(4096, 3072))],
    keeps="σ(z) − t, and logits where labels are differentiated; logits, labels where their shapes differ",
    minimum=lambda logits, labels: nbytes(
        logits, labels if jnp.issubdtype(labels.dtype, jnp.inexact) or not _keeps_error(logits, labels) else None
    ),
)
def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Binary cross-entropy on logits, each element by itself: −t log σ(z) − (1 − t) log(1 − σ(z)).

    logits [...], labels of a shape that broadcasts with it, in [0, 1] (booleans and integers too) -> [...]. Also called BCE.
    """
    require_float("sigmoid_binary_cross_entropy", logits=logits)
    return _sigmoid_bce(logits, labels)


class _IntegerSaved(NamedTuple):
    exponentials: jax.Array  # exp(z − m), in the dtype of the logits
    total: jax.Array  # s of each row
    excess: jax.Array  # p[t] − 1 of each row; 0 where it has no classes
    labels: jax.Array


def _class_mask(where: ArrayLike | None, axis: Any, ndim: int) -> jax.Array | None:
    """``where`` of the shape [rows] leaves out whole rows, as in optax; it gets the axes of the classes."""
    if where is None:
        return None
    where = jnp.asarray(where)
    return where if where.ndim == ndim else jnp.expand_dims(where, axis)


def _class_axes(who: str, axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of the classes, in the order given: over several, a label counts in row-major order of that."""
    canonical_axes(who, axis, ndim)
    return tuple(a % ndim for a in ((axis,) if isinstance(axis, int) else axis))


def _chosen(shape: Sequence[int], labels: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Where the label of each row stands: booleans of the shape of the logits, which XLA fuses and never stores."""
    label, position, classes = jnp.expand_dims(labels, axes), 0, 1
    for axis in reversed(axes):  # the number of each class, over several axes in row-major order
        position = position + classes * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        classes *= shape[axis]
    return jnp.equal(position, jnp.where(label < 0, label + classes, label))


def _at_labels(array: jax.Array, labels: jax.Array, axes: tuple[int, ...], beyond: Any) -> jax.Array:
    """The label's element of each row of an array of the shape of the logits."""
    last = jnp.moveaxis(array, axes, range(array.ndim - len(axes), array.ndim)).reshape(*labels.shape, count(array.shape, axes))
    return jnp.take_along_axis(last, labels[..., None], axis=-1, mode="fill", fill_value=beyond)[..., 0]


def _integer(
    logits: jax.Array, labels: jax.Array, axes: tuple[int, ...], where: jax.Array | None
) -> tuple[jax.Array, Normalizer]:
    """The loss in float32 or wider, and what the probabilities are made of."""
    normalizer = log_normalizer(logits, axes, where)
    # The label's logit is gathered, one element a row. Labels beyond the classes give NaN, which nobody overlooks.
    picked = wide(_at_labels(logits, labels, axes, jnp.nan))
    rows = Normalizer(*(part.reshape(labels.shape) for part in normalizer))
    value = -rows.log_probability(picked)
    value = jnp.where((rows.total == jnp.inf) & (picked == jnp.inf), 0, value)  # a logit of +inf: p = 1, not inf / inf
    if where is not None:
        value = jnp.where(jnp.any(where, axes), value, 0)  # a row without classes costs nothing
    return value, normalizer


def _integer_forward(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _IntegerSaved]:
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    axes = _class_axes("", axis, logits.ndim)
    where = _class_mask(where, axes, logits.ndim)
    value, normalizer = _integer(logits, labels, axes, where)
    # As inside of the sum: the compiler forms them once.
    e = shifted_exp(wide(logits), normalizer.top, where).astype(logits.dtype)
    excess = jnp.expm1(-value)
    if where is not None:  # a label that is left out has p[t] = 0
        left_in = _at_labels(jnp.broadcast_to(where, logits.shape), labels, axes, False)
        excess = jnp.where(left_in, excess, jnp.where(jnp.any(where, axes), -1, 0))
    return value.astype(logits.dtype), _IntegerSaved(e, normalizer.total, excess, labels)


def _integer_backward(saved: _IntegerSaved, dy: jax.Array, *, axis: int | Sequence[int]) -> tuple[Any, ...]:
    e, total, excess, labels = saved
    axes = _class_axes("", axis, e.ndim)
    g = wide(dy)
    d = wide(e) * (jnp.expand_dims(g, axes) / total)
    d = jnp.where(_chosen(e.shape, labels, axes), jnp.expand_dims(excess * g, axes), d)
    return jnp.where(total == jnp.inf, 0, d), None, None  # nothing finite moves a row with +inf


@rule(
    forward=_integer_forward,
    backward=_integer_backward,
    static=["axis"],
    samples=[
        sample(normal(6, 5, scale=2.0), integer_labels(6, classes=5)),
        sample(normal(3, 5, 4), integer_labels(3, 4, classes=5), axis=1),
        sample(normal(6, 5), integer_labels(6, classes=5), where=mask(6, 5)),
        sample(normal(2, 3, 4), integer_labels(2, classes=12), axis=(1, 2)),
        sample(normal(9, 5, scale=30.0), integer_labels(9, classes=5, low=-5)),
        sample(normal(3, 5, 4), integer_labels(3, 4, classes=0, low=-5), axis=1),
        sample(normal(2, 3, 4), integer_labels(2, classes=0, low=-12), axis=(2, -2)),
        sample(normal(9, 5), integer_labels(9, classes=5, low=-5), where=mask(9, 5, keep=0.2)),
    ],
    workloads=[sample(normal(1024, 50257), integer_labels(1024, classes=50257), dtype=d) for d in ("float32", "bfloat16")],
    keeps="exp(logits − their largest), labels, two numbers a row",
    minimum=lambda logits, labels: nbytes(logits, labels) + 2 * labels.size * wide_type(logits).itemsize,
)
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy of softmax(logits) against one class for each row: log Σ exp(z) − z[label].

    logits [..., classes], labels [...] integer -> [...], of the dtype of the logits.

    As in optax, a negative label counts from the end and a label beyond the classes gives NaN.

    Args:
      axis: the dimension of the classes, or several, over which a label counts in row-major order, as they are given.
      where: classes to include in the normalizer, of a shape that broadcasts with logits.
    Raises:
      TypeError: where logits are not floating-point or labels not integers. ValueError: where the shapes do not fit.
    """
    who = "softmax_cross_entropy_with_integer_labels"
    require_float(who, logits=logits)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {jnp.result_type(labels)}; soft labels: softmax_cross_entropy.")
    axes = _class_axes(who, axis, jnp.ndim(logits))
    rows = tuple(n for i, n in enumerate(jnp.shape(logits)) if i not in axes)
    if jnp.shape(labels) != rows:
        raise ValueError(
            f"{who}: labels must have the shape of the logits without the classes, {rows}; got "
            f"{shapes(logits=logits, labels=labels)}."
        )
    value = _integer(jnp.asarray(logits), jnp.asarray(labels), axes, _class_mask(where, axes, jnp.ndim(logits)))[0]
    return value.astype(jnp.result_type(logits))


def _most(logits: ArrayLike) -> float:
    """What +inf counts as, so that ∞ − ∞ never appears: classes of +inf share all the probability of their row."""
    return float(jnp.finfo(jnp.result_type(logits)).max)


def _infinite(normalizer: Normalizer, logits: ArrayLike) -> jax.Array:
    """Rows with a logit of +inf. Nothing that is finite moves their loss: they receive no cotangent."""
    return normalizer.top == _most(logits)


class _SoftSaved(NamedTuple):
    exponentials: jax.Array | None  # in float32 and wider
    logits: jax.Array  # for dt; below float32 for dz too
    normalizer: Normalizer
    labels: jax.Array
    where: jax.Array | None


class _Soft(NamedTuple):
    value: jax.Array
    exponentials: jax.Array
    normalizer: Normalizer


def _finite(logits: ArrayLike) -> jax.Array:
    return jnp.minimum(wide(logits), _most(logits))


def _exponentials(z: jax.Array, top: jax.Array, where: jax.Array | None) -> jax.Array:
    """exp(z − m), 0 for classes that are left out, and −0, which is all that tells it from an underflow, for z = −inf."""
    return jnp.where(z == -jnp.inf, -0.0, shifted_exp(z, top, where))


def _surprise(z: jax.Array, normalizer: Normalizer, t: jax.Array, weight: jax.Array | int = 1) -> jax.Array:
    """weight · (lse − z), and lse − z = −log p. A class of label zero costs nothing, however impossible: 0 · ∞ counts as 0."""
    impossible = (t == 0) & (z == -jnp.inf)
    # The second choice comes last, so that a weighted sum of this is one array to the compiler, and not the weights and one.
    return jnp.where(impossible, 0, weight * -normalizer.log_probability(jnp.where(impossible, 0, z)))


def _soft(logits: ArrayLike, labels: ArrayLike, axis: Any, where: jax.Array | None) -> _Soft:
    z, t = _finite(logits), wide(labels)
    top = highest(jnp.asarray(logits), axis, where, _most(logits))
    e = _exponentials(z, top, where)
    total = jnp.sum(e, axis, keepdims=True)
    normalizer = Normalizer(top, jnp.where(total == 0, 1, total))
    terms = _surprise(z, normalizer, t, t)
    value = jnp.sum(terms if where is None else jnp.where(where, terms, 0), axis)
    value = still(value, _infinite(normalizer, logits).reshape(value.shape))
    return _Soft(value.astype(float_type(logits, labels)), e, normalizer)


def _soft_forward(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _SoftSaved]:
    where = _class_mask(where, axis, jnp.ndim(logits))
    value, e, normalizer = _soft(logits, labels, axis, where)
    logits = jnp.asarray(logits)
    return value, _SoftSaved(e if e.dtype == logits.dtype else None, logits, normalizer, jnp.asarray(labels), where)


def _soft_backward(saved: _SoftSaved, dy: jax.Array, *, axis: int | Sequence[int] | None) -> tuple[Any, ...]:
    e, logits, normalizer, labels, where = saved
    z, t = _finite(logits), wide(labels)
    if e is None:
        e = _exponentials(z, normalizer.top, where)
    g = jnp.expand_dims(wide(dy), canonical_axes("", axis, logits.ndim))
    g = jnp.where(_infinite(normalizer, logits), 0, g)
    counted = t if where is None else jnp.where(where, t, 0)
    # An impossible class has t = 0, a constant where the backward is differentiated. The compiler sees t itself, and nothing
    # to be written out before the sum.
    impossible = jnp.signbit(e)
    counted = still(counted, (t == 0) & impossible)
    total = jnp.sum(jnp.broadcast_to(counted, z.shape), axis, keepdims=True)
    # What each row has one of is divided first: the exponentials, which the compiler has from the forward, meet one factor.
    dlogits = (jnp.where(impossible, 0, e * (total / normalizer.total)) - counted) * g
    dlabels = _surprise(z, normalizer, t) * g
    if where is not None:
        dlogits, dlabels = jnp.where(where, dlogits, 0), jnp.where(where, dlabels, 0)
    floating = jnp.issubdtype(labels.dtype, jnp.inexact)
    return dlogits, sum_to(dlabels, labels.shape) if floating else None, None


def _soft_bytes(logits: Any, labels: Any, where: Any, y: Any) -> int:
    """Without the exponentials, twice the time of exp is spent."""
    exponentials = logits if logits.dtype == wide_type(logits) and jnp.issubdtype(labels.dtype, jnp.inexact) else None
    return nbytes(exponentials, logits, labels, where) + 2 * y.size * wide_type(logits).itemsize


@rule(
    forward=_soft_forward,
    backward=_soft_backward,
    static=["axis"],
    samples=[
        sample(normal(6, 5, scale=2.0), probabilities(6, 5)),
        sample(normal(3, 5, 4), probabilities(3, 5, 4), axis=1),
        sample(normal(6, 5), probabilities(6, 5), where=mask(6, 5)),
        sample(impossible(-math.inf, 6, 5), impossible(0.0, 6, 5)),
        sample(impossible(-math.inf, 3, 5, 4), impossible(0.0, 3, 5, 4), axis=1),
        sample(impossible(-math.inf, 6, 5), impossible(0.0, 6, 5), where=mask(6, 5)),
        sample(normal(6, 5), impossible(0.0, 6, 5)),
        sample(normal(3, 5, 4), impossible(0.0, 3, 5, 4), axis=1),
        sample(normal(6, 5), impossible(0.0, 6, 5), where=mask(6, 5)),
    ],
    workloads=[
        sample(normal(1024, 50257), probabilities(1024, 50257)),
        sample(normal(1024, 50257), probabilities(1024, 50257), note="labels frozen"),
    ],
    keeps="exp(logits − their largest), labels, two numbers a row; logits where labels are differentiated",
    minimum=_soft_bytes,
)
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy of softmax(logits) against a distribution for each row: −Σ t log softmax(z).

    logits [..., classes], labels of a shape that broadcasts to theirs -> [...].

    The labels are usually probabilities, but need not sum to one. A class with label 0 adds 0 even where its logit is −inf.

    Args:
      axis: the dimension of the classes, several, or None for all.
      where: classes to include, of a shape that broadcasts with logits.
    """
    require_float("softmax_cross_entropy", logits=logits)
    canonical_axes("softmax_cross_entropy", axis, jnp.ndim(logits))
    have, want = jnp.shape(labels), jnp.shape(logits)
    if len(have) > len(want) or any(a not in (1, b) for a, b in zip(reversed(have), reversed(want))):
        raise ValueError(
            f"softmax_cross_entropy: labels must broadcast to the shape of logits, got {shapes(logits=logits, labels=labels)}."
        )
    return _soft(logits, labels, axis, _class_mask(where, axis, jnp.ndim(logits))).value
