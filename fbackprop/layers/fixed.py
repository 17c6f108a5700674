"""Layers without parameters: dropout, stochastic depth, Flatten."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.layers.base import Layer, OpLayer, Params, State, Tape, array_of, require_key, set_option, tuples

__all__ = ["Dropout", "Flatten", "StochasticDepth"]


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(OpLayer):
    """In training, sets each element to zero with probability ``rate`` and divides the others by 1 − rate.

    x [...] -> y [...]. Elements along ``broadcast_dims`` share their fate. In inference y is x.
    Raises ValueError where ``train=True`` and no key is given (unless rate is 0).
    Source: Srivastava et al. 2014, JMLR 15.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()

    op = staticmethod(ops.dropout)

    def __post_init__(self) -> None:
        set_option(self, "broadcast_dims", tuples(self.broadcast_dims))
        _require_rate(self.name, self.rate)

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        active = _draws(self.name, self.rate, key, train)
        options = {"broadcast_dims": self.broadcast_dims, "deterministic": not active}
        return {"x": x, "rate": self.rate, "key": key if active else None, **options}, None


@dataclasses.dataclass(frozen=True, repr=False)
class StochasticDepth(OpLayer):
    """In training, sets whole examples to zero with probability ``rate`` and divides the others by 1 − rate.

    x [batch, ...] -> y [batch, ...]. In inference y is x. It stands at the end of the body of a ``residual``.
    Raises ValueError where ``train=True`` and no key is given (unless rate is 0).
    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    rate: float

    op = staticmethod(ops.dropout)
    min_ndim = 1

    def __post_init__(self) -> None:
        _require_rate(self.name, self.rate)

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        active = _draws(self.name, self.rate, key, train)
        options = {"broadcast_dims": tuple(range(1, x.ndim)), "deterministic": not active}
        return {"x": x, "rate": self.rate, "key": key if active else None, **options}, None


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(Layer):
    """Makes one axis of all axes after the first: x [b, ...] -> y [b, n]. The backward gives dy the shape of x again."""

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        self._require_batch(jnp.shape(x))
        return {}, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        x = array_of(self.name, x)
        self._require_batch(x.shape)
        return x.reshape(x.shape[0], math.prod(x.shape[1:])), state

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        y, state = self.apply(params, x, state, key, train)
        return y, Tape((), state, (self.name, jnp.shape(x)))

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        if not isinstance(tape, Tape) or not isinstance(tape.record, tuple) or tape.record[0] != self.name:
            raise TypeError(f"Flatten.backward: expected the tape of Flatten.forward, got {tape}.")
        shape = tape.record[1]
        if dy is None:
            return {}, None
        if jnp.shape(dy) != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"Flatten.backward: dy has shape {jnp.shape(dy)}, which does not fit x {shape}.")
        return {}, jnp.reshape(dy, shape)

    def _require_batch(self, shape: tuple[int, ...]) -> None:
        if not shape:
            raise ValueError("Flatten: x is a single number, expected at least one dimension (the batch).")


def _require_rate(who: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) <= 1:
        raise ValueError(f"{who}: rate is {rate!r}, expected a probability between 0 and 1.")


def _draws(who: str, rate: float, key: Any, train: bool) -> bool:
    """Whether numbers are drawn; refuses a missing key where they are."""
    active = train and rate > 0
    if active and key is None:
        raise ValueError(f"{who}: train=True needs a random key and key is None; pass key=jax.random.key(…).")
    if active:
        require_key(who, key)
    return active
