"""Is a backward pass right? ``check`` compares any differentiable JAX function with its definition.

    report = fbackprop.check(fn, *args)
    assert report.ok, str(report)               # or fbackprop.assert_correct(fn, *args)

The truth is the gradient of the reference in float64, at exactly the same inputs; finite differences of the
reference in float64 are a second oracle, which owes nothing to autodiff. The tolerance has no knob: a
cotangent may err by twice what ``jax.grad`` of the reference errs by in the same dtype, or by four units in
the last place of the largest element (``checks.py``).

subject.py says what is compared with what, definition.py opens and widens the reference, programs.py runs both and
differences.py the second oracle; checks.py holds the quick checks, thorough.py names those of the full depth; causes.py
guesses, report.py tells, command.py is the command line, mutation.py makes wrong backwards of right ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fbackprop.checking.checks import CHECKS, judge
from fbackprop.checking.programs import gather
from fbackprop.checking.report import Finding, LeafError, Report
from fbackprop.checking.subject import subject_of
from fbackprop.checking.thorough import THOROUGH, Examination

__all__ = ["CHECKS", "DEPTHS", "THOROUGH", "Finding", "LeafError", "Report", "assert_correct", "check"]

DEPTHS = {"quick": tuple(CHECKS), "full": (*CHECKS, *THOROUGH)}
"""The names of the checks of each depth."""


def check(
    fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    static: Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    argnums: int | Sequence[int] | None = None,
    checks: Sequence[str] | None = None,
    depth: str = "quick",
    exact: bool | None = None,
    seed: int = 0,
) -> Report:
    """Compares the backward pass of ``fn`` at these arguments with the truth.

    Args:
      fn: an op of this library, a ``jax.custom_vjp``, or any function of arrays that JAX differentiates.
      args: its arguments, pytrees. Floating-point arrays in them are differentiated; integers, masks and random keys are
        passed on; Python values (``None``, numbers, strings) stay what they are.
      reference: the definition, with the arguments of ``fn``. By default the reference of an op, the undecorated function
        of a ``jax.custom_vjp``, and otherwise ``without_rules(fn)``.
      static: options passed by keyword as they are.
      keywords: arguments passed by keyword and treated like ``args``.
      argnums: positions of the arguments to differentiate, as in ``jax.grad``; by default all that are floating-point.
      checks: names of the checks to run, of either depth; by default all of the depth.
      depth: ``"quick"``, at most six compiled programs, or ``"full"``: other values, shapes, dtypes and transformations too.
      exact: False for a backward that is meant to differ from the gradient; by default what the rule of an op says. Then
        nothing is compared with the gradient of the reference.
      seed: of the random cotangents and directions.
    Returns:
      A report: ``report.ok``, ``report.findings``, and a table as ``str(report)``.
    Raises:
      ValueError: there is no check of such a name, or nothing to differentiate.
      TypeError: ``fn`` is not a function, or the arguments are not what JAX can differentiate.
    """
    names = _chosen(checks, depth)
    subject = subject_of(fn, args, dict(keywords or {}), dict(static or {}), reference, exact, argnums)
    evidence = gather(subject, names, seed)
    report = judge(evidence, names)
    examination = Examination(subject, evidence, seed)
    further = [f for name in THOROUGH if name in names for f in THOROUGH[name](examination)]
    return dataclasses.replace(report, findings=(*report.findings, *further), notes=(*report.notes, *examination.notes))


def assert_correct(fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Raises AssertionError with the whole table where ``check(fn, *args, **options)`` finds something.

    For a test: ``def test_my_rule(): assert_correct(my_rule, x, w, static={"axis": -1})``.
    """
    report = check(fn, *args, **options)
    if not report.ok:
        raise AssertionError(f"\n{report}")


def _chosen(checks: Sequence[str] | None, depth: str) -> tuple[str, ...]:
    if depth not in DEPTHS:
        raise ValueError(f"check: there is no depth {depth!r}; there are {' and '.join(map(repr, DEPTHS))}.")
    if checks is None:
        return DEPTHS[depth]
    names = (checks,) if isinstance(checks, str) else tuple(checks)
    known = DEPTHS["full"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"check: there is no check {', '.join(map(repr, unknown))}; there are {', '.join(known)}.")
    return names
