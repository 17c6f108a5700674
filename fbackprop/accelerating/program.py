"""A traced program as a graph: values, the equations that make them, and who uses them.

Every plain ``jit`` is inlined, so that a library's helper functions do not hide what is computed. Programs that stand inside of
an equation (the body of a scan, a branch, somebody's custom derivative) stay inside of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Jaxpr,
    Literal,
)

__all__ = ["Equation", "Program", "Region", "Value", "inside", "is_inlined", "line_of", "region", "scan_counts"]


class Value:
    """One array of a program."""

    __slots__ = ("aval", "constant", "maker", "users")

    def __init__(self, aval: Any, maker: "Equation | None" = None, constant: Any = None):
        self.aval = aval
        self.maker = maker
        self.constant = constant  # a literal, or an array that the function closed over
        self.users: list[Equation] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def dtype(self) -> Any:
        return getattr(self.aval, "dtype", None)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_float(self) -> bool:
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def known(self) -> np.ndarray | None:
        """The numbers of a constant that is not traced."""
        if self.constant is None or isinstance(self.constant, Tracer) or not hasattr(self.dtype, "itemsize"):
            return None
        if jnp.issubdtype(self.dtype, jax.dtypes.extended):
            return None
        return np.asarray(self.constant)

    @property
    def number(self) -> float | None:
        """The value of a known scalar."""
        return float(self.known) if self.known is not None and self.shape == () else None


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """One equation; ``again`` is the one of the traced program, to be bound again, ``called`` the outermost jit around it."""

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    again: Any
    called: Any
    order: int


@dataclasses.dataclass(eq=False)
class Program:
    """A flat program. ``outputs`` may repeat inputs or constants."""

    inputs: list[Value]
    outputs: list[Value]
    equations: list[Equation]

    @classmethod
    def of(cls, jaxpr: Any, consts: Sequence[Any] = ()) -> "Program":
        """From a jaxpr, closed or with its constants."""
        if isinstance(jaxpr, ClosedJaxpr):
            jaxpr, consts = jaxpr.jaxpr, jaxpr.consts
        equations: list[Equation] = []
        literals: dict[int, Value] = {}

        def value(atom: Any, known: dict[Any, Value]) -> Value:
            if not isinstance(atom, Literal):
                return known[atom]
            return literals.setdefault(id(atom), Value(atom.aval, constant=atom.val))

        def inline(jaxpr: Jaxpr, known: dict[Any, Value], called: Any) -> list[Value]:
            for equation in jaxpr.eqns:
                inputs = [value(v, known) for v in equation.invars]
                name = equation.primitive.name.replace("-", "_")
                if is_inlined(name, equation.params):
                    inner = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
                    body, closed = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
                    within = {v: Value(v.aval, constant=c) for v, c in zip(body.constvars, closed)}
                    within.update(zip(body.invars, inputs))
                    outputs = inline(body, within, called or equation)
                else:
                    made = Equation(name, equation.params, inputs, [], equation, called or equation, len(equations))
                    outputs = made.outputs = [Value(v.aval, made) for v in equation.outvars]
                    equations.append(made)
                known.update(zip(equation.outvars, outputs))
            return [value(v, known) for v in jaxpr.outvars]

        inputs = [Value(v.aval) for v in jaxpr.invars]
        known = {v: Value(v.aval, constant=c) for v, c in zip(jaxpr.constvars, consts)}
        known.update(zip(jaxpr.invars, inputs))
        outputs = inline(jaxpr, known, None)
        return cls(inputs, outputs, _alive(equations, outputs))


def _alive(equations: list[Equation], outputs: list[Value]) -> list[Equation]:
    """Those that the outputs need, or that have effects; sets the users of every value."""
    live, kept = set(map(id, outputs)), []
    for equation in reversed(equations):
        if equation.again.effects or any(id(v) in live for v in equation.outputs):
            live.update(map(id, equation.inputs))
            kept.append(equation)
            for v in equation.inputs:
                v.users.append(equation)
    return kept[::-1]


def is_inlined(name: str, params: dict[str, Any]) -> bool:
    """A jit that asks for no placement of its own, or a plain call."""
    if name in ("closed_call", "core_call"):
        return True
    given = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    return name in ("jit", "pjit") and all(type(s).__name__ == "UnspecifiedValue" for s in given)


def inside(equation: Equation) -> list[Any]:
    """The programs that stand inside of an equation."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: isinstance(p, (Jaxpr, ClosedJaxpr)))
    return [p for p in leaves if isinstance(p, (Jaxpr, ClosedJaxpr))]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan stay the same, and how many are carried."""
    if "ft_in" in params:  # jax 0.12
        fixed, carried = (len(part) for part in params["ft_in"].unpack()[:2])
        return fixed, carried
    return params["num_consts"], params["num_carry"]


@dataclasses.dataclass(eq=False)
class Region:
    """Equations between some values and others, in order."""

    inputs: list[Value]
    outputs: list[Value]
    equations: list[Equation]
    moving: set[int]  # ids of the values that depend on the inputs

    def leaks(self, program: Program) -> list[Value]:
        """Floating-point values between inputs and outputs that are used outside of the region."""
        own = set(map(id, self.equations))
        kept = {id(v) for v in (*self.outputs, *self.inputs)}
        results = set(map(id, program.outputs))
        return [
            v
            for e in self.equations
            for v in e.outputs
            if v.is_float and id(v) in self.moving and id(v) not in kept
            and (id(v) in results or any(id(u) not in own for u in v.users))
        ]  # fmt: skip


def region(inputs: Sequence[Value], outputs: Sequence[Value], most: int = 400) -> Region | None:
    """The equations that make the outputs from the inputs; None where they need anything else that is not a constant."""
    stop = set(map(id, inputs))
    found: dict[int, Equation] = {}
    pending = [v for v in outputs if id(v) not in stop]
    while pending:
        value = pending.pop()
        if id(value) in stop or value.known is not None:
            continue
        maker = value.maker
        if maker is None or len(found) > most:
            return None
        if maker.order not in found:
            found[maker.order] = maker
            pending += maker.inputs
    equations = [found[i] for i in sorted(found)]
    moving = set(stop)
    for equation in equations:
        if any(id(v) in moving for v in equation.inputs):
            moving.update(map(id, equation.outputs))
    return Region(list(inputs), list(outputs), equations, moving)


def line_of(equation: Any) -> str:
    """Where an equation was written: the first line that is not a library's, and the names of the scopes around it."""
    scope = str(equation.source_info.name_stack)
    frames = getattr(equation.source_info.traceback, "frames", None) or ()
    chosen = next((f for f in frames if _is_own(f.file_name)), None)
    chosen = chosen or next((f for f in frames if "/jax/" not in f.file_name and "/fbackprop/" not in f.file_name), None)
    place = f"{chosen.file_name.rsplit('/', 1)[-1]}:{chosen.line_num}" if chosen else ""
    return " ".join(part for part in (place, scope) if part)


def _is_own(file: str) -> bool:
    return not any(part in file for part in ("site-packages", "dist-packages", "/fbackprop/", "<frozen", "/lib/python"))
