"""Runs a function and its reference, and gathers what the checks judge. At most six compiled programs:

of the function    forward: its value without and with differentiation, and the pullback
                   backward: the pullback at one cotangent, called for each of them
                   alone: the gradient with respect to each argument on its own
of the reference   gradients: value, and the pullback at every cotangent, in the dtype of the function
                   gradients: the same in float64: the truth
                   moved: the value in float64 at points around the arguments, for finite differences
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.checking.subject import Call, Subject

__all__ = ["Differences", "Evidence", "gather"]

POOL = 4096  # elements that the root mean square is taken over, at least
ONE_HOTS = 6  # for each output
DIRECTIONS = 2  # of finite differences, for each argument and for all together
STEP = 2.0**-16  # of finite differences, relative to the arguments
OFFSETS = (0.0, STEP, -STEP, STEP / 2, -STEP / 2)

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Differences:
    """Along one direction: the derivative of ⟨dy, y⟩ by finite differences and by the truth, and what could not be used."""

    where: str
    measured: float
    true: float
    tolerance: float
    kinks: int
    points: int

    @property
    def agree(self) -> bool:
        """A truth that is not a finite number cannot be judged in this way."""
        return not np.isfinite(self.true) or abs(self.measured - self.true) <= max(self.tolerance, 1e-300)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything as numpy arrays in float64. Cotangents are lists over leaves of arrays [cotangent of y, *shape]."""

    subject: Subject
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
    narrows: bool  # finite differences disagree, and the reference rounds to less than float64 inside
    failure: str = ""


