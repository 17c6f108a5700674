"""The README is true: its table is the present one, its code runs, and its commands exist."""

import pathlib
import re

import pytest

from fbackprop import table

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_table_of_rules_is_current():
    assert table.insert(README) == README, "run: python -m fbackprop.table README.md"


def test_the_example_runs_as_it_stands(capsys):
    scope: dict = {}
    exec(CODE[0], scope)
    printed = capsys.readouterr().out
    assert "layers" in printed
    # The three ways of the example agree.
    import jax
    import numpy as np

    for a, b in zip(jax.tree.leaves(scope["gradient"]), jax.tree.leaves(scope["truth"])):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(jax.tree.leaves(scope["gradient"]), jax.tree.leaves(scope["dparams"])):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_wrong_softplus_is_found(capsys):
    example = next(code for code in CODE if "custom_vjp" in code)
    exec("import jax\nimport fbackprop as fb\n" + example, {})
    assert "x" in capsys.readouterr().out


def test_the_op_of_the_readme_is_right():
    import jax

    import fbackprop as fb
    from fbackprop.one_line import elementwise
    from fbackprop.rules import RULES

    before = dict(RULES)
    try:
        code = next(code for code in CODE if code.startswith("@elementwise"))
        RULES.pop("silu")
        scope = {"jax": jax, "elementwise": elementwise}
        exec(code, scope)
        fb.assert_correct(scope["silu"], jax.random.normal(jax.random.key(0), (4, 8)))
    finally:
        RULES.clear()
        RULES.update(before)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\(?((?:fbackprop|examples|benchmarks)/[\w/]+\.py)", README))))
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()
