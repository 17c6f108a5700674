"""Losses of one error e = p − t, prediction minus target (the prediction itself where no target is given).

    op                     value, each element                          slope s, so that dp = s dL and dt = −s dL
    squared_error          e²                                           2 e
    l2_loss                ½ e²                                         e
    huber_loss             ½ q² + δ (|e| − q), q = min(|e|, δ)          e, clipped to [−δ, δ]
    log_cosh               log((exp(e) + exp(−e)) / 2)                  tanh e

    mean_absolute_error    (1/n) Σ |e|, of all elements                 sign(e) / n, and 1 / n where e = 0

The error is all that the first four keep, for both cotangents; the last keeps one byte an element, whether e ≥ 0. Huber's
threshold receives dδ = Σ (|e| − δ) dL where |e| > δ.

log_cosh: with h = sinh(e/2), cosh e = 1 + 2 h², so for small errors log1p(2 h²), which does not cancel; for |e| ≥ 1 it is
|e| + log1p(exp(−2 |e|)) − log 2, which does not overflow. Sums are in float32 or wider.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.one_line import elementwise, opposite
from fbackprop.ops._arithmetic import float_type, nbytes, require_float, shapes, sum_to, wide
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, positive, sample

__all__ = ["huber_loss", "l2_loss", "log_cosh", "mean_absolute_error", "squared_error"]


def _wide_error(predictions: ArrayLike, targets: ArrayLike | None) -> jax.Array:
    return wide(predictions) if targets is None else wide(predictions) - wide(targets)


def _error(predictions: ArrayLike, targets: ArrayLike | None) -> jax.Array:
    given = (predictions,) if targets is None else (predictions, targets)
    return _wide_error(predictions, targets).astype(float_type(*given))


def _check(who: str, predictions: ArrayLike, targets: ArrayLike | None, alike: bool = False) -> None:
    require_float(who, predictions=predictions)
    if targets is None:
        return
    have, want = jnp.shape(targets), jnp.shape(predictions)
    try:
        fits = have == want or (not alike and bool(jnp.broadcast_shapes(have, want)))
    except ValueError:
        fits = False
    if not fits:
        must = "have the shape of predictions" if alike else "broadcast with predictions"
        raise ValueError(f"{who}: targets must {must}, got {shapes(predictions=predictions, targets=targets)}.")


def _bytes(predictions: Any, y: Any) -> int:
    return nbytes(jax.ShapeDtypeStruct(y.shape, y.dtype))


_PAIR: Any = {
    "between": {"error": _error},
    "workloads": [sample(normal(4096, 3072), normal(4096, 3072))],
    "keeps": "predictions − targets",
    "minimum": _bytes,
}


@elementwise(
    lambda error: 2 * error,
    opposite,
    samples=[sample(normal(4, 5), normal(4, 5)), sample(normal(6))],
    **_PAIR,
)
def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """The squared error, each element by itself: (predictions − targets)².

    predictions [...], targets of the same shape (0 where not given) -> [...].

    Raises:
      TypeError: where predictions are not floating-point. ValueError: where the shapes differ.
    """
    _check("squared_error", predictions, targets, alike=True)
    return jnp.square(_wide_error(predictions, targets)).astype(_error(predictions, targets).dtype)


@elementwise(
    lambda error: error,
    opposite,
    samples=[sample(normal(4, 5), normal(4, 5)), sample(normal(6))],
    **_PAIR,
)
def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Half the squared error, each element by itself: ½ (predictions − targets)², whose slope is the error.

    predictions [...], targets of the same shape (0 where not given) -> [...].

    Raises:
      TypeError: where predictions are not floating-point. ValueError: where the shapes differ.
    """
    _check("l2_loss", predictions, targets, alike=True)
    return (0.5 * jnp.square(_wide_error(predictions, targets))).astype(_error(predictions, targets).dtype)


def _excess(predictions: ArrayLike, targets: ArrayLike | None, delta: ArrayLike) -> jax.Array:
    return jnp.maximum(jnp.abs(_wide_error(predictions, targets)) - wide(delta), 0)


