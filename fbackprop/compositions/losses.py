"""Losses that are compositions of others. Their backward is that of the ops inside."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.ops._arithmetic import require_float, shapes, wide

__all__ = [
    "binary_dice_loss",
    "convex_kl_divergence",
    "cosine_distance",
    "ctc_loss",
    "make_fenchel_young_loss",
    "multiclass_generalized_dice_loss",
    "ranking_softmax_loss",
    "safe_softmax_cross_entropy",
]

Axis = int | Sequence[int] | None


def safe_softmax_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Cross-entropy of softmax(logits) in which a label of 0 costs nothing, however impossible its class is.

    logits [..., classes], labels of a shape that broadcasts with it -> [...]. A composition: ``softmax_cross_entropy`` of this
    library counts 0 · log 0 as 0 in any case.
    """
    return ops.softmax_cross_entropy(logits, labels)


def ranking_softmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: Callable[..., Any] | None = jnp.mean,
) -> jax.Array:
    """Cross-entropy between the scores of a list of items and their relevance, averaged over the lists.

    logits [..., items], labels [..., items] -> a number, or [...] where reduce_fn is None. A composition of
    ``softmax_cross_entropy`` with the labels times their weights, and of the mean.

    Args:
      where: items to include, [..., items]; a list without items counts nothing, and no lists at all give 0.
      weights: of each item, [..., items].
      reduce_fn: ``jnp.mean``, ``jnp.sum``, another function that takes ``where``, or None.
    """
    require_float("ranking_softmax_loss", logits=logits)
    relevance = jnp.asarray(labels).astype(jnp.result_type(logits))
    relevance = relevance if weights is None else relevance * jnp.asarray(weights)
    included = None if where is None else jnp.broadcast_to(jnp.asarray(where), jnp.shape(logits))
    loss = ops.softmax_cross_entropy(logits, relevance, where=included)
    if reduce_fn is None:
        return loss
    if included is None:
        return reduce_fn(loss)
    lists = jnp.any(included, -1)
    return jnp.where(jnp.any(lists), reduce_fn(loss, where=lists | ~jnp.any(lists)), 0)


def ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
) -> jax.Array:
    """The CTC loss of each sequence: −log of the probability that its frames spell its labels.

    logits [batch, frames, classes], logit_paddings [batch, frames], labels [batch, N], label_paddings [batch, N] -> [batch].
    A composition of ``ctc_loss_with_forward_probs``, whose first output it is, and whose arguments it takes.
    """
    found = ops.ctc_loss_with_forward_probs(
        logits, logit_paddings, labels, label_paddings, blank_id=blank_id, log_epsilon=log_epsilon
    )
    return found[0]


def make_fenchel_young_loss(max_fun: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Makes the Fenchel-Young loss of a function Ω* such as ``fb.logsumexp``: Ω*(scores) − Σ targets · scores.

    A composition of ``max_fun`` and a product: the gradient for scores is that of ``max_fun``, its argmax, minus the targets.

    Args:
      max_fun: from scores [n] (and more arguments) to a number.
    Returns:
      ``loss(scores, targets, *args, **kwargs)``: scores [..., n], targets [..., n] -> [...].
      Source: Blondel, Martins & Niculae 2020, arXiv:1901.02324.
    """
    if not callable(max_fun):
        raise TypeError(f"make_fenchel_young_loss: max_fun must be a function of scores, got {type(max_fun).__name__}.")

    def fenchel_young_loss(scores: ArrayLike, targets: ArrayLike, *args: Any, **kwargs: Any) -> jax.Array:
        if not jnp.ndim(scores) or jnp.shape(scores)[-1:] != jnp.shape(targets)[-1:]:
            given = shapes(scores=scores, targets=targets)
            raise ValueError(f"fenchel_young_loss: expected scores [..., n] and targets [..., n], got {given}.")
        of_rows = jnp.vectorize(lambda row: max_fun(row, *args, **kwargs), signature="(n)->()")
        return of_rows(scores) - jnp.vectorize(jnp.vdot, signature="(n),(n)->()")(targets, scores)

    return fenchel_young_loss


def convex_kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """The former name of ``generalized_kl_divergence``, deprecated as it is in optax: a composition of that alone.

    log_predictions [..., n], targets [..., n] -> [...].
    """
    warnings.warn("convex_kl_divergence is deprecated: use generalized_kl_divergence.", DeprecationWarning, stacklevel=2)
    return ops.generalized_kl_divergence(log_predictions, targets, axis, where)


def cosine_distance(
    predictions: ArrayLike, targets: ArrayLike, *, epsilon: ArrayLike = 0.0, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """One minus the cosine of the angle between two vectors: a composition of ``cosine_similarity``.

    predictions [..., n], targets [..., n] of a shape that broadcasts with it -> [...]. The arguments are those of
    ``cosine_similarity``.
    """
    return 1 - ops.cosine_similarity(predictions, targets, epsilon=epsilon, axis=axis, where=where)


def multiclass_generalized_dice_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    smooth: ArrayLike = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
) -> jax.Array:
    """The Dice loss with classes weighted by the inverse square of how often they occur: a composition of ``dice_loss``.

    predictions [batch, ..., classes] logits, targets of the same shape, one-hot -> a scalar, the mean over classes and batch.
    Source: Sudre et al. 2017, arXiv:1707.03237.

    Args:
      smooth, apply_softmax, ignore_background: as for ``dice_loss``.
    """
    if jnp.shape(predictions) != jnp.shape(targets):
        got = shapes(predictions=predictions, targets=targets)
        raise ValueError(f"multiclass_generalized_dice_loss: predictions and targets must have one shape, got {got}.")
    frequencies = jnp.sum(wide(targets), tuple(range(jnp.ndim(targets) - 1)))
    rare = 1 / (jnp.square(frequencies) + 1e-7)
    loss = ops.dice_loss(
        predictions,
        targets,
        class_weights=rare / jnp.sum(rare) * rare.size,
        smooth=smooth,
        apply_softmax=apply_softmax,
        reduction="none",
        ignore_background=ignore_background,
    )
    return jnp.mean(loss)


def binary_dice_loss(
    predictions: ArrayLike, targets: ArrayLike, *, smooth: ArrayLike = 1.0, apply_sigmoid: bool = True
) -> jax.Array:
    """The Dice loss of one class: a composition of ``dice_loss``.

    predictions [batch, ...] or [batch, ..., 1] logits, targets alike, 0 or 1 -> [batch].

    Args:
      smooth: as for ``dice_loss``. apply_sigmoid: False where predictions are probabilities already.
    """
    predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
    if predictions.ndim == targets.ndim and predictions.shape[-1:] != (1,):
        predictions, targets = predictions[..., None], targets[..., None]
    return ops.dice_loss(predictions, targets, smooth=smooth, apply_softmax=apply_sigmoid)
