"""The language model of a long short-term memory: tokens, a table, lstm layers, the logits of the next token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.layers.base import Params, State, split_key
from fbackprop.layers.composed import Composed
from fbackprop.layers.linear import require_positive

__all__ = ["LstmLM", "lstm_lm"]


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class LstmLM(Composed):
    """A recurrent model of tokens. Made by ``lstm_lm``, which see. tokens [b, t] -> logits [b, t, vocabulary]."""

    vocabulary: int
    width: int
    layers: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        require_positive("lstm_lm", vocabulary=self.vocabulary, width=self.width, layers=self.layers)

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        self._require_tokens(x)
        table, head, *keys = split_key(f"{self.name}.init", key, 2 + self.layers)
        width, dtype = self.width, self.param_dtype
        bias = jnp.zeros((4, width), dtype).at[1].set(1).reshape(-1)  # the forget gate begins open

        def layer(key: Any) -> Params:
            one, two = jax.random.split(key)
            kernel = initializers.lecun_normal()(one, (width, 4 * width), dtype)
            square = initializers.orthogonal(column_axis=-1)
            recurrent = jnp.concatenate([square(k, (width, width), dtype) for k in jax.random.split(two, 4)], 1)
            return {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}

        return {
            "embed": {"embedding": initializers.normal(1.0)(table, (self.vocabulary, width), dtype)},
            "layers": tuple(layer(k) for k in keys),
            "head": {
                "kernel": initializers.lecun_normal()(head, (width, self.vocabulary), dtype),
                "bias": jnp.zeros(self.vocabulary, dtype),
            },
        }, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        x = jnp.asarray(x)
        return self._logits(params, self._run(params, x, self.start(x.shape[0]))[0]), ()

    def loss(self, params: Params, tokens: ArrayLike, targets: ArrayLike, **options: Any) -> jax.Array:
        """The mean cross-entropy of the next tokens, in nats; no array [tokens, vocabulary] is formed.

        tokens [b, t], targets [b, t] integer -> a scalar in float32 or wider. Targets of −100 are left out. The carry before
        the first token is zero.

        Args:
          options: of ``ops.linear_cross_entropy``: weights, label_smoothing, z_loss, ….
        """
        tokens = jnp.asarray(tokens)
        h, _ = self._run(params, tokens, self.start(tokens.shape[0]))
        head = self._cast(params["head"])
        return ops.linear_cross_entropy(h, head["kernel"], targets, head["bias"], **options)

    def start(self, batch: int, length: int | None = None) -> Any:
        """The carry before the first token, for ``extend``: (c, h) for each layer. ``length`` makes no difference."""
        zeros = jnp.zeros((batch, self.width), self.dtype or self.param_dtype)
        return ((zeros, zeros),) * self.layers

    def extend(self, params: Params, tokens: ArrayLike, carry: Any) -> tuple[jax.Array, Any]:
        """Takes tokens [b, t] in and gives the logits after the last, [b, vocabulary], and the new carry."""
        h, carry = self._run(params, jnp.asarray(tokens), carry)
        return self._logits(params, h[:, -1]), carry

    def _run(self, params: Params, tokens: jax.Array, carries: Any) -> tuple[jax.Array, Any]:
        self._require_tokens(tokens)
        if len(params["layers"]) != self.layers:
            raise ValueError(f"lstm_lm: params has {len(params['layers'])} layers, expected {self.layers}.")
        x = self._cast(ops.embed(params["embed"]["embedding"], tokens)).swapaxes(0, 1)  # time goes first
        after = []
        for p, carry in zip(params["layers"], carries):
            p = self._cast(p)
            c, h = carry
            x, carry = ops.lstm(x, p["kernel"], p["recurrent_kernel"], p["bias"], (c.astype(x.dtype), h.astype(x.dtype)))
            after.append(carry)
        return x.swapaxes(0, 1), tuple(after)

    def _logits(self, params: Params, h: jax.Array) -> jax.Array:
        head = self._cast(params["head"])
        return ops.dense(h, head["kernel"], head["bias"], preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))

    def _cast(self, tree: Any) -> Any:
        return tree if self.dtype is None else jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), tree)

    def _require_tokens(self, tokens: Any) -> None:
        shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"lstm_lm: tokens are of {dtype}, expected integers (tokens {shape}).")
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"lstm_lm: tokens has shape {shape}, expected [batch, tokens].")


def lstm_lm(vocabulary: int, width: int, layers: int = 1, *, dtype: Any = None, param_dtype: Any = jnp.float32) -> LstmLM:
    """A recurrent language model: tokens [b, t] -> logits [b, t, vocabulary]; ``model.loss`` without the logits.

    Args:
      vocabulary: how many tokens there are. width: features of the table and of each layer. layers: how many, one on the other.
      dtype: what is computed in (None: what the parameters are); param_dtype: what parameters are made in.
    Returns:
      A model; its parameters are ``{"embed", "layers": (…), "head"}``, with the leaves of ``ops.lstm`` in each layer.
    Raises:
      ValueError: where a number is not a positive integer.
    Source: Graves 2013, arXiv:1308.0850.
    """
    return LstmLM(vocabulary=vocabulary, width=width, layers=layers, dtype=dtype, param_dtype=param_dtype)
