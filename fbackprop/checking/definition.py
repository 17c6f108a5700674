"""The definition behind a function: the program that JAX traces from it, run in two ways.

``opened`` runs it as it is, but for other people's ``custom_vjp``, which are opened: their undecorated function runs, so
that JAX differentiates the definition and not the rule. A ``custom_jvp`` counts as the definition.

``widened`` runs the same program in float64, whatever precision it asks for inside: a cast to float32 or bfloat16 is
the identity, a matmul gives float64, constants are widened. It is the program that was traced at the dtypes of the
arguments, so it takes the same branches, adds the same epsilon, and draws the same random bits. What cannot be widened (a
callback, a kernel) runs in the precision that it asks for, and is told.

Both walk over the equations of the traced program. What was differentiated inside the function itself, before the
walk, keeps the rules that it was differentiated with.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
)

__all__ = ["Definition", "definition_of", "primitives_of"]

Leaves = Sequence[Any]
Flat = Callable[[Leaves, Leaves], tuple[list[Any], list[Any]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """The traced program of a function of (differentiated leaves, other leaves), and how many of its outputs are floats."""

    flat: Flat
    program: ClosedJaxpr
    floats: int
    wide: bool  # traced with 64-bit types enabled
    rules: bool  # there is a custom_vjp in it
    narrow: set[str] = dataclasses.field(default_factory=set)
    """What could not be widened, known after ``widened`` has been traced."""

    def opened(self, floats: Leaves, arrays: Leaves) -> tuple[list[Any], list[Any]]:
        return self.walked(floats, arrays) if self.rules else self.flat(floats, arrays)

    def walked(self, floats: Leaves, arrays: Leaves) -> tuple[list[Any], list[Any]]:
        """Equation by equation, every ``jit`` inlined."""
        return self._run(_Walk(False, self.wide, set()), floats, arrays)

    def widened(self, floats: Leaves, arrays: Leaves) -> tuple[list[Any], list[Any]]:
        """Under 64-bit types."""
        return self._run(_Walk(True, self.wide, self.narrow), floats, arrays)

    def _run(self, walk: "_Walk", floats: Leaves, arrays: Leaves) -> tuple[list[Any], list[Any]]:
        out = walk.closed(self.program, [*floats, *arrays])
        return out[: self.floats], out[self.floats :]


def definition_of(flat: Flat, floats: Leaves, arrays: Leaves) -> Definition:
    """Traces the function at these leaves, under the caller's configuration."""
    counts = []

    def outputs(floats: Leaves, arrays: Leaves) -> list[Any]:
        y, others = flat(floats, arrays)
        counts.append(len(y))
        return [*y, *others]

    program = jax.make_jaxpr(outputs)(list(floats), list(arrays))
    return Definition(flat, program, counts[-1], jnp.result_type(float) == jnp.float64, _has_rules(program.jaxpr))


def _has_rules(jaxpr: Jaxpr) -> bool:
    return any(_rule_of(e) is not None or any(map(_has_rules, _inner(e))) for e in jaxpr.eqns)


def primitives_of(jaxpr: Jaxpr) -> set[str]:
    """The names of all equations of a program and of the programs in it."""
    return {e.primitive.name for e in jaxpr.eqns}.union(*(primitives_of(j) for e in jaxpr.eqns for j in _inner(e)))


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: isinstance(p, (Jaxpr, ClosedJaxpr)))
    return [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in leaves if isinstance(p, (Jaxpr, ClosedJaxpr))]


def _rule_of(equation: JaxprEqn) -> Any:
    """The undecorated program of a custom_vjp, in the forms that the versions of JAX give it."""
    if equation.primitive.name == "call_hi_primitive":  # JAX_CUSTOM_VJP3
        traced = getattr(equation.params["_prim"], "traced", None)
        return getattr(traced, "jaxpr", None)
    return equation.params["call_jaxpr"] if equation.primitive.name == "custom_vjp_call" else None


# ---------------------------------------------------------------------------------------------------------- the walk


