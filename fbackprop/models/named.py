"""Models by the name of their size."""

from collections.abc import Callable
from typing import Any

from fbackprop.layers import Layer
from fbackprop.models.gpt import gpt
from fbackprop.models.residual import resnet
from fbackprop.models.vision import vit

__all__ = ["SIZES", "named"]

_LLAMA_3: dict[str, Any] = {"modern": True, "kv_heads": 8, "rope_base": 500000.0}

SIZES: dict[str, tuple[Callable[..., Layer], dict[str, Any]]] = {
    "gpt2-124m": (gpt, {"vocabulary": 50257, "layers": 12, "width": 768, "heads": 12, "length": 1024}),
    "gpt2-355m": (gpt, {"vocabulary": 50257, "layers": 24, "width": 1024, "heads": 16, "length": 1024}),
    "gpt2-774m": (gpt, {"vocabulary": 50257, "layers": 36, "width": 1280, "heads": 20, "length": 1024}),
    "gpt2-1558m": (gpt, {"vocabulary": 50257, "layers": 48, "width": 1600, "heads": 25, "length": 1024}),
    "llama-1b": (  # Llama 3.2 1B
        gpt,
        {"vocabulary": 128256, "layers": 16, "width": 2048, "heads": 32, "hidden": 8192, "length": 131072, "tied": True,
         "rope_scaling": (32.0, 1.0, 4.0, 8192), **_LLAMA_3},
    ),
    "llama-8b": (  # Llama 3 8B
        gpt,
        {"vocabulary": 128256, "layers": 32, "width": 4096, "heads": 32, "hidden": 14336, "length": 8192, **_LLAMA_3},
    ),
    "resnet18": (resnet, {"depths": (2, 2, 2, 2)}),
    "resnet34": (resnet, {"depths": (3, 4, 6, 3)}),
    "resnet50": (resnet, {"depths": (3, 4, 6, 3), "bottleneck": True}),
    "resnet101": (resnet, {"depths": (3, 4, 23, 3), "bottleneck": True}),
    "resnet152": (resnet, {"depths": (3, 8, 36, 3), "bottleneck": True}),
    "resnet20-cifar": (resnet, {"depths": (3, 3, 3), "features": (16, 32, 64), "classes": 10, "stem": "cifar"}),
    "resnet18-cifar": (resnet, {"depths": (2, 2, 2, 2), "classes": 10, "stem": "cifar"}),
    "vit-s16": (vit, {"width": 384, "heads": 6}),
    "vit-b16": (vit, {}),
    "vit-l16": (vit, {"layers": 24, "width": 1024, "heads": 16}),
}  # fmt: skip
"""What ``named`` knows: the function that makes the model, and its options."""


def named(name: str, **options: Any) -> Any:
    """A model of a size that has a name: ``named("gpt2-124m", dtype="bfloat16", scan=False)``.

    Args:
      name: one of ``SIZES``. options: of the function that makes the model, in place of those of the size.
    Returns:
      The model; its weights are random until they are loaded or trained.
    Raises:
      ValueError: where the name is not known. TypeError: where there is no option of a name.
    """
    if name not in SIZES:
        raise ValueError(f"named: there is no model {name!r}; known are {', '.join(SIZES)}.")
    make, size = SIZES[name]
    return make(**{**size, **options})
