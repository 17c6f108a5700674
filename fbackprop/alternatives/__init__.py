"""Other backward passes for the same forward: straight-through, guided, deconvolution, LRP, clipping, reversal.

with_rules(fn, {"relu": "guided"})          a function with the values of fn and another gradient
with_rules(fn, lrp(epsilon=1e-6))           layer-wise relevance propagation through all of fn
relevance(model, params, x)                 what each input contributed, and whether the shares add up
available()                                 what there is, for which ops
"""

from fbackprop.alternatives.choosing import Choice as Choice
from fbackprop.alternatives.choosing import available as available
from fbackprop.alternatives.choosing import clip as clip
from fbackprop.alternatives.choosing import lrp as lrp
from fbackprop.alternatives.choosing import reversal as reversal
from fbackprop.alternatives.choosing import with_rules as with_rules
from fbackprop.alternatives.makers import OtherRule as OtherRule
from fbackprop.alternatives.methods import METHODS as METHODS
from fbackprop.alternatives.methods import Method as Method
from fbackprop.alternatives.sharing import Relevance as Relevance
from fbackprop.alternatives.sharing import relevance as relevance

__all__ = ["METHODS", "Choice", "Method", "OtherRule", "Relevance", "available", "clip", "lrp", "relevance", "reversal",
           "with_rules"]  # fmt: skip
