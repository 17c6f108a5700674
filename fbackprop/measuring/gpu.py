"""``fbackprop bench gpu``: tokens a second, model FLOP utilization and peak memory of language models under training.

A step is loss, gradient and plain SGD in one jitted program with its parameters donated, float32 parameters, computed in
bfloat16, attention by cuDNN. Every variant starts from the same weights, and its first losses are compared with ours; then all
take turns, with a product of two large matrices among them.

    utilization = FLOPs of the model's products per step / seconds per step / FLOPs per second of the matrix product

The FLOPs of the model are those of the plain program without checkpoints, attention counted as two whole products: what a
variant computes a second time does not count as work.

Peak memory is what the device tells, above what lay there before. It tells only the highest so far, so that lean variants run
first; of one that is not above those before it, and on a device that tells nothing, it is what the compiler plans: arguments
and temporaries.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from fbackprop.accelerating import accelerate
from fbackprop.context import without_rules
from fbackprop.files import write_json
from fbackprop.measuring.aot import MODELS
from fbackprop.measuring.command import BenchError, _console, _progress, device, versions
from fbackprop.measuring.flops import matmul_flops
from fbackprop.measuring.report import mebibytes
from fbackprop.measuring.rivals import POLICIES
from fbackprop.measuring.steps import Runner, compiled_step
from fbackprop.measuring.times import interleave, ratio
from fbackprop.measuring.twins import Side
from fbackprop.models import named
from fbackprop.models.gpt import GPT
from fbackprop.models.transformer import unstack_blocks

__all__ = ["NAMES", "VARIANTS", "Sizes", "bench_gpu", "measure", "model_flops"]

Row = dict[str, Any]

NAMES = tuple(name for name in MODELS if not name.startswith("resnet"))
VARIANTS = (
    *(f"flax {policy}" for policy in POLICIES), "accelerated dots_saveable", "ours", "ours unrolled", "accelerated", "flax",
)  # fmt: skip
"""Flax's model, the same through ``accelerate``, and ours; behind the name how it is run. Lean ones first."""

