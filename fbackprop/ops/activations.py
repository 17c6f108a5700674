"""Activation functions: y = f(x), each element by itself, so dx = dy · f'(x).

    op            y                                       f'(x)                                      kept
    relu          max(x, 0)                               1 where y > 0, else 0                      y
    sigmoid       σ(x) = 1 / (1 + e⁻ˣ)                    y (1 − y) = σ(x) σ(−x)                     y
    tanh          tanh x                                  1 − y² = sech² x                           y
    silu          x σ(x)                                  σ(x) (1 + x σ(−x))                         x
    softplus      log(1 + eˣ)                             σ(x)                                       x
    gelu (erf)    x Φ(x)                                  Φ(x) + x φ(x)                              x
    gelu (tanh)   ½ x (1 + t), t = tanh u,                ½ (1 + t) + ½ x (1 − t²) u'                x
                  u = √(2/π) (x + 0.044715 x³)            u' = √(2/π) (1 + 3 · 0.044715 x²)
    leaky_relu    x where x ≥ 0, else a x                 1 where x ≥ 0, else a;   ∂y/∂a = x where x < 0       where x ≥ 0; a
    elu           x where x > 0, else a (eˣ − 1)          1 where x > 0, else a eˣ;  ∂y/∂a = eˣ − 1 where x ≤ 0  x, a
    step_ste      1 where x > 0, else 0                   1, by decree (straight-through), not 0     nothing

Φ and φ are the distribution function and the density of the standard normal distribution. Everything is computed in
float32 or wider. Where x is narrower than float32, sigmoid and tanh keep x in place of y: a rounded y near 1 no longer
tells 1 − y.

Kinks, where the derivative jumps, equal JAX's choice: relu'(0) = 0, leaky_relu'(0) = 1, elu'(0) = a.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import float_type, sum_to, wide
from fbackprop.rules import elementwise, rule
from fbackprop.samples import constant, normal, sample

__all__ = ["elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "step_ste", "tanh"]


@elementwise(lambda y: y > 0)
def relu(x: ArrayLike) -> jax.Array:
    """The positive part: y = max(x, 0).

    x [...] -> y [...], of the same dtype. relu'(0) = 0. Source: Nair & Hinton 2010.
    """
    x = jnp.asarray(x)
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


@elementwise(lambda y: y * (1 - y), narrow=[lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)])
def sigmoid(x: ArrayLike) -> jax.Array:
    """The logistic function: y = 1 / (1 + exp(−x)), between 0 and 1.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    return jax.lax.logistic(wide(x)).astype(float_type(x))


@elementwise(
    lambda y: 1 - y * y,
    narrow=[lambda x: _sech_squared(x)],
    samples=[sample(normal(5, 7)), sample(normal(9, scale=4.0)), sample(normal()), sample(normal(9, mean=-60.0))],
)
def tanh(x: ArrayLike) -> jax.Array:
    """The hyperbolic tangent, between −1 and 1.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    return jnp.tanh(wide(x)).astype(float_type(x))


def _sech_squared(x: jax.Array) -> jax.Array:
    # 1 − tanh² x without the cancellation: with e = exp(−2|x|), cosh x = (1 + e) / (2 √e).
    e = jnp.exp(-2 * jnp.abs(x))
    return 4 * e / jnp.square(1 + e)


def _silu_slope(x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x) * (1 + x * jax.nn.sigmoid(-x))


@elementwise(_silu_slope)
def silu(x: ArrayLike) -> jax.Array:
    """The sigmoid-weighted linear unit, also called swish: y = x · sigmoid(x).

    x [...] -> y [...], of the same dtype (integers give floats). Source: Elfwing, Uchibe & Doya 2018, arXiv:1702.03118.
    """
    x_ = wide(x)
    return (x_ * jax.lax.logistic(x_)).astype(float_type(x))


@elementwise(lambda x: jax.nn.sigmoid(x))
def softplus(x: ArrayLike) -> jax.Array:
    """A smooth form of relu: y = log(1 + exp(x)), without overflow.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    x_ = wide(x)
    return jnp.logaddexp(x_, jnp.zeros_like(x_)).astype(float_type(x))


def _gelu_slope(x: jax.Array, approximate: bool) -> jax.Array:
    # Beyond |x| = 40 the slope is 0 or 1 to the last bit of float64, and x³ must not overflow into inf · 0.
    x = jnp.clip(x, -40, 40)
    if approximate:
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        t = jnp.tanh(u)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * density


