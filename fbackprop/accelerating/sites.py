"""What is found in a program: sites that an op of this library stands in for, and how that is proved.

A finder guesses: "from these values to those the program computes ``call``". Guesses may be bold, since none is taken on faith.
``proved`` evaluates the equations between those values in float64, next to the definition of what would stand in for them,
and accepts only where

- both agree, on numbers of several sizes, to the rounding of the constants in the program;
- nothing between them is used elsewhere;
- what stands under a ``stop_gradient`` does not matter, so that derivatives agree where values do;
- shapes and dtypes are those of the program.

``call`` is what will run, with all that it rearranges, and its definition is what it is under ``without_rules``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fbackprop.accelerating.axes import Axes
from fbackprop.accelerating.evaluation import FULL, OneShape, Unknown, evaluate
from fbackprop.accelerating.program import Equation, Program, Region, Value, region
from fbackprop.context import without_rules

__all__ = ["MOST", "Near", "Site", "first", "misfit", "proved", "structure"]

MOST = 2**24  # numbers in one array that a proof may take


@dataclasses.dataclass(eq=False)
class Site:
    """Values of a program that an op gives from others. ``call`` takes arrays of any length along parallel axes."""

    op: str
    inputs: list[Value]
    outputs: list[Value]
    call: Callable[..., tuple[Any, ...]]
    options: tuple[Any, ...] = ()  # all that tells this call from another one of the op
    anchor: Equation | None = None
    integers: int = 8  # integers are drawn from −integers − 2 to integers + 1
    equations: Sequence[Equation] = ()  # what it stands in for
    whole: Sequence[tuple[Value, int]] = ()  # axes that keep their length in a proof
    # Once proved: what runs in place of ``call``, the same for the constants among the inputs.
    settled: Callable[[], Callable[..., tuple[Any, ...]]] | None = None
    additive: bool = False  # sums and products in it mean the same at all lengths, so that these may be short in a proof


@dataclasses.dataclass(eq=False)
class Near:
    """What looked like an op and is left as it is."""

    op: str
    why: str
    anchor: Equation


# ------------------------------------------------------------------------------------------------------------- the proof


_proofs: dict[Any, str] = {}


def proved(program: Program, site: Site, leaks: bool = False) -> str:
    """Why a site is not what it was guessed to be; the empty string where it is. Sets ``site.equations``."""
    found = region(site.inputs, site.outputs)
    if found is None:
        return "more enters than the op takes"
    if not leaks and (lost := found.leaks(program)):
        maker = lost[0].maker
        return f"an interior value ({maker.name if maker else 'input'}) is used elsewhere"
    site.equations = [e for e in found.equations if any(id(v) in found.moving for v in e.outputs)]
    key = (site.op, site.options, jax.config.jax_enable_x64, structure(found))  # type: ignore[attr-defined]
    if key not in _proofs:
        if len(_proofs) > 4096:
            _proofs.clear()
        _proofs[key] = _proof(site, found)
    if not _proofs[key] and not all(_is_own_derivative(e) for e in found.equations if e.name == "custom_jvp_call"):
        return "a custom_jvp whose derivative is not that of its function"
    return _proofs[key]


def structure(found: Region) -> tuple[Any, ...]:
    """All that a proof depends on."""
    names: dict[int, int] = {}

    def name(v: Value) -> Any:
        if v.known is not None:
            return v.known.tobytes(), v.shape, str(v.dtype)
        return names.setdefault(id(v), len(names)), v.shape, str(v.dtype)

    head = tuple(map(name, found.inputs))
    body = tuple((e.name, str(e.params), tuple(map(name, e.inputs)), tuple(map(name, e.outputs))) for e in found.equations)
    return head, body, tuple(map(name, found.outputs))


def _proof(site: Site, found: Region) -> str:
    try:
        if why := misfit(site):
            return why
        call = without_rules(site.call)
        axes = Axes(found, site.whole, additive=site.additive)
        if max(int(np.prod(axes.shape(v))) for e in found.equations for v in e.outputs) > MOST:
            axes = Axes(found, site.whole, short=(1,), additive=site.additive)
            if max(int(np.prod(axes.shape(v))) for e in found.equations for v in e.outputs) > MOST:
                return "too large to be proved"
        short = [jax.ShapeDtypeStruct(axes.shape(v), v.dtype) for v in site.inputs]
        traced = Program.of(jax.make_jaxpr(call)(*short))
        own = Region(traced.inputs, traced.outputs, traced.equations, set())
        for arguments in _draws(site, [s.shape for s in short]):
            theirs = evaluate(found, axes, arguments)
            shifted = evaluate(found, axes, arguments, stopped=0.37)
            ours = evaluate(own, FULL, arguments)
            eps = 1e-10 if any(v.dtype == np.float64 for v in site.outputs) else 3e-6
            for a, b, c in zip(theirs, ours, shifted, strict=True):
                if not _close(a, b, eps):
                    return "it computes something else"
                if not _close(a, c, 1e-9):
                    return "a derivative is stopped inside"
    except Unknown as unknown:
        return str(unknown)
    except (TypeError, ValueError, NotImplementedError) as error:
        return _refused(error)
    return ""


def misfit(site: Site) -> str:
    """Why a call does not give arrays of the types that the program has; the empty string where it does."""
    try:
        results = jax.tree.leaves(jax.eval_shape(without_rules(site.call), *(_type(v) for v in site.inputs)))
        for value, result in zip(site.outputs, results, strict=True):
            if (tuple(result.shape), result.dtype) != (value.shape, value.dtype):
                return f"the op would give {result.dtype}{list(result.shape)}, not {value.dtype}{list(value.shape)}"
    except (TypeError, ValueError, NotImplementedError) as error:
        return _refused(error)
    return ""


def _refused(error: Exception) -> str:
    return f"the op refuses it: {(str(error).splitlines() or [''])[0]}"


def _type(value: Value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _draws(site: Site, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[np.ndarray]]:
    """Numbers of several sizes: an ε counts only beside small ones, and some functions differ only far out."""
    rng = np.random.default_rng(0)
    for scale, mean in ((1.0, 0.0), (1e-3, 0.0), (4.0, 1.5)):
        arrays, drawn = [], dict[int, np.ndarray]()
        for value, shape in zip(site.inputs, shapes):
            if id(value) in drawn:  # a query that is the key, too
                arrays.append(drawn[id(value)])
            elif value.is_float:
                arrays.append(rng.normal(size=shape) * scale + mean)
            elif value.dtype == np.bool_:
                own = rng.random(size=shape) < 0.6
                arrays.append(own & (scale != 1e-3))  # also where nothing is seen
            else:
                lowest, beyond = (0, 0) if site.additive else (-site.integers - 2, 2)
                arrays.append(rng.integers(lowest, site.integers + beyond, size=shape).astype(value.dtype))
            drawn[id(value)] = arrays[-1]
        yield arrays
    n = site.integers
    for edge in (-n - 1, -n, -1, n - 1, n, n + 1) if site.additive else ():
        yield [_with_edge(rng, a, edge) if a.dtype.kind in "iu" else a for a in arrays]


def _with_edge(rng: np.random.Generator, array: np.ndarray, edge: int) -> np.ndarray:
    """With this number in one place: what a program makes of it may hide all others in a sum."""
    array = array.copy()
    array.reshape(-1)[rng.integers(array.size)] = np.asarray(edge).astype(array.dtype)
    return array


def _close(a: np.ndarray, b: np.ndarray, eps: float) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return False
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    if not (same | finite).all():
        return False
    scale = np.abs(b).max(initial=0.0, where=finite)
    with np.errstate(all="ignore"):
        return bool((same | (np.abs(a - b) <= eps * scale)).all())


def _tangent(equation: Equation) -> Region:
    """The program of an equation's own derivative: from inputs and tangents of the floating-point ones."""
    again = equation.again
    types = [_type(v) for v in equation.inputs]
    moving = [i for i, v in enumerate(equation.inputs) if v.is_float]

    def tangent(xs: Sequence[Any], dots: Sequence[Any]) -> Any:
        def of(*moved: Any) -> Any:
            given = list(xs)
            for i, m in zip(moving, moved):
                given[i] = m
            return again.primitive.bind(*given, **again.primitive.get_bind_params(again.params))[0]

        return jax.jvp(of, [xs[i] for i in moving], list(dots))[1]

    program = Program.of(jax.make_jaxpr(tangent)(types, [types[i] for i in moving]))
    return Region(program.inputs, program.outputs, program.equations, set())


