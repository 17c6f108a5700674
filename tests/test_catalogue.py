"""The catalogue of what a user of this field expects to find: every name of it is here, as a rule or as a composition."""

import importlib
import inspect

import pytest

import fbackprop as fb
from fbackprop import compositions
from fbackprop.rules import RULES

OPS = {
    "linear": "dense dense_general einsum_dense embed embed_attend lora_dense rotary_embedding",
    "convolution": "conv conv_transpose",
    "activation": """relu relu6 leaky_relu prelu elu celu selu gelu silu swish mish sigmoid log_sigmoid softplus squareplus
        sparse_plus sparse_sigmoid soft_sign tanh hard_tanh hard_sigmoid hard_silu hard_swish relu_squared identity step_ste
        sign_ste one_hot logmeanexp log1mexp glu swiglu geglu reglu softmax softmin log_softmax logsumexp standardize""",
    "pooling": """max_pool min_pool avg_pool sum_pool pool adaptive_avg_pool adaptive_max_pool global_avg_pool
        global_max_pool""",
    "normalization": """layer_norm rms_norm group_norm instance_norm batch_norm weight_norm spectral_norm l2_normalize
        safe_norm""",
    "attention": "dot_product_attention",
    "recurrent": "rnn lstm gru bidirectional conv_lstm linear_recurrence",
    "stochastic": "dropout stochastic_depth",
    "losses": """softmax_cross_entropy softmax_cross_entropy_with_integer_labels sigmoid_binary_cross_entropy sum_of_squares
        half_square mean_squared_error mean_absolute_error squared_error l2_loss huber_loss log_cosh cosine_similarity
        cosine_distance poly_loss_cross_entropy sigmoid_focal_loss hinge_loss multiclass_hinge_loss perceptron_loss
        multiclass_perceptron_loss sparsemax_loss multiclass_sparsemax_loss kl_divergence kl_divergence_with_log_targets
        generalized_kl_divergence convex_kl_divergence make_fenchel_young_loss ctc_loss ctc_loss_with_forward_probs
        ranking_softmax_loss triplet_margin_loss ntxent dice_loss binary_dice_loss multiclass_generalized_dice_loss
        smooth_labels safe_softmax_cross_entropy""",
    "fused": "linear_cross_entropy norm_dense gelu_mlp geglu_mlp swiglu_mlp residual_norm",
    "structure": "reversible",
}

LAYERS = {
    "activation": "Activation PReLU Relu Gelu Silu",
    "linear": "Dense DenseGeneral Einsum Conv ConvTranspose Embed",
    "normalization": "BatchNorm GroupNorm InstanceNorm LayerNorm RMSNorm SpectralNorm WeightNorm",
    "attention": "MultiHeadAttention",
    "recurrent": "Rnn Lstm Gru Bidirectional ConvLstm",
    "pooling": "MaxPool MinPool AvgPool SumPool AdaptiveAvgPool AdaptiveMaxPool GlobalAvgPool GlobalMaxPool",
    "stochastic": "Dropout StochasticDepth",
    "structure": "serial parallel residual repeat remat named Flatten",
}


def names(table):
    return [pytest.param(name, id=name) for words in table.values() for name in words.split()]


@pytest.mark.parametrize("name", names(OPS))
def test_every_op_is_a_rule_or_a_composition(name):
    assert name in fb.__all__
    assert (name in RULES) != (name in compositions.__all__)
    assert getattr(fb, name) is (RULES[name].op if name in RULES else getattr(compositions, name))


@pytest.mark.parametrize("name", names(LAYERS))
def test_every_layer_is_there(name):
    assert hasattr(fb.layers, name)


ALIASES = {"hard_swish", "identity", "one_hot", "swish"}  # other names, of ops here or of functions of jax.nn


@pytest.mark.parametrize("name", sorted(set(compositions.__all__) - ALIASES))
def test_a_composition_says_that_it_is_one(name):
    doc = inspect.getdoc(getattr(compositions, name)) or ""
    assert "omposition" in doc
    assert "->" in doc
    module = importlib.import_module(getattr(compositions, name).__module__)
    assert name in module.__all__
