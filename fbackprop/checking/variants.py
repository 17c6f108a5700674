"""The variants of one equation of a program: each does it wrong in one way.

A result negated, an operand exchanged, a constant moved, another operator, another axis, a term left out; and of the outputs
of a program: scaled, one element off, zero, two of them exchanged. mutation.py makes mutants of them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Literal,
    Var,
)

__all__ = [
    "Read",
    "Values",
    "Variant",
    "bind",
    "equal",
    "of_outputs",
    "read_from",
    "rounded_result",
    "variants_of",
    "wide_type",
]

Values = Sequence[Any]
Read = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One equation done wrong: ``run(operands, read)`` gives its results; ``read`` any value computed before."""

    kind: str
    what: str
    run: Callable[[Values, Read], Values]
    reads: tuple[Var, ...] = ()


def bind(equation: Any, operands: Values, _: Any = None, **changed: Any) -> Values:
    """The results of an equation with other operands, and other parameters."""
    params = equation.primitive.get_bind_params({**equation.params, **changed})
    result = equation.primitive.bind(*operands, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def read_from(env: dict[Var, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def equal(ours: Values, theirs: Values) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs))


def wide_type(aval: Any) -> bool:
    return aval.dtype == jnp.float32


def rounded_result(x: Any) -> Any:
    return lax.reduce_precision(x, 8, 7)


# ------------------------------------------------------------------------------------------------------- variants

_OTHER = {
    "add": ("sub", "mul"), "sub": ("add",), "mul": ("add", "div"), "div": ("mul",), "max": ("min",), "min": ("max",),
    "pow": ("mul",), "rem": ("div",), "and": ("or",), "or": ("and",), "xor": ("or",),
    "lt": ("le", "gt"), "le": ("lt", "ge"), "gt": ("ge", "lt"), "ge": ("gt", "le"), "eq": ("ne",), "ne": ("eq",),
    "exp": ("expm1",), "expm1": ("exp",), "log": ("log1p",), "log1p": ("log",), "tanh": ("logistic",), "logistic": ("tanh",),
    "erf": ("erfc",), "erfc": ("erf",), "sqrt": ("rsqrt",), "rsqrt": ("sqrt",), "sin": ("cos",), "cos": ("sin",),
    "reduce_sum": ("reduce_max",), "reduce_max": ("reduce_min",), "reduce_min": ("reduce_max",), "reduce_or": ("reduce_and",),
    "reduce_and": ("reduce_or",), "cumsum": ("cummax",), "argmax": ("argmin",), "argmin": ("argmax",),
    "scatter-add": ("scatter",),
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{n: getattr(lax, n) for n in ("add", "sub", "mul", "div", "max", "min", "lt", "le", "gt", "ge", "eq", "ne", "exp",
        "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos")},
    "and": lax.bitwise_and, "or": lax.bitwise_or, "cummax": lax.cummax, "argmin": lax.argmin, "argmax": lax.argmax,
    "reduce_max": lax.reduce_max, "reduce_min": lax.reduce_min, "reduce_and": lax.reduce_and, "reduce_or": lax.reduce_or,
    "scatter": lax.scatter,
}  # fmt: skip
_ORDERED = ("sub", "div", "pow", "rem", "lt", "le", "gt", "ge", "atan2")
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "add_any": 0, "concatenate": 0}
_NOTHING = ("copy", "optimization_barrier", "reduce_precision", "convert_element_type", "stop_gradient", "reshape", "neg")
CANDIDATES = 3  # other values in place of an operand, at most


def variants_of(equation: Any, scope: dict[Any, str], same: Callable[[Any], Any], factor: float) -> list[Variant]:
    """The variants of an equation whose results have the types of its own."""
    made = [*_result(equation), *_operands(equation, scope, same), *_constants(equation, factor), *_operators(equation)]
    made += [*_axes(equation), *_terms(equation), *_inside(equation, factor)]
    avals = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in equation.invars]
    kept, seen = [], set()
    for v in made:
        try:
            got = jax.eval_shape(lambda v=v: v.run([jnp.zeros(a.shape, a.dtype) for a in avals],
                                                   lambda r: jnp.zeros(r.aval.shape, r.aval.dtype)))  # fmt: skip
        except (TypeError, ValueError, IndexError, NotImplementedError, AssertionError, ZeroDivisionError):
            continue
        fits = [(g.shape, g.dtype) for g in got] == [(o.aval.shape, o.aval.dtype) for o in equation.outvars]
        if fits and v.what not in seen:
            seen.add(v.what)
            kept.append(v)
    return _that_move(equation, kept, avals)


