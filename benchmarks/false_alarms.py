"""False alarms of ``fbackprop.check``: many runs over right functions, whatever is found is wrong.

    python benchmarks/false_alarms.py [--runs N | --seeds N] [--first SEED] [--only NAME …] [--depth full] [--list]

Every pair (function, shape) of tests/bank.py is checked at increasing seeds, which draw the arguments, the cotangents and the
directions; the compiled programs of a pair are reused, so a run costs milliseconds once its pair has been compiled. Exit code 1
where there was a false alarm; each is printed with its table.
"""

import argparse
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import bank  # type: ignore[import-not-found]

from fbackprop.checking import check


def pairs(only: Sequence[str] | None) -> list[tuple[Any, Any]]:
    return [(e, s) for e in bank.RIGHT if not only or any(o in e.name for o in only) for s in e.shapes]


def seeds_of(number: int, runs: int, count: int, first: int) -> range:
    """Of the pair of this number: so many that all pairs together make exactly ``runs``."""
    return range(first, first + runs // count + (number < runs % count))


def alarms(chosen: Sequence[tuple[Any, Any]], runs: int, first: int, depth: str) -> Iterator[tuple[str, Any]]:
    """For each run its name, and the report, or what was raised, where it is an alarm."""
    extra = {"depth": depth} if depth != "quick" else {}
    for number, (entry, shape) in enumerate(chosen):
        for seed in seeds_of(number, runs, len(chosen), first):
            told = None
            try:
                with jax.enable_x64(entry.x64):
                    fn, args, options = entry.make(seed, shape)
                    report = check(fn, *args, seed=seed, **extra, **options)
                told = None if report.ok else report
            except Exception as error:  # a checker that breaks on a right function has alarmed as well
                told = f"{type(error).__name__}: {error}"
            yield f"{entry.name}, shape {list(shape)}, seed {seed}", told
        if number % 16 == 15:
            jax.clear_caches()  # programs of thousands of pairs would fill the memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10000, metavar="N", help="checks altogether (default: 10000)")
    parser.add_argument("--seeds", type=int, metavar="N", help="instead of --runs: so many seeds for each pair")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="functions with one of these in their name; by default all")
    parser.add_argument("--depth", default="quick", choices=("quick", "full"), help="of the checks (default: quick)")
    parser.add_argument("--list", action="store_true", help="print the pairs and stop")
    options = parser.parse_args(arguments)
    chosen = pairs(options.only)
    if not chosen:
        parser.error(f"no right function is named like {', '.join(options.only)}")
    runs = options.runs if options.seeds is None else options.seeds * len(chosen)
    if runs < 1:
        parser.error("--runs and --seeds take a number from 1 on")
    if options.list:
        print("\n".join(f"{entry.name}, shape {list(shape)}" for entry, shape in chosen))
        return 0
    started, done, found = time.monotonic(), 0, []
    for name, told in alarms(chosen, runs, options.first, options.depth):
        done += 1
        if told is not None:
            found.append((name, told))
            print(f"\rFALSE ALARM {name}\n{told}", flush=True)
        if sys.stderr.isatty() or done % 500 == 0:
            seconds = time.monotonic() - started
            left = seconds / done * (runs - done)
            line = f"{done} of {runs} runs, {len(found)} false alarms, {seconds:.0f} s, about {left:.0f} s left: {name}"
            print(f"\r{line[:118]:118}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name, _ in found:
        print(f"false alarm: {name}")
    functions = len({entry.name for entry, _ in chosen})
    print(
        f"{done} runs over {len(chosen)} pairs of {functions} right functions and a shape: {len(found)} false alarms; "
        f"{time.monotonic() - started:.0f} s on {os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
