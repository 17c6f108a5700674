"""fbackprop: functional backpropagation for JAX, with every backward pass derived by hand.

Models are pure functions over parameter pytrees. Every op is an ordinary function with a rule: a definition, a forward that
also returns what the backward needs, and a backward. ``jax.grad`` runs the backward written by hand; ``op.forward`` and
``op.backward`` run the halves without it; ``without_rules(fn)`` is the twin that JAX differentiates itself.
"""

from fbackprop import alternatives as alternatives
from fbackprop import compositions as compositions
from fbackprop import context as context
from fbackprop import layers as layers
from fbackprop import models as models
from fbackprop import ops as ops
from fbackprop import rules as rules
from fbackprop.accelerating import accelerate as accelerate
from fbackprop.alternatives import relevance as relevance
from fbackprop.alternatives import with_rules as with_rules
from fbackprop.checking import assert_correct as assert_correct
from fbackprop.checking import check as check
from fbackprop.compositions import *  # noqa: F403
from fbackprop.context import without_rules as without_rules
from fbackprop.diagnosing import health as health
from fbackprop.explaining import explain as explain
from fbackprop.explaining import saved as saved
from fbackprop.hosting import to_equinox as to_equinox
from fbackprop.hosting import to_flax as to_flax
from fbackprop.hosting import to_nnx as to_nnx
from fbackprop.models import from_flax as from_flax
from fbackprop.ops import *  # noqa: F403
from fbackprop.rules import RULES as RULES

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "accelerate",
    "alternatives",
    "assert_correct",
    "check",
    "compositions",
    "context",
    "explain",
    "from_flax",
    "health",
    "layers",
    "models",
    "ops",
    "relevance",
    "rules",
    "saved",
    "to_equinox",
    "to_flax",
    "to_nnx",
    "with_rules",
    "without_rules",
]
__all__ += ops.__all__
__all__ += compositions.__all__