def gather(subject: Subject, checks: Sequence[str], seed: int) -> Evidence:
    """Runs the programs that the chosen checks need."""
    call, floats, arrays = subject.call, subject.floats, subject.arrays
    of_reference = _kept(_reference_programs, subject.reference, call)
    outputs, _ = jax.eval_shape(call.bind(subject.reference), floats, arrays)
    if not outputs:
        raise ValueError(f"check: {subject.name} returns no floating-point array, so there is nothing to differentiate.")
    rng = np.random.default_rng(seed)
    kinds, dys = _cotangents(rng, outputs, max(leaf.size for leaf in floats))

    with _float64():
        wide = [_widened(leaf) for leaf in floats]
        constant = [_moved_to_cpu(leaf) for leaf in arrays]
        differences, extra = _differences(rng, subject, of_reference, wide, constant, dys, "finite differences" in checks)
        wide_dys = [np.concatenate([np.asarray(dy, np.float64), e]) for dy, e in zip(dys, extra)]
        y, _, gradients = of_reference["gradients"](wide, constant, wide_dys)
        true_values, truth = _numpy(y), _numpy(gradients)
        differences = tuple(d(truth, len(kinds) + i) for i, d in enumerate(differences))
        narrows = not all(d.agree for d in differences) and _narrows(
            jax.make_jaxpr(call.bind(subject.reference))(wide, constant).jaxpr
        )
    truth = [leaf[: len(kinds)] for leaf in truth]

    reference_y, reference_others, theirs = of_reference["gradients"](floats, arrays, dys)
    slack, value_slack = _slack_of_float64(subject, of_reference, constant, wide_dys, len(kinds))
    values = {"reference": (_numpy(reference_y), list(reference_others)), "truth": (true_values, [])}
    common: dict[str, Any] = {
        "subject": subject, "kinds": kinds, "theirs": _numpy(theirs), "truth": truth, "slack": slack, "values": values,
        "value_types": tuple(outputs), "value_slack": value_slack, "differences": differences, "narrows": narrows,
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
            failure=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            **common,
        )
    values |= {
        "plain": (_numpy(plain[0]), list(plain[1])),
        "differentiated": (_numpy(differentiated[0]), list(differentiated[1])),
    }
    return Evidence(
        ours=[np.stack([np.asarray(r[i], np.float64) for r in results]) for i in range(len(floats))],
        again=_numpy(again),
        alone=None if alone is None else _numpy(alone),
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


def _reference_programs(reference: Callable[..., Any], call: Call) -> dict[str, Callable[..., Any]]:
    flat = call.bind(reference)

    def gradients(floats: Any, arrays: Any, dys: Any) -> tuple[Any, Any, Any]:
        y, pullback, others = jax.vjp(lambda f: flat(f, arrays), list(floats), has_aux=True)
        return y, others, jax.lax.map(lambda dy: pullback(dy)[0], dys)

    def moved(floats: Any, arrays: Any, directions: Any, offsets: Any) -> Any:
        def at(item: Any) -> Any:
            direction, offset = item
            return flat([leaf + offset * d for leaf, d in zip(floats, direction)], arrays)[0]

        return jax.lax.map(at, (directions, offsets))

    return {"gradients": jax.jit(gradients), "moved": jax.jit(moved)}


_keep = functools.lru_cache(maxsize=256)(lambda make, *key: make(*key))


def _kept(make: Callable[..., dict[str, Callable[..., Any]]], *key: Any) -> dict[str, Callable[..., Any]]:
    """Programs are kept by what they were made from, so that other values of the arguments compile nothing."""
    try:
        hash(key)
    except TypeError:
        return make(*key)
    return _keep(make, *key)


# --------------------------------------------------------------------------------------------------- their arguments


def _cotangents(rng: np.random.Generator, outputs: Sequence[Any], largest: int) -> tuple[tuple[str, ...], Arrays]:
    """Cotangents of y, stacked: enough normal ones to pool POOL elements of the largest leaf, then special ones."""
    normals = int(np.clip(-(-POOL // max(largest, 1)), 2, 128))
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


def _differences(
    rng: np.random.Generator, subject: Subject, programs: Any, wide: Any, arrays: Any, dys: Arrays, wanted: bool
) -> tuple[tuple[Callable[[Arrays, int], Differences], ...], Arrays]:
    """Finite differences along random directions. Returns the cotangents that the truth is to be asked for as well, with
    zeros where y has a kink, and for each a function that makes the comparison from the answer."""
    if not wanted:
        return (), [np.zeros((0, *dy.shape[1:])) for dy in dys]
    groups = [*subject.arguments, *([None] if len(subject.arguments) > 1 else [])]
    parts = [g for g in groups for _ in range(DIRECTIONS)]
    scales = [float(np.sqrt(np.mean(np.square(leaf)))) if leaf.size else 0.0 for leaf in wide]
    scales = [s if np.isfinite(s) and s > 0 else 1.0 for s in scales]
    directions = [
        np.stack([rng.normal(size=w.shape) * s * (p is None or p == g) for p in parts])
        for w, s, g in zip(wide, scales, subject.groups)
    ]
    repeated = [np.repeat(d, len(OFFSETS), axis=0) for d in directions]
    points = programs["moved"](wide, arrays, repeated, np.tile(OFFSETS, len(parts)))
    values = [p.reshape(len(parts), len(OFFSETS), *p.shape[1:]) for p in _numpy(points)]
    compare, masked = [], []
    for i, part in enumerate(parts):
        where = "all arguments" if part is None else _argument(subject, part)
        slopes, smooth = zip(*(_slopes(v[i]) for v in values))
        masked.append([np.where(s, np.asarray(dy[i % 2], np.float64), 0.0) for s, dy in zip(smooth, dys)])

        def one(
            truth: Arrays, index: int, i: int = i, slopes: Any = slopes, smooth: Any = smooth, where: str = where
        ) -> Differences:
            terms = [m * np.where(s, slope, 0.0) for m, s, slope in zip(masked[i], smooth, slopes)]
            measured = sum(float(t.sum()) for t in terms)
            true = sum(float((t[index] * d[i]).sum()) for t, d in zip(truth, directions))
            size = sum(float(np.abs(t).sum()) for t in terms)
            rounding = sum(float((np.abs(m) * _largest(v[i])).sum()) for m, v in zip(masked[i], values)) * 2.0**-52 / STEP
            kinks = sum(int((~s).sum()) for s in smooth)
            return Differences(where, measured, true, 1e-5 * size + 64 * rounding, kinks, sum(s.size for s in smooth))

        compare.append(one)
    return tuple(compare), [np.stack([m[i] for m in masked]) for i in range(len(dys))]


def _slopes(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences at the smaller step, and where y is smooth: both steps agree, and so do both sides."""
    with np.errstate(all="ignore"):
        middle, right, left, near_right, near_left = y
        far, near = (right - left) / (2 * STEP), (near_right - near_left) / STEP
        bend = np.abs((right - middle) - (middle - left)) / STEP
        near_bend = np.abs((near_right - middle) - (middle - near_left)) / (STEP / 2)
        scale = np.abs(near).max(initial=0.0, where=np.isfinite(near)) + 2.0**-52 / STEP * 64 * _largest(y)
        agree = np.abs(far - near) <= 1e-5 * scale
        sides = (near_bend <= 1e-6 * scale) | ((near_bend >= 0.4 * bend) & (near_bend <= 0.6 * bend))
        return near, agree & sides & np.isfinite(near)


def _narrows(jaxpr: Any) -> bool:
    """Whether a program casts float64 to something narrower."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type" and equation.invars[0].aval.dtype == jnp.float64:
            new = equation.params["new_dtype"]
            if jnp.issubdtype(new, jnp.floating) and jnp.finfo(new).bits < 64:
                return True
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns"))
        if any(_narrows(getattr(p, "jaxpr", p)) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")):
            return True
    return False


def _argument(subject: Subject, group: int) -> str:
    return ", ".join(n for n, g in zip(subject.names, subject.groups) if g == group)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0, where=np.isfinite(array)))


def _slack_of_float64(
    subject: Subject, programs: Any, arrays: Any, wide_dys: Arrays, count: int
) -> tuple[Arrays | None, list[float] | None]:
    """In float64 the truth is rounded like what is checked. What rounding costs there is measured in float32, where the
    truth is known, and scaled by the ratio of the two precisions."""
    if all(leaf.dtype != jnp.float64 for leaf in subject.floats):
        return None, None
    with _float64():
        narrow = [np.asarray(leaf, np.float32) for leaf in subject.floats]
        dys = [dy.astype(np.float32) for dy in wide_dys]
        y, _, rounded = programs["gradients"](narrow, arrays, dys)
        wide = [np.asarray(leaf, np.float64) for leaf in narrow]
        true_y, _, true = programs["gradients"](wide, arrays, [dy.astype(np.float64) for dy in dys])
    ratio = 2.0**-29
    with np.errstate(all="ignore"):
        slack = [np.abs(a - b)[:count] * ratio for a, b in zip(_numpy(rounded), _numpy(true))]
        return slack, [_largest(a - b) * ratio for a, b in zip(_numpy(y), _numpy(true_y))]


# ------------------------------------------------------------------------------------------------------------ arrays


@contextlib.contextmanager
def _float64() -> Any:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _widened(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _moved_to_cpu(leaf: jax.Array) -> Any:
    return jax.device_put(leaf, jax.devices("cpu")[0])


def _numpy(leaves: Sequence[Any]) -> Arrays:
    return [np.asarray(leaf).astype(np.float64) for leaf in leaves]


def _types(leaves: Sequence[Any]) -> list[Any]:
    return [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]


def _told(leaves: Sequence[Any]) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
