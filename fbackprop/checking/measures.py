"""How wrong is too wrong, in figures.

The tolerance has no knob. A cotangent may err, elementwise against the truth, by

    max(2 · the largest error of jax.grad of the reference in that leaf, 4 · eps · the largest true element)

with eps of the dtype of the leaf.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["eps_of", "largest", "representable", "smallest", "tolerance_of", "worst_of"]


def eps_of(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def largest(truth: np.ndarray) -> float:
    return float(np.abs(truth).max(initial=0.0, where=np.isfinite(truth)))


def smallest(dtype: Any) -> float:
    """Below this an error is an underflow: XLA may flush subnormal numbers of float32 to zero."""
    return max(
        4 * float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny) if dtype != jnp.float64 else 0.0
    )


def tolerance_of(truth: np.ndarray, theirs: np.ndarray, dtype: Any, slack: float = 0.0) -> float:
    """What one leaf may err by. ``truth`` and ``theirs`` hold the leaf for several cotangents of y of the same kind: of a
    leaf of one element a single cotangent would tell by luck what ``jax.grad`` errs by."""
    with np.errstate(all="ignore"):
        error = largest(theirs - truth)
    return max(2 * error, 3 * slack, 4 * eps_of(dtype) * largest(truth), smallest(dtype))


def representable(truth: np.ndarray, dtype: Any) -> np.ndarray:
    """Where the truth is a finite number of the dtype."""
    return np.isfinite(truth) & (np.abs(truth) <= float(jnp.finfo(dtype).max))


def worst_of(ours: np.ndarray, truth: np.ndarray, dtype: Any) -> tuple[float, tuple[int, ...] | None]:
    """The largest error where both are finite, and its index. What is not finite is another check's."""
    with np.errstate(all="ignore"):
        error = np.where(representable(truth, dtype) & np.isfinite(ours), np.abs(ours - truth), 0.0)
    if not error.size:
        return 0.0, None
    index = np.unravel_index(int(error.argmax()), error.shape)
    return float(error[index]), tuple(map(int, index))
