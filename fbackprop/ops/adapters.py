"""Low-rank adaptation of a frozen linear map: lora_dense.

    y = x W + c (x A) B + b             W [in, out] frozen, A [in, r], B [r, out], r small, c a number

    h = x A
    dh = c dy Bᵀ                        [..., r]
    dx = dy Wᵀ + dh Aᵀ
    dA = xᵀ dh        dB = c hᵀ dy      db = Σ dy
    frozen: W is a constant by definition, dW = 0, and xᵀ dy, the largest product of the backward, is never formed
    not frozen: dW = xᵀ dy

Kept are x, W, A, B and h, which has r numbers a row; A B is never formed either. Matrix products and sums over rows
accumulate in float32 or wider.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, with_bias
from fbackprop.ops._matrices import outer_sum, product, product_transposed, row_sum
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["lora_dense"]


class _Saved(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    low: jax.Array  # h = x A, [..., r]


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    scale: float = 1.0,
    frozen: bool = True,
    precision: Any = None,
) -> tuple[jax.Array, _Saved]:
    x, kernel, a, b = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b)
    h = product(x, a, precision)
    y = product(x, kernel, precision) + scale * product(h, b, precision)
    y = with_bias(y, bias)
    return y, _Saved(x, kernel, a, b, h)


def _backward(saved: _Saved, dy: jax.Array, *, scale: float, frozen: bool, precision: Any) -> tuple[Any, ...]:
    x, kernel, a, b, h = saved
    dh = scale * product_transposed(dy, b, precision)
    dx = product_transposed(dy, kernel, precision) + product_transposed(dh, a, precision)
    dkernel = jnp.zeros_like(kernel) if frozen else outer_sum(x, dy, precision)
    return dx, dkernel, outer_sum(x, dh, precision), scale * outer_sum(h, dy, precision), row_sum(dy)


def _minimum(x: Any, kernel: Any, a: Any, b: Any, y: Any) -> int:
    # h is kept, as no matrix product is computed twice.
    return nbytes(x, kernel, a, b) + math.prod(x.shape[:-1]) * a.shape[1] * jnp.dtype(jnp.result_type(x, a)).itemsize


@rule(
    forward=_forward,
    backward=_backward,
    static=["scale", "frozen", "precision"],
    samples=[
        sample(normal(5, 4), normal(4, 6), normal(4, 2), normal(2, 6), normal(6), scale=0.5, frozen=False),
        sample(normal(2, 3, 4), normal(4, 5), normal(4, 2), normal(2, 5), frozen=False),
    ],
    workloads=[
        sample(
            normal(2048, 1024), normal(1024, 1024, scale=2**-5), normal(1024, 16, scale=2**-5), normal(16, 1024, scale=0.25),
            note="kernel frozen",
        )
    ],
    keeps="x, kernel, a, b, x · a",
    minimum=_minimum,
)  # fmt: skip
def lora_dense(
    x: ArrayLike,
    kernel: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    scale: float = 1.0,
    frozen: bool = True,
    precision: Any = None,
) -> jax.Array:
    """A fully connected layer with a frozen kernel and an update of low rank that is learned.

    y = x · kernel + scale · (x · a) · b + bias

    x [..., in], kernel [in, out], a [in, r], b [r, out], bias [out] -> y [..., out].

    Args:
      scale: a Python number; in the paper alpha / r.
      frozen: the kernel is a constant by definition, ``jax.lax.stop_gradient(kernel)``, as in the paper: its gradient is zero
        and never computed, even where all parameters are differentiated. With False it is trained too.
      precision: as in ``jax.lax.dot_general``; used by the backward too.
    Raises:
      ValueError: where shapes do not fit. TypeError: where an array is not floating-point.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    require_float("lora_dense", x=x, kernel=kernel, a=a, b=b, bias=bias)
    given = shapes(x=x, kernel=kernel, a=a, b=b)
    if jnp.ndim(x) < 1 or not jnp.ndim(kernel) == jnp.ndim(a) == jnp.ndim(b) == 2:
        raise ValueError(f"lora_dense: expected x [..., in], kernel [in, out], a [in, r] and b [r, out], got {given}.")
    for name, matrix in (("kernel", kernel), ("a", a)):
        if jnp.shape(x)[-1] != jnp.shape(matrix)[0]:
            raise ValueError(f"lora_dense: x has {jnp.shape(x)[-1]} features, {name} expects {jnp.shape(matrix)[0]} ({given}).")
    if (jnp.shape(a)[1], jnp.shape(kernel)[1]) != jnp.shape(b):
        wanted = (jnp.shape(a)[1], jnp.shape(kernel)[1])
        raise ValueError(f"lora_dense: b has shape {jnp.shape(b)}, expected {wanted}, that of a and kernel ({given}).")
    if bias is not None and jnp.shape(bias) != jnp.shape(kernel)[1:]:
        raise ValueError(
            f"lora_dense: bias has shape {jnp.shape(bias)}, expected {jnp.shape(kernel)[1:]} ({shapes(kernel=kernel)})."
        )
    matrix = jax.lax.stop_gradient(jnp.asarray(kernel)) if frozen else jnp.asarray(kernel)
    low = jnp.matmul(x, a, precision=precision)
    y = jnp.matmul(x, matrix, precision=precision) + scale * jnp.matmul(low, b, precision=precision)
    return with_bias(y, bias)
