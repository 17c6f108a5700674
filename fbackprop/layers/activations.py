"""Layers by element: any op of one array as a layer, and PReLU, whose slope is a parameter."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers.base import Initializer, OpLayer, Params, State, float_type, set_option, tuples

__all__ = ["Activation", "Elu", "Gelu", "LeakyRelu", "PReLU", "Relu", "Sigmoid", "Silu", "Softmax", "Softplus", "Tanh"]


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class Activation(OpLayer):
    """An op of one array as a layer: ``Activation(ops.leaky_relu, negative_slope=0.2)``.

    x [...] -> y [...]. The options are those of the op, hashable Python values.
    Raises TypeError where ``op`` is no op with a rule, needs more than one array, or does not have an option.
    """

    op: Any
    options: tuple[tuple[str, Any], ...]

    def __init__(self, op: Any, **options: Any):
        if not hasattr(op, "rule"):
            what = getattr(op, "__name__", repr(op))
            raise TypeError(f"Activation: expected an op of fbackprop.ops, which has a backward by hand, got {what}.")
        _, *others = op.rule.signature.parameters.values()
        known = [p.name for p in others]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"Activation: {op.rule.name} has no option {', '.join(unknown)}; it has {known}.")
        if missing := [p.name for p in others if p.default is inspect.Parameter.empty and p.name not in options]:
            raise TypeError(f"Activation: {op.rule.name} also needs {', '.join(missing)}.")
        set_option(self, "op", op)
        set_option(self, "options", tuple(sorted((n, tuples(v)) for n, v in options.items())))
        try:
            hash(self.options)
        except TypeError:
            raise TypeError(
                f"Activation: the options of {op.rule.name} must be hashable Python values, got {options}."
            ) from None

    @property
    def input(self) -> str:  # type: ignore[override]
        return next(iter(self.op.rule.signature.parameters))

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        return {self.input: x, **dict(self.options)}, None

    @property
    def name(self) -> str:
        return f"Activation({self.op.rule.name})"

    def __repr__(self) -> str:
        return f"Activation({', '.join([self.op.rule.name, *(f'{n}={v!r}' for n, v in self.options)])})"


Relu = functools.partial(Activation, ops.relu)
Sigmoid = functools.partial(Activation, ops.sigmoid)
Tanh = functools.partial(Activation, ops.tanh)
Gelu = functools.partial(Activation, ops.gelu)
Silu = functools.partial(Activation, ops.silu)
LeakyRelu = functools.partial(Activation, ops.leaky_relu)
Elu = functools.partial(Activation, ops.elu)
Softplus = functools.partial(Activation, ops.softplus)
Softmax = functools.partial(Activation, ops.softmax)


@dataclasses.dataclass(frozen=True, repr=False)
class PReLU(OpLayer):
    """relu with a slope on the negative side that is learned: y = x where x ≥ 0, else negative_slope · x.

    x [...] -> y [...]. Parameter: negative_slope [], a number for all of x. Options and defaults are those of
    ``flax.linen.PReLU``. Source: He et al. 2015, arXiv:1502.01852.
    """

    param_dtype: DTypeLike = jnp.float32
    negative_slope_init: float = 0.01

    op = staticmethod(ops.leaky_relu)

    def initializers(self) -> dict[str, Initializer]:
        return {"negative_slope": initializers.constant(self.negative_slope_init)}

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"negative_slope": ()}

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        x = x.astype(float_type(x))
        return {"x": x, "negative_slope": jnp.asarray(params["negative_slope"], x.dtype)}, None
