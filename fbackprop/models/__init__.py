"""Models: layers made of layers, short, and the way in for weights from Flax."""

from fbackprop.models.convolutional import cnn as cnn
from fbackprop.models.interchange import from_flax as from_flax
from fbackprop.models.perceptron import mlp as mlp
