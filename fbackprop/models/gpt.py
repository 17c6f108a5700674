"""GPT: tokens to the logits of the next token, in the form of GPT-2 and in the modern one of Llama.

    x = embedding[tokens] + position        GPT-2; the modern form turns queries and keys instead (RoPE)
    x = block(x), `layers` times            transformer.py
    logits = norm(x) · head                 the head is the embedding's table, or a matrix of its own

The loss never forms the logits: ``linear_cross_entropy`` takes the last norm's output and the head.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.layers.base import Params, State, split_key
from fbackprop.layers.linear import require_positive
from fbackprop.models.transformer import Transformer

__all__ = ["GPT", "gpt"]


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class GPT(Transformer):
    """A decoder of tokens. Made by ``gpt``, which see; all options are fields.

    tokens [b, t] integer -> logits [b, t, vocabulary], in float32 or wider.

    Args:
      vocabulary: how many tokens there are. length: the most tokens of a sequence.
      positions: "learned", a row for each of ``length`` positions, or "rope".
      rope_base: RoPE turns pair i of H/2 at position p by p · base^(−2i/H).
      rope_scaling: Llama 3.1's (factor, low, high, original length): turns slower than ``original / low`` positions are slowed
        by the factor, those faster than ``original / high`` stay, between them it goes over smoothly. None: no scaling.
      tied: whether the head is the table of the embedding.
      Others as for ``Transformer``.
    """

    vocabulary: int
    length: int
    positions: Literal["learned", "rope"] = "learned"
    rope_base: float = 10000.0
    rope_scaling: tuple[float, float, float, int] | None = None
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, vocabulary=self.vocabulary, length=self.length)
        if self.positions not in ("learned", "rope"):
            raise ValueError(f"GPT: positions is {self.positions!r}, expected 'learned' or 'rope'.")
        if self.positions == "rope" and self._head_width % 2:
            raise ValueError(f"GPT: rope turns pairs of features, but a head has {self._head_width} of them.")

    @property
    def example(self) -> Any:
        return jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        self._require_tokens("init", x)
        table, other, blocks, head = split_key(f"{self.name}.init", key, 4)
        normal, dtype = initializers.normal(self.init_std), self.param_dtype
        params: Params = {"embed": {"embedding": normal(table, (self.vocabulary, self.width), dtype)}}
        if self.positions == "learned":
            params["position"] = {"embedding": normal(other, (self.length, self.width), dtype)}
        params |= {"blocks": self.init_blocks(blocks), "norm": self.init_norm()}
        if not self.tied:
            params["head"] = {"kernel": normal(head, (self.width, self.vocabulary), dtype)}
        return params, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        return self._logits(params, self._features(params, jnp.asarray(x))), ()

    def loss(
        self,
        params: Params,
        tokens: ArrayLike,
        targets: ArrayLike,
        *,
        weights: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> jax.Array:
        """The mean cross-entropy of the next tokens, in nats; no array [tokens, vocabulary] is formed.

        tokens [b, t], targets [b, t] integer -> a scalar in float32 or wider. Targets of −100 are left out.

        Args:
          weights, label_smoothing, z_loss: as for ``ops.linear_cross_entropy``.
        Raises:
          TypeError, ValueError: where tokens or targets are not integers of one shape, or too long, or params do not fit.
        """
        x = self._features(params, jnp.asarray(tokens))
        return ops.linear_cross_entropy(
            x, self._head(params), targets, weights=weights, label_smoothing=label_smoothing, z_loss=z_loss,
            transposed=self.tied,
        )  # fmt: skip

    # Token by token.

    def start(self, batch: int, length: int | None = None, dtype: Any = None) -> Any:
        """The empty cache of keys and values, for ``extend``: at most ``length`` tokens of ``batch`` sequences."""
        shape = (self.layers, batch, length or self.length, self._key_heads, self._head_width)
        dtype = dtype or self.dtype or self.param_dtype
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype), "tokens": jnp.zeros((), jnp.int32)}

    def extend(self, params: Params, tokens: ArrayLike, cache: Any) -> tuple[jax.Array, Any]:
        """Takes tokens [b, t] in and gives the logits after the last, [b, vocabulary], and the new cache.

        What the model was given before, the cache holds; what it holds beyond its own length is the caller's to prevent.
        """
        seen, room = cache["tokens"], cache["key"].shape[2]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            q, k = self._turned(q, k, seen)
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), seen, 1) for old, new in zip(cache, (k, v))
            )
            may_see = jnp.arange(room)[None, :] <= (seen + jnp.arange(q.shape[1]))[:, None]
            out = ops.dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=may_see[None, None])
            return out, (keys, values)

        tokens = jnp.asarray(tokens)
        x, (keys, values) = self._hidden_states(params, tokens, attend, seen, (cache["key"], cache["value"]))
        logits = self._logits(params, self.final_norm(params["norm"], x[:, -1:]))[:, 0]
        return logits, {"key": keys, "value": values, "tokens": seen + tokens.shape[1]}

    # The parts.

    def _features(self, params: Params, tokens: jax.Array) -> jax.Array:
        """The output of the last norm, [b, t, width]."""

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            q, k = self._turned(q, k, 0)
            return ops.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention), None

        return self.final_norm(params["norm"], self._hidden_states(params, tokens, attend, 0)[0])

    def _hidden_states(self, params: Params, tokens: jax.Array, attend: Any, first: Any, cache: Any = None) -> Any:
        self._require_tokens("tokens", tokens)
        self.require_params(params)
        # The row is rounded, not the table: its gradient adds up in the dtype of the parameters.
        x = self.cast(ops.embed(params["embed"]["embedding"], tokens))
        if self.positions == "learned":
            rows = jax.lax.dynamic_slice_in_dim(params["position"]["embedding"], first, tokens.shape[1])
            x = x + self.cast(rows)[None]
        return self.run_blocks(params["blocks"], x, attend, cache)

    def _turned(self, q: jax.Array, k: jax.Array, first: Any) -> tuple[jax.Array, jax.Array]:
        if self.positions != "rope":
            return q, k
        positions = first + jnp.arange(q.shape[1])
        frequencies = _rates(self._head_width, self.rope_base, self.rope_scaling)

        def turned(a: jax.Array) -> jax.Array:
            return ops.rotary_embedding(a, positions, frequencies=frequencies)

        return turned(q), turned(k)

    def _head(self, params: Params) -> jax.Array:
        return self.cast(params["embed"]["embedding"] if self.tied else params["head"]["kernel"])

    def _logits(self, params: Params, x: jax.Array) -> jax.Array:
        head = self._head(params)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return ops.dense(x, head.T if self.tied else head, preferred_element_type=wide)

    def _require_tokens(self, what: str, tokens: Any) -> None:
        shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"GPT: tokens are of {dtype}, expected integers (tokens {shape}).")
        if len(shape) != 2 or not 1 <= shape[1] <= self.length:
            raise ValueError(f"GPT: tokens has shape {shape}, expected [batch, 1 to {self.length} tokens].")


def _rates(features: int, base: float, scaling: tuple[float, float, float, int] | None) -> tuple[float, ...]:
    """By how much each pair of features turns from one position to the next, features / 2 numbers."""
    rates = base ** (-np.arange(0, features, 2) / features)
    if scaling is not None:
        factor, low, high, original = scaling
        turns = original * rates / (2 * math.pi)  # within the original length
        share = np.clip((turns - low) / (high - low), 0, 1)
        rates = rates * (share + (1 - share) / factor)
    return tuple(map(float, rates))


def gpt(vocabulary: int, layers: int, width: int, heads: int, length: int, *, modern: bool = False, **options: Any) -> GPT:
    """A GPT: tokens [b, t] -> logits [b, t, vocabulary]; ``model.loss(params, tokens, targets)`` without the logits.

    Args:
      vocabulary, layers, width, heads, length: its size.
      modern: False is GPT-2: learned positions, layer norm, gelu in the form with tanh, biases, a tied head. True is Llama:
        RoPE, RMS norm, swiglu, no biases, a head of its own.
      options: fields of ``GPT`` that are to be otherwise, such as kv_heads=4, tied=True, scan=False or dtype="bfloat16".
    Returns:
      A model; its parameters are ``{"embed", "position", "blocks", "norm", "head"}``, where the form has them.
    Raises:
      ValueError: where an option does not fit. TypeError: where there is none of that name.
    Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama).
    """
    llama = {"positions": "rope", "norm": "rms", "mlp": "swiglu", "use_bias": False, "tied": False}
    form: dict[str, Any] = {**(llama if modern else {}), **options}
    known = [field.name for field in dataclasses.fields(GPT)]
    if unknown := [name for name in form if name not in known]:
        raise TypeError(f"gpt: there is no option {unknown[0]!r}; known are {', '.join(known)}.")
    return GPT(vocabulary=vocabulary, layers=layers, width=width, heads=heads, length=length, **form)
