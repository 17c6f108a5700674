"""The benchmark: what it counts, whom it measures against, the file that it writes, and a sentence for every refusal."""

import importlib.util
import json
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.cli import main
from fbackprop.measuring import command, interleave, ratio, rows, scaling
from fbackprop.measuring.flops import matmul_flops
from fbackprop.measuring.problems import errors_of, problem, problem_of, truth_of
from fbackprop.measuring.programs import Compiler
from fbackprop.measuring.pytorch import PORTS, torch_of
from fbackprop.measuring.rivals import Absent, rival
from fbackprop.rules import RULES
from fbackprop.samples import sample

KEYS = {
    "op", "workload", "setting", "against", "time_ratio", "time_ratio_low", "time_ratio_high", "residual_bytes",
    "residual_bytes_against", "residual_bytes_minimum", "temp_bytes", "temp_bytes_against", "error", "error_against",
    "recomputes",
}  # fmt: skip

SIGMOID = ("ops", "sigmoid", "--shape", "8,16", "--rounds", "2", "--against", "jax.grad")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(*arguments):
    return main(["bench", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    """The one sentence of a refused command, which leaves no file."""
    capsys.readouterr()
    try:
        code = bench(*arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("fbackprop: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    assert not [path for path in pathlib.Path(".").iterdir() if path.suffix in (".json", ".png")]
    return error


def dense_problem(note=""):
    key = jax.random.key(0)
    return problem(RULES["dense"], [jax.random.normal(key, (4, 6)), jax.random.normal(key, (6, 3)), jnp.ones(3)], {}, note)


# What is counted


def test_matmul_flops_follow_the_program():
    x, w = jnp.ones((4, 6)), jnp.ones((6, 6))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]

    def branching(x):
        return jax.lax.cond(True, lambda x: x @ w @ w, lambda x: x @ w, x)

    one = 2 * 4 * 6 * 6
    for fn, products in ((lambda x: x @ w, 1), (scanned, 5), (branching, 2), (jax.checkpoint(jax.jit(lambda x: x @ w)), 1)):
        assert matmul_flops(jax.make_jaxpr(fn)(x)) == products * one
    images, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    traced = jax.make_jaxpr(lambda x: fb.without_rules(fb.conv)(x, kernel, feature_group_count=2))(images)
    assert matmul_flops(traced) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 2)


def test_a_checkpoint_runs_its_matmuls_again():
    given = problem(RULES["gelu"], [jnp.ones((4, 4))], {})
    compiler = Compiler(given)
    plain = compiler.look(lambda a: jax.nn.gelu(a["x"] @ a["x"]))
    again = compiler.look(lambda a: jax.checkpoint(lambda x: jax.nn.gelu(x @ x))(a["x"]))
    assert (plain.matmul_flops, again.matmul_flops) == (3 * 2 * 4**3, 4 * 2 * 4**3)
    assert again.residual_bytes == 4 * 4 * 4 < plain.residual_bytes


def test_the_truth_is_float64_and_the_error_relative_to_the_largest_element():
    given = dense_problem()
    truth = truth_of(given)
    x, kernel, dy = (np.asarray(a, np.float64) for a in (*given.moved[:2], given.dy[0]))
    for got, want in zip(truth, (dy @ kernel.T, x.T @ dy, dy.sum(0))):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-13)
    wrong = [np.asarray(t) for t in truth]
    wrong[1] = wrong[1] + 0.25 * np.abs(wrong[1]).max()
    assert errors_of(wrong, truth) == pytest.approx(0.25)
    assert math.isnan(errors_of([t * np.nan for t in wrong], truth))
    assert truth_of(problem(RULES["step_ste"], [jnp.ones(3)], {})) is None


def test_a_note_freezes_an_argument_and_the_text_spells_the_call():
    given, frozen = dense_problem(), dense_problem("two layers, kernel frozen")
    assert given.text == "float32 x [4, 6], kernel [6, 3], bias [3]"
    assert frozen.text == given.text + "; two layers, kernel frozen"
    assert (given.named(), frozen.named()) == (["x", "kernel", "bias"], ["x", "bias"])
    softmax = problem(RULES["softmax"], [jnp.ones((2, 3), jnp.bfloat16)], {"axis": 0})
    assert softmax.text == "bfloat16 x [2, 3]; axis=0"
    with pytest.raises(ValueError, match="dense: weight is frozen, says the note"):
        dense_problem("weight frozen")


def test_the_cotangent_is_normal_and_one_for_a_scalar():
    assert problem(RULES["half_square"], [jnp.ones(3), jnp.zeros(3)], {}).dy == (1.0,)
    trained = problem(RULES["batch_norm"], [jnp.ones((5, 3)), *[jnp.ones(3)] * 4], {"train": True})
    assert [bool(jnp.any(d)) for d in trained.dy] == [True, False, False]  # running averages are state


def test_the_rival_of_a_straight_through_rule_passes_the_cotangent_too():
    given = problem(RULES["sign_ste"], [jnp.array([-2.0, 0.0, 3.0])], {})
    found = jax.vjp(lambda *moved: given.outputs(rival("jax.grad", given).call, moved, given.rest), *given.moved)[1](given.dy)
    np.testing.assert_array_equal(found[0], given.dy[0])


def test_fewer_turns_where_time_is_short_but_not_too_few():
    calls = [lambda: sum(range(20000))] * 2
    assert [len(interleave(calls, 30, budget=b, seconds=1e-4)[0]) for b in (1e-6, 60.0)] == [6, 30]
    assert ratio(range(2, 8), [1.0] * 6)[1:] == (2, 7)  # six turns: from the least to the greatest


# Rivals


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("gelu", [jnp.ones(3)], "jax.nn.gelu"),
        ("softmax_cross_entropy_with_integer_labels", [jnp.ones((2, 3)), jnp.array([0, 2])], "optax.losses."),
        ("layer_norm", [jnp.ones((2, 3))], "the definition"),
        ("max_pool", [jnp.ones((1, 4, 4, 1)), (2, 2)], "flax.linen.max_pool"),
        ("step_ste", [jnp.array([-1.0, 0.0, 2.0])], "stop_gradient"),
    ],
)
def test_rivals_are_what_a_user_would_call(name, args, expected):
    if "flax" in expected:
        pytest.importorskip("flax.linen")
    given = problem(RULES[name], args, {})
    assert rival("jax.grad", given).name.startswith(expected)
    assert rival("dots_saveable", given).name.startswith(f"jax.checkpoint({expected}")
    outputs = given.outputs(rival("checkpoint", given).call, given.moved, given.rest)
    np.testing.assert_allclose(outputs[0], given.outputs(lambda a: RULES[name].op(**a), given.moved, given.rest)[0], rtol=1e-6)


