"""Smooth activation functions: y = f(x), each element by itself, so dx = dy · f'(x).

    op            y                                       f'(x)                                            kept
    sigmoid       σ(x) = 1 / (1 + e⁻ˣ)                    y (1 − y)                                        y
    log_sigmoid   log σ(x)                                σ(−x)                                            x
    softplus      log(1 + eˣ)                             σ(x)                                             x
    tanh          tanh x                                  1 − y²                                           y
    soft_sign     x / (1 + |x|)                           1 / (1 + |x|)²                                   x
    silu          x σ(x)                                  s (1 + x (1 − s)),  s = σ(x)                     x
    mish          x t,  t = tanh softplus x               t + x (1 − t²) σ(x)                              x
    gelu (erf)    x Φ(x)                                  Φ(x) + x φ(x)                                    x
    gelu (tanh)   ½ x (1 + t), t = tanh u,                ½ (1 + t) + ½ x (1 − t²) u'                      x
                  u = √(2/π) (x + 0.044715 x³)            u' = √(2/π) (1 + 3 · 0.044715 x²)
    squareplus    ½ (x + r),  r = √(x² + b)               ½ (1 + x / r);              ∂y/∂b = 1 / (4 r)    x, b
    elu           x where x > 0, else a (eˣ − 1)          1 where x > 0, else a eˣ;   ∂y/∂a = eˣ − 1 there      x, a
    celu          x where x > 0, else a (eˣᐟᵃ − 1)        1, else eˣᐟᵃ;     ∂y/∂a = eˣᐟᵃ (1 − x/a) − 1 there    x, a
    selu          λ elu(x, α), λ and α fixed              λ where x > 0, else λ α eˣ                       x
    hard_silu     x min(max(x + 3, 0), 6) / 6             0 below −3, 1 above 3, (2 x + 3) / 6 between     x
    relu_squared  max(x, 0)²                              2 max(x, 0) = 2 √y                               y; x in float16
    sparse_plus   0 below −1, x above 1, else (x + 1)²/4  0 below −1, 1 above 1, else (x + 1) / 2          x
    log1mexp      log(1 − e⁻ˣ),  x > 0                    1 / (eˣ − 1)                                     x

Φ and φ are the distribution function and the density of the standard normal distribution. Everything is computed in
float32 or wider. Where x is narrower than float32, sigmoid and tanh keep x in place of y: a rounded y near 1 no longer
tells 1 − y.

The slopes of sigmoid (narrow), silu and mish are written with e = exp(−|x|), which keeps their tails, that of tanh (narrow)
with the mirrored y, which costs no more than y:

    σ' = e / (1 + e)²,   tanh' = 1 − tanh(−x)²,   σ(x) = 1 / (1 + e) | e / (1 + e),   for x ≥ 0 | x < 0
    mish: t = a / d,   1 − t² = 4 w² (1 + e)² / d²,   a = 1 + 2 e | e² + 2 e,   d = a + (2 e² | 2),   w = e | 1
          f' = t + 4 x e w (1 + e) / d²

On purpose the forward takes other forms. What forward and backward had in common, the compiler would write to memory in
float32, in one program, to read it again: more time than a second exponential.

Kinks, where the slope jumps, equal JAX's choice: elu'(0) = a, celu'(0) = 1, selu'(0) = λ α.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.one_line import elementwise
from fbackprop.ops._arithmetic import float_type, nbytes, wide
from fbackprop.rules import rule
from fbackprop.samples import constant, normal, positive, sample, uniform

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hard_silu",
    "log1mexp",
    "log_sigmoid",
    "mish",
    "relu_squared",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "sparse_plus",
    "squareplus",
    "tanh",
]


def _size(x: Any) -> int:
    return nbytes(x)


def _with_parameter(x: Any, parameter: Any) -> int:
    return nbytes(x) + (nbytes(parameter) if hasattr(parameter, "shape") else 4)


def _negative(x: jax.Array) -> jax.Array:
    """x where it is not positive, with slope 1 at 0 as in the definitions, where that of minimum is a half."""
    return jnp.where(x > 0, 0, x)


def _bell(x: jax.Array) -> jax.Array:
    e = jnp.exp(-jnp.abs(x))
    return e / jnp.square(1 + e)


@elementwise(lambda y: y * (1 - y), narrow=[_bell], minimum=_size)
def sigmoid(x: ArrayLike) -> jax.Array:
    """The logistic function: y = 1 / (1 + exp(−x)), between 0 and 1.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    return jax.lax.logistic(wide(x)).astype(float_type(x))