def _is_own_derivative(equation: Equation) -> bool:
    """Whether an elementwise custom_jvp has the derivative of the function inside of it, by differences at some points. (Not
    remembered: two functions of the same program may have different derivatives, and nothing tells them apart.)"""
    try:
        derivative = _tangent(equation)
        lengths = Axes(derivative, short=(64,))
    except (Unknown, TypeError, ValueError, NotImplementedError):
        return False
    moving = [i for i, v in enumerate(equation.inputs) if v.is_float]
    function = Region(equation.inputs, equation.outputs, [equation], set())
    rng, shapes = np.random.default_rng(1), [lengths.shape(v) for v in derivative.inputs]
    inputs = list(zip(equation.inputs, shapes))
    xs = [rng.normal(size=shape) * 2 if v.is_float else np.ones(shape, v.dtype) for v, shape in inputs]
    dots = [rng.normal(size=shapes[i]) for i in moving]
    own, h = OneShape(max((x.shape for x in xs), key=len)), 2.0**-18

    def at(step: float) -> np.ndarray:
        moved = [x + step * dots[moving.index(i)] if i in moving else x for i, x in enumerate(xs)]
        return evaluate(function, own, moved)[0]

    slope = evaluate(derivative, lengths, [*xs, *dots])[0]
    return _close((at(h) - at(-h)) / (2 * h), slope, 1e-6)


def first(program: Program, guesses: Iterable[Site], why: str = "nothing here is like it") -> tuple[Site | None, str]:
    """The first guess that is proved, or why the last one was not; ``why`` where there is none."""
    for guess in guesses:
        why = proved(program, guess)
        if not why:
            guess.call = guess.settled() if guess.settled is not None else guess.call
            return guess, ""
    return None, why
