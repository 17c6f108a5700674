"""Finds activations: chains of elementwise equations from one array to another whose function is one in the table. Where it
stands in a feed-forward block, ``feeding`` takes the block."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fbackprop import ops
from fbackprop.accelerating.evaluation import is_elementwise
from fbackprop.accelerating.feeding import fed
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.sites import Site, proved
from fbackprop.accelerating.walking import backwards, constant

__all__ = ["activations"]

# Smooth ones, of which autodiff keeps more than x. (At a kink another spelling may have another derivative.)
_TABLE: tuple[tuple[str, Callable[[Any], Any], tuple[Any, ...]], ...] = (
    ("gelu", lambda x: (ops.gelu(x),), (True,)),
    ("gelu", lambda x: (ops.gelu(x, approximate=False),), (False,)),
    ("silu", lambda x: (ops.silu(x),), ()),
    ("mish", lambda x: (ops.mish(x),), ()),
    ("softplus", lambda x: (ops.softplus(x),), ()),
    ("log_sigmoid", lambda x: (ops.log_sigmoid(x),), ()),
    ("squareplus", lambda x: (ops.squareplus(x),), ()),
)
# The same functions with constants rounded to a narrow dtype, as jax.nn spells them.
_SPELLINGS: tuple[tuple[str, Callable[[Any], Any], int], ...] = (
    ("gelu", lambda x: (jax.nn.gelu(x),), 0),
    ("gelu", lambda x: (jax.nn.gelu(x, approximate=False),), 1),
)
_CURVED = frozenset(("exp", "expm1", "tanh", "logistic", "erf", "erfc", "log1p", "sqrt", "rsqrt", "custom_jvp_call"))
_LARGE = 1024  # elements: below that nothing is gained


def activations(program: Program, taken: set[int]) -> Iterator[Site]:
    """From the last equation to the first, the longest chain of each."""
    for equation in reversed(program.equations):
        if id(equation) in taken or len(equation.outputs) != 1 or not is_elementwise(equation):
            continue
        out = equation.outputs[0]
        for x in reversed(list(_sources(out))):
            if site := _site(program, x, out, equation):
                yield fed(program, site, taken) or site
                break


def _sources(out: Value, most: int = 24) -> Iterator[Value]:
    """Single arrays of the same shape that the output is an elementwise function of, the nearest first."""

    def through(value: Value, maker: Equation) -> bool:
        spread = maker.name == "broadcast_in_dim" and constant(value)
        return spread or (is_elementwise(maker) and len(maker.outputs) == 1)

    curved = False
    for step, (maker, frontier) in enumerate(backwards(out, through, most)):
        curved |= maker.name in _CURVED
        if len(frontier) == 1:
            (x,) = frontier
            if curved and (step or maker.name == "custom_jvp_call") and x.is_float and x.shape == out.shape:
                yield x


def _site(program: Program, x: Value, out: Value, anchor: Equation) -> Site | None:
    if not out.is_float or x.dtype != out.dtype or out.size < _LARGE:
        return None
    for name, call, options in _TABLE:
        site = Site(name, [x], [out], call, options, anchor)
        if not proved(program, site):
            return site
    if np.dtype(x.dtype).itemsize < 4:
        for name, spelling, entry in _SPELLINGS:
            spelled = Site(name, [x], [out], spelling, ("spelled", entry), anchor)
            if not proved(program, spelled):
                _, spelled.call, spelled.options = _TABLE[entry]
                return spelled
    return None
