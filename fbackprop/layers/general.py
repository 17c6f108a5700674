"""Linear maps over any axes: DenseGeneral, whose axes are numbered, and Einsum, whose axes have letters."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.compositions.linear import general_equation
from fbackprop.layers.base import Initializer, OpLayer, Params, State, promoted, set_option, tuples
from fbackprop.layers.linear import _Linear, require_positive
from fbackprop.ops._arithmetic import canonical_axes

__all__ = ["DenseGeneral", "Einsum"]

_lecun_normal = initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, repr=False)
class DenseGeneral(OpLayer):
    """A linear map of any axes of x to new ones, at the end.

    x -> y [*batch, the other axes of x, *features]. Parameters: kernel [*batch, *contracted, *features], bias
    [*batch, *features]. Options, names, layouts and defaults are those of ``flax.linen.DenseGeneral``: ``axis`` is summed
    over, each index of ``batch_dims`` (leading axes) has weights of its own.
    Raises ValueError where axes do not fit x.
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros
    precision: Any = None

    op = staticmethod(ops.einsum_dense)
    min_ndim = 1

    def __post_init__(self) -> None:
        for name in ("features", "axis", "batch_dims"):
            value = tuples(getattr(self, name))
            set_option(self, name, value if isinstance(value, tuple) else (value,))
        require_positive(self.name, **{f"features[{i}]": n for i, n in enumerate(self._sizes)})

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.features)  # type: ignore[arg-type]

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(self.axis)  # type: ignore[arg-type]

    def initializers(self) -> dict[str, Initializer]:
        # As matrices and vectors, whatever their axes: so the variance is that of Dense.
        batch, n = len(self.batch_dims), len(self._sizes)

        def kernel(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
            return self.kernel_init(key, (math.prod(shape[:-n]), math.prod(shape[-n:])), dtype).reshape(shape)

        def bias(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
            return self.bias_init(key, (math.prod(shape[:batch]) * math.prod(shape[batch:]),), dtype).reshape(shape)

        return {"kernel": kernel, **({"bias": bias} if self.use_bias else {})}

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        if self._axes != (-1,) or self.batch_dims:
            raise ValueError(f"{self!r} has weights that depend on more of x than its last axis.")
        return {"kernel": (width, *self._sizes), "bias": self._sizes}

    def shapes_for(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        canonical_axes(self.name, self._axes, len(shape))
        canonical_axes(self.name, self.batch_dims, len(shape))
        batch = tuple(shape[d] for d in self.batch_dims)
        return {"kernel": (*batch, *(shape[a] for a in self._axes), *self._sizes), "bias": (*batch, *self._sizes)}

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], None]:
        x, cast = promoted(self.dtype, x, params)
        equation = general_equation(self.name, x.shape, cast["kernel"].shape, self._axes, self.batch_dims)
        return {"x": x, **cast, "einsum_str": equation, "precision": self.precision}, None


@dataclasses.dataclass(frozen=True, repr=False)
class Einsum(_Linear):
    """A linear map written as an einsum of x and the kernel: ``Einsum((8, 2, 4), "...d,dnh->...nh")``.

    x -> y, of the axes that the equation names. Parameters: kernel of ``shape``; bias, of the axes of the kernel that are left
    in y. Options, names, layouts and defaults are those of ``flax.linen.Einsum``.
    Raises ValueError where the equation does not describe such a map, or x does not fit.
    """

    shape: Sequence[int]
    einsum_str: str
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: Initializer = _lecun_normal
    bias_init: Initializer = initializers.zeros
    preferred_element_type: DTypeLike | None = None

    op = staticmethod(ops.einsum_dense)

    def __post_init__(self) -> None:
        if not isinstance(self.einsum_str, str) or not isinstance(self.shape, Sequence):
            given = f"shape {self.shape!r}, einsum_str {self.einsum_str!r}"
            raise TypeError(f"Einsum: expected the shape of the kernel and an equation such as '...d,dh->...h', got {given}.")
        set_option(self, "shape", tuples(self.shape))
        require_positive(self.name, **{f"shape[{i}]": n for i, n in enumerate(self.shape)})

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        inputs, _, result = self.einsum_str.replace(" ", "").partition("->")
        sizes = dict(zip(inputs.partition(",")[2], self.shape))
        return {"kernel": tuple(self.shape), "bias": tuple(sizes[c] for c in result if c in sizes)}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("einsum_str", "precision", "preferred_element_type")}
