"""Layers around a layer that change its weights before use: WeightNorm and SpectralNorm."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from fbackprop import ops
from fbackprop.compositions.linear import spectral_norm
from fbackprop.layers.base import Initializer, Layer, Params, State, require_params, set_option, split_key, tuples
from fbackprop.layers.composed import Composed
from fbackprop.ops._arithmetic import canonical_axes

__all__ = ["SpectralNorm", "WeightNorm"]


class _Wrapper(Composed):
    layer_instance: Layer

    def _require_layer(self) -> None:
        if not isinstance(self.layer_instance, Layer):
            raise TypeError(f"{self.name}: expected a layer, such as Dense(10), got {self.layer_instance!r}.")

    def _chosen(self, params: Params) -> dict[str, Any]:
        """The weights that are changed, by their path, such as "kernel" or "layers/0/kernel"."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {path: leaf for keys, leaf in leaves if self._is_meant(path := _path(keys), leaf)}

    def _is_meant(self, path: str, leaf: Any) -> bool:
        raise NotImplementedError

    def _changed(self, params: Params, change: Callable[[str, Any], Any]) -> Params:
        def one(keys: Any, leaf: Any) -> Any:
            path = _path(keys)
            return change(path, leaf) if self._is_meant(path, leaf) else leaf

        return jax.tree_util.tree_map_with_path(one, params)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


@dataclasses.dataclass(frozen=True, repr=False)
class WeightNorm(_Wrapper):
    """A layer whose kernels are kept as directions and lengths: kernel = scale · v / ‖v‖.

    x -> y, as of the layer. Parameters: layer, those of the layer (v in place of each kernel), and with ``use_scale`` scale, a
    vector for each kernel by its path. Options and defaults are those of ``flax.linen.WeightNorm``.

    Args:
      layer_instance: the layer. epsilon: added to squared lengths. feature_axes: those that have a length each.
      variable_filter: weights are meant whose path contains one of these words; None: all.
    Raises:
      TypeError: where it is no layer.
    Source: Salimans & Kingma 2016, arXiv:1602.07868.
    """

    layer_instance: Layer
    epsilon: float = 1e-12
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: int | Sequence[int] | None = -1
    variable_filter: Sequence[str] | None = ("kernel",)
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        self._require_layer()
        set_option(self, "feature_axes", tuples(self.feature_axes))
        if isinstance(self.variable_filter, str):
            raise TypeError(f"WeightNorm: variable_filter is {self.variable_filter!r}, expected words, such as ('kernel',).")
        set_option(self, "variable_filter", None if self.variable_filter is None else tuple(self.variable_filter))

    def _is_meant(self, path: str, leaf: Any) -> bool:
        return self.variable_filter is None or any(word in path for word in self.variable_filter)

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        one, two = split_key(f"{self.name}.init", key)
        inner, state = self.layer_instance.init(one, x)
        if not self.use_scale:
            return {"layer": inner}, state
        chosen = self._chosen(inner)
        keys = jax.random.split(two, max(len(chosen), 1))
        each = zip(keys, chosen.items())
        scale = {path: self.scale_init(k, self._lengths(leaf), self.param_dtype) for k, (path, leaf) in each}
        return {"layer": inner, "scale": scale}, state

    def _lengths(self, leaf: Any) -> tuple[int, ...]:
        axes = () if self.feature_axes is None else canonical_axes(self.name, self.feature_axes, leaf.ndim)
        return tuple(leaf.shape[a] for a in axes)

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        require_params(self, params, ("layer", "scale") if self.use_scale else ("layer",))
        scale: Any = params.get("scale", {})

        def change(path: str, v: Any) -> Any:
            return ops.weight_norm(v, scale.get(path), feature_axes=self.feature_axes, epsilon=self.epsilon)

        return self.layer_instance.apply(self._changed(params["layer"], change), x, state, key, train)


@dataclasses.dataclass(frozen=True, repr=False)
class SpectralNorm(_Wrapper):
    """A layer whose kernels are divided by their largest singular value, which power iteration follows from step to step.

    x -> y, as of the layer. Parameters: those of the layer. State: layer, that of the layer; u and sigma, for each kernel (all
    parameters of two and more axes) by its path. In training the new estimates are the new state. Options and defaults are
    those of ``flax.linen.SpectralNorm``; ``train`` takes the place of ``update_stats``.

    Args:
      layer_instance: the layer. n_steps: of power iteration at each call. epsilon: added to squared lengths.
    Raises:
      TypeError: where it is no layer. ValueError: where the state is missing.
    Source: Miyato et al. 2018, arXiv:1802.05957.
    """

    layer_instance: Layer
    n_steps: int = 1
    epsilon: float = 1e-12
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        self._require_layer()

    def _is_meant(self, path: str, leaf: Any) -> bool:
        return jnp.ndim(leaf) > 1

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        one, two = split_key(f"{self.name}.init", key)
        params, state = self.layer_instance.init(one, x)
        chosen = self._chosen(params)
        keys = jax.random.split(two, max(len(chosen), 1))
        u = {path: jax.random.normal(k, (1, leaf.shape[-1]), self.param_dtype) for k, (path, leaf) in zip(keys, chosen.items())}
        return params, {"layer": state, "u": u, "sigma": {path: jnp.ones((), self.param_dtype) for path in chosen}}

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        if not isinstance(state, dict) or set(state) != {"layer", "u", "sigma"}:
            raise ValueError(f"SpectralNorm: state is {state!r}, expected layer, u and sigma, as init gave; pass state=state.")
        if set(self._chosen(params)) != set(state["u"]):
            got, expected = sorted(self._chosen(params)), sorted(state["u"])
            raise ValueError(f"SpectralNorm: params has the kernels {got}, those of the state are {expected} (layer {self!r}).")
        new: dict[str, dict[str, Any]] = {"u": {}, "sigma": {}}

        def change(path: str, kernel: Any) -> Any:
            y, new["u"][path], new["sigma"][path] = spectral_norm(
                kernel, state["u"][path], n_steps=self.n_steps, epsilon=self.epsilon
            )
            return y

        changed = self._changed(params, change)
        y, inner = self.layer_instance.apply(changed, x, state["layer"], key, train)
        return y, {**(new if train else state), "layer": inner}
