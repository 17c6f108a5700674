"""Recurrent layers over a whole sequence: Rnn, Lstm, Gru, ConvLstm, and Bidirectional, which reads it from both ends.

A sequence is [batch, time, …], as in ``flax.linen.RNN``; the ops inside have time first. The carry begins with zeros.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from fbackprop import ops
from fbackprop.compositions.recurrent import conv_lstm
from fbackprop.layers.base import (
    Initializer,
    Layer,
    Params,
    State,
    promoted,
    require_options,
    require_params,
    set_option,
    shape_of,
    split_key,
    tuples,
)  # fmt: skip
from fbackprop.layers.composed import Composed
from fbackprop.layers.linear import require_positive

__all__ = ["Bidirectional", "ConvLstm", "Gru", "Lstm", "Rnn"]

_LEAVES = ("bias", "kernel", "recurrent_kernel")
_lecun_normal, _orthogonal = initializers.lecun_normal(), initializers.orthogonal()


@dataclasses.dataclass(frozen=True, repr=False)
class _Recurrent(Composed):
    """What the three share: all options but one, parameters, and the call of the op."""

    features: int
    reverse: bool = False
    segments: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = _lecun_normal
    recurrent_kernel_init: Initializer = _orthogonal
    bias_init: Initializer = initializers.zeros

    op = staticmethod(ops.rnn)
    gates = 1
    _leaves = _LEAVES

    def __post_init__(self) -> None:
        require_positive(self.name, features=self.features)

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        require_options(self)
        one, two, three = split_key(f"{self.name}.init", key, 3)
        width, n = _shape(self, x, "features")[-1], self.features
        # Each gate has a matrix of its own, side by side with the others.
        square = [self.recurrent_kernel_init(k, (n, n), self.param_dtype) for k in jax.random.split(two, self.gates)]
        return {
            "kernel": self.kernel_init(one, (width, self.gates * n), self.param_dtype),
            "recurrent_kernel": jnp.concatenate(square, 1),
            "bias": self.bias_init(three, (self.gates * n,), self.param_dtype),
        }, ()

    def apply(
        self,
        params: Params,
        x: ArrayLike,
        state: State = (),
        key: Any = None,
        train: bool = False,
        *,
        lengths: ArrayLike | None = None,
    ) -> tuple[jax.Array, State]:
        """As of every layer; and ``lengths``, [b] integers: how many steps of each sequence count. Beyond them y is 0."""
        _shape(self, x, "features")
        require_params(self, params, self._leaves)
        x, weights = promoted(self.dtype, jnp.asarray(x), params)
        options = {"lengths": lengths, "reverse": self.reverse, "segments": self.segments, **self._options()}
        h, _ = self.op(x.swapaxes(0, 1), **weights, **options)
        return h.swapaxes(0, 1), state

    def _options(self) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True, repr=False)
class Rnn(_Recurrent):
    """A simple recurrent network over a sequence: h_t = φ(x_t · kernel + h_{t−1} · recurrent_kernel + bias).

    x [b, t, f] -> h [b, t, features]. Parameters: kernel [f, features], recurrent_kernel [features, features], bias [features].

    Args:
      features: of the state. activation: "tanh" or "relu". reverse: whether to read from the last step to the first.
      segments: keep only the carry before each of so many parts of the sequence, as in ``ops.rnn``.
      dtype, param_dtype, kernel_init, recurrent_kernel_init, bias_init: as in Flax's cells.
    """

    activation: str = "tanh"

    def _options(self) -> dict[str, Any]:
        return {"activation": self.activation}


@dataclasses.dataclass(frozen=True, repr=False)
class Lstm(_Recurrent):
    """A long short-term memory over a sequence; gates in the order i, f, g, o.

    x [b, t, f] -> h [b, t, features]. Parameters: kernel [f, 4 features], recurrent_kernel [features, 4 features], bias
    [4 features]: the parts of ``flax.linen.LSTMCell``'s (ii, if, ig, io; hi, hf, hg, ho) side by side.

    Args: as for ``Rnn``. Source: Hochreiter & Schmidhuber 1997.
    """

    op = staticmethod(ops.lstm)
    gates = 4


@dataclasses.dataclass(frozen=True, repr=False)
class Gru(_Recurrent):
    """Gated recurrent units over a sequence; gates in the order r, z, n.

    x [b, t, f] -> h [b, t, features]. Parameters: kernel [f, 3 features], recurrent_kernel [features, 3 features], bias
    [3 features], recurrent_bias [features] (``hn/bias`` of ``flax.linen.GRUCell``).

    Args: as for ``Rnn``. Source: Cho et al. 2014, arXiv:1406.1078.
    """

    op = staticmethod(ops.gru)
    gates = 3
    _leaves = (*_LEAVES, "recurrent_bias")

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        params, state = super().init(key, x)
        bias = self.bias_init(jax.random.fold_in(key, 3), (self.features,), self.param_dtype)
        return {**params, "recurrent_bias": bias}, state


@dataclasses.dataclass(frozen=True, repr=False)
class Bidirectional(Composed):
    """Reads a sequence from both ends: what two recurrent layers give at each step, side by side or as a sum.

    x [b, t, f] -> y [b, t, features of both], or with ``merge="sum"`` [b, t, features]. Parameters: forward and backward, those
    of the layers. The second layer is turned around, whatever its ``reverse`` says.
    Raises ValueError where merge is neither "concatenate" nor "sum". Source: Schuster & Paliwal 1997.
    """

    forward_layer: Any
    backward_layer: Any
    merge: str = "concatenate"

    def __post_init__(self) -> None:
        for layer in (self.forward_layer, self.backward_layer):
            if not isinstance(layer, Layer) or not hasattr(layer, "reverse"):
                raise TypeError(f"Bidirectional: expected recurrent layers, such as Lstm(64), got {layer!r}.")
        if self.merge not in ("concatenate", "sum"):
            raise ValueError(f"Bidirectional: merge is {self.merge!r}, expected 'concatenate' or 'sum'.")
        set_option(self, "backward_layer", dataclasses.replace(self.backward_layer, reverse=True))

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        one, two = split_key("Bidirectional.init", key)
        return {"forward": self.forward_layer.init(one, x)[0], "backward": self.backward_layer.init(two, x)[0]}, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False, **options: Any
    ) -> tuple[jax.Array, State]:
        require_params(self, params, ("forward", "backward"))
        there, _ = self.forward_layer.apply(params["forward"], x, **options)
        back, _ = self.backward_layer.apply(params["backward"], x, **options)
        return jnp.concatenate([there, back], -1) if self.merge == "concatenate" else there + back, state


@dataclasses.dataclass(frozen=True, repr=False)
class ConvLstm(Composed):
    """A long short-term memory over images, whose matrix products are convolutions; gates in the order i, f, g, o.

    x [b, t, *space, c] -> h [b, t, *space, features]. Parameters: kernel [*kernel_size, c, 4 features], recurrent_kernel
    [*kernel_size, features, 4 features], bias [4 features].

    Args:
      features: of the state. kernel_size: of both convolutions. reverse, dtype, …: as for ``Rnn``.
    Source: Shi et al. 2015, arXiv:1506.04214.
    """

    features: int
    kernel_size: tuple[int, ...]
    reverse: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_size, Sequence):
            raise ValueError(
                f"ConvLstm: kernel_size is {self.kernel_size!r}, expected one for each axis of space, such as (3, 3)."
            )
        set_option(self, "kernel_size", tuples(self.kernel_size))
        require_positive(self.name, features=self.features, **{f"kernel_size[{i}]": k for i, k in enumerate(self.kernel_size)})

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        require_options(self)
        one, two, three = split_key("ConvLstm.init", key, 3)
        width, n = _shape(self, x, "*space", "channels", space=len(self.kernel_size))[-1], self.features
        return {
            "kernel": self.kernel_init(one, (*self.kernel_size, width, 4 * n), self.param_dtype),
            "recurrent_kernel": self.kernel_init(two, (*self.kernel_size, n, 4 * n), self.param_dtype),
            "bias": self.bias_init(three, (4 * n,), self.param_dtype),
        }, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        _shape(self, x, "*space", "channels", space=len(self.kernel_size))
        require_params(self, params, _LEAVES)
        x, weights = promoted(self.dtype, jnp.asarray(x), params)
        return conv_lstm(x.swapaxes(0, 1), **weights, reverse=self.reverse)[0].swapaxes(0, 1), state


def _shape(layer: Layer, x: Any, *names: str, space: int = 0) -> tuple[int, ...]:
    """The shape of a sequence; refuses what does not have batch, time, so many axes of space, and features."""
    shape = shape_of(layer.name, x)
    if len(shape) != 3 + space:
        expected = ", ".join(("batch", "time", *names))
        raise ValueError(f"{layer.name}: x has {len(shape)} dimensions, expected [{expected}] (x {shape}).")
    if not shape[-1]:
        raise ValueError(f"{layer.name}: the last axis of x has no elements (x {shape}).")
    return shape
