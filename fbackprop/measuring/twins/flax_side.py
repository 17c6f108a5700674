"""The models in Flax (linen): its modules, optax's losses, ``nn.remat`` around each block where there is a policy."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fbackprop.measuring.twins import Model, Side, layers_of

__all__ = ["flax_side"]

Remat = Callable[[Any], Any]
"""What stands around a block: a class of module, with or without ``nn.remat``."""


class Cnn(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


class GptBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        attend = nn.MultiHeadDotProductAttention(self.heads, deterministic=True, name="attention")
        x = x + attend(nn.LayerNorm(epsilon=1e-5)(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm(epsilon=1e-5)(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class Gpt(nn.Module):
    vocabulary: int
    layers: int
    width: int
    heads: int
    length: int
    remat: Remat

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = embed(tokens) + nn.Embed(self.length, self.width, name="position")(jnp.arange(tokens.shape[1]))[None]
        block = self.remat(GptBlock)
        for i in range(self.layers):
            x = block(self.heads, name=f"block_{i}")(x)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


class Lstm(nn.Module):
    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width, name="cell"))(x)
        return nn.Dense(self.vocabulary, name="head")(x)


class Residual(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm() -> Any:
            return nn.BatchNorm(use_running_average=False, momentum=0.9)

        def conv(size: int, stride: int = 1) -> Any:
            return nn.Conv(self.features, (size, size), stride, size // 2, use_bias=False)

        y = nn.relu(norm()(conv(3, self.stride)(x)))
        y = norm()(conv(3)(y))
        if x.shape != y.shape:
            x = norm()(conv(1, self.stride)(x))
        return nn.relu(x + y)


class Resnet(nn.Module):
    depths: Sequence[int]
    features: Sequence[int]
    classes: int
    remat: Remat

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features[0], (3, 3), 1, 1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        block = self.remat(Residual)
        for stage, (depth, features) in enumerate(zip(self.depths, self.features)):
            for i in range(depth):
                x = block(features, 2 if stage > 0 and i == 0 else 1, name=f"block_{stage}_{i}")(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def flax_side(model: Model, params: Any, state: Any, policy: Any = False) -> Side:
    """The model with these weights. ``policy``: of ``jax.checkpoint``, or None for all of it; False for no checkpoint."""
    checkpointed = policy is not False
    by_block = model.name in ("gpt", "resnet")

    def remat(block: Any) -> Any:
        return nn.remat(block, policy=policy) if checkpointed else block

    variables = _WEIGHTS[model.name](params, state, model.size)
    module = _MODULES[model.name](**model.size, **({"remat": remat} if by_block else {}))
    mutable = ["batch_stats"] if "batch_stats" in variables else []

    def loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        def of(params: Any, x: jax.Array) -> Any:
            logits, state_ = module.apply({"params": params, **state}, x, mutable=mutable)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), state_

        of = of if by_block or not checkpointed else jax.checkpoint(of, policy=policy)
        return of(params, batch[0])

    return Side(loss, variables["params"], {k: v for k, v in variables.items() if k != "params"})


_MODULES: dict[str, Any] = {"cnn": Cnn, "gpt": Gpt, "lstm": Lstm, "resnet": Resnet}


def _cnn_weights(params: Any, state: Any, size: dict[str, Any]) -> Any:
    return {"params": dict(zip(("Conv_0", "Conv_1", "Dense_0", "Dense_1"), layers_of(params)))}


def _gpt_weights(params: Any, state: Any, size: dict[str, Any]) -> Any:
    width, heads = size["width"], size["heads"]
    each = width // heads

    def block(p: Any) -> Any:
        kernels, biases = jnp.split(p["qkv"]["kernel"], 3, 1), jnp.split(p["qkv"]["bias"], 3)
        attention = {
            name: {"kernel": kernel.reshape(width, heads, each), "bias": bias.reshape(heads, each)}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases)
        }
        out = {"kernel": p["out"]["kernel"].reshape(heads, each, width), "bias": p["out"]["bias"]}
        return {
            "attention": {**attention, "out": out},
            "LayerNorm_0": p["attention_norm"], "LayerNorm_1": p["mlp_norm"], "Dense_0": p["up"], "Dense_1": p["down"],
        }  # fmt: skip

    blocks = {f"block_{i}": block(p) for i, p in enumerate(params["blocks"])}
    return {"params": {"embed": params["embed"], "position": params["position"], "norm": params["norm"], **blocks}}


def _lstm_weights(params: Any, state: Any, size: dict[str, Any]) -> Any:
    (layer,) = params["layers"]
    gates = [jnp.split(layer[name], 4, -1) for name in ("kernel", "recurrent_kernel", "bias")]
    cell: dict[str, Any] = {}
    for gate, kernel, recurrent, bias in zip("ifgo", *gates):
        cell |= {f"i{gate}": {"kernel": kernel}, f"h{gate}": {"kernel": recurrent, "bias": bias}}
    return {"params": {"embed": params["embed"], "cell": cell, "head": params["head"]}}


def _resnet_weights(params: Any, state: Any, size: dict[str, Any]) -> Any:
    leaves, statistics = iter(layers_of(params)), iter(layers_of(state))
    weights: dict[str, Any] = {"Conv_0": next(leaves), "BatchNorm_0": next(leaves)}
    running: dict[str, Any] = {"BatchNorm_0": next(statistics)}
    given = size["features"][0]
    for stage, (depth, features) in enumerate(zip(size["depths"], size["features"])):
        for i in range(depth):
            name, pairs = f"block_{stage}_{i}", 2 + ((stage > 0 and i == 0) or given != features)
            names = [f"{kind}_{j}" for j in range(pairs) for kind in ("Conv", "BatchNorm")]
            weights[name] = {own: next(leaves) for own in names}
            running[name] = {own: next(statistics) for own in names[1::2]}
            given = features
    weights["Dense_0"] = next(leaves)
    return {"params": weights, "batch_stats": running}


_WEIGHTS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "cnn": _cnn_weights, "gpt": _gpt_weights, "lstm": _lstm_weights, "resnet": _resnet_weights,
}  # fmt: skip