def test_a_rival_that_cannot_take_the_call_is_not_asked():
    given = problem(RULES["layer_norm"], [jnp.ones((2, 3))], {})
    with pytest.raises(Absent, match=r"^$"):
        rival("jax-cce", given)
    if "linear_cross_entropy" in RULES:
        capped = problem(
            RULES["linear_cross_entropy"], [jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.array([0, 1])], {"soft_cap": 5.0}
        )
        with pytest.raises(Absent, match=r"does not import here|has no soft_cap"):
            rival("jax-cce", capped)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("name", sorted(set(PORTS) & set(RULES)))
def test_ports_to_pytorch_compute_the_same(name):
    for small in RULES[name].samples:
        given = problem_of(RULES[name], small)
        try:
            port = torch_of(given)
        except Absent:
            continue
        if port.comparable:
            assert errors_of(port.gradients(port.run()), truth_of(given)) < 3e-5
            return


def test_without_pytorch_it_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    measured = rows.measure(problem(RULES["relu"], [jnp.ones((2, 3))], {}), rows.Plan(against=("torch",), rounds=2))
    assert measured == ([], ["relu: torch does not import here (ModuleNotFoundError)"])


# The command


def test_bench_ops_writes_a_row_for_each_rival_and_setting(here, capsys):
    chosen = "jax.grad,checkpoint,dots_saveable"
    assert bench("ops", "gelu", "--shape", "64,32:bfloat16", "--rounds", 3, "--against", chosen, "--json", "b.json") == 0
    found = json.loads(pathlib.Path("b.json").read_text())
    assert set(found) == {"device", "versions", "rows"}
    assert found["versions"]["jax"] == jax.__version__
    assert {(row["against"], row["setting"]) for row in found["rows"]} == {
        (against, setting) for against in chosen.split(",") for setting in ("fused", "stored")
    }
    for row in found["rows"]:
        assert set(row) >= KEYS
        assert (row["op"], row["workload"], row["residual_bytes"]) == ("gelu", "bfloat16 x [64, 32]", 64 * 32 * 2)
        assert 0 < row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
        assert row["error"] < 0.01
        assert row["rounds"] == 3
    by = {(row["against"], row["setting"]): row for row in found["rows"]}
    assert by["jax.grad", "fused"]["rival"] == "jax.nn.gelu"
    assert by["jax.grad", "fused"]["residual_bytes_against"] > 3 * 64 * 32 * 2
    assert by["dots_saveable", "stored"]["note"].startswith("the same program as ")  # there are no dots: timed once
    assert by["dots_saveable", "stored"]["time_ratio"] == by["checkpoint", "stored"]["time_ratio"]
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for word in ("gelu  bfloat16 x [64, 32]", "jax.grad", "dots_saveable", "geometric means", "each rival, fused/stored"):
        assert word in out


