"""Layers made of layers: ``serial`` runs them one after the other, ``residual`` adds what two of them give.

The backward of a chain is the chain of the backwards, in reverse order; at a sum dy goes to both branches, and where
two branches read the same x their cotangents add:

    y = fₙ(… f₁(x))              dxₙ₋₁ = fₙ.backward(dy), …, dx = f₁.backward(dx₁)
    y = shortcut(x) + body(x)    dx = shortcut.backward(dy) + body.backward(dy)
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.layers.activations import Activation
from fbackprop.layers.base import Layer, Params, State, Tape, array_of, fold_key, shape_of

__all__ = ["Residual", "Serial", "residual", "serial"]


@dataclasses.dataclass(frozen=True, repr=False)
class Serial(Layer):
    """Layers one after the other. Made by ``serial``, which see."""

    layers: tuple[Layer, ...]

    def __repr__(self) -> str:
        return f"serial({', '.join(map(repr, self.layers))})"

    @property
    def name(self) -> str:
        return "serial"

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        params, states = [], []
        x = jax.ShapeDtypeStruct(shape_of(self.name, x), jnp.result_type(x))
        for i, layer in enumerate(self.layers):
            with inside(self.name, i, layer):
                own, state = layer.init(fold_key(self.name, key, i), x)
                x = jax.eval_shape(layer, own, x, state)
            params.append(own)
            states.append(state)
        return {"layers": tuple(params)}, together(states)

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        y, states = array_of(self.name, x), []
        for i, (layer, own, old) in enumerate(entries(self.name, self.layers, params, state)):
            with inside(self.name, i, layer):
                y, new = layer.apply(own, y, old, fold_key(self.name, key, i), train)
            states.append(new)
        return y, together(states)

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        y, tapes, states = array_of(self.name, x), [], []
        for i, (layer, own, old) in enumerate(entries(self.name, self.layers, params, state)):
            with inside(self.name, i, layer):
                y, tape = layer.forward(own, y, old, fold_key(self.name, key, i), train)
            states.append(tape.state)
            tapes.append(dataclasses.replace(tape, state=()))  # kept once, in the state of the whole
        return y, Tape(tuple(tapes), together(states), (self.name, type(params["layers"])))

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        container = _record_of(self, tape, len(self.layers))
        dparams = []
        for i, (layer, own) in reversed(list(enumerate(zip(self.layers, tape.saved)))):
            with inside(self.name, i, layer):
                d, dy = layer.backward(own, dy)
            dparams.append(d)
        return {"layers": container(reversed(dparams))}, dy


def serial(*layers: Any) -> Serial:
    """Layers one after the other, as one layer.

    Args:
      layers: layers, or ops of one array such as ``ops.relu``.
    Returns:
      A layer whose parameters are ``{"layers": (…)}`` with an entry for each layer, ``{}`` where it has none; its state
      is alike, ``()`` if no layer has any. Layer ``i`` draws from ``jax.random.fold_in(key, i)``.
    Raises:
      TypeError: where something is neither a layer nor an op.
    """
    return Serial(tuple(as_layer("serial", layer) for layer in layers))


@dataclasses.dataclass(frozen=True, repr=False)
class Residual(Layer):
    """The sum of a body and a shortcut. Made by ``residual``, which see."""

    body: Layer
    shortcut: Layer | None = None

    def __repr__(self) -> str:
        return f"residual({self.body!r}{'' if self.shortcut is None else f', {self.shortcut!r}'})"

    @property
    def name(self) -> str:
        return "residual"

    @property
    def branches(self) -> dict[str, Layer]:
        """The layers by the name under which their parameters stand."""
        return {"body": self.body} if self.shortcut is None else {"body": self.body, "shortcut": self.shortcut}

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        params, states = {}, {}
        x = jax.ShapeDtypeStruct(shape_of(self.name, x), jnp.result_type(x))
        for i, (name, layer) in enumerate(self.branches.items()):
            with inside(self.name, name, layer):
                params[name], states[name] = layer.init(fold_key(self.name, key, i), x)
        state = states if any(s != () for s in states.values()) else ()
        jax.eval_shape(self, params, x, state)  # its check of the shapes
        return params, state

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        x, values, states = array_of(self.name, x), {}, {}
        for i, (name, layer) in enumerate(self.branches.items()):
            own, old = self._entry(params, state, name)
            with inside(self.name, name, layer):
                values[name], states[name] = layer.apply(own, x, old, fold_key(self.name, key, i), train)
        return self._sum(x, values), states if any(s != () for s in states.values()) else ()

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        x, values, states, tapes = array_of(self.name, x), {}, {}, {}
        for i, (name, layer) in enumerate(self.branches.items()):
            own, old = self._entry(params, state, name)
            with inside(self.name, name, layer):
                values[name], tape = layer.forward(own, x, old, fold_key(self.name, key, i), train)
            states[name], tapes[name] = tape.state, dataclasses.replace(tape, state=())
        record = (self.name, (x.dtype, tuple((n, v.dtype) for n, v in values.items())))
        return self._sum(x, values), Tape(tapes, states if any(s != () for s in states.values()) else (), record)

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        x_dtype, dtypes = _record_of(self, tape, len(self.branches))
        dy = jnp.asarray(dy)
        dparams, dx = {}, dy.astype(x_dtype) if self.shortcut is None else None
        for name, dtype in dtypes:
            layer = self.branches[name]
            with inside(self.name, name, layer):
                dparams[name], d = layer.backward(tape.saved[name], dy.astype(dtype))
            dx = d if dx is None else dx if d is None else dx + d
        return dparams, dx

    def _entry(self, params: Params, state: State, name: str) -> tuple[Params, State]:
        if not isinstance(params, dict) or set(params) != set(self.branches):
            raise ValueError(
                f"residual: params is {_describe(params)}, expected a dict of {list(self.branches)}, as init gave."
            )
        if isinstance(state, dict) and set(state) != set(self.branches):
            raise ValueError(f"residual: state is {_describe(state)}, expected () or a dict of {list(self.branches)}.")
        return params[name], state[name] if isinstance(state, dict) else ()

    def _sum(self, x: jax.Array, values: dict[str, jax.Array]) -> jax.Array:
        body, other = values["body"], values.get("shortcut", x)
        if body.shape != other.shape:
            what = "x" if self.shortcut is None else "the shortcut's output"
            raise ValueError(
                f"residual: the body's output has shape {body.shape} and {what} {other.shape}, expected the same "
                f"(x {x.shape}); give a shortcut that brings x to the shape of the body."
            )
        return other + body


def residual(body: Any, shortcut: Any = None) -> Residual:
    """The sum y = shortcut(x) + body(x); without a shortcut, y = x + body(x).

    Args:
      body, shortcut: layers whose outputs have the same shape.
    Returns:
      A layer whose parameters are ``{"body": …}``, with ``"shortcut"`` where there is one; its state is alike, ``()`` if
      neither has any.
    Raises:
      ValueError: at ``init`` or at a call, where the shapes differ.
    Source: He et al. 2015, arXiv:1512.03385.
    """
    return Residual(as_layer("residual", body), None if shortcut is None else as_layer("residual", shortcut))


def as_layer(who: str, layer: Any) -> Layer:
    if isinstance(layer, Layer):
        return layer
    if hasattr(layer, "rule"):
        return Activation(layer)
    hint = f"; write {layer.__name__}(…)" if isinstance(layer, type) and issubclass(layer, Layer) else ""
    raise TypeError(f"{who}: expected layers or ops, got {getattr(layer, '__name__', repr(layer))}{hint}.")


def entries(who: str, layers: Sequence[Layer], params: Params, state: State) -> list[tuple[Layer, Params, State]]:
    """Each layer with its parameters and its state; refuses what is not ``{"layers": (…)}`` with an entry for each."""
    n = len(layers)
    if not _holds(params, n):
        raise ValueError(f"{who}: params is {_describe(params)}, expected {{'layers': …}} with {n} entries, as init gave.")
    if not _holds(state, n) and not (isinstance(state, Sequence) and not state):
        raise ValueError(f"{who}: state is {_describe(state)}, expected () or {{'layers': …}} with {n} entries.")
    states = state["layers"] if isinstance(state, dict) else ((),) * n
    return list(zip(layers, params["layers"], states))


def together(states: Sequence[State]) -> State:
    """The state of several layers as one."""
    return {"layers": tuple(states)} if any(s != () for s in states) else ()


def _holds(tree: Any, n: int) -> bool:
    return isinstance(tree, dict) and set(tree) == {"layers"} and len(tree["layers"]) == n


def _describe(tree: Any) -> str:
    if isinstance(tree, dict) and "layers" in tree:
        return f"{{'layers': …}} with {len(tree['layers'])} entries"
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], dict):
        return "a tuple of two (init gives params and state)"
    return f"a dict of {sorted(map(str, tree))}" if isinstance(tree, dict) else f"a {type(tree).__name__}"


def _record_of(layer: Layer, tape: Any, n: int) -> Any:
    record = getattr(tape, "record", None)
    if not isinstance(record, tuple) or record[0] != layer.name or len(tape.saved) != n:
        raise TypeError(f"{layer.name}.backward: expected the tape of this layer's forward (layer {layer!r}).")
    return record[1]


@contextlib.contextmanager
def inside(who: str, where: int | str, layer: Layer) -> Iterator[None]:
    """Adds to an error which of the layers raised it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"In {who}, layer {where}: {layer!r}.")
        raise
