"""Runs a function and its reference, and gathers what the checks judge. At most six compiled programs:

of the function    forward: its value without and with differentiation, and the pullback
                   backward: the pullback at one cotangent, called for each of them
                   alone: the gradient with respect to each argument on its own
of the reference   gradients: value, and the pullback at every cotangent, in the dtype of the function
                   truth: the same in float64
                   moved: the value in float64 at points around the arguments, for finite differences

A reference that JAX cannot differentiate (a while loop, a callback) has finite differences as its truth.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.checking.definition import Definition, definition_of
from fbackprop.checking.differences import (
    STEP,
    Arrays,
    Differences,
    along_directions,
    as_numpy,
    by_differences,
    typical,
)
from fbackprop.checking.measures import largest
from fbackprop.checking.subject import Call, Subject
from fbackprop.refusing import sentence

__all__ = ["Evidence", "cotangents_of_integers", "float64_on_cpu", "gather", "is_floating"]

POOL = 4096  # elements that the root mean square is taken over, at least
ONE_HOTS = 6  # for each output
NUDGES = 4


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything as numpy arrays in float64. Cotangents are lists over leaves of arrays [cotangent of y, *shape]."""

    subject: Subject
    definition: Definition  # of the reference
    dys: list[list[np.ndarray]]  # cotangents of y, by row, then by output
    kinds: tuple[str, ...]  # of each cotangent of y: "normal", "one-hot", "zero", "a", "b", "a + b"
    ours: Arrays
    again: Arrays  # of the first cotangent, a second time
    alone: Arrays | None  # of the first cotangent, each argument differentiated on its own
    theirs: Arrays  # jax.grad of the reference
    truth: Arrays
    slack: Arrays | None  # for leaves in float64, where the truth itself is rounded: errors of float32, scaled
    types: tuple[jax.ShapeDtypeStruct, ...]  # of our cotangents
    values: dict[str, tuple[Arrays, list[Any]]]  # "plain", "differentiated", "reference", "truth": floats, others
    value_types: tuple[Any, ...]
    value_slack: list[float] | None
    differences: tuple[Differences, ...]
    narrow: tuple[str, ...]  # what in the reference could not be computed in float64
    undifferentiable: str  # why JAX cannot differentiate the reference; then the truth is finite differences
    nudged: Callable[[], list[tuple[Arrays, Arrays]]]
    """jax.grad of the reference and the truth, at arguments that differ in the last place: what it errs by hereabouts."""
    single: Callable[[int], Arrays]
    """jax.grad of the reference for one cotangent and not in a loop, as the rule is called: compilers choose other algorithms
    in loops, and some multiply the zeros between dilated elements."""
    failure: str = ""


