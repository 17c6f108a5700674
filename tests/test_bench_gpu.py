"""``fbackprop bench gpu``, on a CPU: the same code with small models; and what it says where there is no GPU."""

import json
from typing import Any

import jax
import pytest

from fbackprop.cli import main
from fbackprop.loading import Refusal
from fbackprop.measuring import gpu
from fbackprop.measuring.steps import Runner

SMALL = gpu.Sizes(small=True)
CPU = jax.devices("cpu")[0]


@pytest.mark.parametrize("name", ["llama-1b", pytest.param("gpt2-124m", marks=pytest.mark.slow)])
def test_the_command_measures_variants_that_compute_the_same(name, tmp_path, capsys, monkeypatch, request):
    if not request.config.getoption("--slow"):
        monkeypatch.setattr(gpu, "VARIANTS", ("flax dots_saveable", "ours"))
    files = ["--json", str(tmp_path / "g.json"), "--plot", str(tmp_path / "g.png")]
    assert main(["bench", "gpu", name, "--device", "cpu", "--size", "small", "--rounds", "2", *files]) == 0
    found = json.loads((tmp_path / "g.json").read_text())
    assert set(found) == {"device", "versions", "rows"}
    assert [row["variant"] for row in found["rows"]] == list(gpu.VARIANTS)
    for row in found["rows"]:
        assert row["loss_difference"] < 1e-3
        assert row["against"].startswith("flax")
        assert row["tokens_per_second"] == pytest.approx(64 / row["milliseconds"] * 1e3)
        assert row["mfu_low"] <= row["mfu"] <= row["mfu_high"]
        assert row["peak_bytes"] == row["temp_bytes"] + row["argument_bytes"]
        assert row["peak_by"] == "compiler"
    assert (tmp_path / "g.png").stat().st_size > 10_000
    assert "utilization" in capsys.readouterr().out


def test_the_flops_of_a_model_count_every_product_once():
    """Six for each parameter of a product and token, and both products of attention over all positions."""
    model, (batch, length) = SMALL.model("gpt2-124m", "cpu"), SMALL.tokens("gpt2-124m")
    tokens = jax.ShapeDtypeStruct((batch, length), "int32")
    inside = 12 * model.width**2 * model.layers + model.vocabulary * model.width
    attention = 2 * model.layers * length * model.width
    assert gpu.model_flops(model, (tokens, tokens)) == 6 * (inside + attention) * batch * length


def faked(monkeypatch, losses):
    """Steps that only tell a loss; where it is None, the device is full."""

    def step(side: Any, batch: Any) -> Runner:
        loss = losses[side]
        if loss is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return Runner(lambda: loss, temp_bytes=3, argument_bytes=4)

    monkeypatch.setattr(gpu, "_side", lambda variant, model, params: variant)
    monkeypatch.setattr(gpu, "compiled_step", step)
    return gpu.measure("gpt2-124m", SMALL, CPU, rounds=1, variants=tuple(losses))


def test_a_variant_that_computes_something_else_is_refused(monkeypatch):
    with pytest.raises(Refusal, match=r"the losses of gpt2-124m, flax, are \[6.2, .*\], those of ours are \[6.1, "):
        faked(monkeypatch, {"ours": 6.1, "flax": 6.2})


def test_what_does_not_fit_is_left_with_a_note(monkeypatch):
    rows = faked(monkeypatch, {"flax": None, "ours": 6.1})
    assert rows[0]["note"] == "does not fit the device beside the others"
    assert "tokens_per_second" in rows[1]
    assert "time_ratio" not in rows[1]  # there is no Flax to compare with
    gpu._table(rows)
    with pytest.raises(Refusal, match="no variant of gpt2-124m fits the device"):
        faked(monkeypatch, {"flax": None})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"bytes_in_use": 10, "peak_bytes_in_use": 50}, {"peak_bytes_in_use": 80}, (70, "device")),
        ({"bytes_in_use": 10, "peak_bytes_in_use": 80}, {"peak_bytes_in_use": 80}, (7, "compiler")),
        ({}, {}, (7, "compiler")),
    ],
)
def test_peak_memory(before, after, expected):
    runner = Runner(lambda: None, temp_bytes=3, argument_bytes=4)
    assert tuple(gpu._peak(before, after, runner).values()) == expected


def test_without_a_gpu_it_says_what_it_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "_device", lambda kind: None)
    assert main(["bench", "gpu", "--json", str(tmp_path / "g.json")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "JAX finds no GPU here" in told
    assert "gpt2-124m (16 × 1024 tokens) and llama-1b (8 × 2048 tokens)" in told
    found = json.loads((tmp_path / "g.json").read_text())
    assert found["rows"] == []
    assert len(found["skipped"]) == 2
