"""Language models: the LSTM, generation, files of tokens, and runs of the command that stop, go on and are drawn from."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

import fbackprop as fb
from fbackprop import data
from fbackprop.cli import main
from fbackprop.data import DataError, Windows
from fbackprop.models import generate, gpt, lstm_lm
from fbackprop.training import command, language, presets
from fbackprop.training.batches import Batches
from fbackprop.training.checkpoints import RunError

TOKENS = jnp.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
LSTM = lstm_lm(7, 4, 2)


def filled(model):
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)


# The LSTM


def test_lstm_lm_is_flax_s_lstm():
    params = filled(LSTM)
    x = params["embed"]["embedding"][TOKENS]
    for p in params["layers"]:
        cells = {}
        for i, gate in enumerate("ifgo"):
            part = slice(4 * i, 4 * i + 4)
            cells[f"i{gate}"] = {"kernel": p["kernel"][:, part]}
            cells[f"h{gate}"] = {"kernel": p["recurrent_kernel"][:, part], "bias": p["bias"][part]}
        x = nn.RNN(nn.LSTMCell(4)).apply({"params": {"cell": cells}}, x)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"][None, None]
    np.testing.assert_allclose(LSTM(params, TOKENS), expected, rtol=1e-5, atol=1e-5)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(expected), TOKENS[..., None], -1)
    np.testing.assert_allclose(LSTM.loss(params, TOKENS, TOKENS), losses.mean(), rtol=1e-5)


def test_lstm_lm_has_the_gradient_of_its_definitions():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), filled(LSTM))
        ours, twin = (jax.jit(jax.grad(f))(params, TOKENS, TOKENS) for f in (LSTM.loss, fb.without_rules(LSTM.loss)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), ours, twin)


def test_lstm_lm_begins_with_open_forget_gates_and_says_what_does_not_fit():
    params, state = LSTM.init(jax.random.key(0), TOKENS)
    assert state == ()
    np.testing.assert_array_equal(params["layers"][0]["bias"], [0] * 4 + [1] * 4 + [0] * 8)
    square = params["layers"][1]["recurrent_kernel"][:, :4]
    np.testing.assert_allclose(square @ square.T, np.eye(4), atol=1e-5)
    with pytest.raises(ValueError, match="lstm_lm: width is 0"):
        lstm_lm(3, 0)
    with pytest.raises(TypeError, match="lstm_lm: tokens are of float32"):
        LSTM(params, TOKENS * 1.0)
    with pytest.raises(ValueError, match=r"tokens has shape \(5,\), expected \[batch, tokens\]"):
        LSTM(params, TOKENS[0])
    with pytest.raises(ValueError, match="params has 1 layers, expected 2"):
        LSTM({**params, "layers": params["layers"][:1]}, TOKENS)


# Generation


@pytest.mark.parametrize("model", [LSTM, gpt(7, 1, 4, 2, 12, modern=True)], ids=["lstm", "gpt"])
def test_greedy_generation_is_the_argmax_of_the_whole_sequence(model):
    params = filled(model)
    tokens = [3, 1]
    found = list(generate(model, params, tokens, 8, temperature=0))
    whole = jax.jit(model)(params, jnp.array([tokens + found]))[0]
    np.testing.assert_array_equal(found, whole.argmax(-1)[1:-1])


def test_generation_goes_on_beyond_the_length_of_the_model():
    model = gpt(7, 1, 4, 2, 6)
    params = filled(model)
    found = [3, 1, *generate(model, params, [3, 1], 11, temperature=0)]
    run_model = jax.jit(model)
    # The cache is full with six; then the last half of them begins it anew.
    for end, start in ((6, 0), (7, 4), (10, 4), (11, 8)):
        seen = found[start:end] if end > 6 else found[:end]
        assert found[end] == int(run_model(params, jnp.array([seen]))[0, -1].argmax()), end
    assert len(list(generate(model, params, [1] * 20, 3))) == 3


def test_draws_follow_the_distribution_the_seed_and_top_k():
    model = lstm_lm(5, 2)
    params = jax.tree.map(jnp.zeros_like, filled(model))
    params["head"]["bias"] = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4, 1e-9]))  # whatever came before
    draws = list(generate(model, params, [0], 2000, seed=1))
    assert draws == list(generate(model, params, [0], 2000, seed=1))
    assert draws[:50] != list(generate(model, params, [0], 50, seed=2))
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 2000, [0.1, 0.2, 0.3, 0.4, 0], atol=0.04)
    assert set(generate(model, params, [0], 200, top_k=2)) == {2, 3}
    cold = np.bincount(list(generate(model, params, [0], 500, temperature=0.5)), minlength=5) / 500
    np.testing.assert_allclose(cold[:4], np.array([1, 4, 9, 16]) / 30, atol=0.07)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "the prompt is empty"),
        ([7], {}, "the prompt holds 7, expected tokens from 0 to 6"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": np.nan}, "temperature is nan"),
        ([1], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_generation_refuses(prompt, options, says):
    with pytest.raises(ValueError, match=says):
        generate(LSTM, {}, prompt, 3, **options)


# Files


def test_windows_stand_for_an_array():
    windows = Windows(np.arange(11, dtype=np.uint16), 3)
    assert windows.shape == (3, 4)
    np.testing.assert_array_equal(windows[np.array([2, 0])], [[6, 7, 8, 9], [0, 1, 2, 3]])
    np.testing.assert_array_equal(windows[1], [3, 4, 5, 6])
    assert windows[:2].dtype == np.int32
    batches = Batches({"tokens": windows}, 3, 2, seed=1, shuffle=True)
    assert batches(0)["tokens"].shape == (2, 4)
    np.testing.assert_array_equal(batches(5)["tokens"], Batches({"tokens": windows}, 3, 2, 1, True)(5)["tokens"])


@pytest.mark.parametrize("name", ["t.bin", "t.uint32.bin", "t.npy", "t.txt"])
def test_files_are_mapped(tmp_path, name):
    dtype = {"t.uint32.bin": np.uint32, "t.txt": np.uint8}.get(name, np.uint16)
    tokens = (np.arange(100) % 50).astype(dtype)
    path = tmp_path / name
    np.save(path, tokens) if name == "t.npy" else tokens.tofile(path)
    found = data.load_tokens(path, 4)
    assert isinstance(found.train.tokens, np.memmap)
    assert found.vocabulary == (256 if found.text else 50)
    assert found.text == (name == "t.txt")
    np.testing.assert_array_equal(np.concatenate([found.train.tokens, found.test.tokens]), tokens)
    assert len(found.test.tokens) == 10
    tokens[70] += 1
    np.save(path, tokens) if name == "t.npy" else tokens.tofile(path)
    assert data.load_tokens(path, 4).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.bin", b"123", "there are 3 bytes; expected a multiple of 2"),
        ("t.uint32.bin", b"12", "expected a multiple of 4"),
        ("t.uint32.bin", b"\xff" * 400, "the token 4294967295 is out of range"),
        ("t.txt", b"abc", "there are 3 bytes; expected at least 10, two windows of 4"),
        ("t.txt", b"", "there are 0 bytes"),
        ("t.npy", b"abc", "not an .npy file"),
        ("missing.txt", None, "there is no such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load_tokens(tmp_path / name, 4)
    message = str(caught.value)
    assert says in message
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message


def test_arrays_that_are_no_tokens(tmp_path):
    np.save(tmp_path / "f.npy", np.ones(50))
    np.save(tmp_path / "n.npy", np.arange(-1, 50))
    with pytest.raises(DataError, match=r"the array is float64 \(50,\); expected integers \[tokens\]"):
        data.load_tokens(tmp_path / "f.npy", 4)
    with pytest.raises(DataError, match="the token -1 is out of range"):
        data.load_tokens(tmp_path / "n.npy", 4)


def test_the_standard_library_is_here():
    found = data.standard_library(64)
    assert len(found.train) > 50_000
    assert 0.03 < len(found.test) / len(found.train) < 0.3
    assert b"def " in found.train.tokens[:100_000].tobytes()


# The command


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A text of the user's, and models that are trained in a moment."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"{i} and {i + 1} make {2 * i + 1}\n" for i in range(300))
    pathlib.Path("sums.txt").write_text(text)
    monkeypatch.setattr(language, "_LENGTH", 16)
    monkeypatch.setattr(language, "_PROMPTS", ("1 and ",))
    monkeypatch.setattr(language, "_SAMPLE", 20)
    monkeypatch.setattr(
        command, "_check", lambda task, config: {}
    )  # it takes longer than all the rest, and is tested elsewhere
    monkeypatch.setattr(language, "_GPT", {"layers": 1, "width": 16, "heads": 2, "length": 16, "modern": True})
    settings = {"jax_compilation_cache_dir": str(tmp_path / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)  # what a second run compiles, the first one has
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(*arguments):
    return main([str(a) for a in arguments])


def state(directory):
    import orbax.checkpoint as ocp

    folder = pathlib.Path(directory).absolute() / "checkpoints"
    newest = max(int(p.name) for p in folder.iterdir())
    with ocp.StandardCheckpointer() as reader:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(reader.restore(folder / str(newest) / "state"))]


@pytest.mark.slow
def test_a_run_on_text_is_resumed_bit_for_bit_and_drawn_from(small, capsys):
    assert run("train", "sums.txt", "--steps", 30, "--out", "whole") == 0
    printed = capsys.readouterr()
    assert "nats a byte" in printed.out
    assert "tokens/s" in printed.err
    assert "grad norm" in printed.err
    assert "GiB" in printed.err
    assert run("train", "sums.txt", "--steps", 11, "--out", "parts") == 0
    assert run("train", "sums.txt", "--steps", 30, "--out", "parts", "--resume") == 0
    one, two = state("whole"), state("parts")
    assert len(one) == len(two)
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert pathlib.Path("whole/samples.txt").read_bytes() == pathlib.Path("parts/samples.txt").read_bytes()
    metrics = json.loads(pathlib.Path("whole/metrics.json").read_text())
    assert metrics["loss"] < 5
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 1e8

    capsys.readouterr()
    texts = []
    for options in ((), (), ("--seed", 1, "--top-k", 30)):
        assert run("generate", "whole", "--prompt", "1 and 2", "--tokens", 40, *options) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("1 and 2") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    pathlib.Path("sums.txt").write_text("other " * 2000)
    assert run("train", "sums.txt", "--steps", 40, "--out", "whole", "--resume") == 2
    assert "the data are not those that the run began with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_tokens(small, capsys):
    np.tile(np.arange(40, dtype=np.uint16), 60).tofile("count.bin")
    assert run("train", "count.bin", "--steps", 3, "--batch", 4) == 0
    assert "nats a token" in capsys.readouterr().out
    assert not pathlib.Path("runs/count-1/samples.txt").exists()
    assert run("generate", "runs/count-1", "--prompt", "3 4 5", "--tokens", 6) == 0
    numbers = capsys.readouterr().out.split()
    assert numbers[:3] == ["3", "4", "5"]
    assert len(numbers) == 9
    assert all(0 <= int(n) < 40 for n in numbers)
    assert run("generate", "runs/count-1", "--prompt", "3 x") == 2
    assert "--prompt holds 'x'; expected tokens from 0 to 39" in capsys.readouterr().err


def test_generate_refuses_what_is_no_run_of_a_language_model(small, capsys):
    assert run("train", "and-gate", "--steps", 2, "--out", "gate") == 0
    pathlib.Path("empty").mkdir()
    pathlib.Path("odd").mkdir()
    options = {"vocabulary": 9, "layers": 1, "width": 8, "heads": 2, "length": 9, "layer": 3}
    pathlib.Path("odd/config.json").write_text(json.dumps({"recipe": {"model": "gpt", "options": options}}))
    capsys.readouterr()
    for directory, says in (
        ("nowhere", "there is no such folder"),
        ("empty", "holds no run"),
        ("gate", "a run of and-gate, which is no language model"),
        ("odd", "the recipe of the model cannot be followed (gpt: there is no option 'layer'"),
    ):
        assert run("generate", directory) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        run("generate", "gate", "--temperature", "-1")
    assert stop.value.code == 2
    assert "expected a number from 0, got '-1'" in capsys.readouterr().err


def test_presets_are_there():
    assert {"stdlib-gpt", "stdlib-lstm", "digits-resnet"} <= set(presets.PRESETS)


@pytest.mark.slow
def test_stdlib_lstm_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "stdlib-lstm", "--steps", 100, "--out", "run") == 0
    assert json.loads(pathlib.Path("run/metrics.json").read_text())["test_loss"] < 2.7


@pytest.mark.slow
def test_stdlib_gpt_learns_in_three_hundred_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "stdlib-gpt", "--steps", 300, "--out", "run") == 0
    metrics = json.loads(pathlib.Path("run/metrics.json").read_text())
    assert metrics["test_loss"] < 1.9  # measured: 1.61
    assert metrics["gradient_check_max_error_float64"] < 1e-9
    assert metrics["evaluations"][0]["test_loss"] < 5
    text = pathlib.Path("run/samples.txt").read_text()
    assert sum(text.count(word) for word in ("self", "def ", "return", "import", "    ")) > 20


@pytest.mark.slow
def test_digits_resnet_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "digits-resnet", "--out", "run") == 0
    assert json.loads(pathlib.Path("run/metrics.json").read_text())["test_accuracy"] > 0.98


@pytest.mark.slow
def test_the_size_of_a_model_is_an_option_and_part_of_the_run(small, capsys):
    size = ("--layers", 2, "--width", 24, "--heads", 3, "--length", 12)
    assert run("train", "sums.txt", "--steps", 2, "--batch", 4, "--out", "own", *size) == 0
    config = json.loads(pathlib.Path("own/config.json").read_text())
    assert config["size"] == {"layers": 2, "width": 24, "heads": 3, "length": 12}
    assert {name: config["recipe"]["options"][name] for name in config["size"]} == config["size"]
    assert config["lr"] == pytest.approx(4e-3 * 16 / 24)  # the preset here is 16 wide
    assert run("train", "sums.txt", "--steps", 3, "--out", "own", "--resume") == 0
    assert json.loads(pathlib.Path("own/metrics.json").read_text())["steps"] == 3
    assert run("generate", "own", "--prompt", "1 and", "--tokens", 3) == 0


def test_a_run_is_resumed_with_the_size_it_began_with(tmp_path):
    preset = presets.file_preset("book.txt")
    (tmp_path / "config.json").write_text(json.dumps({"size": {"layers": 4, "width": 512}}))
    resumed, size = command._sized(preset, command.Options("book.txt", layers=4), tmp_path)
    assert size == {"layers": 4, "width": 512}
    assert resumed.lr == preset.lr / 2
    with pytest.raises(RunError, match=r"cannot be resumed with --layers 3: the run began with 4\."):
        command._sized(preset, command.Options("book.txt", layers=3), tmp_path)
    with pytest.raises(RunError, match=r"with --heads 8: the run began with the preset's\."):
        command._sized(preset, command.Options("book.txt", heads=8), tmp_path)
    assert command._sized(preset, command.Options("book.txt"), None) == (preset, {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("sums.txt", "--width", 30, "--heads", 4),
            "no model of this size: GPT: width 30 does not divide into 4 heads.",
        ),
        (("sums.txt", "--width", 6), "rope turns pairs of features"),
        (("sums.txt", "--model", "gpt3"), "there is no language model 'gpt3'; known are gpt2-124m, "),
        (("stdlib-lstm", "--heads", 2), "--heads is for a GPT; this preset trains an LSTM."),
        (("digits-cnn", "--layers", 2), "--layers is for language models; digits-cnn trains none."),
        (("sums.txt", "--length", 4000), "sums.txt: "),
        (
            ("many.bin", "--model", "llama-1b", "--layers", 1),
            "tokens go up to 200000; the model has a vocabulary of 128256.",
        ),
    ],
)
def test_sizes_that_do_not_fit(small, capsys, arguments, says):
    np.append(np.arange(4000, dtype="<u4"), np.uint32(200000)).tofile("many.uint32.bin")
    given = [a.replace("many.bin", "many.uint32.bin") if isinstance(a, str) else a for a in arguments]
    assert run("train", *given, "--out", "no") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not pathlib.Path("no").exists()


def test_a_model_with_a_name_takes_its_form_and_its_windows():
    preset = presets.file_preset("book.bin")
    assert preset.sized is not None
    named = language._options("gpt", {"model": "gpt2-124m", "layers": 1})
    assert (named["layers"], named["width"], named["length"], named["vocabulary"]) == (1, 768, 1024, 50257)
    assert preset.sized({"model": "gpt2-124m"}).lr == pytest.approx(preset.lr / 3)
    llama = language._recipe("gpt", language._options("gpt", {"model": "llama-1b", "layers": 1}), text=False)
    again = language.from_recipe(json.loads(json.dumps(llama)))  # as a run's folder holds it
    assert again.rope_scaling == (32.0, 1.0, 4.0, 8192)
    assert llama == json.loads(json.dumps(llama))
    assert hash(again)