def gather(
    subject: Subject, checks: Sequence[str], seed: int, cotangents: tuple[tuple[str, ...], Arrays] | None = None
) -> Evidence:
    """Runs the programs that the chosen checks need, at random cotangents of y or at the given (kinds, stacked values)."""
    call, floats, arrays = subject.call, subject.floats, subject.arrays
    of_reference = _kept(_reference_programs, subject.reference, call, *_signature(floats, arrays))
    definition: Definition = of_reference["definition"]
    outputs = definition.program.out_avals[: definition.floats]
    if not outputs:
        raise ValueError(f"check: {subject.name} returns no floating-point array, so there is nothing to differentiate.")
    rng = np.random.default_rng(seed)
    kinds, dys = cotangents or _cotangents(rng, outputs, max(leaf.size for leaf in floats))

    with float64_on_cpu():
        wide = [_widened(leaf) for leaf in floats]
        constant = [_moved_to_cpu(leaf) for leaf in arrays]
        differences, extra = along_directions(rng, subject, of_reference, wide, constant, dys, "finite differences" in checks)
        wide_dys = [np.concatenate([np.asarray(dy, np.float64), e]) for dy, e in zip(dys, extra)]
    undifferentiable = ""
    try:
        with float64_on_cpu():
            y, _, gradients = of_reference["truth"](wide, constant, wide_dys)
            true_values, truth = as_numpy(y), as_numpy(gradients)
            if not subject.judged_at_kinks:
                truth = _smooth(rng, of_reference, wide, constant, wide_dys, truth)
        reference_y, reference_others, theirs = of_reference["gradients"](floats, arrays, dys)
        theirs = as_numpy(theirs)
        slack, value_slack = _slack_of_float64(subject, constant, wide_dys, len(kinds))
        differences = tuple(d(truth, len(kinds) + i) for i, d in enumerate(differences))
    except Exception as error:  # whatever keeps JAX from differentiating a stranger's function
        undifferentiable = sentence(error)
        reference_y, reference_others = of_reference["value"](floats, arrays)
        with float64_on_cpu():
            true_values, truth = by_differences(subject, of_reference, wide, constant, wide_dys, undifferentiable)
        theirs = [t[: len(kinds)] * (1 + _relative(as_numpy(reference_y), true_values)) for t in truth]
        slack, value_slack, differences = None, None, ()
    truth = [leaf[: len(kinds)] for leaf in truth]

    @functools.cache
    def nudged() -> list[tuple[Arrays, Arrays]]:
        return [] if undifferentiable else [_nudged(rng, of_reference, floats, arrays, constant, dys) for _ in range(NUDGES)]

    def single(k: int) -> Arrays:
        if undifferentiable:
            return [leaf[k] for leaf in theirs]
        return as_numpy(of_reference["gradient"](floats, arrays, [jnp.asarray(dy[k]) for dy in dys]))

    values = {"reference": (as_numpy(reference_y), list(reference_others)), "truth": (true_values, [])}
    common: dict[str, Any] = {
        "subject": subject, "definition": definition, "kinds": kinds, "theirs": theirs, "truth": truth,
        "dys": [[dy[k] for dy in dys] for k in range(len(kinds))], "slack": slack, "values": values,
        "value_types": tuple(outputs), "value_slack": value_slack, "differences": differences,
        "narrow": tuple(sorted(definition.narrow)), "undifferentiable": undifferentiable,
        "nudged": nudged, "single": single,
    }  # fmt: skip
    try:
        of_fn = _kept(_subject_programs, subject.fn, call, subject.groups, *subject.halves)
        plain, differentiated, pullback = of_fn["forward"](floats, arrays)
        if _types(differentiated[0]) != _types(outputs):
            raise TypeError(f"it returns {_told(differentiated[0])}, the reference returns {_told(outputs)}")
        results = [of_fn["backward"](pullback, [jnp.asarray(dy[i]) for dy in dys]) for i in range(len(kinds))]
        again = of_fn["backward"](pullback, [jnp.asarray(dy[0]) for dy in dys])
        wanted = "alone" in checks and len(subject.arguments) > 1
        alone = of_fn["alone"](floats, arrays, [jnp.asarray(dy[0]) for dy in dys]) if wanted else None
    except Exception as error:  # whatever a stranger's function raises is a finding
        empty: Arrays = []
        return Evidence(
            ours=empty,
            again=empty,
            alone=None,
            types=(),
            failure=sentence(error),
            **common,
        )
    values |= {
        "plain": (as_numpy(plain[0]), list(plain[1])),
        "differentiated": (as_numpy(differentiated[0]), list(differentiated[1])),
    }
    return Evidence(
        ours=[np.stack([np.asarray(r[i], np.float64) for r in results]) for i in range(len(floats))],
        again=as_numpy(again),
        alone=None if alone is None else as_numpy(alone),
        types=tuple(jax.ShapeDtypeStruct(d.shape, d.dtype, weak_type=d.weak_type) for d in results[0]),
        **common,
    )


# ------------------------------------------------------------------------------------------------------- programs


def _subject_programs(fn: Callable[..., Any], call: Call, groups: tuple[int, ...], *_: Any) -> dict[str, Callable[..., Any]]:
    flat = call.bind(fn)

    def forward(floats: Any, arrays: Any) -> tuple[Any, Any, Any]:
        y, pullback, others = jax.vjp(lambda f: flat(f, arrays), floats, has_aux=True)
        return flat(floats, arrays), (y, others), pullback

    def alone(floats: Any, arrays: Any, dy: Any) -> list[Any]:
        result = list(floats)
        for group in dict.fromkeys(groups):
            mine = [i for i, g in enumerate(groups) if g == group]

            def of_mine(own: Any, mine: list[int] = mine) -> tuple[Any, Any]:
                return flat([own[mine.index(i)] if i in mine else leaf for i, leaf in enumerate(floats)], arrays)

            _, pullback, _ = jax.vjp(of_mine, [floats[i] for i in mine], has_aux=True)
            for i, d in zip(mine, pullback(dy)[0]):
                result[i] = d
        return result

    return {
        "forward": jax.jit(forward),
        "backward": jax.jit(lambda pullback, dy: pullback(dy)[0]),
        "alone": jax.jit(alone),
    }


