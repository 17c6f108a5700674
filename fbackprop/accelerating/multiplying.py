"""Finds dense layers over more than one batch axis: a product of [..., in] with a kernel [in, out] or [out, in].

The derivative of such a product with respect to its kernel contracts several axes at once, which compilers do worse than one;
``fb.dense`` lays them out as one.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program
from fbackprop.accelerating.sites import Site, misfit

__all__ = ["products"]


def products(program: Program, taken: set[int]) -> Iterator[Site]:
    for equation in program.equations:
        if equation.name == "dot_general" and id(equation) not in taken and (site := _dense(equation)) is not None:
            yield site


def _dense(equation: Equation) -> Site | None:
    (contracted, batch), out = equation.params["dimension_numbers"], equation.outputs[0]
    first = 0 if len(equation.inputs[0].shape) > 2 else 1  # which operand is x
    x, kernel = equation.inputs[first], equation.inputs[1 - first]
    rank = len(x.shape)
    if any(map(len, batch)) or rank < 3 or len(kernel.shape) != 2 or tuple(contracted[first]) != (rank - 1,):
        return None
    if not x.is_float or not x.dtype == kernel.dtype == out.dtype or len(contracted[1 - first]) != 1:
        return None
    turned, precision = contracted[1 - first][0] == 1, equation.params["precision"]

    def call(x: Any, kernel: Any) -> tuple[Any]:
        y = ops.dense(x, kernel.T if turned else kernel, precision=precision)
        return (y if first == 0 else jnp.moveaxis(y, -1, 0),)

    site = Site("dense", [x, kernel], [out], call, (), equation, equations=[equation])
    return None if misfit(site) else site