@elementwise(
    _gelu_slope,
    static=["approximate"],
    samples=[sample(normal(5, 7)), sample(normal(5, 7), approximate=False), sample(normal(9, scale=4.0))],
)
def gelu(x: ArrayLike, approximate: bool = True) -> jax.Array:
    """The Gaussian error linear unit: y = x · Φ(x).

    x [...] -> y [...], of the same dtype (integers give floats). ``approximate`` takes the form with tanh.
    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    x_ = wide(x)
    if approximate:
        share = 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x_ + 0.044715 * x_**3)))
    else:
        share = 0.5 * jax.lax.erfc(-x_ * math.sqrt(0.5))
    return (x_ * share).astype(float_type(x))


class _LeakySaved(NamedTuple):
    open: jax.Array  # where x ≥ 0: a byte an element, all that dx needs
    negative_slope: jax.Array
    x: jax.Array  # for the cotangent of the slope


def _leaky_forward(x: ArrayLike, negative_slope: ArrayLike = 1e-2) -> tuple[jax.Array, _LeakySaved]:
    x = jnp.asarray(x)
    return jnp.where(x >= 0, x, negative_slope * x), _LeakySaved(x >= 0, jnp.asarray(negative_slope), x)


def _leaky_backward(saved: _LeakySaved, dy: jax.Array) -> tuple[Any, ...]:
    dx = jnp.where(saved.open, dy, saved.negative_slope * dy)
    dslope = jnp.where(saved.open, 0, wide(saved.x) * wide(dy))
    pairs = ((dx, saved.x), (dslope, saved.negative_slope))
    return tuple(sum_to(d, a.shape) if jnp.issubdtype(a.dtype, jnp.inexact) else None for d, a in pairs)


@rule(
    forward=_leaky_forward,
    backward=_leaky_backward,
    samples=[sample(normal(5, 7)), sample(normal(5, 7), 0.3), sample(normal(5, 7), normal(1, 7))],
    workloads=[sample(normal(4096, 3072), dtype=d) for d in ("float32", "bfloat16")],
    keeps="where x ≥ 0 (a byte an element), negative_slope; x for its cotangent",
)
def leaky_relu(x: ArrayLike, negative_slope: ArrayLike = 1e-2) -> jax.Array:
    """relu that lets a share of the negative part through: y = x where x ≥ 0, else negative_slope · x.

    x [...], negative_slope [] or of a shape that broadcasts with x -> y [...]. leaky_relu'(0) = 1.
    """
    x = jnp.asarray(x)
    return jnp.where(x >= 0, x, negative_slope * x)


@elementwise(
    lambda x, alpha: jnp.where(x > 0, 1, alpha * jnp.exp(jnp.minimum(x, 0))),
    lambda x: jnp.where(x > 0, 0, jnp.expm1(jnp.minimum(x, 0))),
    samples=[
        sample(normal(5, 7)),
        sample(normal(5, 7), 0.3),
        sample(normal(5, 7), normal(1, 7)),
        sample(constant(0.0, 3), 0.3),
        sample(constant(0.0, 2, 7), normal(1, 7)),
    ],
)
def elu(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """The exponential linear unit: y = x where x > 0, else alpha · (exp(x) − 1).

    x [...], alpha [] or of a shape that broadcasts with x -> y [...]. elu'(0) = alpha.
    Source: Clevert, Unterthiner & Hochreiter 2015, arXiv:1511.07289.
    """
    x_ = wide(x)
    # The inner where keeps the branch that is not taken finite.
    negative = alpha * jnp.expm1(jnp.where(x_ > 0, 0, x_))
    return jnp.where(x_ > 0, x_, negative).astype(float_type(x, alpha))


@elementwise(lambda: jnp.float32(1.0), exact=False, keeps="nothing")
def step_ste(x: ArrayLike) -> jax.Array:
    """The step of a perceptron, 1 where x > 0 and 0 where x ≤ 0, with a straight-through backward: dx = dy.

    x [...] -> y [...], of the same dtype. The true derivative is 0 wherever it exists and teaches nothing; the
    straight-through estimator passes the cotangent on as if the step were the identity, so this rule is *not* the
    gradient of the step (``exact=False``). Source: Bengio, Léonard & Courville 2013, arXiv:1308.3432.
    """
    x = jnp.asarray(x)
    return (x > 0).astype(x.dtype)
