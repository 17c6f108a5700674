"""A bank of wrong and of right functions: what a checker of backward passes must catch, and what it must let pass.

``WRONG`` has one entry for each way to be wrong: a function whose backward pass (or definition) has that one mistake, arguments
at which it shows, and the check and the argument that must be named. ``RIGHT`` has functions whose gradients are right, over
many shapes. In both, ``make`` returns ``(fn, args, options of check)``, and ``fn`` is the same object for every seed, so that
compiled programs are reused: only the values change.

The tests hold ``fbackprop.check`` with it, ``benchmarks/checkers.py`` compares other checkers on it, and
``benchmarks/false_alarms.py`` counts false alarms over it.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Made = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Wrong:
    """One way to be wrong.

    check: the check that must catch it. where: the arguments that it must name, all of them and no other, with commas
    between. source: where such a bug shipped, or what kind of mistake it is. x64: to be made and checked under
    ``jax.enable_x64``.
    """

    name: str
    make: Callable[[int], Made]
    check: str
    where: str
    depth: str = "quick"
    source: str = ""
    x64: bool = False


@dataclass(frozen=True)
class Right:
    """One right function over several shapes: ``make(seed, shape)``. slow: takes long, or is much like another."""

    name: str
    make: Callable[[int, Any], Made]
    shapes: tuple[Any, ...]
    x64: bool = False
    slow: bool = False


def normal(seed, *shape, scale=1.0, dtype=jnp.float32, stream=0):
    """Standard normals; other streams are independent."""
    drawn = np.random.default_rng([seed, stream, 77]).normal(size=shape)
    return jnp.asarray(drawn * scale, dtype)


def integers(seed, high, *shape, stream=9):
    return jnp.asarray(np.random.default_rng([seed, stream, 78]).integers(0, high, size=shape), jnp.int32)


def custom(fun, forward, backward, nondiff=(), **options):
    """somebody's jax.custom_vjp"""
    made = jax.custom_vjp(fun, nondiff_argnums=nondiff)
    made.defvjp(forward, backward, **options)
    return made


def pointwise(fun, backward):
    """From backward(x, dy)."""
    return custom(fun, lambda x: (fun(x), x), lambda x, dy: (backward(x, dy),))


# ------------------------------------------------------------------------------------------------- wrong: shared parts

WRONG: list[Wrong] = []


def wrong(name, fn, args, check, where, source="", depth="quick", x64=False, **options):
    """Adds an entry; ``args(seed)`` makes the arguments."""
    WRONG.append(Wrong(name, lambda seed: (fn, args(seed), options), check, where, depth, source, x64))


def of_x(*shape, **options):
    return lambda seed: (normal(seed, *shape, **options),)


def of_x_w(seed):
    return normal(seed, 6, 5), normal(seed, 5, 4, stream=1)


def of_x_w_b(seed):
    return normal(seed, 6, 5), normal(seed, 5, 4, stream=1), normal(seed, 4, stream=2)


def tanh(backward):
    """From backward(y, dy)."""
    return custom(jnp.tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: (backward(y, dy),))


def right_tanh(y, dy):
    return dy * (1 - y * y)


def dense(backward, value=lambda x, w: x @ w):
    return custom(lambda x, w: x @ w, lambda x, w: (value(x, w), (x, w)), backward)


def right_dense(saved, dy):
    x, w = saved
    return dy @ w.T, x.T @ dy


def affine(x, w, b):
    return x @ w + b[None, :]


def affine_with(backward):
    return custom(affine, lambda x, w, b: (affine(x, w, b), (x, w)), backward)


EPSILON = 1e-5


def standardized(x):
    centred = x - x.mean(-1, keepdims=True)
    r = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return centred * r, r


def layer_norm(x, gain, bias):
    return standardized(x)[0] * gain[None, :] + bias[None, :]


def right_layer_norm(saved, dy):
    normed, r, gain = saved
    d = dy * gain[None, :]
    along = normed * (d * normed).mean(-1, keepdims=True)
    return r * (d - d.mean(-1, keepdims=True) - along), (dy * normed).sum(0), dy.sum(0)


def layer_norm_with(backward):
    def forward(x, gain, bias):
        normed, r = standardized(x)
        return layer_norm(x, gain, bias), (normed, r, gain)

    return custom(layer_norm, forward, backward)


def of_norm(seed):
    return normal(seed, 6, 16), 1 + normal(seed, 16, scale=0.3, stream=1), normal(seed, 16, stream=2)


def rms_norm(x, gain):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain[None, :]


def rms_norm_backward(x, gain, dy, epsilon=EPSILON):
    r = lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
    d = dy * gain[None, :]
    return r * d - x * r**3 * (d * x).mean(-1, keepdims=True), (dy * x * r).sum(0)


def of_rms(rows=6, width=16, **options):
    return lambda seed: (normal(seed, rows, width, **options), 1 + normal(seed, width, scale=0.3, stream=1))


def one_hot(labels, n, dtype=jnp.float32):
    return (labels[..., None] == jnp.arange(n)[None, :]).astype(dtype)


def cross_entropy(logits, labels):
    """One loss for each row."""
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]


def cross_entropy_with(backward, fun=cross_entropy):
    """From backward(softmax minus one-hot, dy)."""

    def forward(logits, labels):
        difference = jax.nn.softmax(logits, -1) - one_hot(labels, logits.shape[-1], logits.dtype)
        return fun(logits, labels), difference

    return custom(fun, forward, lambda difference, dy: (backward(difference, dy), None))


def of_logits(rows=6, classes=11, **options):
    return lambda seed: (normal(seed, rows, classes, **options), integers(seed, classes, rows))


def of_table(seed):
    """Rows of a table, and indices of them with duplicates."""
    return normal(seed, 7, 4), jnp.concatenate([integers(seed, 7, 5), jnp.array([3, 3, 3])])


# ------------------------------------------------------------------------------------ wrong: factors, signs, axes, terms

wrong(
    "one part in a thousand",
    dense(lambda s, dy: (1.001 * right_dense(s, dy)[0], right_dense(s, dy)[1])),
    of_x_w, "cotangents", "x", "a constant that was rounded; jax.test_util.check_grads lets it pass",
)  # fmt: skip
wrong("factor two forgotten", pointwise(lambda x: x * x, lambda x, dy: dy * x), of_x(6, 5), "cotangents", "x", "the power rule")
wrong(
    "one element of thirty", tanh(lambda y, dy: right_tanh(y, dy).at[2, 3].multiply(1.5)),
    of_x(6, 5), "cotangents", "x", "a write to the wrong address",
)  # fmt: skip
wrong(
    "one element of 4096 half wrong", tanh(lambda y, dy: right_tanh(y, dy).at[41, 17].multiply(0.5)),
    of_x(64, 64), "cotangents", "x", "jax.test_util.check_grads, with one random direction, lets it pass",
)  # fmt: skip
wrong(
    "sign of one argument", dense(lambda s, dy: (right_dense(s, dy)[0], -right_dense(s, dy)[1])),
    of_x_w, "cotangents", "w", "x - w differentiated like x + w",
)  # fmt: skip
wrong(
    "transposed", dense(lambda s, dy: (dy @ s[1], s[0].T @ dy)),
    lambda seed: (normal(seed, 5, 5), normal(seed, 5, 5, stream=1)),
    "cotangents", "x", "a square matrix hides that it should have been transposed",
)  # fmt: skip
wrong(
    "sum over the wrong axis", pointwise(
        lambda x: jax.nn.softmax(x, -1),
        lambda x, dy: (p := jax.nn.softmax(x, -1)) * (dy - (p * dy).sum(0, keepdims=True)),
    ), of_x(6, 6), "cotangents", "x", "softmax summed over the rows of a square batch",
)  # fmt: skip
_softmax_of_axis = custom(
    lambda x, axis: jax.nn.softmax(x, axis), lambda x, axis: (jax.nn.softmax(x, axis), jax.nn.softmax(x, axis)),
    lambda axis, p, dy: (p * (dy - (p * dy).sum(-1, keepdims=True)),), nondiff=(1,),
)  # fmt: skip


def softmax_over_rows(x):
    return _softmax_of_axis(x, 0)