@elementwise(
    lambda error, delta: jnp.clip(error, -delta, delta),
    opposite,
    lambda excess: excess,
    between={"error": _error, "excess": _excess},
    samples=[sample(normal(4, 5, scale=2.0), normal(4, 5), delta=positive()), sample(normal(3, 4), normal(1, 4))],
    workloads=_PAIR["workloads"],
    keeps="predictions − targets, delta; what is beyond delta where delta is differentiated",
    minimum=lambda predictions, y: _bytes(predictions, y) + 4,
)
def huber_loss(predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0) -> jax.Array:
    """The Huber loss, each element by itself: half the squared error up to ``delta``, straight beyond.

    predictions [...], targets of a shape that broadcasts with it (0 where not given) -> [...]. Its slope is the error,
    clipped to [−delta, delta]. Source: Huber 1964.

    Args:
      delta: where the parabola ends, positive.
    """
    _check("huber_loss", predictions, targets)
    size, bound = jnp.abs(_wide_error(predictions, targets)), wide(delta)
    quadratic = jnp.minimum(size, bound)
    value = 0.5 * jnp.square(quadratic) + bound * (size - quadratic)
    return value.astype(float_type(_error(predictions, targets), delta))


@elementwise(
    lambda error: jnp.tanh(error),
    opposite,
    samples=[sample(normal(4, 5, scale=2.0), normal(4, 5)), sample(normal(6, scale=0.01))],
    **_PAIR,
)
def log_cosh(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """The logarithm of the hyperbolic cosine of the error: half its square where it is small, straight where it is large.

    predictions [...], targets of a shape that broadcasts with it (0 where not given) -> [...].
    """
    _check("log_cosh", predictions, targets)
    error = _wide_error(predictions, targets)
    small = jnp.abs(error) < 1
    near = jnp.log1p(2 * jnp.square(jnp.sinh(jnp.where(small, error, 0) / 2)))
    size = jnp.abs(jnp.where(small, 1, error))
    value = jnp.where(small, near, size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2))
    return value.astype(_error(predictions, targets).dtype)


class _SignSaved(NamedTuple):
    above: jax.Array  # whether the error is not negative
    shapes: Static  # of predictions and targets


def _absolute_forward(predictions: ArrayLike, targets: ArrayLike | None = None) -> tuple[jax.Array, _SignSaved]:
    error = _wide_error(predictions, targets)
    value = jnp.sum(jnp.abs(error)) / max(error.size, 1)
    kinds = tuple(None if v is None else (jnp.shape(v), jnp.result_type(v)) for v in (predictions, targets))
    return value.astype(_error(predictions, targets).dtype), _SignSaved(error >= 0, Static(kinds))


def _absolute_backward(saved: _SignSaved, dy: jax.Array) -> tuple[Any, ...]:
    (shape, _), target = saved.shapes.value
    d = jnp.where(saved.above, 1, -1) * (wide(dy) / max(saved.above.size, 1))
    own = target is not None and jnp.issubdtype(target[1], jnp.inexact)
    return sum_to(d, shape), sum_to(-d, target[0]) if target is not None and own else None


@rule(
    forward=_absolute_forward,
    backward=_absolute_backward,
    samples=[sample(normal(4, 5), normal(1, 5)), sample(normal(6))],
    workloads=_PAIR["workloads"],
    keeps="one byte an element",
    minimum=lambda predictions: math.prod(predictions.shape),
)
def mean_absolute_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """The mean of absolute errors over all elements.

    predictions [...], targets of a shape that broadcasts with it (0 where not given) -> a scalar. The slope of |e| at 0 is
    1, as JAX's. No elements give 0.
    """
    _check("mean_absolute_error", predictions, targets)
    error = _wide_error(predictions, targets)
    return (jnp.sum(jnp.abs(error)) / max(error.size, 1)).astype(_error(predictions, targets).dtype)
