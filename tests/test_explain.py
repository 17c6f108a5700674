"""explain: the record of a backward pass, held against the documents' numbers and against float64 autodiff of the definitions."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import fbackprop as fb

EXAMPLES = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())
KEY = jax.random.key(0)


def two_three_two():
    entry = EXAMPLES["000_two_three_two"]
    x, y, W1, W2 = (jnp.asarray(entry["inputs"][k], jnp.float64) for k in ("x", "y", "W1", "W2"))
    model = fb.models.mlp((3, 2), fb.sigmoid, output_activation=fb.sigmoid, use_bias=False)

    def loss(params, x, y):
        return fb.sum_of_squares(model(params, x), y)

    return entry, loss, ({"layers": ({"kernel": W1.T}, {}, {"kernel": W2.T}, {})}, x, y)


def near(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-9, atol=1e-9)


def test_a_record_has_the_documents_numbers():
    with jax.enable_x64(True):
        entry, loss, args = two_three_two()
        record = fb.explain(loss, *args)
        first, hidden, second, out, error = record.steps
        assert [s.op for s in record.steps] == ["dense", "sigmoid", "dense", "sigmoid", "sum_of_squares"]
        for step, name in ((first, "d1"), (hidden, "n1"), (second, "d2"), (out, "y_hat"), (error, "loss")):
            near(step.outputs["y"], entry["forward"][name])
        near(first.cotangents["kernel"].T, entry["gradients"]["W1"])
        near(second.cotangents["kernel"].T, entry["gradients"]["W2"])
        near(record.gradients[1], entry["gradients"]["x"])
        near(hidden.upstream["y"], second.cotangents["x"])
        near(error.upstream["y"], 1.0)
        assert record.agrees
        assert record.output.dtype == jnp.float64


def test_where_values_come_from_and_what_is_kept():
    with jax.enable_x64(True):
        _, loss, args = two_three_two()
        record = fb.explain(loss, *args)
    first, hidden, second, _, error = record.steps
    assert {n: s.text for n, s in first.source.items()} == {"x": "x", "kernel": "layers/0/kernel"}
    assert {n: s.text for n, s in second.source.items()} == {"x": "step 1", "kernel": "layers/2/kernel"}
    assert first.layer == "layers/0" and hidden.layer == ""
    assert [(k.name, k.origin, k.again, k.bytes) for k in second.kept] == [
        ("x", "output", True, 24),  # sigmoid keeps its output already
        ("kernel", "parameter", False, 48),
    ]
    assert [(k.name, k.origin) for k in error.kept] == [("error", "own")]
    assert record.kept_bytes == 16 + 48 + 24 + 48 + 16 + 16
    assert "chain" not in first.formula and "dy Wᵀ" in first.formula
    assert first.summary.startswith("A fully connected layer")
