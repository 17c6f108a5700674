"""The command: presets against the worked examples, runs that are stopped and resumed, and a sentence for every refusal."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fbackprop.cli import main
from fbackprop.training.presets import PRESETS

WORKED = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments):
    return main(["train", *map(str, arguments)])


def metrics(directory):
    return json.loads((pathlib.Path(directory) / "metrics.json").read_text())


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pathlib.Path(directory).rglob("*") if path.is_file()}


def refusal(capsys, *arguments) -> str:
    """The one sentence of a refused command, which leaves every file as it was."""
    before = snapshot(".")
    capsys.readouterr()
    try:
        code = train(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("fbackprop: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    assert snapshot(".") == before
    return error


def checkpoint(directory) -> list[np.ndarray]:
    """The arrays of the newest checkpoint, read without the library."""
    import orbax.checkpoint as ocp

    folder = pathlib.Path(directory).absolute() / "checkpoints"
    newest = max(int(p.name) for p in folder.iterdir())
    with ocp.StandardCheckpointer() as reader:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(reader.restore(folder / str(newest) / "state"))]


def same(one, two) -> bool:
    a, b = checkpoint(one), checkpoint(two)
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


# Presets


def test_and_gate_meets_the_worked_example(here, capsys):
    expected = WORKED["001_and_gate"]
    assert train("and-gate") == 0
    found = metrics("runs/and-gate-1")
    for step, loss in expected["sigmoid_training"]["loss_at_step"].items():
        assert found["loss_by_step"][int(step)] == pytest.approx(loss, abs=1e-9)
    layer = found["parameters"]["layers"][0]
    final = [*np.ravel(layer["kernel"]), *layer["bias"]]
    np.testing.assert_allclose(final, expected["sigmoid_training"]["final"], atol=1e-9)
    assert found["steps"] == 1000
    assert found["gradient_check_max_error"] < 1e-12
    assert found["accuracy"] == 1
    printed = capsys.readouterr().out
    table = re.findall(r"^ +([01]) +([01]) +([+-]\d\.\d\d) +([01])$", printed, re.M)
    rows = [(*row, pre, out) for row, pre, out in zip(*(expected["step"][name] for name in ("inputs", "pre", "out")))]
    assert [tuple(map(float, row)) for row in table] == rows
    assert "worst error" in printed
    assert "accuracy   100.00 %" in printed
    assert "runs/and-gate-1/" in printed


@pytest.mark.parametrize("rate", ["0.01", "0.5"])
def test_sigmoid_neuron_meets_the_worked_example(here, rate):
    expected = WORKED["003_sigmoid_neuron"]
    assert train("sigmoid-neuron", "--steps", 1, "--lr", rate, "--out", "run") == 0
    found, updated = metrics("run"), expected["updated"][rate]
    layer = found["parameters"]["layers"][0]
    np.testing.assert_allclose(np.ravel(layer["kernel"]), updated["W"], atol=1e-9)
    np.testing.assert_allclose(layer["bias"], [updated["b"]], atol=1e-9)
    np.testing.assert_allclose(found["loss_by_step"], [expected["error"], updated["error"]], atol=1e-9)


def test_three_layer_meets_the_worked_example(here):
    expected = WORKED["004_mlp"]
    assert train("three-layer", "--steps", 1, "--out", "one") == 0
    layers = metrics("one")["parameters"]["layers"][::2]
    for number, layer in enumerate(layers, 1):
        np.testing.assert_allclose(np.transpose(layer["kernel"]), expected["updated"][f"W{number}"], atol=1e-9)
        np.testing.assert_allclose(layer["bias"], expected["updated"][f"b{number}"], atol=1e-9)
    assert train("three-layer", "--steps", 11, "--out", "eleven") == 0
    np.testing.assert_allclose(metrics("eleven")["loss_by_step"], expected["loss_by_step"], atol=1e-9)


def test_digits_cnn_reaches_98_percent(here, capsys):
    assert train("digits-cnn", "--out", "run") == 0
    found = metrics("run")
    assert found["test_accuracy"] >= 0.98
    assert found["seconds"] < 120
    assert found["steps"] == 440
    assert found["gradient_check_max_error"] < 1e-4
    assert found["gradient_check_max_error_float64"] < 1e-12
    assert {path.name for path in pathlib.Path("run").iterdir()} == {"config.json", "metrics.json", "curves.png", "checkpoints"}
    assert f"accuracy   {100 * found['test_accuracy']:.1f}"[:-1] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_digits_cnn_reaches_98_percent_with_other_seeds(here, seed):
    assert train("digits-cnn", "--seed", seed, "--out", "run") == 0
    assert metrics("run")["test_accuracy"] >= 0.98


def test_digits_mlp_learns_in_bfloat16_and_with_another_optimizer(here):
    assert (
        train("digits-mlp", "--epochs", 4, "--dtype", "bfloat16", "--optimizer", "lion", "--lr", "0.0005", "--batch", 32) == 0
    )
    found = metrics("runs/digits-mlp-1")
    assert found["test_accuracy"] > 0.8
    assert found["skipped_steps"] == 0
    assert found["steps"] == 4 * (1438 // 32)
    assert {leaf.dtype for leaf in checkpoint("runs/digits-mlp-1")} == {np.dtype(t) for t in ("float32", "int32", "uint32")}


def write_table(path, rng, labels):
    flat = rng.normal(size=(60, 4)) + 3 * np.eye(4)[labels]
    pathlib.Path(path).write_text("\n".join(",".join(map(str, [*row, label])) for row, label in zip(flat, labels)))


def test_a_table_of_ones_own(here):
    write_table("flat.csv", np.random.default_rng(0), np.arange(60) % 3)
    assert train("flat.csv", "--epochs", 12, "--batch", 8) == 0
    assert metrics("runs/flat-1")["test_accuracy"] > 0.8


@pytest.mark.slow
def test_own_files(here, capsys):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    write_table("flat.csv", rng, labels)
    for number in (1, 2):  # a batch of all 48, and a folder of its own
        assert train("flat.csv", "--steps", 1) == 0
        assert metrics(f"runs/flat-{number}")["steps"] == 1
    images = rng.normal(size=(60, 5, 6)) + 2 * labels[:, None, None]
    np.savez("images.npz", x=images, y=labels)
    assert train("images.npz", "--steps", 2, "--batch", 16) == 0
    assert "Conv" in json.loads(pathlib.Path("runs/images-1/config.json").read_text())["model"]
    np.savez("images.npz", x=images + 1, y=labels)
    assert "the data are not those" in refusal(capsys, "images.npz", "--out", "runs/images-1", "--resume", "--steps", 4)


# Stopping and resuming


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["digits-mlp", "digits-cnn"])
def test_resumed_and_extended_is_bitwise_one_long_run(here, capsys, preset):
    assert train(preset, "--steps", 24, "--out", "whole", "--seed", 3, "--lr", "0.002") == 0
    assert train(preset, "--steps", 9, "--out", "parts", "--seed", 3, "--lr", "0.002") == 0
    assert not same("whole", "parts")
    # What is not said again is as it was; the end may be another.
    assert train(preset, "--steps", 24, "--out", "parts", "--resume") == 0
    assert same("whole", "parts")
    one, two = metrics("whole"), metrics("parts")
    assert two["steps"] == 24
    assert (one["loss"], one["test_accuracy"]) == (two["loss"], two["test_accuracy"])
    before = snapshot("parts")
    capsys.readouterr()
    assert train(preset, "--out", "parts", "--resume") == 0
    assert "complete (24 of 24 steps), nothing to do" in capsys.readouterr().out
    assert snapshot("parts") == before


def test_ctrl_c_says_how_to_go_on(here):
    command = [sys.executable, "-u", "-m", "fbackprop", "train", "and-gate", "--out", "run"]
    process = subprocess.Popen([*command, "--steps", "200000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert process.stdout
    process.stderr.readline()  # the first evaluation: the run is under way
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    step = re.search(r"stopped at step (\d+) of 200000; to continue: (.+)", out)
    assert step
    assert step[2] == "fbackprop train and-gate --out run --resume"
    assert metrics("run")["complete"] is False
    assert metrics("run")["steps"] == int(step[1])
    assert train("and-gate", "--out", "run", "--resume", "--steps", int(step[1]) + 10) == 0
    assert train("and-gate", "--out", "whole", "--steps", int(step[1]) + 10) == 0
    assert same("run", "whole")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digit-cnn"], "did you mean digits-cnn"),
        (["zzz"], "known are and-gate, sigmoid-neuron, three-layer, digits-mlp, digits-cnn"),
        (["missing.csv"], "missing.csv: there is no such file"),
        (["folder/missing.npz"], "there is no such file"),
        (["broken.npz"], "not an .npz file"),
        (["text.csv"], "line 2, column 1 holds 'a'"),
        (["and-gate", "--steps", "0"], "expected a whole number from 1, got '0'"),
        (["and-gate", "--epochs", "many"], "got 'many'"),
        (["and-gate", "--steps", "3", "--epochs", "3"], "expected one of the two"),
        (["and-gate", "--batch", "0"], "got '0'"),
        (["and-gate", "--batch", "5"], "--batch 5 is more than the 4 examples"),
        (["and-gate", "--lr", "0"], "expected a number above 0"),
        (["and-gate", "--lr", "nan"], "expected a number above 0"),
        (["and-gate", "--lr", "-1"], "expected a number above 0"),
        (["and-gate", "--seed", "-1"], "got '-1'"),
        (["and-gate", "--optimizer", "adma"], "did you mean adam?"),
        (["and-gate", "--dtype", "float31"], "float32, bfloat16, float64"),
        (["and-gate", "--out", "text.csv"], "text.csv is a file"),
        (["and-gate", "--resume"], "--resume needs --out DIR"),
        (["and-gate", "--resume", "--out", "nowhere"], "nowhere holds no run to resume"),
        (["and-gate", "--unknown"], "unrecognized arguments: --unknown"),
        ([], "PRESET"),
    ],
)
def test_refusals(here, capsys, arguments, says):
    pathlib.Path("broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    pathlib.Path("text.csv").write_text("1,2,0\na,2,1\n")
    assert says in refusal(capsys, *arguments)


def test_a_run_is_not_overwritten_nor_continued_as_another(here, capsys):
    assert train("and-gate", "--steps", 3, "--out", "run") == 0
    assert train("three-layer", "--steps", 3, "--out", "other") == 0
    assert "holds a run already" in refusal(capsys, "and-gate", "--steps", 3, "--out", "run")
    assert "a run of and-gate, not of three-layer" in refusal(capsys, "three-layer", "--out", "run", "--resume")
    assert "--lr 0.1: the run began with 0.5" in refusal(capsys, "and-gate", "--out", "run", "--resume", "--lr", 0.1)
    assert "--dtype float32: the run" in refusal(capsys, "and-gate", "--out", "run", "--resume", "--dtype", "float32")
    assert "3 steps already; 2 are fewer" in refusal(capsys, "and-gate", "--out", "run", "--resume", "--steps", 2)
    # A checkpoint of another model, in a folder whose record is the right one.
    pathlib.Path("run/checkpoints").rename("mine")
    pathlib.Path("other/checkpoints").rename("run/checkpoints")
    for steps in (3, 9):
        assert "holds a run with examples 1, not 4" in refusal(capsys, "and-gate", "--out", "run", "--resume", "--steps", steps)
    pathlib.Path("run/config.json").write_text("{")
    assert "not the record of a run" in refusal(capsys, "and-gate", "--out", "run", "--resume")


def test_a_named_folder_may_exist_and_hold_other_things(here):
    pathlib.Path("run").mkdir()
    pathlib.Path("run/notes.txt").write_text("mine")
    assert train("and-gate", "--steps", 2, "--out", "run") == 0
    assert pathlib.Path("run/notes.txt").read_text() == "mine"


# The command itself


def test_help_names_every_preset_and_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    options = ["--steps", "--epochs", "--batch", "--lr", "--optimizer", "--dtype", "--seed", "--out", "--resume"]
    assert all(word in printed for word in [*PRESETS, *options, ".npz", "CSV"])


def test_version_and_module():
    from importlib.metadata import version

    done = subprocess.run([sys.executable, "-m", "fbackprop", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fbackprop {version('fbackprop')}\n"


def test_help_does_not_wait_for_heavy_imports():
    heavy = ["matplotlib", "sklearn", "orbax.checkpoint", "rich"]
    code = f"""
import sys
from fbackprop.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert time.perf_counter() - start < 20
