"""Transposed convolution over 1, 2 or 3 spatial dimensions: the adjoint of a convolution, as a layer that enlarges.

One spatial dimension; i counts inputs, P outputs, t kernel taps, s the stride, d the kernel's dilation, a the padding in front
of x, between whose neighbours s − 1 zeros are put:

    y[P, f]     = Σ_t Σ_c [P + t d − a = i s] x[i, c] K[t, c, f] + b[f]

    dx[i, c]    = Σ_t Σ_f dy[i s − t d + a, f] K[t, c, f]
    dK[t, c, f] = Σ_n Σ_i x[i, c] dy[i s − t d + a, f]
    db[f]       = Σ_n Σ_P dy[P, f]

With u = (taps − 1) − t and a' = (taps − 1) d − a both read dy at i s + u d − a': dx is an ordinary convolution of dy with
stride s, and dK what an ordinary convolution with stride s sends to its kernel, where dy stands for the image and x for the
cotangent. Neither needs zeros between elements: autodiff of the definition finds dK with x as an image dilated by s, most of
it zeros, and a kernel as large as dy. Kept are x and the kernel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import batched, nbytes, require_float, shapes, wide_type, with_bias
from fbackprop.ops._convolving import Geometry, convolve, kernel_cotangent, numbers
from fbackprop.ops._windows import Padding, Pads, check_fits, pads, per_dimension, spatial_dimensions
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["conv_transpose"]

Ints = int | Sequence[int] | None


class _Plan(NamedTuple):
    """One number for each spatial dimension."""

    strides: tuple[int, ...]
    dilation: tuple[int, ...]  # of the kernel
    reach: tuple[int, ...]  # of the dilated kernel
    sizes: tuple[int, ...]  # of x
    pads: Pads  # of x with its zeros
    wrapped: tuple[tuple[int, int], ...] | None  # CIRCULAR: (period, where y begins in it)


def _plan(
    x: Any, kernel: Any, bias: Any, strides: Ints, padding: Padding, kernel_dilation: Ints, transpose_kernel: bool
) -> _Plan:
    who, dims = "conv_transpose", spatial_dimensions("conv_transpose", x, kernel)
    *window, cin, cout = jnp.shape(kernel)
    if transpose_kernel:
        cin, cout = cout, cin
    if cin != jnp.shape(x)[-1]:
        raise ValueError(
            f"{who}: x has {jnp.shape(x)[-1]} features, kernel expects {cin} ({shapes(x=x, kernel=kernel)}, "
            f"transpose_kernel={transpose_kernel})."
        )
    if bias is not None and jnp.shape(bias) != (cout,):
        raise ValueError(f"{who}: bias has shape {jnp.shape(bias)}, expected {(cout,)} ({shapes(kernel=kernel)}).")
    s = per_dimension(who, "strides", strides, dims)
    d = per_dimension(who, "kernel_dilation", kernel_dilation, dims)
    sizes = jnp.shape(x)[-1 - dims : -1]
    reach = tuple((k - 1) * di + 1 for k, di in zip(window, d))
    valid = tuple((r - 1, max(si, r) - 1) for r, si in zip(reach, s))
    wrapped = None
    if padding == "SAME":  # y of size n s
        front = [r - 1 if si > r - 1 else -(-(r + si - 2) // 2) for r, si in zip(reach, s)]
        amount = tuple((a, r + si - 2 - a) for a, r, si in zip(front, reach, s))
    elif padding in ("VALID", "CIRCULAR"):
        amount = valid
    else:
        amount = pads(who, padding, sizes, reach, s, names=("SAME", "VALID", "CIRCULAR"))
    spread = tuple((n - 1) * si + 1 if n else 0 for n, si in zip(sizes, s))
    check_fits(who, spread, reach, amount)
    if padding == "CIRCULAR":
        # y of the size n s, periodic: what stands out of it is folded back, from both sides alike.
        extra = [(n + a + b - r + 1 - m * si, m * si) for n, (a, b), r, m, si in zip(spread, amount, reach, sizes, s)]
        missing = [-e % (2 * period) for e, period in extra]
        wrapped = tuple((p, (m if transpose_kernel else m + 1) // 2 % p) for m, (_, p) in zip(missing, extra))
    return _Plan(s, d, reach, tuple(sizes), amount, wrapped)


def _oriented(kernel: jax.Array, transpose_kernel: bool) -> jax.Array:
    """[*window, in, out] from a kernel [*window, out, in] that is turned around, or back: it is its own inverse."""
    return jnp.swapaxes(jnp.flip(kernel, tuple(range(kernel.ndim - 2))), -1, -2) if transpose_kernel else kernel


def _folded(y: jax.Array, plan: _Plan) -> jax.Array:
    """CIRCULAR: y[p] = Σ of the elements j of the full result with (j + begin) mod period = p."""
    for axis, (period, begin) in enumerate(plan.wrapped or (), start=1):
        turns = -(-(y.shape[axis] + begin) // period)
        config = [(0, 0, 0)] * y.ndim
        config[axis] = (begin, turns * period - begin - y.shape[axis], 0)
        y = jax.lax.pad(y, jnp.zeros((), y.dtype), config)
        y = y.reshape(*y.shape[:axis], turns, period, *y.shape[axis + 1 :]).sum(axis)
    return y


def _unfolded(dy: jax.Array, sizes: Sequence[int], plan: _Plan) -> jax.Array:
    """The adjoint of ``_folded``: the period again and again, cut to the size of the full result."""
    for axis, ((period, begin), n) in enumerate(zip(plan.wrapped or (), sizes), start=1):
        turns = -(-(n + begin) // period)
        dy = jax.lax.slice_in_dim(jnp.concatenate([dy] * turns, axis), begin, begin + n, axis=axis)
    return dy


class _Saved(NamedTuple):
    x: jax.Array
    kernel: jax.Array


def _transposed(x: Any, kernel: Any, bias: Any, plan: _Plan, transpose_kernel: bool, precision: Any) -> jax.Array:
    x, dims, dtype = jnp.asarray(x), len(plan.strides), jnp.result_type(x, kernel)
    y = jax.lax.conv_general_dilated(
        batched(x, dims + 1).astype(dtype),
        _oriented(jnp.asarray(kernel).astype(dtype), transpose_kernel),
        (1,) * dims,
        plan.pads,
        plan.strides,
        plan.dilation,
        numbers("NSC", "SIO", "NSC", dims),
        precision=precision,
    )
    y = _folded(y, plan)
    y = y.reshape(*x.shape[: x.ndim - dims - 1], *y.shape[1:])
    return with_bias(y, bias)


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "SAME",
    kernel_dilation: Ints = 1,
    transpose_kernel: bool = False,
    precision: Any = None,
) -> tuple[jax.Array, _Saved]:
    plan = _plan(x, kernel, bias, strides, padding, kernel_dilation, transpose_kernel)
    y = _transposed(x, kernel, bias, plan, transpose_kernel, precision)
    return y, _Saved(jnp.asarray(x), jnp.asarray(kernel))


def _backward(
    saved: _Saved,
    dy: jax.Array,
    *,
    strides: Ints,
    padding: Padding,
    kernel_dilation: Ints,
    transpose_kernel: bool,
    precision: Any,
) -> tuple[Any, ...]:
    x, kernel = saved
    plan = _plan(x, kernel, None, strides, padding, kernel_dilation, transpose_kernel)
    dims, dtype = len(plan.strides), jnp.result_type(x, kernel)
    spread = [(n - 1) * s + 1 for n, s in zip(plan.sizes, plan.strides)]
    full = [n + a + b - r + 1 for n, (a, b), r in zip(spread, plan.pads, plan.reach)]
    g = _unfolded(batched(dy, dims + 1).astype(dtype), full, plan)
    # The convolution that this is the adjoint of: its image is like y, its output like x, its kernel [*window, out, in].
    front = [r - 1 - a for r, (a, _) in zip(plan.reach, plan.pads)]
    behind = [n + r - 1 - m - f for n, r, m, f in zip(spread, plan.reach, full, front)]
    ones = (1,) * dims
    geometry = Geometry(plan.strides, tuple(zip(front, behind)), plan.dilation, ones, 1, precision)
    adjoint = _oriented(_oriented(kernel.astype(dtype), transpose_kernel), True)
    dx = convolve(g, adjoint, geometry)
    dadjoint = kernel_cotangent(g, batched(x, dims + 1).astype(dtype), adjoint.shape, geometry)
    dkernel = _oriented(_oriented(dadjoint, True), transpose_kernel)
    dbias = dy.astype(wide_type(dy)).sum(tuple(range(dy.ndim - 1)))
    return dx.reshape(x.shape), dkernel, dbias


@rule(
    forward=_forward,
    backward=_backward,
    static=["strides", "padding", "kernel_dilation", "transpose_kernel", "precision"],
    samples=[
        sample(normal(2, 4, 3, 3), normal(3, 2, 3, 4), normal(4), strides=2),
        sample(normal(2, 5, 4, 3), normal(3, 4, 2, 3), strides=(1, 3), padding="CIRCULAR", transpose_kernel=True),
        sample(normal(5, 3), normal(3, 3, 2), strides=2, padding=((3, 1),), kernel_dilation=2),
        sample(normal(1, 3, 2, 3, 2), normal(2, 3, 2, 2, 3), strides=(2, 1, 3), padding="VALID"),
    ],
    workloads=[
        sample(normal(32, 14, 14, 64), normal(4, 4, 64, 32, scale=(4 * 4 * 64) ** -0.5), strides=2, note="strides 2, SAME")
    ],
    keeps="x, kernel",
    minimum=lambda x, kernel: nbytes(x, kernel),
)
def conv_transpose(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "SAME",
    kernel_dilation: Ints = 1,
    transpose_kernel: bool = False,
    precision: Any = None,
) -> jax.Array:
    """Transposed convolution: x with strides − 1 zeros between neighbours, convolved; it enlarges by the strides.

    x [..., *spatial, in], kernel [*window, in, out], bias [out] -> y [..., *spatial', out]. Any number of batch dimensions,
    also none; the kernel tells how many dimensions are spatial. There are no groups. Values are those of
    ``jax.lax.conv_transpose`` and ``flax.linen.ConvTranspose``.

    Args:
      strides, kernel_dilation: an integer, or one for each spatial dimension.
      padding: "SAME" (spatial' = spatial · strides), "VALID" (spatial · strides + max(window − strides, 0)), "CIRCULAR"
        (periodic, of the size of SAME), or what stands around x with its zeros: an integer, or an integer or (before, behind)
        for each spatial dimension.
      transpose_kernel: the kernel is that of the convolution this is the adjoint of, [*window, out, in]: it is turned around
        and its features exchanged.
      precision: as in ``jax.lax.conv_general_dilated``; used by the backward too.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where an array is not floating-point.
    """
    require_float("conv_transpose", x=x, kernel=kernel, bias=bias)
    plan = _plan(x, kernel, bias, strides, padding, kernel_dilation, transpose_kernel)
    return _transposed(x, kernel, bias, plan, transpose_kernel, precision)
