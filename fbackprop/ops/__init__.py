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
from fbackprop.ops.linear import dense as dense
from fbackprop.ops.linear import embed as embed
from fbackprop.ops.losses import half_square as half_square
from fbackprop.ops.losses import mean_squared_error as mean_squared_error
from fbackprop.ops.losses import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy as softmax_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
from fbackprop.ops.losses import sum_of_squares as sum_of_squares
from fbackprop.ops.probabilities import log_softmax as log_softmax
from fbackprop.ops.probabilities import softmax as softmax
from fbackprop.ops.stochastic import dropout as dropout
from fbackprop.ops.convolution import conv as conv