def cotangents_of_integers(subject: Subject) -> Iterator[tuple[str, str]]:
    """Names and troubles of integer arguments. JAX looks at neither: a wrong order of cotangents passes in silence."""
    rule = subject.custom
    if not isinstance(rule, jax.custom_vjp) or rule.nondiff_argnums or rule.symbolic_zeros or not (rule.fwd and rule.bwd):
        return
    args, keywords = subject.call.arguments(subject.floats, subject.arrays)
    try:
        args = inspect.signature(rule.fun).bind(*args, **keywords).args
        y, saved = rule.fwd(*args)
        one = jax.tree.map(
            lambda leaf: jnp.ones_like(leaf) if is_floating(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0), y
        )
        cotangents = rule.bwd(saved, one)
    except Exception:  # the check "runs" tells of it
        return
    labels = [p.name for p in inspect.signature(rule.fun).parameters.values()]
    for i, (arg, cotangent) in enumerate(zip(args, cotangents)):
        leaves = jax.tree.leaves(arg)
        if not leaves or any(map(is_floating, leaves)):
            continue
        for leaf in jax.tree.leaves(cotangent):
            if is_floating(leaf) and np.any(np.asarray(leaf) != 0):
                yield (
                    labels[i] if i < len(labels) else f"args[{i}]",
                    f"it is no floating-point array, but the backward returns {leaf.dtype}{list(leaf.shape)} for it, which JAX "
                    "drops without a word; return None, and look whether the cotangents stand in the order of the arguments.",
                )


def is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _reference_programs(reference: Callable[..., Any], call: Call, floats: Any, arrays: Any, _: bool) -> dict[str, Any]:
    definition = definition_of(call.bind(reference), *(_structs(types) for types in (floats, arrays)))

    def gradients(run: Any, floats: Any, arrays: Any, dys: Any) -> tuple[Any, Any, Any]:
        y, pullback, others = jax.vjp(lambda f: run(f, arrays), list(floats), has_aux=True)
        return y, others, jax.lax.map(lambda dy: pullback(dy)[0], dys)

    def gradient(floats: Any, arrays: Any, dy: Any) -> Any:
        return jax.vjp(lambda f: definition.opened(f, arrays), list(floats), has_aux=True)[1](dy)[0]

    def moved(floats: Any, arrays: Any, directions: Any, offsets: Any) -> Any:
        def at(item: Any) -> Any:
            direction, offset = item
            return definition.widened([leaf + offset * d for leaf, d in zip(floats, direction)], arrays)[0]

        return jax.lax.map(at, (directions, offsets))

    return {
        "definition": definition,
        "gradients": jax.jit(functools.partial(gradients, definition.opened)),
        "gradient": jax.jit(gradient),
        "truth": jax.jit(functools.partial(gradients, definition.widened)),
        "moved": jax.jit(moved),
        "value": jax.jit(definition.flat),
    }


def _signature(floats: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, Any, bool]:
    """What a definition is traced for."""
    types = [tuple((a.shape, a.dtype, bool(getattr(a, "weak_type", False))) for a in part) for part in (floats, arrays)]
    return types[0], types[1], jnp.result_type(float) == jnp.float64


def _structs(types: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in types]


_keep = functools.lru_cache(maxsize=64)(lambda make, *key: make(*key))


def _kept(make: Callable[..., dict[str, Any]], *key: Any) -> dict[str, Any]:
    """Programs are kept by what they were made from, so that other values of the arguments compile nothing."""
    try:
        hash(key)
    except TypeError:
        return make(*key)
    return _keep(make, *key)


# --------------------------------------------------------------------------------------------------- their arguments


