"""``fbackprop check``: what it finds, what it writes, and a sentence for everything that it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop
from fbackprop import options
from fbackprop.checking import DEPTHS, Report, command
from fbackprop.cli import main
from fbackprop.rules import RULES

MINE = """
import jax
import jax.numpy as jnp
from helper import two


def custom(fun, backward):
    made = jax.custom_vjp(fun)
    made.defvjp(lambda x: (fun(x), x), backward)
    return made


right = custom(jnp.sin, lambda x, dy: (dy * jnp.cos(x),))
wrong = custom(jnp.sin, lambda x, dy: (dy * jnp.cos(x) * 1.5,))
infinite = custom(jnp.sin, lambda x, dy: (dy * jnp.cos(x) + jnp.inf,))


def raises(x, dy):
    raise RuntimeError("there is no backward\\nat all")


raising = custom(jnp.sin, raises)


def inside(x):
    return raising(x) * 2


def times(x, *, power):
    if power == 0:
        raise ValueError("no power of 0. Please.")
    return x**power


def twice(x):
    return two * x


def thrice(x):
    return 3 * x


def dense(x, w):
    return x @ w


class Loss:
    @staticmethod
    def nll(logits, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def branch(x):
    return x if x.sum() > 0 else -x


def callback(x):
    return jax.pure_callback(lambda v: v, x, x)


lost = custom(callback, raises)


def signs(x):
    return x > 0


def make():
    return jnp.ones((2, 3)), jnp.ones((3, 2))


def seeded(seed):
    return {"args": [jnp.full(seed + 1, 0.5)], "static": {"power": 2}}


def other_reference():
    return {"args": (jnp.ones(3),), "reference": thrice}


def meant():
    return {"args": (jnp.ones(3),), "reference": thrice, "exact": False}


def broken():
    raise KeyError("nothing")


def unknown():
    return {"args": (), "axis": 1}


def single():
    return jnp.ones(3)


number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    pathlib.Path("mine.py").write_text(MINE)
    pathlib.Path("helper.py").write_text("two = 2.0\n")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The checker replaced by a record of what it was asked."""
    made = []

    def compare(fn, *args, **options):
        made.append((fn, args, options))
        return Report(fn.__name__, "nothing", (), (), tuple(options["checks"]))

    monkeypatch.setattr(command, "compare", compare)
    return made


def check(*arguments):
    return main(["check", *map(str, arguments)])


def record(*arguments):
    """The exit code and the document."""
    code = check(*arguments, "--json", "found.json")
    return code, json.loads(pathlib.Path("found.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def state():
    files = {path: path.read_bytes() for path in pathlib.Path(".").rglob("*") if path.is_file()}
    return files, list(sys.path), dict(RULES), jax.config.jax_enable_x64, set(sys.modules) & {"mine", "helper"}


def refusal(capsys, *arguments) -> str:
    """The one sentence of a refused command, which prints nothing else and leaves everything as it was."""
    pathlib.Path("old.json").write_text("old")
    before = state()
    capsys.readouterr()
    try:
        code = check(*arguments, "--json", "old.json")
    except SystemExit as stop:  # argparse
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("fbackprop: ")
    assert printed.err.endswith(".\n")
    assert printed.err.count("\n") == 1
    assert state() == before
    return printed.err


# What is found


def test_an_op_on_the_samples_of_its_rule(here, capsys):
    code, document = record("tanh", "--checks", "cotangents,finite-differences", "--dtype", "bfloat16")
    printed = capsys.readouterr()
    samples = RULES["tanh"].samples
    assert code == 0
    assert printed.err == ""  # no progress where stderr is no terminal
    lines = printed.out.splitlines()
    assert [line.partition("  worst ")[0] for line in lines[:-1]] == [f"ok tanh ({sample})" for sample in samples]
    assert all(" ulps, jax.grad's " in line for line in lines[:-1])
    assert lines[-1] == f"{len(samples)} checked, {len(samples)} ok, 0 with findings"
    assert {error["dtype"] for report in document["reports"] for error in report["errors"]} == {"bfloat16"}
    assert {tuple(report["checks"]) for report in document["reports"]} == {("cotangents", "finite differences")}


def test_a_wrong_function_and_the_document(here, capsys):
    code, document = record("mine.py::right", "mine.py::wrong", "--shape", "3,4", "--seed", 5)
    printed = capsys.readouterr().out
    assert code == 1
    assert "ok right (3×4)  worst " in printed
    assert "wrong wrong (3×4)\n  check of " in printed
    assert "[cotangents] x: the cotangent is " in printed
    assert "Every element is 1.5 times the truth" in printed
    assert printed.endswith("2 checked, 1 ok, 1 with findings\n")
    versions = {"fbackprop": fbackprop.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}
    assert document["versions"] == versions
    assert document["device"].startswith(jax.devices()[0].platform)
    assert document["dtype"] == "float32"
    fine, bad = document["reports"]
    assert (fine["target"], fine["call"], fine["seed"], fine["ok"]) == ("mine.py::right", "right (3×4)", 5, True)
    assert fine["findings"] == []
    assert fine["reference"] == "its undecorated function"
    assert fine["seconds"] > 0
    assert fine["errors"][0]["where"] == "x"
    assert fine["errors"][0]["shape"] == [3, 4]
    assert 0 < fine["errors"][0]["ulps"] < 4
    assert bad["ok"] is False
    finding = next(f for f in bad["findings"] if f["check"] == "cotangents")
    assert finding["where"] == "x"
    assert finding["numbers"]["ours"] == pytest.approx(1.5 * finding["numbers"]["truth"], rel=1e-5)
    assert len(finding["index"]) == 2
    assert finding["message"] in printed


def test_numbers_that_json_lacks_are_null(here):
    code, document = record("mine.py::infinite", "--shape", 3)
    assert code == 1
    numbers = [n for finding in document["reports"][0]["findings"] for n in finding["numbers"].values()]
    assert None in [*numbers, *document["reports"][0]["errors"][0].values()]


@pytest.mark.parametrize(("name", "called"), [("raising", "sin"), ("inside", "inside"), ("lost", "callback")])
def test_a_backward_that_raises_is_a_finding(here, capsys, name, called):
    assert check(f"mine.py::{name}", "--shape", 3) == 1
    assert f"[runs] {called}: it could not be differentiated: RuntimeError: there is no backward" in capsys.readouterr().out


def test_reference(here, capsys):
    assert check("mine.py::twice", "--shape", 3, "--reference", "thrice", "--checks", "cotangents") == 1
    assert "against the given thrice" in capsys.readouterr().out
    assert check("mine.py::twice", "--shape", 3, "--reference", "twice", "--checks", "cotangents") == 0
    # What is meant to differ is not compared.
    arguments = ["mine.py::twice", "--shape", 3, "--reference", "thrice", "--checks", "cotangents", "--verbose", "--inexact"]
    assert check(*arguments) == 0
    assert "note: its backward is declared inexact" in capsys.readouterr().out


def test_tables_of_what_is_right(here, capsys):
    assert check("mine.py::right", "--shape", 3, "--checks", "cotangents") == 0
    assert "cotangent of" not in capsys.readouterr().out
    assert check("mine.py::right", "--shape", 3, "--checks", "cotangents", "-v") == 0
    assert "cotangent of" in capsys.readouterr().out


# What is asked of the checker


def test_all_ops_on_all_samples(here, calls, monkeypatch, capsys):
    asked = []

    def made(rule, sample, dtype, seed):
        asked.append((rule, sample, dtype, seed))
        return rule.op, (), {"static": {}}

    monkeypatch.setattr(command, "_of_sample", made)
    assert check("--all", "--seeds", 2, "--seed", 3, "tanh", "--dtype", "float16") == 0
    own = [rule for rule in RULES.values() if rule.reference.__module__.startswith("fbackprop.")]
    samples = [(rule, sample) for rule in [*own, RULES["tanh"]] for sample in rule.samples]
    assert asked == [(rule, sample, "float16", seed) for rule, sample in samples for seed in (3, 4)]
    assert [(fn, options["seed"]) for fn, _, options in calls] == [(rule.op, seed) for rule, _, _, seed in asked]
    assert f"{2 * len(samples)} checked" in capsys.readouterr().out


def test_a_sample_by_name(here, calls):
    assert check("layer_norm", "--seeds", 2) == 0
    fn, args, options = calls[0]
    assert (fn, args, options["checks"]) == (fbackprop.layer_norm, (), DEPTHS["quick"])
    assert set(options["keywords"]) == set(fn.rule.arguments)
    assert set(options["static"]) == set(fn.rule.static)
    expected = fn.rule.samples[0].make(1, "float32")[0][0]
    np.testing.assert_array_equal(calls[1][2]["keywords"]["x"], expected)
    assert not np.array_equal(options["keywords"]["x"], expected)


def test_full_and_float64(here, calls, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    assert check("tanh", "--dtype", "float64") == 0
    assert os.environ["XLA_FLAGS"] == "--mine"
    assert {options["keywords"]["x"].dtype for _, _, options in calls} == {jnp.dtype("float64")}
    assert not jax.config.jax_enable_x64
    assert check("tanh", "--full") == 0
    assert os.environ["XLA_FLAGS"] == "--mine --xla_force_host_platform_device_count=8"
    assert calls[-1][2]["checks"] == DEPTHS["full"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert check("tanh", "--full", "--checks", "low-precision") == 0
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3"
    assert calls[-1][2]["checks"] == ("low precision",)


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "low", "high"),
    [
        ("4,8", (4, 8), "float32", -9, 9),
        (" 4, 8 ", (4, 8), "float32", -9, 9),
        ("()", (), "float32", -9, 9),
        ("scalar", (), "float32", -9, 9),
        ("scalar:float16", (), "float16", -9, 9),
        ("4,0:bfloat16", (4, 0), "bfloat16", -9, 9),
        ("99:positive", (99,), "float32", 0.5, 1.5),
        ("99:bfloat16:positive", (99,), "bfloat16", 0.5, 1.5),
        ("99:int32<10", (99,), "int32", 0, 9),
        ("2,99:uint8<255", (2, 99), "uint8", 0, 254),
        ("99:bool", (99,), "bool", 0, 1),
    ],
)
def test_shapes(text, shape, dtype, low, high):
    spec, named = options.array(text)
    _, (array,), _ = command._of_specs(print, [(spec, named)], "float32", {}, 0)
    assert array.shape == shape
    assert array.dtype == dtype
    values = np.asarray(array, np.float64)
    assert ((values >= low) & (values <= high)).all()
    if values.size > 90:  # drawn, and over the whole range
        assert len(np.unique(values)) == 2 if dtype == "bool" else len(np.unique(values)) > 9
        assert values.max() > 0.6 * high


def test_a_key_for_each_seed():
    keys = [command._of_specs(print, [options.array("key"), options.array("key")], "float32", {}, seed)[1] for seed in (0, 1)]
    data = [tuple(jax.random.key_data(key).tolist()) for pair in keys for key in pair]
    assert len(set(data)) == 4
    assert jnp.issubdtype(keys[0][0].dtype, jax.dtypes.prng_key)


def test_arrays_of_a_call(here, calls):
    shapes = ["--shape", "3,4", "--shape", "3:int32<4"]
    code, document = record("mine.py::Loss.nll", *shapes, "--seeds", 2, "--dtype", "bfloat16")
    assert code == 0
    assert document["reports"][1]["call"] == "Loss.nll (3×4 bfloat16, 3 int32)  seed 1"
    (_, (logits, labels), options), (_, (others, _), _) = calls
    assert (logits.dtype, labels.dtype) == (jnp.bfloat16, jnp.int32)
    assert not np.array_equal(logits, others)
    assert options["static"] == {}
    assert "reference" not in options


def test_static(here, calls):
    assert check("mine.py::times", "--shape", "scalar", "--static", "power=-1", "--static", "power=(2, 'a')") == 2
    assert check("mine.py::times", "--shape", "scalar", "--static", "power=-1") == 0
    assert calls[0][2]["static"] == {"power": -1}


def test_an_op_at_a_shape_of_ones_own(here, calls):
    assert check("softmax", "--shape", "3,5", "--static", "axis=0") == 0
    ((fn, (x,), options),) = calls
    assert (fn, x.shape, options["static"]) == (fbackprop.softmax, (3, 5), {"axis": 0})


def test_factories(here, calls, capsys):
    assert check("mine.py::dense", "--args", "make") == 0
    assert [a.shape for a in calls[-1][1]] == [(2, 3), (3, 2)]
    assert check("mine.py::times", "--args", "seeded", "--seeds", 2) == 0
    assert [(args[0].shape, options["static"]) for _, args, options in calls[-2:]] == [((n,), {"power": 2}) for n in (1, 2)]
    assert "ok times (1, power=2)  seed 0\nok times (2, power=2)  seed 1\n" in capsys.readouterr().out
    assert check("mine.py::times", "--args", "seeded", "--static", "power=3") == 0  # the command line goes first
    assert calls[-1][2]["static"] == {"power": 3}
    assert check("mine.py::twice", "--args", "other_reference") == 0
    assert calls[-1][2]["reference"].__name__ == "thrice"
    assert check("mine.py::twice", "--args", "meant", "--reference", "twice") == 0
    assert calls[-1][2]["reference"].__name__ == "twice"
    assert calls[-1][2]["exact"] is False


# Other people's files


def test_a_file_changes_nothing_beside_it(here, calls, capsys):
    pathlib.Path("wide.py").write_text(
        "import jax, jax.numpy as jnp\nimport helper\njax.config.update('jax_enable_x64', True)\nprint('imported')\n"
        "def f(x):\n    assert jax.config.jax_enable_x64\n"
        "    import helper as again\n    assert again is helper\n    return x\n"
        "def make():\n    return (jnp.ones(3),)\n"
    )
    pathlib.Path("other").mkdir()
    pathlib.Path("other/helper.py").write_text("two = 22.0\n")
    pathlib.Path("other/jax.py").write_text("from helper import two\nimport jax.numpy\ndef f(x):\n    return two * x\n")
    before = state()
    code = check("wide.py::f", "other/jax.py::f", "mine.py::twice", "--shape", 3)
    assert code == 0
    assert capsys.readouterr().out.startswith("imported\nok f (3)\n")
    assert state() == before
    assert [float(fn(jnp.float32(1))) for fn, _, _ in calls[1:]] == [22, 2]
    assert check("wide.py::f", "--args", "make") == 0
    assert calls[-1][1][0].dtype == jnp.float64


def test_packages_modules_and_rules_of_ones_own(here, calls):
    pathlib.Path("pack").mkdir()
    pathlib.Path("pack/__init__.py").write_text("")
    pathlib.Path("pack/parts.py").write_text("two = 2.0\n")
    pathlib.Path("pack/ops.py").write_text(
        "from fbackprop.one_line import elementwise\nfrom .parts import two\n"
        "@elementwise(lambda: two)\ndef doubled(x):\n    return two * x\n"
    )
    before = state()
    for target in ("pack/ops.py::doubled", "pack.ops:doubled", "pack.ops::doubled"):
        assert check(target) == 0  # on the samples of its rule
    assert len(calls) == 9
    assert {fn.__name__ for fn, _, _ in calls} == {"doubled"}
    assert state() == before
    assert check("fbackprop.ops:tanh") == 0
    assert calls[-1][0] is fbackprop.tanh


# Refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name an op or FILE.py::NAME, or give --all"),
        (["layernorm"], "no op 'layernorm' (did you mean layer_norm or "),
        (["nowhere.py::f", "--shape", "3"], "nowhere.py: there is no such file"),
        (["folder.py::f", "--shape", "3"], "expected a file that ends in .py"),
        (["division.py::f", "--shape", "3"], "division.py does not import: ZeroDivisionError: division by zero (line 2)"),
        (["syntax.py::f", "--shape", "3"], "syntax.py does not import: SyntaxError: invalid syntax (syntax.py, line 1)"),
        (["stops.py::f", "--shape", "3"], "stops.py does not import: SystemExit: 4 (line 2)"),
        (["nowhere.at:all", "--shape", "3"], "ModuleNotFoundError: No module named 'nowhere'"),
        (["mine.py", "--shape", "3"], "mine.py is a whole module: name a function in it; known are Loss, branch, broken, "),
        (["mine.py::twise", "--shape", "3"], "mine.py has no 'twise' (did you mean twice"),
        (["mine.py::Loss.nil", "--shape", "3"], "mine.py has no 'Loss.nil' (did you mean nll?)"),
        (["mine.py::number", "--shape", "3"], "mine.py::number is no function but of type int"),
        (["mine.py::twice"], "expected one --shape for each, or --args NAME"),
        (["mine.py::twice", "--shape", "3", "--args", "make"], "or --args NAME and no --shape"),
        (["mine.py::dense", "--shape", "4,8", "--shape", "3"], "dense raised TypeError: dot_general requires"),
        (["mine.py::dense", "--shape", "4,8", "--shape", "3"], "got (8,) and (3,), for float32[4, 8], float32[3]"),
        (["mine.py::dense", "--shape", "4,8"], "missing 1 required positional argument: 'w', for float32[4, 8]"),
        (["mine.py::times", "--shape", "4", "--static", "power=0"], "ValueError: no power of 0. Please, for float32[4]"),
        (["mine.py::twice", "--shape", "3:int32<9"], "no floating-point array, so there is nothing to differentiate"),
        (["mine.py::signs", "--shape", "3"], "signs returns no floating-point array"),
        (["mine.py::callback", "--shape", "3"], "callback cannot be differentiated: ValueError: Pure callbacks do not support"),
        (["mine.py::branch", "--shape", "3"], "branch raised TracerBoolConversionError: "),
        (["mine.py::twice", "--shape", "3", "--reference", "thric"], "mine.py has no 'thric' (did you mean thrice or twice?)"),
        (["mine.py::twice", "--shape", "3", "--reference", "dense"], "the reference of twice raised TypeError: "),
        (["mine.py::twice", "--args", "mak"], "mine.py has no 'mak' (did you mean make"),
        (["mine.py::twice", "--args", "broken"], "--args broken raised KeyError: 'nothing'"),
        (["mine.py::twice", "--args", "unknown"], "returned a dict with args, axis; expected a tuple of arguments, or a dict"),
        (["mine.py::twice", "--args", "single"], "--args single returned a ArrayImpl; expected a tuple"),
        (["tanh", "--args", "make"], "tanh is an op"),
        (["tanh", "--static", "axis=1"], "on the samples of its rule"),
        (["tanh", "--shape", "3", "--shape", "3"], "tanh raised TypeError: tanh: too many positional arguments"),
        (["tanh", "--checks", "zero,cotangent"], "no check 'cotangent' (did you mean cotangents?); known are runs, value"),
        (["tanh", "--dtype", "float31"], "no dtype 'float31' (did you mean float32 or "),
        (["tanh", "--dtype", "int32"], "no dtype 'int32'"),
        (["tanh", "--seeds", "0"], "expected a whole number from 1"),
        (["tanh", "--unknown"], "unrecognized arguments: --unknown"),
        (["mine.py::times", "--shape", "3", "--static", "power"], "expected NAME=VALUE, such as axis=-1, got 'power'"),
        (["mine.py::times", "--shape", "3", "--static", "power=a"], "a string has quotes of its own: \"power='a'\""),
        (["tanh", "--json", "nowhere/found.json"], "the folder nowhere does not exist"),
        (["tanh", "--json", "folder.py"], "folder.py is a folder"),
    ]
    + [
        (["mine.py::twice", "--shape", text], says)
        for text, says in {
            "4 8": "got '4 8'", "": "got ''", "4,": "got '4,'", "4x8": "got '4x8'", "-1": "got '-1'",
            "4:float31": "no dtype 'float31'", "4:int32": "below a bound from 1 to 2147483647", "4:int8<129": "from 1 to 127",
            "4:uint8<0": "from 1 to 255", "4<3": "<3 is not for floating-point", "4:bool<2": "<2 is not for bool",
            "4:bool:positive": "positive is not for bool", "4:int32:positive<3": "below a bound",
        }.items()
    ],
)  # fmt: skip
def test_refusals(here, capsys, arguments, says):
    pathlib.Path("folder.py").mkdir()
    pathlib.Path("division.py").write_text("one = 1\nzero = one / 0\n")
    pathlib.Path("syntax.py").write_text("def f(:\n")
    pathlib.Path("stops.py").write_text("import sys\nsys.exit(4)\n")
    assert says in refusal(capsys, *arguments)


def test_nothing_is_computed_before_a_refusal(here, capsys, calls):
    refusal(capsys, "tanh", "mine.py::right", "mine.py::signs", "--shape", 3)
    refusal(capsys, "tanh", "tann")
    assert calls == []


def test_what_the_checker_refuses_and_its_own_faults(here, capsys, monkeypatch):
    def compare(*_, **__):
        raise error

    monkeypatch.setattr(command, "compare", compare)
    error = ValueError("check: there is too much of it.")
    assert refusal(capsys, "tanh") == "fbackprop: there is too much of it.\n"
    error = MemoryError("no more")
    assert refusal(capsys, "tanh") == "fbackprop: tanh failed: MemoryError: no more.\n"
    error = ValueError("a fault of the program")
    with pytest.raises(ValueError, match="a fault of the program"):
        check("tanh")
    error = KeyboardInterrupt()
    assert check("tanh", "--json", "found.json") == 130
    assert capsys.readouterr().err == "fbackprop: interrupted.\n"
    assert not pathlib.Path("found.json").exists()


# The command itself


def test_help_names_every_op_check_and_option(capsys):
    with pytest.raises(SystemExit) as stop:
        check("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    options = ["all", "full", "checks", "dtype", "seed", "seeds", "shape", "args", "reference", "static", "inexact", "json"]
    names = [*command.ops(), *(name.replace(" ", "-") for name in DEPTHS["full"]), *(f"--{name} " for name in options)]
    assert [name for name in names if name not in printed] == []
    assert max(map(len, printed.splitlines())) <= 120


def test_full_shows_eight_devices(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nimport jax.numpy as jnp\nprint(os.environ['XLA_FLAGS'])\ndef f(x):\n    return 2 * x\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=false", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "fbackprop", "check", "mine.py::f", "--shape", "8", "--full", "--checks", "devices"]
    done = subprocess.run(
        [*command, "--json", "found.json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    flags, line, _ = done.stdout.splitlines()
    assert flags == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=8"
    assert line.startswith("ok f (8)")
    assert done.stderr == ""
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["device"] == "cpu (cpu), 8 in all"
    assert document["reports"][0]["notes"] == []
