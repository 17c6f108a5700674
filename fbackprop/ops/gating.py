"""Gated linear units, glu, swiglu, geglu and reglu: one half of x times a function of the other half.

With a and b the first and the second half of x along an axis, the gate is the second, as in jax.nn.glu:

    y = a · φ(b)

    da = dy · φ(b)          db = dy · a · φ'(b)          dx = a and b's cotangents, side by side

    op        φ(b)                        φ'(b)
    glu       σ(b) = 1 / (1 + e⁻ᵇ)        σ (1 − σ)
    swiglu    b σ(b)                      σ + b σ (1 − σ)
    geglu     b Φ(b), or with tanh        Φ(b) + b e^(−b²/2) / √(2π)
    reglu     max(b, 0)                   1 where b > 0, else 0

Kept is x: da needs b, db needs both, and φ and φ' are elementwise. Computed in float32 or wider.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import float_type, nbytes, wide
from fbackprop.ops._gates import gelu_and_slope, relu_and_slope, sigmoid_and_slope, silu_and_slope
from fbackprop.rules import rule
from fbackprop.samples import constant, normal, sample

__all__ = ["geglu", "glu", "reglu", "swiglu"]

Pair = tuple[jax.Array, jax.Array]


def _halves(who: str, x: ArrayLike, axis: int) -> tuple[jax.Array, jax.Array]:
    """a and b, in float32 or wider."""
    x = wide(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{who}: axis {axis} is out of range for x with {x.ndim} dimensions.")
    if x.shape[axis] % 2:
        raise ValueError(f"{who}: axis {axis} of x has {x.shape[axis]} elements, expected an even number (x {x.shape}).")
    a, b = jnp.split(x, 2, axis)
    return a, b


def _gated(who: str, phi: Callable[[jax.Array], jax.Array], x: ArrayLike, axis: int) -> jax.Array:
    a, b = _halves(who, x, axis)
    return (a * phi(b)).astype(float_type(x))


def _backward(pair: Callable[[jax.Array], Pair], x: jax.Array, dy: jax.Array, axis: int) -> tuple[Any]:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return (None,)
    a, b = _halves("", x, axis)
    value, slope = pair(b)
    g = wide(dy)
    return (jnp.concatenate([g * value, g * a * slope], axis),)  # dy φ(b), dy a φ'(b)


def _glu_forward(x: ArrayLike, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    return _gated("glu", jax.lax.logistic, x, axis), jnp.asarray(x)


def _glu_backward(x: jax.Array, dy: jax.Array, *, axis: int) -> tuple[Any]:
    return _backward(sigmoid_and_slope, x, dy, axis)


def _minimum(x: Any) -> int:
    return nbytes(x)


_WORKLOADS = [sample(normal(4096, 6144), dtype=d) for d in ("float32", "bfloat16")]


@rule(
    forward=_glu_forward,
    backward=_glu_backward,
    static=["axis"],
    samples=[sample(normal(5, 6)), sample(normal(4, 3, 2, scale=4.0), axis=0)],
    workloads=_WORKLOADS,
    keeps="x",
    minimum=_minimum,
)
def glu(x: ArrayLike, axis: int = -1) -> jax.Array:
    """The gated linear unit: y = a · sigmoid(b), with a and b the halves of x.

    x [..., 2 d] -> y [..., d], of the same dtype.

    Args:
      axis: the dimension that is halved.
    Raises:
      ValueError: where its length is odd. Source: Dauphin et al. 2016, arXiv:1612.08083.
    """
    return _gated("glu", jax.lax.logistic, x, axis)


def _swiglu_forward(x: ArrayLike, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    return _gated("swiglu", lambda b: silu_and_slope(b)[0], x, axis), jnp.asarray(x)


def _swiglu_backward(x: jax.Array, dy: jax.Array, *, axis: int) -> tuple[Any]:
    return _backward(silu_and_slope, x, dy, axis)


@rule(
    forward=_swiglu_forward,
    backward=_swiglu_backward,
    static=["axis"],
    samples=[sample(normal(5, 6))],
    workloads=_WORKLOADS,
    keeps="x",
    minimum=_minimum,
)
def swiglu(x: ArrayLike, axis: int = -1) -> jax.Array:
    """The gated unit with silu: y = a · silu(b), with a and b the halves of x.

    x [..., 2 d] -> y [..., d], of the same dtype. (With the projections around it: ``swiglu_mlp``.)

    Args:
      axis: the dimension that is halved.
    Raises:
      ValueError: where its length is odd. Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _gated("swiglu", jax.nn.silu, x, axis)


def _geglu_forward(x: ArrayLike, axis: int = -1, approximate: bool = True) -> tuple[jax.Array, jax.Array]:
    return _gated("geglu", lambda b: gelu_and_slope(b, approximate)[0], x, axis), jnp.asarray(x)


def _geglu_backward(x: jax.Array, dy: jax.Array, *, axis: int, approximate: bool) -> tuple[Any]:
    return _backward(lambda b: gelu_and_slope(b, approximate), x, dy, axis)


@rule(
    forward=_geglu_forward,
    backward=_geglu_backward,
    static=["axis", "approximate"],
    samples=[sample(normal(5, 6)), sample(normal(4, 3), axis=0, approximate=False)],
    workloads=_WORKLOADS,
    keeps="x",
    minimum=_minimum,
)
def geglu(x: ArrayLike, axis: int = -1, approximate: bool = True) -> jax.Array:
    """The gated unit with gelu: y = a · gelu(b), with a and b the halves of x.

    x [..., 2 d] -> y [..., d], of the same dtype. (With the projections around it: ``geglu_mlp``.)

    Args:
      axis: the dimension that is halved. approximate: whether gelu is taken in its form with tanh.
    Raises:
      ValueError: where its length is odd. Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _gated("geglu", lambda b: gelu_and_slope(b, approximate)[0], x, axis)


def _reglu_forward(x: ArrayLike, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    return _gated("reglu", jax.nn.relu, x, axis), jnp.asarray(x)


def _reglu_backward(x: jax.Array, dy: jax.Array, *, axis: int) -> tuple[Any]:
    return _backward(relu_and_slope, x, dy, axis)


@rule(
    forward=_reglu_forward,
    backward=_reglu_backward,
    static=["axis"],
    samples=[sample(normal(5, 6)), sample(constant(0.0, 2, 4))],
    workloads=_WORKLOADS,
    keeps="x",
    minimum=_minimum,
)
def reglu(x: ArrayLike, axis: int = -1) -> jax.Array:
    """The gated unit with relu: y = a · max(b, 0), with a and b the halves of x.

    x [..., 2 d] -> y [..., d], of the same dtype. The slope of relu at 0 is 0.

    Args:
      axis: the dimension that is halved.
    Raises:
      ValueError: where its length is odd. Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _gated("reglu", jax.nn.relu, x, axis)
