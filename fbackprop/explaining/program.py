"""The program of a function in which every op call is one node, and JAX's own operations stand between them.

Under the switch ``recorder=mark`` each op binds a primitive of ours in place of its rule, and ``jax.make_jaxpr`` gives the
program. It is then laid flat: what ``jit`` and ``jax.checkpoint`` hold is inlined, a scan that holds ops is unrolled step by
step (a node ``unstack`` hands out the slices, a node ``stack`` puts the results together). Other programs inside of which an
op stands (``vmap``, ``while``, ``cond``, other people's derivatives, ``shard_map``) are refused: what one call of the op
does there is not one record.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Literal,
)

from fbackprop import context
from fbackprop.explaining.marking import PRIMITIVE, Call, mark, paths_of, refuse

__all__ = ["Call", "Node", "Program", "inside", "is_float", "paths_of", "scan_counts", "traced"]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An op call, or an operation of JAX. Inputs and outputs are numbers of values."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Callable[..., list[Any]] | None = None  # of an operation of JAX
    call: Call | None = None  # of an op

    def pull(self, given: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        """The cotangents of the floating-point inputs of an operation of JAX, None for the others."""
        assert self.run is not None
        if self.name == "unstack":
            return [jnp.stack(list(cotangents))]
        floats = [i for i, d in enumerate(cotangents) if d is not None]
        moved, of = self.of_floats(given, floats)
        found = iter(jax.vjp(of, *(given[i] for i in moved))[1]([cotangents[i] for i in floats]))
        return [next(found) if i in moved else None for i in range(len(given))]

    def of_floats(self, given: Sequence[Any], outputs: Sequence[int]) -> tuple[list[int], Callable[..., list[Any]]]:
        """The places of the floating-point inputs, and the operation as a function of these alone, with some outputs."""
        moved = [i for i, v in enumerate(given) if is_float(v)]

        def of(*values: Any) -> list[Any]:
            every = list(given)
            for i, value in zip(moved, values):
                every[i] = value
            results = self.run(*every)  # type: ignore[misc]
            return [results[o] for o in outputs]

        return moved, of


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flat program over numbered values. Holds no arrays."""

    nodes: tuple[Node, ...]
    types: tuple[Any, ...]  # of each value
    arguments: tuple[int, ...]
    constants: tuple[int, ...]  # what the function closed over
    literals: dict[int, Any]
    outputs: tuple[int, ...]

    @functools.cached_property
    def moving(self) -> frozenset[int]:
        """The floating-point values that depend on a floating-point argument."""
        return self.depending(self.arguments)

    def depending(self, on: Sequence[int]) -> frozenset[int]:
        """The floating-point values that depend on one of these, by way of floating-point values."""
        found = {v for v in on if is_float(self.types[v])}
        for node in self.nodes:
            if not found.isdisjoint(node.inputs):
                found.update(v for v in node.outputs if is_float(self.types[v]))
        return frozenset(found)


def is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


# From the traced program to the flat one.

_INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_REFUSED = {
    "while": ("inside of jax.lax.while_loop, or a fori_loop whose length is not known", "use jax.lax.scan"),
    "cond": ("in a branch of jax.lax.cond or switch", "choose the branch with a Python if before"),
    "shard_map": ("inside of jax.shard_map", "explain the function of one device"),
    "custom_jvp_call": ("inside of a function with a jax.custom_jvp", "explain the function without it"),
    "custom_vjp_call": ("inside of a function with a jax.custom_vjp", "explain the function without it"),
}


def traced(fn: Callable[..., Any], leaves: Sequence[Any]) -> tuple[Program, list[Any]]:
    """The program of a function of flat arrays that returns a list of arrays, and the arrays that it closed over."""

    def fresh(*given: Any) -> Any:  # a function of its own at each call: what it closes over may have changed
        return fn(*given)

    with context.switched(recorder=mark):
        closed = jax.make_jaxpr(fresh)(*leaves)
    flat = _Flattening()
    arguments = [flat.value(v.aval) for v in closed.jaxpr.invars]
    constants = [flat.value(v.aval) for v in closed.jaxpr.constvars]
    outputs = flat.inline(closed.jaxpr, arguments, constants)
    nodes = _needed(flat.nodes, outputs)
    program = Program(nodes, tuple(flat.types), tuple(arguments), tuple(constants), flat.literals, tuple(outputs))
    return program, list(closed.consts)


def _needed(nodes: list[Node], outputs: Sequence[int]) -> tuple[Node, ...]:
    """All ops, and of JAX's operations those that an op or an output depends on."""
    live, kept = set(outputs), []
    for node in reversed(nodes):
        if node.call is not None or not live.isdisjoint(node.outputs):
            live.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


