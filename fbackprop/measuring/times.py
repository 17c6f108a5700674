"""Times on machines that are shared and noisy: rivals take turns, and what is reported is the ratio within a turn.

Whatever else the machine does meets both rivals of a turn, so the ratio of their times is steadier than either time. The
median over the turns is the figure; its 95 % interval comes from the order of the ratios alone (binomial distribution, by
its normal approximation), so it needs no assumption on how they are distributed.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

__all__ = ["FEWEST", "Ratio", "geometric_mean", "interleave", "ratio"]

FEWEST = 6
"""Turns that an interval of 95 % needs: with six the median lies between the least and the greatest in 31 of 32 cases."""


class Ratio(NamedTuple):
    """A median of paired ratios with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interleave(
    calls: Sequence[Callable[[], object]],
    rounds: int = 30,
    seconds: float = 0.01,
    budget: float | None = None,
    settled: bool = False,
    fewest: int = FEWEST,
) -> list[list[float]]:
    """Times calls in turns: in each round every call once, the order reversed from round to round.

    Args:
      calls: functions without arguments; what they return is waited for.
      rounds: how many turns.
      seconds: a turn repeats a call until it has taken about this long.
      budget: seconds for all turns together; where ``rounds`` turns take longer there are fewer, but not below ``fewest``.
      settled: whether each call has run before.
    Returns:
      For each call its seconds per call, one number a round.
    """

    def timed(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(call())
        return (time.perf_counter() - start) / repeats

    for call in () if settled else calls:  # compile
        timed(call, 1)
    trial = [timed(call, 1) for call in calls]
    repeats = [max(1, int(seconds / max(t, 1e-7))) for t in trial]
    if budget is not None:
        turn = sum(n * t for n, t in zip(repeats, trial))
        rounds = min(rounds, max(fewest, int(budget / turn)))
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds):
        order = range(len(calls)) if index % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            times[i].append(timed(calls[i], repeats[i]))
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The median of the ratios within each round, with its 95 % interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    n, half = len(ratios), 0.98 * math.sqrt(len(ratios))
    low, high = max(math.floor(n / 2 - half), 0), min(math.ceil(n / 2 + half), n - 1)
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers; NaN where there are none."""
    known = [math.log(v) for v in values if v > 0]
    return math.exp(sum(known) / len(known)) if known else math.nan