def _cotangents(rng: np.random.Generator, outputs: Sequence[Any], elements: int) -> tuple[tuple[str, ...], Arrays]:
    """Cotangents of y, stacked: enough normal ones to pool POOL elements of the largest leaf, then special ones."""
    normals = int(np.clip(-(-POOL // max(elements, 1)), 2, 128))
    kinds = ["normal"] * normals
    drawn = [[rng.normal(size=o.shape) for o in outputs] for _ in range(normals)]
    for which in [i for i, o in enumerate(outputs[:4]) if o.size for _ in range(ONE_HOTS)]:
        hot = [np.zeros(o.shape) for o in outputs]
        hot[which].reshape(-1)[rng.integers(hot[which].size)] = rng.uniform(0.5, 2)
        kinds.append("one-hot")
        drawn.append(hot)
    kinds.append("zero")
    drawn.append([np.zeros(o.shape) for o in outputs])
    # Eighths of small numbers, so that their sum is exact in every dtype.
    a, b = ([np.clip(np.round(rng.normal(size=o.shape) * 8), -30, 30) / 8 for o in outputs] for _ in range(2))
    kinds += ["a", "b", "a + b"]
    drawn += [a, b, [u + v for u, v in zip(a, b)]]
    return tuple(kinds), [np.stack([d[i] for d in drawn]).astype(o.dtype) for i, o in enumerate(outputs)]


def _slack_of_float64(subject: Subject, arrays: Any, wide_dys: Arrays, count: int) -> tuple[Arrays | None, list[float] | None]:
    """In float64 the truth is rounded like what is checked. What rounding costs there is measured in float32, where the
    truth is known, and scaled by the ratio of the two precisions."""
    if all(leaf.dtype != jnp.float64 for leaf in subject.floats):
        return None, None
    with float64_on_cpu():
        narrow = [np.asarray(leaf, np.float32) for leaf in subject.floats]
        programs = _kept(_reference_programs, subject.reference, subject.call, *_signature(narrow, arrays))
        outputs = programs["definition"].program.out_avals
        dys = [dy.astype(np.float32) for dy in wide_dys]
        y, _, rounded = programs["gradients"](narrow, arrays, [dy.astype(o.dtype) for dy, o in zip(dys, outputs)])
        wide = [np.asarray(leaf, np.float64) for leaf in narrow]
        true_y, _, true = programs["truth"](wide, arrays, [dy.astype(np.float64) for dy in dys])
    ratio = 2.0**-29
    with np.errstate(all="ignore"):
        slack = [np.abs(a - b)[:count] * ratio for a, b in zip(as_numpy(rounded), as_numpy(true))]
        return slack, [largest(a - b) * ratio for a, b in zip(as_numpy(y), as_numpy(true_y))]


def _smooth(rng: np.random.Generator, programs: Any, wide: Arrays, arrays: Any, dys: Arrays, truth: Arrays) -> Arrays:
    """The truth without the elements that jump within a step of the arguments: there it depends on the definition's words."""
    scales = [typical(w) * STEP for w in wide]
    step = [rng.choice([-1.0, 1.0], size=w.shape) * s for w, s in zip(wide, scales)]
    near = [programs["truth"]([w + sign * d for w, d in zip(wide, step)], arrays, dys)[2] for sign in (1, -1)]
    right, left = (as_numpy(gradient) for gradient in near)
    with np.errstate(all="ignore"):
        three = [np.stack(beside) for beside in zip(right, truth, left)]
        jumps = [~(np.ptp(beside, axis=0) <= 1e-3 * largest(beside)).all(0) for beside in three]
    return [np.where(jump, np.nan, t) for jump, t in zip(jumps, truth)]


def _nudged(
    rng: np.random.Generator, programs: Any, floats: Sequence[Any], arrays: Any, on_cpu: Any, dys: Arrays
) -> tuple[Arrays, Arrays]:
    """With the arguments changed by the unit in the last place, each element up, down or not."""
    moved = []
    for leaf in floats:
        value = np.asarray(leaf, np.float64)
        step = float(jnp.finfo(leaf.dtype).eps) * rng.integers(-1, 2, size=value.shape)
        moved.append(jnp.asarray(value * (1 + step), leaf.dtype))
    theirs = as_numpy(programs["gradients"](moved, arrays, dys)[2])
    with float64_on_cpu():
        wide_dys = [np.asarray(dy, np.float64) for dy in dys]
        truth = as_numpy(programs["truth"]([_widened(leaf) for leaf in moved], on_cpu, wide_dys)[2])
    return theirs, truth


def _relative(values: Arrays, truth: Arrays) -> float:
    """What the value errs by, relative to its largest element: all that is known of the precision of a foreign program."""
    with np.errstate(all="ignore"):
        return max((largest(v - t) / (largest(t) or 1.0) for v, t in zip(values, truth)), default=0.0)


# ------------------------------------------------------------------------------------------------------------ arrays


@contextlib.contextmanager
def float64_on_cpu() -> Any:
    """Where the truth is computed, whatever the device of what is checked."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _widened(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _moved_to_cpu(leaf: jax.Array) -> Any:
    return jax.device_put(leaf, jax.devices("cpu")[0])


def _types(leaves: Sequence[Any]) -> list[Any]:
    return [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]


def _told(leaves: Sequence[Any]) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