def _that_move(equation: Any, variants: list[Variant], avals: Values) -> list[Variant]:
    """Without other axes that give the same elements, and other sums over one element: seen on elements that all differ."""
    sums = equation.primitive.name.startswith("reduce_")
    asked = [v for v in variants if v.kind == "axis" or (v.kind == "operator" and sums)]
    if not asked or any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in avals):
        return variants
    draw = np.random.default_rng(0)
    values = [a.val if isinstance(a, Literal) else jnp.asarray(draw.normal(size=t.shape) * 8).astype(t.dtype)
              for a, t in zip(equation.invars, avals)]  # fmt: skip
    right, *others = jax.jit(lambda: [bind(equation, values), *(v.run(values, lambda _: None) for v in asked)])()
    same = {v.what for v, results in zip(asked, others) if equal(results, right)}
    return [v for v in variants if v not in asked or v.what not in same]


def _result(equation: Any) -> Iterator[Variant]:
    out = equation.outvars[0].aval
    if jnp.issubdtype(out.dtype, jnp.floating):
        yield Variant("sign", "negated", lambda o, _: [-r for r in bind(equation, o)])
    elif out.dtype == jnp.bool_:
        yield Variant("sign", "negated", lambda o, _: [~r for r in bind(equation, o)])
    elif jnp.issubdtype(out.dtype, jnp.integer):
        yield Variant("constant", "one more", lambda o, _: [r + 1 for r in bind(equation, o)])


def _with(operands: Values, k: int, value: Any) -> list[Any]:
    return [*operands[:k], value, *operands[k + 1 :]]


def _operands(equation: Any, scope: dict[Any, str], same: Callable[[Any], Any]) -> Iterator[Variant]:
    atoms = equation.invars
    if equation.primitive.name in _ORDERED and str(atoms[0]) != str(atoms[1]):
        yield Variant("operand", "operands swapped", lambda o, _: bind(equation, o[::-1]))
    for k, atom in enumerate(atoms):
        if isinstance(atom, Literal):
            continue
        kind = (atom.aval.shape, atom.aval.dtype)
        like = [v for v in scope if (v.aval.shape, v.aval.dtype) == kind and same(v) != same(atom)]
        like.sort(key=lambda v: not scope[v].startswith("dy"))
        for other in [*like[:1], *like[1:][::-1]][:CANDIDATES]:
            what = f"operand {k} replaced by {scope[other]}"
            yield Variant("operand", what, lambda o, read, k=k, v=other: bind(equation, _with(o, k, read(v))), (other,))


def _constants(equation: Any, factor: float) -> Iterator[Variant]:
    for k, atom in enumerate(equation.invars):
        dtype: Any = atom.aval.dtype
        value = np.asarray(atom.val) if isinstance(atom, Literal) and not jnp.issubdtype(dtype, jax.dtypes.extended) else np.inf
        if not np.isfinite(np.float64(value)):
            continue
        if dtype == jnp.bool_:
            moved: dict[str, Any] = {"negated": np.logical_not(value)}
        elif jnp.issubdtype(dtype, jnp.integer):
            moved = {"+ 1": value + 1, "is 0": value * 0}
        else:
            moved = {f"· {factor}": value * factor, "+ 1": value + 1, "is 0": value * 0}
        for what, new in moved.items():
            new = np.asarray(new).astype(dtype)
            if new != np.asarray(value).astype(dtype):
                yield Variant("constant", f"constant {k} {what}", lambda o, _, k=k, n=new: bind(equation, _with(o, k, n)))
    if equation.primitive.name == "integer_pow":
        for y in (equation.params["y"] + 1, equation.params["y"] - 1):
            yield Variant("constant", f"to the power of {y}", lambda o, _, y=y: bind(equation, o, y=y))


