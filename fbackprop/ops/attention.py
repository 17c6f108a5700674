"""Dot-product attention: each query gets the mean of the values, weighted by a softmax over the keys that it may see.

    s = scale · q kᵀ                [queries, keys], for each head
    z = cap · tanh(s / cap) + bias  (without a cap z = s + bias), −∞ where the query may not see the key
    lse = log Σ exp(z)              over the keys
    p = exp(z − lse)                the weights: a row sums to one
    o = p v

With dp = do vᵀ, the cotangent of the weights, and D = Σ p dp for each query:

    dv = pᵀ do
    dz = p (dp − D)                 and dz += p dlse, where lse is an output too
    dbias = dz                      summed over the axes along which bias was broadcast
    ds = dz (1 − tanh²(s / cap))
    dq = scale · ds k               dk = scale · dsᵀ q

Derivation: of a softmax row, ∂p_j/∂z_i = p_j (δ_ij − p_i), so dz = p dp − p Σ p dp; and ∂lse/∂z = p.

Dropout puts a constant between weights and values, M = 1 / (1 − rate) where a weight is kept and 0 where it is not:

    o = (p ∘ M) v                   with rows that sum to one on average alone
    dv = (p ∘ M)ᵀ do                dp = M ∘ (do vᵀ)

and from dp on all is as above: p itself, and so lse, is what it was. M is drawn again from a seed of two words, a
block at a time: see _attention_dropout.py.

Kept are q, k, v and two numbers for each query and head, the largest logit m and l = Σ exp(z − m); nothing of the size
queries × keys. The weights are computed again, a block of queries at a time, as exp(z − m) / l from exactly the logits of the
forward: the same operands in the same precision. (With lse = m + log l alone, a rounded number as large as the logits, weights
would not sum to one where logits are large; nor would they from logits that were rounded in another way than the forward's.)
Each block takes just the slice of keys that causality or the window lets it see, all of it at once. So D is the sum over a row
that is at hand, in float32 or wider: the usual D = Σ do o reads an o that was rounded to the dtype of the output, and needs it
to be kept. A query that may see no key has l = 0 and, by p = 0, an output of zero and no gradient.

Query heads that share a head of keys are one more axis of the matrix products: keys and values are never repeated.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _attention as form
from fbackprop.ops import _attention_blocks as blocks
from fbackprop.ops import _attention_cudnn as cudnn
from fbackprop.ops import _attention_dropout as dropout
from fbackprop.ops._arithmetic import nbytes, sum_to, wide, wide_type
from fbackprop.ops._attention import INPUTS, KEYS, LOGITS, QUERIES, ROWS, Inputs, Options, Window
from fbackprop.ops._attention_blocks import Block, cut
from fbackprop.rules import rule
from fbackprop.samples import key as random_key
from fbackprop.samples import labels, mask, normal, sample

__all__ = ["dot_product_attention"]


class _Saved(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None
    segment_ids: Any
    seed: jax.Array | None  # of dropout
    highest: jax.Array  # m, [b, k, t, g]
    total: jax.Array  # l, [b, k, t, g]; 0 for a query that sees no key


def _logits(inputs: Inputs, options: Options, block: Block) -> tuple[jax.Array, jax.Array | None]:
    """z of a block, [b, k, t, g, s], and the slope ∂z/∂s of the cap. In the backward as in the forward."""
    # The scale goes to q and not to the product, from which a maximum will be subtracted: compilers contract a product and a
    # difference to one operation, whose product is not the one that the maximum was taken of. Of large logits nothing is left.
    q, k = options.scale * wide(cut(inputs.query, QUERIES, block)), wide(cut(inputs.key, KEYS, block))
    z, slope = jnp.einsum("btkgh,bskh->bktgs", q, k), None
    if options.soft_cap is not None:
        capped = jnp.tanh(z / options.soft_cap)
        z, slope = options.soft_cap * capped, 1 - jnp.square(capped)
    if inputs.bias is not None:
        z = z + wide(cut(inputs.bias, LOGITS, block))
    seen = blocks.allowed(inputs, options, block)
    return z if seen is None else jnp.where(seen, z, -jnp.inf), slope


def _blocks_forward(plan: blocks.Plan, options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output [b, t, k, g, h], and m and l [b, k, t, g]."""

    def heads(*arrays: Any) -> Any:
        own = Inputs(*arrays)
        b, t, k, g, _ = own.query.shape

        def step(state: Any, block: Block) -> Any:
            out, highest, total = state
            z, _ = _logits(own, options, block)
            top = jnp.max(z, -1, keepdims=True)
            top = jnp.where(top == -jnp.inf, 0, top)
            w = jnp.exp(z - top)
            sums = jnp.sum(w, -1, keepdims=True)
            w = dropout.dropped(w, own, options, block)
            part = jnp.einsum("bktgs,bskh->bktgh", w, wide(cut(own.value, KEYS, block))) / jnp.where(sums == 0, 1, sums)
            out = blocks.put(out, QUERIES, block, part.swapaxes(1, 2))
            return out, blocks.put(highest, ROWS, block, top[..., 0]), blocks.put(total, ROWS, block, sums[..., 0])

        row = (b, k, t, g), wide_type(own.query)
        start = blocks.zeros(own.query.shape, own.query.dtype, own), blocks.zeros(*row, own), blocks.zeros(*row, own)
        return blocks.over_blocks(plan, step, start)

    b, t, k, g, _ = inputs.query.shape
    row = jax.ShapeDtypeStruct((b, k, t, g), wide_type(inputs.query))
    return blocks.over_heads(plan, heads, inputs, INPUTS, (inputs.query, row, row), (QUERIES, ROWS, ROWS))