def test_a_factory_and_a_setting(here, capsys):
    pathlib.Path("mine.py").write_text(
        "import jax.numpy as jnp\n"
        "def small(seed):\n    return {'args': (jnp.ones((4, 6)),), 'static': {'axis': 0}, 'note': f'seed {seed}'}\n"
        "def empty():\n    return 3\n"
    )
    more = ("--against", "jax.grad", "--rounds", 2)
    assert bench("ops", "softmax", "--workload", "mine.py::small", "--settings", "stored", *more, "--json", "b.json") == 0
    (row,) = json.loads(pathlib.Path("b.json").read_text())["rows"]
    assert (row["setting"], row["workload"]) == ("stored", "float32 x [4, 6]; seed 0")
    pathlib.Path("b.json").unlink()
    error = refusal(capsys, "ops", "softmax", "--workload", "mine.py::empty")
    assert "returned a int; expected a tuple of arguments" in error


def test_rows_are_kept_when_it_is_interrupted(here, monkeypatch, capsys):
    measure, calls = command.measure, []

    def stop_at_the_second(given, plan):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(given, plan)

    pathlib.Path("mine.py").write_text("import jax.numpy as jnp\ndef one():\n    return (jnp.ones(5),)\n")
    monkeypatch.setattr(command, "measure", stop_at_the_second)
    assert bench(*SIGMOID, "--workload", "mine.py::one", "--json", "b.json") == 130
    assert len(json.loads(pathlib.Path("b.json").read_text())["rows"]) == 2
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []  # nothing half-written
    assert capsys.readouterr().err.endswith("fbackprop: interrupted.\n")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_of_the_ops(here, suffix):
    assert bench(*SIGMOID, "--plot", f"b.{suffix}") == 0
    content = pathlib.Path(f"b.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


REFUSED = [
    (("ops", "gelo"), r"there is no op 'gelo' \(did you mean gelu"),
    (("ops", "relu", "gelu", "--shape", "4"), "a workload of your own is for one op; 2 are named"),
    (("ops", "--against", "jaxgrad"), r"there is no rival 'jaxgrad' \(did you mean jax.grad"),
    (("ops", "--settings", "fast"), "there is no setting 'fast'"),
    (("ops", "relu", "--note", "x frozen"), "there is no --shape"),
    (("ops", "relu", "--shape", "4", "--note", "x frozen"), "nothing to differentiate"),
    (("ops", "dense", "--shape", "4,6", "--shape", "5,3"), r"dense: x has 6 features, kernel expects 5"),
    (("ops", "relu", "--workload", "there.py::f"), "there is no such file"),
    (("ops", "relu", "--workload", "there"), "--workload takes FILE.py::NAME"),
    (("ops", "relu", "--plot", "b.pdf"), r"expected a name that ends in .png or .svg"),
    (("ops", "relu", "--json", "no/b.json"), "the folder no does not exist"),
    (("ops", "relu", "--shape", "4", "--against", "jax-cce"), "nothing was measured"),
    (("scaling", "width"), "there is no sweep 'width'"),
    ((), "the following arguments are required: WHAT"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a)[:40] or "nothing" for a, _ in REFUSED])
def test_what_is_refused_gets_a_sentence(here, capsys, arguments, sentence):
    assert re.search(sentence, refusal(capsys, *arguments))


# Scaling


@pytest.fixture
def tiny(monkeypatch):
    """A sweep of an op that is always there."""
    sweep = scaling.Sweep("width", "gelu", (4, 8, 16), lambda size: sample(fb.samples.normal(4, size)))
    monkeypatch.setattr(scaling, "SWEEPS", {"width": sweep})


def test_scaling_writes_every_contender_at_every_size(here, tiny, capsys):
    assert bench("scaling", "--most", 8, "--rounds", 2, "--json", "s.json", "--plot", "s.png") == 0
    found = json.loads(pathlib.Path("s.json").read_text())
    assert set(found) == {"device", "versions", "rows"}
    assert [row["size"] for row in found["rows"]] == [4] * 5 + [8] * 5
    assert {row["residual_bytes"] for row in found["rows"] if row["against"] == "ours"} == {64, 128}
    (curve,) = scaling.curves(found["rows"])
    assert [point["sides"]["best"]["residual_bytes"] for point in curve["points"]] == [64, 128]
    assert pathlib.Path("s.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "width  gelu" in out
    assert max(map(len, out.splitlines())) <= 100


def test_what_needs_too_much_memory_is_counted_and_not_run(tiny, monkeypatch):
    monkeypatch.setattr(Compiler, "look", lambda self, call: rows.Traced(1, 10, 0))
    points = scaling.measure(scaling.SWEEPS["width"], 4, scaling.Plan(rounds=2, memory=9))
    assert {(p["temp_bytes"], p["milliseconds"], p["time_ratio"]) for p in points} == {(10, None, None)}


@pytest.mark.parametrize("axis", list(scaling.SWEEPS))
def test_the_sweeps_start_small_enough_and_their_ops_take_them(axis):
    sweep = scaling.SWEEPS[axis]
    if sweep.op not in RULES:
        pytest.skip(f"there is no op {sweep.op} yet")
    workload = sweep.workload(sweep.all_sizes[0])
    given = jax.eval_shape(lambda: problem_of(RULES[sweep.op], workload).moved)
    assert given