@dataclasses.dataclass(frozen=True, eq=False)
class _Walk:
    """Runs a program equation by equation."""

    widen: bool
    wide_types: bool  # whether the program was traced with 64-bit types
    narrow: set[str]

    def closed(self, program: Any, args: Leaves) -> list[Any]:
        if isinstance(program, ClosedJaxpr):
            return self.program(program.jaxpr, program.consts, args)
        return self.program(program, (), args)

    def program(self, jaxpr: Jaxpr, consts: Leaves, args: Leaves) -> list[Any]:
        known: dict[Var, Any] = {}

        def read(atom: Any) -> Any:
            return self.value(atom.val) if isinstance(atom, Literal) else known[atom]

        known.update(zip(jaxpr.constvars, map(self.value, consts)))
        known.update(zip(jaxpr.invars, map(self.value, args)))
        for equation in jaxpr.eqns:
            known.update(zip(equation.outvars, self.equation(equation, [read(v) for v in equation.invars])))
        return [read(v) for v in jaxpr.outvars]

    def value(self, value: Any) -> Any:
        """Every floating-point number that enters the program is widened; what is computed from them then is."""
        if not self.widen or isinstance(value, (Literal, Var)):
            return value
        dtype = getattr(value, "dtype", None)
        if dtype is None:
            value = np.asarray(value)
            dtype = value.dtype
        if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.asarray(value, _widest(dtype))
        return value

    def equation(self, equation: JaxprEqn, args: list[Any]) -> list[Any]:
        name = equation.primitive.name.replace("-", "_")
        if (opened := _rule_of(equation)) is not None:
            return self.closed(opened, _arguments_of_rule(equation, args))
        if handler := _STRUCTURE.get(name):
            return handler(self, equation, args)
        if not self.widen:
            return self.bind(equation, args)
        try:
            if name in _AS_IT_IS or (_inner(equation) and name not in _AGAIN):
                return self.island(equation, args)
            out = _AGAIN[name](self, equation, args) if name in _AGAIN else self.bind(_widened(equation), args)
        except (TypeError, ValueError, NotImplementedError, AssertionError):  # what refuses float64
            return self.island(equation, args)
        return list(map(self.value, out))

    @staticmethod
    def bind(equation: JaxprEqn, args: Leaves) -> list[Any]:
        out = equation.primitive.bind(*args, **equation.primitive.get_bind_params(equation.params))
        return list(out) if equation.primitive.multiple_results else [out]

    def island(self, equation: JaxprEqn, args: Leaves) -> list[Any]:
        """In the dtypes that the equation was traced with."""
        types: list[Any] = [v.aval for v in equation.invars]
        cast = [jnp.asarray(a, t.dtype) if _is_float(t) else a for a, t in zip(args, types)]
        out = list(map(self.value, self.bind(equation, cast)))
        if any(_is_float(v.aval) for v in (*equation.invars, *equation.outvars)) and equation.primitive.name not in _EXACT:
            self.narrow.add(equation.primitive.name)
        return out


def _is_float(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating))


def _widest(dtype: Any) -> Any:
    return jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64


def _widened(equation: JaxprEqn) -> JaxprEqn:
    """The equation with float64 where it asks for a floating-point type, and no demand on how a matmul is made."""
    parameters = {}
    for key, value in equation.params.items():
        if key == "precision":
            value = None
        elif isinstance(value, (np.dtype, type)) and _is_float(_Typed(value)):
            value = np.dtype(_widest(value))
        parameters[key] = value
    return equation.replace(params=parameters)


@dataclasses.dataclass(frozen=True)
class _Typed:
    dtype: Any


def _arguments_of_rule(equation: JaxprEqn, args: Leaves) -> Leaves:
    if equation.primitive.name != "call_hi_primitive":
        return args
    consts, _, *rest = jax.tree.unflatten(equation.params["_prim"].in_tree, args)
    return jax.tree.leaves((consts, *rest))


# ------------------------------------------------------------------------------- equations that hold programs themselves


def _inline(key: str) -> Callable[..., list[Any]]:
    return lambda walk, equation, args: walk.closed(equation.params[key], args)


