"""GPT-2 and Llama in Flax (linen), as a Flax user writes them for a GPU.

Attention is ``jax.nn.dot_product_attention``; all is computed in a narrow dtype, with parameters in float32; the loss is
optax's, on float32 logits; ``nn.remat`` stands around each block where there is a policy.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fbackprop.measuring.twins import Side
from fbackprop.models.gpt import GPT
from fbackprop.models.transformer import unstack_blocks

__all__ = ["flax_language", "flax_language_loss", "flax_language_weights"]

Attention = Literal["xla", "cudnn"] | None


class _Part(nn.Module):
    """What blocks and the whole have in common. ``size`` holds the numbers of the model, not its program."""

    size: GPT

    def norm(self, name: str) -> Any:
        options: dict[str, Any] = {"epsilon": self.size.epsilon, "dtype": self.size.dtype, "name": name}
        return nn.RMSNorm(**options) if self.size.norm == "rms" else nn.LayerNorm(**options)

    def dense(self, features: Any, name: str) -> Any:
        return nn.DenseGeneral(features, use_bias=self.size.use_bias, dtype=self.size.dtype, name=name)


class Block(_Part):
    attention: Attention = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, each = self.size, self.size.width // self.size.heads
        h = self.norm("attention_norm")(x)
        heads = {"query": size.heads, "key": size.kv_heads or size.heads, "value": size.kv_heads or size.heads}
        q, k, v = (self.dense((n, each), name)(h) for name, n in heads.items())
        if size.positions == "rope":
            q, k = _turned(q, size), _turned(k, size)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        x = x + self.dense(size.width, "out")(attended.reshape(x.shape))
        h = self.norm("mlp_norm")(x)
        hidden = size.hidden or 4 * size.width
        if size.mlp == "swiglu":
            return x + self.dense(size.width, "down")(nn.silu(self.dense(hidden, "gate")(h)) * self.dense(hidden, "up")(h))
        return x + self.dense(size.width, "down")(nn.gelu(self.dense(hidden, "up")(h)))


class Language(_Part):
    attention: Attention = None
    policy: Any = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size = self.size
        embed = nn.Embed(size.vocabulary, size.width, dtype=size.dtype, name="embed")
        x = embed(tokens)
        if size.positions == "learned":
            rows = nn.Embed(size.length, size.width, dtype=size.dtype, name="position")
            x = x + rows(jnp.arange(tokens.shape[1]))[None]
        block = Block if self.policy is False else nn.remat(Block, policy=self.policy)
        for i in range(size.layers):
            x = block(size, self.attention, name=f"block_{i}")(x)
        x = self.norm("norm")(x)
        return embed.attend(x) if size.tied else nn.Dense(size.vocabulary, use_bias=False, dtype=size.dtype, name="head")(x)


def _turned(x: jax.Array, size: GPT) -> jax.Array:
    """Rotary positions, with the slowed turns of Llama 3.1 where it has them."""
    rates = size.rope_base ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    if size.rope_scaling is not None:
        factor, low, high, original = size.rope_scaling
        smooth = jnp.clip((original * rates / (2 * math.pi) - low) / (high - low), 0, 1)
        rates = smooth * rates + (1 - smooth) * rates / factor
    angles = jnp.arange(x.shape[1])[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def flax_language(model: GPT, params: Any, attention: Attention = None, policy: Any = False) -> Side:
    """The model with our weights. ``policy``: of ``jax.checkpoint``, or None for all of it; False for no checkpoint."""
    return Side(flax_language_loss(model, attention, policy), flax_language_weights(model, params), ())


def flax_language_loss(model: GPT, attention: Attention = None, policy: Any = False) -> Callable[[Any, Any, Any], Any]:
    """``loss(params, state, batch) -> (loss, state)``, with an empty state."""
    module = Language(model, attention, policy)

    def loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits: Any = module.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean(), state

    return loss


def flax_language_weights(model: GPT, params: Any) -> Any:
    """Our parameters as Flax's."""
    rest = dict(unstack_blocks(params) if model.scan else params)
    blocks = rest.pop("blocks")
    return rest | {f"block_{i}": _block(model, block) for i, block in enumerate(blocks)}


def _block(model: GPT, block: Any) -> Any:
    each, keys = model.width // model.heads, model.kv_heads or model.heads
    own, counts = dict(block), {"query": model.heads, "key": keys, "value": keys}
    qkv = {leaf: jnp.split(array, [model.width, (model.heads + keys) * each], -1) for leaf, array in own.pop("qkv").items()}
    for i, (name, n) in enumerate(counts.items()):
        own[name] = {leaf: parts[i].reshape(*parts[i].shape[:-1], n, each) for leaf, parts in qkv.items()}
    return own
