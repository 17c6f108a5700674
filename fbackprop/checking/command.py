"""What ``fbackprop check`` does: ops on the samples of their rules, anybody's function on the arguments that are asked for."""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fbackprop.checking import DEPTHS, Report
from fbackprop.checking import check as compare
from fbackprop.checking.definition import definition_of
from fbackprop.checking.subject import Subject, subject_of
from fbackprop.files import write_json
from fbackprop.loading import Refusal, World, find, near, ops, sentence
from fbackprop.rules import RULES, Rule
from fbackprop.samples import Spec, arrays

__all__ = ["CheckError", "run"]

_DEVICES = "--xla_force_host_platform_device_count"
Made = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # a function, its arguments, the options of check


class CheckError(Refusal):
    """A check that cannot be made as asked. The message is one sentence."""


def run(options: argparse.Namespace) -> int:
    """Runs the command with its options as parsed, prints the results, and returns 0, or 1 where something is wrong.
    What it refuses is a CheckError; then no file was written."""
    if options.full and _DEVICES not in os.environ.get("XLA_FLAGS", ""):  # read when JAX starts its backends
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
    names = options.checks or DEPTHS["full" if options.full else "quick"]
    if not options.targets and not options.all:
        raise CheckError("there is nothing to check: name an op or FILE.py::NAME, or give --all.")
    jobs = [job for target in [*(ops() if options.all else ()), *options.targets] for job in _jobs(target, options)]
    for job in jobs:
        job.require_sound(options.seed)
    tasks = [(job, seed) for job in jobs for seed in range(options.seed, options.seed + options.seeds)]
    records: list[dict[str, Any]] = []
    status = Console(stderr=True).status if sys.stderr.isatty() else contextlib.nullcontext
    for number, (job, seed) in enumerate(tasks, 1):
        started = time.perf_counter()
        with status(f"checking {job.name}, {number} of {len(tasks)}"):
            told, report = job.check(seed, names)
        told += f"  seed {seed}" if options.seeds > 1 else ""
        _print(told, report, options.verbose)
        content = jax.tree.map(lambda leaf: leaf.item() if isinstance(leaf, np.generic) else leaf, dataclasses.asdict(report))
        content |= {"target": job.target, "call": told, "seed": seed, "ok": report.ok}
        records.append({**content, "seconds": round(time.perf_counter() - started, 3)})
    fine = sum(record["ok"] for record in records)
    print(f"{len(records)} checked, {fine} ok, {len(records) - fine} with findings")
    if options.json is not None:
        versions = {"fbackprop": version("fbackprop"), "jax": jax.__version__, "python": sys.version.split()[0]}
        device = f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind}), {jax.device_count()} in all"
        write_json(options.json, {"versions": versions, "device": device, "dtype": options.dtype, "reports": records})
    return 0 if fine == len(records) else 1


@dataclasses.dataclass(frozen=True)
class _Job:
    """One function, and one way to make its arguments from a seed. ``told``: these in words, where it is a sample."""

    target: str
    name: str
    make: Callable[[int], Made]
    world: World
    wide: bool
    told: str | None = None

    @contextlib.contextmanager
    def _made(self, seed: int) -> Iterator[Made]:
        with self.world.entered(), jax.enable_x64(True) if self.wide else contextlib.nullcontext():
            try:
                yield self.make(seed)
            except (TypeError, ValueError) as error:
                if not str(error).startswith("check: "):
                    raise
                raise CheckError(str(error).removeprefix("check: ")) from None
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # a device's memory, a callback
                raise CheckError(f"{self.name} failed: {sentence(error)}.") from None

    def require_sound(self, seed: int) -> None:
        """Refuses what does not run or has no gradient at these arguments, before anything is computed."""
        if self.told is None:
            with self._made(seed) as (fn, args, given):
                none = {"keywords": {}, "reference": None, "exact": None}
                _require_differentiable(self.name, subject_of(fn, args, **none | given))

    def check(self, seed: int, names: Sequence[str]) -> tuple[str, Report]:
        with self._made(seed) as (fn, args, given):
            told = self.told or ", ".join([*map(_told, args), *(f"{n}={_told(v)}" for n, v in given["static"].items())])
            return f"{self.name} ({told})", compare(fn, *args, checks=names, seed=seed, **given)


