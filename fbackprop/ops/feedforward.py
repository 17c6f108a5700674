"""The feed-forward block of a transformer as one rule: gelu_mlp, and the gated forms swiglu_mlp and geglu_mlp.

gelu_mlp                                  swiglu_mlp, geglu_mlp

    h = x U + b                               g = x G,   u = x U
    a = φ(h)                                  a = φ(g) u
    y = a D + c                               y = a D

    da = dy Dᵀ                                da = dy Dᵀ
    dD = aᵀ dy,   dc = Σ dy                   dD = aᵀ dy
    dh = da φ'(h)                             dg = da u φ'(g),   du = da φ(g)
    dU = xᵀ dh,   db = Σ dh                   dG = xᵀ dg,   dU = xᵀ du
    dx = dh Uᵀ                                dx = dg Gᵀ + du Uᵀ

    silu          φ(z) = z σ(z)                         φ'(z) = σ + z σ (1 − σ)
    gelu (tanh)   φ(z) = ½ z (1 + t),  t = tanh v,      φ'(z) = ½ (1 + t) + ½ z (1 − t²) v'
                  v = √(2/π) (z + 0.044715 z³)          v' = √(2/π) (1 + 3 · 0.044715 z²)
    gelu (erf)    φ(z) = z Φ(z)                         φ'(z) = Φ(z) + z exp(−z²/2) / √(2π)

Kept are the arguments and what the first matrix products gave: h, or g and u, in the dtype of the arguments. φ, φ' and a are
computed again, which is elementwise; no matrix product is. The activation is computed in float32 or wider, matrix products
and the sums over rows accumulate in float32 or wider.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide, with_bias
from fbackprop.ops._gates import gelu_and_slope, silu_and_slope
from fbackprop.ops._matrices import outer_sum, product, product_transposed, row_sum
from fbackprop.ops._order import again, in_turn
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["geglu_mlp", "gelu_mlp", "swiglu_mlp"]


class _MlpSaved(NamedTuple):
    x: jax.Array
    up: jax.Array
    down: jax.Array
    pre: jax.Array  # h, what the activation was given


def _mlp_forward(
    x: ArrayLike,
    up: ArrayLike,
    down: ArrayLike,
    up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    *,
    approximate: bool = True,
    precision: Any = None,
) -> tuple[jax.Array, _MlpSaved]:
    x, up, down = jnp.asarray(x), jnp.asarray(up), jnp.asarray(down)
    h = with_bias(product(x, up, precision), up_bias)
    a = gelu_and_slope(wide(h), approximate)[0].astype(h.dtype)
    return with_bias(product(a, down, precision), down_bias), _MlpSaved(x, up, down, h)


def _mlp_backward(saved: _MlpSaved, dy: jax.Array, *, approximate: bool, precision: Any) -> tuple[Any, ...]:
    x, up, down, h = saved
    a = gelu_and_slope(wide(again(h, dy)), approximate)[0].astype(h.dtype)
    ddown = outer_sum(a, dy, precision)  # aᵀ dy
    (ddown, ddown_bias), dy = in_turn((ddown, row_sum(dy)), dy)
    da = product_transposed(dy, down, precision)  # dy Dᵀ
    dh = (wide(da) * gelu_and_slope(wide(again(h, da)), approximate)[1]).astype(h.dtype)  # da φ'(h)
    _, dh = in_turn((), dh)  # as it was rounded: a sum over it would otherwise want it kept in float32, too
    (dup, dup_bias), dh = in_turn((outer_sum(x, dh, precision), row_sum(dh)), dh)
    return product_transposed(dh, up, precision), dup, ddown, dup_bias, ddown_bias


def _check(who: str, x: ArrayLike, down: ArrayLike, **entries: ArrayLike) -> None:
    """x [..., d], entries [d, hidden], down [hidden, out]: sentences where that is not so."""
    require_float(who, x=x, **entries, down=down)
    given = shapes(x=x, **entries, down=down)
    if jnp.ndim(x) < 1 or any(jnp.ndim(m) != 2 for m in (*entries.values(), down)):
        wanted = ", ".join(f"{name} [in, hidden]" for name in entries)
        raise ValueError(f"{who}: expected x [..., in], {wanted} and down [hidden, out], got {given}.")
    for name, matrix in entries.items():
        if jnp.shape(x)[-1] != jnp.shape(matrix)[0]:
            raise ValueError(f"{who}: x has {jnp.shape(x)[-1]} features, {name} expects {jnp.shape(matrix)[0]} ({given}).")
        if jnp.shape(matrix)[1] != jnp.shape(down)[0]:
            raise ValueError(
                f"{who}: {name} gives {jnp.shape(matrix)[1]} hidden features, down expects {jnp.shape(down)[0]} ({given})."
            )


def _check_bias(who: str, name: str, bias: ArrayLike | None, of: str, matrix: ArrayLike) -> None:
    require_float(who, **{name: bias})
    if bias is not None and jnp.shape(bias) != jnp.shape(matrix)[1:]:
        raise ValueError(
            f"{who}: {name} has shape {jnp.shape(bias)}, expected {jnp.shape(matrix)[1:]} ({shapes(**{of: matrix})})."
        )


def _mlp_minimum(x: Any, up: Any, down: Any, y: Any) -> int:
    return nbytes(x, up, down) + _hidden_bytes(x, up, y)


def _gated_minimum(x: Any, gate: Any, up: Any, down: Any, y: Any) -> int:
    return nbytes(x, gate, up, down) + 2 * _hidden_bytes(x, up, y)


def _hidden_bytes(x: Any, matrix: Any, y: Any) -> int:
    return math.prod(x.shape[:-1]) * matrix.shape[1] * jnp.dtype(y.dtype).itemsize


@rule(
    forward=_mlp_forward,
    backward=_mlp_backward,
    static=["approximate", "precision"],
    samples=[
        sample(normal(5, 4), normal(4, 6), normal(6, 3), normal(6), normal(3)),
        sample(normal(2, 3, 4), normal(4, 5), normal(5, 4), approximate=False),
        sample(normal(4, scale=3.0), normal(4, 5), normal(5, 4), normal(5)),
    ],
    workloads=[
        sample(normal(2048, 512), normal(512, 2048, scale=512**-0.5), normal(2048, 512, scale=2048**-0.5), dtype=d)
        for d in ("float32", "bfloat16")
    ],
    keeps="x, up, down, the pre-activation",
    minimum=_mlp_minimum,
)
def gelu_mlp(
    x: ArrayLike,
    up: ArrayLike,
    down: ArrayLike,
    up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    *,
    approximate: bool = True,
    precision: Any = None,
) -> jax.Array:
    """Two fully connected layers with a gelu between them: y = gelu(x · up + up_bias) · down + down_bias.

    x [..., in], up [in, hidden], down [hidden, out], up_bias [hidden], down_bias [out] -> y [..., out].

    Args:
      approximate: gelu in the form with tanh (GPT-2), or exact with erf (BERT).
      precision: as in ``jax.lax.dot_general``; used by the backward too.
    Raises:
      ValueError: where shapes do not fit. TypeError: where an array is not floating-point.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    _check("gelu_mlp", x, down, up=up)
    _check_bias("gelu_mlp", "up_bias", up_bias, "up", up)
    _check_bias("gelu_mlp", "down_bias", down_bias, "down", down)
    h = with_bias(jnp.matmul(x, up, precision=precision), up_bias)
    a = jax.nn.gelu(wide(h), approximate).astype(h.dtype)
    return with_bias(jnp.matmul(a, down, precision=precision), down_bias)


