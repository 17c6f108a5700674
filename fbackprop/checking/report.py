"""What ``check`` tells: findings as data, and a table that a person reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Finding", "LeafError", "Report"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    check: the name of the check that found it. where: the argument, with the path of the leaf in it. message: a
    sentence. index: of the worst element in that leaf. numbers: what was compared, by name.
    """

    check: str
    where: str
    message: str
    index: tuple[int, ...] | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"[{self.check}] {self.where}: {self.message}"


@dataclasses.dataclass(frozen=True)
class LeafError:
    """The worst error of one cotangent over all elements and cotangents of y.

    relative: against the float64 truth, by its largest element. ulps: the same in units of the last place of that element.
    reference_ulps: what ``jax.grad`` of the reference errs by, against the truth. apart_ulps: how far the cotangent is from
    that of ``jax.grad`` of the reference. index: of the worst element.
    """

    where: str
    dtype: str
    shape: tuple[int, ...]
    relative: float
    ulps: float
    reference_ulps: float
    apart_ulps: float
    index: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``check`` found: nothing where ``ok``."""

    name: str
    reference: str
    findings: tuple[Finding, ...]
    errors: tuple[LeafError, ...]
    checks: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        count = len(self.findings)
        verdict = f"{count} finding{'s' * (count != 1)}" if count else "ok"
        lines = [f"check of {self.name} against {self.reference}: {verdict}"]
        if self.errors:
            rows: list[tuple[Any, ...]] = [
                ("cotangent of", "dtype", "shape", "worst error", "in ulps", "jax.grad's", "from jax.grad", "at")
            ]
            rows += [
                (
                    e.where,
                    e.dtype,
                    list(e.shape),
                    f"{e.relative:.1e}",
                    f"{e.ulps:.3g}",
                    f"{e.reference_ulps:.3g}",
                    f"{e.apart_ulps:.3g}",
                    e.index or "",
                )
                for e in self.errors
            ]
            table = [[str(cell) for cell in row] for row in rows]
            widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
            lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
        lines += [f"  {finding}" for finding in self.findings]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