def _scan(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    p = equation.params
    if "ft_in" in p:  # jax 0.12
        fixed, carried = (len(part) for part in p["ft_in"].unpack()[:2])
    else:
        fixed, carried = p["num_consts"], p["num_carry"]
    consts, init, xs = args[:fixed], args[fixed : fixed + carried], args[fixed + carried :]

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        out = walk.closed(p["jaxpr"], [*consts, *carry, *x])
        return out[:carried], out[carried:]

    carry, ys = jax.lax.scan(step, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _while(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    p = equation.params
    of_condition, rest = args[: p["cond_nconsts"]], args[p["cond_nconsts"] :]
    of_body, init = rest[: p["body_nconsts"]], rest[p["body_nconsts"] :]

    def goes_on(state: Any) -> Any:
        return walk.closed(p["cond_jaxpr"], [*of_condition, *state])[0]

    def step(state: Any) -> Any:
        after, still = walk.closed(p["body_jaxpr"], [*of_body, *state]), goes_on(state)
        if not still.ndim:
            return after
        # Under vmap each member of a batch has a condition of its own, and those that have ended stay as they are.
        each = [still.reshape(still.shape + (1,) * (jnp.ndim(new) - still.ndim)) for new in after]
        return [jnp.where(on, new, old) for on, new, old in zip(each, after, state)]

    return jax.lax.while_loop(lambda state: goes_on(state).any(), step, init)


def _cond(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    index, *operands = args
    branches = [lambda *xs, b=b: walk.closed(b, xs) for b in equation.params["branches"]]
    return jax.lax.switch(index.astype(jnp.int32), branches, *operands)


def _custom_jvp(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    """The function with its own derivative, both widened: the derivative is traced at the dtypes of the equation."""
    if not walk.widen:
        return walk.bind(equation, args)
    moving = [i for i, v in enumerate(equation.invars) if _is_float(v.aval)]
    still = [a for i, a in enumerate(args) if i not in moving]
    results = [i for i, v in enumerate(equation.outvars) if _is_float(v.aval)]
    types: list[Any] = [v.aval for v in equation.invars]
    like = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types]

    def merged(floats: Leaves, others: Leaves) -> list[Any]:
        sources = iter(floats), iter(others)
        return [next(sources[0 if i in moving else 1]) for i in range(len(args))]

    def tangents(floats: Leaves, dots: Leaves, others: Leaves) -> list[Any]:
        def of_floats(*floats: Any) -> list[Any]:
            out = walk.bind(equation, merged(floats, others))
            return [out[i] for i in results]

        return jax.jvp(of_floats, tuple(floats), tuple(dots))[1]

    with jax.enable_x64(walk.wide_types):
        own = [like[i] for i in moving]
        derivative = jax.make_jaxpr(tangents)(own, own, [s for i, s in enumerate(like) if i not in moving])

    @jax.custom_jvp
    def function(*floats: Any) -> list[Any]:
        return walk.closed(equation.params["call_jaxpr"], merged(floats, still))

    @function.defjvp
    def _(floats: Any, dots: Any) -> tuple[list[Any], list[Any]]:
        out = function(*floats)
        found = dict(zip(results, walk.closed(derivative, [*floats, *dots, *still])))
        return out, [found[i] if i in found else np.zeros(o.shape, jax.dtypes.float0) for i, o in enumerate(out)]

    return function(*(args[i] for i in moving))


def _linear_solve(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    jaxprs, counts = equation.params["jaxprs"], equation.params["const_lengths"]
    ends = list(itertools.accumulate(counts))
    consts = [args[e - c : e] for e, c in zip(ends, counts)]
    b = args[ends[-1] :]

    def run(i: int, x: Any) -> Any:
        return walk.closed(jaxprs[i], [*consts[i], *x])

    transposed = None if jaxprs[3] is None else (lambda _, x: run(3, x))
    symmetric = jaxprs[1] is jaxprs[0]
    return jax.lax.custom_linear_solve(
        lambda x: run(0, x), b, lambda _, x: run(2, x), transpose_solve=transposed, symmetric=symmetric
    )


_STRUCTURE: dict[str, Callable[..., list[Any]]] = {
    "jit": _inline("jaxpr"), "pjit": _inline("jaxpr"), "closed_call": _inline("call_jaxpr"), "core_call": _inline("call_jaxpr"),
    "remat": _inline("jaxpr"), "remat2": _inline("jaxpr"), "checkpoint": _inline("jaxpr"),
    "scan": _scan, "while": _while, "cond": _cond,
    "custom_jvp_call": _custom_jvp, "custom_linear_solve": _linear_solve,
}  # fmt: skip


# ---------------------------------------------------------------- equations that must be built again to hold float64


def _scatter(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    p = equation.params
    scatter = getattr(jax.lax, equation.primitive.name.replace("-", "_"))
    options = {k: p[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
    return [scatter(*args, p["dimension_numbers"], **options)]


def _reduce(walk: _Walk, equation: JaxprEqn, args: list[Any]) -> list[Any]:
    half = len(args) // 2

    def combine(a: Any, b: Any) -> Any:
        return tuple(walk.closed(equation.params["jaxpr"], [*a, *b]))

    return list(jax.lax.reduce(tuple(args[:half]), tuple(args[half:]), combine, equation.params["dimensions"]))


_AGAIN: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"), _scatter),
    "reduce": _reduce,
    "reduce_precision": lambda walk, equation, args: args,
}
_AS_IT_IS = {"bitcast_convert_type", "random_gamma", "pure_callback", "io_callback", "ffi_call", "pallas_call"}
_EXACT = {"bitcast_convert_type", "nextafter"}  # right in the dtype that they are asked for, and nowhere else
