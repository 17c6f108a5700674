"""Compositions of linear maps and windows: dense_general and the tied head, spectral norm, and pooling by any function."""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fbackprop import ops
from fbackprop.ops._arithmetic import canonical_axes, require_epsilon, require_float, shapes
from fbackprop.ops._pooling import images, sliding, unbatched
from fbackprop.ops._windows import Padding
from fbackprop.ops.spectral import matrix_of

__all__ = ["dense_general", "embed_attend", "pool", "spectral_norm"]


def dense_general(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_dims: int | Sequence[int] = (),
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """A fully connected layer over any axes, as ``flax.linen.DenseGeneral`` is. A composition of einsum_dense.

    x, kernel [*batch, *contracted, *features], bias [*batch, *features] -> [*batch, the other axes of x, *features].

    Args:
      axis: of x, to sum over, in the order that the kernel has them.
      batch_dims: leading axes of x, each of which has its own kernel.
      precision, preferred_element_type: as for ``dense``.
    Raises:
      ValueError: where axes or shapes do not fit.
    """
    equation = general_equation("dense_general", jnp.shape(x), jnp.shape(kernel), axis, batch_dims)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    return ops.einsum_dense(x, kernel, bias, einsum_str=equation, **options)


def general_equation(
    who: str, x: tuple[int, ...], kernel: tuple[int, ...], axis: int | Sequence[int], batch_dims: int | Sequence[int]
) -> str:
    """The einsum of dense_general, for arrays of these shapes."""
    ndim, given = len(x), f"(x {x}, kernel {kernel})"
    contracted = [axis] if isinstance(axis, int) else list(axis)
    canonical_axes(who, contracted, ndim)
    contracted = [a % ndim for a in contracted]
    batch = sorted([batch_dims] if isinstance(batch_dims, int) else batch_dims)
    if batch != list(range(len(batch))) or set(batch) & set(contracted):
        raise ValueError(f"{who}: batch_dims is {batch_dims!r}, expected leading axes of x, 0, 1, …, that are not in axis.")
    if len(kernel) <= len(batch) + len(contracted):
        raise ValueError(f"{who}: expected kernel [*batch, *contracted, *features], got {given}.")
    left, rest = string.ascii_letters[:ndim], string.ascii_letters[ndim:]
    features = rest[: len(kernel) - len(batch) - len(contracted)]
    right = "".join(left[a] for a in (*batch, *contracted)) + features
    return f"{left},{right}->{''.join(c for i, c in enumerate(left) if i not in contracted)}{features}"


def embed_attend(query: ArrayLike, embedding: ArrayLike, *, precision: Any = None) -> jax.Array:
    """The logits of a head that is tied to the table of ``embed``: query · embeddingᵀ. A composition of einsum_dense.

    query [..., features], embedding [vocabulary, features] -> [..., vocabulary]. (With the loss after it, in one:
    ``linear_cross_entropy`` with ``transposed=True``.)

    Raises:
      ValueError: where the features do not fit.
    """
    return ops.einsum_dense(query, embedding, einsum_str="...d,vd->...v", precision=precision)


def spectral_norm(
    kernel: ArrayLike, u: ArrayLike, *, n_steps: int = 1, epsilon: float = 1e-12
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divides weights by their largest singular value, an estimate of which goes on from call to call.

    kernel [..., out], u [1, out] -> (kernel / sigma [..., out], the new u [1, out], sigma []). A composition: power iteration
    without a gradient, then spectral_scale. u and sigma as returned are state, without a gradient. Formula and defaults are
    those of ``flax.linen.SpectralNorm``.

    Args:
      u: the estimate of the right singular vector; at first random. n_steps: of power iteration.
      epsilon: added to squared lengths.
    Raises:
      ValueError: where a shape does not fit, or n_steps is not positive. TypeError: where an array is not floating-point.
    Source: Miyato et al. 2018, arXiv:1802.05957.
    """
    require_float("spectral_norm", kernel=kernel, u=u)
    require_epsilon("spectral_norm", epsilon)
    if jnp.ndim(kernel) < 2 or jnp.shape(u) != (1, jnp.shape(kernel)[-1]):
        raise ValueError(f"spectral_norm: expected kernel [..., out] and u [1, out], got {shapes(kernel=kernel, u=u)}.")
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"spectral_norm: n_steps is {n_steps!r}, expected 1 or more.")

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x)) + epsilon)

    matrix = jax.lax.stop_gradient(matrix_of(kernel))
    right, left = jax.lax.stop_gradient(jnp.ravel(u).astype(matrix.dtype)), jnp.zeros(matrix.shape[0], matrix.dtype)
    for _ in range(n_steps):
        left = unit(matrix @ right)
        right = unit(left @ matrix)
    sigma = (left @ matrix @ right).astype(jnp.result_type(u))
    return ops.spectral_scale(kernel, right, left), right[None].astype(jnp.result_type(u)), sigma


_KNOWN: dict[Any, tuple[Any, float, Any]] = {
    **{f: (ops.max_pool, -math.inf, jnp.maximum) for f in (jax.lax.max, jnp.maximum)},
    **{f: (ops.min_pool, math.inf, jnp.minimum) for f in (jax.lax.min, jnp.minimum)},
    **{f: (ops.sum_pool, 0.0, None) for f in (jax.lax.add, jnp.add)},
}


def pool(
    inputs: ArrayLike,
    init: float,
    reduce_fn: Callable[[jax.Array, jax.Array], jax.Array],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Reduces each window by a function of two arguments, as ``flax.linen.pool`` does. A composition.

    inputs [..., *space, c] -> [..., *space', c].

    Args:
      init: what the reduction begins with, and what stands in the padding.
      reduce_fn: jax.lax.max, min or add, which are max_pool, min_pool and sum_pool; any other function, such as
        jnp.logaddexp, is applied to the elements of a window in turn, and differentiated by JAX. (Flax's has no gradient.)
      window_shape, strides, padding: as for ``max_pool``.
    Raises:
      ValueError: where an option does not fit.
    """
    op, neutral, join = _KNOWN.get(reduce_fn, (None, 0.0, None))
    if op is not None and (join is not None or init == neutral):
        y = op(inputs, tuple(window_shape), None if strides is None else tuple(strides), padding)
        return y if join is None or init == neutral else join(y, jnp.asarray(init, y.dtype))
    require_float("pool", inputs=inputs)
    if not callable(reduce_fn):
        raise TypeError(f"pool: reduce_fn is {reduce_fn!r}, expected a function of two arrays, such as jax.lax.max.")
    x = jnp.asarray(inputs)
    windows = sliding("pool", x.shape, window_shape, strides, padding, None)
    padded, taps = windows.padded(images(x, windows), init), []
    for place in np.ndindex(*windows.taps):
        taps.append(functools.reduce(lambda tap, own: windows.tap(tap, own[1], own[0]), enumerate(place), padded))
    y = functools.reduce(reduce_fn, taps, jnp.full_like(taps[0], init))
    return unbatched(y, x)
