"""``bench aot``: what it counts, the file that it writes, a sentence where a compiler is missing."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from fbackprop.cli import main
from fbackprop.measuring import aot
from fbackprop.measuring.flops import matmul_flops, times_run
from fbackprop.models import named

KEYS = {"target", "model", "variant", "temp_bytes", "argument_bytes", "matmul_flops"}
GPU = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def refusal(capsys, *arguments) -> str:
    code = main(["bench", "aot", *map(str, arguments)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("fbackprop: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    return error


def test_targets_and_names_that_are_not_there_are_refused_in_a_sentence(capsys, tmp_path):
    assert "there is no target 'h300'; expected h200" in refusal(capsys, "gpt2-124m", "--target", "h300")
    assert "there is no model" in refusal(capsys, "gpt2", "--json", tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named_with_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(aot, "_imports", lambda module: False)
    for target, package in (("h200", f"'jax[cuda12]=={jax.__version__}'"), ("v5e:2x2", f"'jax[tpu]=={jax.__version__}'")):
        assert f"the compiler for {target} is not here; it comes with pip install {package}" in refusal(
            capsys, "gelu", "--target", target
        )


def test_the_description_of_the_gpu_is_part_of_the_package():
    described = pathlib.Path(aot.__file__).with_name("h200.txtpb").read_text(encoding="utf-8")
    assert "cuda_compute_capability" in described


def test_counting_follows_the_platform_and_the_loops():
    def fn(x):
        def body(x, _):
            return jax.lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x), None

        return jnp.sin(jax.lax.scan(body, x, length=5)[0])

    traced = jax.make_jaxpr(fn)(jnp.ones((4, 4)))
    assert matmul_flops(traced, "cpu") == 2 * matmul_flops(traced, "cuda") == 10 * 2 * 4**3
    assert times_run(traced, "dot_general", "cuda") == 5
    assert times_run(traced, "sin") == 1


@pytest.mark.parametrize("name", aot.MODELS)
def test_variants_are_one_function(name, monkeypatch):
    """Every variant takes the same arguments and gives loss and gradients of the same shapes."""
    sizes = {"layers": 2, "width": 16, "heads": 2, "hidden": 32, "kv_heads": 1, "vocabulary": 64, "length": 16}
    small = {"depths": (1, 1), "features": (4, 8), "classes": 10} if name == "resnet50" else sizes
    monkeypatch.setattr(aot, "named", lambda name, **options: named(name, **small, **options))
    steps = {variant: step for _, variant, step in aot._steps(name, "tpu", 2, 16)}
    assert {"ours", "jax.grad", "checkpoint", "dots_saveable", "dots_with_no_batch_dims_saveable"} <= set(steps)
    ours, *_ = outputs = [jax.eval_shape(fn, *whole, *shared) for fn, whole, shared in steps.values()]
    for output in outputs:
        assert output[0] == ours[0]
        assert sum(leaf.size for leaf in jax.tree.leaves(output[1])) == sum(leaf.size for leaf in jax.tree.leaves(ours[1]))


@pytest.mark.skipif(not GPU, reason="needs jax[cuda12]; no device")
def test_a_program_for_a_gpu_that_is_not_there(tmp_path, capsys):
    file = tmp_path / "aot.json"
    assert main(["bench", "aot", "max_pool", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert set(told) == {"device", "versions", "rows"}
    assert all(set(row) >= KEYS for row in told["rows"])
    bytes_of = {(row["model"], row["variant"]): row["temp_bytes"] for row in told["rows"]}
    assert all(size < bytes_of[model, "jax.grad"] for (model, variant), size in bytes_of.items() if variant == "ours")
    assert "max_pool" in capsys.readouterr().out
