"""Layers that normalize: over the features of one example, over groups of them, over space, or over the examples of a batch.

Flax's ``use_fast_variance`` and ``force_float32_reductions`` are not among their options: sums are in float32 or wider, of
squares of what is left when the mean is taken off. Only BatchNorm sums over devices (``axis_name``, without groups of them); in
the others the features of an example are on one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from fbackprop import ops
from fbackprop.layers.base import Initializer, OpLayer, Params, State, float_type

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Norm(OpLayer):
    """What they share: optional scale and bias, and statistics in float32 or wider whatever ``dtype`` is."""

    epsilon: float
    dtype: DTypeLike | None
    use_bias: bool
    use_scale: bool
    bias_init: Initializer
    scale_init: Initializer

    min_ndim = 1

    def initializers(self) -> dict[str, Initializer]:
        scale = {"scale": self.scale_init} if self.use_scale else {}
        return {**scale, **({"bias": self.bias_init} if self.use_bias else {})}

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"scale": (width,), "bias": (width,)}

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], Any]:
        # y is of dtype (by default what input and parameters promote to). It is computed from x as it came: casting x to
        # a narrower dtype first would round it before the mean is subtracted.
        dtype = float_type(x, *params.values()) if self.dtype is None else self.dtype
        x = x.astype(jnp.promote_types(float_type(x), dtype))
        return {"x": x, **params, "epsilon": self.epsilon}, dtype


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(_Norm):
    """Gives each vector along the last axis zero mean and unit variance, then scales and shifts it.

    x [..., d] -> y [..., d]. Parameters: scale [d], bias [d]. Statistics in float32 or wider.
    Options and defaults are those of ``flax.linen.LayerNorm`` but for how Flax reduces (see above) and for other axes, which
    ``fbackprop.layer_norm`` has. Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones

    op = staticmethod(ops.layer_norm)


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(_Norm):
    """Gives each vector along the last axis a mean square of one, then scales it.

    x [..., d] -> y [..., d]. Parameter: scale [d]. Statistics in float32 or wider.
    Options and defaults are those of ``flax.linen.RMSNorm`` but for how Flax reduces (see above) and for other axes, which
    ``fbackprop.rms_norm`` has. Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones

    op = staticmethod(ops.rms_norm)
    use_bias = False


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(_Norm):
    """Gives each group of channels zero mean and unit variance in each example, then scales and shifts each channel.

    x [b, ..., d] -> y [b, ..., d]. Parameters: scale [d], bias [d]. Statistics in float32 or wider.
    Options and defaults are those of ``flax.linen.GroupNorm`` but for how and where Flax reduces (see above): one of
    ``num_groups`` and ``group_size``.
    Source: Wu & He 2018, arXiv:1803.08494.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones

    op = staticmethod(ops.group_norm)
    min_ndim = 2

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], Any]:
        arguments, dtype = super().arguments(params, x, state, key, train)
        return {**arguments, "num_groups": self.num_groups, "group_size": self.group_size}, dtype


@dataclasses.dataclass(frozen=True, repr=False)
class InstanceNorm(_Norm):
    """Gives each channel of each example zero mean and unit variance over space, then scales and shifts it.

    x [b, *space, d] -> y [b, *space, d]. Parameters: scale [d], bias [d]. Statistics in float32 or wider.
    Options and defaults are those of ``flax.linen.InstanceNorm`` but for how and where Flax reduces (see above).
    Source: Ulyanov et al. 2016, arXiv:1607.08022.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones

    op = staticmethod(ops.instance_norm)
    min_ndim = 3


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(_Norm):
    """Gives each channel zero mean and unit variance over all other axes, then scales and shifts it.

    x [..., d] -> y [..., d]. Parameters: scale [d], bias [d]. State: mean [d], var [d], the running statistics, which
    stand in for those of the batch in inference. In training the new state is momentum · old + (1 − momentum) · batch.
    Statistics in float32 or wider, also over the devices of a mesh axis ``axis_name``.
    Options and defaults are those of ``flax.linen.BatchNorm`` but for ``axis``, which is the last, and how Flax reduces (see
    above); ``train`` takes the place of ``use_running_average``.
    Raises ValueError where the state is missing. Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None

    op = staticmethod(ops.batch_norm)
    min_ndim = 2

    def initial_state(self, width: int) -> State:
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        return {"mean": jnp.zeros(width, dtype), "var": jnp.ones(width, dtype)}

    def arguments(self, params: Params, x: jax.Array, state: State, key: Any, train: bool) -> tuple[dict[str, Any], Any]:
        if not isinstance(state, dict) or set(state) != {"mean", "var"}:
            got = f"the leaves {sorted(state)}" if isinstance(state, dict) else repr(state)
            raise ValueError(
                f"BatchNorm: state is {got}, expected the running mean and var that init gave "
                f"(x {x.shape}, train={train}); pass state=state."
            )
        arguments, dtype = super().arguments(params, x, state, key, train)
        options = {"train": train, "momentum": self.momentum, "axis_name": self.axis_name if train else None}
        return {**arguments, "mean": state["mean"], "var": state["var"], **options}, dtype

    def new_state(self, state: State, results: tuple[jax.Array, ...]) -> State:
        # In the dtype of the old one, so that state can be the carry of a scan.
        return {name: new.astype(state[name].dtype) for name, new in zip(("mean", "var"), results)} or state
