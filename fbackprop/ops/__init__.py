"""The ops: one file a family, forward and backward side by side. Adding an op = its code there and a name here."""

from fbackprop.ops.activations import celu as celu
from fbackprop.ops.activations import elu as elu
from fbackprop.ops.activations import gelu as gelu
from fbackprop.ops.activations import hard_silu as hard_silu
from fbackprop.ops.activations import log1mexp as log1mexp
from fbackprop.ops.activations import log_sigmoid as log_sigmoid
from fbackprop.ops.activations import mish as mish
from fbackprop.ops.activations import relu_squared as relu_squared
from fbackprop.ops.activations import selu as selu
from fbackprop.ops.activations import sigmoid as sigmoid
from fbackprop.ops.activations import silu as silu
from fbackprop.ops.activations import soft_sign as soft_sign
from fbackprop.ops.activations import softplus as softplus
from fbackprop.ops.activations import sparse_plus as sparse_plus
from fbackprop.ops.activations import squareplus as squareplus
from fbackprop.ops.activations import tanh as tanh
from fbackprop.ops.adapters import lora_dense as lora_dense
from fbackprop.ops.adaptive import adaptive_avg_pool as adaptive_avg_pool
from fbackprop.ops.adaptive import adaptive_max_pool as adaptive_max_pool
from fbackprop.ops.adaptive import global_avg_pool as global_avg_pool
from fbackprop.ops.adaptive import global_max_pool as global_max_pool
from fbackprop.ops.attention import dot_product_attention as dot_product_attention
from fbackprop.ops.batch_normalization import batch_norm as batch_norm
from fbackprop.ops.blocks import norm_dense as norm_dense
from fbackprop.ops.blocks import residual_norm as residual_norm
from fbackprop.ops.classification import poly_loss_cross_entropy as poly_loss_cross_entropy
from fbackprop.ops.classification import smooth_labels as smooth_labels
from fbackprop.ops.contraction import einsum_dense as einsum_dense
from fbackprop.ops.contrastive import ntxent as ntxent
from fbackprop.ops.contrastive import triplet_margin_loss as triplet_margin_loss
from fbackprop.ops.convolution import conv as conv
from fbackprop.ops.ctc import ctc_loss_with_forward_probs as ctc_loss_with_forward_probs
from fbackprop.ops.divergences import generalized_kl_divergence as generalized_kl_divergence
from fbackprop.ops.divergences import kl_divergence as kl_divergence
from fbackprop.ops.divergences import kl_divergence_with_log_targets as kl_divergence_with_log_targets
from fbackprop.ops.feedforward import geglu_mlp as geglu_mlp
from fbackprop.ops.feedforward import gelu_mlp as gelu_mlp
from fbackprop.ops.feedforward import swiglu_mlp as swiglu_mlp
from fbackprop.ops.focal import sigmoid_focal_loss as sigmoid_focal_loss
from fbackprop.ops.gated import gru as gru
from fbackprop.ops.gating import geglu as geglu
from fbackprop.ops.gating import glu as glu
from fbackprop.ops.gating import reglu as reglu
from fbackprop.ops.gating import swiglu as swiglu
from fbackprop.ops.group_normalization import group_norm as group_norm
from fbackprop.ops.group_normalization import instance_norm as instance_norm
from fbackprop.ops.lengths import l2_normalize as l2_normalize
from fbackprop.ops.lengths import safe_norm as safe_norm
from fbackprop.ops.lengths import weight_norm as weight_norm
from fbackprop.ops.linear import dense as dense
from fbackprop.ops.linear import embed as embed
from fbackprop.ops.losses import half_square as half_square
from fbackprop.ops.losses import mean_squared_error as mean_squared_error
from fbackprop.ops.losses import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy as softmax_cross_entropy
from fbackprop.ops.losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
from fbackprop.ops.losses import sum_of_squares as sum_of_squares
from fbackprop.ops.margins import hinge_loss as hinge_loss
from fbackprop.ops.margins import multiclass_hinge_loss as multiclass_hinge_loss
from fbackprop.ops.margins import multiclass_perceptron_loss as multiclass_perceptron_loss
from fbackprop.ops.margins import multiclass_sparsemax_loss as multiclass_sparsemax_loss
from fbackprop.ops.margins import perceptron_loss as perceptron_loss
from fbackprop.ops.margins import sparsemax_loss as sparsemax_loss
from fbackprop.ops.normalization import layer_norm as layer_norm
from fbackprop.ops.normalization import rms_norm as rms_norm
from fbackprop.ops.piecewise import hard_sigmoid as hard_sigmoid
from fbackprop.ops.piecewise import hard_tanh as hard_tanh
from fbackprop.ops.piecewise import leaky_relu as leaky_relu
from fbackprop.ops.piecewise import relu as relu
from fbackprop.ops.piecewise import relu6 as relu6
from fbackprop.ops.piecewise import sparse_sigmoid as sparse_sigmoid
from fbackprop.ops.pooling import avg_pool as avg_pool
from fbackprop.ops.pooling import max_pool as max_pool
from fbackprop.ops.pooling import min_pool as min_pool
from fbackprop.ops.pooling import sum_pool as sum_pool
from fbackprop.ops.probabilities import log_softmax as log_softmax
from fbackprop.ops.probabilities import logsumexp as logsumexp
from fbackprop.ops.probabilities import softmax as softmax
from fbackprop.ops.recurrences import linear_recurrence as linear_recurrence
from fbackprop.ops.recurrent import lstm as lstm
from fbackprop.ops.recurrent import rnn as rnn
from fbackprop.ops.regression import huber_loss as huber_loss
from fbackprop.ops.regression import l2_loss as l2_loss
from fbackprop.ops.regression import log_cosh as log_cosh
from fbackprop.ops.regression import mean_absolute_error as mean_absolute_error
from fbackprop.ops.regression import squared_error as squared_error
from fbackprop.ops.reversing import reversible as reversible
from fbackprop.ops.rotary import rotary_embedding as rotary_embedding
from fbackprop.ops.segmentation import dice_loss as dice_loss
from fbackprop.ops.similarity import cosine_similarity as cosine_similarity
from fbackprop.ops.spectral import spectral_scale as spectral_scale
from fbackprop.ops.standardizing import standardize as standardize
from fbackprop.ops.stochastic import dropout as dropout
from fbackprop.ops.straight_through import sign_ste as sign_ste
from fbackprop.ops.straight_through import step_ste as step_ste
from fbackprop.ops.transposed import conv_transpose as conv_transpose
from fbackprop.ops.vocabulary import linear_cross_entropy as linear_cross_entropy

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "batch_norm",
    "celu",
    "conv",
    "conv_transpose",
    "cosine_similarity",
    "ctc_loss_with_forward_probs",
    "dense",
    "dice_loss",
    "dot_product_attention",
    "dropout",
    "einsum_dense",
    "elu",
    "embed",
    "geglu",
    "geglu_mlp",
    "gelu",
    "gelu_mlp",
    "generalized_kl_divergence",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "group_norm",
    "gru",
    "half_square",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "hinge_loss",
    "huber_loss",
    "instance_norm",
    "kl_divergence",
    "kl_divergence_with_log_targets",
    "l2_loss",
    "l2_normalize",
    "layer_norm",
    "leaky_relu",
    "linear_cross_entropy",
    "linear_recurrence",
    "log1mexp",
    "log_cosh",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "lora_dense",
    "lstm",
    "max_pool",
    "mean_absolute_error",
    "mean_squared_error",
    "min_pool",
    "mish",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "norm_dense",
    "ntxent",
    "perceptron_loss",
    "poly_loss_cross_entropy",
    "reglu",
    "relu",
    "relu6",
    "relu_squared",
    "residual_norm",
    "reversible",
    "rms_norm",
    "rnn",
    "rotary_embedding",
    "safe_norm",
    "selu",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "sign_ste",
    "silu",
    "smooth_labels",
    "soft_sign",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "sparsemax_loss",
    "spectral_scale",
    "squared_error",
    "squareplus",
    "standardize",
    "step_ste",
    "sum_of_squares",
    "sum_pool",
    "swiglu",
    "swiglu_mlp",
    "tanh",
    "triplet_margin_loss",
    "weight_norm",
]
