"""Layers without parameters: activations, softmax, dropout, pooling, Flatten."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.layers.base import Layer, OpLayer, Params, State, Tape, set_option, tuples

__all__ = ["Activation", "AvgPool", "Dropout", "Elu", "Flatten", "Gelu", "LeakyRelu", "MaxPool", "Relu", "Sigmoid",
           "Silu", "Softmax", "Softplus", "Tanh"]  # fmt: skip


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
        if not 0 <= self.rate <= 1:
            raise ValueError(f"Dropout: rate is {self.rate}, expected a probability between 0 and 1.")

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        active = train and self.rate > 0
        if active and key is None:
            raise ValueError("Dropout: train=True needs a random key and key is None; pass key=jax.random.key(…).")
        options = {"broadcast_dims": self.broadcast_dims, "deterministic": not active}
        return {"x": x, "rate": self.rate, "key": key if active else None, **options}, None


class _Pool(OpLayer):
    window_shape: Sequence[int]
    strides: Sequence[int] | None
    padding: Any

    input = "inputs"

    def __post_init__(self) -> None:
        for name in ("window_shape", "strides", "padding"):
            set_option(self, name, tuples(getattr(self, name)))

    @property
    def min_ndim(self) -> int:  # type: ignore[override]
        return len(self.window_shape) + 1

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        return {"inputs": x, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}, None  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(_Pool):
    """The largest element of each window, channel by channel.

    x [..., *space, c] -> y [..., *space', c]. Options and defaults are those of ``flax.linen.max_pool``: ``strides``
    None means 1, ``padding`` is "VALID", "SAME" or a pair for each dimension of space.
    """

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"

    op = staticmethod(ops.max_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class AvgPool(_Pool):
    """The mean of each window, channel by channel.

    x [..., *space, c] -> y [..., *space', c]. Options and defaults are those of ``flax.linen.avg_pool``;
    ``count_include_pad=False`` divides by the number of elements that are no padding.
    """

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"
    count_include_pad: bool = True

    op = staticmethod(ops.avg_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(Layer):
    """Makes one axis of all axes after the first: x [b, ...] -> y [b, n]. The backward gives dy the shape of x again."""

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        self._require_batch(jnp.shape(x))
        return {}, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        x = jnp.asarray(x)
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
