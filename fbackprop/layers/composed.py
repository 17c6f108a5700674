"""Layers and models that are written as one function of their ops, with the tape made by JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.layers.base import Layer, Params, State, Tape, array_of

__all__ = ["Composed"]


class Composed(Layer):
    """A layer that says ``init`` and ``apply``, out of ops. ``forward`` and ``backward`` follow: the tape holds the pullback
    of ``apply``, in which every op keeps what its rule keeps and runs the backward of its rule, and in which JAX does no more
    than hand the cotangents on from one op to the next."""

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        x = array_of(self.name, x)
        differentiable = jnp.issubdtype(x.dtype, jnp.inexact)

        def run(params: Params, *given: jax.Array) -> Any:
            return self.apply(params, given[0] if given else x, state, key, train)

        y, pullback, new = jax.vjp(run, params, *([x] if differentiable else []), has_aux=True)
        return y, Tape(pullback, new, (self.name, y.shape, y.dtype))

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        record = getattr(tape, "record", None)
        if not isinstance(record, tuple) or record[0] != self.name:
            raise TypeError(f"{self.name}.backward: expected the tape of {self.name}.forward, got a {type(tape).__name__}.")
        _, shape, dtype = record
        if jnp.shape(dy) != shape:
            raise ValueError(f"{self.name}.backward: dy has shape {jnp.shape(dy)}, y had {shape}.")
        dparams, *dx = tape.saved(jnp.asarray(dy, dtype))
        return dparams, dx[0] if dx else None