class _GatedSaved(NamedTuple):
    x: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gated: jax.Array  # g, what the activation was given
    linear: jax.Array  # u


Activation = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _gated_forward(
    activation: Activation, x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, precision: Any
) -> tuple[jax.Array, _GatedSaved]:
    x, gate, up, down = jnp.asarray(x), jnp.asarray(gate), jnp.asarray(up), jnp.asarray(down)
    g, u = product(x, gate, precision), product(x, up, precision)
    a = (activation(wide(g))[0] * wide(u)).astype(jnp.result_type(g, u))
    return product(a, down, precision), _GatedSaved(x, gate, up, down, g, u)


def _gated_backward(activation: Activation, saved: _GatedSaved, dy: jax.Array, precision: Any) -> tuple[Any, ...]:
    x, gate, up, down, g, u = saved
    value, _ = activation(wide(again(g, dy)))
    ddown = outer_sum((value * wide(u)).astype(jnp.result_type(g, u)), dy, precision)  # aᵀ dy
    ddown, dy = in_turn(ddown, dy)
    da = wide(product_transposed(dy, down, precision))  # dy Dᵀ
    value, slope = activation(wide(again(g, da)))
    dg = (da * wide(u) * slope).astype(g.dtype)
    du = (da * value).astype(u.dtype)
    (dgate, dup), (dg, du) = in_turn((outer_sum(x, dg, precision), outer_sum(x, du, precision)), (dg, du))
    return product_transposed(dg, gate, precision) + product_transposed(du, up, precision), dgate, dup, ddown


