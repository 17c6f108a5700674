"""sigmoid_focal_loss, each element, with the probability u = (1 − t) p + t (1 − p) of what is not wanted:

    L = a C u^γ,      C = binary cross-entropy,      a = α t + (1 − α) (1 − t), or 1

    dz = a u^γ (p − t + γ C (1 − 2 t) p (1 − p) / u) dL
    dt = (a u^γ (−z + γ C (1 − 2 p) / u) + (2 α − 1) C u^γ) dL
    dα = Σ (2 t − 1) C u^γ dL                 dγ = Σ L log(u) dL

Powers and quotients of p, 1 − p and u are formed from their logarithms, which neither overflow nor vanish. For labels that are
not differentiated only the slope dz / dL is kept.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.one_line import elementwise
from fbackprop.ops._arithmetic import float_type, nbytes, require_float, wide
from fbackprop.samples import constant, mask, normal, positive, sample, uniform

__all__ = ["sigmoid_focal_loss"]


class _Parts(NamedTuple):
    """Logarithms of the probabilities p, 1 − p and u, and the cross-entropy."""

    log_p: jax.Array
    log_q: jax.Array
    log_u: jax.Array
    entropy: jax.Array


def _bounded(labels: ArrayLike) -> jax.Array:
    """Labels in [0, 1], with the slope 1 at its ends."""
    t = wide(labels)
    return jnp.where(t < 0, 0, jnp.where(t > 1, 1, t))


def _parts(logits: ArrayLike, labels: ArrayLike) -> _Parts:
    z, t = jnp.broadcast_arrays(wide(logits), _bounded(labels))
    log_p, log_q = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    # log((1 − t) p + t q) from the larger of the parts that have a weight; one without may be larger by far.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.where(t == 1, -jnp.inf, log_p), jnp.where(t == 0, -jnp.inf, log_q)))
    most = math.log(float(jnp.finfo(z.dtype).max)) - 1
    p, q = (jnp.exp(jnp.minimum(part - top, most)) for part in (log_p, log_q))
    return _Parts(log_p, log_q, top + jnp.log((1 - t) * p + t * q), -t * log_p - (1 - t) * log_q)


def _balance(labels: ArrayLike, alpha: ArrayLike | None) -> Any:
    t = _bounded(labels)
    return 1.0 if alpha is None else wide(alpha) * t + (1 - wide(alpha)) * (1 - t)


def _slope(logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike | None, gamma: ArrayLike) -> jax.Array:
    log_p, log_q, log_u, entropy = _parts(logits, labels)
    t, exponent = _bounded(labels), wide(gamma)
    # p − t with the smaller of p and 1 − p computed, and not 1 minus the larger
    error = jnp.where(wide(logits) > 0, (1 - t) - jnp.exp(log_q), jnp.exp(log_p) - t)
    pull = exponent * entropy * (1 - 2 * t) * jnp.exp(log_p + log_q - log_u)
    weight = jnp.exp(exponent * log_u)
    slope = jnp.where(weight == 0, 0, _balance(labels, alpha) * weight * (error + pull))
    return slope.astype(float_type(logits, gamma, *(() if alpha is None else (alpha,))))


def _label_slope(logits: Any, labels: Any, alpha: Any, gamma: Any) -> jax.Array:
    log_p, log_q, log_u, entropy = _parts(logits, labels)
    weight = jnp.exp(gamma * log_u)
    # C u^(γ − 1): for small u the second factor may overflow where C, about as small, makes up for it
    near = log_u > -60
    plain = entropy * jnp.exp((gamma - 1) * jnp.where(near, log_u, 0))
    none = near | (entropy == 0)
    far = jnp.where(none, 0, jnp.exp(jnp.log(jnp.where(none, 1, entropy)) + (gamma - 1) * log_u))
    quotient = jnp.where(near, plain, far)
    slope = _balance(labels, alpha) * (gamma * quotient * (jnp.exp(log_q) - jnp.exp(log_p)) - wide(logits) * weight)
    slope = slope if alpha is None else slope + (2 * alpha - 1) * entropy * weight
    return jnp.where((weight == 0) | (labels < 0) | (labels > 1), 0, slope)


def _alpha_slope(logits: Any, labels: Any, gamma: Any) -> jax.Array:
    parts = _parts(logits, labels)
    return (2 * _bounded(labels) - 1) * parts.entropy * jnp.exp(gamma * parts.log_u)


def _gamma_slope(logits: Any, labels: Any, alpha: Any, gamma: Any) -> jax.Array:
    parts = _parts(logits, labels)
    weight = jnp.exp(gamma * parts.log_u)
    return jnp.where(weight == 0, 0, _balance(labels, alpha) * parts.entropy * weight * parts.log_u)


@elementwise(
    lambda slope: slope,
    _label_slope,
    _alpha_slope,
    _gamma_slope,
    between={"slope": _slope},
    samples=[
        sample(normal(4, 5, scale=2.0), uniform(4, 5), alpha=uniform(), gamma=positive()),
        sample(normal(4, 5, scale=4.0), mask(1, 5)),
        sample(normal(6, scale=20.0), constant(1.0, 6), gamma=0.5),
    ],
    workloads=[sample(normal(4096, 3072), mask(4096, 3072))],
    keeps="the slope; logits, labels, alpha and gamma too where one of the last three is differentiated",
    minimum=lambda y: nbytes(y),
)
def sigmoid_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: ArrayLike | None = None, gamma: ArrayLike = 2.0
) -> jax.Array:
    """Binary cross-entropy times the probability of the wrong class to the power gamma, each element by itself.

    logits [...], labels of a shape that broadcasts with it, in [0, 1] (booleans and integers too) -> [...]. What lies beyond
    counts as 0 or 1.
    Source: Lin et al. 2017, arXiv:1708.02002.

    Args:
      alpha: the weight of the class 1; the class 0 weighs 1 − alpha. None weighs both 1.
      gamma: how much less the elements count that are nearly right.
    """
    require_float("sigmoid_focal_loss", logits=logits)
    _, _, log_u, entropy = _parts(logits, labels)
    value = _balance(labels, alpha) * entropy * jnp.exp(wide(gamma) * log_u)
    return value.astype(float_type(logits, gamma, *(() if alpha is None else (alpha,))))
