"""The checks: one small function each, in one table, from evidence to findings.

Elementwise against the truth a cotangent may err by the tolerance of measures.py; in the root mean square over 4096
elements or more by twice what ``jax.grad`` of the reference errs by, or by half of eps. (In float64, where the truth is itself
rounded, what rounding costs is measured in float32 and scaled.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.checking.causes import likely
from fbackprop.checking.measures import eps_of, largest, representable, smallest, tolerance_of, worst_of
from fbackprop.checking.programs import POOL, Evidence, cotangents_of_integers
from fbackprop.checking.report import Finding, LeafError, Report

__all__ = ["CHECKS", "allowed_between", "elementwise", "judge", "relative_tolerances"]

Check = Callable[[Evidence], Iterator[Finding]]
NORMAL = ("normal", "a", "b", "a + b")  # kinds of cotangents of y that are drawn alike

CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order in which they run."""


def _named(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def judge(evidence: Evidence, names: Sequence[str]) -> Report:
    """Runs the named checks."""
    subject = evidence.subject
    findings = [f for name in CHECKS if name in names for f in CHECKS[name](evidence)]
    if evidence.failure and not findings:  # without a gradient no check can say anything: never "ok"
        findings = list(CHECKS["runs"](evidence))
    notes = []
    if not subject.exact:
        notes.append("its backward is declared inexact: not compared with the gradient of the reference.")
    if kinks := sum(d.kinks for d in evidence.differences):
        total = sum(d.points for d in evidence.differences)
        notes.append(f"finite differences left out {kinks} of {total} values of y, which are not smooth there.")
    if evidence.narrow:
        notes.append(f"the truth is not all float64: in the reference {', '.join(evidence.narrow)} ran in its own precision.")
    if evidence.undifferentiable and not evidence.failure:
        notes.append(f"JAX cannot differentiate the reference; the truth is finite differences. ({evidence.undifferentiable})")
    errors = () if evidence.failure or not subject.exact else tuple(_leaf_errors(evidence))
    return Report(subject.name, subject.reference_name, tuple(findings), errors, tuple(names), tuple(notes))


# ------------------------------------------------------------------------------------------------------ elementwise


def _rows(evidence: Evidence, kinds: Sequence[str]) -> list[int]:
    return [k for k, kind in enumerate(evidence.kinds) if kind in kinds]


def _tolerance(evidence: Evidence, leaf: int, rows: list[int]) -> float:
    """What the cotangent of a leaf may err by, over these cotangents of y."""
    truth, theirs = evidence.truth[leaf][rows], evidence.theirs[leaf][rows]
    return tolerance_of(truth, theirs, evidence.subject.floats[leaf].dtype, _slack(evidence, leaf, rows))


def _normal(evidence: Evidence) -> Iterator[tuple[int, str, Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each leaf its number, name and type, and over the normal cotangents of y: ours, that of ``jax.grad``, the truth, and
    where all three are numbers."""
    rows = _rows(evidence, NORMAL)
    for i, (name, leaf) in enumerate(zip(evidence.subject.names, evidence.subject.floats)):
        ours, theirs, truth = (e[i][rows] for e in (evidence.ours, evidence.theirs, evidence.truth))
        yield i, name, leaf, ours, theirs, truth, np.isfinite(ours) & np.isfinite(theirs) & representable(truth, leaf.dtype)


def elementwise(
    evidence: Evidence, check: str, kinds: Sequence[str], relative: Sequence[float] | None = None
) -> Iterator[Finding]:
    """Each leaf against the tolerance, over all cotangents of y of these kinds; or against one relative to the largest."""
    rows = _rows(evidence, kinds)
    for i, (name, leaf) in enumerate(zip(evidence.subject.names, evidence.subject.floats)):
        ours, theirs, truth = (e[i][rows] for e in (evidence.ours, evidence.theirs, evidence.truth))
        tolerance = _tolerance(evidence, i, rows)
        if relative is not None:
            tolerance = max(tolerance, relative[i] * largest(truth))
        error, index = worst_of(ours, truth, leaf.dtype)
        if error <= tolerance or index is None:
            continue
        tolerance = max(tolerance, _second_opinion(evidence, i, rows))
        if error <= tolerance:
            continue
        unit = eps_of(leaf.dtype) * (largest(truth) or 1.0)
        reference, _ = worst_of(theirs, truth, leaf.dtype)
        message = (
            f"the cotangent is {ours[index]:.7g} where the truth is {truth[index]:.7g}, at {list(index[1:])}: off by "
            f"{error / unit:.3g} ulps of the largest element, {tolerance / unit:.3g} allowed (jax.grad of the reference: "
            f"{reference / unit:.3g}).{likely(evidence, i, rows[index[0]])}"
        )
        numbers = {
            "ours": float(ours[index]), "truth": float(truth[index]), "error": error, "tolerance": tolerance,
            "reference_error": reference,
        }  # fmt: skip
        yield Finding(check, name, message, index[1:], numbers)


def _second_opinion(evidence: Evidence, leaf: int, rows: Sequence[int]) -> float:
    """The tolerance where the first one has been exceeded: of few elements ``jax.grad`` may have been right by luck, so it
    is asked again at arguments that differ in the last place. And float64 is not exact either: 1 − y² of a saturated y
    is all rounding, of the size of eps times what was subtracted."""
    rows = list(rows)
    with np.errstate(all="ignore"):
        errors = [largest(theirs[leaf][rows] - truth[leaf][rows]) for theirs, truth in evidence.nudged()]
    return max([2 * e for e in errors] + [_float64_rounding(evidence, leaf, rows)])


def _float64_rounding(evidence: Evidence, leaf: int, rows: Sequence[int]) -> float:
    return 2.0**-48 * max(_ordinary(evidence, leaf, rows), largest(evidence.truth[leaf]))


def relative_tolerances(evidence: Evidence) -> list[float]:
    """Of each leaf, by its largest element."""
    rows, tolerances = _rows(evidence, NORMAL), []
    for i in range(len(evidence.subject.floats)):
        tolerances.append(_tolerance(evidence, i, rows) / (largest(evidence.truth[i][rows]) or 1.0))
    return tolerances


def allowed_between(evidence: Evidence, leaf: int | None, output: int | None, value: np.ndarray) -> float:
    """By how much two right programs of the same thing may differ, a leaf's cotangent or an output: each is rounded
    differently, as far as the tolerance from the truth."""
    if leaf is None:
        assert output is not None
        dtype, true = evidence.value_types[output].dtype, evidence.values["truth"][0][output]
        slack = evidence.value_slack[output] if evidence.value_slack and dtype == jnp.float64 else 0.0
        return max(
            8 * eps_of(dtype) * largest(value), 2 * tolerance_of(true, evidence.values["reference"][0][output], dtype, slack)
        )
    dtype, rows = evidence.subject.floats[leaf].dtype, _rows(evidence, NORMAL)
    allowed = 8 * eps_of(dtype) * largest(value)
    if evidence.subject.exact:
        allowed = max(allowed, 2 * _tolerance(evidence, leaf, rows))
        if not evidence.truth[leaf][rows].any():  # all of it cancels: what is left is rounding, of the size of what cancelled
            allowed = max(allowed, 8 * eps_of(dtype) * _ordinary(evidence, leaf, rows))
    return allowed


def _ordinary(evidence: Evidence, leaf: int, rows: Sequence[int]) -> float:
    """The size that a cotangent has where nothing cancels: that of dy times y over the argument."""
    size = max((largest(np.asarray(y)) for y in evidence.values["truth"][0]), default=0.0)
    argument = largest(np.asarray(evidence.subject.floats[leaf], np.float64))
    dy = max((largest(np.asarray(d, np.float64)) for k in rows for d in evidence.dys[k]), default=0.0)
    return dy * size / argument if argument > float(jnp.finfo(jnp.float32).tiny) else 0.0


def _slack(evidence: Evidence, leaf: int, rows: Sequence[int]) -> float:
    """For a leaf in float64: what rounding costs, measured in float32 and scaled."""
    if evidence.slack is None or evidence.subject.floats[leaf].dtype != jnp.float64:
        return 0.0
    return largest(evidence.slack[leaf][list(rows)])


def _compared(evidence: Evidence) -> bool:
    return evidence.subject.exact and not evidence.failure


# ------------------------------------------------------------------------------------------------------- checks


@_named("runs")
def _runs(evidence: Evidence) -> Iterator[Finding]:
    """It can be differentiated at all, and returns what the reference returns."""
    if evidence.failure:
        yield Finding("runs", evidence.subject.name, f"it could not be differentiated: {evidence.failure}")


@_named("value")
def _value(evidence: Evidence) -> Iterator[Finding]:
    """The value is the reference's, and the same with and without differentiation: JAX does not look."""
    truth, theirs = evidence.values["truth"][0], evidence.values["reference"]
    for which in ("plain", "differentiated"):
        if which not in evidence.values:
            continue
        floats, others = evidence.values[which]
        told = "without differentiation" if which == "plain" else "under differentiation (what the forward of the rule returns)"
        for i, (ours, reference, true) in enumerate(zip(floats, theirs[0], truth)):
            where, dtype = f"output {i}", evidence.value_types[i].dtype
            slack = evidence.value_slack[i] if evidence.value_slack and dtype == jnp.float64 else 0.0
            tolerance = tolerance_of(true, reference, dtype, slack)
            error, index = worst_of(ours, true, dtype)
            strange = ~np.isfinite(ours) & representable(true, dtype) & np.isfinite(reference)
            if strange.any():
                index = tuple(map(int, np.argwhere(strange)[0]))
            if (error > tolerance or strange.any()) and index is not None:
                message = f"{told} the value is {ours[index]:.7g}, that of the reference {true[index]:.7g}, at {list(index)}."
                yield Finding("value", where, message, index, {"error": error, "tolerance": tolerance})
            lost = (ours != true) & np.isinf(true) & (reference == true)
            if lost.any():
                index = tuple(map(int, np.argwhere(lost)[0]))
                message = f"{told} the value is {ours[index]:.7g}, that of the reference {true[index]}, at {list(index)}."
                yield Finding("value", where, message, index)
        for i, (ours, reference) in enumerate(zip(others, theirs[1])):
            if not np.array_equal(_plain(ours), _plain(reference)):
                yield Finding("value", f"output of integers {i}", f"{told} it is not the value of the reference.")


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


@_named("integers")
def _integers(evidence: Evidence) -> Iterator[Finding]:
    """What a custom_vjp gives to integers, masks and keys is dropped by JAX without a word, so it must be nothing."""
    subject = evidence.subject
    if evidence.failure or not subject.arrays:
        return
    for name, wrong in cotangents_of_integers(subject):
        yield Finding("integers", name, wrong)


@_named("types")
def _types(evidence: Evidence) -> Iterator[Finding]:
    """Each cotangent has the dtype and shape of its argument, and is not weakly typed where that is not."""
    for name, leaf, got in zip(evidence.subject.names, evidence.subject.floats, evidence.types):
        if (got.dtype, got.shape) != (leaf.dtype, leaf.shape):
            theirs = f"{leaf.dtype}{list(leaf.shape)}"
            message = f"the cotangent is {got.dtype}{list(got.shape)}, the argument {theirs}; JAX does not cast it."
            yield Finding("types", name, message)
        elif got.weak_type and not leaf.weak_type:
            yield Finding(
                "types", name, "the cotangent is weakly typed, the argument is not: what is computed with it may change dtype."
            )


@_named("cotangents")
def _cotangents(evidence: Evidence) -> Iterator[Finding]:
    """Each element of each cotangent is true for cotangents of y that are not constant."""
    if _compared(evidence):
        yield from elementwise(evidence, "cotangents", NORMAL)


@_named("one-hot")
def _one_hot(evidence: Evidence) -> Iterator[Finding]:
    """The same where only one element of y has a cotangent."""
    if _compared(evidence):
        yield from elementwise(evidence, "one-hot", ("one-hot",))


@_named("zero")
def _zero(evidence: Evidence) -> Iterator[Finding]:
    """A zero cotangent of y gives zero, whether or not the backward is exact."""
    if evidence.failure:
        return
    k = evidence.kinds.index("zero")
    for name, ours, truth in zip(evidence.subject.names, evidence.ours, evidence.truth):
        wrong = (ours[k] != 0) & (truth[k] == 0) & ~np.isnan(ours[k])  # NaN: zero times something infinite
        if wrong.any():
            index = tuple(map(int, np.argwhere(wrong)[0]))
            message = (
                f"the cotangent is {ours[k][index]:.7g} at {list(index)} although that of y is zero: it is not linear in it."
            )
            yield Finding("zero", name, message, index, {"ours": float(ours[k][index])})


@_named("alone")
def _alone(evidence: Evidence) -> Iterator[Finding]:
    """Differentiating one argument on its own gives what differentiating all of them gives."""
    if evidence.alone is None or evidence.failure:
        return
    for i, (name, ours) in enumerate(zip(evidence.subject.names, evidence.alone)):
        together, dtype = evidence.ours[i][0], evidence.subject.floats[i].dtype
        allowed = allowed_between(evidence, i, None, together)
        error, index = worst_of(ours, together, dtype)
        if error > allowed and index is not None:
            both = f"{ours[index]:.7g} at {list(index)}, with the others {together[index]:.7g}"
            message = f"differentiated alone its cotangent is {both}."
            yield Finding("alone", name, message, index, {"error": error, "tolerance": allowed})


@_named("rms")
def _rms(evidence: Evidence) -> Iterator[Finding]:
    """The root mean square of the error is at most twice that of ``jax.grad``, or half of eps times that of the truth."""
    if not _compared(evidence):
        return
    rows = _rows(evidence, NORMAL)
    for i, name, leaf, ours, theirs, truth, usable in _normal(evidence):
        scale = largest(truth)
        if usable.sum() < POOL or scale < float(jnp.finfo(leaf.dtype).tiny):
            continue
        error, reference, typical = (_rms_of(part[usable] / scale) for part in (ours - truth, theirs - truth, truth))
        allowed = max(2 * reference, 0.5 * eps_of(leaf.dtype) * typical, 3 * _slack(evidence, i, rows) / scale)
        if error > allowed:
            message = (
                f"the root mean square error is {error:.3g} of the largest element, {allowed:.3g} allowed (jax.grad of the "
                f"reference: {reference:.3g}): it loses precision, or is biased."
            )
            numbers = {"rms": error, "reference_rms": reference, "tolerance": allowed}
            yield Finding("rms", name, message, None, numbers)


def _rms_of(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@_named("sums")
def _sums(evidence: Evidence) -> Iterator[Finding]:
    """The errors of many elements cancel: sums over each axis, and over all of them, are true as well.

    A backward that drops what is small errs by little in each element, and by much in what the optimizer sums.
    """
    if not _compared(evidence):
        return
    rows = _rows(evidence, NORMAL)
    for i, name, leaf, ours, theirs, truth, usable in _normal(evidence):
        if leaf.size < 2 or not usable.all():
            continue
        axes: list[Any] = [(axis + 1,) for axis in range(leaf.ndim)] + (
            [tuple(range(1, leaf.ndim + 1))] if leaf.ndim > 1 else []
        )
        for axis in axes:
            count = int(np.prod([truth.shape[a] for a in axis]))
            if count < 2:
                continue
            error = np.abs((ours - truth).sum(axis))
            reference, size = largest((theirs - truth).sum(axis)), largest(np.abs(truth).sum(axis))
            rounding = 4 * eps_of(leaf.dtype) * size
            allowed = max(2 * reference, rounding, count * smallest(leaf.dtype), 3 * count * _slack(evidence, i, rows))
            if error.max() > allowed and leaf.dtype != jnp.float64:
                allowed = max(allowed, count * _float64_rounding(evidence, i, rows))
            if error.max() > allowed:
                where = "all axes" if len(axis) > 1 else f"axis {axis[0] - 1}"
                message = (
                    f"summed over {where} the cotangent is off by {error.max():.3g}, {allowed:.3g} allowed (jax.grad of the "
                    f"reference: {reference:.3g}): small values are dropped, or rounding is biased; elements err one way."
                )
                yield Finding("sums", name, message, None, {"error": float(error.max()), "tolerance": allowed})
                break


@_named("finite")
def _finite(evidence: Evidence) -> Iterator[Finding]:
    """Nothing is infinite or NaN where the truth is a number of the dtype, and nothing is NaN where the value is finite.

    Where the truth is finite but ``jax.grad`` of the reference is not, the dtype is too narrow for the definition itself.
    """
    if not _compared(evidence):
        return
    values = [v for which in ("plain", "truth") for v in evidence.values[which][0]]
    finite_value = all(v.size and np.isfinite(v).all() for v in values) and not evidence.undifferentiable
    rows = [k for k, kind in enumerate(evidence.kinds) if kind != "zero"]  # there zero may meet something infinite
    for i, name in enumerate(evidence.subject.names):
        ours, theirs, truth = (e[i][rows] for e in (evidence.ours, evidence.theirs, evidence.truth))
        possible = representable(truth, evidence.subject.floats[i].dtype)
        wrong = ~np.isfinite(ours) & possible & np.isfinite(theirs)
        for row in np.flatnonzero(wrong.reshape(len(rows), -1).any(1)):
            wrong[row] &= np.isfinite(evidence.single(rows[row])[i])
        wrong |= np.isnan(ours) & np.isinf(truth) & (theirs == truth)
        if wrong.any():
            where = tuple(map(int, np.argwhere(wrong)[0]))
            message = (
                f"the cotangent is {ours[where]} at {list(where[1:])} where the truth is {truth[where]:.7g}; "
                f"{int(wrong.any(0).sum())} of {wrong[0].size} elements."
            )
            yield Finding("finite", name, message, where[1:], {"truth": float(truth[where])})
            continue
        lost = np.isnan(ours) & np.isnan(theirs) & np.isnan(truth) if evidence.subject.judged_at_kinks else wrong
        if finite_value and lost.any():
            where = tuple(map(int, np.argwhere(lost)[0]))
            message = (
                f"the cotangent is nan at {list(where[1:])} although the value is finite, and so is that of jax.grad of the "
                f"reference; {int(lost.any(0).sum())} of {lost[0].size} elements. Usually a branch that is not taken divides "
                "by zero or takes the logarithm or the root of it: make the argument safe inside jnp.where, too."
            )
            yield Finding("finite", name, message, where[1:])


@_named("nonzero")
def _nonzero(evidence: Evidence) -> Iterator[Finding]:
    """A cotangent is not all zero where the truth is not: the model would never learn."""
    if not _compared(evidence):
        return
    rounding = 2.0**-48 * max((largest(truth) for truth in evidence.truth), default=0.0)  # next to another cotangent: no more
    for i, name in enumerate(evidence.subject.names):
        scale, least = largest(evidence.truth[i]), max(smallest(evidence.subject.floats[i].dtype), rounding)
        with np.errstate(invalid="ignore"):  # ∞ − ∞: such places say nothing
            known = largest(evidence.theirs[i] - evidence.truth[i]) < scale  # else jax.grad errs by more than zero does
        if scale > least and known and evidence.theirs[i].any() and not evidence.ours[i].any():
            yield Finding(
                "nonzero", name, f"the cotangent is zero everywhere; the truth reaches {scale:.3g}.", None, {"truth": scale}
            )


@_named("repeat")
def _repeat(evidence: Evidence) -> Iterator[Finding]:
    """The backward called twice with the same cotangent gives the same bits: it keeps nothing."""
    for name, first, second in zip(evidence.subject.names, evidence.ours, evidence.again):
        if not np.array_equal(first[0], second, equal_nan=True):
            error, index = worst_of(second, first[0], jnp.float64)
            yield Finding("repeat", name, "the second call of the backward gave another result.", index, {"error": error})


@_named("linear")
def _linear(evidence: Evidence) -> Iterator[Finding]:
    """The backward is linear: the cotangent of a + b is the sum of those of a and of b."""
    if evidence.failure:
        return
    a, b, both = (evidence.kinds.index(kind) for kind in ("a", "b", "a + b"))
    for i, name in enumerate(evidence.subject.names):
        dtype, ours, theirs = evidence.subject.floats[i].dtype, evidence.ours[i], evidence.theirs[i]
        with np.errstate(all="ignore"):
            gap, reference_gap = (np.abs(g[both] - g[a] - g[b]) for g in (ours, theirs))
            top = max(largest(ours[k]) for k in (a, b, both))
        allowed = max(4 * largest(reference_gap), 16 * eps_of(dtype) * top, 3 * smallest(dtype))
        allowed = max(allowed, 12 * _slack(evidence, i, (a, b, both)))
        if evidence.subject.exact:  # each of the three may err by the tolerance
            rows = _rows(evidence, NORMAL)
            allowed = max(allowed, 3 * tolerance_of(evidence.truth[i][rows], theirs[rows], dtype))
        gap = np.where(np.isfinite(gap), gap, 0.0)
        if gap.size and gap.max() > allowed:
            index = tuple(map(int, np.unravel_index(int(gap.argmax()), gap.shape)))
            message = (
                f"the cotangent for a + b is {ours[both][index]:.7g} at {list(index)}, those for a and b add up to "
                f"{ours[a][index] + ours[b][index]:.7g}: the backward is not linear."
            )
            yield Finding("linear", name, message, index, {"error": float(gap[index]), "tolerance": allowed})


@_named("finite differences")
def _finite_differences(evidence: Evidence) -> Iterator[Finding]:
    """The second oracle: the truth itself, along random directions, against differences of the reference's values."""
    worst: dict[str, Any] = {}
    for d in evidence.differences if evidence.subject.exact and not evidence.narrow else ():
        if not d.agree:
            worst.setdefault(d.where, d)
    for where, d in worst.items():
        message = (
            f"along a random direction the reference changes by {d.measured:.7g}, but its own gradient says {d.true:.7g}: its "
            "gradient is not that of its values (stop_gradient, a custom rule inside, or a jump)."
        )
        yield Finding(
            "finite differences", where, message, None, {"measured": d.measured, "true": d.true, "tolerance": d.tolerance}
        )


def _leaf_errors(evidence: Evidence) -> Iterator[LeafError]:
    rows = _rows(evidence, NORMAL)
    for i, (name, leaf) in enumerate(zip(evidence.subject.names, evidence.subject.floats)):
        truth, unit = evidence.truth[i][rows], eps_of(leaf.dtype)
        scale = largest(truth) or 1.0
        error, index = worst_of(evidence.ours[i][rows], truth, leaf.dtype)
        reference, _ = worst_of(evidence.theirs[i][rows], truth, leaf.dtype)
        with np.errstate(all="ignore"):
            apart = largest(evidence.ours[i][rows] - evidence.theirs[i][rows])
        where, relative = None if index is None else index[1:], error / scale
        ulps = (relative / unit, reference / scale / unit, apart / scale / unit)
        yield LeafError(name, str(leaf.dtype), tuple(leaf.shape), relative, *ulps, where)