_SMALL: dict[str, Any] = {"vocabulary": 512, "layers": 2, "width": 32, "heads": 4, "length": 64}
_ALIKE = 0.01  # how far losses may be apart, relatively: bfloat16 rounds the logits
_FIRST = 3  # steps whose losses are compared


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is; ``small`` is for trying the command on any device."""

    small: bool = False
    batch: int | None = None
    length: int | None = None

    def model(self, name: str, platform: str) -> GPT:
        modern = {"kv_heads": 2, "hidden": 64} if name.startswith("llama") else {}
        own = _SMALL | modern if self.small else {}
        return named(name, dtype="bfloat16", attention="cudnn" if platform == "gpu" else None, **own)

    def tokens(self, name: str) -> tuple[int, int]:
        batch, length = (2, 32) if self.small else MODELS[name]
        return self.batch or batch, self.length or length

    @property
    def matrix(self) -> int:
        return 256 if self.small else 8192


# ----------------------------------------------------------------------------------------------------------- what is stepped


def _side(variant: str, model: GPT, params: Any) -> Side:
    kind, _, how = variant.partition(" ")
    if kind == "ours":
        own = dataclasses.replace(model, scan=not how)
        return Side(lambda p, s, batch: (own.loss(p, *batch), s), params if own.scan else unstack_blocks(params), ())
    try:
        from fbackprop.measuring.twins.language_flax import flax_language
    except ImportError as error:
        raise BenchError(f"bench gpu compares with Flax, and {error.name} is not installed.") from None
    side = flax_language(model, params, model.attention, POLICIES[how] if how else False)
    return side._replace(loss=accelerate(side.loss)) if kind == "accelerated" else side


def model_flops(model: GPT, batch: Any) -> int:
    """Of the products of a step, each counted once."""
    plain = dataclasses.replace(model, attention=None)
    params = jax.eval_shape(plain.init, jax.random.key(0), plain.example)[0]
    return matmul_flops(jax.make_jaxpr(jax.grad(without_rules(plain.loss)))(params, *batch))


def _product(n: int) -> Callable[[], Any]:
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    return lambda: product(a, b)


# --------------------------------------------------------------------------------------------------------- what is measured


def measure(
    name: str, sizes: Sizes, place: Any, rounds: int | None = None, seconds: float = 60.0,
    variants: Sequence[str] = VARIANTS, advance: Callable[[str], None] = lambda variant: None,
) -> list[Row]:  # fmt: skip
    """A row for each variant of a model on a device. One that needs more memory than there is has a note, and no figures."""
    with jax.default_device(place):
        model, (count, length) = sizes.model(name, place.platform), sizes.tokens(name)
        text = np.random.default_rng(0).integers(0, model.vocabulary, (count, length + 1), np.int32)
        batch = text[:, :-1], text[:, 1:]
        params = jax.jit(lambda key: model.init(key, model.example)[0])(jax.random.key(0))
        rows: dict[str, Row] = {}
        runners: dict[str, Runner] = {}
        losses: dict[str, list[float]] = {}
        for variant in variants:
            advance(variant)
            rows[variant] = {"model": name, "variant": variant, "batch": count, "length": length, "note": ""}
            before = place.memory_stats() or {}
            try:
                runners[variant] = runner = compiled_step(_side(variant, model, params), batch)
                losses[variant] = [float(runner.step()) for _ in range(_FIRST)]
            except jax.errors.JaxRuntimeError as error:
                _left(error, rows, runners, variant)
                continue
            rows[variant] |= {
                **_peak(before, place.memory_stats() or {}, runner),
                "temp_bytes": runner.temp_bytes,
                "argument_bytes": runner.argument_bytes,
                "compile_seconds": runner.compile_seconds,
                "loss": losses[variant][-1],
            }
        _require_alike(name, losses, rows)
        flops, product = model_flops(model, batch), _product(sizes.matrix)
        for variant, runner in list(runners.items()):  # beside all others
            try:
                jax.block_until_ready(runner.step())
            except jax.errors.JaxRuntimeError as error:
                _left(error, rows, runners, variant)
        calls = [product, *(runner.step for runner in runners.values())]
        jax.block_until_ready(product())
        budget = seconds if rounds is None else None
        of_product, *turns = interleave(calls, rounds or 20, budget=budget, settled=True)
        times = dict(zip(runners, turns))
    best = min((v for v in times if v.startswith("flax")), key=lambda v: float(np.median(times[v])), default=None)
    for variant, own in times.items():
        share, work = ratio(of_product, own), flops / (2 * sizes.matrix**3)
        middle = float(np.median(own))
        rows[variant] |= {
            "milliseconds": 1e3 * middle,
            "tokens_per_second": count * length / middle,
            **dict(zip(("mfu", "mfu_low", "mfu_high"), (work * x for x in share))),
            "model_flops": flops,
            "product_flops_per_second": 2 * sizes.matrix**3 / float(np.median(of_product)),
        }
        if best is not None:
            faster = ratio(times[best], own)
            rows[variant] |= {"against": best, **dict(zip(("time_ratio", "time_ratio_low", "time_ratio_high"), faster))}
    return list(rows.values())


def _left(error: Exception, rows: dict[str, Row], runners: dict[str, Runner], variant: str) -> None:
    """What does not fit the device is left; other errors are raised."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    runners.pop(variant, None)
    rows[variant]["note"] = "does not fit the device beside the others"


def _peak(before: dict[str, int], after: dict[str, int], runner: Runner) -> Row:
    high, lay = after.get("peak_bytes_in_use"), before.get("bytes_in_use")
    if high is not None and lay is not None and high > before.get("peak_bytes_in_use", 0):
        return {"peak_bytes": high - lay, "peak_by": "device"}
    if runner.temp_bytes is None or runner.argument_bytes is None:
        return {"peak_bytes": None, "peak_by": ""}
    return {"peak_bytes": runner.temp_bytes + runner.argument_bytes, "peak_by": "compiler"}