wrong(
    "an option that the backward does not read", softmax_over_rows, of_x(6, 6), "cotangents", "x",
    "axis=0 differentiated as if it were -1", reference=lambda x: jax.nn.softmax(x, 0),
)  # fmt: skip
wrong(
    "softmax: only the diagonal", pointwise(
        lambda x: jax.nn.softmax(x, -1), lambda x, dy: (p := jax.nn.softmax(x, -1)) * (1 - p) * dy
    ), of_x(6, 5), "cotangents", "x", "the derivative of a sigmoid used for a softmax",
)  # fmt: skip
wrong(
    "layer norm without the term of the mean", layer_norm_with(
        lambda s, dy: (
            s[1] * (dy * s[2][None, :] - s[0] * (dy * s[2][None, :] * s[0]).mean(-1, keepdims=True)),
            *right_layer_norm(s, dy)[1:],
        )
    ), of_norm, "cotangents", "x", "a term missing: the mean treated as a constant",
)  # fmt: skip
wrong(
    "layer norm without the term of the variance", layer_norm_with(
        lambda s, dy: (
            s[1] * (dy * s[2][None, :] - (dy * s[2][None, :]).mean(-1, keepdims=True)), *right_layer_norm(s, dy)[1:],
        )
    ), of_norm, "cotangents", "x", "a term missing: the variance treated as a constant",
)  # fmt: skip
wrong(
    "statistics as constants", layer_norm_with(lambda s, dy: (s[1] * dy * s[2][None, :], *right_layer_norm(s, dy)[1:])),
    of_norm, "cotangents", "x", "batch norm in evaluation mode differentiated in training",
)  # fmt: skip
wrong(
    "mean where a sum belongs", layer_norm_with(
        lambda s, dy: ((r := right_layer_norm(s, dy))[0], (dy * s[0]).mean(0), r[2])
    ), of_norm, "cotangents", "gain", "the gradient of a parameter averaged over rows",
)  # fmt: skip
wrong(
    "degrees of freedom", pointwise(
        lambda x: x.var(-1), lambda x, dy: 2 * (x - x.mean(-1, keepdims=True)) * dy[:, None] / (x.shape[-1] - 1)
    ), of_x(6, 9), "cotangents", "x", "n - 1 in the backward, n in the forward",
)  # fmt: skip
wrong(
    "divided by the batch twice", pointwise(
        lambda x: (x * x).mean(), lambda x, dy: dy * 2 * x / x.size / x.shape[0]
    ), of_x(6, 5), "cotangents", "x", "mean reduction applied in the loss and in its backward",
)  # fmt: skip
wrong(
    "bias: first row instead of the sum", affine_with(lambda s, dy: (*right_dense(s, dy), dy[0])),
    of_x_w_b, "cotangents", "b", "a broadcast argument whose cotangent is not summed, cut to shape",
)  # fmt: skip
wrong(
    "bias not summed", affine_with(lambda s, dy: (*right_dense(s, dy), dy)), of_x_w_b, "runs", "affine",
    "a broadcast argument whose cotangent is not summed",
)  # fmt: skip
wrong(
    "bias summed with keepdims", affine_with(lambda s, dy: (*right_dense(s, dy), dy.sum(0, keepdims=True))),
    of_x_w_b, "runs", "affine", "a shape that would broadcast to the right one",
)  # fmt: skip
wrong(
    "one cotangent too few", affine_with(right_dense), of_x_w_b, "runs", "affine", "an argument added later",
)  # fmt: skip
wrong(
    "leaves exchanged", custom(
        lambda p, x: jnp.tanh(x * p["gate"][None, :]) * p["up"][None, :],
        lambda p, x: (jnp.tanh(x * p["gate"][None, :]) * p["up"][None, :], (p, x)),
        lambda s, dy: _gated_backward(*s, dy),
    ), lambda seed: ({"gate": normal(seed, 5), "up": normal(seed, 5, stream=1)}, normal(seed, 6, 5, stream=2)),
    "cotangents", "p['gate'], p['up']", "two parameters of one shape returned in the other order",
)  # fmt: skip


def _gated_backward(p, x, dy):
    t = jnp.tanh(x * p["gate"][None, :])
    inner = dy * p["up"][None, :] * (1 - t * t)
    return {"up": (inner * x).sum(0), "gate": (dy * t).sum(0)}, inner * p["gate"][None, :]


wrong(
    "cotangent of the second output dropped", custom(
        lambda x: (jnp.tanh(x), x.mean(-1)), lambda x: ((jnp.tanh(x), x.mean(-1)), jnp.tanh(x)),
        lambda y, dy: (right_tanh(y, dy[0]),),
    ), of_x(6, 5), "cotangents", "x", "an output that nobody differentiated when the rule was written",
)  # fmt: skip
wrong(
    "saved after the activation instead of before", custom(
        lambda x: jax.nn.silu(x), lambda x: (jax.nn.silu(x), jax.nn.silu(x)),
        lambda y, dy: (dy * (s := jax.nn.sigmoid(y)) * (1 + y * (1 - s)),),
    ), of_x(6, 5), "cotangents", "x", "an in-place activation",
)  # fmt: skip
wrong(
    "the derivative of the approximation", pointwise(
        lambda x: jax.nn.gelu(x, approximate=False), lambda x, dy: jax.vjp(jax.nn.gelu, x)[1](dy)[0]
    ), of_x(6, 5), "cotangents", "x", "gelu with erf forward, with tanh backward",
)  # fmt: skip
wrong(
    "an approximate reciprocal", pointwise(
        lambda x: 1 / (1 + x * x), lambda x, dy: -2 * x * dy / (1 + (x * x).astype(jnp.bfloat16).astype(jnp.float32)) ** 2
    ), of_x(6, 5), "cotangents", "x", "a fast instruction in the backward only",
)  # fmt: skip
wrong(
    "straight-through, not declared", pointwise(lambda x: jnp.round(x * 4) / 4, lambda x, dy: dy),
    of_x(6, 5), "cotangents", "x", "an estimator that passes for a gradient",
)  # fmt: skip
wrong(
    "mask inverted", pointwise(lambda x: jnp.clip(x, -1, 1), lambda x, dy: jnp.where(jnp.abs(x) > 1, dy, 0)),
    of_x(6, 5), "cotangents", "x", "a condition the other way round",
)  # fmt: skip

# --------------------------------------------------------------------------------------------- wrong: in the cotangent

wrong(
    "Liger PR 1298: rows multiplied by grad_output[0]", cross_entropy_with(lambda d, dy: d * dy[0]), of_logits(),
    "cotangents", "logits", 'Liger-Kernel PR 1298 (also 968, 488, 872): reduction="none" multiplied every row by the first',
)  # fmt: skip
wrong(
    "right for ones only", tanh(lambda y, dy: dy.mean() * (1 - y * y)), of_x(6, 5), "cotangents", "x",
    "tested with loss = y.sum() only",
)  # fmt: skip
wrong(
    "cotangent of y left out", tanh(lambda y, dy: 1 - y * y), of_x(6, 5), "zero", "x", "a loss that expects to be last",
)  # fmt: skip
wrong(
    "lost where it stands alone", tanh(lambda y, dy: jnp.where((dy != 0).sum() == 1, 0, right_tanh(y, dy))),
    of_x(6, 5), "one-hot", "x", "a sparse path that is wrong",
)  # fmt: skip
wrong(
    "clipped inside", tanh(lambda y, dy: jnp.clip(right_tanh(y, dy), -1, 1)), of_x(6, 5), "linear", "x",
    "gradient clipping in a backward pass",
)  # fmt: skip
wrong(
    "its sign only", tanh(lambda y, dy: jnp.sign(dy) * (1 - y * y)), of_x(6, 5), "linear", "x",
    "sign descent in a backward pass",
)  # fmt: skip
wrong(
    "not linear by one part in a thousand", tanh(lambda y, dy: right_tanh(y, dy) * (1 + 1e-3 * jnp.abs(dy))),
    of_x(6, 5), "linear", "x", "a correction that depends on the cotangent",
)  # fmt: skip
wrong(
    "normalized", tanh(lambda y, dy: right_tanh(y, dy) / jnp.sqrt((dy * dy).mean() + 1e-6)), of_x(6, 5), "linear", "x",
    "gradient normalization in a backward pass",
)  # fmt: skip
wrong(
    "a constant added", tanh(lambda y, dy: right_tanh(y, dy) + 1e-3), of_x(6, 5), "zero", "x", "a bias in the gradient",
)  # fmt: skip
wrong(
    "weight decay inside", dense(lambda s, dy: (right_dense(s, dy)[0], right_dense(s, dy)[1] + 1e-4 * s[1])),
    of_x_w, "zero", "w", "a regularizer that hides in a backward pass",
)  # fmt: skip
wrong(
    "noise added", tanh(lambda y, dy: right_tanh(y, dy) + 1e-3 * jax.random.normal(jax.random.key(0), y.shape, y.dtype)),
    of_x(6, 5), "zero", "x", "gradient noise with a fixed key",
)  # fmt: skip
wrong(
    "Unsloth 5230: zero", dense(lambda s, dy: (right_dense(s, dy)[0], jnp.zeros_like(s[1]))), of_x_w, "nonzero", "w",
    "Unsloth issue 5230: zero gradients, the model never learned",
)  # fmt: skip

# ------------------------------------------------------------------------------------------- wrong: only at some values

wrong(
    "NaN", tanh(lambda y, dy: jnp.where(y > 0.5, jnp.nan, right_tanh(y, dy))), of_x(6, 5), "finite", "x", "0/0 somewhere",
)  # fmt: skip
wrong(
    "overflow of exp", pointwise(jax.nn.softplus, lambda x, dy: dy * jnp.exp(x) / (1 + jnp.exp(x))),
    lambda seed: (normal(seed, 6, 5).at[1, 2].set(200.0),), "finite", "x", "inf / inf at large x",
)  # fmt: skip
wrong(
    "logsumexp without its maximum", pointwise(
        lambda x: jax.nn.logsumexp(x, -1), lambda x, dy: dy[:, None] * jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)
    ), of_x(6, 5, scale=200.0), "finite", "x", "the forward subtracts the maximum, the backward does not",
)  # fmt: skip
wrong(
    "square root at zero behind where", lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0),
    lambda seed: (jnp.maximum(normal(seed, 6, 5), 0),), "finite", "x", "where does not stop 0 * inf in the backward",
)  # fmt: skip
wrong(
    "norm of a zero row", lambda x: jnp.sqrt((x * x).sum(-1)), lambda seed: (normal(seed, 6, 5).at[2].set(0.0),),
    "finite", "x", "0/0 at the origin, in the gradient only",
)  # fmt: skip


def _entropy(logits):
    logp = jax.nn.log_softmax(logits, -1)
    return -(jnp.exp(logp) * jnp.where(jnp.isneginf(logp), 0.0, logp)).sum(-1)