@elementwise(
    lambda y: 1 - y * y,
    narrow=[lambda x: 1 - jnp.square(jnp.tanh(-x))],
    minimum=_size,
    samples=[sample(normal(5, 7)), sample(normal(9, scale=4.0)), sample(normal()), sample(normal(9, mean=-60.0))],
)
def tanh(x: ArrayLike) -> jax.Array:
    """The hyperbolic tangent, between −1 and 1.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    return jnp.tanh(wide(x)).astype(float_type(x))


def _silu_slope(x: jax.Array) -> jax.Array:
    e = jnp.exp(-jnp.abs(x))
    r = 1 / (1 + e)
    s, rest = jnp.where(x < 0, e * r, r), jnp.where(x < 0, r, e * r)
    return s * (1 + x * rest)


@elementwise(_silu_slope, minimum=_size)
def silu(x: ArrayLike) -> jax.Array:
    """The sigmoid-weighted linear unit, also called swish: y = x · sigmoid(x).

    x [...] -> y [...], of the same dtype (integers give floats). Source: Elfwing, Uchibe & Doya 2018, arXiv:1702.03118.
    """
    x_ = wide(x)
    return (x_ * jax.lax.logistic(x_)).astype(float_type(x))


@elementwise(lambda x: jax.lax.logistic(x), minimum=_size)
def softplus(x: ArrayLike) -> jax.Array:
    """A smooth form of relu: y = log(1 + exp(x)), without overflow.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    x_ = wide(x)
    return jnp.logaddexp(x_, jnp.zeros_like(x_)).astype(float_type(x))


@elementwise(lambda x: jax.lax.logistic(-x), minimum=_size, samples=[sample(normal(5, 7, scale=4.0))])
def log_sigmoid(x: ArrayLike) -> jax.Array:
    """The logarithm of sigmoid: y = −log(1 + exp(−x)), without overflow.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    x_ = wide(x)
    return -jnp.logaddexp(-x_, jnp.zeros_like(x_)).astype(float_type(x))


@elementwise(lambda x: jnp.square(1 / (1 + jnp.abs(x))), minimum=_size, samples=[sample(normal(5, 7))])
def soft_sign(x: ArrayLike) -> jax.Array:
    """A sigmoid of a quotient: y = x / (1 + |x|), between −1 and 1.

    x [...] -> y [...], of the same dtype (integers give floats).
    """
    x_ = wide(x)
    return (x_ / (1 + jnp.abs(x_))).astype(float_type(x))


def _mish_terms(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a, 1/d and e w (1 + e) of the derivation."""
    right, e = x >= 0, jnp.exp(-jnp.abs(x))
    a = jnp.where(right, 1 + 2 * e, e * (e + 2))
    return a, 1 / (a + jnp.where(right, 2 * e * e, 2)), jnp.where(right, e, 1) * (e * (1 + e))


def _mish_forward(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(x)
    e = jnp.exp(jnp.minimum(wide(x), 30))  # beyond, t is 1 to the last bit of float64
    a = e * (e + 2)
    return (wide(x) * (a / (a + 2))).astype(float_type(x)), x


def _mish_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array | None]:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return (None,)
    a, reciprocal, w = _mish_terms(wide(x))
    return (wide(dy) * (reciprocal * (a + 4 * wide(x) * (w * reciprocal))),)


@rule(
    forward=_mish_forward,
    backward=_mish_backward,
    samples=[sample(normal(5, 7)), sample(normal(9, scale=6.0))],
    workloads=[sample(normal(4096, 3072), dtype=d) for d in ("float32", "bfloat16")],
    keeps="x",
    minimum=_size,
)
def mish(x: ArrayLike) -> jax.Array:
    """A smooth relu that dips below zero: y = x · tanh(softplus(x)).

    x [...] -> y [...], of the same dtype (integers give floats). Source: Misra 2019, arXiv:1908.08681.
    """
    x_ = wide(x)
    return (x_ * jnp.tanh(jnp.logaddexp(x_, jnp.zeros_like(x_)))).astype(float_type(x))


