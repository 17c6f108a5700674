"""cosine_similarity of vectors. Sums run over the elements of a vector, which ``where`` may leave out.

With the inverse lengths r_a = (max(Σ a², ε))^(−½), and r_b alike:

    c = r_a r_b Σ a b             da = (r_a r_b b − c k_a r_a² a) dc          db alike

    dε = −½ Σ c ((1 − k_a) r_a² + (1 − k_b) r_b²) dc

k is 1 where Σ a² > ε, 0 where it is less and r_a therefore constant, ½ where they are equal, as JAX has it for ``maximum``. A
vector of length 0 (ε = 0) has no direction: c = 0 and no cotangent.
"""

from collections.abc import Sequence
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
from fbackprop.rules import rule
from fbackprop.samples import constant, mask, normal, sample, uniform

__all__ = ["cosine_similarity"]

Axis = int | Sequence[int] | None


def _left_in(array: jax.Array, where: ArrayLike | None) -> jax.Array:
    return array if where is None else jnp.where(jnp.asarray(where), array, 0)


def inverse_length(square: jax.Array, epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 / √max(square, ε), 0 for 0; and k, how much of a change of ``square`` it follows."""
    bounded = jnp.maximum(square, epsilon)
    none = bounded == 0
    follows = jnp.where(square > epsilon, 1.0, jnp.where(square == epsilon, 0.5, 0.0)).astype(square.dtype)
    return jnp.where(none, 0, jax.lax.rsqrt(jnp.where(none, 1, bounded))), follows


class _CosineSaved(NamedTuple):
    predictions: jax.Array
    targets: jax.Array
    where: jax.Array | None
    squares: tuple[jax.Array, jax.Array]  # Σ a² and Σ b² of each row
    cosine: jax.Array  # of each row
    epsilon: jax.Array


def _cosine(
    predictions: ArrayLike, targets: ArrayLike, epsilon: ArrayLike, axis: Axis, where: ArrayLike | None
) -> tuple[jax.Array, _CosineSaved]:
    a, b = (wide(v) for v in (predictions, targets))
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a_, b_ = (_left_in(jnp.broadcast_to(v, shape), where) for v in (a, b))
    squares = (jnp.sum(jnp.square(a_), axis, keepdims=True), jnp.sum(jnp.square(b_), axis, keepdims=True))
    (r_a, _), (r_b, _) = (inverse_length(v, ranked(wide(epsilon), v)) for v in squares)
    cosine = jnp.sum((a_ * r_a) * (b_ * r_b), axis, keepdims=True)
    value = jnp.squeeze(cosine, canonical_axes("", axis, len(shape))).astype(float_type(predictions, targets, epsilon))
    kept = (jnp.asarray(predictions), jnp.asarray(targets), None if where is None else jnp.asarray(where))
    return value, _CosineSaved(*kept, squares, cosine, jnp.asarray(epsilon))


def _cosine_forward(
    predictions: ArrayLike, targets: ArrayLike, *, epsilon: ArrayLike = 0.0, axis: Axis = -1, where: ArrayLike | None = None
) -> tuple[jax.Array, _CosineSaved]:
    return _cosine(predictions, targets, epsilon, axis, where)


def _cosine_backward(saved: _CosineSaved, dy: jax.Array, *, axis: Axis) -> tuple[Any, ...]:
    a, b, c, epsilon = wide(saved.predictions), wide(saved.targets), saved.cosine, wide(saved.epsilon)
    (r_a, k_a), (r_b, k_b) = (inverse_length(v, ranked(epsilon, v)) for v in saved.squares)
    g = jnp.expand_dims(wide(dy), canonical_axes("", axis, c.ndim))
    both, own_a, own_b = g * (r_a * r_b), g * c * k_a * r_a * r_a, g * c * k_b * r_b * r_b
    da, db = _left_in(both * b - own_a * a, saved.where), _left_in(both * a - own_b * b, saved.where)
    depsilon = -0.5 * g * c * ((1 - k_a) * r_a * r_a + (1 - k_b) * r_b * r_b)
    return sum_to(da, a.shape), sum_to(db, b.shape), sum_to(depsilon, epsilon.shape), None


def _row_bytes(y: Any, array: Any) -> int:
    return y.size * wide_type(array).itemsize


@rule(
    forward=_cosine_forward,
    backward=_cosine_backward,
    static=["axis"],
    samples=[
        sample(normal(4, 5), normal(4, 5), epsilon=constant(5.0)),
        sample(normal(3, 4, 5), normal(1, 4, 5), axis=(0, 2), where=mask(3, 4, 5)),
        sample(constant(0.0, 2, 5), normal(2, 5), note="no direction"),
        sample(normal(4, 5), normal(4, 5), epsilon=uniform(4, 1, low=1.0, high=9.0)),
    ],
    workloads=[sample(normal(4096, 3072), normal(4096, 3072))],
    keeps="predictions, targets, three numbers a row",
    minimum=lambda predictions, targets, where, y: nbytes(predictions, targets, where) + 3 * _row_bytes(y, predictions) + 4,
)
def cosine_similarity(
    predictions: ArrayLike, targets: ArrayLike, *, epsilon: ArrayLike = 0.0, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """The cosine of the angle between two vectors, from −1 to 1.

    predictions [..., n], targets [..., n] of a shape that broadcasts with it -> [...]. A vector of length 0 has the cosine 0
    with every other, and receives no cotangent.

    Args:
      epsilon: the least square of a length: a number, or an array with an axis of length 1 in place of the vectors.
      axis: the dimension of the vectors, several, or None for all.
      where: elements to include, of a shape that broadcasts with predictions.
    """
    require_float("cosine_similarity", predictions=predictions, targets=targets)
    try:
        shape = jnp.broadcast_shapes(jnp.shape(predictions), jnp.shape(targets))
    except ValueError:
        got = shapes(predictions=predictions, targets=targets)
        raise ValueError(f"cosine_similarity: predictions and targets must broadcast together, got {got}.") from None
    axes = canonical_axes("cosine_similarity", axis, len(shape))
    rows = tuple(1 if i in axes else n for i, n in enumerate(shape))
    require_fit("cosine_similarity", rows, "one number a vector", epsilon=epsilon)
    return _cosine(predictions, targets, epsilon, axis, where)[0]