class _Flattening:
    """Lays a jaxpr flat, keeping count of values and nodes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.types: list[Any] = []
        self.literals: dict[int, Any] = {}

    def value(self, aval: Any) -> int:
        self.types.append(aval)
        return len(self.types) - 1

    def constant(self, aval: Any, value: Any) -> int:
        number = self.value(aval)
        self.literals[number] = value
        return number

    def inline(self, jaxpr: Any, inputs: Sequence[int], constants: Sequence[int]) -> list[int]:
        known = dict(zip((*jaxpr.invars, *jaxpr.constvars), (*inputs, *constants)))

        def read(atom: Any) -> int:
            return self.constant(atom.aval, atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            given = [read(v) for v in equation.invars]
            known.update(zip(equation.outvars, self._results(equation, given)))
        return [read(v) for v in jaxpr.outvars]

    def _results(self, equation: Any, given: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if equation.primitive is PRIMITIVE:
            return self._node(params["call"].rule.name, given, equation, call=params["call"])
        if all(_first_op(p) is None for p in inside(params)):
            return self._node(
                str(params.get("name") or name).strip("_<>"), given, equation, run=functools.partial(_bound, equation)
            )
        if name == "scan":
            return self._unrolled(params, given)
        if name in _INLINED or type(params.get("_prim")).__name__ == "RematTraced":  # the latter with JAX_REMAT3
            return self._inlined(inside(params)[0], given)
        first = next(c for p in inside(params) if (c := _first_op(p)))
        refuse(first.rule.name, *_REFUSED.get(name, (f"inside of {name}", "call it outside of that")))

    def _node(self, name: str, given: list[int], equation: Any, **more: Any) -> list[int]:
        outputs = [self.value(v.aval) for v in equation.outvars]
        self.nodes.append(Node(name, tuple(given), tuple(outputs), **more))
        return outputs

    def _inlined(self, program: Any, given: Sequence[int]) -> list[int]:
        if not isinstance(program, ClosedJaxpr):
            return self.inline(program, given, ())
        constants = [self.constant(v.aval, c) for v, c in zip(program.jaxpr.constvars, program.consts)]
        return self.inline(program.jaxpr, given, constants)

    def _unrolled(self, params: dict[str, Any], given: list[int]) -> list[int]:
        body, length = params["jaxpr"], params["length"]
        fixed, carried = scan_counts(params)
        slices = []
        for whole in given[fixed + carried :]:
            aval = self.types[whole]
            parts = [self.value(aval.update(shape=aval.shape[1:])) for _ in range(length)]
            if length:
                self.nodes.append(Node("unstack", (whole,), tuple(parts), _unstack))
            slices.append(parts)
        carry, rows = given[fixed : fixed + carried], {}
        for i in range(length)[:: -1 if params["reverse"] else 1]:
            results = self._inlined(body, [*given[:fixed], *carry, *(parts[i] for parts in slices)])
            carry, rows[i] = results[:carried], results[carried:]
        stacked = []
        for j, aval in enumerate(v.aval for v in body.jaxpr.outvars[carried:]):
            stacked.append(self.value(aval.update(shape=(length, *aval.shape))))
            column = tuple(rows[i][j] for i in range(length))
            self.nodes.append(Node("stack", column, (stacked[-1],), functools.partial(_stack, aval)))
        return [*carry, *stacked]


def _unstack(whole: Any) -> list[Any]:
    return [whole[i] for i in range(whole.shape[0])]


def _stack(aval: Any, *parts: Any) -> list[Any]:
    return [jnp.stack(parts) if parts else jnp.zeros((0, *aval.shape), aval.dtype)]


def _bound(equation: Any, *given: Any) -> list[Any]:
    """An equation, run as it was traced."""
    with equation.ctx.manager:
        out = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
    return list(out) if equation.primitive.multiple_results else [out]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan stay the same, and how many are carried."""
    if "ft_in" in params:  # jax 0.12
        fixed, carried = (len(part) for part in params["ft_in"].unpack()[:2])
        return fixed, carried
    return params["num_consts"], params["num_carry"]


def inside(params: dict[str, Any]) -> list[Any]:
    """The programs that stand inside of an equation."""
    params = {**params, **getattr(params.get("_prim"), "params", {})}
    params = {**params, **getattr(params.get("_prim"), "params", {})}  # what JAX_REMAT3 makes of jax.checkpoint
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda p: hasattr(p, "eqns") or isinstance(p, ClosedJaxpr))
    return [p for p in leaves if hasattr(p, "eqns") or isinstance(p, ClosedJaxpr)]


def _first_op(program: Any) -> Call | None:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        if equation.primitive is PRIMITIVE:
            return equation.params["call"]
        for inner in inside(equation.params):
            if (found := _first_op(inner)) is not None:
                return found
    return None