wrong(
    "optax PR 1762: NaN at -inf logits", pointwise(
        _entropy, lambda x, dy: -dy[:, None] * (p := jax.nn.softmax(x, -1)) * (jnp.log(p) + _entropy(x)[:, None])
    ), lambda seed: (normal(seed, 6, 5).at[:, 1].set(-jnp.inf),), "finite", "logits",
    "optax PR 1762: the tangent is NaN where a logit is -inf (masked)",
)  # fmt: skip
wrong(
    "all of a mask is False", lambda x, m: (x * m).sum(-1) / jnp.maximum(m.sum(-1), 1)
    * jnp.where(m.any(-1), 1.0, 0.0) + jnp.where(m.any(-1), jnp.sqrt((x * x * m).sum(-1)), 0.0),
    lambda seed: (normal(seed, 6, 5), (integers(seed, 2, 6, 5) > 0).at[2].set(False)),
    "finite", "x", "a row of padding only",
)  # fmt: skip
wrong(
    "relu'(0) = 1", pointwise(jax.nn.relu, lambda x, dy: jnp.where(x >= 0, dy, 0)),
    lambda seed: (jnp.where(normal(seed, 6, 5) > 0.5, normal(seed, 6, 5), 0.0),), "cotangents", "x",
    "jax.test_util.check_grads lets it pass",
)  # fmt: skip
wrong(
    "every tie gets the whole gradient", pointwise(
        lambda x: x.max(-1), lambda x, dy: jnp.where(x == x.max(-1, keepdims=True), dy[:, None], 0)
    ), lambda seed: (jnp.clip(jnp.round(normal(seed, 6, 16)), -1, 1),), "cotangents", "x",
    "max pooling over equal elements",
)  # fmt: skip
wrong(
    "epsilon left out", custom(
        rms_norm, lambda x, gain: (rms_norm(x, gain), (x, gain)), lambda s, dy: rms_norm_backward(*s, dy, epsilon=0.0)
    ), of_rms(scale=1e-2), "cotangents", "x, gain", "shows in small activations only",
)  # fmt: skip
wrong(
    "epsilon outside of the root", pointwise(
        lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6),
        lambda x, dy: (r := 1 / (jnp.sqrt((x * x).mean(-1, keepdims=True)) + 1e-6)) * dy
        - x * r**3 * (dy * x).mean(-1, keepdims=True),
    ), of_x(6, 16, scale=1e-2), "cotangents", "x", "two conventions in one rule",
)  # fmt: skip
wrong(
    "last row of the batch", tanh(lambda y, dy: right_tanh(y, dy).at[-1].set(0)), of_x(6, 5), "cotangents", "x",
    "a loop that ends one early",
)  # fmt: skip
wrong(
    "a tail shorter than a block", tanh(
        lambda y, dy: jnp.where((jnp.arange(y.shape[-1]) < y.shape[-1] // 128 * 128)[None, :], right_tanh(y, dy), 0)
    ), of_x(3, 130), "cotangents", "x", "right where the width is a multiple of the block",
)  # fmt: skip
wrong(
    "odd widths", pointwise(
        lambda x: jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
        lambda x, dy: jnp.concatenate([dy[..., x.shape[-1] // 2 :], -dy[..., : x.shape[-1] // 2]], -1),
    ), of_x(6, 5), "cotangents", "x", "rotary halves, right where the width is even",
)  # fmt: skip
wrong(
    "only above a size", tanh(lambda y, dy: right_tanh(y, dy) * (1 + 1e-3 * (y.size > 1000))), of_x(40, 40),
    "cotangents", "x", "another kernel for large arrays",
)  # fmt: skip
wrong(
    "wrong where x is large", pointwise(jnp.tanh, lambda x, dy: dy * jnp.where(jnp.abs(x) > 3, 0, 1 - jnp.tanh(x) ** 2)),
    lambda seed: (normal(seed, 6, 5).at[3].multiply(0).at[3].add(3.2),), "cotangents", "x", "a tail cut off",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ wrong: indices, masks

wrong(
    "duplicate indices: set instead of add", custom(
        lambda table, ids: table[ids], lambda table, ids: (table[ids], (table, ids)),
        lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].set(dy), None),
    ), of_table, "cotangents", "table", "an embedding whose tokens repeat",
)  # fmt: skip
wrong(
    "index out of range: clamped", custom(
        lambda table, ids: table.at[ids].get(mode="fill", fill_value=0), lambda table, ids: (
            table.at[ids].get(mode="fill", fill_value=0), (table, ids),
        ), lambda s, dy: (jnp.zeros_like(s[0]).at[jnp.clip(s[1], 0, 6)].add(dy), None),
    ), lambda seed: (normal(seed, 7, 4), integers(seed, 7, 5).at[1].set(9)), "cotangents", "table",
    "the forward fills, the backward clamps",
)  # fmt: skip
wrong(
    "padding index not left out", custom(
        lambda table, ids: table[ids] * (ids != 0)[:, None], lambda table, ids: (
            table[ids] * (ids != 0)[:, None], (table, ids),
        ), lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].add(dy), None),
    ), lambda seed: (normal(seed, 7, 4), integers(seed, 7, 5).at[:2].set(0)), "cotangents", "table",
    "ignore_index, padding_idx",
)  # fmt: skip
wrong(
    "a cotangent for integers", custom(
        lambda table, ids: table[ids], lambda table, ids: (table[ids], (table, ids)),
        lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].add(dy), (dy * s[0][s[1]]).sum(-1)),
    ), of_table, "integers", "ids", "JAX drops it without a word: whoever wrote it took the indices for weights",
)  # fmt: skip
wrong(
    "labels off by one", custom(
        cross_entropy, lambda x, labels: (cross_entropy(x, labels), (x, labels)),
        lambda s, dy: (dy[:, None] * (jax.nn.softmax(s[0], -1) - one_hot(s[1] + 1, 11)), None),
    ), of_logits(), "cotangents", "logits", "labels shifted twice",
)  # fmt: skip


def _smoothed(logits, labels):
    return 0.9 * cross_entropy(logits, labels) - 0.1 * jax.nn.log_softmax(logits, -1).mean(-1)


wrong(
    "label smoothing left out", cross_entropy_with(lambda d, dy: d * dy[:, None], _smoothed), of_logits(), "cotangents",
    "logits", "an option added later, in the forward only",
)  # fmt: skip


def dropout(x, key):
    return jnp.where(jax.random.bits(key, x.shape, jnp.uint32) > jnp.uint32(2**30), x / 0.75, 0)


wrong(
    "mask drawn again with another key", custom(
        dropout, lambda x, key: (dropout(x, key), key), lambda key, dy: (dropout(dy, jax.random.split(key)[0]), None)
    ), lambda seed: (normal(seed, 6, 5), jax.random.key(seed)), "cotangents", "x", "dropout that stores no mask",
)  # fmt: skip
wrong(
    "dropout without its scale", custom(
        dropout, lambda x, key: (dropout(x, key), key), lambda key, dy: (0.75 * dropout(dy, key), None)
    ), lambda seed: (normal(seed, 6, 5), jax.random.key(seed)), "cotangents", "x", "1 / (1 - rate) in the forward only",
)  # fmt: skip


def attention(q, k, v):
    scores = q @ k.T / np.float32(np.sqrt(q.shape[-1]))
    return jax.nn.softmax(jnp.where(jnp.tri(q.shape[0], dtype=bool), scores, -1e30), -1) @ v


def attention_backward(q, k, v, dy, mask=True, scale_of_k=True):
    scale = np.float32(1 / np.sqrt(q.shape[-1]))
    scores = q @ k.T * scale
    p = jax.nn.softmax(jnp.where(jnp.tri(q.shape[0], dtype=bool), scores, -1e30) if mask else scores, -1)
    dp = dy @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    return ds @ k * scale, ds.T @ q * (scale if scale_of_k else 1), p.T @ dy


def of_attention(seed):
    return tuple(normal(seed, 6, 4, stream=i) for i in range(3))


