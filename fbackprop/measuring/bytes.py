"""Bytes kept for the backward, counted without running anything."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.ops._arithmetic import nbytes

__all__ = ["saved_bytes"]


def saved_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """What ``jax.grad`` of ``fn`` keeps between forward and backward: every array once, needed arguments included.

    Args:
      fn: a function of arrays. args: arrays or ``jax.ShapeDtypeStruct``; those of a floating-point dtype are differentiated.
    Returns:
      Bytes.
    """
    moving = [i for i, a in enumerate(args) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.inexact)]

    def pullback(*moved: Any) -> Any:
        def of(*moved: Any) -> Any:
            values = list(args)
            for i, value in zip(moving, moved):
                values[i] = value
            return fn(*values)

        # A pytree of the residuals: arguments that the backward reads, and the rest, each array once.
        return jax.vjp(of, *moved)[1]

    kept = jax.eval_shape(pullback, *(args[i] for i in moving))
    return nbytes(*jax.tree.leaves(kept))
