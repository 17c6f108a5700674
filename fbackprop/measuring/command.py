"""What ``fbackprop bench`` does: plans what is measured, shows it, and keeps the rows in a file."""

import argparse
import contextlib
import functools
import inspect
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fbackprop.files import write_json
from fbackprop.loading import Refusal, World, find, near, ops, sentence
from fbackprop.measuring import report, scaling
from fbackprop.measuring.problems import Problem, problem, problem_of
from fbackprop.measuring.programs import SETTINGS
from fbackprop.measuring.rivals import AGAINST
from fbackprop.measuring.rows import Plan, measure
from fbackprop.refusing import first_line
from fbackprop.rules import RULES, Rule
from fbackprop.samples import arrays

__all__ = ["BenchError", "bench_models", "bench_ops", "bench_scaling", "fixed_ops"]


class BenchError(Refusal):
    """A measurement that cannot be made as asked. The message is one sentence."""


def fixed_ops() -> tuple[str, ...]:
    """The ops of the fixed workloads, as far as they exist, in the order of that list."""
    path = pathlib.Path(__file__).parents[1] / "workloads.json"
    listed = json.loads(path.read_text(encoding="utf-8"))["workloads"]
    return tuple(name for name in dict.fromkeys(w["op"] for w in listed) if name in RULES)


# ------------------------------------------------------------------------------------------------------------------ ops


class _Task(NamedTuple):
    name: str
    make: Callable[[], Problem]
    wide: bool = False  # float64


def bench_ops(options: argparse.Namespace) -> int:
    """Runs ``bench ops`` with its options as parsed. What it refuses is a BenchError; then no file was written."""
    tasks = _tasks(options)
    plan = Plan(options.settings or SETTINGS, options.against or AGAINST, options.rounds, options.seconds)
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}

    def keep() -> None:
        if options.json is not None:
            write_json(options.json, {"device": device(), "versions": versions(), "rows": rows})

    out = _console(sys.stdout)
    with _progress("measuring", len(tasks)) as advance:
        for task in tasks:
            advance(task.name, 0)
            with jax.enable_x64(True) if task.wide else contextlib.nullcontext():
                measured = measure(task.make(), plan)
            rows += measured.rows
            notes |= dict.fromkeys(measured.notes)
            keep()  # after each workload: whatever happens, what was measured is kept
            if measured.rows:
                out.print(report.block(measured.rows), "")
            advance(task.name, 1)
            jax.clear_caches()  # compiled programs of many workloads would fill the memory
    if not rows:
        raise BenchError(f"nothing was measured: {'; '.join(notes) or 'no rival of those asked for is there'}.")
    out.print(report.summary(rows))
    if len({row["against"] for row in rows}) > 1:
        out.print(report.rivals_table(rows))
    for note in notes:
        out.print(f"left out: {note}", style="dim", markup=False, highlight=False)
    if options.plot is not None:
        from fbackprop.measuring.pictures import draw_ops

        draw_ops(rows, options.plot, device())
    return 0


def _tasks(options: argparse.Namespace) -> list[_Task]:
    for name in options.names:
        if name not in ops():
            raise BenchError(f"there is no op {name!r}{near(name, ops())}.")
    own = bool(options.shape or options.workload)
    if own and len(options.names) != 1:
        raise BenchError(f"a workload of your own is for one op; {len(options.names)} are named.")
    if not options.shape and (options.static or options.note):
        raise BenchError("--static and --note tell more of arguments that --shape gives; there is no --shape.")
    if own:
        rule = RULES[options.names[0]]
        given = [_of_shapes(rule, options)] if options.shape else []
        return given + [_of_factory(rule, name, options.seed) for name in options.workload]
    names = [n for n in ops() if RULES[n].workloads] if options.all else options.names or fixed_ops()
    if bare := [name for name in names if not RULES[name].workloads]:
        raise BenchError(f"{bare[0]} has no workload of its own; give one with --shape or --workload.")
    return [
        _Task(n, functools.partial(problem_of, RULES[n], w), w.dtype == "float64") for n in names for w in RULES[n].workloads
    ]


def _of_shapes(rule: Rule, options: argparse.Namespace) -> _Task:
    wide = any(dtype.endswith("64") for dtype in (options.dtype, *(dtype or "" for _, dtype in options.shape)))

    def make() -> Problem:
        return _problem(rule, arrays(options.shape, options.dtype, options.seed), dict(options.static), options.note)

    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        _require(rule, make)
    return _Task(rule.name, make, wide)


