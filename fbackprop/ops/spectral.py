"""spectral_scale: weights divided by their spectral norm, as two unit vectors tell it.

    σ = vᵀ W u          y = W / σ

    dσ = −Σ dy y / σ

    dW = dy / σ + dσ v uᵀ          du = dσ Wᵀ v          dv = dσ W u

W is the kernel as a matrix, its axes before the last as one. Where u and v are singular vectors, σ is a singular value, which
does not change with them in first order: ``spectral_norm`` follows the largest by power iteration, and takes u and v for
constants. Where σ is 0, y = W. Kept: W, u, v and σ.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide, wide_type
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["spectral_scale"]


class _Saved(NamedTuple):
    kernel: jax.Array
    u: jax.Array
    v: jax.Array
    sigma: jax.Array


def matrix_of(kernel: ArrayLike) -> jax.Array:
    """[all other axes, out], in float32 or wider."""
    shape = jnp.shape(kernel)
    return wide(kernel).reshape(math.prod(shape[:-1]), shape[-1])


def _divided(kernel: ArrayLike, u: ArrayLike, v: ArrayLike) -> tuple[jax.Array, jax.Array]:
    matrix = matrix_of(kernel)
    sigma = wide(v).astype(matrix.dtype) @ matrix @ wide(u).astype(matrix.dtype)
    return (matrix / jnp.where(sigma == 0, 1, sigma)).reshape(jnp.shape(kernel)).astype(jnp.result_type(kernel)), sigma


def _forward(kernel: ArrayLike, u: ArrayLike, v: ArrayLike) -> tuple[jax.Array, _Saved]:
    y, sigma = _divided(kernel, u, v)
    return y, _Saved(jnp.asarray(kernel), jnp.asarray(u), jnp.asarray(v), sigma)


def _backward(saved: _Saved, dy: jax.Array) -> tuple[Any, ...]:
    matrix, g, sigma = matrix_of(saved.kernel), matrix_of(dy), saved.sigma
    u, v = (wide(a).astype(matrix.dtype) for a in (saved.u, saved.v))
    divisor = jnp.where(sigma == 0, 1, sigma)
    dsigma = jnp.where(sigma == 0, 0, -jnp.sum(g * matrix) / jnp.square(divisor))
    # Where σ is infinite y is 0, whatever moves: then dσ is 0, and what it is multiplied by need not be finite.
    outer, right = (jnp.where(jnp.isinf(sigma), 0, a) for a in (v[:, None] * u[None, :], matrix @ u))
    dmatrix = g / divisor + dsigma * outer
    return dmatrix.reshape(saved.kernel.shape), dsigma * (v @ matrix), dsigma * right


@rule(
    forward=_forward,
    backward=_backward,
    samples=[sample(normal(5, 4), normal(4), normal(5)), sample(normal(3, 2, 4), normal(4), normal(6))],
    workloads=[sample(normal(3, 3, 256, 512), normal(512), normal(2304))],
    keeps="kernel, u, v, a number",
    minimum=lambda kernel, u, v: nbytes(kernel, u, v) + jnp.dtype(wide_type(kernel)).itemsize,
)
def spectral_scale(kernel: ArrayLike, u: ArrayLike, v: ArrayLike) -> jax.Array:
    """Weights divided by the length that they give a direction: y = kernel / (vᵀ · kernel · u).

    kernel [..., out], u [out], v [the product of the other axes] -> [..., out], of the dtype of the kernel. Where the divisor
    is 0, y is the kernel.

    Raises:
      ValueError: where a shape does not fit. TypeError: where an array is not floating-point.
    Source: Miyato et al. 2018, arXiv:1802.05957.
    """
    require_float("spectral_scale", kernel=kernel, u=u, v=v)
    shape = jnp.shape(kernel)
    if len(shape) < 2 or jnp.shape(u) != shape[-1:] or jnp.shape(v) != (math.prod(shape[:-1]),):
        raise ValueError(
            f"spectral_scale: expected kernel [..., out], u [out] and v with the product of the other axes, got "
            f"{shapes(kernel=kernel, u=u, v=v)}."
        )
    return _divided(kernel, u, v)[0]