wrong(
    "causal mask not in the backward", custom(
        attention, lambda q, k, v: (attention(q, k, v), (q, k, v)), lambda s, dy: attention_backward(*s, dy, mask=False)
    ), of_attention, "cotangents", "q, k, v", "attention that recomputes its probabilities without the mask",
)  # fmt: skip
wrong(
    "scale of one factor left out", custom(
        attention, lambda q, k, v: (attention(q, k, v), (q, k, v)), lambda s, dy: attention_backward(*s, dy, scale_of_k=False)
    ), of_attention, "cotangents", "k", "1 / sqrt(width) in dq, not in dk",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ wrong: order and time

wrong(
    "running sum not reversed", pointwise(lambda x: jnp.cumsum(x, -1), lambda x, dy: jnp.cumsum(dy, -1)), of_x(6, 5),
    "cotangents", "x", "the transpose of a running sum runs backwards",
)  # fmt: skip
wrong(
    "permutation instead of its inverse", pointwise(
        lambda x: jnp.sort(x, -1), lambda x, dy: jnp.take_along_axis(dy, jnp.argsort(x, -1), -1)
    ), of_x(6, 7), "cotangents", "x", "sort",
)  # fmt: skip
wrong(
    "shifted by one", pointwise(
        lambda x: jnp.pad(x, ((0, 0), (2, 0)))[:, :-2], lambda x, dy: jnp.pad(dy, ((0, 0), (0, 1)))[:, 1:]
    ), of_x(6, 9), "cotangents", "x", "a causal shift",
)  # fmt: skip


def correlate(x, w):
    return sum(x[i : i + x.shape[0] - w.shape[0] + 1] * w[i] for i in range(3))


wrong(
    "kernel not flipped", custom(
        correlate, lambda x, w: (correlate(x, w), (x, w)), lambda s, dy: (
            correlate(jnp.pad(dy, 2), s[1]), jnp.stack([(s[0][i : i + dy.shape[0]] * dy).sum() for i in range(3)]),
        ),
    ), lambda seed: (normal(seed, 11), normal(seed, 3, stream=1)), "cotangents", "x", "convolution against correlation",
)  # fmt: skip
wrong(
    "heads merged in the wrong order", pointwise(
        lambda x: x.reshape(6, 2, 3).transpose(1, 0, 2), lambda x, dy: dy.reshape(6, 6)
    ), of_x(6, 6), "cotangents", "x", "reshape where a transpose belongs",
)  # fmt: skip


def recurrence(x, h):
    return lax.scan(lambda h, x: ((n := jnp.tanh(0.9 * h + x)), n), h, x)[1]


def _recurrence_backward(hs, dy, truncate=0, reverse=True):
    def step(dh, item):
        h, d = item
        dz = (d + dh) * (1 - h * h)
        return 0.9 * dz, dz

    dh, dx = lax.scan(step, jnp.zeros_like(dy[0]), (hs, dy), reverse=reverse)
    return jnp.where(jnp.arange(dy.shape[0])[:, None] < truncate, 0, dx), dh


def _recurrence_with(**how):
    return custom(recurrence, lambda x, h: ((hs := recurrence(x, h)), hs), lambda hs, dy: _recurrence_backward(hs, dy, **how))


def of_time(seed):
    return normal(seed, 7, 3), normal(seed, 3, stream=1)


wrong(
    "scan not reversed",
    _recurrence_with(reverse=False),
    of_time,
    "cotangents",
    "x, h",
    "time runs forwards in the backward pass",
)
wrong(
    "truncated", _recurrence_with(truncate=2), of_time, "cotangents", "x", "truncated backpropagation through time, undeclared"
)

# ------------------------------------------------------------------------------------------------- wrong: precision

wrong(
    "rounded to bfloat16", tanh(lambda y, dy: right_tanh(y, dy).astype(jnp.bfloat16).astype(jnp.float32)), of_x(64, 80),
    "rms", "x", "a cotangent sent over the wire in bfloat16; jax.test_util.check_grads lets it pass",
)  # fmt: skip


def sum_in(dtype, terms):
    """In a loop, because XLA may do a sum of bfloat16 in float32."""
    return lax.scan(lambda total, term: (total + term, None), jnp.zeros(terms.shape[1:], dtype), terms.astype(dtype))[0]


def _bfloat16_sum(terms):
    return sum_in(jnp.bfloat16, terms).astype(terms.dtype)


wrong(
    "Liger PR 950: sum in bfloat16", custom(
        rms_norm, lambda x, gain: (rms_norm(x, gain), (x, gain)),
        lambda s, dy: (
            rms_norm_backward(*s, dy)[0],
            _bfloat16_sum(dy * s[0] * lax.rsqrt((s[0] * s[0]).mean(-1, keepdims=True) + EPSILON)),
        ),
    ), of_rms(64, 80), "cotangents", "gain", "Liger-Kernel PR 950: the gradient of RMS norm's weight reduced in bfloat16",
)  # fmt: skip


def swiglu(x, gate, up):
    """Weights in bfloat16, arithmetic in float32: [rows, features] to [rows, hidden]."""
    wide = [a.astype(jnp.float32) for a in (x, gate, up)]
    return (jax.nn.silu(wide[0] @ wide[1]) * (wide[0] @ wide[2])).astype(x.dtype)


def _swiglu_backward(saved, dy):
    x, gate, up = saved  # everything in bfloat16, sums too
    a, b = x @ gate, x @ up
    s = jax.nn.sigmoid(a)
    da, db = dy * b * s * (1 + a * (1 - s)), dy * a * s
    return da @ gate.T + db @ up.T, *(_bfloat16_sum(x[:, :, None] * d[:, None, :]) for d in (da, db))


wrong(
    "Liger 512, 414: bfloat16 SwiGLU", custom(swiglu, lambda *a: (swiglu(*a), a), _swiglu_backward),
    lambda seed: tuple(
        normal(seed, *s, stream=i, dtype=jnp.bfloat16) for i, s in enumerate(((8192, 6), (6, 8), (6, 8)))
    ), "cotangents", "gate, up", "Liger-Kernel issues 512 and 414: the loss diverged with SwiGLU in bfloat16",
)  # fmt: skip


def head_loss(x, w, labels):
    """Logits in float32 of arguments in bfloat16."""
    return cross_entropy(jnp.matmul(x, w, preferred_element_type=jnp.float32), labels)


def _head_forward(x, w, labels):
    # Rounded to bfloat16 on the way. In words that XLA cannot leave out, as it may a pair of casts.
    logits = lax.reduce_precision(jnp.matmul(x, w, preferred_element_type=jnp.float32), 8, 7)
    return cross_entropy(logits, labels), (x, w, labels, jax.nn.logsumexp(logits, -1))


def _head_backward(saved, dy):
    x, w, labels, total = saved
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    p = jnp.exp(logits - total[:, None])
    d = dy[:, None] * (p - one_hot(labels, w.shape[1]))
    wide = [a.astype(jnp.float32) for a in (x, w)]
    return (d @ wide[1].T).astype(x.dtype), (wide[0].T @ d).astype(w.dtype), None


wrong(
    "marin PR 8217: bfloat16 forward, float32 recomputed", custom(head_loss, _head_forward, _head_backward),
    lambda seed: (
        normal(seed, 16, 8, scale=8.0, dtype=jnp.bfloat16), normal(seed, 8, 12, scale=8.0, stream=1, dtype=jnp.bfloat16),
        integers(seed, 12, 16),
    ), "cotangents", "x, w", "marin PR 8217: probabilities off by 1 to 86 % where logits are large",
)  # fmt: skip


def _filtered(difference, dy):
    return jnp.where(jnp.abs(difference) < 2.0**-12, 0, difference) * dy[:, None]


wrong(
    "cut-cross-entropy 14, 18: small gradients filtered", cross_entropy_with(_filtered),
    of_logits(4, 4096, dtype=jnp.bfloat16), "sums", "logits",
    "cut-cross-entropy issues 14 and 18: filtered gradients raised the loss of pre-training",
)  # fmt: skip


def _pruned_forward(x, w, b):
    lonely = b.perturbed and not (x.perturbed or w.perturbed)
    return affine(x.value, w.value, b.value), (x.value, w.value, jnp.float32(0 if lonely else 1))


wrong(
    "cut-cross-entropy 52: bias wrong on its own", custom(
        affine, _pruned_forward, lambda s, dy: (*right_dense(s[:2], dy), dy.sum(0) * s[2]), symbolic_zeros=True
    ), of_x_w_b, "alone", "b", "cut-cross-entropy issue 52: the bias's gradient was wrong, depending on what else needs one",
)  # fmt: skip


def with_sinks(scores, sinks):
    """Softmax with one more logit for each row, which takes weight and gives none."""
    both = jnp.concatenate([scores, sinks[:, None]], -1)
    return jax.nn.softmax(both, -1)[:, :-1]


def _sinks_forward(scores, sinks):
    p = with_sinks(scores, sinks)
    return p, p


def _sinks_backward(p, dy):
    along = (p * dy).sum(-1)
    return p * (dy - along[:, None]), -(1 - p.sum(-1)) * along  # cancels: the sink's own weight is known better


wrong(
    "jax issue 40128: digits of the sinks lost", custom(with_sinks, _sinks_forward, _sinks_backward),
    lambda seed: (normal(seed, 32, 12), normal(seed, 32, stream=1) - 9.0), "cotangents", "sinks",
    "jax issue 40128: splash attention's dsinks loses one to two digits to cancellation",
)  # fmt: skip


def _ref_backward(saved, dy):
    x, w = saved
    total = jax.new_ref(jnp.zeros_like(w))

    @functools.partial(lax.fori_loop, 0, 3, init_val=None)
    def _(i, _):
        rows = [lax.dynamic_slice_in_dim(a, 2 * i, 2) for a in (x, dy)]
        total[...] = rows[0].T @ rows[1]  # the last block only: = where += belongs

    return dy @ w.T, total[...]


wrong(
    "jax issue 32411: accumulated in a ref", dense(_ref_backward), of_x_w, "cotangents", "w",
    "jax issue 32411: wrong gradients with mutable refs; here a block overwrites instead of adding to the ref",
)  # fmt: skip
wrong(
    "float32 inside float64", tanh(lambda y, dy: right_tanh(y.astype(jnp.float32), dy.astype(jnp.float32)).astype(y.dtype)),
    lambda seed: (normal(seed, 6, 5, dtype=jnp.float64),), "cotangents", "x", "a constant or a cast that narrows", x64=True,
)  # fmt: skip
wrong(
    "cancellation", pointwise(lambda x: jax.nn.log_sigmoid(x), lambda x, dy: dy * (1 - jax.nn.sigmoid(x))),
    lambda seed: (normal(seed, 6, 5) + 12.0,), "cotangents", "x",
    "1 - sigmoid(x) where sigmoid(-x) belongs: loses every digit at large x",
)  # fmt: skip

# -------------------------------------------------------------------------------------- wrong: types, values, state

wrong(
    "float32 for bfloat16", tanh(lambda y, dy: right_tanh(y, dy).astype(jnp.float32)),
    of_x(6, 5, dtype=jnp.bfloat16), "types", "x", "JAX does not cast the cotangent",
)  # fmt: skip
wrong(
    "weakly typed", custom(lambda x: jnp.sign(x), lambda x: (jnp.sign(x), None), lambda _, dy: (jnp.asarray(0.0),)),
    lambda seed: (normal(seed),), "types", "x", "a Python number: what is computed with it may change dtype",
)  # fmt: skip
wrong(
    "shape", tanh(lambda y, dy: right_tanh(y, dy)[0]), of_x(6, 5), "runs", "tanh", "an axis lost",
)  # fmt: skip
wrong(
    "another value under differentiation", dense(right_dense, lambda x, w: x @ w + 100), of_x_w, "value", "output 0",
    "JAX does not compare what the rule's forward returns",
)  # fmt: skip
wrong(
    "another value of the second output", custom(
        lambda x: (jnp.tanh(x), x.mean(-1)), lambda x: ((jnp.tanh(x), x.sum(-1) / (x.shape[-1] - 1)), jnp.tanh(x)),
        lambda y, dy: (right_tanh(y, dy[0]) + dy[1][:, None] / y.shape[-1],),
    ), of_x(6, 5), "value", "output 1", "a statistic beside the result",
)  # fmt: skip

_noise = np.random.default_rng(0)


def _drifting(y, dy):
    draw = jax.pure_callback(lambda _: np.float32(_noise.normal()), jax.ShapeDtypeStruct((), jnp.float32), dy)
    return right_tanh(y, dy) * (1 + 1e-3 * draw)


wrong("another result each time", tanh(_drifting), of_x(6, 5), "repeat", "x", "host state between calls")

_workspace: dict[str, np.ndarray] = {}


def _keep(x):
    _workspace["y"] = np.array(np.tanh(x))
    return _workspace["y"].copy()


def _overwrite(dy, _):
    y = _workspace["y"]
    np.subtract(1, y * y, out=y)  # right once: what was saved is gone
    return dy * y


def _in_place_forward(x):
    y = jax.pure_callback(_keep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return y, y  # y is handed on so that the backward waits for the forward


wrong(
    "Liger 272, 254: saved tensor overwritten in place", custom(
        jnp.tanh, _in_place_forward,
        lambda y, dy: (jax.pure_callback(_overwrite, jax.ShapeDtypeStruct(dy.shape, dy.dtype), dy, y),),
    ), of_x(6, 5), "repeat", "x", "Liger-Kernel issues 272 and 254: an in-place write corrupted what the forward had saved",
)  # fmt: skip

_traces = itertools.count()


def _stale(saved, dy):
    scale = 1 + 0.5 * next(_traces)  # read when it is traced
    return tuple(scale * d for d in right_dense(saved, dy))


wrong("global state read at trace time", dense(_stale), of_x_w, "alone", "x, w", "a loss scale in a Python variable")
wrong(
    "stop_gradient in the definition", lambda x: x * lax.stop_gradient(x), of_x(6, 5), "finite differences", "x",
    "autodiff does what it was told",
)  # fmt: skip


@jax.custom_jvp
def _bent(x):
    return jnp.sin(x)


_bent.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 1.001 * jnp.cos(primals[0]) * tangents[0]))
wrong("a wrong custom_jvp", _bent, of_x(6, 5), "cotangents", "x", "a rule for tangents, which reverse mode transposes")

