"""``accelerate(fn)``: the same function, in which ops of this library stand in for what they do better."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import jax
import numpy as np

from fbackprop import context
from fbackprop.accelerating.program import Program
from fbackprop.accelerating.report import Report, report
from fbackprop.accelerating.rewriting import Rewritten, rewritten

__all__ = ["Accelerated", "accelerate"]

P = ParamSpec("P")
R = TypeVar("R")


class Accelerated(Generic[P, R]):
    """A function that runs ops of this library where it can; see ``accelerate``."""

    def __init__(self, fn: Callable[P, R]):
        functools.update_wrapper(self, fn)
        self._fn = fn

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if context.uses_references():
            return self._fn(*args, **kwargs)
        run, arrays = self.traced(*args, **kwargs)
        return run(arrays)

    def traced(self, *args: Any, **kwargs: Any) -> "tuple[_Run, list[Any]]":
        """The rewritten program of a call, and the arrays to run it with."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        results: list[Any] = []
        fn = cast(Callable[..., Any], self._fn)

        def flat(*arrays: Any) -> list[Any]:
            given = list(leaves)
            for i, array in zip(places, arrays):
                given[i] = array
            own_args, own_kwargs = jax.tree.unflatten(structure, given)
            outputs, out_structure = jax.tree.flatten(fn(*own_args, **own_kwargs))
            results[:] = [out_structure, [None if _is_array(o) else (o,) for o in outputs]]
            return [o for o in outputs if _is_array(o)]

        arrays = [leaves[i] for i in places]
        closed = jax.make_jaxpr(flat)(*arrays)
        out_structure, still = results
        return _Run(rewritten(Program.of(closed)), out_structure, still), arrays

    def report(self, *args: P.args, **kwargs: P.kwargs) -> Report:
        """What is replaced in a call with these arguments, what nearly was, and that results agree.

        Args:
          args, kwargs: those of a call.
        Returns:
          A record that prints as a table: ``found`` (op, place, why it was left), bytes kept for the backward and the
          compiler's temporaries before and after, the errors of outputs and gradients beside those of the function as it was.
          ``report(…).timed()`` measures the times too.
        """
        return report(self._fn, self, args, kwargs)

    def __repr__(self) -> str:
        return f"accelerate({getattr(self._fn, '__name__', repr(self._fn))})"


class _Run:
    def __init__(self, program: Rewritten, structure: Any, still: list[Any]):
        self.program, self.structure, self.still = program, structure, still

    def __call__(self, arrays: list[Any]) -> Any:
        outputs = iter(self.program.run(arrays))
        return jax.tree.unflatten(self.structure, [next(outputs) if s is None else s[0] for s in self.still])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def accelerate(fn: Callable[P, R]) -> Accelerated[P, R]:
    """Gives the same function with the backward passes of this library, whatever it is written in.

    ``fn`` is traced as under ``jax.jit``: a model's apply or a loss, from Flax, Equinox, Haiku or plain JAX. What its program
    computes, not what it was written with, tells what is replaced: pooling, normalizations, attention, softmax cross-entropy
    and the projection to a large vocabulary before it, activations, recurrent networks, grouped and transposed convolutions.
    Every replacement is proved beforehand, by evaluating both in float64; what is not proved stays as it is. Differentiate the
    result, ``jax.grad(accelerate(loss))``, not the other way round, and put ``jax.jit`` around it all.

    Args:
      fn: a function of arrays and pytrees of them; leaves that are no arrays (``train=True``) are passed as they are.
    Returns:
      A callable with the arguments and results of ``fn``; ``.report(*args)`` tells what was done. Where something was replaced
      it has no forward-mode derivative (``jax.jvp``), as every function with a ``custom_vjp``.
    Raises:
      TypeError: where ``fn`` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"accelerate: expected a function, got {type(fn).__name__}.")
    return cast("Accelerated[P, R]", fn) if isinstance(fn, Accelerated) else Accelerated(fn)