def _operators(equation: Any) -> Iterator[Variant]:
    primitive, params = equation.primitive.name, equation.params
    for other in _OTHER.get(primitive, ()):
        options = {n: v for n, v in params.items() if n in ("axes", "axis", "reverse", "index_dtype", "dimension_numbers",
                   "indices_are_sorted", "unique_indices", "mode")}  # fmt: skip
        if primitive in ("argmax", "argmin"):
            options["axis"] = options.pop("axes")[0]

        def run(o: Values, _: Read, f: Any = _FUNCTIONS[other], options: Any = options) -> Values:
            shaped = [jnp.broadcast_to(v, a.aval.shape) for v, a in zip(o, equation.invars)]
            if primitive in _OTHER and len(o) == 2:
                shaped = jnp.broadcast_arrays(*shaped)
            return [f(*shaped, **options)]

        yield Variant("operator", other, run)
    if primitive not in _NOTHING and len(equation.invars) == 1:
        yield Variant("operator", "left out", lambda o, _: [o[0]])


def _terms(equation: Any) -> Iterator[Variant]:
    primitive, atoms, shape = equation.primitive.name, equation.invars, equation.outvars[0].aval.shape
    neutral = _NEUTRAL.get(primitive)
    for k, atom in enumerate(atoms):
        if neutral is not None and not (isinstance(atom, Literal) and np.all(np.asarray(atom.val) == neutral)):

            def replaced(o: Values, _: Read, k: int = k) -> Values:
                return bind(equation, _with(o, k, jnp.full(jnp.shape(o[k]), neutral, jnp.result_type(o[k]))))

            yield Variant("term", f"operand {k} is {neutral}", replaced)
        if primitive in ("max", "min", "and", "or"):
            yield Variant("term", f"only operand {k}", lambda o, _, k=k: [jnp.broadcast_to(o[k], shape)])
    if primitive == "select_n" and len(atoms) == 3 and str(atoms[1]) != str(atoms[2]):
        yield Variant("term", "the other branch", lambda o, _: bind(equation, [o[0], o[2], o[1]]))
        yield from (Variant("term", f"always operand {k}", lambda o, _, k=k: [o[k]]) for k in (1, 2))


def _axes(equation: Any) -> Iterator[Variant]:
    primitive, p = equation.primitive.name, equation.params
    shape = equation.invars[0].aval.shape if equation.invars else equation.outvars[0].aval.shape
    n = len(shape)

    def other(what: str, **changed: Any) -> Variant:
        return Variant("axis", what, lambda o, _: bind(equation, o, **changed))

    if primitive.startswith(("reduce_", "arg")) and "axes" in p:
        for axes in itertools.combinations(range(n), len(p["axes"])):
            yield other(f"axes {axes}", axes=axes)
    if primitive.startswith("cum"):
        yield other("the other direction", reverse=not p["reverse"])
        yield from (other(f"axis {i}", axis=i) for i in range(n))
    if primitive == "transpose":
        yield from (other(f"permutation {q}", permutation=q) for q in itertools.permutations(range(n)))
    if primitive == "broadcast_in_dim" and n:
        for dims in itertools.combinations(range(len(p["shape"])), n):
            yield other(f"dimensions {dims}", broadcast_dimensions=dims)
    if primitive == "rev":
        for i in range(n):
            yield other(f"dimension {i} turned around", dimensions=tuple(sorted({*p["dimensions"]} ^ {i})))
    if primitive == "concatenate":
        yield Variant("axis", "from last to first", lambda o, _: bind(equation, o[::-1]))
    if primitive == "slice":
        for i, by in itertools.product(range(n), (-1, 1)):
            start, limit = (tuple(v + by * (i == j) for j, v in enumerate(p[b])) for b in ("start_indices", "limit_indices"))
            if start[i] >= 0:
                yield other(f"dimension {i} by {by:+}", start_indices=start, limit_indices=limit)
    for name in ("padding", "padding_config"):
        for i, by in itertools.product(range(len(p.get(name) or ())), (-1, 1)):
            moved = tuple((a + by * (i == j), b - by * (i == j), *rest) for j, (a, b, *rest) in enumerate(p[name]))
            yield other(f"dimension {i} by {by:+}", **{name: moved})
    if primitive == "dot_general":
        ((left, right), batch) = p["dimension_numbers"]
        for i, j in itertools.product(itertools.permutations(range(n), len(left)),
                                      itertools.permutations(range(equation.invars[1].aval.ndim), len(right))):  # fmt: skip
            if not {*i} & {*batch[0]} and not {*j} & {*batch[1]} and sorted(zip(i, j)) != sorted(zip(left, right)):
                yield other(f"contracting {i} with {j}", dimension_numbers=((i, j), batch))
    if primitive == "conv_general_dilated":
        numbers = p["dimension_numbers"]
        for field in ("lhs_spec", "rhs_spec", "out_spec"):
            spec = getattr(numbers, field)
            for a, b in itertools.combinations(range(len(spec)), 2):
                swapped = tuple(spec[{a: b, b: a}.get(k, k)] for k in range(len(spec)))
                yield other(f"{field} {swapped}", dimension_numbers=numbers._replace(**{field: swapped}))
        for a, b in itertools.combinations(("window_strides", "lhs_dilation", "rhs_dilation"), 2):
            if p[a] != p[b]:
                yield other(f"{a} and {b} exchanged", **{a: p[b], b: p[a]})
    if primitive == "iota":
        yield from (other(f"dimension {i}", dimension=i) for i in range(n))
    if primitive == "reshape" and sum(s > 1 for s in shape) > 1:
        yield Variant("axis", "read in the other order", lambda o, _: bind(equation, [jnp.swapaxes(o[0].reshape(
            shape[::-1]), 0, -1).reshape(shape)]))  # fmt: skip


