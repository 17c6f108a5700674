"""The vision transformer: an image cut into patches, a class token before them, the blocks of GPT without its mask.

x = [class; patches · kernel + bias] + position
x = block(x), `layers` times            transformer.py
logits = norm(x[class]) · head
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike

from fbackprop import ops
from fbackprop.layers.base import Params, State, float_type, split_key
from fbackprop.layers.linear import require_positive
from fbackprop.models.transformer import Transformer

__all__ = ["ViT", "vit"]


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ViT(Transformer):
    """A classifier of images. Made by ``vit``, which see; all options are fields.

    x [b, size, size, channels] -> logits [b, classes], in float32 or wider. Options are those of ``Transformer``, and those
    of ``vit``.
    """

    size: int
    patch: int
    classes: int
    channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.name, size=self.size, patch=self.patch, classes=self.classes, channels=self.channels)
        if self.size % self.patch:
            raise ValueError(f"ViT: images of {self.size} pixels do not divide into patches of {self.patch}.")

    @property
    def example(self) -> Any:
        return jax.ShapeDtypeStruct((1, self.size, self.size, self.channels), jnp.float32)

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        self._require_images(x)
        patches, position, blocks = split_key(f"{self.name}.init", key, 3)
        width, dtype, inputs = self.width, self.param_dtype, self.patch**2 * self.channels
        return {
            "patches": {
                "kernel": initializers.lecun_normal()(patches, (inputs, width), dtype),
                "bias": jnp.zeros(width, dtype),
            },
            "class": {"embedding": jnp.zeros((1, width), dtype)},
            "position": {"embedding": initializers.normal(self.init_std)(position, (self._patches + 1, width), dtype)},
            "blocks": self.init_blocks(blocks),
            "norm": self.init_norm(),
            "head": {"kernel": jnp.zeros((width, self.classes), dtype), "bias": jnp.zeros(self.classes, dtype)},
        }, ()

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        x = jnp.asarray(x)
        self._require_images(x)
        self.require_params(params)
        first, head = self.cast(params["patches"]), self.cast(params["head"])
        x = x.astype(self.dtype or float_type(x, first["kernel"]))
        rows = self.size // self.patch
        cut = x.reshape(x.shape[0], rows, self.patch, rows, self.patch, self.channels)
        cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * rows, -1)
        tokens = ops.dense(cut, first["kernel"], first["bias"])
        token = jnp.broadcast_to(self.cast(params["class"]["embedding"])[None], (x.shape[0], 1, self.width))
        h = jnp.concatenate([token.astype(tokens.dtype), tokens], 1) + self.cast(params["position"]["embedding"])[None]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            return ops.dot_product_attention(q, k, v, implementation=self.attention), None

        h = self.final_norm(params["norm"], self.run_blocks(params["blocks"], h, attend)[0][:, 0])
        wide = jnp.promote_types(h.dtype, jnp.float32)
        return ops.dense(h, head["kernel"], head["bias"], preferred_element_type=wide), ()

    @property
    def _patches(self) -> int:
        return (self.size // self.patch) ** 2

    def _require_images(self, x: Any) -> None:
        wanted = (self.size, self.size, self.channels)
        if jnp.ndim(x) != 4 or jnp.shape(x)[1:] != wanted:
            raise ValueError(f"ViT: x has shape {jnp.shape(x)}, expected (batch, {', '.join(map(str, wanted))}).")


def vit(
    size: int = 224,
    patch: int = 16,
    classes: int = 1000,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    channels: int = 3,
    **options: Any,
) -> ViT:
    """A vision transformer: x [b, size, size, channels] -> logits [b, classes].

    Args:
      size: of the images, in pixels. patch: the side of a patch. classes: the number of logits.
      layers, width, heads, channels: its size; ``vit()`` is ViT-B/16.
      options: fields of ``Transformer`` that are to be otherwise, such as scan=False, checkpoint="full" or dtype="bfloat16".
    Returns:
      A model; its parameters are ``{"patches", "class", "position", "blocks", "norm", "head"}``. The head begins at zero.
    Raises:
      ValueError: where an option does not fit. TypeError: where there is none of that name.
    Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
    """
    form: dict[str, Any] = {"mlp": "gelu_exact", "epsilon": 1e-6, **options}
    known = [field.name for field in dataclasses.fields(ViT)]
    if unknown := [name for name in form if name not in known]:
        raise TypeError(f"vit: there is no option {unknown[0]!r}; known are {', '.join(known)}.")
    return ViT(size=size, patch=patch, classes=classes, layers=layers, width=width, heads=heads, channels=channels, **form)
