"""``fbackprop bench aot``: training steps compiled for devices that are not there.

The compilers for GPU and TPU run on any machine and tell what memory their program needs, exactly and always the same. Each
model is compiled as one program from parameters and data to the loss and its gradient with respect to all parameters, float32,
computed in bfloat16; no optimizer. (Batch norm's new statistics are outputs, too.) An op is compiled as in ``bench ops``: from
arguments and a cotangent to the output and the gradients.

Nothing runs, so nothing is timed. On several devices the data are shared out, the parameters are on each; bytes are of one.
"""

import argparse
import functools
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.table import Table

from fbackprop import ops
from fbackprop.accelerating import accelerate
from fbackprop.context import without_rules
from fbackprop.files import write_json
from fbackprop.loading import near
from fbackprop.measuring.command import BenchError, _console, _progress, versions
from fbackprop.measuring.flops import matmul_flops, times_run
from fbackprop.measuring.problems import Problem, problem_of
from fbackprop.measuring.rivals import POLICIES, rival
from fbackprop.models import SIZES, named
from fbackprop.refusing import first_line
from fbackprop.rules import RULES

__all__ = ["MODELS", "Row", "Target", "bench_aot", "compiled_row", "target_of"]

Row = dict[str, Any]
Step = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]
"""A program, its arguments that every device holds, and those whose first axis is shared out (``jax.ShapeDtypeStruct``)."""

MODELS: Mapping[str, tuple[int, int]] = {"gpt2-124m": (16, 1024), "llama-1b": (8, 2048), "resnet50": (128, 224)}
"""What is compiled by default: examples, and tokens of each or pixels along an edge."""


# ------------------------------------------------------------------------------------------------------------- the target


class Target(NamedTuple):
    """Devices to compile for."""

    name: str
    platform: str  # "cuda" or "tpu"
    mesh: jax.sharding.Mesh
    packages: tuple[str, ...]  # that compile for it

    def placed(self, tree: Any, shared: bool = False) -> Any:
        """The types of arrays, on these devices."""
        count = self.mesh.size

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            split = shared and leaf.ndim and leaf.shape[0] % count == 0
            sharding = jax.sharding.NamedSharding(self.mesh, jax.P("data") if split else jax.P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(one, tree)


def target_of(text: str) -> Target:
    """A GPU by the name of its description ("h200", or a file), or slices of a TPU ("v5e:2x2").

    Raises:
      BenchError: where there is no such target, or its compiler is not installed; the sentence says what to install.
    """
    described = pathlib.Path(text) if text.endswith(".txtpb") else pathlib.Path(__file__).with_name(f"{text}.txtpb")
    if described.is_file():
        return _gpu(text, described.read_text(encoding="utf-8"))
    kind, colon, shape = text.partition(":")
    if colon and kind.startswith("v") and all(n.isdigit() for n in shape.split("x")):
        return _tpu(text)
    known = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("*.txtpb"))
    raise BenchError(
        f"there is no target {text!r}; expected {' or '.join(known)}, a description of a GPU (FILE.txtpb), or a TPU with "
        "its topology, such as v5e:2x2."
    )


def _gpu(name: str, description: str) -> Target:
    found = next((n for n in ("12", "13") if _imports(f"jax_plugins.xla_cuda{n}")), None)
    if found is None:
        raise BenchError(
            f"the compiler for {name} is not here; it comes with pip install 'jax[cuda12]=={jax.__version__}' (several GB; "
            "no GPU is needed)."
        )
    devices = _devices(name, "cuda", topology="1x1x1", target_config=description)
    return Target(name, "cuda", _mesh(devices), (f"jax-cuda{found}-plugin", f"nvidia-cudnn-cu{found}"))


def _tpu(name: str) -> Target:
    # Read by libtpu when it is loaded; without them it looks for a TPU, and complains.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    for variable, value in {**alone, "TPU_ACCELERATOR_TYPE": f"{name.partition(':')[0]}-1"}.items():
        os.environ.setdefault(variable, value)
    if not _imports("libtpu"):
        raise BenchError(f"the compiler for {name} is not here; it comes with pip install 'jax[tpu]=={jax.__version__}'.")
    return Target(name, "tpu", _mesh(_devices(name, "tpu", topology_name=name)), ("libtpu",))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _devices(name: str, platform: str, **topology: Any) -> list[Any]:
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # of a plugin that finds no device
    try:
        return list(topologies.get_topology_desc(platform=platform, **topology).devices)
    except Exception as error:
        raise BenchError(f"{name} is no target that the compiler for {platform} takes: {first_line(error)[:300]}.") from None


