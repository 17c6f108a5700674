"""Before a run: the gradient that will be used, beside the one that JAX derives from the definitions."""

from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from fbackprop.context import without_rules
from fbackprop.training.step import LossFn, value_and_gradient

__all__ = ["gradient_errors"]


def gradient_errors(
    loss_fn: LossFn, params: Any, batch: Any, *, state: Any = (), key: jax.Array | int = 0, dtype: DTypeLike | None = None
) -> dict[str, float]:
    """How far each parameter's gradient is from ``jax.grad`` of the twin, in which every op is its definition.

    Args:
      loss_fn, params, batch, state, key, dtype: as for the training step.
    Returns:
      For each array of params, by name, max |ours − twin| / max |twin|; 0 where both are zero.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    gradient, _ = value_and_gradient(loss_fn, dtype=dtype)

    # Two functions, not one under two modes: each is compiled once.
    def grads(*args: Any) -> Any:
        return gradient(*args)[1]

    ours = jax.jit(grads)(params, batch, state, key)
    twin = jax.jit(without_rules(grads))(params, batch, state, key)
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(twin))
    return {jax.tree_util.keystr(path, simple=True, separator="."): _relative(a, b) for (path, a), b in pairs}


def _relative(ours: jax.Array, twin: jax.Array) -> float:
    a, b = np.asarray(ours, np.float64), np.asarray(twin, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, scale = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)
        return 0.0 if difference == 0 else float(difference / scale)
