"""Is a backward pass right? ``check`` compares any differentiable JAX function with its definition.

    report = fbackprop.check(fn, *args)
    assert report.ok, str(report)               # or fbackprop.assert_correct(fn, *args)

The truth is the gradient of the reference in float64, at exactly the same inputs; finite differences of the
reference in float64 are a second oracle, which owes nothing to autodiff. The tolerance has no knob: a
cotangent may err by twice what ``jax.grad`` of the reference errs by in the same dtype, or by four units in
the last place of the largest element (``checks.py``).

subject.py says what is compared with what, programs.py runs it, checks.py judges, report.py tells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fbackprop.checking.checks import CHECKS, judge
from fbackprop.checking.programs import gather
from fbackprop.checking.report import Finding, LeafError, Report
from fbackprop.checking.subject import subject_of

__all__ = ["CHECKS", "Finding", "LeafError", "Report", "assert_correct", "check"]


def check(
    fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    static: Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
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
      checks: names of the checks to run, all of ``CHECKS`` by default.
      exact: False for a backward that is meant to differ from the gradient; by default what the rule of an op says. Then
        nothing is compared with the gradient of the reference.
      seed: of the random cotangents and directions.
    Returns:
      A report: ``report.ok``, ``report.findings``, and a table as ``str(report)``.
    Raises:
      ValueError: there is no check of such a name, or nothing to differentiate.
      TypeError: ``fn`` is not a function, or the arguments are not what JAX can differentiate.
    """
    names = _chosen(checks)
    subject = subject_of(fn, args, dict(keywords or {}), dict(static or {}), reference, exact)
    return judge(gather(subject, names, seed), names)


def assert_correct(fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Raises AssertionError with the whole table where ``check(fn, *args, **options)`` finds something.

    For a test: ``def test_my_rule(): assert_correct(my_rule, x, w, static={"axis": -1})``.
    """
    report = check(fn, *args, **options)
    if not report.ok:
        raise AssertionError(f"\n{report}")


def _chosen(checks: Sequence[str] | None) -> tuple[str, ...]:
    if checks is None:
        return tuple(CHECKS)
    names = (checks,) if isinstance(checks, str) else tuple(checks)
    if unknown := [name for name in names if name not in CHECKS]:
        raise ValueError(f"check: there is no check {', '.join(map(repr, unknown))}; there are {', '.join(CHECKS)}.")
    return names
