"""Layers that are linear in their input: Dense, Conv, ConvTranspose; and Embed, linear in its table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers.base import Initializer, OpLayer, Params, State, promoted, set_option, tuples

__all__ = ["Conv", "ConvTranspose", "Dense", "Embed"]

_lecun_normal = initializers.lecun_normal()
_embed_normal = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class _Linear(OpLayer):
    """What Dense and Conv share: a kernel, an optional bias, and everything cast to one dtype."""

    features: int
    use_bias: bool
    dtype: DTypeLike | None
    kernel_init: Initializer
    bias_init: Initializer

    def initializers(self) -> dict[str, Initializer]:
        return {"kernel": self.kernel_init, **({"bias": self.bias_init} if self.use_bias else {})}

    def _options(self) -> dict[str, Any]:
        raise NotImplementedError

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        x, cast = promoted(self.dtype, x, params)
        return {"x": x, **cast, **self._options()}, None

    def _require_features(self) -> None:
        require_positive(self.name, features=self.features)


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(_Linear):
    """A linear map of the last axis: y = x · kernel + bias.

    x [..., in] -> y [..., features]. Parameters: kernel [in, features], bias [features].
    Options, names, layouts and defaults are those of ``flax.linen.Dense``: ``dtype`` is what is computed in (None: what
    input and parameters promote to), ``param_dtype`` what parameters are made in.
    Raises ValueError where x has another number of features than the kernel.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros

    op = staticmethod(ops.dense)
    min_ndim = 1

    def __post_init__(self) -> None:
        self._require_features()

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (width, self.features), "bias": (self.features,)}

    def _options(self) -> dict[str, Any]:
        return {"precision": self.precision}


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(_Linear):
    """A convolution (cross-correlation) over the axes before the last, one for each entry of ``kernel_size``.

    x [..., *space, in] -> y [..., *space', features], with any number of batch axes, none included.
    Parameters: kernel [*kernel_size, in / feature_group_count, features], bias [features].
    Options, names, layouts and defaults are those of ``flax.linen.Conv``: ``padding`` is "SAME", "VALID", "CIRCULAR",
    "REFLECT", "CAUSAL", a number, or numbers or pairs for each axis; an integer as ``kernel_size`` is one dimension.
    Raises ValueError where x has too few axes, or channels that do not suit the kernel or the groups.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros

    op = staticmethod(ops.conv)

    def __post_init__(self) -> None:
        self._require_features()
        size = self.kernel_size
        set_option(self, "kernel_size", tuple(size) if isinstance(size, Sequence) else (size,))
        for name in ("strides", "input_dilation", "kernel_dilation"):
            value = getattr(self, name)
            set_option(self, name, 1 if value is None else tuples(value))
        set_option(self, "padding", tuples(self.padding))
        require_positive(self.name, feature_group_count=self.feature_group_count)
        if not self._space or any(not isinstance(k, int) or k < 1 for k in self._space):
            raise ValueError(f"Conv: kernel_size is {size!r}, expected one positive integer for each dimension of space.")
        if self.features % self.feature_group_count:
            raise ValueError(f"Conv: features is {self.features}, which {self.feature_group_count} groups do not divide.")

    @property
    def _space(self) -> tuple[int, ...]:
        return tuple(self.kernel_size) if not isinstance(self.kernel_size, int) else (self.kernel_size,)

    @property
    def min_ndim(self) -> int:  # type: ignore[override]
        return len(self._space) + 1

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        if width % self.feature_group_count:
            raise ValueError(f"Conv: x has {width} channels, which {self.feature_group_count} groups do not divide.")
        kernel = (*self._space, width // self.feature_group_count, self.features)
        return {"kernel": kernel, "bias": (self.features,)}

    def _options(self) -> dict[str, Any]:
        names = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "precision")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, repr=False)
class ConvTranspose(_Linear):
    """A transposed convolution, which enlarges x by the strides, over the axes before the last.

    x [..., *space, in] -> y [..., *space', features]. Parameters: kernel [*kernel_size, in, features] (with
    ``transpose_kernel`` [*kernel_size, features, in]), bias [features].
    Options, names, layouts and defaults are those of ``flax.linen.ConvTranspose``.
    Raises ValueError where x has too few axes.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros
    transpose_kernel: bool = False

    op = staticmethod(ops.conv_transpose)

    def __post_init__(self) -> None:
        self._require_features()
        for name in ("kernel_size", "strides", "kernel_dilation", "padding"):
            set_option(self, name, tuples(getattr(self, name)))
        require_positive(self.name, **{f"kernel_size[{i}]": k for i, k in enumerate(self._space)})

    @property
    def _space(self) -> tuple[int, ...]:
        return tuple(self.kernel_size) if isinstance(self.kernel_size, Sequence) else (self.kernel_size,)

    @property
    def min_ndim(self) -> int:  # type: ignore[override]
        return len(self._space) + 1

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        channels = (self.features, width) if self.transpose_kernel else (width, self.features)
        return {"kernel": (*self._space, *channels), "bias": (self.features,)}

    def _options(self) -> dict[str, Any]:
        names = ("strides", "padding", "kernel_dilation", "transpose_kernel", "precision")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, repr=False)
class Embed(OpLayer):
    """A table of vectors, looked up by integers.

    x [...] of integers in [0, num_embeddings) -> y [..., features]. Parameter: embedding [num_embeddings, features].
    Options and defaults are those of ``flax.linen.Embed``. dx is None. Raises TypeError where x is not of integers.
    """

    num_embeddings: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = _embed_normal

    op = staticmethod(ops.embed)
    input = "indices"

    def __post_init__(self) -> None:
        require_positive(self.name, num_embeddings=self.num_embeddings, features=self.features)

    def initializers(self) -> dict[str, Initializer]:
        return {"embedding": self.embedding_init}

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"embedding": (self.num_embeddings, self.features)}

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"Embed: x is of {x.dtype}, expected integers (x {x.shape}).")
        return {"indices": x, "embedding": jnp.asarray(params["embedding"], self.dtype)}, None


def require_positive(who: str, **options: Any) -> None:
    """Refuses options that are not positive integers, by name."""
    for name, value in options.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{who}: {name} is {value!r}, expected a positive integer.")
