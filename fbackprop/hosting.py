"""A layer or model of ours inside a model of theirs: as a linen or nnx module of Flax, or as a module of Equinox.

Theirs holds the parameters and the state, initializes, counts and saves them as it does its own; a call runs ours, and with it
the backward passes written by hand. Flax and Equinox are imported when they are asked for.

    Flax's linen    params -> "params", state -> "batch_stats", train -> the argument train, key -> the stream "dropout"
    Flax's nnx      params -> nnx.Param, state -> nnx.BatchStat, train -> module.train() / .eval(), key -> rngs.dropout()
    Equinox         params -> a field, state -> eqx.nn.State, train -> the field inference, key -> the argument key
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.layers.base import Layer, Params, State

__all__ = ["to_equinox", "to_flax", "to_nnx"]


def to_flax(model: Layer, name: str | None = None) -> Any:
    """The model as a linen module: ``module.init(key, x)``, ``module.apply(variables, x, train=True, …)``.

    Its parameters are the collection "params", with numbers for the entries of tuples (``params["layers"]["0"]["kernel"]``).
    Its state, such as the statistics of batch norm, is "batch_stats": in training pass ``mutable=["batch_stats"]``. Layers that
    draw numbers when training take them from the stream "dropout": pass ``rngs={"dropout": key}``.

    Args:
      model: a layer or model of this library. name: that of the module inside its parent.
    Raises:
      TypeError: where it is no layer. ImportError: where Flax is missing.
    """
    _require_layer("to_flax", model)
    return _linen_class()(model, name=name)


def to_nnx(model: Layer, x: Any, *, rngs: Any) -> Any:
    """The model as an nnx module, which holds its parameters: ``module(x)``.

    Parameters are ``nnx.Param``, state is ``nnx.BatchStat``. As nnx's own dropout and batch norm it trains unless
    ``module.eval()`` was called; then layers that draw numbers take them from ``rngs.dropout()``.

    Args:
      model: a layer or model of this library.
      x: an input, or a ``jax.ShapeDtypeStruct`` of its shape: nnx makes parameters at once.
      rngs: an ``nnx.Rngs``; parameters begin with ``rngs.params()``.
    Raises:
      TypeError: where it is no layer. ImportError: where Flax is missing.
    """
    _require_layer("to_nnx", model)
    if not hasattr(rngs, "params"):
        raise TypeError(f"to_nnx: rngs is a {type(rngs).__name__}, expected an nnx.Rngs, such as nnx.Rngs(0).")
    return _nnx_class()(model, x, rngs)


def to_equinox(model: Layer, params: Params, state: State = ()) -> Any:
    """The model as a module of Equinox, which holds these parameters: ``module(x, key=key)``.

    It takes whole batches, and trains unless ``eqx.nn.inference_mode`` or ``inference=True`` says otherwise. A model with state
    is made and called as Equinox's own: ``module, state = eqx.nn.make_with_state(fb.to_equinox)(model, params, state)``, then
    ``y, state = module(x, state, key=key)``.

    Args:
      model: a layer or model of this library. params, state: as ``model.init`` made them.
    Raises:
      TypeError: where it is no layer. ImportError: where Equinox is missing.
    """
    _require_layer("to_equinox", model)
    if not isinstance(params, dict):
        hint = "; init gives two things, params and state" if isinstance(params, tuple) else ""
        raise TypeError(f"to_equinox: params is a {type(params).__name__}, expected a dict as model.init made it{hint}.")
    stateless, stateful = _equinox_classes()
    params = jax.tree.map(jnp.asarray, params)
    return stateful(model, params, state) if jax.tree.leaves(state) else stateless(model, params)


def _require_layer(who: str, model: Any) -> None:
    if not isinstance(model, Layer):
        raise TypeError(f"{who}: expected a layer or model of fbackprop, got {getattr(model, '__name__', repr(model))}.")


def _library(who: str, module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{who}: {name} is not installed; pip install {name.lower()}.") from error


# Trees with tuples, as dicts of dicts.


def _as_dicts(tree: Any) -> dict[str, Any]:
    """Nested dicts of the leaves alone, by the names and numbers on the way to them."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *way, last = _parts(path)
        place = found
        for part in way:
            place = place.setdefault(part, {})
        place[last] = leaf
    return found


