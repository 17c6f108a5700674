"""Contrastive losses: triplet_margin_loss of three vectors, and ntxent of all pairs of a batch.

triplet_margin_loss, with the distances d₊ of anchor a and positive p, d₋ of anchor and negative n, d = (Σ |a − p|^q + ε)^(1/q):

    L = max(d₊ − d₋ + margin, 0)

    dp = −h u₊ dL       dn = h u₋ dL       da = h (u₊ − u₋) dL        u = |a − p|^(q−1) sign(a − p) / d^(q−1)
    dmargin = Σ h dL    dε = Σ h (d₊^(1−q) − d₋^(1−q)) / q dL

with h = 1 where the loss is positive, 0 where it is not and ½ where its two pieces meet. An element without a difference, and a
distance of 0, receive nothing.

ntxent: unit vectors v_i = r_i x_i, similarities s_ij = v_i · v_j / τ. Over the M pairs i ≠ j of one label, with
D_i = log Σ exp(s_ik) over the k of other labels:

    L = (1/M) Σ softplus(D_i − s_ij)             G_ij = ∂L/∂s_ij = −σ(D_i − s_ij) / M for pairs of one label
                                                              = (Σ_j σ(D_i − s_ij) / M) exp(s_ij − D_i) for others
    dv = (G/τ + (G/τ)ᵀ) v      dx_i = r_i (dv_i − k_i v_i (v_i · dv_i))      dτ = −Σ G s / τ

All of it is made in the forward, so that only dx and dτ for dL = 1 are kept, and no [n, n] matrix; autodiff of the definition
in terms of pairs of vectors keeps n² vectors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import (
    canonical_axes,
    float_type,
    nbytes,
    ranked,
    require_fit,
    require_float,
    shapes,
    sum_to,
    wide,
    wide_type,
)
from fbackprop.ops.similarity import inverse_length
from fbackprop.rules import Static, rule
from fbackprop.samples import labels as integer_labels
from fbackprop.samples import normal, positive, sample

__all__ = ["ntxent", "triplet_margin_loss"]


def _row_bytes(y: Any, array: Any) -> int:
    return y.size * wide_type(array).itemsize


class _TripletSaved(NamedTuple):
    positive: jax.Array  # u₊
    negative: jax.Array  # u₋
    inverses: tuple[jax.Array, jax.Array]  # d₊^(1−q), d₋^(1−q), of each triplet
    slope: jax.Array  # h, likewise
    shapes: Static  # of the arguments that receive a cotangent


def _power(size: jax.Array, degree: float) -> jax.Array:
    return jnp.ones_like(size) if degree == 0 else size if degree == 1 else size * size if degree == 2 else size**degree


class _Distance(NamedTuple):
    value: jax.Array
    inverse: jax.Array  # d^(1−q), 0 where d = 0
    unit: jax.Array  # u, its slope


def _distance(difference: jax.Array, axis: int, degree: float, eps: jax.Array) -> _Distance:
    # The slope of |x| at 0 is 1, as JAX's. A power of 0 has no slope that is finite for every degree.
    size = jnp.where(difference >= 0, difference, -difference)
    total = jnp.sum(jnp.where(size == 0, 0, _power(jnp.where(size == 0, 1, size), degree)), axis) + eps
    none = total == 0
    value = jnp.where(none, 0, jnp.where(none, 1, total) ** (1 / degree))
    inverse = jnp.where(none, 0, jnp.where(none, 1, value) ** (1 - degree))
    unit = jnp.where(size == 0, 0, _power(size, degree - 1)) * jnp.expand_dims(inverse, axis)
    return _Distance(value, inverse, jnp.where(difference >= 0, unit, -unit))


def _triplet(
    anchors: ArrayLike, positives: ArrayLike, negatives: ArrayLike, axis: int, degree: float, margin: ArrayLike, eps: ArrayLike
) -> tuple[jax.Array, _TripletSaved]:
    near, far = (_distance(wide(anchors) - wide(other), axis, degree, wide(eps)) for other in (positives, negatives))
    margins = near.value - far.value + wide(margin)
    slope = jnp.where(margins > 0, 1, jnp.where(margins == 0, 0.5, 0)).astype(margins.dtype)
    given = (anchors, positives, negatives, margin, eps)
    dtype = float_type(*given)
    value = jnp.maximum(margins, 0).astype(dtype)
    units = (near.unit.astype(dtype), far.unit.astype(dtype))
    return value, _TripletSaved(*units, (near.inverse, far.inverse), slope, Static(tuple(map(jnp.shape, given))))


def _triplet_forward(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    axis: int = -1,
    norm_degree: float = 2,
    margin: ArrayLike = 1.0,
    eps: ArrayLike = 1e-6,
) -> tuple[jax.Array, _TripletSaved]:
    return _triplet(anchors, positives, negatives, axis, norm_degree, margin, eps)


def _triplet_backward(saved: _TripletSaved, dy: jax.Array, *, axis: int, norm_degree: float) -> tuple[Any, ...]:
    g, closed = saved.slope * wide(dy), saved.slope == 0
    deps = jnp.where(closed, 0, g * ((saved.inverses[0] - saved.inverses[1]) / norm_degree))
    near, far, rows, none = wide(saved.positive), wide(saved.negative), jnp.expand_dims(g, axis), jnp.expand_dims(closed, axis)
    # Where the loss is 0 a distance may be infinite. u₊ − u₋ is taken before the product, so that what is equal cancels.
    cotangents = (*(jnp.where(none, 0, rows * slope) for slope in (near - far, -near, far)), g, deps)
    return tuple(sum_to(d, shape) for d, shape in zip(cotangents, saved.shapes.value))


@rule(
    forward=_triplet_forward,
    backward=_triplet_backward,
    static=["axis", "norm_degree"],
    samples=[
        sample(normal(4, 5), normal(4, 5), normal(4, 5), margin=positive(), eps=positive()),
        sample(normal(3, 4, 5), normal(3, 4, 5), normal(3, 4, 5), axis=1, norm_degree=3.0),
        sample(normal(4, 5), normal(4, 5), normal(1, 5), norm_degree=1, margin=positive(4), eps=positive(1)),
    ],
    workloads=[sample(normal(4096, 3072), normal(4096, 3072), normal(4096, 3072))],
    keeps="the slopes of both distances, three numbers a row",
    minimum=lambda positives, negatives, y: nbytes(positives, negatives) + 3 * _row_bytes(y, positives),
)
def triplet_margin_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    axis: int = -1,
    norm_degree: float = 2,
    margin: ArrayLike = 1.0,
    eps: ArrayLike = 1e-6,
) -> jax.Array:
    """How far an anchor is from being nearer to its positive than to its negative by a margin.

    anchors, positives, negatives [..., n] of shapes that broadcast together -> [...].
    Source: Balntas et al. 2016; Schroff, Kalenichenko & Philbin 2015, arXiv:1503.03832.

    Args:
      axis: the dimension of the vectors.
      norm_degree: q of the distance (Σ |difference|^q + eps)^(1/q); 1 or more. (optax takes no absolute values, which for odd
        degrees is not a distance.)
      margin: by how much nearer. eps: added inside of the root. Numbers, or one for each triplet.
    """
    who = "triplet_margin_loss"
    require_float(who, anchors=anchors, positives=positives, negatives=negatives)
    given = {"anchors": anchors, "positives": positives, "negatives": negatives}
    try:
        shape = jnp.broadcast_shapes(*map(jnp.shape, given.values()))
    except ValueError:
        raise ValueError(f"{who}: shapes that do not broadcast together: {shapes(**given)}.") from None
    canonical_axes(who, axis, len(shape))
    if not norm_degree >= 1:
        raise ValueError(f"{who}: norm_degree must be 1 or more, got {norm_degree}.")
    left = tuple(n for i, n in enumerate(shape) if i != axis % len(shape))
    require_fit(who, left, "one number a triplet", margin=margin, eps=eps)
    return _triplet(anchors, positives, negatives, axis, norm_degree, margin, eps)[0]


class _Pairs(NamedTuple):
    units: jax.Array  # v
    inverse: jax.Array  # r
    follows: jax.Array  # k
    similarities: jax.Array  # s
    others: jax.Array  # log Σ exp(s) over other labels, of each row
    alike: jax.Array  # pairs of one label
    pairs: jax.Array  # M, at least 1


def _pairs(embeddings: ArrayLike, labels: ArrayLike, temperature: ArrayLike) -> _Pairs:
    x, label = wide(embeddings), jnp.asarray(labels)
    floor = jnp.asarray(jnp.finfo(jnp.result_type(embeddings)).eps, x.dtype)
    inverse, follows = inverse_length(jnp.sum(jnp.square(x), -1, keepdims=True), floor)
    units = x * inverse
    cosines = jnp.matmul(units, units.T, precision="highest")
    similarities = cosines / ranked(wide(temperature), cosines)
    same = label[:, None] == label[None, :]
    top = jax.lax.stop_gradient(jnp.max(similarities, -1, keepdims=True, where=~same, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.sum(jnp.where(same, 0, jnp.exp(jnp.where(same, 0, similarities - top))), -1, keepdims=True)
    others = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))
    alike = same & ~jnp.eye(label.size, dtype=bool)
    pairs = jnp.maximum(jnp.sum(alike), 1).astype(x.dtype)
    return _Pairs(units, inverse, follows, similarities, others, alike, pairs)


def _ntxent(pairs: _Pairs, dtype: Any) -> jax.Array:
    counts = pairs.alike & (pairs.others != -jnp.inf)
    lags = jax.nn.softplus(jnp.where(counts, pairs.others - pairs.similarities, 0))
    return (jnp.sum(jnp.where(counts, lags, 0)) / pairs.pairs).astype(dtype)


class _NtxentSaved(NamedTuple):
    dembeddings: jax.Array  # for dL = 1
    dtemperature: jax.Array


def _ntxent_forward(embeddings: ArrayLike, labels: ArrayLike, temperature: ArrayLike = 0.07) -> tuple[jax.Array, _NtxentSaved]:
    found = _pairs(embeddings, labels, temperature)
    units, inverse, follows, similarities, others, alike, pairs = found
    lag = jnp.where(alike, jax.nn.sigmoid(others - similarities), 0) / pairs
    own = jnp.eye(alike.shape[0], dtype=bool)
    other = jnp.where(alike | own, 0, jnp.exp(jnp.where(alike | own, 0, similarities - others)))
    slope = jnp.sum(lag, -1, keepdims=True) * other - lag  # G
    scaled = slope / ranked(wide(temperature), slope)
    dunits = jnp.matmul(scaled + scaled.T, units, precision="highest")
    dembeddings = inverse * (dunits - follows * units * jnp.sum(units * dunits, -1, keepdims=True))
    dtemperature = sum_to(-scaled * similarities, jnp.shape(temperature))
    some = jnp.any(alike & (others != -jnp.inf))  # else the loss is 0 whatever the vectors, and however infinite they are
    dembeddings, dtemperature = jnp.where(some, dembeddings, 0), jnp.where(some, dtemperature, 0)
    dtype = float_type(embeddings)
    return _ntxent(found, dtype), _NtxentSaved(dembeddings.astype(dtype), dtemperature)


def _ntxent_backward(saved: _NtxentSaved, dy: jax.Array) -> tuple[Any, ...]:
    return wide(saved.dembeddings) * wide(dy), None, saved.dtemperature * wide(dy)


@rule(
    forward=_ntxent_forward,
    backward=_ntxent_backward,
    samples=[
        sample(normal(6, 5), integer_labels(6, classes=3), positive()),
        sample(normal(8, 3), integer_labels(8, classes=2)),
        sample(normal(6, 5), integer_labels(6, classes=2), positive(6, 1)),
        sample(normal(4, 3), integer_labels(4, classes=1), note="nothing to tell apart"),
    ],
    workloads=[sample(normal(512, 256), integer_labels(512, classes=64))],
    keeps="dembeddings, dtemperature",
    minimum=lambda embeddings, temperature: nbytes(embeddings) + 4 * math.prod(jnp.shape(temperature)),
)
def ntxent(embeddings: ArrayLike, labels: ArrayLike, temperature: ArrayLike = 0.07) -> jax.Array:
    """The contrastive loss NT-Xent: vectors of one label are to be nearer to each other than to those of other labels.

    embeddings [n, d], labels [n] -> a scalar, the mean over all pairs of one label. Without such pairs, or without a second
    label, it is 0. Source: Chen et al. 2020, arXiv:2002.05709.

    Args:
      temperature: what the cosines are divided by, positive: a number, or an array that broadcasts to [n, n], the pairs.
    """
    require_float("ntxent", embeddings=embeddings)
    if jnp.ndim(embeddings) != 2 or jnp.shape(labels) != jnp.shape(embeddings)[:1]:
        got = shapes(embeddings=embeddings, labels=labels)
        raise ValueError(f"ntxent: expected embeddings [n, d] and labels [n], got {got}.")
    require_fit("ntxent", jnp.shape(labels) * 2, "[n, n] of the pairs", temperature=temperature)
    return _ntxent(_pairs(embeddings, labels, temperature), float_type(embeddings))