def _blocks_backward(
    plan: blocks.Plan,
    options: Options,
    inputs: Inputs,
    highest: jax.Array,
    total: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> Any:
    """dq, dk, dv and dbias, in the forms of the inputs."""

    def heads(*arrays: Any) -> Any:
        own, (highest, total, dout, dlse) = Inputs(*arrays[:-4]), arrays[-4:]

        def step(state: Any, block: Block) -> Any:
            dq, dk, dv, dbias = state
            z, slope = _logits(own, options, block)
            w = jnp.exp(z - cut(highest, ROWS, block)[..., None])
            sums = cut(total, ROWS, block)[..., None]
            inverse = 1 / jnp.where(sums == 0, 1, sums)  # w = 0 for a query that sees no key
            # With do / l for do, as many numbers as a query has features, w need not be divided by l.
            do = wide(cut(dout, QUERIES, block)) * inverse.swapaxes(1, 2)
            met = dropout.dropped(w, own, options, block)
            dv = blocks.add(dv, KEYS, block, jnp.einsum("bktgs,btkgh->bskh", met, do))
            dp = jnp.einsum("btkgh,bskh->bktgs", do, wide(cut(own.value, KEYS, block)))
            dp = dropout.dropped(dp, own, options, block)
            mean = jnp.sum(w * dp, -1, keepdims=True)  # D
            if dlse is not None:
                mean = mean - wide(cut(dlse, ROWS, block))[..., None]
            dz = jnp.where(w == 0, 0, w * (dp - mean * inverse))  # 0 · ∞ counts as 0: what is not seen
            if dbias is not None:
                shape = [1 if m == 1 else n for n, m in zip(dz.shape, dbias.shape)]
                dbias = blocks.add(dbias, LOGITS, block, sum_to(dz, shape))
            ds = dz if slope is None else dz * slope
            q, k = wide(cut(own.query, QUERIES, block)), wide(cut(own.key, KEYS, block))
            dq = blocks.put(dq, QUERIES, block, options.scale * jnp.einsum("bktgs,bskh->btkgh", ds, k))
            dk = blocks.add(dk, KEYS, block, jnp.einsum("bktgs,btkgh->bskh", ds, q))
            return dq, dk, dv, dbias

        def start(like: jax.Array, dtype: Any) -> jax.Array:
            return blocks.zeros(like.shape, dtype, arrays)

        sums = wide_type(own.key)  # over blocks of queries
        dbias = None if own.bias is None else start(own.bias, wide_type(own.bias))
        state = start(own.query, own.query.dtype), start(own.key, sums), start(own.value, sums), dbias
        dq, dk, dv, dbias = blocks.over_blocks(plan, step, state)
        return dq, options.scale * dk, dv, dbias

    bias = None if inputs.bias is None else jax.ShapeDtypeStruct(inputs.bias.shape, wide_type(inputs.bias))
    arrays, axes = (*inputs, highest, total, dout, dlse), (*INPUTS, ROWS, ROWS, QUERIES, ROWS)
    results = (inputs.query, inputs.key, inputs.value, bias), (QUERIES, KEYS, KEYS, LOGITS)
    return blocks.over_heads(plan, heads, arrays, axes, *results)


def _explicit_mesh(arguments: Any) -> Any:
    meshes = [jax.typeof(jnp.asarray(a)).sharding.mesh for a in jax.tree.leaves(arguments)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _on_cudnn(arguments: Sequence[Any], options: Options, implementation: str | None, return_residual: bool) -> bool:
    if implementation is not None:
        return implementation == "cudnn"
    here = jax.default_backend() == "gpu" and cudnn.present(jax.local_devices()[0]) and _explicit_mesh(arguments) is None
    return here and not cudnn.refusal(*arguments, options=options, return_residual=return_residual)


def _forward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    segment_ids: Any = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: bool = True,
) -> tuple[Any, Any]:
    arguments = query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths, segment_ids
    options = form.options_of(query, key, scale, is_causal, local_window_size, soft_cap, dropout_rate)
    if _on_cudnn(arguments, options, implementation, return_residual):
        return cudnn.forward(query, key, value, options, query_seq_lengths, key_value_seq_lengths)

    arguments += (dropout.seed_of(dropout_key) if dropout_rate else None,)

    def flat(*arguments: Any) -> Any:
        inputs = dropout.with_rows(form.inputs_of(*arguments[:-1]), arguments[-1], broadcast_dropout)
        out, highest, total = blocks.run(_blocks_forward, options, inputs)
        return out.reshape(jnp.shape(query)), highest, total

    # On a mesh of explicit axes the compiler chooses inside, and the output lies as the query does.
    batch, length, *_ = (*(None,) * (4 - jnp.ndim(query)), *jax.typeof(jnp.asarray(query)).sharding.spec)
    row = jax.P(batch, None, length, None)
    mesh = _explicit_mesh(arguments)
    if mesh is None:
        out, highest, total = flat(*arguments)
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            specs = jax.typeof(jnp.asarray(query)).sharding.spec, row, row
            run: Any = jax.sharding.auto_axes(flat, axes=mesh.explicit_axes, out_sharding=specs)
            out, highest, total = run(*arguments)
    saved = _Saved(*jax.tree.map(jnp.asarray, arguments), highest=highest, total=total)  # pyright: ignore
    if not return_residual:
        return out, saved
    lse = (highest + jnp.log(total)).swapaxes(1, 2).reshape(out.shape[:-1]).astype(out.dtype)  # the log of 0 is −∞
    # Choices between equals that the compiler drops. They let lse depend on value and seed: under vmap over one of them alone
    # JAX counts the cotangent of an output that does not depend on it once for each member.
    for other in (saved.value, saved.seed):
        if other is not None:
            some = other.ravel()[0]
            lse = jnp.where(some == some, lse, lse)
    return (out, lse), saved


def _backward(
    saved: Any,
    dy: Any,
    *,
    scale: float | None,
    is_causal: bool,
    local_window_size: Window,
    return_residual: bool,
    soft_cap: float | None,
    dropout_rate: float,
    broadcast_dropout: bool,
) -> tuple[Any, ...]:
    if isinstance(saved, cudnn.CudnnSaved):
        return *cudnn.backward(saved, dy), *(None,) * 6
    options = form.options_of(saved.query, saved.key, scale, is_causal, local_window_size, soft_cap, dropout_rate)
    inputs = dropout.with_rows(form.inputs_of(*saved[:8]), saved.seed, broadcast_dropout)
    b, t, k, g, _ = inputs.query.shape
    dout, dlse = dy if return_residual else (dy, None)
    if dlse is not None:
        dlse = dlse.reshape(b, t, k, g).swapaxes(1, 2)
    arrays = inputs, saved.highest, saved.total, dout.reshape(inputs.query.shape), dlse
    dq, dk, dv, dbias = blocks.run(_blocks_backward, options, *arrays)
    if dbias is not None:
        dbias = dbias.swapaxes(2, 3).reshape(saved.bias.shape)
    return dq.reshape(saved.query.shape), dk.reshape(saved.key.shape), dv.reshape(saved.value.shape), dbias, *(None,) * 5


def _minimum(query: Any, key: Any, value: Any, bias: Any, mask: Any, dropout_rate: float) -> int:
    """The arguments, the output and lse. Where D is a sum over the weights the output is not needed, and less is kept."""
    rows = math.prod(query.shape[:-1]) * wide_type(query).itemsize
    return nbytes(query, query, key, value, bias, mask) + rows + (8 if dropout_rate else 0)


_WORKLOADS = [  # batch, length, heads, heads of keys
    ("causal", 8, 256, 8, 8),
    ("causal", 2, 1024, 8, 8),
    ("causal, grouped heads", 2, 1024, 8, 2),
]


@rule(
    forward=_forward,
    backward=_backward,
    static=[
        "scale", "is_causal", "local_window_size", "implementation", "return_residual", "soft_cap", "dropout_rate",
        "broadcast_dropout",
    ],
    samples=[
        sample(normal(2, 7, 2, 3), normal(2, 7, 2, 3), normal(2, 7, 2, 3), is_causal=True, return_residual=True),
        sample(normal(2, 6, 4, 3), normal(2, 8, 2, 3), normal(2, 8, 2, 3), normal(4, 1, 8), mask(2, 1, 6, 8), soft_cap=2.0),
        sample(
            normal(2, 7, 2, 3), normal(2, 9, 1, 3), normal(2, 9, 1, 3), local_window_size=(3, 1),
            query_seq_lengths=labels(2, classes=8), key_value_seq_lengths=labels(2, classes=10, low=3), scale=0.3,
        ),
        sample(
            normal(8, 2, 3), normal(8, 2, 3), normal(8, 2, 3), normal(1, 8), is_causal=True,
            segment_ids=labels(8, classes=2),
        ),
        sample(
            normal(2, 7, 4, 3), normal(2, 6, 2, 3), normal(2, 6, 2, 3), normal(2, 4, 7, 1), soft_cap=2.0, return_residual=True,
            local_window_size=(4, 2), dropout_rate=0.3, dropout_key=random_key(1), broadcast_dropout=False,
        ),
        sample(
            normal(6, 2, 3), normal(6, 2, 3), normal(6, 2, 3), is_causal=True, dropout_rate=0.5, dropout_key=random_key(2),
        ),
    ],
    workloads=[
        sample(normal(b, t, n, 64), normal(b, t, k, 64), normal(b, t, k, 64), is_causal=True, note=note, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for note, b, t, n, k in _WORKLOADS
    ],
    keeps="query, key, value, two numbers a query and head; bias, mask and the seed of dropout if given",
    minimum=_minimum,
    recomputes="logits and weights, a block of queries at a time",
)  # fmt: skip
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    segment_ids: Any = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: bool = True,
) -> Any:
    """Gives each query the mean of the values, weighted by a softmax over the keys that it may see.

    query [B, T, N, H], key, value [B, S, K, H] -> [B, T, N, H], of the dtype of the query. Each of the K heads of keys and
    values serves N / K neighbouring query heads. All three may come without their batch axis.

    A query that may see no key at all gets zero, and passes no gradient on. (jax.nn gives it the mean of the values.)

    Args:
      bias: added to the logits, of a shape that broadcasts with [B, N, T, S]; it has a gradient.
      mask: booleans, True where a query may see a key, of a shape that broadcasts with [B, N, T, S].
      scale: of the logits; 1/√H if None.
      is_causal: whether query i sees keys 0 to i only.
      query_seq_lengths, key_value_seq_lengths: [B] integers: how many queries, and keys, of each sequence count. Beyond them
        the output is zero, and keys are not seen. Lengths above T or S are as T or S.
      local_window_size: query i sees the keys from i − left to i + right: (left, right), or one number for both.
      implementation: "xla" for this rule, "cudnn" for cuDNN's attention (16 bits, no bias, mask, segment_ids, soft_cap, dropout
        or return_residual; once differentiable), None for cuDNN's where there is one and it can, and for this rule elsewhere.
        None looks at the device that JAX would run on now: a program that is lowered for others (``jax.export``) names one.
      return_residual: whether to return (output, lse): lse = log Σ exp(logits) for each query, [B, T, N], of the dtype of the
        query, −∞ where no key is seen. It has a gradient. (That of jax.nn has none.)
      segment_ids: [B, T] integers: a query sees the keys that have its number. Where T ≠ S a pair, [B, T] and [B, S].
      soft_cap: bounds the scaled products: s becomes cap · tanh(s / cap), before bias and mask.
      dropout_rate: in [0, 1], static: each weight is zero with this probability (exact to 2⁻³²) and divided by 1 − rate where
        it is not, after the softmax. lse is that without dropout.
      dropout_key: a random key, needed where the rate is not 0. The mask depends on it and on the position alone.
      broadcast_dropout: whether all of the batch and all heads share one mask [T, S], as by default in Flax; False draws each
        weight's own, as PyTorch does.
    Raises:
      TypeError: where a dtype does not fit. ValueError: where a shape or an option does not, or cuDNN was asked for what it
        cannot do. RuntimeError: where it was asked for and is not there.
    Source: Vaswani et al. 2017, arXiv:1706.03762; in blocks: Dao et al. 2022, arXiv:2205.14135.
    """
    form.check_arguments(
        query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
        implementation, segment_ids, soft_cap,
    )  # fmt: skip
    dropout.check_dropout(dropout_rate, dropout_key, broadcast_dropout)
    lengths = query_seq_lengths, key_value_seq_lengths
    options = form.options_of(query, key, scale, is_causal, local_window_size, soft_cap, dropout_rate)
    arguments = query, key, value, bias, mask, *lengths, segment_ids
    if implementation == "cudnn" and (why := cudnn.refusal(*arguments, options=options, return_residual=return_residual)):
        raise ValueError(f"dot_product_attention: cuDNN's attention {why}. Leave implementation out.")
    if implementation == "cudnn":  # asked for, it is the function to differentiate
        return cudnn.attention(query, key, value, options, *lengths)
    x = dropout.with_rows(form.inputs_of(*arguments), dropout.seed_of(dropout_key) if dropout_rate else None, broadcast_dropout)
    z = jnp.einsum("btkgh,bskh->bktgs", options.scale * wide(x.query), wide(x.key))
    if soft_cap is not None:
        z = soft_cap * jnp.tanh(z / soft_cap)
    if x.bias is not None:
        z = z + wide(x.bias)
    i = jnp.arange(z.shape[2])[None, None, :, None, None]
    j = jnp.arange(z.shape[4])[None, None, None, None, :]
    seen = jnp.ones_like(z, bool) if x.mask is None else jnp.broadcast_to(x.mask, z.shape)
    if options.left is not None:
        seen &= j >= i - options.left
    if options.right is not None:
        seen &= j <= i + options.right
    if x.query_lengths is not None:
        seen &= i < jnp.expand_dims(x.query_lengths, (1, 2, 3, 4))
    if x.key_lengths is not None:
        seen &= j < jnp.expand_dims(x.key_lengths, (1, 2, 3, 4))
    if x.query_ids is not None and x.key_ids is not None:
        seen &= x.query_ids[:, None, :, None, None] == x.key_ids[:, None, None, None, :]
    z = jnp.where(seen, z, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights = jnp.exp(z - highest)
    total = jnp.sum(weights, -1, keepdims=True)
    some = jnp.where(total == 0, 1, total)  # a query that sees no key gets zero, and no NaN as gradient
    met = dropout.dropped(weights / some, x, options, {})
    out = jnp.einsum("bktgs,bskh->btkgh", met, wide(x.value))
    out = out.reshape(jnp.shape(query)).astype(jnp.result_type(query))
    if not return_residual:
        return out
    lse = jnp.where(total == 0, -jnp.inf, highest + jnp.log(some))[..., 0]
    return out, lse.swapaxes(1, 2).reshape(out.shape[:-1]).astype(out.dtype)