_ROOT = math.sqrt(2 / math.pi)


def _gelu_slope(x: jax.Array, approximate: bool) -> jax.Array:
    # Beyond |x| = 40 the slope is 0 or 1 to the last bit of float64, and x³ must not overflow into inf · 0.
    if approximate:
        square = jnp.minimum(x * x, 1600)
        t = jnp.tanh(_ROOT * (x + 0.044715 * (x * square)))  # as in y: another rounding of u is another e²ᵘ
        share = 0.5 + 0.5 * t  # and ½ (1 − t²) = share · (1 − t)
        return share * (1 + x * (1 - t) * (_ROOT + 3 * 0.044715 * _ROOT * square))
    x = jnp.clip(x, -40, 40)
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * density


@elementwise(
    _gelu_slope,
    static=["approximate"],
    minimum=_size,
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


@elementwise(
    lambda x, alpha: jnp.where(x > 0, 1, alpha * jnp.exp(_negative(x))),
    lambda x: jnp.where(x > 0, 0, jnp.expm1(_negative(x))),
    samples=[
        sample(normal(5, 7)),
        sample(normal(5, 7), 0.3),
        sample(normal(5, 7), normal(1, 7)),
        sample(constant(0.0, 3), 0.3),
        sample(constant(0.0, 2, 7), normal(1, 7)),
    ],
    minimum=lambda x, alpha: _with_parameter(x, alpha),
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


@elementwise(
    lambda x, alpha: jnp.where(x > 0, 1, jnp.exp(_negative(x) / alpha)),
    lambda x, alpha: jnp.where(x > 0, 0, _celu_by_alpha(_negative(x) / alpha)),
    samples=[sample(normal(5, 7), positive(1, 7)), sample(constant(0.0, 3))],
    minimum=lambda x, alpha: _with_parameter(x, alpha),
)
def celu(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """The continuously differentiable exponential linear unit: y = x where x > 0, else alpha · (exp(x / alpha) − 1).

    x [...], alpha [] or of a shape that broadcasts with x -> y [...]. celu'(0) = 1.
    Source: Barron 2017, arXiv:1704.07483.
    """
    x_ = wide(x)
    negative = alpha * jnp.expm1(jnp.where(x_ > 0, 0, x_) / alpha)
    return jnp.where(x_ > 0, x_, negative).astype(float_type(x, alpha))


def _celu_by_alpha(q: jax.Array) -> jax.Array:
    return jnp.expm1(q) - jnp.where(q == -jnp.inf, 0, q) * jnp.exp(q)  # −∞ where alpha is 0: −1


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


@elementwise(
    lambda x: jnp.where(x > 0, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA * jnp.exp(_negative(x))),
    samples=[sample(normal(5, 7))],
    minimum=_size,
)
def selu(x: ArrayLike) -> jax.Array:
    """The scaled exponential linear unit, which keeps zero mean and unit variance: y = λ · elu(x, α).

    x [...] -> y [...], of the same dtype (integers give floats). selu'(0) = λ α.
    Source: Klambauer et al. 2017, arXiv:1706.02515.
    """
    x_ = wide(x)
    negative = _SELU_ALPHA * jnp.expm1(jnp.where(x_ > 0, 0, x_))
    return (_SELU_SCALE * jnp.where(x_ > 0, x_, negative)).astype(float_type(x))


@elementwise(
    lambda x, b: 0.5 + 0.5 * x * jax.lax.rsqrt(jnp.square(x) + b),
    lambda x, b: 0.25 * jax.lax.rsqrt(jnp.square(x) + b),
    samples=[sample(normal(5, 7), positive(1, 7)), sample(normal(9, scale=4.0))],
    minimum=lambda x, b: _with_parameter(x, b),
)
def squareplus(x: ArrayLike, b: ArrayLike = 4) -> jax.Array:
    """An algebraic form of softplus: y = (x + √(x² + b)) / 2.

    x [...], b [] or of a shape that broadcasts with x -> y [...]. Source: Barron 2021, arXiv:2112.11687.
    """
    x_ = wide(x)
    return (0.5 * (x_ + jnp.sqrt(jnp.square(x_) + b))).astype(float_type(x, b))


@elementwise(
    lambda x: jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, (2 * x + 3) / 6)),
    samples=[sample(normal(5, 7, scale=4.0)), sample(constant(3.0, 3))],
    minimum=_size,
)
def hard_silu(x: ArrayLike) -> jax.Array:
    """silu with a sigmoid of straight pieces, also called hard_swish: y = x · min(max(x + 3, 0), 6) / 6.

    x [...] -> y [...], of the same dtype (integers give floats). Source: Howard et al. 2019, arXiv:1905.02244.
    """
    x_ = wide(x)
    return (x_ * jnp.where(x_ <= -3, 0, jnp.where(x_ >= 3, 1, (x_ + 3) / 6))).astype(float_type(x))


def _squared(x: jax.Array) -> jax.Array:
    x_ = wide(x)
    return jnp.square(jnp.where(x_ <= 0, 0, x_)).astype(x.dtype)


def _relu_squared_forward(x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    # The layer behind keeps y in any case. In float16 the square of a small x is below what y can tell from zero.
    x = jnp.asarray(x)
    y = _squared(x)
    return y, x if x.dtype == jnp.float16 else y


def _relu_squared_backward(kept: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    root = jnp.where(kept <= 0, 0, wide(kept)) if kept.dtype == jnp.float16 else jnp.sqrt(wide(kept))
    return (wide(dy) * 2 * root,)


@rule(
    forward=_relu_squared_forward,
    backward=_relu_squared_backward,
    samples=[sample(normal(5, 7)), sample(constant(0.0, 3))],
    workloads=[sample(normal(4096, 3072), dtype=d) for d in ("float32", "bfloat16")],
    keeps="y (x in float16)",
    minimum=_size,
)
def relu_squared(x: ArrayLike) -> jax.Array:
    """The square of the positive part: y = max(x, 0)².

    x [...] -> y [...], of the same dtype. Source: So et al. 2021, arXiv:2109.08668.
    """
    return _squared(jnp.asarray(x))


@elementwise(
    lambda x: jnp.where(x <= -1, 0, jnp.where(x >= 1, 1, 0.5 * (x + 1))),
    samples=[sample(normal(5, 7, scale=1.5)), sample(constant(1.0, 3))],
    minimum=_size,
)
def sparse_plus(x: ArrayLike) -> jax.Array:
    """softplus of straight and square pieces: y = 0 up to −1, (x + 1)² / 4 up to 1, then x.

    x [...] -> y [...], of the same dtype (integers give floats). Its slope is sparse_sigmoid.
    Source: Martins & Astudillo 2016, arXiv:1602.02068.
    """
    x_ = wide(x)
    return jnp.where(x_ <= -1, 0, jnp.where(x_ >= 1, x_, jnp.square(x_ + 1) / 4)).astype(float_type(x))


@elementwise(
    lambda x: 1 / jnp.expm1(x),
    samples=[sample(positive(5, 7)), sample(uniform(9, low=0.01, high=12.0))],
    workloads=[sample(positive(4096, 3072), dtype=d) for d in ("float32", "bfloat16")],
    minimum=_size,
)
def log1mexp(x: ArrayLike) -> jax.Array:
    """The logarithm of the complement of a probability e⁻ˣ: y = log(1 − exp(−x)), for x > 0.

    x [...] -> y [...], of the same dtype (integers give floats). −inf at 0 and NaN below.
    Source: Mächler 2012, Accurately computing log(1 − exp(−|a|)).
    """
    x_ = wide(x)
    near = x_ < math.log(2)  # each branch where it is exact, and the other kept away from log 0
    left, right = jnp.where(near, x_, 1), jnp.where(near, 1, x_)
    return jnp.where(near, jnp.log(-jnp.expm1(-left)), jnp.log1p(-jnp.exp(-right))).astype(float_type(x))
