"""What a wrong cotangent looks like, in a sentence that says where to look: each guess is a pattern that is tested.

A guess is told only where it explains the whole leaf: what remains after it is below a hundredth of the error.
"""

import itertools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from fbackprop.checking.measures import largest
from fbackprop.checking.programs import Evidence

__all__ = ["likely"]

Guess = Callable[[Evidence, int, int], Iterator[str]]
SHARE = 1e-2  # of the error that a guess may leave unexplained


def likely(evidence: Evidence, leaf: int, row: int) -> str:
    """The first guess that explains the cotangent of this leaf for this cotangent of y, with a space before it."""
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    if not (np.isfinite(truth).all() and np.isfinite(ours).all() and truth.any()):
        return ""
    for guess in _GUESSES:
        for sentence in guess(evidence, leaf, row):
            return f" {sentence}"
    return ""


def _same(ours: np.ndarray, guess: np.ndarray, truth: np.ndarray) -> bool:
    """Whether a guess leaves little of the error."""
    return ours.shape == guess.shape and largest(ours - guess) <= SHARE * largest(ours - truth)


def _zero(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    if not evidence.ours[leaf][row].any():
        yield "It is zero everywhere: look for a stop_gradient, a None, or a mask that is never true."


def _factor(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    factor = float((ours * truth).sum() / (truth * truth).sum())
    if truth.size < 2 or not _same(ours, factor * truth, truth):
        return
    if abs(factor + 1) < 1e-3:
        yield "It is minus the truth: look for a sign."
        return
    sizes = {n for o in evidence.value_types for n in o.shape} | {n for f in evidence.subject.floats for n in f.shape}
    sizes |= {int(np.prod(f.shape)) for f in (*evidence.value_types, *evidence.subject.floats)}
    for n in sorted(n for n in sizes if n > 1):
        if abs(factor * n - 1) < 1e-3:
            yield f"Every element is the truth divided by {n}: look for a mean in place of a sum over {n} elements."
            return
        if abs(factor / n - 1) < 1e-3:
            yield f"Every element is {n} times the truth: look for a sum in place of a mean, or counted {n} times."
            return
    yield f"Every element is {factor:.4g} times the truth: look for a factor."


def _shift(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    shift = float((ours - truth).mean())
    if truth.size > 1 and shift and _same(ours, truth + shift, truth):
        yield f"Every element is {shift:.4g} more than the truth: look for a constant that is added, or a mean that is missing."


def _exchanged(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    for other, name in enumerate(evidence.subject.names):
        if other != leaf and _same(ours, evidence.truth[other][row], truth):
            yield f"It is the cotangent of {name}: look at the order in which the backward returns them."


def _moved(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    for a, b in itertools.combinations(range(truth.ndim), 2):
        if _same(ours, np.swapaxes(truth, a, b), truth):
            yield f"It is the truth with axes {a} and {b} exchanged: look for a transpose."
    for axis in range(truth.ndim):
        if _same(ours, np.flip(truth, axis), truth):
            yield f"It is the truth backwards along axis {axis}: look for a flip, or a reversed scan."
        for by in (1, -1):
            rolled = np.roll(truth, by, axis)
            inner = [slice(None)] * truth.ndim
            inner[axis] = slice(1, None) if by == 1 else slice(None, -1)
            if truth.shape[axis] > 2 and _same(ours[tuple(inner)], rolled[tuple(inner)], truth[tuple(inner)]):
                yield f"It is the truth moved by {by} along axis {axis}: look at an index, a slice or a padding."


def _cotangent(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    """For functions of single elements: dy itself, or one number in place of it."""
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    for dy in evidence.dys[row]:
        dy = np.asarray(dy, np.float64)
        if dy.shape != truth.shape or truth.size < 3:
            continue
        if _same(ours, dy, truth):
            yield "It is the cotangent of y itself: the derivative is taken as 1."
        with np.errstate(all="ignore"):
            used = ours * dy / truth
        usable = np.isfinite(used) & (np.abs(dy) > 1e-2)
        if usable.sum() > 2 and np.ptp(used[usable]) <= 1e-3 * np.abs(used[usable]).max() and np.ptp(dy) > 0:
            yield f"One number, {used[usable][0]:.4g}, stands for the whole cotangent of y: look for dy[0], or a mean of it."


def _constant(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    for axis in range(truth.ndim):
        if truth.shape[axis] > 1 and not np.ptp(ours, axis).any() and np.ptp(truth, axis).any():
            yield f"It is the same along axis {axis}, the truth is not: look for a sum over it that is broadcast back."


def _place(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    """The wrong elements have a place, or a kind of argument, in common."""
    ours, truth = evidence.ours[leaf][row], evidence.truth[leaf][row]
    error = np.abs(ours - truth)
    wrong = error > SHARE * error.max()
    count = f"{int(wrong.sum())} of {wrong.size} elements are off"
    if wrong.all() or not wrong.any():
        yield f"{count}." if wrong.size > 1 else ""
        return
    at = np.argwhere(wrong)
    x = np.asarray(evidence.subject.floats[leaf], np.float64)
    for told, where in {
        "zero": x == 0, "negative": x < 0, "positive": x > 0,
        "beyond 1 in size": np.abs(x) > 1, "beyond 10 in size": np.abs(x) > 10,
    }.items():  # fmt: skip
        if not (wrong & ~where).any() and wrong.sum() >= 0.8 * where.sum():
            yield f"{count}, those where the argument is {told}: look at that branch, or at the kink."
            return
    for axis in range(wrong.ndim):
        places = np.unique(at[:, axis])
        if len(places) == 1 and wrong.shape[axis] > 1:
            yield f"{count}, all at {places[0]} of {wrong.shape[axis]} along axis {axis}: look at a slice or a mask."
            return
    yield f"{count}."


def _rounded(evidence: Evidence, leaf: int, row: int) -> Iterator[str]:
    ours, dtype = evidence.ours[leaf][row], evidence.subject.floats[leaf].dtype
    if jnp.finfo(dtype).bits <= 16 or ours.size < 4:
        return
    for narrow in (jnp.bfloat16, jnp.float16):
        with np.errstate(all="ignore"):
            if (ours.astype(narrow).astype(np.float64) == ours).all() and (np.frexp(ours)[0] * 8 % 1).any():
                yield f"Every element is a number of {jnp.dtype(narrow).name}: look for a cast, or a sum in that precision."
                return


_GUESSES: tuple[Guess, ...] = (_zero, _factor, _shift, _exchanged, _moved, _cotangent, _constant, _rounded, _place)
