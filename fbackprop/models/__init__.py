"""Models: layers made of layers and ops, short; sizes by name, generation, and the ways in for weights from elsewhere."""

from fbackprop.models.convolutional import cnn as cnn
from fbackprop.models.generation import generate as generate
from fbackprop.models.gpt import GPT as GPT
from fbackprop.models.gpt import gpt as gpt
from fbackprop.models.interchange import from_flax as from_flax
from fbackprop.models.named import SIZES as SIZES
from fbackprop.models.named import named as named
from fbackprop.models.perceptron import mlp as mlp
from fbackprop.models.pretrained import from_huggingface as from_huggingface
from fbackprop.models.recurrent import LstmLM as LstmLM
from fbackprop.models.recurrent import lstm_lm as lstm_lm
from fbackprop.models.residual import resnet as resnet
from fbackprop.models.transformer import stack_blocks as stack_blocks
from fbackprop.models.transformer import unstack_blocks as unstack_blocks
from fbackprop.models.vision import ViT as ViT
from fbackprop.models.vision import vit as vit
