"""Fourteen models of other people's libraries, as they are and accelerated: sites, agreement, time, memory.

    python benchmarks/accelerate.py [--models flax-cnn …] [--tiny] [--rounds 12] [--json FILE]

Each model is written as its library's users write it. A row tells how many of the sites that one of our ops could stand in for
were replaced, whether outputs and gradients agree with float64 as well as before, the ratio of the times of value and gradient
(before over after, in turns, with its 95 % interval), the compiler's temporaries and the bytes kept for the backward.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from rich.console import Console
from rich.table import Table

import fbackprop as fb

KEY = jax.random.key(0)
Model = tuple[Callable[..., Any], tuple[Any, ...]]


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def images(batch: int, size: int, channels: int) -> Any:
    return jax.random.normal(KEY, (batch, size, size, channels))


def classes(batch: int) -> Any:
    return jnp.arange(batch) % 10


def tokens(batch: int, length: int, vocabulary: int) -> Any:
    return jax.random.randint(KEY, (batch, length), 0, vocabulary)


def next_token_loss(logits: Any, text: Any) -> Any:
    return cross_entropy(logits[:, :-1], text[:, 1:])


# ---------------------------------------------------------------------------------------------------------------- Flax


class Cnn(nn.Module):
    """The small CNN of the anchors."""

    features: tuple[int, int] = (32, 64)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for features in self.features:
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def flax_cnn(tiny: bool) -> Model:
    model, x = Cnn((4, 8)) if tiny else Cnn(), images(*(4, 12, 1) if tiny else (128, 28, 1))
    return lambda v, x, y: cross_entropy(model.apply(v, x), y), (jax.jit(model.init)(KEY, x), x, classes(len(x)))


class Gpt(nn.Module):
    """The small GPT of the anchors."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    vocabulary: int = 256

    @nn.compact
    def __call__(self, text: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.width)(text)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, text.shape[1], self.width))
        mask = nn.make_causal_mask(text)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def flax_gpt_words(tiny: bool) -> Model:
    """The vocabulary of GPT-2; the tiny one is as large as it must be for its projection to be replaced."""
    model, text = Gpt(1, 8, 2, 4096) if tiny else Gpt(2, vocabulary=50257), tokens(*(4, 257, 4096) if tiny else (4, 257, 50257))
    return lambda v, text: next_token_loss(model.apply(v, text), text), (jax.jit(model.init)(KEY, text), text)


def flax_gpt(tiny: bool) -> Model:
    model, text = Gpt(1, 32, 2, 32) if tiny else Gpt(), tokens(*(2, 16, 32) if tiny else (8, 256, 256))
    return lambda v, text: next_token_loss(model.apply(v, text), text), (jax.jit(model.init)(KEY, text), text)


