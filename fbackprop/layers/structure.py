"""Layers made of layers: ``parallel`` branches, a layer ``repeat``-ed by a scan, and ``remat`` with ``named`` results.

parallel    y = (f₁(x), …, fₙ(x)) side by side or summed      dx = Σ fᵢ.backward(dyᵢ)
repeat      x₀ = x,  xᵢ = f(paramsᵢ, xᵢ₋₁),  y = xₙ             dxᵢ₋₁ = f.backward(dxᵢ), in a scan from the end
remat       y = f(x), of which only x is kept                  f.forward again, then f.backward
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from fbackprop.layers.base import Layer, Params, State, array_of, float_type, fold_key, shape_of, split_key
from fbackprop.layers.combinators import as_layer, entries, inside, together
from fbackprop.layers.composed import Composed
from fbackprop.layers.linear import require_positive

__all__ = ["Named", "Parallel", "Remat", "Repeat", "named", "parallel", "remat", "repeat"]


@dataclasses.dataclass(frozen=True, repr=False)
class Parallel(Composed):
    """Layers side by side. Made by ``parallel``, which see."""

    layers: tuple[Layer, ...]
    merge: str = "concatenate"

    def __repr__(self) -> str:
        how = "" if self.merge == "concatenate" else f", merge={self.merge!r}"
        return f"parallel({', '.join(map(repr, self.layers))}{how})"

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        made = []
        for i, layer in enumerate(self.layers):
            with inside("parallel", i, layer):
                made.append(layer.init(fold_key("parallel", key, i), x))
        return {"layers": tuple(p for p, _ in made)}, together([state for _, state in made])

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        ys, states = [], []
        for i, (layer, own, old) in enumerate(entries("parallel", self.layers, params, state)):
            with inside("parallel", i, layer):
                y, new = layer.apply(own, x, old, fold_key("parallel", key, i), train)
            ys.append(y)
            states.append(new)
        side_by_side = self.merge == "concatenate"
        if len({y.shape[: -1 if side_by_side else None] for y in ys}) > 1:
            got, but = [y.shape for y in ys], " but for the last axis" if side_by_side else ""
            raise ValueError(f"parallel: outputs of {got} do not fit merge={self.merge!r}; expected one shape{but}.")
        return jnp.concatenate(ys, -1) if side_by_side else sum(ys[1:], ys[0]), together(states)


def parallel(*layers: Any, merge: str = "concatenate") -> Parallel:
    """Layers that read the same x, as one layer.

    Args:
      layers: layers, or ops of one array. merge: of their outputs: "concatenate" along the last axis, or "sum".
    Returns:
      A layer whose parameters are ``{"layers": (…)}``, as of ``serial``.
    Raises:
      TypeError: where something is neither a layer nor an op. ValueError: where there is none, or merge is neither.
    """
    if not layers or merge not in ("concatenate", "sum"):
        raise ValueError(f"parallel: expected layers and merge='concatenate' or 'sum', got {len(layers)} and {merge!r}.")
    return Parallel(tuple(as_layer("parallel", layer) for layer in layers), merge)


@dataclasses.dataclass(frozen=True, repr=False)
class Repeat(Composed):
    """A layer several times over. Made by ``repeat``, which see."""

    layer: Layer
    times: int

    def __repr__(self) -> str:
        return f"repeat({self.layer!r}, {self.times})"

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        keys = split_key("repeat", key, self.times)
        x = jax.ShapeDtypeStruct(shape_of("repeat", x), float_type(x))
        params, state = jax.vmap(lambda k: self.layer.init(k, x))(keys)
        one = jax.tree.map(lambda leaf: leaf[0], (params, state))
        y = jax.eval_shape(self.layer, one[0], x, one[1])
        if y.shape != x.shape:
            raise ValueError(f"repeat: {self.layer!r} makes {y.shape} of {x.shape}, expected the same shape.")
        return params, state

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        if bad := [jnp.shape(leaf) for leaf in jax.tree.leaves((params, state)) if jnp.shape(leaf)[:1] != (self.times,)]:
            raise ValueError(f"repeat: a leaf of params or state has shape {bad[0]}, expected a leading axis of {self.times}.")
        keys = None if key is None else split_key("repeat", key, self.times)
        x = array_of("repeat", x)
        x = x.astype(float_type(x))  # each turn has its dtype

        def body(x: jax.Array, given: Any) -> tuple[jax.Array, State]:
            own, old, k = given
            y, new = self.layer.apply(own, x, old, k, train)
            return y.astype(x.dtype), new

        return jax.lax.scan(body, x, (params, state, keys), length=self.times)


def repeat(layer: Any, times: int) -> Repeat:
    """A layer several times over, each time with parameters of its own, by a scan: one is traced and compiled.

    Args:
      layer: a layer or op whose output has the shape of its input. times: how often.
    Returns:
      A layer whose parameters, and state, are those of the layer with a leading axis.
    Raises:
      TypeError: where it is neither a layer nor an op. ValueError: where times is not positive, or shapes differ at ``init``.
    """
    require_positive("repeat", times=times)
    return Repeat(as_layer("repeat", layer), times)


@dataclasses.dataclass(frozen=True, repr=False)
class Named(Composed):
    """A layer whose output has a name for ``remat``. Made by ``named``, which see."""

    layer: Layer
    label: str

    def __repr__(self) -> str:
        return f"named({self.layer!r}, {self.label!r})"

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        return self.layer.init(key, x)

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        y, new = self.layer.apply(params, x, state, key, train)
        return checkpoint_name(y, self.label), new


def named(layer: Any, label: str) -> Named:
    """The layer, whose output ``remat(…, names=(label,))`` around it keeps."""
    return Named(as_layer("named", layer), label)


@dataclasses.dataclass(frozen=True, repr=False)
class Remat(Composed):
    """A layer that is run again in the backward. Made by ``remat``, which see."""

    layer: Layer
    policy: str | None = None
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        options = [f"{n}={getattr(self, n)!r}" for n in ("policy", "names") if getattr(self, n)]
        return f"remat({', '.join([repr(self.layer), *options])})"

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        return self.layer.init(key, x)

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        policies = jax.checkpoint_policies
        policy = policies.save_only_these_names(*self.names) if self.names else None
        if self.policy is not None:
            policy = getattr(policies, self.policy)

        def run(params: Params, x: jax.Array, state: State, key: Any) -> tuple[jax.Array, State]:
            return self.layer.apply(params, x, state, key, train)

        return jax.checkpoint(run, policy=policy)(params, jnp.asarray(x), state, key)


def remat(layer: Any, policy: str | None = None, names: Sequence[str] = ()) -> Remat:
    """A layer that keeps its input alone, and in the backward runs forward once more (``jax.checkpoint``).

    Args:
      layer: a layer or op.
      policy: the name of a policy in ``jax.checkpoint_policies`` that says what is kept beside, such as "dots_saveable"; or
      names: of outputs that are kept beside, given by ``named`` inside.
    Raises:
      TypeError: where it is neither a layer nor an op. ValueError: where the policy is unknown, or names come with a policy.
    """
    known = [name for name in dir(jax.checkpoint_policies) if name.endswith("saveable")]
    if policy is not None and (names or policy not in known):
        raise ValueError(f"remat: policy is {policy!r}, names {tuple(names)}; expected one of {', '.join(known)}, or names.")
    return Remat(as_layer("remat", layer), policy, tuple(names))
