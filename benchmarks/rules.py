"""Every rule against jax.grad of its own definition, on its workloads: forward and backward in one compiled program.

    python benchmarks/rules.py [NAMES …] [--rounds N] [--json FILE]

What is timed is what jax.grad gives: the cotangents of all arguments for a cotangent of standard normals, forward pass
included. A row says how many times faster the hand-written backward is (median of the ratios of interleaved runs, with a 95 %
interval), and how many MiB each side keeps between forward and backward. A rule that is new appears here by itself.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fbackprop import ops  # noqa: F401  (fills RULES)
from fbackprop.measuring import interleave, ratio, saved_bytes
from fbackprop.rules import RULES, Rule
from fbackprop.samples import Sample


def measure(rule: Rule, workload: Sample, rounds: int) -> dict[str, Any]:
    """One row: the rule on one of its workloads."""
    args, options = workload.make()
    dynamic, static = rule.split(args, options)
    moving = [i for i, a in enumerate(dynamic) if a is not None and jnp.issubdtype(jnp.result_type(a), jnp.inexact)]

    def of(fn: Any) -> Any:
        def call(*moved: Any) -> Any:
            values = list(dynamic)
            for i, value in zip(moving, moved):
                values[i] = value
            return rule.call(fn, values, static)

        return call

    arrays = [jnp.asarray(dynamic[i]) for i in moving]
    ours, theirs = of(rule.op), of(rule.reference)
    y = jax.eval_shape(ours, *arrays)
    leaves, tree = jax.tree.flatten(y)
    # The first output has a cotangent of standard normals; further ones are state.
    dy = [
        jax.random.normal(jax.random.key(9), leaf.shape, jnp.float32).astype(leaf.dtype) if i == 0 else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]

    def step(fn: Any) -> Any:
        @jax.jit
        def gradient(dy: Any, *arrays: Any) -> Any:
            return jax.vjp(fn, *arrays)[1](jax.tree.unflatten(tree, dy))

        return lambda: gradient(dy, *arrays)

    times = interleave([step(ours), step(theirs)], rounds)
    speed = ratio(times[1], times[0])
    return {
        "op": rule.name,
        "workload": f"{workload.dtype} {workload.note or workload}",
        "time_ratio": speed.median,
        "time_ratio_low": speed.low,
        "time_ratio_high": speed.high,
        "milliseconds": 1e3 * sorted(times[0])[len(times[0]) // 2],
        "saved_bytes": saved_bytes(ours, *arrays),
        "saved_bytes_autodiff": saved_bytes(theirs, *arrays),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAMES", help="ops; by default all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    if unknown := [n for n in options.names if n not in RULES]:
        parser.error(f"there is no rule {unknown[0]}; known are {', '.join(RULES)}")
    chosen = [(r, w) for r in RULES.values() if not options.names or r.name in options.names for w in r.workloads]
    rows = [measure(r, w, options.rounds) for r, w in track(chosen, "measuring", console=Console(stderr=True))]
    device = f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}"
    table = Table(title=f"hand-written rules against jax.grad of the definition ({device})")
    for column in ("op", "workload", "times faster [95 %]", "ms", "MiB kept", "autodiff's"):
        table.add_column(column, justify="left" if column in ("op", "workload") else "right")
    for row in rows:
        speed = f"{row['time_ratio']:.2f} [{row['time_ratio_low']:.2f}, {row['time_ratio_high']:.2f}]"
        kept = (f"{row[k] / 2**20:.1f}" for k in ("saved_bytes", "saved_bytes_autodiff"))
        table.add_row(row["op"], row["workload"], speed, f"{row['milliseconds']:.2f}", *kept)
    Console().print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device, "rows": rows}, file, indent=1)
    return rows


if __name__ == "__main__":
    main()
