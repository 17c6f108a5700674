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
from fbackprop.compositions.recurrent import bidirectional as bidirectional
from fbackprop.compositions.recurrent import conv_lstm as conv_lstm

__all__ = [
    "bidirectional",
    "conv_lstm",
    "dense_general",
    "embed_attend",
    "hard_swish",
    "identity",
    "logmeanexp",
    "one_hot",
    "pool",
    "prelu",
    "softmin",
    "spectral_norm",
    "stochastic_depth",
    "swish",
]
