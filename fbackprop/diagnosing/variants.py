"""A model changed for a trial, without touching it: what runs at each call of an op is decided by a recorder (context.py).

``Variant(activation="relu", norm=True)`` puts a layer norm before each activation and relu in its place. It is a function
of a call and of how calls are done, so that a changed model is measured, and trained, like the one that was given.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from fbackprop import context
from fbackprop.rules import RULES, Rule, _differentiable

__all__ = ["ACTIVATIONS", "AS_IT_IS", "DYING", "SQUASHING", "Variant", "changed", "run_rule"]

DYING = {"relu": 1.0, "relu6": 1.0, "relu_squared": 1.0}
"""Activations whose slope is zero on one side. (Of all in these tables, the largest slope, or what a slope is measured by.)"""

SQUASHING = {"sigmoid": 0.25, "tanh": 1.0, "soft_sign": 1.0, "hard_sigmoid": 1 / 6, "hard_tanh": 1.0}
"""Activations that flatten out on both sides."""

_OTHERS = ("celu", "elu", "gelu", "hard_silu", "leaky_relu", "mish", "selu", "silu", "softplus", "squareplus")

ACTIVATIONS = (*DYING, *SQUASHING, *_OTHERS)
"""Ops of one array, element by element, that a trial may put another in the place of."""

Do = Callable[[Rule, tuple[Any, ...], tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of all activations: ``variant(rule, dynamic, static, do)`` does the calls that stand for one."""

    activation: str | None = None  # in place of each
    norm: bool = False  # a layer norm over the last axis before each

    def __call__(self, rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...], do: Do) -> Any:
        if rule.name not in ACTIVATIONS:
            return do(rule, dynamic, static)
        x = dynamic[0]
        if self.norm and x.ndim:
            norm = RULES["layer_norm"]
            x = do(norm, *norm.split((x,), {}))
        if self.activation is None:
            return do(rule, (x, *dynamic[1:]), static)
        other = RULES[self.activation]
        return do(other, *other.split((x,), {}))


AS_IT_IS = Variant()


def run_rule(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """What a call of an op does where no recorder is at work."""
    with context.switched(recorder=None):
        return _differentiable(rule, *static)(*dynamic)


def changed(fn: Callable[..., Any], variant: Variant) -> Callable[..., Any]:
    """The function with the variant's calls in place of its own."""
    if variant == AS_IT_IS:
        return fn

    def run(*args: Any) -> Any:
        with context.switched(recorder=_Recorder(variant)):
            return fn(*args)

    return run


@dataclasses.dataclass(frozen=True)
class _Recorder:
    variant: Variant

    def __call__(self, rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
        return self.variant(rule, dynamic, static, run_rule)
