"""Classification beyond the plain cross-entropy: poly_loss_cross_entropy, and smooth_labels.

poly_loss_cross_entropy on logits z, each row, with p = softmax(z) and m = Σ t p:

    L = Σ t (−log p + ε (1 − p))

    dz = (p Σ t − t + ε p (m − t)) dL      dt = (−log p + ε (1 − p)) dL      dε = Σ t (1 − p) dL

(∂p_j/∂z_k = p_j (δ_jk − p_k), so the second term sends back −ε Σ_j t_j p_j (δ_jk − p_k) = −ε p_k (t_k − m).) Where p is near
1, 1 − p is −expm1(log p). A label of 0 at a logit of −inf costs nothing. The forward keeps the sums that it has at hand, m for
dz and dL / dε, so that the backward needs but one, Σ t, and writes nothing to memory between logits and cotangents.

smooth_labels:

    y = (1 − α) t + α / n          dt = (1 − α) dy          dα = Σ (1 / n − t) dy          n classes in a row
"""

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
from fbackprop.ops.probabilities import Normalizer, log_normalizer, shifted_exp
from fbackprop.rules import rule
from fbackprop.samples import impossible, mask, normal, positive, probabilities, sample, uniform

__all__ = [
    "poly_loss_cross_entropy",
    "smooth_labels",
]

Axis = int | Sequence[int] | None


class _PolySaved(NamedTuple):
    logits: jax.Array
    normalizer: Normalizer
    mean: jax.Array  # m
    slope: jax.Array  # Σ t (1 − p), which dε is made of
    labels: jax.Array
    epsilon: jax.Array
    where: jax.Array | None


class _Poly(NamedTuple):
    """Of each class, with the classes that are left out as if they were not there."""

    log_p: jax.Array  # 0 where p = 0 and the label is 0: those count nothing
    e: jax.Array  # exp(z − max z), of which p is a share
    rest: jax.Array  # 1 − p
    labels: jax.Array
    counted: jax.Array  # labels, as the backward for logits sees them: of an impossible class a 0 that stays one


def _poly_parts(logits: ArrayLike, labels: ArrayLike, normalizer: Normalizer, where: jax.Array | None) -> _Poly:
    z, t = jnp.broadcast_arrays(wide(logits), wide(labels))
    t = t if where is None else jnp.where(where, t, 0)
    log_p = normalizer.log_probability(z)
    unlikely = (t == 0) & (z == -jnp.inf)
    unlikely = unlikely if where is None else unlikely | ~where
    log_p = jnp.where(unlikely, 0, log_p)
    counted = still(t, unlikely)
    return _Poly(log_p, shifted_exp(z, normalizer.top, where), jnp.where(unlikely, 1, -jnp.expm1(log_p)), t, counted)


def _poly(
    logits: ArrayLike, labels: ArrayLike, epsilon: ArrayLike, axis: Axis, where: jax.Array | None
) -> tuple[jax.Array, Normalizer, jax.Array, jax.Array]:
    """The loss, what probabilities are made of, Σ t p and Σ t (1 − p)."""
    normalizer = log_normalizer(jnp.asarray(logits), axis, where)
    log_p, e, rest, t, _ = _poly_parts(logits, labels, normalizer, where)
    weight = wide(epsilon)
    each = weight if weight.ndim == 0 else jnp.expand_dims(weight, canonical_axes("", axis, jnp.ndim(logits)))
    value = jnp.sum(t * (each * rest - log_p), axis)
    mean = jnp.sum(t * e, axis, keepdims=True) / normalizer.total
    return value.astype(float_type(logits, labels, epsilon)), normalizer, mean, jnp.sum(t * rest, axis)


def _rows_too(where: ArrayLike | None, logits: ArrayLike, axis: Axis) -> jax.Array | None:
    """``where`` [rows] leaves out whole rows; it gets the axes of the classes."""
    if where is None:
        return None
    mask = jnp.asarray(where)
    return mask if mask.ndim == jnp.ndim(logits) else jnp.expand_dims(mask, canonical_axes("", axis, jnp.ndim(logits)))


def _poly_forward(
    logits: ArrayLike, labels: ArrayLike, *, epsilon: ArrayLike = 2.0, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _PolySaved]:
    mask = _rows_too(where, logits, axis)
    value, normalizer, mean, slope = _poly(logits, labels, epsilon, axis, mask)
    given = jnp.asarray(labels), jnp.asarray(epsilon)
    return value, _PolySaved(jnp.asarray(logits), normalizer, mean, slope, *given, mask)


