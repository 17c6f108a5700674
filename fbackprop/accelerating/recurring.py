"""Finds recurrent networks: scans whose body is a cell of ``fb.lstm`` or ``fb.gru``.

The gates of a cell are a nonlinearity of something affine in the step's input x and the state h, or a gate times h. ``_Body``
runs a body with such values written as x · X + h · H + (gate · h) · R + b, so that products, sums, slices, concatenations and
forget biases, in whatever order a library has them, end in a few arrays a gate. Those are laid side by side as our ops want
them; which gate is which is tried, and one step of the result is proved against the body.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program, Value, scan_counts
from fbackprop.accelerating.sites import Near, Site, proved

__all__ = ["recurrences"]


@dataclasses.dataclass(frozen=True)
class _Affine:
    """x · parts["x"] + h · parts["h"] + (r · h) · parts["r"] + parts["b"], each missing where it is 0, with a gate r. Features
    lie along ``axis`` of two."""

    parts: dict[str, Any]
    axis: int = 1

    def each(self, change: Callable[[Any], Any]) -> "_Affine":
        return _Affine({k: change(v) for k, v in self.parts.items()}, self.axis)


@dataclasses.dataclass(frozen=True)
class _State:
    """The input x, the state h or a gate times it, r, or several side by side: names and widths."""

    pieces: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class _Gate:
    kind: str
    inside: _Affine


@dataclasses.dataclass(frozen=True)
class _Gated:
    """A gate times something affine, or the sum of that and something affine."""

    gate: _Gate
    scaled: _Affine
    added: _Affine | None = None


class _Opaque:
    """Anything else."""


_OPAQUE = _Opaque()


def recurrences(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    for equation in program.equations:
        if equation.name != "scan" or id(equation) in taken:
            continue
        p = equation.params
        fixed, carried = scan_counts(p)
        body = Program.of(p["jaxpr"])
        state, xs = body.inputs[fixed : fixed + carried], body.inputs[fixed + carried :]
        squashed = {e.name for e in body.equations}
        if not {"logistic", "tanh"} <= squashed or "dot_general" not in squashed:
            continue
        name = "gru" if carried == 1 else "lstm"
        if carried > 2:
            yield Near(name, f"{carried} arrays are carried, not the state of one cell", equation)
        elif len(xs) != 1:
            yield Near(name, f"a step is given {len(xs)} arrays, not x alone", equation)
        elif any(len(v.shape) != 2 for v in (*state, *xs)):
            yield Near(name, "its state or input has no batch, or more than one", equation)
        else:
            yield _recurrence(equation, body, fixed, carried, name)


def _recurrence(equation: Equation, body: Program, fixed: int, carried: int, name: str) -> Site | Near:
    reverse, why = bool(equation.params["reverse"]), "the body is another cell"
    news = body.outputs[:carried]
    for guess in _guesses(name):
        kept = [next((i for i, new in enumerate(news) if new is y), None) for y in body.outputs[carried:]]
        if any(k != guess.hidden for k in kept):
            why = "it returns more than h of each step"
            continue
        call = functools.partial(_call, body, fixed, guess, reverse, len(kept))

        def step(*args: Any, call: Any = call) -> tuple[Any, ...]:
            out = call(*args[:-1], args[-1][None])
            return (*out[:carried], *(y[0] for y in out[carried:]))

        whole = [(v, a) for v in body.inputs for a in range(len(v.shape))]
        site = Site(name, body.inputs, body.outputs, step, (guess, reverse), equation, whole=whole)
        told = proved(body, site, leaks=True)
        if not told:
            return Site(name, equation.inputs, equation.outputs, call, (), equation, equations=[equation])
        why = told
    return Near(name, why, equation)


@dataclasses.dataclass(frozen=True)
class _Guess:
    name: str
    hidden: int  # the place of h in the carry
    order: tuple[int, ...]  # which sigmoid is which: i, f, o of an LSTM; r, z of a GRU
    flipped: bool = False  # a GRU whose z keeps the new state and not the old one


def _guesses(name: str) -> Iterator[_Guess]:
    if name == "lstm":
        for hidden, order in itertools.product((1, 0), ((0, 1, 2), (1, 0, 2), *itertools.permutations(range(3)))):
            yield _Guess(name, hidden, order)
    else:
        for order, flipped in itertools.product(((0, 1), (1, 0)), (False, True)):
            yield _Guess(name, 0, order, flipped)


def _call(body: Program, fixed: int, guess: _Guess, reverse: bool, ys: int, *args: Any) -> tuple[Any, ...]:
    """The outputs of the scan from its inputs."""
    consts, state, xs = args[:fixed], args[fixed:-1], args[-1]
    hidden = state[guess.hidden]
    run = _Body(body, fixed, guess.hidden, consts)
    width, features, dtype = hidden.shape[-1], xs.shape[-1], hidden.dtype
    sigmoids = [run.sigmoids[i].inside for i in guess.order if i < len(run.sigmoids)]

    def side_by_side(affine: Sequence[_Affine], part: str, rows: int) -> Any:
        empty = jnp.zeros((rows, width) if rows else (width,), dtype)
        return jnp.concatenate([_whole(a.parts.get(part), empty) for a in affine], -1)

    if guess.name == "lstm":
        if len(run.sigmoids) != 3 or len(run.tanhs) != 1:
            raise ValueError("not the gates of an LSTM")
        i, f, o = sigmoids
        gates = [i, f, run.tanhs[0].inside, o]
        kernel, recurrent = side_by_side(gates, "x", features), side_by_side(gates, "h", width)
        before = state[1 - guess.hidden], hidden
        h, (c, last) = ops.lstm(xs, kernel, recurrent, side_by_side(gates, "b", 0), before, reverse=reverse)
        news = (last, c) if guess.hidden == 0 else (c, last)
        return (*news, *[h] * ys)
    if len(run.sigmoids) != 2:
        raise ValueError("not the gates of a GRU")
    r, z = sigmoids
    z = z.each(jnp.negative) if guess.flipped else z
    inner = None
    if len(run.gated) == 1 and run.gated[0].added is not None:  # the reset gate behind the product of h
        new, scaled = run.gated[0].added, run.gated[0].scaled
        new_recurrent, inner = side_by_side([scaled], "h", width), side_by_side([scaled], "b", 0)
        if "x" in scaled.parts or "h" in new.parts:
            raise ValueError("something else stands in the reset gate")
    elif len(run.tanhs) == 1 and "r" in run.tanhs[0].inside.parts:  # before it
        new = run.tanhs[0].inside
        new_recurrent = side_by_side([new], "r", width)
    else:
        raise ValueError("not the gates of a GRU")
    kernel, bias = (side_by_side([r, z, new], part, rows) for part, rows in (("x", features), ("b", 0)))
    recurrent = jnp.concatenate([side_by_side([r, z], "h", width), new_recurrent], -1)
    h, last = ops.gru(
        xs, kernel, recurrent, bias, hidden, recurrent_bias=inner, reverse=reverse, reset_after=inner is not None
    )  # fmt: skip
    return (last, *[h] * ys)


def _whole(part: Any, empty: Any) -> Any:
    """A part of a gate, zeros where there is none; a bias that was a number as a row."""
    if part is None:
        return empty
    return jnp.broadcast_to(part, empty.shape) if jnp.ndim(part) < empty.ndim else part


class _Body:
    """A body run on values that are invariant arrays, the input, the state, affine in both, or opaque."""

    def __init__(self, body: Program, fixed: int, hidden: int, consts: Sequence[Any]):
        self.sigmoids: list[_Gate] = []
        self.tanhs: list[_Gate] = []
        self.gated: list[_Gated] = []
        self._known: dict[int, Any] = dict(zip(map(id, body.inputs), consts))
        self._rows: dict[int, Any] = {}  # biases that were spread over the batch, as they were before
        for v in body.inputs[fixed:-1]:
            self._known[id(v)] = _OPAQUE
        state, x = body.inputs[fixed + hidden], body.inputs[-1]
        self._known[id(state)] = _State((("h", state.shape[-1]),))
        self._known[id(x)] = _State((("x", x.shape[-1]),))
        self._width = state.shape[-1]
        for equation in body.equations:
            given = [self._read(v) for v in equation.inputs]
            if all(isinstance(g, (jax.Array, float, int)) or hasattr(g, "dtype") for g in given):
                again = equation.again
                out = again.primitive.bind(*given, **again.primitive.get_bind_params(again.params))
                results = list(out) if again.primitive.multiple_results else [out]
                if equation.name == "broadcast_in_dim" and equation.params["broadcast_dimensions"] == (1,):
                    self._rows[id(equation.outputs[0])] = given[0][None]
            else:
                results = self._step(equation, [self._rows.get(id(v), g) for v, g in zip(equation.inputs, given)])
            self._known.update(zip(map(id, equation.outputs), results))
        used = {id(v) for e in body.equations for v in e.inputs}
        gates = {id(g): g for k, g in self._known.items() if isinstance(g, _Gate) and k in used and self._is_one(g)}
        self.sigmoids = [g for g in gates.values() if g.kind == "logistic"]
        self.tanhs = [g for g in gates.values() if g.kind == "tanh"]

    def _is_one(self, gate: _Gate) -> bool:
        widths = {jnp.shape(v)[-1] for k, v in gate.inside.parts.items() if k != "b"}
        return widths == {self._width} and bool({"h", "r"} & gate.inside.parts.keys())

    def _read(self, value: Value) -> Any:
        return self._known.get(id(value), value.constant)

    def _step(self, equation: Equation, given: list[Any]) -> list[Any]:
        name, p = equation.name, equation.params
        try:
            if name == "split" and isinstance(given[0], (_Affine, _Gate)):
                starts = itertools.accumulate((0, *(int(n) for n in p["sizes"])))
                return [_sliced(given[0], int(p["axis"]), a, a + int(n)) for a, n in zip(starts, p["sizes"])]
            result = self._single(name, p, given)
        except (KeyError, TypeError, ValueError):
            result = None
        return [_OPAQUE if result is None else result] * len(equation.outputs)

    def _single(self, name: str, p: dict[str, Any], given: list[Any]) -> Any:
        first, *rest = given
        if name == "dot_general":
            return _product(p, *given)
        if name == "concatenate" and all(isinstance(g, _State) for g in given) and p["dimension"] == 1:
            return _State(tuple(piece for g in given for piece in g.pieces))
        if name == "slice" and isinstance(first, (_Affine, _Gate)):
            axis = first.axis if isinstance(first, _Affine) else first.inside.axis
            return _sliced(first, axis, p["start_indices"][axis], p["limit_indices"][axis])
        if name == "transpose" and isinstance(first, _Affine):
            return _Affine(first.parts, 1 - first.axis)
        if name in ("convert_element_type", "copy") and not isinstance(first, _Opaque):
            return first
        if name == "add" and any(isinstance(g, (_Affine, _Gated)) for g in given):
            return _sum(first, rest[0])
        if name in ("logistic", "tanh") and isinstance(first, _Affine):
            return _Gate(name, first)
        if name == "tanh" and isinstance(first, _Gated):
            self.gated.append(first)
        if name == "mul":
            return self._scaled(first, rest[0])
        return None

    @staticmethod
    def _scaled(a: Any, b: Any) -> Any:
        if isinstance(b, _Gate):
            a, b = b, a
        if not isinstance(a, _Gate) or a.kind != "logistic":
            return None
        if isinstance(b, _State) and [name for name, _ in b.pieces] == ["h"]:
            return _State((("r", b.pieces[0][1]),))
        return _Gated(a, b) if isinstance(b, _Affine) else None


def _product(p: dict[str, Any], a: Any, b: Any) -> _Affine | None:
    ((left,), (right,)), batch = p["dimension_numbers"]
    if any(batch) or p.get("precision") is not None:
        return None
    last = isinstance(b, _State)
    state, of_state = (b, right) if last else (a, left)
    weights: Any = a if last else b
    axis, features = (left, 0) if last else (right, 1)
    if not isinstance(state, _State) or isinstance(weights, _State) or of_state != 1 or jnp.ndim(weights) != 2:
        return None
    weights = weights if axis == 0 else weights.T
    parts: dict[str, Any] = {}
    ends = list(itertools.accumulate(n for _, n in state.pieces))
    for (name, n), end in zip(state.pieces, ends):
        if name in parts:
            return None
        parts[name] = weights[end - n : end]
    return _Affine(parts, features)


def _sum(a: Any, b: Any) -> Any:
    if isinstance(b, _Gated):
        a, b = b, a
    if isinstance(a, _Gated):
        return _Gated(a.gate, a.scaled, b) if isinstance(b, _Affine) and a.added is None else None
    if isinstance(b, _Affine) and isinstance(a, _Affine):
        if a.axis != b.axis:
            return None
        parts = dict(a.parts)
        for k, v in b.parts.items():
            parts[k] = parts[k] + v if k in parts else v
        return _Affine(parts, a.axis)
    affine: Any = a if isinstance(a, _Affine) else b
    array: Any = b if affine is a else a
    if isinstance(array, (_State, _Gate, _Opaque)):
        return None
    if jnp.ndim(array) == 2:
        # Along the features only, spread over the batch; else it is nothing that belongs to a gate.
        if jnp.shape(array)[1 - affine.axis] != 1:
            return None
        array = jnp.squeeze(array, 1 - affine.axis)
    return _sum(affine, _Affine({"b": array}, affine.axis))


def _sliced(value: Any, axis: int, start: int, stop: int) -> Any:
    if isinstance(value, _Gate):
        inside = _sliced(value.inside, axis, start, stop)
        return None if inside is None else _Gate(value.kind, inside)
    if axis != value.axis:
        return None
    return value.each(lambda v: v[..., start:stop] if jnp.ndim(v) else v)