class ResNet(nn.Module):
    stages: tuple[int, ...] = (16, 32, 64)
    blocks: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def norm(x: Any) -> Any:
            return nn.BatchNorm(use_running_average=False, momentum=0.9)(x)

        x = nn.relu(norm(nn.Conv(self.stages[0], (3, 3), use_bias=False)(x)))
        for stage, features in enumerate(self.stages):
            for block in range(self.blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm(nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)))
                y = norm(nn.Conv(features, (3, 3), use_bias=False)(y))
                x = x if x.shape == y.shape else norm(nn.Conv(features, (1, 1), strides=strides, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def flax_resnet(tiny: bool) -> Model:
    model, x = ResNet((4, 8), 1) if tiny else ResNet(), images(*(4, 8, 3) if tiny else (64, 32, 3))

    def loss(variables: Any, x: Any, y: Any) -> Any:
        logits, state = model.apply(variables, x, mutable=["batch_stats"])
        return cross_entropy(logits, y), state

    return loss, (jax.jit(model.init)(KEY, x), x, classes(len(x)))


class UNet(nn.Module):
    """Group norm, swish, average pooling, transposed and depthwise convolutions."""

    width: int = 32

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def block(x: Any, width: int) -> Any:
            x = nn.Conv(width, (3, 3))(nn.swish(nn.GroupNorm(4)(x)))
            return nn.Conv(width, (3, 3), feature_group_count=width)(nn.swish(nn.GroupNorm(4)(x)))

        first = block(nn.Conv(self.width, (3, 3))(x), self.width)
        inner = block(nn.avg_pool(first, (2, 2), (2, 2)), 2 * self.width)
        outer = nn.ConvTranspose(self.width, (4, 4), strides=(2, 2))(inner)
        return nn.Conv(x.shape[-1], (3, 3))(block(jnp.concatenate([first, outer], -1), self.width))


def flax_unet(tiny: bool) -> Model:
    model, x = UNet(8) if tiny else UNet(), images(*(2, 8, 3) if tiny else (16, 32, 3))
    return lambda v, x: jnp.square(model.apply(v, x) - x).mean(), (jax.jit(model.init)(KEY, x), x)


class Recurrent(nn.Module):
    vocabulary: int = 128
    width: int = 256

    @nn.compact
    def __call__(self, text: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.width)(text)
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def flax_lstm(tiny: bool) -> Model:
    model, text = Recurrent(16, 8) if tiny else Recurrent(), tokens(*(2, 6, 16) if tiny else (16, 128, 128))
    return lambda v, text: next_token_loss(model.apply(v, text), text), (jax.jit(model.init)(KEY, text), text)


class Vit(nnx.Module):
    """nnx, not linen."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, width, (4, 4), strides=(4, 4), rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    norm=nnx.LayerNorm(width, rngs=rngs),
                    attention=nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs),
                    second=nnx.RMSNorm(width, rngs=rngs),
                    up=nnx.Linear(width, 4 * width, rngs=rngs),
                    down=nnx.Linear(4 * width, width, rngs=rngs),
                )
                for _ in range(layers)
            ]
        )
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for b in self.blocks:
            x = x + b.attention(b.norm(x))
            x = x + b.down(nnx.gelu(b.up(b.second(x)), approximate=False))
        return self.head(x.mean(1))


def nnx_vit(tiny: bool) -> Model:
    x = images(*(2, 16, 3) if tiny else (32, 32, 3))
    graph, state = nnx.split(Vit(*(16, 1) if tiny else (128, 4), rngs=nnx.Rngs(0)))
    return lambda s, x, y: cross_entropy(nnx.merge(graph, s)(x), y), (state, x, classes(len(x)))


# ------------------------------------------------------------------------------------------------------------- Equinox


def equinox_cnn(tiny: bool) -> Model:
    a, b, size = (4, 8, 12) if tiny else (32, 64, 28)
    k = jax.random.split(KEY, 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, a, 3, padding=1, key=k[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(a, b, 3, padding=1, key=k[1]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(b * (size // 4) ** 2, 128, key=k[2]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(128, 10, key=k[3]),
        ]
    )  # fmt: skip
    x = images(4 if tiny else 128, size, 1).transpose(0, 3, 1, 2)
    return lambda m, x, y: cross_entropy(jax.vmap(m)(x), y), (model, x, classes(len(x)))


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, heads: int, key: Any):
        a, b, c = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=a)
        self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.up, self.down = eqx.nn.Linear(width, 4 * width, key=b), eqx.nn.Linear(4 * width, width, key=c)

    def __call__(self, x: Any) -> Any:
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask)
        h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
        return x + jax.vmap(self.down)(h)


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int):
        k = jax.random.split(KEY, layers + 2)
        self.embedding = eqx.nn.Embedding(vocabulary, width, key=k[0])
        self.blocks = [Block(width, heads, key) for key in k[2:]]
        self.head = eqx.nn.Linear(width, vocabulary, key=k[1])

    def __call__(self, text: Any) -> Any:
        x = jax.vmap(self.embedding)(text)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def equinox_transformer(tiny: bool) -> Model:
    model, text = Transformer(*(1, 16, 2, 32) if tiny else (4, 128, 4, 256)), tokens(*(2, 16, 32) if tiny else (8, 256, 256))
    return lambda m, text: next_token_loss(jax.vmap(m)(text), text), (model, text)


class Gru(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x: Any) -> Any:
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(self.cell.hidden_size), x)
        return self.head(last)


def equinox_gru(tiny: bool) -> Model:
    batch, length, width = (2, 6, 8) if tiny else (32, 128, 192)
    model = Gru(eqx.nn.GRUCell(width, width, key=KEY), eqx.nn.Linear(width, 10, key=KEY))
    x = jax.random.normal(KEY, (batch, length, width))
    return lambda m, x, y: cross_entropy(jax.vmap(m)(x), y), (model, x, classes(batch))


# --------------------------------------------------------------------------------------------------------------- Haiku


def haiku_cnn(tiny: bool) -> Model:
    import haiku as hk

    widths = (4, 8) if tiny else (32, 64)

    def network(x: Any) -> Any:
        for width in widths:
            x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(width, 3)(x), is_training=True)
            x = hk.MaxPool((1, 3, 3, 1), (1, 2, 2, 1), "SAME")(jax.nn.relu(x))
        x = jax.nn.silu(hk.LayerNorm(-1, True, True)(hk.Linear(128)(hk.Flatten()(x))))
        return hk.Linear(10)(x)

    model = hk.transform_with_state(network)
    x = images(*(4, 8, 3) if tiny else (64, 32, 3))
    params, state = jax.jit(model.init)(KEY, x)

    def loss(params: Any, state: Any, x: Any, y: Any) -> Any:
        logits, state = model.apply(params, state, None, x)
        return cross_entropy(logits, y), state

    return loss, (params, state, x, classes(len(x)))


def haiku_gru(tiny: bool) -> Model:
    import haiku as hk

    batch, length, width = (2, 6, 8) if tiny else (32, 128, 192)

    def network(x: Any) -> Any:
        core: Any = hk.GRU(width)
        h: Any = hk.dynamic_unroll(core, x, core.initial_state(batch), time_major=False)[0]
        return hk.Linear(10)(h[:, -1])

    model = hk.without_apply_rng(hk.transform(network))
    x = jax.random.normal(KEY, (batch, length, width))
    return lambda p, x, y: cross_entropy(model.apply(p, x), y), (jax.jit(model.init)(KEY, x), x, classes(batch))


# ---------------------------------------------------------------------------------------------------------- plain JAX


def jax_llama(tiny: bool) -> Model:
    """RMS norm, rotary positions, grouped heads, SwiGLU; lax.scan over layers, each under jax.checkpoint."""
    layers, width, heads, groups, batch, length, vocabulary = (2, 16, 4, 2, 2, 16, 32) if tiny else (4, 256, 8, 2, 4, 256, 256)
    size, hidden = width // heads, 3 * width

    def weights(i: int, *shape: int) -> Any:
        return jax.random.normal(jax.random.fold_in(KEY, i), shape) * shape[-2] ** -0.5

    params = {
        "embedding": weights(0, vocabulary, width),
        "layers": {
            "query": weights(1, layers, width, width), "key": weights(2, layers, width, groups * size),
            "value": weights(3, layers, width, groups * size), "out": weights(4, layers, width, width),
            "gate": weights(5, layers, width, hidden), "up": weights(6, layers, width, hidden),
            "down": weights(7, layers, hidden, width), "norms": jnp.ones((layers, 2, width)),
        },
    }  # fmt: skip

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def rotated(x: Any) -> Any:
        angle = jnp.arange(x.shape[1])[:, None] / 10000 ** (jnp.arange(size // 2)[None] / (size // 2))
        cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    @jax.checkpoint
    def layer(x: Any, p: Any) -> tuple[Any, None]:
        h = norm(x, p["norms"][0])
        q, k, v = (jnp.dot(h, p[n]).reshape(*h.shape[:2], -1, size) for n in ("query", "key", "value"))
        a = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + jnp.dot(a.reshape(x.shape), p["out"])
        h = norm(x, p["norms"][1])
        return x + jnp.dot(jax.nn.silu(jnp.dot(h, p["gate"])) * jnp.dot(h, p["up"]), p["down"]), None

    def loss(params: Any, text: Any) -> Any:
        x, _ = jax.lax.scan(layer, params["embedding"][text], params["layers"])
        logp = jax.nn.log_softmax(jnp.dot(norm(x, jnp.ones(width)), params["embedding"].T))
        return -jnp.take_along_axis(logp[:, :-1], text[:, 1:, None], axis=-1).mean()

    return loss, (params, tokens(batch, length, vocabulary))


def jax_mlp(tiny: bool) -> Model:
    """Layer norm and gelu spelled out, cross-entropy by one-hot labels."""
    width, layers, batch = (32, 2, 64) if tiny else (1024, 4, 1024)
    keys = jax.random.split(KEY, layers)
    params = [
        {"w": jax.random.normal(k, (width, width)) * width**-0.5, "scale": jnp.ones(width), "bias": jnp.zeros(width)}
        for k in keys
    ]

    def loss(params: Any, x: Any, labels: Any) -> Any:
        for p in params:
            mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            h = (x - mean) / jnp.sqrt(var + 1e-6) * p["scale"][None] + p["bias"][None]
            h = jnp.dot(h, p["w"])
            x = x + 0.5 * h * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        targets = jax.nn.one_hot(labels, width)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(x), -1))

    x = jax.random.normal(KEY, (batch, width))
    return loss, (params, x, jnp.arange(batch) % width)


MODELS: dict[str, Callable[[bool], Model]] = {
    "flax-cnn": flax_cnn,
    "flax-gpt": flax_gpt,
    "flax-gpt-50k": flax_gpt_words,
    "flax-resnet": flax_resnet,
    "flax-unet": flax_unet,
    "flax-lstm": flax_lstm,
    "nnx-vit": nnx_vit,
    "equinox-cnn": equinox_cnn,
    "equinox-transformer": equinox_transformer,
    "equinox-gru": equinox_gru,
    "haiku-cnn": haiku_cnn,
    "haiku-gru": haiku_gru,
    "jax-llama": jax_llama,
    "jax-mlp": jax_mlp,
}


# ----------------------------------------------------------------------------------------------------------- the table


def measure(name: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """One row."""
    loss, args = MODELS[name](tiny)
    report = fb.accelerate(loss).report(*args)
    if rounds:
        report = report.timed(rounds)
    row = {
        "model": name,
        "replaced": len(report.replaced),
        "eligible": len(report.found),
        "left": [f"{f.op}: {f.why}" for f in report.nearly],
        "agrees": report.agrees,
        "temp_bytes": [report.temporaries_before, report.temporaries_after],
        "kept_bytes": [report.kept_before, report.kept_after],
    }
    return row if report.speed is None else row | {"time_ratio": report.speed.median, "interval": list(report.speed[1:])}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="accelerate: before / after")
    for column in ("model", "replaced", "agrees", "time ratio", "temporaries, MiB", "kept, MiB"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        ratio = "–" if "time_ratio" not in row else "{:.2f} [{:.2f}, {:.2f}]".format(row["time_ratio"], *row["interval"])
        pairs = (" → ".join(f"{n / 2**20:.1f}" for n in row[key]) for key in ("temp_bytes", "kept_bytes"))
        shown.add_row(row["model"], f"{row['replaced']} of {row['eligible']}", "yes" if row["agrees"] else "NO", ratio, *pairs)
    return shown


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="the sizes that the tests use")
    parser.add_argument("--rounds", type=int, default=12, help="turns of the times; 0 measures none")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the rows there too")
    given = parser.parse_args(arguments)
    console, rows = Console(width=120), []
    for name in given.models:
        rows.append(measure(name, given.tiny, given.rounds))
        jax.clear_caches()
        console.print(table(rows[-1:]))
        if given.json:
            device = jax.devices()[0].device_kind
            given.json.write_text(json.dumps({"jax": jax.__version__, "device": device, "rows": rows}, indent=2) + "\n")
    console.print(table(rows))
    for row in rows:
        for left in row["left"]:
            console.print(f"{row['model']}: left as it is: {left}", style="dim", markup=False, highlight=False)
    return rows


if __name__ == "__main__":
    main()