def _of_factory(rule: Rule, target: str, seed: int) -> _Task:
    file, colons, name = target.partition("::" if "::" in target or target.endswith(".py") else ":")
    if not colons:
        raise BenchError(f"--workload takes FILE.py::NAME or package.module:NAME, got {target!r}.")
    world = World()
    factory = find(world.load(file), name, file)

    def make() -> Problem:
        with world.entered():
            try:
                made = factory(seed) if _takes_seed(factory) else factory()
            except Exception as error:
                raise BenchError(f"--workload {target} raised {sentence(error)}.") from None
        given: dict[str, Any] = {"args": made} if isinstance(made, tuple) else dict(made) if isinstance(made, dict) else {}
        if not isinstance(given.get("args"), (tuple, list)) or set(given) - {"args", "static", "note"}:
            raise BenchError(
                f"--workload {target} returned a {type(made).__name__}; expected a tuple of arguments, or a dict with args, "
                "and static and note if wanted."
            )
        return _problem(rule, given["args"], given.get("static", {}), given.get("note", ""))

    _require(rule, make)
    return _Task(rule.name, make)


def _takes_seed(factory: Callable[..., Any]) -> bool:
    return bool(inspect.signature(factory).parameters)


def _problem(rule: Rule, args: Sequence[Any], static: dict[str, Any], note: str) -> Problem:
    try:
        return problem(rule, args, static, note)
    except (TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise BenchError(f"{first_line(error)}.") from None


def _require(rule: Rule, make: Callable[[], Problem]) -> None:
    """Refuses, before anything is measured, arguments that the op does not take or that have no gradient."""
    if not make().moved:
        raise BenchError(f"{rule.name}: none of these arguments is floating-point and not frozen; nothing to differentiate.")


# -------------------------------------------------------------------------------------------------------------- scaling


def bench_scaling(options: argparse.Namespace) -> int:
    """Runs ``bench scaling``: every sweep whose op exists."""
    chosen = [scaling.SWEEPS[name] for name in options.names or scaling.SWEEPS]
    sweeps = [(sweep, sweep.sizes(options.most)) for sweep in chosen if sweep.op in RULES]
    if not sweeps:
        raise BenchError(f"there is no op {chosen[0].op} to measure.")
    plan = scaling.Plan(options.rounds, options.seconds, int(options.memory * 2**30))
    out = _console(sys.stdout)
    points: list[dict[str, Any]] = []
    with _progress("scaling", sum(len(sizes) for _, sizes in sweeps)) as advance:
        for sweep, sizes in sweeps:
            for size in sizes:
                advance(f"{sweep.axis} {size}", 0)
                points += [{"sweep": sweep.axis, "op": sweep.op, **point} for point in scaling.measure(sweep, size, plan)]
                if options.json is not None:  # after each point: whatever happens, what was measured is kept
                    write_json(options.json, {"device": device(), "versions": versions(), "rows": points})
                advance(f"{sweep.axis} {size}", 1)
                jax.clear_caches()
            out.print(scaling.table(sweep, [p for p in points if p["sweep"] == sweep.axis]), "")
    for sweep in chosen:
        if sweep.op not in RULES:
            out.print(f"left out: {sweep.axis}: there is no op {sweep.op}.", style="dim", markup=False, highlight=False)
    if options.plot is not None:
        from fbackprop.measuring.pictures import draw_scaling

        draw_scaling(scaling.curves(points), options.plot, device())
    return 0


# --------------------------------------------------------------------------------------------------------------- models


def bench_models(options: argparse.Namespace) -> int:
    """Runs ``bench models``: each model with every side that is installed."""
    from fbackprop.measuring import steps
    from fbackprop.measuring.twins import MODELS

    names = options.names or list(MODELS)
    plan = steps.Plan(tuple(options.against or steps.AGAINST), options.rounds, options.seconds)
    out = _console(sys.stdout)
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    with _progress("measuring", len(names)) as advance:
        for name in names:
            advance(name, 0)
            measured = steps.measure(MODELS[name], plan, notes)
            rows += measured
            if options.json is not None:
                write_json(options.json, {"device": device(), "versions": versions(), "rows": rows})
            if measured:
                out.print(steps.table(measured), "")
            advance(name, 1)
            jax.clear_caches()
    if not rows:
        raise BenchError(f"nothing was measured: {'; '.join(notes) or 'no rival of those asked for is there'}.")
    for note in notes:
        out.print(f"left out: {note}", style="dim", markup=False, highlight=False)
    if options.plot is not None:
        from fbackprop.measuring.pictures import draw_models

        draw_models(rows, options.plot, device())
    return 0


# --------------------------------------------------------------------------------------------------------------- common


def device() -> str:
    """What was measured on, in words."""
    first = jax.devices()[0]
    count = _cores()
    cores = f", {count} core{'s' * (count > 1)}" if first.platform == "cpu" else ""
    return f"{first.device_kind}{cores}, {platform.machine()}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """The versions of what takes part, where it is installed."""
    found = {"python": platform.python_version()}
    for name in ("fbackprop", "jax", "jaxlib", "optax", "flax", "equinox", "jax-cce", "tokamax", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _console(file: Any) -> Console:
    """A console that is 100 columns wide where it is no terminal."""
    return Console(file=file, width=None if file.isatty() else 100)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr, if that is a terminal; yields a function of what is being done and how much of it is finished."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    both = sys.stdout.isatty()  # what is printed goes above the bar; a pipe or a file gets it as it is
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=both)
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda what, done: bar.update(task, description=f"{title} {what}", advance=done)
