"""The switch that decides what runs at each op call: its rule, its reference, another rule for the same forward, or a recorder.

The switch is a JAX *user context*: thread-local, and part of the key of every jit cache. A program
that was traced with rules is therefore never reused where references were asked for, nor the other way
round, however deep the inner ``jit``, ``scan`` or ``checkpoint`` lies. (A plain Python flag would go
stale: an inner jitted function traced with the flag off keeps its program when the flag is on.)

Limits. Forward mode ends at other people's ``custom_vjp``. What was made before the switch was thrown,
a jaxpr, a compiled executable or a pullback, keeps what it was made with, and so does a function that
``fn`` *returns*: it runs after the switch has been thrown back.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

__all__ = ["without_rules"]

P = ParamSpec("P")
R = TypeVar("R")


class Mode(NamedTuple):
    """What the switch stands at. Hashable and stable: it is part of the key of every jit cache."""

    references: bool = False  # every op is its definition
    others: tuple[tuple[str, Any], ...] = ()  # (name of an op, the Rule to use in place of its own)
    recorder: Any = None  # called as recorder(rule, dynamic, static) -> y in place of each op's rule

    def other(self, name: str) -> Any:
        """The rule to use in place of an op's own, or None."""
        return dict(self.others).get(name)


# Made once, at import: making one is not thread-safe, using it is.
_mode = jax.make_user_context(default_value=Mode())


def mode() -> Mode:
    """What the switch stands at where this is called."""
    return _mode.value


def switched(**changes: Any) -> Any:
    """A context manager under which the fields of ``Mode`` named here have these values."""
    return _mode(_mode.value._replace(**changes))


def uses_references() -> bool:
    """Whether the code being traced or run now is inside ``without_rules``."""
    return _mode.value.references


def without_rules(fn: Callable[P, R]) -> Callable[P, R]:
    """Gives the twin of ``fn``: the same function with every op replaced by its definition.

    JAX's own autodiff differentiates the twin, forward mode included, so ``jax.grad(without_rules(f))`` is
    what ``jax.grad(f)`` is compared with, and ``jax.jvp``, ``jax.hessian`` and ``jax.linearize`` work on it.

    Args:
      fn: any function that calls ops of this library, directly or through ``jit``, ``scan``, ``vmap``, ….
    Returns:
      A function with the signature and the values of ``fn``.
    """
    if not callable(fn):
        raise TypeError(f"without_rules: expected a function, got {type(fn).__name__}.")

    @functools.wraps(fn)
    def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        with switched(references=True, others=()):
            return fn(*args, **kwargs)

    return twin
