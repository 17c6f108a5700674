"""accelerate on whole models, as in benchmarks/accelerate.py, in tiny sizes."""

import importlib.util
import pathlib

import equinox as eqx
import jax
import pytest

import fbackprop as fb
from fbackprop.accelerating import feeding

_PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerate.py"
_SPEC = importlib.util.spec_from_file_location("benchmarks_accelerate", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

FOUND = {
    "flax-cnn": {"max_pool": 2},
    "flax-gpt": {"dot_product_attention": 1, "layer_norm": 3, "gelu_mlp": 1},
    "flax-gpt-50k": {"dot_product_attention": 1, "layer_norm": 3, "gelu_mlp": 1, "linear_cross_entropy": 1},
    "flax-resnet": {"batch_norm": 6},
    "flax-unet": {"group_norm": 6, "sum_pool": 1, "conv": 3, "conv_transpose": 1},
    "flax-lstm": {"lstm": 2, "layer_norm": 1},
    "nnx-vit": {"dot_product_attention": 1, "layer_norm": 1, "rms_norm": 1, "gelu_mlp": 1},
    "equinox-cnn": {"max_pool": 2},
    "equinox-transformer": {"dot_product_attention": 1, "layer_norm": 2, "gelu_mlp": 1},
    "equinox-gru": {"gru": 1},
    "haiku-cnn": {"max_pool": 2, "batch_norm": 2, "layer_norm": 1},
    "haiku-gru": {"gru": 1, "softmax_cross_entropy_with_integer_labels": 1},
    "jax-llama": {"dot_product_attention": 1, "rms_norm": 3, "swiglu_mlp": 1, "softmax_cross_entropy_with_integer_labels": 1},
    "jax-mlp": {"layer_norm": 2, "gelu": 2},
}


@pytest.fixture(autouse=True)
def small_blocks_count(monkeypatch):
    monkeypatch.setattr(feeding, "HIDDEN", 0)


def model(name, arrays=True):
    if name.startswith("haiku"):
        pytest.importorskip("haiku")
    if arrays:
        return benchmark.MODELS[name](True)
    losses = []

    def make():
        loss, args = benchmark.MODELS[name](True)
        losses.append(loss)
        return args

    args = eqx.filter_eval_shape(make)
    return losses[0], args


@pytest.mark.parametrize("name", FOUND)
def test_all_sites_of_a_model_are_replaced(name):
    with jax.numpy_rank_promotion("allow"):
        loss, args = model(name, arrays=False)
        found = fb.accelerate(loss).traced(*args)[0].program.found
    assert [f for f in found if not f.replaced] == []
    names = [f.op for f in found]
    assert {op: names.count(op) for op in FOUND[name]} == FOUND[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_a_model_computes_the_same_and_keeps_no_more(name):
    with jax.numpy_rank_promotion("allow"):
        loss, args = model(name)
        report = fb.accelerate(loss).report(*args)
    assert report.agrees, str(report)
    assert report.kept_after <= report.kept_before


def test_every_model_of_the_benchmark_is_tested():
    assert set(FOUND) == set(benchmark.MODELS)
