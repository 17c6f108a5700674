"""The multi-layer perceptron: Dense, activation, Dense, activation, …, Dense."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers import BatchNorm, Dense, Dropout, Serial, serial

__all__ = ["mlp"]


def mlp(
    features: Sequence[int],
    activation: Any = ops.relu,
    *,
    output_activation: Any = None,
    use_bias: bool = True,
    batch_norm: bool = False,
    dropout: float = 0.0,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    precision: Any = None,
) -> Serial:
    """A perceptron with ``len(features)`` dense layers: x [..., in] -> y [..., features[-1]].

    ``mlp((3, 2, 1))`` is the network of three layers with relu between them; ``mlp((1,), output_activation=ops.sigmoid)``
    is one sigmoid neuron.

    Args:
      features: the width of each dense layer, the output's last.
      activation: an op or a layer after each dense layer but the last; None for none.
      output_activation: the same after the last (``ops.softmax``, ``ops.sigmoid``); by default y are logits.
      use_bias: whether the dense layers have a bias; one that batch norm follows has none, it would be subtracted again.
      batch_norm: whether batch norm stands before each activation but the last.
      dropout: the rate of dropout after each activation but the last; 0 for none.
      dtype, param_dtype, precision: as for ``layers.Dense``.
    Returns:
      A layer; its parameters are ``{"layers": (…)}`` in the order above.
    Raises:
      ValueError: where features is empty or holds something that is not a positive integer.
    """
    features = tuple(features)
    if not features:
        raise ValueError("mlp: features is empty, expected the width of at least one dense layer.")
    *hidden, last = features
    layers: list[Any] = []
    for width in hidden:
        layers += dense_block(width, activation, use_bias, batch_norm, dropout, dtype, param_dtype, precision)
    layers.append(Dense(last, use_bias, dtype, param_dtype, precision))
    return serial(*layers, *([] if output_activation is None else [output_activation]))


def dense_block(
    width: int,
    activation: Any,
    use_bias: bool,
    batch_norm: bool,
    dropout: float,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    precision: Any,
) -> list[Any]:
    """Dense, then batch norm, activation and dropout where they are asked for."""
    block: list[Any] = [Dense(width, use_bias and not batch_norm, dtype, param_dtype, precision)]
    if batch_norm:
        block.append(BatchNorm(dtype=dtype, param_dtype=param_dtype))
    if activation is not None:
        block.append(activation)
    if dropout:
        block.append(Dropout(dropout))
    return block
