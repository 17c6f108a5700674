"""The Dice loss of segmentation, and the two that are composed of it.

With probabilities P (softmax of z, or sigmoid where there is one class), targets t, and sums over the pixels for each class,

    I = Σ P t     A = Σ P     T = Σ t        N = I + s        D = I + α (A − I) + β (T − I) + s

    L = w (1 − N / D),  then the mean or the sum over the classes

    dI = (N (1 − α − β) − D) / D² · w dL           dA = α N / D² · w dL           dT = β N / D² · w dL
    dα = Σ (A − I) N / D² · w dL                   dβ = Σ (T − I) N / D² · w dL   ds = Σ (N − D) / D² · w dL
    dw = Σ (1 − N / D) dL

    dP = t dI + dA            dt = P dI + dT
    dz = P (dP − Σ P dP) for the softmax, P (1 − P) dP for the sigmoid

Kept are P, the targets, and I, A, T of each class. Sums are in float32 or wider. A class with D = 0, which neither is there nor
was predicted, has the loss 0 (s = 0 is for those who have no such class).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import canonical_axes, float_type, nbytes, require_float, shapes, sum_to, wide, wide_type
from fbackprop.ops.probabilities import softmax_pullback
from fbackprop.rules import Static, rule
from fbackprop.samples import mask, normal, positive, probabilities, sample, uniform

__all__ = ["dice_loss"]

Axis = int | Sequence[int] | None


class _DiceSaved(NamedTuple):
    p: jax.Array
    rest: jax.Array | None  # 1 − P of a sigmoid below float32, where a rounded P near 1 says nothing
    targets: jax.Array
    sums: tuple[jax.Array, ...]  # I, A, T of each class, with the summed axes of length 1
    class_weights: jax.Array | None
    options: tuple[jax.Array, ...]  # s, α, β
    given: Static  # the shapes and dtypes of predictions and targets


def _with_channel(array: ArrayLike, other: ArrayLike) -> jax.Array:
    array = jnp.asarray(array)
    return array[..., None] if array.ndim == jnp.ndim(other) - 1 else array


class _Class(NamedTuple):
    """The numbers of each class: N, D and 1 / D, which is 0 where D is."""

    n: jax.Array
    d: jax.Array
    inverse: jax.Array

    @classmethod
    def of(cls, sums: tuple[jax.Array, ...], options: Sequence[jax.Array]) -> "_Class":
        (i, a, t), (s, alpha, beta) = sums, options
        d = i + alpha * (a - i) + beta * (t - i) + s
        return cls(i + s, d, jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d)))

    @property
    def loss(self) -> jax.Array:
        return (self.d - self.n) * self.inverse


def _summed(axis: Axis, ndim: int) -> tuple[int, ...]:
    return tuple(range(1, ndim - 1)) if axis is None else canonical_axes("dice_loss", axis, ndim)


def _weights(class_weights: ArrayLike | None, like: jax.Array) -> Any:
    return 1.0 if class_weights is None else wide(class_weights).reshape((1,) * (like.ndim - 1) + (-1,))


def _forward(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    smooth: ArrayLike = 1.0,
    alpha: ArrayLike = 0.5,
    beta: ArrayLike = 0.5,
    apply_softmax: bool = True,
    reduction: str = "mean",
    ignore_background: bool = False,
    axis: Axis = None,
) -> tuple[jax.Array, _DiceSaved]:
    z, target = _with_channel(predictions, targets), _with_channel(targets, predictions)
    one = z.shape[-1] == 1
    x = wide(z)
    p = x if not apply_softmax else jax.nn.sigmoid(x) if one else jax.nn.softmax(x, -1)
    axes, t = _summed(axis, z.ndim), wide(target)
    sums = tuple(jnp.sum(v, axes, keepdims=True) for v in (p * t, p, t))
    options = tuple(map(jnp.asarray, (smooth, alpha, beta)))
    loss = _Class.of(sums, [wide(v) for v in options]).loss * _weights(class_weights, p)
    loss = jnp.squeeze(loss, axes)
    loss = loss[..., 1:] if ignore_background and not one else loss
    value = {"mean": lambda v: jnp.mean(v, -1), "sum": lambda v: jnp.sum(v, -1), "none": lambda v: v}[reduction](loss)
    dtype = float_type(predictions)
    rest = jax.nn.sigmoid(-x).astype(dtype) if apply_softmax and one and p.dtype != dtype else None
    given = Static(tuple((jnp.shape(v), jnp.result_type(v)) for v in (predictions, targets)))
    weights = None if class_weights is None else jnp.asarray(class_weights)
    return value.astype(dtype), _DiceSaved(p.astype(dtype), rest, target, sums, weights, options, given)


def _backward(
    saved: _DiceSaved, dy: jax.Array, *, apply_softmax: bool, reduction: str, ignore_background: bool, axis: Axis
) -> tuple[Any, ...]:
    p, rest, target, sums, class_weights, options, given = saved
    (shape, _), (target_shape, target_type) = given.value
    axes, one = _summed(axis, p.ndim), p.shape[-1] == 1
    wide_options = [wide(v) for v in options]
    n, d, inverse = found = _Class.of(sums, wide_options)
    (i, a, t), (_, alpha, beta) = sums, wide_options

    # the cotangent of the loss of each class
    first = min(1, p.shape[-1]) if ignore_background and not one else 0
    g = wide(dy) if reduction == "none" else jnp.expand_dims(wide(dy), -1)
    g = g / (p.shape[-1] - first) if reduction == "mean" else g
    g = jnp.broadcast_to(g, (*g.shape[:-1], p.shape[-1] - first))
    g = jnp.expand_dims(jnp.pad(g, [(0, 0)] * (g.ndim - 1) + [(first, 0)]), axes)

    classes = p.shape[-1:]
    dweights = None
    if class_weights is not None:
        dweights = sum_to(found.loss * g, (1,) * (p.ndim - 1) + classes).reshape(classes)
    g = g * _weights(class_weights, p) * inverse
    # Each factor is divided by D by itself: D² may overflow where the quotients do not.
    share, common = n * inverse, ((1 - alpha - beta) * n - d) * inverse
    di, da, dt = common * g, alpha * share * g, beta * share * g
    dsmooth, dalpha, dbeta = (n - d) * inverse * g, (a - i) * share * g, (t - i) * share * g

    probability = wide(p)
    dp = wide(target) * di + da
    dtarget = (probability * di + dt).reshape(target_shape) if jnp.issubdtype(target_type, jnp.inexact) else None
    if apply_softmax and one:
        dp = probability * (1 - probability if rest is None else wide(rest)) * dp
    elif apply_softmax:
        dp = softmax_pullback(p, dp, -1)
    scalars = (jnp.sum(d).reshape(v.shape) for d, v in zip((dsmooth, dalpha, dbeta), options))
    return dp.reshape(shape), dtarget, dweights, *scalars


def _bytes(predictions: Any, targets: Any, class_weights: Any, axis: Axis) -> int:
    sums = math.prod(n for i, n in enumerate(predictions.shape) if i not in _summed(axis, predictions.ndim))
    return nbytes(predictions, targets, class_weights) + 3 * sums * wide_type(predictions).itemsize + 3 * 4


@rule(
    forward=_forward,
    backward=_backward,
    static=["apply_softmax", "reduction", "ignore_background", "axis"],
    samples=[
        sample(normal(2, 5, 4), mask(2, 5, 4, 1), reduction="sum", axis=(1, 2)),
        sample(
            normal(2, 3, 4, 3), probabilities(2, 3, 4, 3), class_weights=positive(3), smooth=positive(), alpha=uniform(),
            beta=uniform(), reduction="none", ignore_background=True,
        ),
        sample(probabilities(2, 5, 3), mask(2, 5, 3), apply_softmax=False),
    ],
    workloads=[sample(normal(8, 128, 128, 21), probabilities(8, 128, 128, 21))],
    keeps="probabilities, targets, three numbers a class",
    minimum=_bytes,
)  # fmt: skip
def dice_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    smooth: ArrayLike = 1.0,
    alpha: ArrayLike = 0.5,
    beta: ArrayLike = 0.5,
    apply_softmax: bool = True,
    reduction: str = "mean",
    ignore_background: bool = False,
    axis: Axis = None,
) -> jax.Array:
    """One minus the overlap of predicted and true regions, relative to their sizes, for each class.

    predictions [batch, ..., classes] logits, targets of the same shape, one-hot or soft -> [batch], or [batch, classes] for
    the reduction "none". The axis of the classes may be missing from one of the two where there is a single class.
    Source: Milletari, Navab & Ahmadi 2016, arXiv:1606.04797; Salehi, Erdogmus & Gholipour 2017 for alpha and beta.

    Args:
      class_weights: of each class, [classes].
      smooth: added to both sides of the quotient.
      alpha: the weight of pixels that are predicted and not there. beta: of pixels that are there and not predicted.
      apply_softmax: False where predictions are probabilities already, which sum to one over the classes; that they do is
        not looked at.
      reduction: "mean", "sum" or "none", over the classes.
      ignore_background: leave out class 0, unless it is the only one.
      axis: the dimensions of the pixels; by default all but the first and the last.
    Raises:
      TypeError: where predictions are not floating-point. ValueError: where shapes, axes or the reduction do not fit.
    """
    require_float("dice_loss", predictions=predictions)
    z, t = _with_channel(predictions, targets), _with_channel(targets, predictions)
    if z.shape != t.shape or not z.ndim:
        got = shapes(predictions=predictions, targets=targets)
        raise ValueError(f"dice_loss: expected predictions [batch, ..., classes] and targets of the same shape, got {got}.")
    if z.ndim - 1 in _summed(axis, z.ndim):
        raise ValueError(f"dice_loss: axis {axis} names the dimension of the classes; expected dimensions of pixels.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'dice_loss: reduction must be "mean", "sum" or "none", got {reduction!r}.')
    if class_weights is not None and jnp.shape(class_weights) != z.shape[-1:]:
        raise ValueError(f"dice_loss: class_weights must have the shape {z.shape[-1:]}, got {jnp.shape(class_weights)}.")
    for name, value in (("smooth", smooth), ("alpha", alpha), ("beta", beta)):
        if jnp.size(value) != 1:
            raise ValueError(f"dice_loss: {name} must be a number, got the shape {jnp.shape(value)}.")
    return _forward(
        predictions, targets, class_weights=class_weights, smooth=smooth, alpha=alpha, beta=beta, apply_softmax=apply_softmax,
        reduction=reduction, ignore_background=ignore_background, axis=axis,
    )[0]  # fmt: skip
