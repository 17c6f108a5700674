"""Finds pooling and convolutions: one equation each, whose options say all."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program
from fbackprop.accelerating.sites import Near, Site, misfit

__all__ = ["convolutions", "pools"]

_POOLS = {"reduce_window_max": ops.max_pool, "reduce_window_min": ops.min_pool, "reduce_window_sum": ops.sum_pool}


def pools(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    for equation in program.equations:
        if equation.name in _POOLS and id(equation) not in taken:
            yield _pool(equation)
        elif equation.name == "reduce_window" and len(equation.outputs) == 1 and equation.outputs[0].is_float:
            yield Near("pool", "not a maximum, minimum or sum from its neutral element", equation)


def _pool(equation: Equation) -> Site | Near:
    op, p, x = _POOLS[equation.name], equation.params, equation.inputs[0]
    name = op.__name__
    window, strides, pads = p["window_dimensions"], p["window_strides"], p["padding"]
    dilation = p["window_dilation"] or (1,) * len(window)
    every = list(zip(window, strides, pads, dilation))
    moving = [i for i, (w, s, pad, _) in enumerate(every) if w != 1 or s != 1 or tuple(pad) != (0, 0)]
    if not x.is_float:
        return Near(name, f"of {x.dtype}", equation)
    if any(n != 1 for n in p["base_dilation"] or (1,)):
        return Near(name, "over a dilated input", equation)
    if not moving:
        return Near(name, "windows of one element", equation)
    if any(min(pad) < 0 for _, _, pad, _ in every) or any(a >= w * d or b >= w * d for w, _, (a, b), d in every):
        return Near(name, "windows that hold nothing but padding", equation)
    first, last = moving[0], moving[-1] + 1
    if last - first > 3:
        return Near(name, f"over {last - first} dimensions", equation)
    options = tuple(window[first:last]), tuple(strides[first:last])
    padding, spread = tuple(map(tuple, pads[first:last])), tuple(dilation[first:last])

    def call(x: Any) -> tuple[Any]:
        # Features stand last: what comes behind the spatial axes is one axis of them, or one of length 1.
        behind = int(np.prod(x.shape[last:]))
        y = op(x.reshape(*x.shape[:last], behind), *options, padding, window_dilation=spread)
        return (y.reshape(*y.shape[:-1], *x.shape[last:]),)

    return _fitting(Site(name, [x], equation.outputs, call, (), equation, equations=[equation]), equation)


def _fitting(site: Site, equation: Equation) -> Site | Near:
    why = misfit(site)
    return Near(site.op, why, equation) if why else site


def convolutions(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    """Grouped, depthwise and transposed ones. Of plain ones JAX has the same derivative as ``fb.conv``."""
    for equation in program.equations:
        if equation.name != "conv_general_dilated" or id(equation) in taken:
            continue
        p = equation.params
        if p["feature_group_count"] > 1 or any(d > 1 for d in p["lhs_dilation"]):
            yield _convolution(equation)


def _convolution(equation: Equation) -> Site | Near:
    p, (x, kernel) = equation.params, equation.inputs
    groups, spread = p["feature_group_count"], tuple(p["lhs_dilation"])
    name = "conv" if groups > 1 else "conv_transpose"
    numbers, dims = p["dimension_numbers"], len(p["window_strides"])
    if p["batch_group_count"] != 1:
        return Near(name, "groups of the batch", equation)
    if not x.is_float or x.dtype != kernel.dtype or equation.outputs[0].dtype != x.dtype:
        return Near(name, "of several dtypes", equation)
    if groups > 1 and any(d > 1 for d in spread):
        return Near(name, "transposed and in groups", equation)
    if dims > 3 or any(min(pad) < 0 for pad in p["padding"]):
        return Near(name, "cut, or over more than three dimensions", equation)
    if name == "conv_transpose" and any(s != 1 for s in p["window_strides"]):
        return Near(name, "with strides", equation)
    to_last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    to_kernel = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    back = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    padding, dilation = tuple(map(tuple, p["padding"])), tuple(p["rhs_dilation"])
    strides, precision = tuple(p["window_strides"]), p["precision"]

    def call(x: Any, kernel: Any) -> tuple[Any]:
        x, kernel = jnp.transpose(x, to_last), jnp.transpose(kernel, to_kernel)
        if name == "conv_transpose":
            y = ops.conv_transpose(x, kernel, strides=spread, padding=padding, kernel_dilation=dilation, precision=precision)
        else:
            y = ops.conv(
                x, kernel, strides=strides, padding=padding, kernel_dilation=dilation, feature_group_count=groups,
                precision=precision,
            )  # fmt: skip
        return (jnp.transpose(y, tuple(int(a) for a in back)),)

    return _fitting(Site(name, [x, kernel], equation.outputs, call, (), equation, equations=[equation]), equation)
