"""The models in Equinox: an example at a time under ``jax.vmap``, images channels first, ``filter_checkpoint`` for blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from fbackprop.measuring.twins import Model, Side, layers_of

__all__ = ["equinox_side"]


class Cnn(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    dense: list[eqx.nn.Linear]
    pool: eqx.nn.MaxPool2d

    def __init__(self, key: Any, classes: int):
        self.convs = [eqx.nn.Conv2d(a, b, 3, padding=1, key=key) for a, b in ((1, 32), (32, 64))]
        self.dense = [eqx.nn.Linear(a, b, key=key) for a, b in ((7 * 7 * 64, 128), (128, classes))]
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = self.pool(jax.nn.relu(conv(x)))
        x = jnp.transpose(x, (1, 2, 0)).reshape(-1)  # the order of the weights
        return self.dense[1](jax.nn.relu(self.dense[0](x)))


class GptBlock(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: Any, width: int, heads: int):
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(heads, width, **biases, key=key)
        self.up, self.down = eqx.nn.Linear(width, 4 * width, key=key), eqx.nn.Linear(4 * width, width, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        y = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))


class Gpt(eqx.Module):
    embed: eqx.nn.Embedding
    position: eqx.nn.Embedding
    blocks: list[GptBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: Any, vocabulary: int, layers: int, width: int, heads: int, length: int):
        self.embed, self.position = (eqx.nn.Embedding(n, width, key=key) for n in (vocabulary, length))
        self.blocks = [GptBlock(key, width, heads) for _ in range(layers)]
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, tokens: jax.Array, checkpoint: Any) -> jax.Array:
        x = jax.vmap(self.embed)(tokens) + jax.vmap(self.position)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = checkpoint(block)(x)
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


class Lstm(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, key: Any, vocabulary: int, width: int):
        self.embed = eqx.nn.Embedding(vocabulary, width, key=key)
        self.cell = eqx.nn.LSTMCell(width, width, key=key)
        self.head = eqx.nn.Linear(width, vocabulary, key=key)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            carry = self.cell(x, carry)
            return carry, carry[0]

        zeros = jnp.zeros(self.cell.hidden_size)
        hidden = jax.lax.scan(step, (zeros, zeros), jax.vmap(self.embed)(tokens))[1]
        return jax.vmap(self.head)(hidden)


class Residual(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]

    def __init__(self, key: Any, given: int, features: int, stride: int):
        sizes = [(given, features, 3, stride), (features, features, 3, 1)]
        if stride > 1 or given != features:
            sizes.append((given, features, 1, stride))
        self.convs = [eqx.nn.Conv2d(a, b, k, s, k // 2, use_bias=False, key=key) for a, b, k, s in sizes]
        self.norms = [_norm(features) for _ in sizes]

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        y, state = self.norms[0](self.convs[0](x), state)
        y, state = self.norms[1](self.convs[1](jax.nn.relu(y)), state)
        if len(self.convs) > 2:
            x, state = self.norms[2](self.convs[2](x), state)
        return jax.nn.relu(x + y), state


class Resnet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    blocks: list[Residual]
    head: eqx.nn.Linear

    def __init__(self, key: Any, depths: Sequence[int], features: Sequence[int], classes: int):
        self.conv = eqx.nn.Conv2d(3, features[0], 3, 1, 1, use_bias=False, key=key)
        self.norm = _norm(features[0])
        self.blocks, given = [], features[0]
        for stage, (depth, wanted) in enumerate(zip(depths, features)):
            for i in range(depth):
                self.blocks.append(Residual(key, given, wanted, 2 if stage > 0 and i == 0 else 1))
                given = wanted
        self.head = eqx.nn.Linear(features[-1], classes, key=key)

    def __call__(self, x: jax.Array, state: Any, checkpoint: Any) -> tuple[jax.Array, Any]:
        x, state = self.norm(self.conv(x), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = checkpoint(block)(x, state)
        return self.head(x.mean((1, 2))), state


def _norm(features: int) -> Any:
    return eqx.nn.BatchNorm(features, "batch", momentum=0.9, mode="batch")


def equinox_side(model: Model, params: Any, policy: Any = False) -> Side:
    """The model with these weights. ``policy``: of ``jax.checkpoint``, or None for all of it; False for no checkpoint."""

    def checkpoint(fn: Any) -> Any:
        return fn if policy is False else eqx.filter_checkpoint(fn, policy=policy)

    kinds: dict[str, Any] = {"cnn": Cnn, "gpt": Gpt, "lstm": Lstm, "resnet": Resnet}
    module, state = eqx.nn.make_with_state(kinds[model.name])(jax.random.key(0), **model.size)
    module = _with_weights(model, module, params)
    arrays, rest = eqx.partition(module, eqx.is_inexact_array)
    own = (checkpoint,) if model.name in ("gpt", "resnet") else ()
    outside = (lambda fn: fn) if own else checkpoint

    def of(arrays: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        network = eqx.combine(arrays, rest)
        if model.name == "resnet":
            run = jax.vmap(lambda x, state: network(x, state, *own), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            logits, state = run(jnp.moveaxis(x, -1, 1), state)
        else:
            logits = jax.vmap(lambda x: network(x, *own))(x if model.tokens else jnp.moveaxis(x, -1, 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    return Side(lambda params, state, batch: outside(of)(params, state, *batch), arrays, state)


def _with_weights(model: Model, module: Any, params: Any) -> Any:
    """The module with the weights in Equinox's layouts."""
    given: list[jax.Array] = []
    places: list[Callable[[Any], Any]] = []

    def put(where: Callable[[Any], Any], value: Any) -> None:
        places.append(where)
        given.append(value)

    def linear(where: Callable[[Any], Any], layer: Any) -> None:
        put(lambda m: where(m).weight, layer["kernel"].T)
        if "bias" in layer:
            put(lambda m: where(m).bias, layer["bias"])

    def conv(where: Callable[[Any], Any], layer: Any) -> None:
        put(lambda m: where(m).weight, jnp.transpose(layer["kernel"], (3, 2, 0, 1)))
        if "bias" in layer:
            put(lambda m: where(m).bias, layer["bias"][:, None, None])

    def norm(where: Callable[[Any], Any], layer: Any) -> None:
        put(lambda m: where(m).weight, layer["scale"])
        put(lambda m: where(m).bias, layer["bias"])

    if model.name == "cnn":
        layers = layers_of(params)
        for i in range(2):
            conv(lambda m, i=i: m.convs[i], layers[i])
            linear(lambda m, i=i: m.dense[i], layers[2 + i])
    elif model.name == "gpt":
        put(lambda m: m.embed.weight, params["embed"]["embedding"])
        put(lambda m: m.position.weight, params["position"]["embedding"])
        norm(lambda m: m.norm, params["norm"])
        for i, p in enumerate(params["blocks"]):
            norm(lambda m, i=i: m.blocks[i].norms[0], p["attention_norm"])
            norm(lambda m, i=i: m.blocks[i].norms[1], p["mlp_norm"])
            kernels, biases = jnp.split(p["qkv"]["kernel"], 3, 1), jnp.split(p["qkv"]["bias"], 3)
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases):
                linear(lambda m, i=i, n=name: getattr(m.blocks[i].attention, f"{n}_proj"), {"kernel": kernel, "bias": bias})
            linear(lambda m, i=i: m.blocks[i].attention.output_proj, p["out"])
            linear(lambda m, i=i: m.blocks[i].up, p["up"])
            linear(lambda m, i=i: m.blocks[i].down, p["down"])
    elif model.name == "lstm":
        (layer,) = params["layers"]
        put(lambda m: m.embed.weight, params["embed"]["embedding"])
        put(lambda m: m.cell.weight_ih, layer["kernel"].T)
        put(lambda m: m.cell.weight_hh, layer["recurrent_kernel"].T)
        put(lambda m: m.cell.bias, layer["bias"])
        linear(lambda m: m.head, params["head"])
    else:
        layers = iter(layers_of(params))
        conv(lambda m: m.conv, next(layers))
        norm(lambda m: m.norm, next(layers))
        for i, block in enumerate(module.blocks):
            for j in range(len(block.convs)):
                conv(lambda m, i=i, j=j: m.blocks[i].convs[j], next(layers))
                norm(lambda m, i=i, j=j: m.blocks[i].norms[j], next(layers))
        linear(lambda m: m.head, next(layers))
    return eqx.tree_at(lambda m: [place(m) for place in places], module, given)