def _inside(equation: Any, factor: float) -> Iterator[Variant]:
    """The variants of the programs inside an equation: branches of cond, bodies of scan and while."""
    for name, value in equation.params.items():
        several = isinstance(value, (tuple, list))
        for i, closed in enumerate(value if several else [value]):
            for j, own in enumerate(closed.jaxpr.eqns if isinstance(closed, ClosedJaxpr) else ()):
                scope = {a: f"input {k}" for k, a in enumerate(closed.jaxpr.invars)}
                for v in variants_of(own, scope, lambda v: v, factor):

                    def run(o: Values, _: Read, name: str = name, i: int = i, closed: Any = closed, j: int = j, v: Variant = v,
                            several: bool = several) -> Values:  # fmt: skip
                        new = jax.make_jaxpr(lambda *args: _replaced(closed, args, j, v))(*closed.in_avals)
                        whole = equation.params[name]
                        return bind(equation, o, **{name: type(whole)(_with(whole, i, new)) if several else new})

                    yield Variant(v.kind, f"{name} {i}, {own.primitive.name} {j}: {v.what}", run)


def _replaced(closed: ClosedJaxpr, args: Values, number: int, variant: Variant) -> Values:
    env = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args]))
    read = functools.partial(read_from, env)
    for i, equation in enumerate(closed.jaxpr.eqns):
        operands = [read(a) for a in equation.invars]
        env |= zip(equation.outvars, variant.run(operands, read) if i == number else bind(equation, operands))
    return [read(v) for v in closed.jaxpr.outvars]


def of_outputs(outs: Values, factor: float) -> Iterator[Variant]:
    """Wrong cotangents, however they came about."""
    by = 1.001 if factor < 1.1 else 1.0625

    def one_off(d: Any) -> Any:
        flat = d.reshape(-1)
        return flat.at[jnp.abs(flat).argmax()].multiply(1.05 if factor < 1.1 else 1.25).reshape(d.shape)

    for k, out in enumerate(outs):
        wrong: dict[str, Callable[[Any], Any]] = {f"scaled by {by}": lambda d: d * by, "one element off": one_off}
        wrong["zero"] = jnp.zeros_like
        for what, f in wrong.items():
            yield Variant("output", f"cotangent {k} {what}", lambda o, _, k=k, f=f: _with(o, k, f(o[k])))
        for j in range(k):
            if (out.aval.shape, out.aval.dtype) == (outs[j].aval.shape, outs[j].aval.dtype) and out is not outs[j]:
                yield Variant(
                    "output", f"cotangents {j} and {k} exchanged", lambda o, _, j=j, k=k: _with(_with(o, j, o[k]), k, o[j])
                )
