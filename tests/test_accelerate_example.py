"""examples/accelerate_flax.py: somebody else's network, trained with one changed line."""

import importlib.util
import pathlib
import re

import jax
import pytest

import fbackprop as fb

PATH = pathlib.Path(__file__).parents[1] / "examples" / "accelerate_flax.py"


def example():
    spec = importlib.util.spec_from_file_location("accelerate_flax", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_finds_what_there_is_to_replace():
    module = example()
    images = jax.ShapeDtypeStruct((8, 8, 8, 1), "float32")
    variables = jax.eval_shape(module.model.init, jax.random.key(0), images)
    found = fb.accelerate(module.loss).traced(variables, images, jax.ShapeDtypeStruct((8,), "int32"))[0].program.found
    assert all(f.replaced for f in found)
    assert len(found) == 6


@pytest.mark.slow
def test_it_trains_and_tells(capsys):
    right, loss = example().main(steps=60, batch=64, rounds=2)
    assert right > 0.85
    assert loss < 1
    told = capsys.readouterr().out
    assert "14 outputs and gradients agree" in told
    assert re.search(r"a step took [0-9.]+ ms and takes [0-9.]+ ms: ", told)