def _poly_backward(saved: _PolySaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    logits, normalizer, mean, slope, labels, epsilon, where = saved
    axes = canonical_axes("", axis, logits.ndim)
    log_p, e, rest, _, t = _poly_parts(logits, labels, normalizer, where)
    g, weight = (jnp.expand_dims(jnp.broadcast_to(wide(v), dy.shape), axes) for v in (dy, epsilon))
    # In two differences, each of which is exactly 0 where there is a single class. What a row has one of is divided first.
    plain = e * (jnp.sum(t, axes, keepdims=True) / normalizer.total) - t
    dlogits = (plain + e * (weight / normalizer.total) * (mean - t)) * g
    dlabels = (weight * rest - log_p) * g
    depsilon = slope * wide(dy)
    if where is not None:
        dlogits, dlabels = (jnp.where(where, d, 0) for d in (dlogits, dlabels))
    return sum_to(dlogits, logits.shape), sum_to(dlabels, labels.shape), sum_to(depsilon, epsilon.shape), None


@rule(
    forward=_poly_forward,
    backward=_poly_backward,
    static=["axis"],
    samples=[
        sample(normal(6, 5, scale=2.0), probabilities(6, 5), epsilon=positive()),
        sample(normal(3, 5, 4), probabilities(1, 5, 4), axis=(0, 2), where=mask(3, 5, 4)),
        sample(impossible(-jnp.inf, 6, 5), impossible(0.0, 6, 5)),
    ],
    workloads=[sample(normal(1024, 50257), probabilities(1024, 50257))],
    keeps="logits, labels, three numbers a row; one more where epsilon is differentiated",
    minimum=lambda logits, labels, where, y: nbytes(logits, labels, where) + 3 * y.size * wide_type(logits).itemsize + 4,
)
def poly_loss_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, epsilon: ArrayLike = 2.0, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy with more weight on its first term as a polynomial of 1 − p: Σ t (−log p + epsilon (1 − p)).

    logits [..., classes], labels of a shape that broadcasts to theirs -> [...]. A class with label 0 adds 0 where its logit
    is −inf, too. Source: Leng et al. 2022, arXiv:2204.12511.

    Args:
      epsilon: what is added to the weight of the first term.
      axis: the dimension of the classes, several, or None for all.
      where: classes to include, of a shape that broadcasts with logits.
    """
    who = "poly_loss_cross_entropy"
    require_float(who, logits=logits, labels=labels)
    canonical_axes(who, axis, jnp.ndim(logits))
    _must_broadcast(who, logits, labels)
    return _poly(logits, labels, epsilon, axis, _rows_too(where, logits, axis))[0]


def _must_broadcast(who: str, logits: ArrayLike, labels: ArrayLike) -> None:
    have, want = jnp.shape(labels), jnp.shape(logits)
    if len(have) > len(want) or any(a not in (1, b) for a, b in zip(reversed(have), reversed(want))):
        raise ValueError(f"{who}: labels must broadcast to the shape of logits, got {shapes(logits=logits, labels=labels)}.")


class _SmoothSaved(NamedTuple):
    labels: jax.Array
    alpha: jax.Array
    where: jax.Array | None


def _share(labels: ArrayLike, axis: Axis, where: ArrayLike | None) -> Any:
    """1 / n, the share of each class in its row."""
    if where is None:
        return 1 / max(count(jnp.shape(labels), canonical_axes("", axis, jnp.ndim(labels))), 1)
    return 1 / jnp.maximum(jnp.sum(jnp.asarray(where), axis, keepdims=True), 1).astype(wide_type(labels))


def _smooth(labels: ArrayLike, alpha: ArrayLike, axis: Axis, where: ArrayLike | None) -> jax.Array:
    a = wide(alpha)
    return ((1 - a) * wide(labels) + a * _share(labels, axis, where)).astype(float_type(labels, alpha))


def _smooth_forward(
    labels: ArrayLike, alpha: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _SmoothSaved]:
    mask = None if where is None else jnp.asarray(where)
    return _smooth(labels, alpha, axis, where), _SmoothSaved(jnp.asarray(labels), jnp.asarray(alpha), mask)


def _smooth_backward(saved: _SmoothSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    labels, alpha, where = saved
    dlabels = (1 - wide(alpha)) * wide(dy)
    dalpha = (_share(labels, axis, where) - wide(labels)) * wide(dy)
    return sum_to(dlabels, labels.shape), sum_to(dalpha, alpha.shape), None


@rule(
    forward=_smooth_forward,
    backward=_smooth_backward,
    static=["axis"],
    samples=[
        sample(probabilities(4, 5), uniform()),
        sample(probabilities(3, 4, 5), 0.1, axis=(0, 2), where=mask(3, 4, 5)),
    ],
    workloads=[sample(probabilities(4096, 3072), 0.1)],
    keeps="alpha; labels where alpha is differentiated",
    minimum=lambda labels: 4,
)
def smooth_labels(labels: ArrayLike, alpha: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None) -> jax.Array:
    """Mixes labels with the uniform distribution: y = (1 − alpha) labels + alpha / n.

    labels [..., n] -> y [..., n]. Source: Müller, Kornblith & Hinton 2019, arXiv:1906.02629.

    Args:
      alpha: the share of the uniform distribution, in [0, 1].
      axis: the dimension of the n classes, several, or None for all.
      where: the classes that count in n, of the shape of labels.
    """
    require_float("smooth_labels", labels=labels)
    canonical_axes("smooth_labels", axis, jnp.ndim(labels))
    if where is not None and (jnp.result_type(where) != jnp.bool_ or jnp.shape(where) != jnp.shape(labels)):
        got = f"{jnp.result_type(where)} {shapes(where=where, labels=labels)}"
        raise ValueError(f"smooth_labels: where must be booleans of the shape of labels, got {got}.")
    return _smooth(labels, alpha, axis, where)