_inner = tanh(lambda y, dy: dy * (1 - y))


def _nested(x, w):
    return (_inner(x @ w) ** 2).mean()


wrong("a wrong rule inside a loss", _nested, of_x_w, "cotangents", "x, w", "a rule that nobody checks because it is nested")

_outer = custom(
    lambda x: _inner(x) * x, lambda x: (_inner(x) * x, x), lambda x, dy: (dy * (jnp.tanh(x) + x * (1 - jnp.tanh(x))),)
)
wrong(
    "the same mistake in the rule and in its definition",
    _outer,
    of_x(6, 5),
    "cotangents",
    "x",
    "a definition that has rules inside",
)

# ------------------------------------------------------------------------------------------------ wrong: depth "full"


def wide_rms_norm(x, gain):
    return rms_norm(x.astype(jnp.float32), gain.astype(jnp.float32)).astype(x.dtype)


def _narrow_sum_backward(saved, dy):
    x, gain, dy = (a.astype(jnp.float32) for a in (*saved, dy))
    terms = dy * x * lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return rms_norm_backward(x, gain, dy)[0].astype(saved[0].dtype), sum_in(saved[1].dtype, terms)


wrong(
    "sum in the dtype of the argument", custom(
        wide_rms_norm, lambda x, gain: (wide_rms_norm(x, gain), (x, gain)), _narrow_sum_backward
    ), of_rms(2048, 8), "low precision", "gain", "right in float32, where it was tested", "full",
)  # fmt: skip


def wide_softplus(x):
    return jax.nn.softplus(x.astype(jnp.float32)).astype(x.dtype)


wrong(
    "exp in float16", pointwise(
        wide_softplus,
        lambda x, dy: dy * (jnp.exp(x) / (1 + jnp.exp(x)) if x.dtype == jnp.float16 else jax.nn.sigmoid(x)),
    ), of_x(6, 5), "low precision", "x", "overflows at 11", "full",
)  # fmt: skip
wrong(
    "logits in bfloat16, recomputed in float32", custom(head_loss, _head_forward, _head_backward),
    lambda seed: (normal(seed, 16, 8), normal(seed, 8, 12, stream=1), integers(seed, 12, 16)),
    "low precision", "x, w, output 0", "the same as marin PR 8217, from arguments in float32 of ordinary size", "full",
)  # fmt: skip
wrong(
    "relu'(0) = 1, at ordinary arguments", pointwise(jax.nn.relu, lambda x, dy: jnp.where(x >= 0, dy, 0)), of_x(6, 5),
    "edges", "x", "no random argument is exactly zero", "full",
)  # fmt: skip
wrong(
    "ties, at ordinary arguments", pointwise(
        lambda x: x.max(-1), lambda x, dy: jnp.where(x == x.max(-1, keepdims=True), dy[:, None], 0)
    ), of_x(6, 16), "edges", "x", "no two random arguments are equal", "full",
)  # fmt: skip
wrong(
    "-inf, at ordinary arguments", pointwise(
        lambda x: jax.nn.softmax(x, -1),
        lambda x, dy: (p := jax.nn.softmax(x, -1)) * (dy - (p * dy).sum(-1, keepdims=True)) + 0 * dy * jnp.maximum(x, -jnp.inf),
    ), of_x(6, 5), "edges", "x", "0 * inf where a logit is masked", "full",
)  # fmt: skip
wrong(
    "huge values, at ordinary arguments", pointwise(jax.nn.softplus, lambda x, dy: dy * jnp.exp(x) / (1 + jnp.exp(x))),
    of_x(6, 5), "edges", "x", "inf / inf at large x", "full",
)  # fmt: skip
wrong(
    "duplicates, at ordinary indices", custom(
        lambda table, ids: table[ids], lambda table, ids: (table[ids], (table, ids)),
        lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].set(dy), None),
    ), lambda seed: (normal(seed, 7, 4), jnp.asarray(np.random.default_rng(seed).permutation(7)[:5], jnp.int32)),
    "edges", "table", "no two indices of the example are equal", "full",
)  # fmt: skip
wrong(
    "out of range, at ordinary indices", custom(
        lambda table, ids: table.at[ids].get(mode="fill", fill_value=0), lambda table, ids: (
            table.at[ids].get(mode="fill", fill_value=0), (table, ids),
        ), lambda s, dy: (jnp.zeros_like(s[0]).at[jnp.clip(s[1], 0, 6)].add(dy), None),
    ), lambda seed: (normal(seed, 7, 4), integers(seed, 7, 5)), "edges", "table",
    "the forward fills, the backward clamps", "full",
)  # fmt: skip