def _jobs(target: str, options: argparse.Namespace) -> list[_Job]:
    """What there is to check for one name on the command line."""
    left, colons, name = target.partition("::" if "::" in target or target.endswith(".py") else ":")
    world, module = World(), None
    if colons or left.endswith(".py"):
        module = world.load(left)
        fn = find(module, name, left)
    elif target in ops():
        fn, name = RULES[target].op, target
    else:
        raise CheckError(f"there is no op {target!r}{near(target, ops())}; a function of your own is FILE.py::NAME.")
    wide = any(dtype.endswith("64") for dtype in (options.dtype, *(dtype or "" for _, dtype in options.shape)))
    job = functools.partial(_Job, target, name, world=world, wide=wide)
    if isinstance(rule := getattr(fn, "rule", None), Rule) and rule.samples and not (options.shape or options.args):
        if options.static or options.reference or options.inexact:
            raise CheckError(f"{name} is checked on the samples of its rule; --static, --reference and --inexact need --shape.")
        return [job(functools.partial(_of_sample, rule, sample, options.dtype), told=str(sample)) for sample in rule.samples]
    if module is None and (options.args or options.reference):
        raise CheckError(f"{name} is an op; --args and --reference name functions in the file of what is checked.")
    if bool(options.shape) == bool(options.args):
        raise CheckError(f"{name} needs arguments: expected one --shape for each, or --args NAME and no --shape.")
    given: dict[str, Any] = {"static": dict(options.static), **({"exact": False} if options.inexact else {})}
    if options.reference:
        given["reference"] = find(module, options.reference, left)
    if options.shape:
        return [job(functools.partial(_of_specs, fn, options.shape, options.dtype, given))]
    return [job(functools.partial(_of_factory, fn, find(module, options.args, left), options.args, given))]


def _of_sample(rule: Rule, sample: Any, dtype: str, seed: int) -> Made:
    dynamic, static = rule.split(*sample.make(seed, dtype))
    return rule.op, (), {"keywords": dict(zip(rule.arguments, dynamic)), "static": dict(zip(rule.static, static))}


def _of_specs(fn: Callable[..., Any], specs: Sequence[tuple[Spec, str]], dtype: str, given: dict[str, Any], seed: int) -> Made:
    return fn, arrays(specs, dtype, seed), given


def _of_factory(fn: Callable[..., Any], factory: Callable[..., Any], name: str, given: dict[str, Any], seed: int) -> Made:
    try:
        made = factory(seed) if inspect.signature(factory).parameters else factory()
    except Exception as error:
        raise CheckError(f"--args {name} raised {sentence(error)}.") from None
    made = {"args": made} if isinstance(made, tuple) else made
    more: dict[str, Any] = {n: v for n, v in made.items() if v is not None} if isinstance(made, dict) else {}
    kinds = {"args": (tuple, list), "keywords": dict, "static": dict, "reference": Callable, "exact": bool, "argnums": object}
    if "args" not in more or not all(n in kinds and isinstance(v, kinds[n]) for n, v in more.items()):
        got = f"a dict with {', '.join(map(str, made)) or 'nothing'}" if isinstance(made, dict) else f"a {type(made).__name__}"
        raise CheckError(f"--args {name} returned {got}; expected a tuple of arguments, or a dict with {', '.join(kinds)}.")
    given = {**more, **given, "static": {**more.get("static", {}), **given["static"]}}  # the command line goes first
    return fn, tuple(given.pop("args")), given


def _require_differentiable(name: str, subject: Subject) -> None:
    floats, arrays = list(subject.floats), list(subject.arrays)
    flat, definition = subject.call.bind(subject.fn), subject.call.bind(subject.reference)
    for who, function in ((name, flat), (f"the reference of {name}", definition)):
        try:
            outputs = jax.eval_shape(function, floats, arrays)
        except Exception as error:
            how = " under jax.jit" if isinstance(error, jax.errors.JAXTypeError) else ""
            types = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in (*floats, *arrays))
            raise CheckError(f"{who} raised {sentence(error)},{how} for {types}.") from None
        if not outputs[0]:
            raise CheckError(f"{who} returns no floating-point array, so there is nothing to differentiate.")

    def gradient(flat: Callable[..., Any]) -> None:
        def pulled(floats: Any, arrays: Any) -> Any:
            y, pullback, _ = jax.vjp(lambda f: flat(f, arrays), floats, has_aux=True)
            return pullback(y)

        jax.eval_shape(pulled, floats, arrays)

    try:
        gradient(flat)
    except Exception as error:
        if subject.custom is not None or hasattr(subject.fn, "rule"):
            return  # its backward is wrong, which is what the check tells
        with contextlib.suppress(Exception):
            gradient(definition_of(definition, floats, arrays).opened)
            return  # a rule inside it is wrong
        raise CheckError(f"{name} cannot be differentiated: {sentence(error)}.") from None


def _told(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        shape = "×".join(map(str, value.shape)) or "scalar"
        return shape if value.dtype == np.float32 else f"{shape} {value.dtype}"
    return type(value).__name__ if jax.tree.structure(value).num_leaves > 1 or callable(value) else repr(value)


def _print(told: str, report: Report, verbose: bool) -> None:
    worst = max(report.errors, key=lambda error: error.ulps, default=None)
    numbers = f"  worst {worst.ulps:.2g} ulps, jax.grad's {worst.reference_ulps:.2g}" if worst else ""
    print("ok" if report.ok else "wrong", told + numbers * report.ok, flush=True)
    if verbose or not report.ok:
        print(textwrap.indent(str(report), "  "), flush=True)
