"""Layers: parameters and initialization for the ops of the same name, and ``serial`` and ``residual`` to combine them."""

from fbackprop.layers.base import Layer as Layer
from fbackprop.layers.base import Tape as Tape
from fbackprop.layers.combinators import Residual as Residual
from fbackprop.layers.combinators import Serial as Serial
from fbackprop.layers.combinators import residual as residual
from fbackprop.layers.combinators import serial as serial
from fbackprop.layers.fixed import Activation as Activation
from fbackprop.layers.fixed import AvgPool as AvgPool
from fbackprop.layers.fixed import Dropout as Dropout
from fbackprop.layers.fixed import Elu as Elu
from fbackprop.layers.fixed import Flatten as Flatten
from fbackprop.layers.fixed import Gelu as Gelu
from fbackprop.layers.fixed import LeakyRelu as LeakyRelu
from fbackprop.layers.fixed import MaxPool as MaxPool
from fbackprop.layers.fixed import Relu as Relu
from fbackprop.layers.fixed import Sigmoid as Sigmoid
from fbackprop.layers.fixed import Silu as Silu
from fbackprop.layers.fixed import Softmax as Softmax
from fbackprop.layers.fixed import Softplus as Softplus
from fbackprop.layers.fixed import Tanh as Tanh
from fbackprop.layers.linear import Conv as Conv
from fbackprop.layers.linear import Dense as Dense
from fbackprop.layers.linear import Embed as Embed
from fbackprop.layers.normalization import BatchNorm as BatchNorm
from fbackprop.layers.normalization import LayerNorm as LayerNorm