def masked_mean(x, mask):
    return jnp.where(mask, x, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


wrong(
    "all False, at an ordinary mask", custom(
        masked_mean, lambda x, mask: (masked_mean(x, mask), mask),
        lambda mask, dy: ((each := dy[:, None] / mask.sum(-1, keepdims=True)) - jnp.where(mask, 0, each), None),
    ), lambda seed: (normal(seed, 6, 5), (integers(seed, 2, 6, 5) > 0).at[:, 0].set(True)), "edges", "x",
    "inf - inf in a row of padding only", "full",
)  # fmt: skip


def _normalized_backward(x, dy):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    r = jnp.where(variance > 1e-3, lax.rsqrt(variance + 1e-5), 1.0)
    n = centred * r
    return r * (dy - dy.mean(-1, keepdims=True) - n * (dy * n).mean(-1, keepdims=True))


wrong(
    "a constant row", pointwise(lambda x: standardized(x)[0], _normalized_backward), of_x(6, 16), "edges", "x",
    "epsilon replaced where it decides", "full",
)  # fmt: skip
wrong(
    "one row of the Jacobian", tanh(lambda y, dy: jnp.where(((dy != 0).sum() == 1) & (dy[4, 2] != 0), 0, right_tanh(y, dy))),
    of_x(6, 5), "jacobian", "x", "a sparse path that is wrong for one output of thirty", "full",
)  # fmt: skip


def _host_backward(y, dy):
    """Divides by the number of elements that it is given, which under vmap is that of the whole batch."""
    shape = jax.ShapeDtypeStruct(dy.shape, dy.dtype)
    size = np.float32(y.size)

    def host(y, dy):
        return np.asarray(dy * (1 - y * y) * (size / np.float32(np.size(y))), y.dtype)

    return jax.pure_callback(host, shape, y, dy, vmap_method="broadcast_all")


wrong(
    "a callback under vmap", tanh(_host_backward), of_x(6, 5), "transformations", "x",
    "vmap_method promises what the callback does not hold", "full",
)  # fmt: skip


@jax.custom_batching.custom_vmap
def _batched_product(dy, slope):
    return dy * slope


@_batched_product.def_vmap
def _batched_product_rule(size, batched, dy, slope):
    return dy * (slope if batched[1] else slope[None]) * (1 + 0.001 * (size > 1)), True


wrong(
    "a wrong rule for vmap", tanh(lambda y, dy: _batched_product(dy, 1 - y * y)), of_x(6, 5), "transformations", "x",
    "a custom_vmap that nobody checked", "full",
)  # fmt: skip


def _eager(y, dy):
    return right_tanh(y, dy) * (1 if isinstance(dy, jax.core.Tracer) else 1.001)


wrong(
    "another path without jit", tanh(_eager), of_x(6, 5), "transformations", "x", "a fast path for concrete arrays", "full",
)  # fmt: skip
wrong(
    "stop_gradient in the backward", tanh(lambda y, dy: dy * lax.stop_gradient(1 - y * y)), of_x(6, 5), "second order", "x",
    "a gradient penalty trains on nothing", "full",
)  # fmt: skip


@jax.custom_jvp
def _slope(y):
    return 1 - y * y


_slope.defjvps(lambda t, slope, y: -y * t)
wrong(
    "a wrong rule in the backward", tanh(lambda y, dy: dy * _slope(y)), of_x(6, 5), "second order", "x",
    "the gradient of the gradient, which nobody compares", "full",
)  # fmt: skip


def squared(x):
    return x * x


def _averaged(x, dy):
    mesh = jax.sharding.get_abstract_mesh()
    return 2 * x * dy * (1 if mesh.empty else 1 / mesh.size)


def _refusing(x, dy):
    if not jax.sharding.get_abstract_mesh().empty:
        raise NotImplementedError("one device only")
    return 2 * x * dy


def _local(x, dy):
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return 2 * x * dy * (jnp.where(lax.axis_index(axes) == 0, 1.0, 0.5) if axes else 1.0)


wrong(
    "averaged over devices", pointwise(squared, _averaged), of_x(8, 8), "devices", "x",
    "a mean over devices that the caller takes as well", "full",
)  # fmt: skip
wrong(
    "refuses more than one device", pointwise(squared, _refusing), of_x(8, 8), "devices", "squared",
    "written and tested on one device", "full",
)  # fmt: skip
wrong(
    "right on the first device only", pointwise(squared, _local), of_x(8, 8), "devices", "x",
    "an index that is counted from the start of the shard", "full",
)  # fmt: skip


def remade(x):
    rule = custom(jnp.tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: (right_tanh(y, dy),))
    return jax.jit(lambda x: rule(x))(x)


wrong(
    "a new function for each call", remade, of_x(6, 5), "retraces", "remade", "a closure made inside of the layer", "full",
    reference=jnp.tanh,
)  # fmt: skip
wrong(
    "keeps three arrays where one is enough", custom(
        jnp.tanh, lambda x: ((y := jnp.tanh(x)), (x, y, 1 - y * y)), lambda s, dy: (dy * s[2],)
    ), of_x(64, 80), "saved bytes", "tanh", "everything that might be of use", "full",
)  # fmt: skip
wrong(
    "keeps a one-hot matrix", custom(
        cross_entropy, lambda x, labels: (
            cross_entropy(x, labels), (jax.nn.softmax(x, -1), one_hot(labels, x.shape[-1]), x),
        ), lambda s, dy: (dy[:, None] * (s[0] - s[1]), None),
    ), of_logits(32, 64), "saved bytes", "cross_entropy", "labels spread out", "full",
)  # fmt: skip

ANCHORS = {
    "Liger PR 1298 (also 968, 488, 872)": "Liger PR 1298: rows multiplied by grad_output[0]",
    "Liger issues 272, 254": "Liger 272, 254: saved tensor overwritten in place",
    "Liger PR 950": "Liger PR 950: sum in bfloat16",
    "Liger issue 512, 414": "Liger 512, 414: bfloat16 SwiGLU",
    "cut-cross-entropy issue 52": "cut-cross-entropy 52: bias wrong on its own",
    "cut-cross-entropy issues 14, 18": "cut-cross-entropy 14, 18: small gradients filtered",
    "Unsloth issue 5230": "Unsloth 5230: zero",
    "marin PR 8217": "marin PR 8217: bfloat16 forward, float32 recomputed",
    "jax issue 40128": "jax issue 40128: digits of the sinks lost",
    "jax issue 32411": "jax issue 32411: accumulated in a ref",
    "optax PR 1762": "optax PR 1762: NaN at -inf logits",
}
"""Silent wrong gradients that shipped, and the entry that is the nearest form that each can have in JAX."""

NOT_POSSIBLE: dict[str, str] = {}
"""Those that a pure function cannot have, with the reason."""

# ------------------------------------------------------------------------------------------------------------ right

RIGHT: list[Right] = []

ANY = ((6, 5), (), (1,), (0, 3), (2, 3, 4), (32, 40))  # for what works element by element
ROWS = ((6, 5), (1, 7), (5, 1), (3, 17), (16, 33))
SQUARES = ((4,), (1,), (2,), (5,), (8,))


SLOW = frozenset("""
    silu|softplus|elu|selu|mish|log_sigmoid|soft_sign|erf|arctan|expm1|leaky_relu at its kinks|relu6 at its kinks
    hard_tanh at its kinks|hard_silu at its kinks|sqrt of positive numbers|cbrt of positive numbers|entr of positive numbers
    log1p of positive numbers|hypot of two|arctan2 of two|multiply of two|softplus of large numbers|sigmoid of large numbers
    log_softmax|log_softmax of large numbers|softmax of large numbers|min with ties|mean with ties|cumprod of rows|var of rows
    floor: constant|nothing but itself|remainder|xlogy|running logsumexp|median|differences|flip, roll, pad|lower triangle
    outer product|determinant|matrix inverse|cholesky|average pool|resize|gumbel|noise with a default dtype|map over rows
    associative scan|standard deviation with epsilon|segment sum|dynamic update|gram matrix|a hinge of hinges|ties of minimum
    somebody's dense under jit|somebody's scan|surrogate spike, declared|bfloat16 gram matrix|bfloat16 layer norm
    optax: ctc|optax: focal|optax: cosine|optax: divergence|optax: smooth labels|optax: log cosh|optax: probabilities
    flax: convolution and group norm|flax: rms norm|flax: gated recurrent unit|flax: long short-term memory|flax: attention
    flax: batch norm|equinox: layer norm|equinox: rms norm|equinox: gated recurrent unit|scan with remat|float16 logsumexp
""".strip().replace("\n    ", "|").split("|"))  # fmt: skip
"""Right functions that take long to compile, or are much like another: their tests are left out unless --slow is given."""


def right(name, fn, args, shapes=ANY, x64=False, **options):
    """Adds an entry; ``args(seed, shape)`` makes the arguments."""
    RIGHT.append(Right(name, lambda seed, shape: (fn, args(seed, shape), options), shapes, x64, name in SLOW))


def one(seed, shape):
    return (normal(seed, *shape),)


def two(seed, shape):
    return normal(seed, *shape), normal(seed, *shape, stream=1)


def positive(seed, shape):
    return (jnp.abs(normal(seed, *shape)) + 0.1,)


def rounded(seed, shape):
    """With many zeros and ties."""
    return (jnp.round(normal(seed, *shape)),)


def large(seed, shape):
    return (normal(seed, *shape, scale=60.0),)


def with_mask(seed, shape):
    return normal(seed, *shape), integers(seed, 4, *shape) > 0


def with_labels(seed, shape):
    return normal(seed, *shape), integers(seed, shape[1], shape[0])


def with_key(seed, shape):
    return normal(seed, *shape), jax.random.key(seed)


def of_dtype(dtype, make=one):
    return lambda seed, shape: tuple(a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in make(seed, shape))


for _fn in (
    jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.elu, jax.nn.selu, jax.nn.mish, jax.nn.log_sigmoid,
    jax.nn.soft_sign, jnp.sinc, jax.scipy.special.erf, jnp.arctan, jnp.expm1,
):  # fmt: skip
    right(f"{_fn.__name__}", _fn, one)
for _fn in (jax.nn.relu, jax.nn.leaky_relu, jax.nn.relu6, jax.nn.hard_tanh, jax.nn.hard_swish, jnp.abs, jnp.sign):
    right(f"{_fn.__name__} at its kinks", _fn, rounded)
for _fn in (jnp.log, jnp.sqrt, jnp.cbrt, jax.scipy.special.gammaln, jax.scipy.special.entr, jnp.log1p):
    right(f"{_fn.__name__} of positive numbers", _fn, positive)
for _fn in (jnp.logaddexp, jnp.hypot, jnp.arctan2, jnp.maximum, jnp.multiply):
    right(f"{_fn.__name__} of two", _fn, two)
for _fn in (jax.nn.softplus, jax.nn.sigmoid, jax.nn.log_sigmoid):
    right(f"{_fn.__name__} of large numbers", _fn, large)
right("gelu with erf", functools.partial(jax.nn.gelu, approximate=False), one)
right("a power", lambda x, y: x**y, lambda seed, shape: (*positive(seed, shape), normal(seed, *shape)))
right("ties of minimum", jnp.minimum, lambda seed, shape: tuple(jnp.round(a) for a in two(seed, shape)))
right("clip", lambda x: jnp.clip(x, -0.5, 0.5), one)
right("where with a safe inside", lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0), rounded)
right("floor: constant", lambda x: jnp.floor(x) + x, one)
right("nothing but itself", lambda x: x, one)
right("remainder", lambda x: jnp.remainder(x, 0.7), one)
right("xlogy", lambda x, y: jax.scipy.special.xlogy(x, y), lambda seed, shape: (normal(seed, *shape), *positive(seed, shape)))

for _fn in (jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp):
    right(f"{_fn.__name__}", lambda x, f=_fn: f(x, axis=-1), one, ROWS)
    right(f"{_fn.__name__} of large numbers", lambda x, f=_fn: f(x, axis=-1), large, ROWS)
