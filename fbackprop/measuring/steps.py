"""Whole models: steps of training, ours and *accelerated* against the same model elsewhere, interleaved in one run.

A step is loss, gradient and plain SGD in one jitted program, parameters and state donated; PyTorch does the same eagerly. All
sides begin with the same weights and see the same batch. Before anything is timed, each side's losses of the first steps are
compared: a side that computes something else is refused.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from fbackprop.loading import Refusal
from fbackprop.measuring.flops import matmul_flops
from fbackprop.measuring.report import mebibytes
from fbackprop.measuring.rivals import POLICIES, Absent
from fbackprop.measuring.times import interleave, ratio
from fbackprop.measuring.twins import Model, Side, ours

__all__ = ["AGAINST", "Plan", "Runner", "compiled_step", "measure", "table"]

_RATE = 1e-3
_FIRST = 3  # steps whose losses are compared
_ALIKE = 1e-3  # how far they may be apart, relatively: rounding moves them by some 1e-6

VARIANTS = ("ours", "accelerated")
AGAINST = (*(f"{library}{policy}" for library in ("flax", "equinox") for policy in ("", *(f" {p}" for p in POLICIES))),
           "torch", "torch.compile")  # fmt: skip
"""``flax`` is Flax under ``jax.grad``, ``flax checkpoint`` under ``jax.checkpoint`` too, and so on."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure: so many turns, or as many as fit the seconds."""

    against: tuple[str, ...] = AGAINST
    rounds: int | None = None
    seconds: float = 20.0


class Runner(NamedTuple):
    """A side that can be stepped. ``step`` returns the loss before the update."""

    step: Callable[[], Any]
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    flops: int | None = None
    argument_bytes: int | None = None


def measure(model: Model, plan: Plan, notes: dict[str, None]) -> list[dict[str, Any]]:
    """A row for each of our variants and each rival. What is missing goes to ``notes``."""
    own, batch = ours(model), model.example()
    runners: dict[str, Runner] = {}
    for name in (*VARIANTS, *plan.against):
        try:
            runners[name] = _runner(name, model, own, batch)
        except Absent as absent:
            notes[f"{model.name}, {name}: {absent}"] = None
    rivals = [name for name in plan.against if name in runners]
    if not rivals:
        return []
    losses = {name: [float(runner.step()) for _ in range(_FIRST)] for name, runner in runners.items()}
    for name, found in losses.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, losses["ours"]))
        if not apart < _ALIKE:
            raise Refusal(f"bench models: the losses of {model.name} in {name} are {found}, ours are {losses['ours']}.")
    budget = plan.seconds if plan.rounds is None else None
    times = dict(zip(runners, interleave([r.step for r in runners.values()], plan.rounds or 15, budget=budget, settled=True)))
    rows = []
    for variant, against in itertools.product([v for v in VARIANTS if v in runners], rivals):
        mine, theirs = runners[variant], runners[against]
        measured = ratio(times[against], times[variant])
        compiled = None
        if theirs.compile_seconds is not None and mine.compile_seconds is not None:
            compiled = theirs.compile_seconds / mine.compile_seconds
        rows.append(
            {
                "model": model.name,
                "variant": variant,
                "against": against,
                "time_ratio": measured.median,
                "time_ratio_low": measured.low,
                "time_ratio_high": measured.high,
                "milliseconds": 1e3 * float(np.median(times[variant])),
                "milliseconds_against": 1e3 * float(np.median(times[against])),
                "compile_ratio": compiled,
                "temp_bytes": mine.temp_bytes,
                "temp_bytes_against": theirs.temp_bytes,
                "matmul_flops": mine.flops,
                "matmul_flops_against": theirs.flops,
                "loss_difference": max(abs(a - b) for a, b in zip(losses[variant], losses[against])),
            }
        )
    return rows


def _runner(name: str, model: Model, own: Side, batch: Any) -> Runner:
    if name == "ours":
        return compiled_step(own, batch)
    library, _, policy = name.partition(" ")
    if library.startswith("torch"):
        from fbackprop.measuring.twins.torch_side import torch_side

        return Runner(torch_side(model, own.params, batch, _RATE, library != "torch").step)
    chosen = POLICIES[policy] if policy else False
    try:
        if library == "equinox":
            from fbackprop.measuring.twins.equinox_side import equinox_side

            return compiled_step(equinox_side(model, own.params, chosen), batch)
        from fbackprop.measuring.twins.flax_side import flax_side
    except ImportError as error:
        raise Absent(f"{error.name} is not installed") from None
    side = flax_side(model, own.params, own.state, chosen)
    if name == "accelerated":
        from fbackprop.accelerating import accelerate

        side = side._replace(loss=accelerate(side.loss))
    return compiled_step(side, batch)


def compiled_step(side: Side, batch: Any) -> Runner:
    """Loss, gradient and plain SGD as one program, from copies of the side's parameters and state."""

    def update(params: Any, state: Any, batch: Any) -> Any:
        (loss, state), gradient = jax.value_and_grad(side.loss, has_aux=True)(params, state, batch)
        return loss, jax.tree.map(lambda p, g: p - _RATE * g, params, gradient), state

    # Copies: what is donated belongs to this side alone.
    now = jax.tree.map(jnp.array, (side.params, side.state))
    batch = jax.tree.map(jnp.asarray, batch)
    started = time.perf_counter()
    traced = jax.jit(update, donate_argnums=(0, 1)).trace(*now, batch)
    program = traced.lower().compile()
    seconds = time.perf_counter() - started

    def step() -> jax.Array:
        nonlocal now
        loss, *now = program(*now, batch)
        return loss

    memory = program.memory_analysis()
    temporaries, arguments = (getattr(memory, f"{what}_size_in_bytes", None) for what in ("temp", "argument"))
    return Runner(step, seconds, temporaries, matmul_flops(traced.jaxpr), arguments)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one model."""
    heads = ("", "ms", "ours: times faster", "accelerated", "compile s: ratio", "temp MiB", "loss apart")
    result = Table(box=None, padding=(0, 1, 0, 0), title=f"[bold]{rows[0]['model']}[/]", title_justify="left")
    for head in heads:
        result.add_column(head, justify="right" if head else "left", header_style="dim")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        row = next(row for row in rows if row["variant"] == variant)
        result.add_row(variant, f"{row['milliseconds']:.0f}", "", "", "", mebibytes(row["temp_bytes"]), "")
    for against in dict.fromkeys(row["against"] for row in rows):
        by = {row["variant"]: row for row in rows if row["against"] == against}
        row = by["ours"]
        speeds = [_interval(by[v]) if v in by else "–" for v in VARIANTS]
        compiled = "–" if row["compile_ratio"] is None else f"{row['compile_ratio']:.2f}"
        temp = mebibytes(row["temp_bytes_against"])
        result.add_row(against, f"{row['milliseconds_against']:.0f}", *speeds, compiled, temp, f"{row['loss_difference']:.0e}")
    return result


def _interval(row: dict[str, Any]) -> str:
    return f"{row['time_ratio']:.2f} \\[{row['time_ratio_low']:.2f}, {row['time_ratio_high']:.2f}]"
