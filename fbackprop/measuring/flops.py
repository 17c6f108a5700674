"""Floating-point operations of matrix products and convolutions, counted in a traced program."""

import math
from collections.abc import Callable
from typing import Any

from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Jaxpr,
)

__all__ = ["matmul_flops", "times_run"]


def matmul_flops(program: Any, platform: str = "cpu") -> int:
    """Two for each multiplication and addition of every ``dot_general`` and ``conv_general_dilated``, as traced: before the
    compiler drops or shares anything.

    A scan counts its body as often as it runs; of the branches of a ``cond`` the dearest counts, of those of
    ``jax.lax.platform_dependent`` that of the platform; a ``while`` loop, whose number of turns is not known, counts once. A
    convolution over a dilated input counts the zeros between its elements.

    Args:
      program: a jaxpr, such as ``jax.make_jaxpr(f)(*args)``.
    """
    return _total(program, _flops, platform)


def times_run(program: Any, primitive: str, platform: str = "cpu") -> int:
    """How often a program runs a primitive, counted like ``matmul_flops``."""
    return _total(program, lambda equation: int(equation.primitive.name == primitive), platform)


def _total(program: Any, count: Callable[[Any], int], platform: str) -> int:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(count(equation) + _inside(equation, count, platform) for equation in jaxpr.eqns)


def _inside(equation: Any, count: Callable[[Any], int], platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    inner = [_total(p, count, platform) for p in _programs(params)]
    if name == "cond" and (platforms := params.get("branches_platforms")):
        return next(n for n, names in zip(inner, platforms, strict=True) if names is None or platform in names)
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = params["dimension_numbers"].rhs_spec, equation.outvars[0].aval.shape
        shape = equation.invars[1].aval.shape
        return 2 * math.prod(out) * math.prod(shape[i] for i in kernel[1:])  # without the axis of output features
    return 0


def _programs(params: dict[str, Any]) -> list[Any]:
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v for v in values if isinstance(v, (Jaxpr, ClosedJaxpr))]
