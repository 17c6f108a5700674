"""The ops: one file a family, forward and backward side by side. Adding an op = its code there and a name here."""

from fbackprop.ops.activations import elu as elu
from fbackprop.ops.activations import gelu as gelu
from fbackprop.ops.activations import leaky_relu as leaky_relu
from fbackprop.ops.activations import relu as relu
from fbackprop.ops.activations import sigmoid as sigmoid
from fbackprop.ops.activations import silu as silu
from fbackprop.ops.activations import softplus as softplus
from fbackprop.ops.activations import step_ste as step_ste
from fbackprop.ops.activations import tanh as tanh
from fbackprop.ops.convolution import conv as conv
from fbackprop.ops.linear import dense as dense
from fbackprop.ops.linear import embed as embed
from fbackprop.ops.losses import half_square as half_square
from fbackprop.ops.losses import mean_squared_error as mean_squared_error
from fbackprop.ops.losses import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy as softmax_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
from fbackprop.ops.losses import sum_of_squares as sum_of_squares
from fbackprop.ops.normalization import batch_norm as batch_norm
from fbackprop.ops.normalization import layer_norm as layer_norm
from fbackprop.ops.pooling import avg_pool as avg_pool
from fbackprop.ops.pooling import max_pool as max_pool
from fbackprop.ops.probabilities import log_softmax as log_softmax
from fbackprop.ops.probabilities import softmax as softmax
from fbackprop.ops.stochastic import dropout as dropout

__all__ = [
    "avg_pool",
    "batch_norm",
    "conv",
    "dense",
    "dropout",
    "elu",
    "embed",
    "gelu",
    "half_square",
    "layer_norm",
    "leaky_relu",
    "log_softmax",
    "max_pool",
    "mean_squared_error",
    "relu",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "silu",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softplus",
    "step_ste",
    "sum_of_squares",
    "tanh",
]
