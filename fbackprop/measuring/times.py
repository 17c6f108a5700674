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

__all__ = ["Ratio", "interleave", "ratio"]


class Ratio(NamedTuple):
    """A median of paired ratios with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interleave(calls: Sequence[Callable[[], object]], rounds: int = 30, seconds: float = 0.01) -> list[list[float]]:
    """Times calls in turns: in each round every call once, the order reversed from round to round.

    Args:
      calls: functions without arguments; what they return is waited for.
      rounds: how many turns.
      seconds: a turn repeats the calls until the fastest has taken about this long.
    Returns:
      For each call its seconds per call, one number a round.
    """
    for call in calls:  # compile, and settle
        jax.block_until_ready(call())

    def timed(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(call())
        return (time.perf_counter() - start) / repeats

    repeats = max(1, int(seconds / min(timed(call, 2) for call in calls)))
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds):
        order = range(len(calls)) if index % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            times[i].append(timed(calls[i], repeats))
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The median of the ratios within each round, with its 95 % interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    n, half = len(ratios), 0.98 * math.sqrt(len(ratios))
    low, high = max(math.floor(n / 2 - half), 0), min(math.ceil(n / 2 + half), n - 1)
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])
