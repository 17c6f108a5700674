"""Finite differences of the reference in float64, a second oracle that owes nothing to autodiff, aware of kinks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fbackprop.checking.measures import largest
from fbackprop.checking.subject import Subject

__all__ = ["STEP", "Arrays", "Differences", "along_directions", "as_numpy", "by_differences", "typical"]

DIRECTIONS = 2  # of finite differences, for each argument and for all together
STEP = 2.0**-16  # of finite differences, relative to the arguments
OFFSETS = (0.0, STEP, -STEP, STEP / 2, -STEP / 2)
NUMBERS = 2**24  # that a truth by finite differences may take at most

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


def along_directions(
    rng: np.random.Generator, subject: Subject, programs: Any, wide: Any, arrays: Any, dys: Arrays, wanted: bool
) -> tuple[tuple[Callable[[Arrays, int], Differences], ...], Arrays]:
    """Finite differences along random directions. Returns the cotangents that the truth is to be asked for as well, with
    zeros where y has a kink, and for each a function that makes the comparison from the answer."""
    if not wanted:
        return (), [np.zeros((0, *dy.shape[1:])) for dy in dys]
    groups = [*subject.arguments, *([None] if len(subject.arguments) > 1 else [])]
    parts = [g for g in groups for _ in range(DIRECTIONS)]
    scales = [typical(leaf) for leaf in wide]
    directions = [
        np.stack([rng.normal(size=w.shape) * s * (p is None or p == g) for p in parts])
        for w, s, g in zip(wide, scales, subject.groups)
    ]
    repeated = [np.repeat(d, len(OFFSETS), axis=0) for d in directions]
    points = programs["moved"](wide, arrays, repeated, np.tile(OFFSETS, len(parts)))
    values = [p.reshape(len(parts), len(OFFSETS), *p.shape[1:]) for p in as_numpy(points)]
    compare, masked = [], []
    for i, part in enumerate(parts):
        where = "all arguments" if part is None else subject.argument_name(part)
        slopes, smooth, truncated = zip(*(_slopes(v[i]) for v in values))
        masked.append([np.where(s, np.asarray(dy[i % 2], np.float64), 0.0) for s, dy in zip(smooth, dys)])

        def one(
            truth: Arrays,
            index: int,
            i: int = i,
            slopes: Any = slopes,
            smooth: Any = smooth,
            where: str = where,
            truncated: Any = truncated,
        ) -> Differences:
            terms = [m * np.where(s, slope, 0.0) for m, s, slope in zip(masked[i], smooth, slopes)]
            measured = sum(float(t.sum()) for t in terms)
            true = sum(float((t[index] * d[i]).sum()) for t, d in zip(truth, directions))
            size = sum(float(np.abs(t).sum()) for t in terms)
            rounding = sum(float((np.abs(m) * largest(v[i])).sum()) for m, v in zip(masked[i], values)) * 2.0**-52 / STEP
            # What the next term of the series is worth: all there is where the slope itself is zero.
            beyond = sum(float((np.abs(m) * np.where(s, t, 0.0)).sum()) for m, s, t in zip(masked[i], smooth, truncated))
            kinks = sum(int((~s).sum()) for s in smooth)
            return Differences(
                where, measured, true, 1e-5 * size + 64 * rounding + 4 * beyond, kinks, sum(s.size for s in smooth)
            )

        compare.append(one)
    return tuple(compare), [np.stack([m[i] for m in masked]) for i in range(len(dys))]


def _slopes(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Central differences at the smaller step; where y is smooth: both steps agree, and so do both sides; and by how much
    the steps differ."""
    with np.errstate(all="ignore"):
        middle, right, left, near_right, near_left = y
        far, near = (right - left) / (2 * STEP), (near_right - near_left) / STEP
        bend = np.abs((right - middle) - (middle - left)) / STEP
        near_bend = np.abs((near_right - middle) - (middle - near_left)) / (STEP / 2)
        scale = np.abs(near).max(initial=0.0, where=np.isfinite(near)) + 2.0**-52 / STEP * 64 * largest(y)
        agree = np.abs(far - near) <= 1e-5 * scale
        sides = (near_bend <= 1e-6 * scale) | ((near_bend >= 0.4 * bend) & (near_bend <= 0.6 * bend))
        return near, agree & sides & np.isfinite(near), np.abs(far - near)


def by_differences(subject: Subject, programs: Any, wide: Arrays, arrays: Any, dys: Arrays, why: str) -> tuple[Arrays, Arrays]:
    """Values and cotangents of a reference that JAX cannot differentiate: each element of the arguments is moved."""
    values = as_numpy(programs["moved"](wide, arrays, [np.zeros((1, *w.shape)) for w in wide], np.zeros(1)))
    count, size = sum(w.size for w in wide), sum(v.size for v in values)
    if count * len(OFFSETS) * size > NUMBERS:
        raise ValueError(
            f"check: JAX cannot differentiate the reference of {subject.name} ({why}), and its {count} arguments and {size} "
            f"results are too many for finite differences; give smaller arrays, or a reference that can be differentiated."
        )
    directions, first = [], 0
    for w in wide:
        one = np.zeros((count, w.size))
        one[first : first + w.size] = np.eye(w.size) * typical(w)
        directions.append(np.repeat(one.reshape(count, *w.shape), len(OFFSETS), axis=0))
        first += w.size
    moved = programs["moved"](wide, arrays, directions, np.tile(OFFSETS, count))
    rows = len(dys[0])
    total = np.zeros((rows, count))
    for dy, points in zip(dys, as_numpy(moved)):
        points = points.reshape(count, len(OFFSETS), -1)
        for i in range(count):
            slope, smooth, _ = _slopes(points[i])
            total[:, i] += np.where((dy.reshape(rows, -1) != 0) & ~smooth, np.nan, dy.reshape(rows, -1) * slope).sum(1)
    ends = np.cumsum([w.size for w in wide])
    truth = [part.reshape(rows, *w.shape) / typical(w) for part, w in zip(np.split(total, ends[:-1], axis=1), wide)]
    return [v[0] for v in values], truth


def typical(array: np.ndarray) -> float:
    """The root mean square, or 1 where that says nothing."""
    with np.errstate(all="ignore"):
        size = float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
    return size if np.isfinite(size) and size > 0 else 1.0


def as_numpy(leaves: Sequence[Any]) -> Arrays:
    return [np.asarray(leaf).astype(np.float64) for leaf in leaves]
