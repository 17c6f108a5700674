"""Finds activations: chains of elementwise equations from one array to another whose function is one in the table."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fbackprop import ops
from fbackprop.accelerating.evaluation import is_elementwise
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.sites import Site, constant, proved

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
        for x in reversed(list(_sources(equation, out))):
            if site := _site(program, x, out, equation):
                yield site
                break


def _sources(equation: Equation, out: Value, most: int = 24) -> Iterator[Value]:
    """Single arrays of the same shape that the output is an elementwise function of, the nearest first."""
    frontier, curved = {id(out): out}, False
    for step in range(most):
        open_ = [v for v in frontier.values() if v.maker is not None]
        if not open_:
            return
        latest = max(open_, key=lambda v: v.maker.order if v.maker else -1)
        maker = latest.maker
        assert maker is not None
        spread = maker.name == "broadcast_in_dim" and constant(latest)
        if not spread and (not is_elementwise(maker) or len(maker.outputs) != 1):
            return
        curved |= maker.name in _CURVED
        del frontier[id(latest)]
        frontier.update((id(v), v) for v in maker.inputs if not constant(v))
        if len(frontier) == 1:
            (x,) = frontier.values()
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
                spelled.call = _TABLE[entry][1]
                return spelled
    return None
