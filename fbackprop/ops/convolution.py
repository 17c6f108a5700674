"""Convolution (cross-correlation) over 1, 2 or 3 spatial dimensions.

One spatial dimension, one group; o counts outputs, k kernel taps, s the stride, d the kernel's dilation, l the input's
dilation (l − 1 zeros between neighbours of x), a the padding in front, X the dilated and padded x:

    y[o, f] = Σ_k Σ_c X[o s + k d, c] K[k, c, f] + b[f],       X[i l + a, c] = x[i, c], zero elsewhere

    dX[p, c]    = Σ_f Σ_{o s + k d = p} dy[o, f] K[k, c, f]
    dx[i, c]    = dX[i l + a, c]
    dK[k, c, f] = Σ_n Σ_o X[o s + k d, c] dy[o, f]
    db[f]       = Σ_n Σ_o dy[o, f]

With groups, c and f run within a group. Each of the three sums is a convolution again, or, for depthwise kernels, a sum of
shifted products: ``_convolving.py`` has the forms. Kept are x and the kernel. CIRCULAR and REFLECT padding copies elements of
x, so their cotangents add up where they came from.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import batched, nbytes, require_float, shapes, wide_type, with_bias
from fbackprop.ops._convolving import Geometry, convolve, input_cotangent, kernel_cotangent, numbers
from fbackprop.ops._windows import (
    Padding,
    Pads,
    check_fits,
    pad_by_copying,
    pads,
    per_dimension,
    spatial_dimensions,
    unpad_by_adding,
)
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["conv"]

_COPYING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
Ints = int | Sequence[int] | None


class _Plan(NamedTuple):
    """The options of a convolution, one number for each spatial dimension."""

    dims: int
    strides: tuple[int, ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    pads: Pads
    mode: str | None  # how padding copies, None for zeros
    groups: int


def _plan(
    x: Any, kernel: Any, strides: Ints, padding: Padding, input_dilation: Ints, kernel_dilation: Ints, groups: int
) -> _Plan:
    who, dims = "conv", spatial_dimensions("conv", x, kernel)
    (*window, cin, cout), features = jnp.shape(kernel), jnp.shape(x)[-1]
    if not isinstance(groups, int) or groups < 1 or features % groups or cout % groups:
        raise ValueError(
            f"conv: feature_group_count {groups} must divide the {features} features of x and the {cout} of the kernel."
        )
    if cin * groups != features:
        raise ValueError(
            f"conv: x has {features} features in {groups} group{'s' * (groups > 1)}, kernel expects {cin} a group "
            f"({shapes(x=x, kernel=kernel)})."
        )
    s = per_dimension(who, "strides", strides, dims)
    l = per_dimension(who, "input_dilation", input_dilation, dims)
    d = per_dimension(who, "kernel_dilation", kernel_dilation, dims)
    sizes = jnp.shape(x)[-1 - dims : -1]
    spread = [max((n - 1) * li + 1, 0) for n, li in zip(sizes, l)]
    reach = [(w - 1) * di + 1 for w, di in zip(window, d)]
    names = ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")
    mode = _COPYING.get(padding) if isinstance(padding, str) else None
    # Copying pads x itself, before zeros are put between its elements.
    amount = pads(who, padding, sizes if mode else spread, reach, s, names=names)
    if padding == "CAUSAL" and any(li > 1 for li in l):
        raise ValueError("conv: CAUSAL padding and input_dilation do not go together.")
    if mode == "reflect" and any(max(p) >= n for p, n in zip(amount, sizes)):
        raise ValueError(f"conv: REFLECT padding {amount} needs an image that is larger than it, got {sizes}.")
    if mode:
        spread = [(n + sum(p) - 1) * li + 1 for n, p, li in zip(sizes, amount, l)]
    check_fits(who, spread, reach, ((0, 0),) * dims if mode else amount)
    return _Plan(dims, s, l, d, amount, mode, groups)


def _convolve(x: Any, kernel: Any, bias: Any, plan: _Plan, precision: Any) -> jax.Array:
    images, kernel, geometry = _prepared(x, kernel, plan, precision)
    y = convolve(images, kernel, geometry)
    return _finished(y, x, bias, plan)


def _prepared(x: Any, kernel: Any, plan: _Plan, precision: Any) -> tuple[jax.Array, jax.Array, Geometry]:
    """Images [n, *spatial, features] and kernel in one dtype; padding that copies is done."""
    dtype = jnp.result_type(x, kernel)
    images = batched(jnp.asarray(x), plan.dims + 1).astype(dtype)
    amount = plan.pads
    if plan.mode:
        images, amount = pad_by_copying(images, plan.pads, plan.mode), ((0, 0),) * plan.dims
    geometry = Geometry(plan.strides, amount, plan.kernel_dilation, plan.input_dilation, plan.groups, precision)
    return images, jnp.asarray(kernel).astype(dtype), geometry


def _finished(y: jax.Array, x: Any, bias: Any, plan: _Plan) -> jax.Array:
    """The batch dimensions of x again, and the bias."""
    y = y.reshape(*jnp.shape(x)[: jnp.ndim(x) - plan.dims - 1], *y.shape[1:])
    return with_bias(y, bias)


class _Saved(NamedTuple):
    x: jax.Array
    kernel: jax.Array


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "SAME",
    input_dilation: Ints = 1,
    kernel_dilation: Ints = 1,
    feature_group_count: int = 1,
    precision: Any = None,
) -> tuple[jax.Array, _Saved]:
    plan = _plan(x, kernel, strides, padding, input_dilation, kernel_dilation, feature_group_count)
    return _convolve(x, kernel, bias, plan, precision), _Saved(jnp.asarray(x), jnp.asarray(kernel))


def _backward(
    saved: _Saved,
    dy: jax.Array,
    *,
    strides: Ints,
    padding: Padding,
    input_dilation: Ints,
    kernel_dilation: Ints,
    feature_group_count: int,
    precision: Any,
) -> tuple[Any, ...]:
    x, kernel = saved
    plan = _plan(x, kernel, strides, padding, input_dilation, kernel_dilation, feature_group_count)
    images, taps, geometry = _prepared(x, kernel, plan, precision)
    g = batched(dy, plan.dims + 1).astype(taps.dtype)
    dx = input_cotangent(g, taps, images.shape[1:-1], geometry)
    if plan.mode:
        dx = unpad_by_adding(dx, plan.pads, plan.mode)
    dbias = dy.astype(wide_type(dy)).sum(tuple(range(dy.ndim - 1)))
    return dx.reshape(x.shape), kernel_cotangent(images, g, kernel.shape, geometry), dbias


def _k(*shape: int) -> Any:
    fan_in = 1
    for n in shape[:-1]:
        fan_in *= n
    return normal(*shape, scale=fan_in**-0.5)


@rule(
    forward=_forward,
    backward=_backward,
    static=["strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "precision"],
    samples=[
        sample(normal(2, 5, 6, 3), normal(3, 2, 3, 4), normal(4)),
        sample(normal(2, 7, 6, 4), normal(3, 3, 2, 6), strides=(2, 3), padding="VALID", feature_group_count=2),
        sample(
            normal(6, 7, 3),
            normal(3, 2, 1, 3),
            strides=(3, 2),
            padding=((2, 0), 1),
            kernel_dilation=(2, 1),
            feature_group_count=3,
        ),
        sample(normal(2, 9, 3), normal(3, 3, 4), normal(4), padding="CAUSAL", kernel_dilation=2),
        sample(normal(2, 6, 5, 2), normal(3, 4, 2, 3), padding="CIRCULAR", strides=2),
        sample(normal(2, 6, 5, 2), normal(3, 3, 2, 3), padding="REFLECT"),
        sample(normal(1, 3, 4, 3, 2), normal(2, 2, 2, 2, 3), strides=2),
        sample(normal(2, 5, 2), normal(3, 2, 3), input_dilation=2, padding=1, strides=3),
    ],
    workloads=[
        sample(normal(64, 28, 28, 32), _k(3, 3, 32, 32), note="SAME"),
        sample(normal(32, 16, 16, 128), _k(3, 3, 128, 128), note="SAME"),
        sample(normal(32, 28, 28, 64), _k(3, 3, 1, 64), feature_group_count=64, note="SAME, depthwise: 64 groups"),
        sample(normal(32, 28, 28, 64), _k(3, 3, 16, 64), feature_group_count=4, note="SAME, 4 groups"),
        sample(normal(16, 56, 56, 64), _k(3, 3, 64, 128), strides=2, note="SAME, strides 2"),
        sample(normal(32, 2048, 64), _k(7, 64, 64), padding="CAUSAL", note="1-D, CAUSAL"),
    ],
    keeps="x, kernel",
    minimum=lambda x, kernel: nbytes(x, kernel),
)
def conv(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "SAME",
    input_dilation: Ints = 1,
    kernel_dilation: Ints = 1,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Convolution as neural networks mean it (cross-correlation), over 1, 2 or 3 spatial dimensions.

    x [..., *spatial, in], kernel [*window, in / groups, out], bias [out] -> y [..., *spatial', out]. Any number of batch
    dimensions, also none; the kernel tells how many dimensions are spatial.

    Args:
      strides, input_dilation, kernel_dilation: an integer, or one for each spatial dimension.
      padding: "SAME" (spatial' = ⌈spatial / stride⌉), "VALID", "CIRCULAR" (periodic), "REFLECT", "CAUSAL" (one dimension:
        an output sees no later input), an integer, or an integer or (before, behind) for each spatial dimension.
      feature_group_count: groups that do not see each other; equal to ``in`` it is a depthwise convolution.
      precision: as in ``jax.lax.conv_general_dilated``; used by the backward too.
    Raises:
      ValueError: where shapes or options do not fit. TypeError: where an array is not floating-point.
    """
    require_float("conv", x=x, kernel=kernel, bias=bias)
    plan = _plan(x, kernel, strides, padding, input_dilation, kernel_dilation, feature_group_count)
    if bias is not None and jnp.shape(bias) != jnp.shape(kernel)[-1:]:
        raise ValueError(
            f"conv: bias has shape {jnp.shape(bias)}, expected {jnp.shape(kernel)[-1:]} ({shapes(kernel=kernel)})."
        )
    images, taps, geometry = _prepared(x, kernel, plan, precision)
    y = jax.lax.conv_general_dilated(
        images, taps, plan.strides, geometry.pads, plan.input_dilation, plan.kernel_dilation,
        numbers("NSC", "SIO", "NSC", plan.dims), plan.groups, precision=precision,
    )  # fmt: skip
    return _finished(y, x, bias, plan)
