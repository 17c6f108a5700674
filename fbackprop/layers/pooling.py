"""Pooling layers: over windows that slide, over a fixed number of windows, over all of space. Without parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from fbackprop import ops
from fbackprop.layers.base import OpLayer, Params, State, set_option, tuples
from fbackprop.ops._pooling import require_sizes

__all__ = ["AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "GlobalAvgPool", "GlobalMaxPool", "MaxPool", "MinPool", "SumPool"]


class _Options(OpLayer):
    """Every field is an option of the op."""

    input = "inputs"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            set_option(self, field.name, tuples(getattr(self, field.name)))

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        return {"inputs": x, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}, None  # type: ignore[arg-type]


class _Pool(_Options):
    window_shape: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self.name, "window_shape", self.window_shape, "(2, 2)")

    @property
    def min_ndim(self) -> int:  # type: ignore[override]
        return len(self.window_shape) + 1


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(_Pool):
    """The largest element of each window, channel by channel.

    x [..., *space, c] -> y [..., *space', c]. Options and defaults are those of ``flax.linen.max_pool``: ``strides``
    None means 1, ``padding`` is "VALID", "SAME" or a pair for each dimension of space.
    """

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"

    op = staticmethod(ops.max_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class AvgPool(_Pool):
    """The mean of each window, channel by channel.

    x [..., *space, c] -> y [..., *space', c]. Options and defaults are those of ``flax.linen.avg_pool``;
    ``count_include_pad=False`` divides by the number of elements that are no padding.
    """

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"
    count_include_pad: bool = True

    op = staticmethod(ops.avg_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class MinPool(_Pool):
    """The smallest element of each window, channel by channel. Options and defaults are those of ``MaxPool``."""

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"

    op = staticmethod(ops.min_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class SumPool(_Pool):
    """The sum of each window, channel by channel. Options and defaults are those of ``MaxPool``."""

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Any = "VALID"

    op = staticmethod(ops.sum_pool)


class _Adaptive(_Options):
    output_size: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self.name, "output_size", self.output_size, "(7, 7)")

    @property
    def min_ndim(self) -> int:  # type: ignore[override]
        return len(self.output_size) + 1


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveAvgPool(_Adaptive):
    """The means of as many windows as ``output_size`` says, whatever the size of x.

    x [..., *space, c] -> y [..., *output_size, c].
    """

    output_size: Sequence[int]

    op = staticmethod(ops.adaptive_avg_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveMaxPool(_Adaptive):
    """The largest elements of as many windows as ``output_size`` says, whatever the size of x.

    x [..., *space, c] -> y [..., *output_size, c].
    """

    output_size: Sequence[int]

    op = staticmethod(ops.adaptive_max_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalAvgPool(_Options):
    """The mean over all of space: x [b, *space, c] -> y [b, c], or [b, 1, …, c] with ``keepdims``.

    ``dims`` says how many axes before the last are space; by default all but the first.
    """

    dims: int | None = None
    keepdims: bool = False

    op = staticmethod(ops.global_avg_pool)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalMaxPool(_Options):
    """The largest element over all of space. Options are those of ``GlobalAvgPool``."""

    dims: int | None = None
    keepdims: bool = False

    op = staticmethod(ops.global_max_pool)