for _fn in (jnp.max, jnp.min, jnp.prod, jnp.mean):
    right(f"{_fn.__name__} with ties", lambda x, f=_fn: f(x, axis=-1), rounded, ROWS)
for _fn in (jnp.sort, jnp.cumsum, jnp.cumprod, jnp.var):
    right(f"{_fn.__name__} of rows", lambda x, f=_fn: f(x, axis=-1), one, ROWS)
right("running maximum", lambda x: lax.cummax(x, axis=1), one, ROWS)
right("running logsumexp", lambda x: lax.cumlogsumexp(x, axis=1), one, ROWS)
right("standard deviation with epsilon", lambda x: jnp.sqrt(x.var(-1) + 1e-5), one, ROWS)
right("norm with epsilon", lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), rounded, ROWS)
right("median", lambda x: jnp.median(x, axis=-1), one, ROWS)
right("top k", lambda x: lax.top_k(x, 1), one, ROWS)
right("maximum and where", lambda x: (x.max(-1), x.argmax(-1)), one, ROWS)
right("mean under a mask", lambda x, m: jnp.where(m, x, 0).sum(-1) / jnp.maximum(m.sum(-1), 1), with_mask, ROWS)
right("softmax under a mask", lambda x, m: jax.nn.softmax(jnp.where(m, x, -1e9), -1), with_mask, ROWS)
right("maximum under a mask of -inf", lambda x, m: jnp.where(m, x, -jnp.inf).max(-1), with_mask, ROWS)
right("flip, roll, pad", lambda x: jnp.pad(jnp.roll(jnp.flip(x, 0), 1, 1), ((1, 0), (0, 2))), one, ROWS)
right("differences", lambda x: jnp.diff(x, axis=0), one, ROWS)
right("lower triangle", jnp.tril, one, ROWS)
right("gram matrix", lambda x: x @ x.T, one, ROWS)
right("einsum", lambda x, y: jnp.einsum("ij,ij,kj->ik", x, y, x), two, ROWS)
right("outer product", lambda x, y: x[:, None, :] * y[None, :, :], two, ROWS)
right("take along", lambda x, i: jnp.take_along_axis(x, i[:, None], 1), with_labels, ROWS)
right("embedding with duplicates", lambda t, i: t[i], lambda s, n: (normal(s, *n), integers(s, n[0], 9)), ROWS)
right("index out of range", lambda t, i: t.at[i].get(mode="fill", fill_value=0),
      lambda s, n: (normal(s, *n), integers(s, n[0] + 2, 9)), ROWS)  # fmt: skip
right("scatter that adds", lambda x, i: jnp.zeros((5, x.shape[1])).at[i].add(x),
      lambda s, n: (normal(s, *n), integers(s, 5, n[0])), ROWS)  # fmt: skip
right("segment sum", lambda x, i: jax.ops.segment_sum(x, i, 4), lambda s, n: (normal(s, *n), integers(s, 4, n[0])), ROWS)
right("dynamic slice", lambda x, i: lax.dynamic_slice_in_dim(x, i, 1), lambda s, n: (normal(s, *n), integers(s, n[0])), ROWS)
right("dynamic update", lambda x, r, i: lax.dynamic_update_slice_in_dim(x, r, i, 0),
      lambda s, n: (normal(s, *n), normal(s, 1, n[1], stream=1), integers(s, n[0])), ROWS)  # fmt: skip
right("layer norm", layer_norm, lambda s, n: (normal(s, *n), normal(s, n[1], stream=1), normal(s, n[1], stream=2)), ROWS)
right("rms norm", rms_norm, lambda s, n: (normal(s, *n), normal(s, n[1], stream=1)), ROWS)
right("attention", attention, lambda s, n: tuple(normal(s, *n, stream=i) for i in range(3)), ROWS)
right("a hinge of hinges", lambda x: jnp.maximum(jnp.abs(x).sum(-1) - 1, 0).max(), rounded, ROWS)
right("determinant", jnp.linalg.slogdet, lambda s, n: (normal(s, n[0], n[0]) + 4 * jnp.eye(n[0]),), SQUARES)
right("linear solve", jnp.linalg.solve, lambda s, n: (normal(s, n[0], n[0]) + 4 * jnp.eye(n[0]), normal(s, n[0], 3)), SQUARES)
right("cholesky", lambda x: jnp.linalg.cholesky(x @ x.T + 4 * jnp.eye(x.shape[0])), lambda s, n: one(s, n * 2), SQUARES)
right("matrix inverse", lambda x: jnp.linalg.inv(x + 6 * jnp.eye(x.shape[0])), lambda s, n: one(s, n * 2), SQUARES)

right("scan", recurrence, lambda s, n: (normal(s, *n), normal(s, n[1], stream=1)), ROWS)
right("scan with remat", lambda x, h: lax.scan(jax.checkpoint(lambda h, x: ((n := jnp.tanh(h * x + x)), n)), h, x),
      lambda s, n: (normal(s, *n), normal(s, n[1], stream=1)), ROWS)  # fmt: skip
right("loop of a fixed number", lambda x: lax.fori_loop(0, 4, lambda i, y: jnp.sin(y) + x, x), one)
right("branch", lambda x: lax.cond(x.sum() > 0, jnp.sin, lambda x: x * x, x), one)
right("switch by an integer", lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, lambda x: x * x], x),
      lambda s, n: (normal(s, *n), integers(s, 3)))  # fmt: skip
right("map over rows", lambda x: lax.map(lambda r: r / (1 + (r * r).sum()), x), one, ROWS)
right("associative scan", lambda x: lax.associative_scan(jnp.multiply, x), one, ROWS)
right("vmap and jit inside", jax.jit(jax.vmap(lambda r: jnp.outer(r, jnp.sin(r)))), one, ROWS)
right("its own gradient", jax.grad(lambda x: (jnp.sin(x) * x * x).sum()), one)

IMAGES = ((2, 6, 6, 3), (1, 3, 3, 1), (2, 5, 7, 2), (3, 4, 4, 4), (1, 8, 5, 2))


def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


right("convolution", convolve, lambda s, n: (normal(s, *n), normal(s, 3, 3, n[3], 2, stream=1)), IMAGES)
right("max pool", max_pool, one, IMAGES)
right("max pool with ties", max_pool, rounded, IMAGES)
right("average pool", lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4, one, IMAGES)
right("resize", lambda x: jax.image.resize(x, (x.shape[0], 7, 9, x.shape[3]), "bilinear"), one, IMAGES)

right("dropout", dropout, with_key)
right("gumbel", lambda x, k: jax.nn.softmax(x + jax.random.gumbel(k, x.shape, jnp.float32), -1), with_key, ROWS)
right("reparametrized", lambda x, k: x * jax.random.normal(k, x.shape, jnp.float32), with_key)
right("bernoulli with a default dtype", lambda x, k: jnp.where(jax.random.bernoulli(k, 0.7, x.shape), x, 0), with_key)
right("noise with a default dtype", lambda x, k: x * jax.random.normal(k, x.shape), with_key)

right("straight-through, declared", pointwise(lambda x: jnp.round(x), lambda x, dy: dy), one, exact=False)
right("reversed gradient, declared", custom(lambda x: x, lambda x: (x, None), lambda _, dy: (-dy,)), one, exact=False)
right(
    "surrogate spike, declared", pointwise(lambda x: (x > 0).astype(x.dtype), lambda x, dy: dy / (1 + x * x)), one, exact=False
)

right("somebody's tanh", tanh(right_tanh), one)
right("somebody's dense", dense(right_dense), lambda s, n: (normal(s, *n), normal(s, n[1], 4, stream=1)), ROWS)
right("somebody's dense under jit", jax.jit(dense(right_dense)),
      lambda s, n: (normal(s, *n), normal(s, n[1], 4, stream=1)), ROWS)  # fmt: skip
right("somebody's layer norm", layer_norm_with(right_layer_norm),
      lambda s, n: (normal(s, *n), normal(s, n[1], stream=1), normal(s, n[1], stream=2)), ROWS)  # fmt: skip
right("somebody's attention", custom(attention, lambda *a: (attention(*a), a), lambda s, dy: attention_backward(*s, dy)),
      lambda s, n: tuple(normal(s, *n, stream=i) for i in range(3)), ROWS)  # fmt: skip
right("somebody's cross-entropy", cross_entropy_with(lambda d, dy: d * dy[:, None]), with_labels, ROWS)
right("somebody's embedding", custom(
    lambda t, i: t[i], lambda t, i: (t[i], (t, i)), lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].add(dy), None)
), lambda s, n: (normal(s, *n), integers(s, n[0], 9)), ROWS)  # fmt: skip
right("somebody's float0", custom(
    lambda t, i: t[i], lambda t, i: (t[i], (t, i)),
    lambda s, dy: (jnp.zeros_like(s[0]).at[s[1]].add(dy), np.zeros(s[1].shape, jax.dtypes.float0)),
), lambda s, n: (normal(s, *n), integers(s, n[0], 9)), ROWS)  # fmt: skip
right("somebody's scan", _recurrence_with(), lambda s, n: (normal(s, *n), normal(s, n[1], stream=1)), ROWS)
right("two outputs", custom(
    lambda x: (jnp.tanh(x), x.mean(-1)), lambda x: ((jnp.tanh(x), x.mean(-1)), jnp.tanh(x)),
    lambda y, dy: (right_tanh(y, dy[0]) + dy[1][:, None] / y.shape[-1],),
), one, ROWS)  # fmt: skip
right("symbolic zeros", custom(
    lambda x, w: x @ w, lambda x, w: (x.value @ w.value, (x.value, w.value)), right_dense, symbolic_zeros=True
), lambda s, n: (normal(s, *n), normal(s, n[1], 4, stream=1)), ROWS)  # fmt: skip
_power = custom(
    lambda x, n: x**n, lambda x, n: (x**n, x), lambda n, x, dy: (n * x ** (n - 1) * dy,), nondiff=(1,)
)  # fmt: skip
right("an argument that is not differentiated", lambda x: _power(x, 3), one)
right("a rule inside a rule", custom(
    lambda x: tanh(right_tanh)(x) * x, lambda x: (jnp.tanh(x) * x, x),
    lambda x, dy: (dy * (jnp.tanh(x) + x * (1 - jnp.tanh(x) ** 2)),),
), one)  # fmt: skip
_right_dense, _right_tanh = dense(right_dense), tanh(right_tanh)
right("a rule inside a loss", lambda x, w: (_right_tanh(_right_dense(x, w)) ** 2).mean(),
      lambda s, n: (normal(s, *n), normal(s, n[1], 4, stream=1)), ROWS)  # fmt: skip


