"""The residual network: a stem, stages of residual blocks, the mean over the image, one dense layer.

    basic        y = relu(x + norm(conv3(relu(norm(conv3(x))))))
    bottleneck   y = relu(x + norm(conv1(relu(norm(conv3(relu(norm(conv1(x)))))))))

Where a block halves the image or changes the number of channels, x goes through norm(conv1(x)) too.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers import BatchNorm, Conv, Dense, MaxPool, Serial, residual, serial
from fbackprop.layers.linear import require_positive

__all__ = ["resnet"]

# He et al. 2015: for a relu behind it; of the outputs of the kernel, as for torchvision's weights.
_he_normal = initializers.variance_scaling(2.0, "fan_out", "normal")


def resnet(
    depths: Sequence[int] = (2, 2, 2, 2),
    features: Sequence[int] = (64, 128, 256, 512),
    classes: int = 1000,
    *,
    bottleneck: bool = False,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    momentum: float = 0.9,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    precision: Any = None,
) -> Serial:
    """A classifier of images: x [b, h, w, c] -> logits [b, classes].

    ``resnet()`` is ResNet-18, ``resnet((3, 4, 6, 3), bottleneck=True)`` ResNet-50, and ``resnet((3, 3, 3), (16, 32, 64), 10,
    stem="cifar")`` ResNet-20 for images of 32×32. Strides, paddings and layouts are those of torchvision's models, in NHWC.

    Args:
      depths: how many blocks each stage has; the first block of each stage but the first halves the image.
      features: the channels of each stage, of the 3×3 convolutions; a bottleneck gives four times as many.
      classes: the number of logits.
      bottleneck: blocks of 1×1, 3×3, 1×1 instead of 3×3, 3×3.
      stem: "imagenet" is a convolution of 7×7 with stride 2 and max pooling, "cifar" one of 3×3.
      momentum: of the running statistics of batch norm, as for ``layers.BatchNorm``.
      dtype, param_dtype, precision: as for ``layers.Conv``.
    Returns:
      A layer with parameters ``{"layers": (…)}`` and a state alike; the last scale of each block begins at zero, so that each
      block begins as its shortcut.
    Raises:
      ValueError: where depths and features are not as many, or hold something that is not a positive integer, or there is no
        such stem.
    Source: He et al. 2015, arXiv:1512.03385; Goyal et al. 2017, arXiv:1706.02677 (scales of zero).
    """
    depths, features = tuple(depths), tuple(features)
    if len(depths) != len(features) or not depths:
        raise ValueError(f"resnet: depths is {depths} and features {features}, expected one number each for every stage.")
    require_positive("resnet", **{f"depths[{i}]": n for i, n in enumerate(depths)})
    require_positive("resnet", **{f"features[{i}]": n for i, n in enumerate(features)}, classes=classes)
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"resnet: stem is {stem!r}, expected 'imagenet' or 'cifar'.")

    def conv(channels: int, size: int, stride: int = 1) -> Conv:
        return Conv(
            channels, (size, size), stride, size // 2, use_bias=False, dtype=dtype, param_dtype=param_dtype,
            precision=precision, kernel_init=_he_normal,
        )  # fmt: skip

    def norm(last: bool = False) -> BatchNorm:
        start = initializers.zeros if last else initializers.ones
        return BatchNorm(momentum=momentum, dtype=dtype, param_dtype=param_dtype, scale_init=start)

    def block(given: int, channels: int, stride: int) -> tuple[Any, int]:
        if bottleneck:
            out = 4 * channels
            inner = [conv(channels, 1), norm(), ops.relu, conv(channels, 3, stride), norm(), ops.relu]
            body = serial(*inner, conv(out, 1), norm(True))
        else:
            out = channels
            body = serial(conv(channels, 3, stride), norm(), ops.relu, conv(out, 3), norm(True))
        shortcut = serial(conv(out, 1, stride), norm()) if stride > 1 or given != out else None
        return residual(body, shortcut), out

    if stem == "imagenet":
        layers = [conv(features[0], 7, 2), norm(), ops.relu, MaxPool((3, 3), (2, 2), ((1, 1), (1, 1)))]
    else:
        layers = [conv(features[0], 3), norm(), ops.relu]
    channels = features[0]
    for stage, (depth, wanted) in enumerate(zip(depths, features)):
        for i in range(depth):
            one, channels = block(channels, wanted, 2 if stage > 0 and i == 0 else 1)
            layers += [one, ops.relu]
    return serial(*layers, ops.global_avg_pool, Dense(classes, dtype=dtype, param_dtype=param_dtype, precision=precision))
