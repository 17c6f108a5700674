"""Other backward passes for the forward of an op: which there are, by formula and as code, in one table.

With x the input of an op, y its output, dy the cotangent that arrives, and ∂ the op's own backward:

    straight-through    dx = dy
    guided              dx = ∂(max(dy, 0))
    deconvolution       dx = max(dy, 0)
    clip-value          dx = ∂(min(max(dy, −v), v))
    clip-norm           dx = ∂(dy · min(1, n / ‖dy‖))
    reversal            dx = ∂(−factor · dy)

Layer-wise relevance propagation (LRP) shares out a relevance R over what contributed to it. Here the cotangent is relevance
per unit, c = R / value, so R = value · c for inputs, biases and weights alike. In these terms LRP-0 of a linear op is its own
backward, a sum x + z shares in proportion although nothing but JAX's addition stands there, and no rule divides by a sum
that may be zero. With z = Σ x w + b:

    lrp-0               dx = ∂(c)                                       R_i = Σ_j (x_i w_ij / z_j) R_j
    lrp-epsilon         dx = ∂(c · z / (z + ε sign z))                  R_i = Σ_j (x_i w_ij / (z_j + ε sign z_j)) R_j
    lrp-gamma           R_i = Σ_j ((q_ij + γ q_ij⁺) / Σ_i (q_ij + γ q_ij⁺)) R_j,   q_ij = x_i w_ij;   q⁻ for q⁺ where z_j < 0
    lrp-alpha-beta      R_i = Σ_j (α q_ij⁺ / Σ_i q_ij⁺ − β q_ij⁻ / Σ_i q_ij⁻) R_j,   β = α − 1
    an activation       dx = c · y / x, which is R_in = R_out           y(0) = 0 is needed; relu: ∂
    a maximum           dx = ∂(c): all goes to the winner

A constant bias takes its share like an input: it is one more q.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fbackprop.alternatives.makers import (
    Maker,
    affine_in_inference,
    alpha_beta_shares,
    arriving,
    by_sign,
    clip_norm,
    each,
    gamma_shares,
    own,
    passing,
    secant,
    stabilized,
)
from fbackprop.ops import activations, piecewise
from fbackprop.rules import RULES

__all__ = ["METHODS", "Method"]


@dataclasses.dataclass(frozen=True)
class Method:
    """An alternative by name: for which ops there is one, and how it is made.

    rules: how to make it, by the name of the op. every: how to make it for any op.
    refuses: of a method that may be asked for a whole function, which of the ops without such a rule are refused there; the
    others keep their own rule. option: the number that the method takes and its default, None where it must be given.
    advice: what to do about an op that has no such rule, by its name.
    """

    name: str
    summary: str
    formula: str
    source: str
    rules: dict[str, Maker]
    every: Maker | None = None
    refuses: Callable[[str], bool] | None = None
    option: tuple[str, float | None] | None = None
    advice: Callable[[str], str] = lambda op: ""

    def maker(self, op: str) -> Maker | None:
        """How the alternative of an op is made, None where it has none."""
        return self.rules.get(op, self.every)


# The table.

_ACTIVATIONS = (*activations.__all__, *piecewise.__all__)
_RELUS = ("relu", "relu6")
_HOMOGENEOUS = ("leaky_relu", "relu")  # y / x is the derivative
_THROUGH_ZERO = ("celu", "elu", "gelu", "hard_silu", "hard_tanh", "mish", "relu6", "relu_squared", "selu", "silu", "soft_sign",
                 "tanh")  # fmt: skip
_WEIGHTED = ("conv", "conv_transpose", "dense")
_LINEAR = ("adaptive_avg_pool", "avg_pool", "einsum_dense", "global_avg_pool", "lora_dense", "sum_pool")
_CHOOSING = ("adaptive_max_pool", "dropout", "embed", "global_max_pool", "max_pool", "min_pool")
_LOSSES = (
    "classification",
    "contrastive",
    "ctc",
    "divergences",
    "losses",
    "margins",
    "regression",
    "segmentation",
    "vocabulary",
)  # fmt: skip  (modules)
_INSTEAD = {"gelu_mlp": "dense, gelu and dense", "norm_dense": "norm and dense", "residual_norm": "addition and norm"}


def _lrp_advice(op: str) -> str:
    if op in RULES and RULES[op].reference.__module__.rpartition(".")[2] in _LOSSES:
        return "It is a loss: take the relevance of the output that goes into it."
    if op in ("softmax", "log_softmax", "logsumexp"):
        return "Take the logit that goes into it: it grows with the evidence for its own class alone."
    if op in (*_ACTIVATIONS, "step_ste", "sign_ste"):
        return "Its values do not go to 0 with x: relevance would come from nothing. Take what goes into it, or use relu."
    if op in _INSTEAD:
        return f"Write it as {_INSTEAD[op]}, and give the norm a rule of your own."
    if op.endswith("_norm"):
        return "Its divisor ties all features together; batch_norm in inference, which is linear, has one."
    return "What it computes is no sum of contributions of its input."


def _guided_advice(op: str) -> str:
    return f"It is defined for {' and '.join(_RELUS)}; straight-through takes any activation."


def _lrp_rules(weighted: Maker, linear: Maker) -> dict[str, Maker]:
    rules: dict[str, Maker] = {**dict.fromkeys(_WEIGHTED, weighted), **dict.fromkeys(_LINEAR, linear)}
    rules |= {**dict.fromkeys((*_HOMOGENEOUS, *_CHOOSING), own), **dict.fromkeys(_THROUGH_ZERO, secant)}
    return {**rules, "batch_norm": affine_in_inference}


_LRP = "Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10"


def _lrp_method(name: str, summary: str, formula: str, weighted: Maker, linear: Maker, option: Any = None) -> Method:
    rules = _lrp_rules(weighted, linear)
    return Method(name, summary, formula, _LRP, rules, refuses=lambda op: True, option=option, advice=_lrp_advice)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "straight-through",
            "what arrives passes, as if the op were the identity",
            "dx = dy",
            "Bengio, Léonard & Courville 2013, arXiv:1308.3432",
            dict.fromkeys((*_ACTIVATIONS, "sign_ste", "step_ste"), passing(lambda dy: dy)),
            advice=lambda op: "It is defined for functions of single elements, the activations.",
        ),
        Method(
            "guided",
            "only what is positive both forwards and backwards passes",
            "dx = max(dy, 0) where x > 0, else 0",
            "Springenberg et al. 2015, arXiv:1412.6806",
            dict.fromkeys(_RELUS, arriving(lambda dy, _: each(lambda d: jnp.maximum(d, 0), dy))),
            refuses=_ACTIVATIONS.__contains__,
            advice=_guided_advice,
        ),
        Method(
            "deconvolution",
            "what is positive backwards passes, wherever the forward was",
            "dx = max(dy, 0)",
            "Zeiler & Fergus 2014, arXiv:1311.2901",
            dict.fromkeys(_RELUS, passing(lambda dy: jnp.maximum(dy, 0))),
            refuses=_ACTIVATIONS.__contains__,
            advice=_guided_advice,
        ),
        _lrp_method("lrp-0", "relevance in proportion to the contributions", "dx = ∂(c), c = R / y", own, own),
        _lrp_method(
            "lrp-epsilon",
            "the same, less where contributions cancel: ε takes a part",
            "dx = ∂(c · z / (z + ε sign z)), c = R / z",
            stabilized,
            stabilized,
            ("epsilon", 1e-6),
        ),
        _lrp_method(
            "lrp-gamma",
            "contributions that have the sign of the sum count 1 + γ times",
            "R_i = Σ_j ((q_ij + γ q_ij⁺) / Σ_i (q_ij + γ q_ij⁺)) R_j, q_ij = x_i w_ij (q⁻ where z_j < 0)",
            by_sign(gamma_shares),
            own,
            ("gamma", 0.25),
        ),
        _lrp_method(
            "lrp-alpha-beta",
            "positive contributions share α R, negative ones −β R, with β = α − 1",
            "R_i = Σ_j (α q_ij⁺ / Σ_i q_ij⁺ − β q_ij⁻ / Σ_i q_ij⁻) R_j, q_ij = x_i w_ij",
            by_sign(alpha_beta_shares),
            own,
            ("alpha", 2.0),
        ),
        Method(
            "clip-value",
            "every element of what arrives is brought between −v and v",
            "dx = ∂(min(max(dy, −v), v))",
            "Graves 2013, arXiv:1308.0850",
            {},
            every=arriving(lambda dy, v: each(lambda d: jnp.clip(d, -v, v), dy)),
            option=("value", None),
        ),
        Method(
            "clip-norm",
            "what arrives is made shorter where its norm is above n",
            "dx = ∂(dy · min(1, n / ‖dy‖))",
            "Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063",
            {},
            every=arriving(clip_norm),
            option=("norm", None),
        ),
        Method(
            "reversal",
            "what arrives changes its sign",
            "dx = ∂(−factor · dy)",
            "Ganin & Lempitsky 2015, arXiv:1409.7495",
            {},
            every=arriving(lambda dy, factor: each(lambda d: -factor * d, dy)),
            option=("factor", 1.0),
        ),
    )
}
"""Every alternative by its name. An alternative for one more op is one more entry in ``rules`` of its method."""