def _require_alike(name: str, losses: dict[str, list[float]], rows: dict[str, Row]) -> None:
    """Refuses a variant that computes something else."""
    if not losses:
        raise BenchError(f"bench gpu: no variant of {name} fits the device; a smaller --batch may.")
    first = "ours" if "ours" in losses else next(iter(losses))
    for variant, found in losses.items():
        apart = max(abs(a - b) for a, b in zip(found, losses[first]))
        if not apart < _ALIKE * abs(losses[first][0]):
            raise BenchError(f"bench gpu: the losses of {name}, {variant}, are {found}, those of {first} are {losses[first]}.")
        rows[variant]["loss_difference"] = apart


# -------------------------------------------------------------------------------------------------------------- the command


def bench_gpu(options: argparse.Namespace) -> int:
    """Runs ``bench gpu`` with its options as parsed. Without a device of the kind it says what it skipped, and that is all."""
    sizes = Sizes(options.size == "small", options.batch, options.length)
    names, out = options.names or NAMES, _console(sys.stdout)
    place = _device(options.device)
    if place is None:
        skipped = [_described(name, sizes) for name in names]
        found = ", ".join(dict.fromkeys(d.platform for d in jax.devices()))
        told = (
            f"bench gpu: JAX finds no GPU here, only {found}. Skipped: tokens a second, utilization and peak memory of "
            f"{' and '.join(skipped)}, ours and accelerated against Flax with cuDNN's attention. "
            "To try the command without one: --device cpu --size small."
        )
        out.print(told, markup=False, highlight=False)
        if options.json is not None:
            write_json(options.json, {"device": device(), "versions": versions(), "rows": [], "skipped": skipped})
        return 0
    rows: list[Row] = []
    what = {"device": device() if place.platform == "cpu" else place.device_kind, "versions": versions()}
    with _progress("measuring", len(names) * len(VARIANTS)) as advance:
        for name in names:

            def tell(variant: str, name: str = name) -> None:
                advance(f"{name}: {variant}", 1)

            measured = measure(name, sizes, place, options.rounds, options.seconds, VARIANTS, tell)
            rows += measured
            if options.json is not None:
                write_json(options.json, {**what, "rows": rows})
            out.print(_table(measured), "")
            jax.clear_caches()
    if options.plot is not None:
        from fbackprop.measuring.pictures import draw_gpu

        draw_gpu(rows, options.plot, what["device"])
    return 0


def _device(kind: str) -> Any:
    try:
        return jax.devices(kind)[0]
    except RuntimeError:
        return None


def _described(name: str, sizes: Sizes) -> str:
    return f"{name} ({' × '.join(map(str, sizes.tokens(name)))} tokens)"


def _table(rows: list[Row]) -> Table:
    """The variants of one model."""
    first = rows[0]
    title = f"[bold]{first['model']}[/]  {first['batch']} × {first['length']} tokens"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_style="", title_justify="left")
    against = next((row["against"] for row in rows if "against" in row), "flax")
    for head in ("", "tokens/s", "utilization", "peak MiB", f"times faster than {against}", "loss"):
        table.add_column(head, justify="right" if head else "left", header_style="dim", no_wrap=not head)
    for row in sorted(rows, key=lambda row: -row.get("tokens_per_second", 0)):
        if "tokens_per_second" not in row:
            table.add_row(row["variant"], row["note"])
            continue
        peak = mebibytes(row["peak_bytes"]) + ("" if row["peak_by"] == "device" else " (planned)")
        faster = "{time_ratio:.2f} \\[{time_ratio_low:.2f}, {time_ratio_high:.2f}]".format(**row) if "against" in row else "–"
        table.add_row(
            row["variant"], f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}", peak, faster, f"{row['loss']:.4f}"
        )
    return table
