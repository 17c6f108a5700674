"""What the checks of the full depth start from, and what several of them use."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.checking.programs import Evidence, is_floating
from fbackprop.checking.report import Finding
from fbackprop.checking.subject import Subject

__all__ = ["Check", "Examination", "other", "vjp"]


@dataclasses.dataclass
class Examination:
    """What a thorough check starts from, and what it has to say besides findings."""

    subject: Subject
    evidence: Evidence
    seed: int
    notes: list[str] = dataclasses.field(default_factory=list)


Check = Callable[[Examination], Iterator[Finding]]


def vjp(flat: Callable[..., Any], floats: Any, arrays: Any, dy: Any) -> tuple[Any, Any]:
    y, pullback, _ = jax.vjp(lambda f: flat(f, arrays), list(floats), has_aux=True)
    return y, pullback(dy)[0]


def other(leaf: Any) -> Any:
    """Another array of the same kind, with values of the same domain: the first one rolled, or halved where it has no axis."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, 1) if not leaf.ndim else leaf
    if leaf.size > 1:
        return jnp.roll(leaf.reshape(-1), 1).reshape(leaf.shape)
    return leaf * 0.5 if is_floating(leaf) else leaf  # exact: no compiler can contract it with what follows