def _as_tree(dicts: Mapping[str, Any], like: Any) -> Any:
    """The leaves of such dicts in the structure of another tree."""

    def leaf(path: Any, _: Any) -> Any:
        return functools.reduce(lambda place, part: place[part], _parts(path), dicts)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _parts(path: Any) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _typed(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


# Their classes, made when they are first needed.


@functools.cache
def _linen_class() -> Any:
    nn = _library("to_flax", "flax.linen", "Flax")

    class Hosted(nn.Module):
        model: Any

        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            like_params, like_state = jax.eval_shape(self.model.init, jax.random.key(0), _typed(x))

            def made(key: Any, which: int, name: str) -> Any:
                return _as_dicts(self.model.init(key, _typed(x))[which])[name]

            params = {n: self.param(n, made, 0, n) for n in _as_dicts(like_params)}
            held = {}
            for n in _as_dicts(like_state):
                # Only at initialization is there a key, and only there it is asked for.
                held[n] = self.variable("batch_stats", n, lambda n=n: made(self.make_rng("params"), 1, n))
            state = _as_tree({n: variable.value for n, variable in held.items()}, like_state)
            key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
            y, new = self.model.apply(_as_tree(params, like_params), x, state, key, train)
            if train and not self.is_initializing():
                for n, value in _as_dicts(new).items():
                    held[n].value = value
            return y

    return Hosted


@functools.cache
def _nnx_class() -> Any:
    nnx = _library("to_nnx", "flax.nnx", "Flax")

    def variables(dicts: Mapping[str, Any], kind: Any) -> Any:
        return nnx.Dict({n: variables(v, kind) if isinstance(v, dict) else kind(v) for n, v in dicts.items()})

    def values(tree: Any) -> Any:
        return {n: values(v) if isinstance(v, nnx.Dict) else v.get_value() for n, v in tree.items()}

    def write(tree: Any, dicts: Mapping[str, Any]) -> None:
        for n, value in dicts.items():
            if isinstance(value, dict):
                write(tree[n], value)
            else:
                tree[n].set_value(value)

    class Hosted(nnx.Module):
        def __init__(self, model: Any, x: Any, rngs: Any):
            params, state = model.init(rngs.params(), x)
            self.model = model
            self.params = variables(_as_dicts(params), nnx.Param)
            self.state = variables(_as_dicts(state), nnx.BatchStat)
            self.rngs = rngs
            self.deterministic = False
            self.shapes = _Structure(*(jax.tree.map(_typed, tree) for tree in (params, state)))

        def __call__(self, x: Any) -> Any:
            train = not self.deterministic
            params = _as_tree(values(self.params), self.shapes.params)
            state = _as_tree(values(self.state), self.shapes.state)
            key = self.rngs.dropout() if train and hasattr(self.rngs, "dropout") else None
            y, new = self.model.apply(params, x, state, key, train)
            if train:
                write(self.state, _as_dicts(new))
            return y

    return Hosted


class _Structure:
    """The shapes of parameters and state: to nnx a constant of the module."""

    def __init__(self, params: Any, state: Any):
        self.params, self.state = params, state
        leaves, structure = jax.tree.flatten((params, state))
        self._key = (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.cache
def _equinox_classes() -> tuple[Any, Any]:
    eqx = _library("to_equinox", "equinox", "Equinox")

    class Hosted(eqx.Module):
        model: Any = eqx.field(static=True)
        params: Any
        inference: bool

        def __init__(self, model: Any, params: Any):
            self.model, self.params, self.inference = model, params, False

        def __call__(self, x: Any, *, key: Any = None, inference: bool | None = None) -> Any:
            train = not (self.inference if inference is None else inference)
            return self.model.apply(self.params, x, (), key, train)[0]

    class HostedWithState(eqx.nn.StatefulLayer):
        model: Any = eqx.field(static=True)
        params: Any
        inference: bool
        index: Any

        def __init__(self, model: Any, params: Any, state: Any):
            self.model, self.params, self.inference = model, params, False
            self.index = eqx.nn.StateIndex(jax.tree.map(jnp.asarray, state))

        def __call__(self, x: Any, state: Any, *, key: Any = None, inference: bool | None = None) -> tuple[Any, Any]:
            train = not (self.inference if inference is None else inference)
            y, new = self.model.apply(self.params, x, state.get(self.index), key, train)
            return y, state.set(self.index, new) if train else state

    return Hosted, HostedWithState
