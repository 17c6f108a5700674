"""The convolutional classifier: Conv, Conv, Flatten, Dense, Dense, and softmax on the side of the loss."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers import BatchNorm, Conv, Dense, Flatten, MaxPool, Serial, serial
from fbackprop.models.perceptron import dense_block

__all__ = ["cnn"]


def cnn(
    conv_features: Sequence[int] = (32, 64),
    dense_features: Sequence[int] = (128,),
    classes: int = 10,
    *,
    kernel_size: Sequence[int] = (3, 3),
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    activation: Any = ops.relu,
    pool: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.0,
    output_activation: Any = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    precision: Any = None,
) -> Serial:
    """A classifier of images: x [b, h, w, c] -> logits [b, classes].

    With two convolutions and one hidden dense layer it is Conv, Conv, Flatten, Dense, Dense; softmax is part of the loss
    (``ops.softmax_cross_entropy_with_integer_labels``). ``cnn((1, 1), (3,), 2, kernel_size=(2, 2), padding="VALID",
    activation=None)`` is that stack and nothing else.

    Args:
      conv_features: the channels of each convolution. dense_features: the width of each hidden dense layer.
      classes: the number of logits.
      kernel_size, strides, padding: as for ``layers.Conv``, the same for each convolution; images of one or three
        dimensions follow from the length of kernel_size.
      activation: an op or a layer after each convolution and each hidden dense layer; None for none.
      pool: the window of a max pooling after each convolution, which is its stride too; None for none.
      batch_norm: whether batch norm stands before each activation; the bias before it is left out.
      dropout: the rate of dropout after each hidden dense layer; 0 for none.
      output_activation: an op or a layer after the logits, ``ops.softmax`` for probabilities.
      dtype, param_dtype, precision: as for ``layers.Conv``.
    Returns:
      A layer; its parameters are ``{"layers": (…)}`` in the order above.
    Raises:
      ValueError: where a number of features or classes is not a positive integer; at ``init``, where the images are
        too small.
    """
    layers: list[Any] = []
    for channels in conv_features:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
        layers.append(Conv(channels, kernel_size, strides, padding, use_bias=not batch_norm, **options))
        if batch_norm:
            layers.append(BatchNorm(dtype=dtype, param_dtype=param_dtype))
        if activation is not None:
            layers.append(activation)
        if pool is not None:
            layers.append(MaxPool(tuple(pool), tuple(pool)))
    layers.append(Flatten())
    for width in dense_features:
        layers += dense_block(width, activation, True, batch_norm, dropout, dtype, param_dtype, precision)
    layers.append(Dense(classes, dtype=dtype, param_dtype=param_dtype, precision=precision))
    return serial(*layers, *([] if output_activation is None else [output_activation]))
