"""How memory and time grow: value and gradient over the size of the vocabulary, the length of a sequence, and the depth.

    vocabulary   linear_cross_entropy, 512 tokens of 128 features, 1k to 256k classes
    length       dot_product_attention, causal, 2 heads of 64, 512 to 16k positions
    depth        reversible, layers of two MLPs on 1024 × 2 × 128, 1 to 64 of them

Rivals are ``jax.grad`` of what a user would write without us, and the best of ``jax.checkpoint``'s policies at each point: for
the depth, with a checkpoint at each layer of a scan.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from fbackprop.measuring.problems import Call, Problem, problem_of
from fbackprop.measuring.programs import Compiler
from fbackprop.measuring.report import mebibytes
from fbackprop.measuring.rivals import POLICIES, Absent, rival
from fbackprop.measuring.times import interleave, ratio
from fbackprop.rules import RULES
from fbackprop.samples import Sample, labels, normal, sample

__all__ = ["SWEEPS", "Plan", "Sweep", "curves", "measure", "table"]

QUANTITIES = ("temp_bytes", "residual_bytes", "milliseconds")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure. What needs more temporaries than ``memory`` is compiled and counted, but not run."""

    rounds: int | None = None
    seconds: float = 3.0
    memory: int = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One op over one size. ``rival``: what a rival of that name computes, where it is not found by the op's name."""

    axis: str
    op: str
    all_sizes: tuple[int, ...]
    workload: Callable[[int], Sample]
    rival: Callable[[str, Problem], Call] = lambda against, given: rival(against, given).call

    def sizes(self, most: int | None) -> tuple[int, ...]:
        return tuple(n for n in self.all_sizes if most is None or n <= most) or self.all_sizes[:1]


def _vocabulary(size: int) -> Sample:
    return sample(normal(512, 128), normal(128, size, scale=128**-0.5), labels(512, classes=size))


def _length(size: int) -> Sample:
    return sample(normal(1, size, 2, 64), normal(1, size, 2, 64), normal(1, size, 2, 64), is_causal=True)


def _mlp(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """One of the two functions of a layer: kernel [2, d, d]."""
    return jnp.tanh(x @ kernel[0]) @ kernel[1]


def _depth(size: int) -> Sample:
    kernels = normal(size, 2, 128, 128, scale=128**-0.5)
    return sample(_mlp, _mlp, kernels, kernels, normal(1024, 256))


def _layers(against: str, given: Problem) -> Call:
    """The same stack as a scan; under a policy, with a checkpoint at each layer."""

    def layer(x: jax.Array, kernels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x1, x2 = jnp.split(x, 2, axis=-1)
        y1 = x1 + _mlp(kernels[0], x2)
        return jnp.concatenate([y1, x2 + _mlp(kernels[1], y1)], axis=-1), None

    body = jax.checkpoint(layer, policy=POLICIES[against]) if against in POLICIES else layer
    return lambda arguments: jax.lax.scan(body, arguments["x"], (arguments["params_f"], arguments["params_g"]))[0]


SWEEPS = {
    sweep.axis: sweep
    for sweep in (
        Sweep("vocabulary", "linear_cross_entropy", tuple(1024 * 4**i for i in range(5)), _vocabulary),
        Sweep("length", "dot_product_attention", tuple(512 * 2**i for i in range(6)), _length),
        Sweep("depth", "reversible", tuple(2**i for i in range(7)), _depth, _layers),
    )
}


def measure(sweep: Sweep, size: int, plan: Plan) -> list[dict[str, Any]]:
    """One point: a row for us, for jax.grad and for each policy of jax.checkpoint."""
    given = problem_of(RULES[sweep.op], sweep.workload(size))
    compiler, rows = Compiler(given), []
    runs: dict[str, Callable[[], Any]] = {}
    for against in ("ours", "jax.grad", *POLICIES):
        try:
            call = (lambda arguments: given.rule.op(**arguments)) if against == "ours" else sweep.rival(against, given)
            known, program = compiler.look(call), compiler.program(call, "fused")
        except Absent:
            continue
        fits = known.temp_bytes is None or known.temp_bytes <= plan.memory
        if fits:
            runs.setdefault(program.identity, program.run)
        rows.append(
            {
                "size": size,
                "against": against,
                "workload": given.text,
                "temp_bytes": known.temp_bytes,
                "residual_bytes": known.residual_bytes,
                "milliseconds": None,
                "matmul_flops": known.matmul_flops,
                "identity": program.identity,
                "note": "" if fits else "not run: its temporaries are above the limit",
            }
        )
    budget = plan.seconds if plan.rounds is None else None
    each = interleave(list(runs.values()), plan.rounds or 15, budget=budget, fewest=3) if runs else []
    times = dict(zip(runs, each))
    ours = times.get(rows[0]["identity"])
    for row in rows:
        own = times.get(row.pop("identity"))
        row["milliseconds"] = None if own is None else 1e3 * statistics.median(own)
        # As in `bench ops`: a rival's time over ours.
        row["time_ratio"] = None if own is None or ours is None else ratio(own, ours).median
    return rows


def curves(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows by sweep and size, with the best checkpoint policy for each quantity at each point."""
    found = []
    for axis in dict.fromkeys(p["sweep"] for p in points):
        own = [p for p in points if p["sweep"] == axis]
        by_size = []
        for size in dict.fromkeys(p["size"] for p in own):
            rows = {p["against"]: p for p in own if p["size"] == size}
            policies = [rows[name] for name in POLICIES if name in rows]
            best = {key: min((r[key] for r in policies if r[key] is not None), default=None) for key in QUANTITIES}
            by_size.append({"size": size, "sides": {**rows, "best": best}})
        found.append({"axis": axis, "op": own[0]["op"], "points": by_size})
    return found


_SHORT = {"checkpoint": "none", "dots_saveable": "dots", "dots_with_no_batch_dims_saveable": "no batch"}


def table(sweep: Sweep, points: Sequence[dict[str, Any]]) -> Table:
    """One sweep: temporaries, kept bytes and time of us, of jax.grad, and of the policy that is best in each."""
    title = f"[bold]{sweep.axis}[/]  {sweep.op}: MiB of temporaries, MiB kept for the backward, milliseconds"
    result = Table(box=None, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="")
    result.add_column("size", justify="right", header_style="dim")
    for quantity in ("temp", "kept", "ms"):
        for side in (f"{quantity}: ours", "grad", "best"):
            result.add_column(side, justify="right", header_style="dim", no_wrap=True)
    result.add_column("best policy", header_style="dim", no_wrap=True)
    (curve,) = curves(points)
    for point in curve["points"]:
        sides, cells = point["sides"], []
        for key in QUANTITIES:
            for side in ("ours", "jax.grad", "best"):
                value = sides[side][key] if side in sides else None
                cells.append(mebibytes(value) if key.endswith("bytes") else _milliseconds(value))
        policies = [sides[name] for name in POLICIES if name in sides]
        names = []
        for key in ("temp_bytes", "milliseconds"):
            known = [row for row in policies if row[key] is not None]
            names.append(_SHORT[min(known, key=lambda row: row[key])["against"]] if known else "–")
        result.add_row(f"{point['size']:,}", *cells, ", ".join(names))
    result.caption = "best: the policy of jax.checkpoint with the fewest bytes, or the least time; –: not run, too large"
    result.caption_justify, result.caption_style = "left", "dim"
    return result


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
