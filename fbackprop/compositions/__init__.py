"""Functions made of ops: known names that need no derivation of their own. Their backward is that of the ops inside."""

from fbackprop.compositions.activations import hard_swish as hard_swish
from fbackprop.compositions.activations import identity as identity
from fbackprop.compositions.activations import logmeanexp as logmeanexp
from fbackprop.compositions.activations import one_hot as one_hot
from fbackprop.compositions.activations import prelu as prelu
from fbackprop.compositions.activations import softmin as softmin
from fbackprop.compositions.activations import stochastic_depth as stochastic_depth
from fbackprop.compositions.activations import swish as swish
from fbackprop.compositions.linear import dense_general as dense_general
from fbackprop.compositions.linear import embed_attend as embed_attend
from fbackprop.compositions.linear import pool as pool
from fbackprop.compositions.linear import spectral_norm as spectral_norm
from fbackprop.compositions.losses import binary_dice_loss as binary_dice_loss
from fbackprop.compositions.losses import convex_kl_divergence as convex_kl_divergence
from fbackprop.compositions.losses import cosine_distance as cosine_distance
from fbackprop.compositions.losses import ctc_loss as ctc_loss
from fbackprop.compositions.losses import make_fenchel_young_loss as make_fenchel_young_loss
from fbackprop.compositions.losses import multiclass_generalized_dice_loss as multiclass_generalized_dice_loss
from fbackprop.compositions.losses import ranking_softmax_loss as ranking_softmax_loss
from fbackprop.compositions.losses import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from fbackprop.compositions.recurrent import bidirectional as bidirectional
from fbackprop.compositions.recurrent import conv_lstm as conv_lstm

__all__ = [
    "bidirectional",
    "binary_dice_loss",
    "conv_lstm",
    "convex_kl_divergence",
    "cosine_distance",
    "ctc_loss",
    "dense_general",
    "embed_attend",
    "hard_swish",
    "identity",
    "logmeanexp",
    "make_fenchel_young_loss",
    "multiclass_generalized_dice_loss",
    "one_hot",
    "pool",
    "prelu",
    "ranking_softmax_loss",
    "safe_softmax_cross_entropy",
    "softmin",
    "spectral_norm",
    "stochastic_depth",
    "swish",
]
