"""The models that ``fbackprop bench models`` measures, and the same models in Flax, Equinox and PyTorch with the same weights.

    cnn      conv 32, pool, conv 64, pool, dense 128, dense 10; 128 images of 28×28
    gpt      GPT-2's form: 4 layers, width 256, 8 heads, 8 sequences of 256 tokens out of 256
    lstm     tokens, one layer of width 256, 32 sequences of 128 tokens out of 256
    resnet   ResNet-20 for CIFAR, 32 images of 32×32, batch norm in training

Each side is written as its framework's documentation would have it; only the weights come from our ``init``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop import ops
from fbackprop.layers import Layer
from fbackprop.models import cnn, gpt, lstm_lm, resnet

__all__ = ["MODELS", "Model", "Side", "ours"]


class Side(NamedTuple):
    """A model under training: ``loss(params, state, batch) -> (loss, state)`` and where it begins."""

    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    params: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Model:
    """``make``: our model. ``batch``: arrays (x, y) to train on. ``size``: the numbers that the other sides need."""

    name: str
    make: Callable[..., Layer]
    size: dict[str, Any]
    batch: tuple[int, ...]

    @property
    def ours(self) -> Any:
        return self.make(**self.size)

    @property
    def tokens(self) -> bool:
        return len(self.batch) == 2

    def example(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x and y of one batch: images and classes, or tokens and those that follow."""
        rng = np.random.default_rng(seed)
        if self.tokens:
            text = rng.integers(0, self.size["vocabulary"], (self.batch[0], self.batch[1] + 1), np.int32)
            return text[:, :-1], text[:, 1:]
        x = rng.standard_normal(self.batch, np.float32)
        return x, rng.integers(0, self.size["classes"], self.batch[:1], np.int32)

    def scaled(self, batch: Sequence[int], **size: Any) -> "Model":
        """The same in other sizes."""
        return dataclasses.replace(self, size={**self.size, **size}, batch=tuple(batch))


def _unrolled_gpt(**size: Any) -> Layer:
    return gpt(**size, scan=False)


def _cnn(classes: int) -> Layer:
    return cnn((32, 64), (128,), classes, pool=(2, 2))


def _resnet(depths: Sequence[int], features: Sequence[int], classes: int) -> Layer:
    return resnet(depths, features, classes, stem="cifar")


MODELS = {
    model.name: model
    for model in (
        Model("cnn", _cnn, {"classes": 10}, (128, 28, 28, 1)),
        Model("gpt", _unrolled_gpt, {"vocabulary": 256, "layers": 4, "width": 256, "heads": 8, "length": 256}, (8, 256)),
        Model("lstm", lstm_lm, {"vocabulary": 256, "width": 256}, (32, 128)),
        Model("resnet", _resnet, {"depths": (3, 3, 3), "features": (16, 32, 64), "classes": 10}, (32, 32, 32, 3)),
    )
}


def ours(model: Model, seed: int = 0) -> Side:
    """The model as this library has it."""
    network = model.ours
    params, state = network.init(
        jax.random.key(seed), jax.ShapeDtypeStruct(model.batch, jnp.int32 if model.tokens else jnp.float32)
    )
    if model.tokens:
        return Side(lambda params, state, batch: (network.loss(params, *batch), state), params, state)

    def loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, state = network.apply(params, batch[0], state=state, train=True)
        return ops.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), state

    return Side(loss, params, state)


def layers_of(tree: Any) -> list[dict[str, Any]]:
    """The leaves of each layer that has some, in the order of use."""
    if isinstance(tree, dict) and tree and not any(isinstance(v, (dict, tuple, list)) for v in tree.values()):
        return [tree]
    inner = [tree[k] for k in sorted(tree)] if isinstance(tree, dict) else tree
    return [layer for part in inner for layer in layers_of(part)]
