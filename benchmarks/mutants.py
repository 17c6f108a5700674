"""Is every wrong backward found? Mutants of the rules, each judged by the library's own ``check``.

    python benchmarks/mutants.py [NAMES …] [--jobs N] [--all] [--limit N] [--json FILE] [--markdown FILE]

The backward of each rule is traced on each of its samples, and one equation of the program is changed: a sign, an operand, a
constant, an operator, an axis, a term, a rounding, or a whole cotangent (fbackprop/checking/mutation.py). A mutant that
``check`` finds fault with is killed. One that survives is equivalent (it changes no bit whatever was saved, in bfloat16 it
stays within the tolerance, or equivalent_mutants.json tells why nothing can tell it from the rule), or a hole: it is listed
and the command exits with 1, as it does where fewer than 99.5 % of the mutants that are not equivalent are killed.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fbackprop import ops  # noqa: F401  (fills RULES)
from fbackprop.checking.mutation import Outcome, judge_rule
from fbackprop.files import write_atomically
from fbackprop.rules import RULES

EXPLANATIONS = pathlib.Path(__file__).with_name("equivalent_mutants.json")
LIMIT = 150  # mutants of a rule
SHARE = 0.995


def explained() -> dict[str, str]:
    """The reason for each mutant that was found by hand to be equivalent, by its key; a sample of * stands for all."""
    return {key: entry["reason"] for entry in json.loads(EXPLANATIONS.read_text()) for key in entry["mutants"]}


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of the mutants of one rule."""

    name: str
    mutants: int
    killed: int
    by: Mapping[str, int]  # the check that found it first
    same: int  # changes no bit of any cotangent
    exact_enough: int  # in bfloat16, within the tolerance
    explained: int
    survivors: tuple[str, ...]
    seconds: float

    @property
    def share(self) -> float:
        wrong = self.killed + len(self.survivors)
        return self.killed / wrong if wrong else 1.0


def row(name: str, outcomes: Sequence[Outcome], reasons: Mapping[str, str], seconds: float = 0.0) -> Row:
    counts = collections.Counter(o.verdict for o in outcomes)
    survivors = [o for o in outcomes if o.verdict == "survived"]
    open_ = [o for o in survivors if o.mutant.key not in reasons and o.mutant.everywhere not in reasons]
    told = [f"{o.mutant}{'' if o.changes_sample else ' (changes nothing on the sample)'}\n    {o.mutant.key}" for o in open_]
    by = collections.Counter(o.killed_by for o in outcomes if o.killed_by)
    return Row(name, len(outcomes), sum(by.values()), dict(by), counts["same"], counts["exact enough"],
               len(survivors) - len(open_), tuple(told), seconds)  # fmt: skip


def measured(name: str, limit: int | None, reasons: Mapping[str, str]) -> Row:
    start = time.perf_counter()
    outcomes = judge_rule(RULES[name], limit)
    return row(name, outcomes, reasons, time.perf_counter() - start)


def measure(names: Sequence[str], limit: int | None, jobs: int, console: Console | None = None) -> list[Row]:
    """A row for each rule, in the order of the names. Rules with many samples start first: they take longest."""
    reasons, rows = explained(), {}
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("mutants", total=len(names))
        if jobs == 1:
            for name in names:
                progress.update(task, description=name)
                rows[name] = measured(name, limit, reasons)
                progress.advance(task)
        else:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
                order = sorted(names, key=lambda name: -len(RULES[name].samples))
                futures = {pool.submit(measured, name, limit, reasons): name for name in order}
                for future in concurrent.futures.as_completed(futures):
                    rows[futures[future]] = future.result()
                    progress.update(task, advance=1, description=f"mutants ({futures[future]} done)")
    return [rows[name] for name in names]


def total(rows: Sequence[Row]) -> Row:
    by: collections.Counter[str] = collections.Counter()
    for r in rows:
        by.update(r.by)
    fields = ("mutants", "killed", "same", "exact_enough", "explained", "seconds")
    sums: dict[str, Any] = {field: sum(getattr(r, field) for r in rows) for field in fields}
    return Row(name="all", by=dict(by), survivors=tuple(s for r in rows for s in r.survivors), **sums)


COLUMNS = ("rule", "mutants", "killed", "killed by", "changes nothing", "exact enough", "explained", "survivors", "share", "s")


def cells(r: Row) -> list[str]:
    by = ", ".join(f"{name} {n}" for name, n in sorted(r.by.items(), key=lambda item: -item[1]))
    counts = [r.mutants, r.killed, by, r.same, r.exact_enough, r.explained, len(r.survivors)]
    return [r.name, *map(str, counts), f"{100 * r.share:.2f} %", f"{r.seconds:.0f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="rules; by default all")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N",
                        help=f"mutants of each rule, at most, the same in each run (default: {LIMIT})")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="all mutants of each rule")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    if unknown := [n for n in options.names if n not in RULES]:
        parser.error(f"there is no rule {unknown[0]}; known are {', '.join(RULES)}")
    if options.jobs < 1 or options.limit < 1:
        parser.error("--jobs and --limit must be positive")
    start = time.perf_counter()
    rows = measure(options.names or list(RULES), None if options.all else options.limit, options.jobs)
    everything = total(rows)
    machine = f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    machine += f", Python {platform.python_version()}, {time.perf_counter() - start:.0f} s"
    table = Table(title=f"mutants of the backward passes ({machine})")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("rule", "killed by") else "right")
    for r in [*rows, everything]:
        table.add_row(*cells(r))
    console = Console(width=max(Console().width, 128))
    console.print(table)
    for line in everything.survivors:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.json:
        record: dict[str, Any] = {"machine": machine, "rows": [dataclasses.asdict(r) for r in rows]}
        write_atomically(pathlib.Path(options.json), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    if options.markdown:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(r) for r in [*rows, everything])]
        table_text = f"{machine}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        write_atomically(pathlib.Path(options.markdown), table_text.encode())
    return int(bool(everything.survivors) or everything.share < SHARE)


if __name__ == "__main__":
    sys.exit(main())
