"""The rows of ``fbackprop bench ops``: one problem, all rivals, both settings, in the same turns."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fbackprop.measuring.problems import Problem, errors_of, truth_of
from fbackprop.measuring.programs import SETTINGS, Compiler, Program, Traced
from fbackprop.measuring.pytorch import torch_of
from fbackprop.measuring.rivals import AGAINST, Absent, Rival, rival
from fbackprop.measuring.times import interleave, ratio
from fbackprop.refusing import first_line

__all__ = ["Measured", "Plan", "measure"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure. Without ``rounds`` there are as many turns as fit into ``seconds``, from 6 to 30."""

    settings: tuple[str, ...] = SETTINGS
    against: tuple[str, ...] = AGAINST
    rounds: int | None = None
    seconds: float = 2.0


class Measured(NamedTuple):
    rows: list[dict[str, Any]]
    notes: list[str]  # who was left out, and why


class _Side(NamedTuple):
    """One contender in one setting."""

    run: Callable[[], Any]
    identity: str
    error: float | None


class _Contender(NamedTuple):
    name: str
    traced: Traced
    sides: dict[str, _Side]


def measure(given: Problem, plan: Plan) -> Measured:
    """Measures one problem: all rivals of the plan in all of its settings."""
    truth, compiler, notes = truth_of(given), Compiler(given), []

    sides: dict[str, _Side] = {}

    def side(program: Program) -> _Side:
        """The same program twice is one: it runs, and is timed, once."""
        if program.identity not in sides:
            sides[program.identity] = _Side(program.run, program.identity, errors_of(program.run()[1], truth))
        return sides[program.identity]

    def contender(who: Rival) -> _Contender:
        both = {setting: side(compiler.program(who.call, setting)) for setting in plan.settings}
        return _Contender(who.name, compiler.look(who.call), both)

    def torch() -> _Contender:
        port = torch_of(given)
        error = errors_of(port.gradients(port.run()), truth) if port.comparable else None
        traced = Traced(port.residual_bytes, None, None)
        return _Contender(port.name, traced, dict.fromkeys(plan.settings, _Side(port.run, "torch", error)))

    ours = contender(Rival(lambda arguments: given.rule.op(**arguments), "ours"))
    rivals: dict[str, _Contender] = {}
    for against in plan.against:
        try:
            rivals[against] = torch() if against == "torch" else contender(rival(against, given))
        except Absent as absent:
            notes += [f"{given.rule.name}: {absent}"] if str(absent) else []
        except Exception as error:  # another's code, at arguments that it may not be made for
            notes.append(f"{given.rule.name}: {against} failed ({type(error).__name__}: {first_line(error)[:160]})")
    runs = {s.identity: s.run for c in (ours, *rivals.values()) for s in c.sides.values()}
    budget = plan.seconds if plan.rounds is None else None
    times = dict(zip(runs, interleave(list(runs.values()), plan.rounds or 30, budget=budget, settled=True)))
    rows, seen = [], {s.identity: "ours" for s in ours.sides.values()}
    for against, other in rivals.items():
        for setting in plan.settings:
            mine, theirs = ours.sides[setting], other.sides[setting]
            note = f"the same program as {seen[theirs.identity]}" if theirs.identity in seen and against != "torch" else ""
            seen.setdefault(theirs.identity, against)
            row = _row(given, ours, other, setting, times[mine.identity], times[theirs.identity])
            rows.append({**row, "against": against, "note": note})
    return Measured(rows, notes)


def _row(
    given: Problem, ours: _Contender, other: _Contender, setting: str, mine: Sequence[float], theirs: Sequence[float]
) -> dict[str, Any]:
    speed = ratio(theirs, mine)
    return {
        "op": given.rule.name,
        "workload": given.text,
        "setting": setting,
        "against": "",
        "time_ratio": speed.median,
        "time_ratio_low": speed.low,
        "time_ratio_high": speed.high,
        "residual_bytes": ours.traced.residual_bytes,
        "residual_bytes_against": other.traced.residual_bytes,
        "residual_bytes_minimum": given.minimum,
        "temp_bytes": ours.traced.temp_bytes,
        "temp_bytes_against": other.traced.temp_bytes,
        "error": ours.sides[setting].error,
        "error_against": other.sides[setting].error,
        "recomputes": given.rule.recomputes or False,
        "matmul_flops": ours.traced.matmul_flops,
        "matmul_flops_against": other.traced.matmul_flops,
        "milliseconds": 1e3 * statistics.median(mine),
        "milliseconds_against": 1e3 * statistics.median(theirs),
        "rounds": len(mine),
        "rival": other.name,
        "note": "",
    }