def _mesh(devices: list[Any]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.asarray(devices), ("data",))


# ------------------------------------------------------------------------------------------------------------ what it costs


def compiled_row(target: Target, model: str, variant: str, step: Step) -> Row:
    """Compiles one program. Where it does not fit the device, its bytes are None."""
    fn, whole, shared = step
    traced = jax.jit(fn).trace(*target.placed(whole), *target.placed(shared, shared=True))
    row: Row = {
        "target": target.name,
        "model": model,
        "variant": variant,
        "temp_bytes": None,
        "argument_bytes": None,
        "matmul_flops": matmul_flops(traced.jaxpr, target.platform),
        "attentions": times_run(traced.jaxpr, "dot_product_attention_fwd_wrapper", target.platform),
        "note": "",
    }
    try:
        memory: Any = traced.lower().compile().memory_analysis()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise BenchError(f"{model}, {variant}: the compiler for {target.name} says {first_line(error)[:300]}.") from None
        return row | {"note": "does not fit the device"}
    return row | {"temp_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes}


# ---------------------------------------------------------------------------------------------------------------- the models


def _steps(name: str, platform: str, batch: int | None, size: int | None) -> Iterator[tuple[str, str, Step]]:
    """(what, variant, program) for each variant of a model, or of each workload of an op."""
    if name in RULES:
        for workload in RULES[name].workloads:
            given = problem_of(RULES[name], workload)
            for variant in ("ours", "jax.grad", *POLICIES):
                yield f"{name} {given.text}", variant, _op_step(given, variant)
        return
    examples, edge = MODELS.get(name, MODELS["gpt2-124m"])
    make = _image_steps if name.startswith("resnet") else _token_steps
    for variant, step in make(name, batch or examples, size or edge, platform):
        yield name, variant, step


def _op_step(given: Problem, variant: str) -> Step:
    call = (lambda arguments: given.rule.op(**arguments)) if variant == "ours" else rival(variant, given).call

    def gradient(dy: Any, moved: Any, rest: Any) -> Any:
        y, pullback = jax.vjp(lambda *m: given.outputs(call, m, rest), *moved)
        return y, pullback(dy)

    return gradient, jax.eval_shape(lambda *a: a, given.dy, given.moved, given.rest), ()


def _token_steps(name: str, batch: int, length: int, platform: str) -> Iterator[tuple[str, Step]]:
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    # cuDNN's attention for everybody; without our rules it has the gradient that JAX gives it.
    options = {"dtype": "bfloat16", "attention": "cudnn" if platform == "cuda" else None}

    def step(loss_of: Callable[[Any], Any], **more: Any) -> Step:
        model = named(name, **options, **more)
        params, _ = jax.eval_shape(model.init, jax.random.key(0), model.example)
        return jax.value_and_grad(loss_of(model)), (params,), (tokens, tokens)

    def ours(model: Any) -> Any:
        return model.loss

    def twin(model: Any) -> Any:
        return without_rules(model.loss)

    def in_chunks(model: Any) -> Any:
        return without_rules(functools.partial(_loss_in_chunks, model))

    yield "ours", step(ours)
    yield "ours, unrolled", step(ours, scan=False)
    yield "ours, checkpoint", step(ours, checkpoint="full")
    yield "jax.grad", step(twin)
    yield "jax.grad, unrolled", step(twin, scan=False)
    for loss, note in ((twin, ""), (in_chunks, ", loss in chunks")):
        for policy in POLICIES:
            yield f"{policy}{note}", step(loss, checkpoint="full" if policy == "checkpoint" else policy)
    if _imports("flax"):
        flax, params = _flax_loss(named(name, **options))
        yield "flax", (jax.value_and_grad(flax), (params,), (tokens, tokens))
        yield "flax, accelerated", (jax.value_and_grad(accelerate(flax)), (params,), (tokens, tokens))


def _flax_loss(model: Any) -> tuple[Callable[[Any, Any, Any], Any], Any]:
    """Flax's model of the same size, unrolled as it stands there, and the types of its parameters."""
    from fbackprop.measuring.twins.language_flax import flax_language_loss, flax_language_weights

    own, _ = jax.eval_shape(model.init, jax.random.key(0), model.example)
    params = jax.eval_shape(functools.partial(flax_language_weights, model), own)
    loss = flax_language_loss(model, model.attention)
    return (lambda params, tokens, targets: loss(params, (), (tokens, targets))[0]), params


def _loss_in_chunks(model: Any, params: Any, tokens: jax.Array, targets: jax.Array, chunks: int = 16) -> jax.Array:
    """What an expert writes: the logits of a part of the tokens at a time, computed again in the backward."""
    x, head = model._features(params, tokens), model._head(params)
    numbers = (((1,), (1 if model.tied else 0,)), ((), ()))

    @jax.checkpoint
    def total(x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jax.lax.dot_general(x, head, numbers, preferred_element_type=jnp.float32)
        return jnp.sum(ops.softmax_cross_entropy_with_integer_labels(logits, targets))

    parts = x.reshape(chunks, -1, x.shape[-1]), targets.reshape(chunks, -1)
    return jnp.sum(jax.lax.map(lambda part: total(*part), parts)) / targets.size


def _image_steps(name: str, batch: int, edge: int, platform: str) -> Iterator[tuple[str, Step]]:
    model = named(name, dtype="bfloat16")
    images, labels = jax.ShapeDtypeStruct((batch, edge, edge, 3), jnp.bfloat16), jax.ShapeDtypeStruct((batch,), jnp.int32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params: Any, state: Any, images: Any, labels: Any) -> Any:
        logits, state = model.apply(params, images, state=state, train=True)
        return jnp.mean(ops.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)), state

    def step(loss: Any) -> Step:
        return jax.value_and_grad(loss, has_aux=True), (params, state), (images, labels)

    yield "ours", step(loss)
    for policy in ("checkpoint", "dots_saveable"):
        yield f"ours, {policy}", step(jax.checkpoint(loss, policy=POLICIES[policy]))
    yield "jax.grad", step(without_rules(loss))
    for policy, rule in POLICIES.items():
        yield policy, step(without_rules(jax.checkpoint(loss, policy=rule)))


# --------------------------------------------------------------------------------------------------------------- the command


def bench_aot(options: argparse.Namespace) -> int:
    """Runs ``bench aot`` with its options as parsed. What it refuses is a BenchError; then no file was written."""
    for name in options.names:
        if name not in SIZES and not (name in RULES and RULES[name].workloads):
            known = {*SIZES, *(n for n, rule in RULES.items() if rule.workloads)}
            raise BenchError(f"there is no model, and no op with a workload, of the name {name!r}{near(name, sorted(known))}.")
    jax.config.update("jax_platforms", "cpu")
    targets = [target_of(text) for text in options.target or ["h200"]]
    out, rows = _console(sys.stdout), []
    what = {"device": _told(targets), "versions": _versions(targets)}
    for target in targets:
        for name in options.names or MODELS:
            steps = list(_steps(name, target.platform, options.batch, options.length))
            own: list[Row] = []
            with _progress(target.name, len(steps)) as advance:
                for model, variant, step in steps:
                    advance(f"{model}: {variant}", 0)
                    own.append(compiled_row(target, model, variant, step))
                    if options.json is not None:  # after each program: whatever happens, what was compiled is kept
                        write_json(options.json, {**what, "rows": rows + own})
                    advance(f"{model}: {variant}", 1)
                    jax.clear_caches()
            rows += own
            for model in dict.fromkeys(row["model"] for row in own):
                out.print(_table([row for row in own if row["model"] == model]), "")
    return 0


def _told(targets: list[Target]) -> str:
    return f"compiled for {', '.join(target.name for target in targets)}; nothing ran"


def _versions(targets: list[Target]) -> dict[str, str]:
    found = versions()
    for package in (package for target in targets for package in target.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _table(rows: list[Row]) -> Table:
    """The programs of one model."""
    first = rows[0]
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"[bold]{first['target']}[/]  {first['model']}", title_style="")
    table.title_justify = "left"
    attention = any(row["attentions"] for row in rows)
    heads = ("variant", "temp MiB", "arguments MiB", "matmul TFLOP", *(["attention runs"] if attention else []))
    for head in heads:
        table.add_column(head, justify="left" if head == "variant" else "right", header_style="dim")
    for row in rows:
        sizes = [row["note"] if n is None else f"{n / 2**20:,.1f}" for n in (row["temp_bytes"], row["argument_bytes"])]
        times = [str(row["attentions"])] if attention else []
        table.add_row(row["variant"], *sizes, f"{row['matmul_flops'] / 1e12:.3f}", *times)
    return table