def _gated_samples(*more: Any) -> dict[str, Any]:
    sizes = (normal(2048, 512), normal(512, 1408, scale=512**-0.5), normal(512, 1408, scale=512**-0.5))
    return {
        "samples": [
            sample(normal(5, 4), normal(4, 6), normal(4, 6), normal(6, 3)),
            sample(normal(2, 3, 4, scale=3.0), normal(4, 5), normal(4, 5), normal(5, 4)),
            *more,
        ],
        "workloads": [sample(*sizes, normal(1408, 512, scale=1408**-0.5), dtype=d) for d in ("float32", "bfloat16")],
        "keeps": "x, gate, up, down, the two pre-activations",
        "minimum": _gated_minimum,
    }


def _swiglu_forward(
    x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, *, precision: Any = None
) -> tuple[jax.Array, _GatedSaved]:
    return _gated_forward(silu_and_slope, x, gate, up, down, precision)


def _swiglu_backward(saved: _GatedSaved, dy: jax.Array, *, precision: Any) -> tuple[Any, ...]:
    return _gated_backward(silu_and_slope, saved, dy, precision)


@rule(forward=_swiglu_forward, backward=_swiglu_backward, static=["precision"], **_gated_samples())
def swiglu_mlp(x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, *, precision: Any = None) -> jax.Array:
    """The gated feed-forward block with silu: y = (silu(x · gate) · (x · up)) · down.

    x [..., in], gate [in, hidden], up [in, hidden], down [hidden, out] -> y [..., out].

    Args:
      precision: as in ``jax.lax.dot_general``; used by the backward too.
    Raises:
      ValueError: where shapes do not fit. TypeError: where an array is not floating-point.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check("swiglu_mlp", x, down, gate=gate, up=up)
    g, u = jnp.matmul(x, gate, precision=precision), jnp.matmul(x, up, precision=precision)
    a = (jax.nn.silu(wide(g)) * wide(u)).astype(jnp.result_type(g, u))
    return jnp.matmul(a, down, precision=precision)


def _geglu_forward(
    x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, *, approximate: bool = True, precision: Any = None
) -> tuple[jax.Array, _GatedSaved]:
    return _gated_forward(lambda z: gelu_and_slope(z, approximate), x, gate, up, down, precision)


def _geglu_backward(saved: _GatedSaved, dy: jax.Array, *, approximate: bool, precision: Any) -> tuple[Any, ...]:
    return _gated_backward(lambda z: gelu_and_slope(z, approximate), saved, dy, precision)


@rule(
    forward=_geglu_forward,
    backward=_geglu_backward,
    static=["approximate", "precision"],
    **_gated_samples(sample(normal(5, 4), normal(4, 6), normal(4, 6), normal(6, 3), approximate=False)),
)
def geglu_mlp(
    x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike, *, approximate: bool = True, precision: Any = None
) -> jax.Array:
    """The gated feed-forward block with gelu: y = (gelu(x · gate) · (x · up)) · down.

    x [..., in], gate [in, hidden], up [in, hidden], down [hidden, out] -> y [..., out].

    Args:
      approximate: gelu in the form with tanh, or exact with erf.
      precision: as in ``jax.lax.dot_general``; used by the backward too.
    Raises:
      ValueError: where shapes do not fit. TypeError: where an array is not floating-point.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check("geglu_mlp", x, down, gate=gate, up=up)
    g, u = jnp.matmul(x, gate, precision=precision), jnp.matmul(x, up, precision=precision)
    a = (jax.nn.gelu(wide(g), approximate) * wide(u)).astype(jnp.result_type(g, u))
    return jnp.matmul(a, down, precision=precision)
