"""MultiHeadAttention: projections to heads, attention, and the projection back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from fbackprop import ops
from fbackprop.layers.base import Initializer, OpLayer, Params, State
from fbackprop.layers.composed import Composed
from fbackprop.layers.general import DenseGeneral
from fbackprop.layers.linear import require_positive
from fbackprop.layers.normalization import LayerNorm

__all__ = ["MultiHeadAttention"]

_lecun_normal = initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, repr=False)
class MultiHeadAttention(Composed):
    """Each position gets a mean of the values of others, in several heads with weights of their own.

    x [b, t, d] -> y [b, t, out_features or d]. Parameters: query, key and value, each a kernel [d, heads, depth] and a bias
    [heads, depth], and out, with a kernel [heads, depth, out] and a bias [out]: names and layouts of
    ``flax.linen.MultiHeadDotProductAttention``. Logits are never formed as a whole. The softmax is in float32 or wider, always:
    what ``force_fp32_for_softmax`` asks of Flax.

    Args:
      num_heads: of queries. num_kv_heads: of keys and values, each of which serves num_heads / num_kv_heads; as many if None.
      qkv_features: num_heads · depth; d by default. out_features: of y; d by default.
      is_causal: whether a position sees none behind it. local_window_size, soft_cap: as for ``ops.dot_product_attention``.
      rope_base: turns queries and keys by their position, with this base (10,000 as a rule), where it is given.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as for ``Dense``.
      out_kernel_init, out_bias_init: of the projection out; kernel_init and bias_init if None.
      dropout_rate: of the weights, in training; ``apply`` then needs a key. broadcast_dropout: whether the whole batch and all
        heads share one mask.
      normalize_qk: whether queries and keys of each head go through a layer norm (parameters query_ln and key_ln, each a scale
        [depth]; Dehghani et al. 2023, arXiv:2302.05442), before they are turned.
    Raises:
      ValueError: where features do not divide into heads, a shape does not fit, or a key is needed and missing.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    soft_cap: float | None = None
    rope_base: float | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    normalize_qk: bool = False

    def __post_init__(self) -> None:
        require_positive(self.name, num_heads=self.num_heads, num_kv_heads=self._kv_heads)
        if self.num_heads % self._kv_heads:
            raise ValueError(f"{self.name}: {self.num_heads} heads cannot share {self._kv_heads} heads of keys evenly.")
        if not 0 <= self.dropout_rate <= 1:
            raise ValueError(f"{self.name}: dropout_rate is {self.dropout_rate}, expected a probability between 0 and 1.")

    @property
    def _kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def _layers(self, width: int) -> dict[str, OpLayer]:
        """The four projections and the norms, for x with so many features."""
        features = self.qkv_features or width
        if features % self.num_heads:
            raise ValueError(f"{self.name}: {features} features do not divide into {self.num_heads} heads.")
        names = ("use_bias", "dtype", "param_dtype", "precision", "kernel_init", "bias_init")
        options = {name: getattr(self, name) for name in names}
        depth = features // self.num_heads
        heads = {"query": self.num_heads, "key": self._kv_heads, "value": self._kv_heads}
        inward = {name: DenseGeneral((n, depth), **options) for name, n in heads.items()}
        own = {"kernel_init": self.out_kernel_init, "bias_init": self.out_bias_init}
        options |= {name: initializer for name, initializer in own.items() if initializer is not None}
        out = DenseGeneral(self.out_features or width, axis=(-2, -1), **options)
        norm = LayerNorm(use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        return {**inward, "out": out, **({"query_ln": norm, "key_ln": norm} if self.normalize_qk else {})}

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        *lead, width = self._shape(x)
        layers = self._layers(width)
        outer = jax.ShapeDtypeStruct((*lead, width), jnp.float32)
        inner = jax.ShapeDtypeStruct((*lead, self.num_heads, (self.qkv_features or width) // self.num_heads), jnp.float32)
        keys = [*jax.random.split(key, 4), key, key]  # the norms draw nothing
        return {
            name: layer.init(k, outer if name in ("query", "key", "value") else inner)[0]
            for k, (name, layer) in zip(keys, layers.items())
        }, ()

    def apply(
        self,
        params: Params,
        x: ArrayLike,
        state: State = (),
        key: Any = None,
        train: bool = False,
        *,
        context: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> tuple[jax.Array, State]:
        """As of every layer; and, for attention to another sequence, ``context`` [b, s, d], of which keys and values are made,
        and ``mask``, booleans that broadcast with [b, heads, t, s], True where a position may be seen."""
        x = jnp.asarray(x)
        layers = self._layers(self._shape(x)[-1])
        if not isinstance(params, dict) or set(params) != set(layers):
            raise ValueError(f"{self.name}: params has {sorted(params)}, expected {sorted(layers)}, as init gave.")
        seen = x if context is None else jnp.asarray(context)
        q, k, v = (layers[n](params[n], x if n == "query" else seen) for n in ("query", "key", "value"))
        if self.normalize_qk:
            q, k = (layers[n](params[n], a) for n, a in (("query_ln", q), ("key_ln", k)))
        if self.rope_base is not None:
            q, k = (ops.rotary_embedding(a, base=self.rope_base) for a in (q, k))
        options = {name: getattr(self, name) for name in ("is_causal", "local_window_size", "soft_cap")}
        if train and self.dropout_rate > 0:
            if key is None:
                raise ValueError(f"{self.name}: train=True needs a random key and key is None; pass key=jax.random.key(…).")
            options |= {"dropout_rate": self.dropout_rate, "dropout_key": key, "broadcast_dropout": self.broadcast_dropout}
        attended = ops.dot_product_attention(q, k, v, mask=mask, **options)
        return layers["out"](params["out"], attended), state

    def _shape(self, x: Any) -> tuple[int, ...]:
        shape = jnp.shape(x)
        if len(shape) != 3:
            raise ValueError(f"{self.name}: x has {len(shape)} dimensions, expected [batch, length, features] (x {shape}).")
        return shape
