"""``fbackprop explain``: what it prints and writes, keys in a terminal, a trained model, and a sentence for every refusal."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.cli import main
from fbackprop.cli_explain import language_of
from fbackprop.explaining import command

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    return tmp_path


def explain(*arguments):
    return main(["explain", *map(str, arguments)])


def refusal(capsys, *arguments):
    """The one sentence of a refused command, which writes nothing."""
    try:
        code = explain(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, error = capsys.readouterr()
    assert code == 2
    assert not out
    assert error.startswith("fbackprop: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    assert not list(pathlib.Path().iterdir())
    return error


def test_prints_and_writes(here, capsys):
    assert explain("error-sharing", "--html", "a.html", "--json", "a.json", "--latex", "a.tex") == 0
    out = capsys.readouterr().out
    assert "0.36" in out
    assert "LRP-0" in out
    assert "written: a.html, a.tex, a.json" in out
    page, written = pathlib.Path("a.html").read_text(), json.loads(pathlib.Path("a.json").read_text())
    assert page.startswith("<!DOCTYPE html>")
    assert 'lang="en"' in page
    assert "0.36" in page
    assert "0.36" in pathlib.Path("a.tex").read_text()
    assert written["name"] == "error-sharing"
    np.testing.assert_allclose(written["numbers"]["shares"], [0.36, 0.24])


def test_language(here, capsys, monkeypatch):
    assert explain("error-sharing", "--lang", "ko") == 0
    assert "순전파" in capsys.readouterr().out
    monkeypatch.setenv("LC_ALL", "ko_KR.UTF-8")
    assert explain("error-sharing") == 0
    assert "순전파" in capsys.readouterr().out


def test_language_of_the_environment():
    assert language_of({"LANG": "ko_KR.UTF-8"}) == "ko"
    assert language_of({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}) == "en"
    assert language_of({"LANG": "de_DE.UTF-8"}) == "en"
    assert language_of({"LANG": ""}) == "en"
    assert language_of({}) == "en"


def test_refusals(here, capsys):
    assert "there is no example 'nuron' (did you mean neuron" in refusal(capsys, "nuron")
    assert "known are and-gate, neuron, two-three-two" in refusal(capsys, "perceptron")
    assert "neither is given" in refusal(capsys)
    assert "got cnn and --model digits-cnn" in refusal(capsys, "cnn", "--model", "digits-cnn")
    assert "known are digits-mlp, digits-cnn" in refusal(capsys, "--model", "stdlib-gpt")
    assert "--checkpoint is for --model" in refusal(capsys, "cnn", "--checkpoint", "runs")
    assert "--example is for --model" in refusal(capsys, "cnn", "--example", 3)
    assert "there is no language 'de'" in refusal(capsys, "cnn", "--lang", "de")
    assert "nowhere does not exist" in refusal(capsys, "cnn", "--html", "nowhere/a.html")
    assert "--example 400 is too large; 359 digits" in refusal(capsys, "--model", "digits-cnn", "--example", 400)
    assert "runs holds no run" in refusal(capsys, "--model", "digits-cnn", "--checkpoint", "runs")


# Keys.


def shown(keys, count=4):
    """Which sections are shown, one after the other, for these keys."""
    seen, pressed = [], iter(keys)
    command.walk_through(range(count), lambda: next(pressed), seen.append, "en")
    return seen


def test_keys(capsys):
    assert shown(["\n", " ", "\x1b[C"]) == [0, 1, 2, 3]
    assert shown(["\n", "b", "x", "n", "q"]) == [0, 1, 0, 1]
    assert shown(["b", "\x1b[D", "q"]) == [0]  # there is nothing before the first
    assert shown([""]) == [0]  # the terminal has gone
    assert "1/4 · Enter: next · b: back · q: quit" in capsys.readouterr().out


def test_step_without_a_terminal_says_so(here, capsys):
    assert explain("error-sharing", "--step") == 0
    out, error = capsys.readouterr()
    assert "there is none; all is shown at once." in error
    assert "Update" in out


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments):
        import pty

        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        # In the background of a shell Ctrl-C is ignored, and a process takes that, unlike a handler, from its parent.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fbackprop", "explain", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self.text = ""

    def wait_for(self, pattern):
        end = time.monotonic() + 240
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self.ours, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    break
        assert re.search(pattern, self.text), self.text
        found, self.text = self.text, ""
        return found

    def press(self, key):
        os.write(self.ours, key.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_step_in_a_terminal():
    terminal = Terminal("error-sharing", "--step")
    try:
        first = terminal.wait_for("1/6 · Enter: next")
        assert "What the document wants to show" in first
        assert "contributions =" not in first
        terminal.press(" ")
        assert "contributions =" in terminal.wait_for("2/6 · Enter: next")
        terminal.press("b")
        assert "What the document wants to show" in terminal.wait_for("1/6 · Enter: next")
        os.killpg(terminal.process.pid, signal.SIGINT)  # what Ctrl-C does
        assert terminal.process.wait(60) == 130
        terminal.wait_for(r"interrupted\.")
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)


# A model.


def test_a_model_from_its_run(here, capsys):
    from fbackprop.data import digits
    from fbackprop.files import write_json
    from fbackprop.training import init_train_state, make_optimizer
    from fbackprop.training.checkpoints import Checkpoints
    from fbackprop.training.presets import PRESETS

    # What `fbackprop train digits-mlp --out run` leaves, after no step at all.
    preset = PRESETS["digits-mlp"]
    task = preset.task(0)
    checkpoints = Checkpoints(pathlib.Path("run/checkpoints"))
    checkpoints.save(init_train_state(task.params, make_optimizer("adam", preset.rate(2e-3, 22))), {})
    write_json(pathlib.Path("run/config.json"), {"preset": "digits-mlp", "optimizer": "adam", "lr": 2e-3, "seed": 0,
                                                 "dtype": "float32"})  # fmt: skip
    assert explain("--model", "digits-mlp", "--checkpoint", "run", "--example", 5, "--json", "a.json", "--html", "a.html") == 0
    out = capsys.readouterr().out
    assert "those of run, after 0 steps" in out
    assert main(["explain", "--model", "digits-cnn", "--checkpoint", "run"]) == 2
    assert "run holds a run of digits-mlp, not of digits-cnn." in capsys.readouterr().err
    found = json.loads(pathlib.Path("a.json").read_text())["numbers"]

    # The same by JAX's own derivatives of the definitions.
    source = digits()
    params = checkpoints.params(task.params)
    checkpoints.close()
    x, label = jnp.asarray(source.test_x[5:6]), int(source.test_y[5])

    def loss(params, x):
        return optax.softmax_cross_entropy_with_integer_labels(
            fb.without_rules(task.model)(params, x), jnp.full(1, label)
        ).mean()

    np.testing.assert_allclose(found["logits"], task.model(params, x)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["loss"], loss(params, x), rtol=1e-5)
    gradient = jax.grad(loss, (0, 1))(params, x)
    np.testing.assert_allclose(np.ravel(found["attribution"]["gradient"]), gradient[1][0], rtol=1e-4, atol=1e-7)
    kernel, place = gradient[0]["layers"][0]["kernel"], tuple(found["chain"]["place"])
    np.testing.assert_allclose(found["chain"]["gradient"], kernel[place], rtol=1e-4)
    np.testing.assert_allclose(found["chain"]["total"], kernel[place], rtol=1e-4)
    assert abs(kernel[place]) >= 0.999 * np.abs(kernel).max()
    attributed = found["attribution"]
    assert np.isclose(attributed["pixels"] + attributed["biases"], attributed["score"], rtol=1e-4)
    assert np.isclose(np.sum(attributed["relevance"]), attributed["pixels"], rtol=1e-4, atol=1e-5)
    assert found["after_update"]["loss"] < found["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-mlp", "digits-cnn", "digits-resnet"])
def test_a_model_without_a_run(here, capsys, model):
    assert explain("--model", model, "--json", "a.json", "--html", "a.html", "--lang", "ko") == 0
    assert "방금 짧게" in capsys.readouterr().out
    assert len(json.loads(pathlib.Path("a.json").read_text())["numbers"]["logits"]) == 10
    assert len(pathlib.Path("a.html").read_bytes()) < 2**21


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dtype"), [("digits-cnn", "float32"), ("digits-mlp", "float64"), ("digits-mlp", "bfloat16")])
def test_a_model_that_was_trained(here, capsys, model, dtype):
    assert main(["train", model, "--steps", "3", "--dtype", dtype, "--out", "run"]) == 0
    assert explain("--model", model, "--checkpoint", "run") == 0
    assert "those of run, after 3 steps" in capsys.readouterr().out