@jax.custom_jvp
def _safe_norm(x):
    return jnp.sqrt((x * x).sum(-1))


@_safe_norm.defjvp
def _safe_norm_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = _safe_norm(x)
    return y, (x * dx).sum(-1) / jnp.where(y == 0, 1, y)


@jax.custom_jvp
def _softplus(x):
    return jnp.logaddexp(x, 0.0)


_softplus.defjvps(lambda t, y, x: t * jax.nn.sigmoid(x))
right("somebody's custom_jvp", _softplus, one)
right("a custom_jvp with a safe gradient", _safe_norm, one, ROWS)
right("a custom_jvp at its kinks", jax.custom_jvp(lambda x: jnp.maximum(x, 0)), rounded)
RIGHT[-1].make(0, (1,))[0].defjvps(lambda t, y, x: jnp.where(x > 0, t, 0))
right("a custom_jvp inside a custom_vjp", custom(
    lambda x: _softplus(x) * x, lambda x: (_softplus(x) * x, x), lambda x, dy: (dy * (_softplus(x) + x * jax.nn.sigmoid(x)),)
), one)  # fmt: skip

right("a tree of parameters", lambda p, x: {"loss": (jnp.tanh(x @ p["w"] + p["b"][None, :]) ** 2).sum(), "mean": x.mean()},
      lambda s, n: ({"w": normal(s, n[1], 3), "b": normal(s, 3), "none": None}, normal(s, *n, stream=2)), ROWS)  # fmt: skip
right("integers beside", lambda x, i: (x * i, i + 1), lambda s, n: (normal(s, *n), integers(s, 5, *n)))
right("an output that depends on nothing", lambda x: (x * 2, jnp.ones((3,))), one)

right("bfloat16 tanh", jnp.tanh, of_dtype(jnp.bfloat16))
right("bfloat16 softmax", lambda x: jax.nn.softmax(x, -1), of_dtype(jnp.bfloat16), ROWS)
right("bfloat16 softmax in float32", lambda x: jax.nn.softmax(x.astype(jnp.float32), -1).astype(x.dtype),
      of_dtype(jnp.bfloat16), ROWS)  # fmt: skip
right("bfloat16 gram matrix", lambda x: x @ x.T, of_dtype(jnp.bfloat16), ROWS)
right("bfloat16 layer norm", layer_norm, of_dtype(jnp.bfloat16, lambda s, n: (
    normal(s, *n), normal(s, n[1], stream=1), normal(s, n[1], stream=2))), ROWS)  # fmt: skip
right("bfloat16 cross-entropy", cross_entropy, of_dtype(jnp.bfloat16, with_labels), ROWS)
right("float16 silu", jax.nn.silu, of_dtype(jnp.float16))
right("float16 logsumexp", lambda x: jax.nn.logsumexp(x, -1), of_dtype(jnp.float16), ROWS)
right("mixed dtypes", lambda x, w: x @ w, lambda s, n: (normal(s, *n, dtype=jnp.bfloat16), normal(s, n[1], 3)), ROWS)
right("mixed dtypes, cast inside", lambda x, w: (x.astype(jnp.float32) @ w).astype(jnp.float16),
      lambda s, n: (normal(s, *n, dtype=jnp.bfloat16), normal(s, n[1], 3)), ROWS)  # fmt: skip
right("a dot that accumulates in float32", lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32),
      lambda s, n: (normal(s, *n, dtype=jnp.bfloat16), normal(s, n[1], 3, dtype=jnp.bfloat16)), ROWS)  # fmt: skip
right("float64 tanh", tanh(right_tanh), of_dtype(jnp.float64), x64=True)
right("float64 softmax", lambda x: jax.nn.softmax(x, -1), of_dtype(jnp.float64), ROWS, x64=True)


# ------------------------------------------------------------------------------------------- right: other libraries


def _other_libraries():
    """Losses of optax, layers of flax and equinox as whole losses. The last two are left out where they are missing."""
    import optax

    right("optax: labels", optax.softmax_cross_entropy_with_integer_labels, with_labels, ROWS)
    right("optax: probabilities", lambda x, y: optax.softmax_cross_entropy(x, jax.nn.softmax(y, -1)), two, ROWS)
    right("optax: sigmoid", lambda x, m: optax.sigmoid_binary_cross_entropy(x, m.astype(x.dtype)), with_mask)
    right("optax: huber", optax.huber_loss, two)
    right("optax: huber at its kinks", lambda x: optax.huber_loss(x, delta=1.0), rounded)
    right("optax: log cosh", optax.log_cosh, two)
    right("optax: hinge", lambda x, m: optax.hinge_loss(x, 2.0 * m - 1), with_mask)
    right("optax: focal", lambda x, m: optax.sigmoid_focal_loss(x, m.astype(x.dtype)), with_mask)
    right("optax: cosine", lambda x, y: optax.cosine_similarity(x, y, epsilon=1e-3), two, ROWS)
    right("optax: divergence", lambda x, y: optax.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y)), two, ROWS)
    right("optax: smooth labels", lambda x, i: optax.softmax_cross_entropy(x, optax.smooth_labels(one_hot(i, x.shape[1]), 0.1)),
          with_labels, ROWS)  # fmt: skip
    right("optax: ctc", lambda x: optax.ctc_loss(
        x, jnp.zeros(x.shape[:2]), jnp.ones((x.shape[0], 2), jnp.int32).at[:, 1].set(2), jnp.zeros((x.shape[0], 2))
    ), one, ((2, 6, 4), (1, 5, 3), (3, 7, 5)))  # fmt: skip

    try:
        from flax import linen
    except ImportError:
        return
    for name, model, shapes in (
        ("dense and layer norm", linen.Sequential([linen.Dense(8), linen.LayerNorm(), linen.gelu, linen.Dense(3)]), ROWS),
        ("convolution and group norm", linen.Sequential([linen.Conv(4, (3, 3)), linen.GroupNorm(2), linen.relu]), IMAGES[:3]),
        ("rms norm", linen.RMSNorm(), ROWS),
        ("gated recurrent unit", linen.RNN(linen.GRUCell(4)), ((2, 5, 3), (1, 3, 2), (2, 1, 3))),
        ("long short-term memory", linen.RNN(linen.OptimizedLSTMCell(4)), ((2, 5, 3), (1, 3, 2), (2, 1, 3))),
        ("attention", linen.MultiHeadDotProductAttention(2, qkv_features=6), ((2, 5, 6), (1, 1, 4), (2, 3, 8))),
    ):

        def loss(p, x, model=model):
            return (model.apply(p, x) ** 2).mean()

        right(f"flax: {name}", loss, lambda seed, shape, model=model: (
            model.init(jax.random.key(seed), normal(seed, *shape)), normal(seed, *shape)), shapes)  # fmt: skip
    embed = linen.Embed(7, 4)
    right("flax: embedding", lambda p, i: (embed.apply(p, i) ** 3).sum(), lambda seed, shape: (
        embed.init(jax.random.key(seed), jnp.arange(2)), integers(seed, 7, *shape)), ((5,), (3, 2), (1,)))  # fmt: skip
    drop = linen.Dropout(0.3, deterministic=False)
    right("flax: dropout", lambda x, k: drop.apply({}, x, rngs={"dropout": k}), with_key, ROWS)
    batch = linen.BatchNorm(use_running_average=False)
    right("flax: batch norm", lambda p, x: batch.apply(p, x, mutable=["batch_stats"]), lambda seed, shape: (
        batch.init(jax.random.key(seed), normal(seed, *shape)), normal(seed, *shape)), ROWS[:1] + ROWS[3:])  # fmt: skip

    try:
        import equinox as eqx
    except ImportError:
        return

    def mean_of_squares(model, x):
        return (jax.vmap(model)(x) ** 2).mean()

    def recurrent(model, x):
        return lax.scan(lambda h, r: ((n := model(r, h)), n), jnp.zeros(4), x)[1]

    def layer(make):
        def args(seed, shape):
            return make(shape, jax.random.key(seed)), normal(seed, *shape)

        return args

    right("equinox: perceptron", mean_of_squares, layer(lambda n, k: eqx.nn.MLP(n[1], 2, 6, 2, key=k)), ROWS)
    right("equinox: layer norm", mean_of_squares, layer(lambda n, k: eqx.nn.LayerNorm(n[1])), ROWS)
    right("equinox: rms norm", mean_of_squares, layer(lambda n, k: eqx.nn.RMSNorm(n[1])), ROWS)
    right("equinox: gated recurrent unit", recurrent, layer(lambda n, k: eqx.nn.GRUCell(n[1], 4, key=k)), ROWS)


_other_libraries()
