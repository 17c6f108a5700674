"""``fbackprop ops``: the table, the pages, the plots, and figures that are those of the ops as they are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import compositions, ops
from fbackprop.cli import main
from fbackprop.gallery.entries import entries, figures_of, sources
from fbackprop.gallery.plots import curves, drawn
from fbackprop.rules import RULES


def test_every_op_and_composition_has_an_entry_and_every_op_its_figures():
    known = entries()
    assert set(known) == set(ops.__all__) | set(compositions.__all__)
    missing = [name for name in ops.__all__ if known[name].figures is None]
    assert not missing, f"run: python -m fbackprop.gallery.entries (no figures of {', '.join(missing)})"
    for entry in known.values():
        assert entry.summary
        assert entry.formula
        if entry.figures and entry.rule:
            assert entry.figures.ours <= entry.figures.autodiff
            assert (entry.figures.error is None) == (not entry.rule.exact)


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "step_ste"])
def test_figures_are_those_of_the_op_as_it_is(name):
    now, known = figures_of(RULES[name]), entries()[name].figures
    assert known is not None
    # Errors differ a little from machine to machine, and what JAX keeps from version to version.
    others = {"error": None, "autodiff_error": None, "autodiff": 0}
    assert dataclasses.replace(now, **others) == dataclasses.replace(known, **others)
    assert (now.error or 0) <= max(4, 2 * (now.autodiff_error or 0))


def test_sources_are_those_that_run():
    known = entries()
    found = sources(known["layer_norm"])
    assert list(found) == ["definition", "forward", "backward", "called by these"]
    assert found["forward"].startswith("def _layer_forward(")
    assert "def _backward(saved" in found["called by these"]
    short = sources(known["silu"])
    assert "@elementwise(_silu_slope" in short["definition and slope"]
    assert "def _silu_slope" in short["called by these"]
    assert "def logmeanexp" in sources(known["logmeanexp"])["composition"]


def test_curves_are_the_function_and_its_derivative_and_only_of_single_elements():
    found = curves(RULES["tanh"])
    assert found is not None
    x, y, slope = found
    np.testing.assert_allclose(y, np.tanh(x), atol=1e-6)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(jnp.tanh))(jnp.asarray(x)), atol=1e-6)
    assert [curves(RULES[name]) for name in ("softmax", "dense", "layer_norm", "glu", "embed")] == [None] * 5
    text = drawn(RULES["relu"])
    assert text is not None
    rows = [line[9:] for line in text.plain.splitlines()[:16]]
    assert all(len(row) == 60 for row in rows)
    assert sum(ord(c) > 0x2800 for row in rows for c in row) > 60


def test_ops_are_found_by_the_names_that_people_know():
    known = entries()
    words = {"RoPE": "rotary_embedding", "layer norm": "layer_norm", "BCE": "sigmoid_binary_cross_entropy", "PReLU": "prelu"}
    words |= {"MSE": "mean_squared_error", "swish": "silu", "drop path": "stochastic_depth"}
    assert not [word for word, name in words.items() if not known[name].mentions(word)]


def test_the_command(capsys, tmp_path):
    assert main(["ops", "--search", "relu6"]) == 0
    table = capsys.readouterr().out
    assert "relu6" in table
    assert "lstm" not in table
    assert re.search(r"relu6 .* 3 MiB", table)
    assert main(["ops", "softplus", "--plot", str(tmp_path / "softplus.png")]) == 0
    page = capsys.readouterr().out
    for words in ("softplus(x)", "log(1 + eˣ)", "def softplus", "the backward written by hand", "jax.lax.logistic(x)"):
        assert words in page
    assert (tmp_path / "softplus.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gellu"], "there is no op 'gellu' (did you mean gelu"),
        (["--search", "no zebra"], "no op mentions 'no zebra'"),
        (["PReLU"], "there is no op 'PReLU' (did you mean prelu or"),
        (["gelu", "--search", "x"], "name ops, or give --search WORD; not both"),
        (["--plot", "x.png"], "--plot draws one op; name it"),
        (["dense", "--plot", "x.png"], "dense is not a function of single elements"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ops", *arguments]) == 2
    out, error = capsys.readouterr()
    assert sentence in error
    assert not out
    assert not list(tmp_path.iterdir())
