"""explain: the record of a backward pass, beside the documents' numbers and float64 autodiff of the definitions."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.rules import RULES

EXAMPLES = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())
KEY = jax.random.key(0)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


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
    assert [first.layer, hidden.layer] == ["layers/0", ""]
    assert [(k.name, k.origin, k.again, k.bytes) for k in second.kept] == [
        ("x", "output", True, 24),  # sigmoid keeps its output already
        ("kernel", "parameter", False, 48),
    ]
    assert [(k.name, k.origin) for k in error.kept] == [("error", "own")]
    assert record.kept_bytes == 16 + 48 + 24 + 48 + 16 + 16
    assert "dy Wᵀ" in first.formula
    assert first.summary.startswith("A fully connected layer")


def double(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def gpt(**options):
    model = fb.models.gpt(17, 2, 16, 2, 8, **options)
    tokens = jax.random.randint(KEY, (2, 8), 0, 17)
    return model.loss, (model.init(KEY, tokens)[0], tokens, jnp.roll(tokens, 1))


def lstm():
    model = fb.models.lstm_lm(11, 6)
    tokens = jax.random.randint(KEY, (2, 5), 0, 11)
    return model.loss, (model.init(KEY, tokens)[0], tokens, jnp.roll(tokens, 1))


def cnn():
    layers = fb.layers.Conv(3, (3, 3)), fb.layers.BatchNorm(), fb.relu, fb.layers.MaxPool((2, 2), (2, 2)), fb.layers.Flatten()
    model = fb.layers.serial(*layers, fb.layers.Dropout(0.5), fb.layers.Dense(4))
    batch = {"x": jax.random.normal(KEY, (3, 6, 6, 1)), "y": jnp.array([1, 0, 3])}
    params, state = model.init(KEY, batch["x"])

    def loss(params, batch, state, key):
        logits, state = model.apply(params, batch["x"], state=state, key=key, train=True)
        return fb.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), state

    return loss, (params, batch, state, KEY)


MODELS = {
    "gpt": lambda: (*gpt(), 12 + 1),
    "gpt, modern, unrolled, full checkpoint": lambda: (*gpt(modern=True, scan=False, checkpoint="full"), 13),
    "lstm": lambda: (*lstm(), 3),
    "cnn": lambda: (*cnn(), 7),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n not in ("gpt", "cnn") else n for n in MODELS])
def test_models_are_recorded_and_gradients_are_those_of_the_definitions(name):
    with jax.enable_x64(True):
        loss, args, steps = MODELS[name]()
        args, has_aux = double(args), name == "cnn"
        record = quick_jit(lambda *args: fb.explain(loss, *args, has_aux=has_aux))(*args)  # leaves jit as a pytree
        assert len(record.steps) == steps
        assert record.agrees
        assert all(step.reached for step in record.steps)
        expected, expected_aux = quick_jit(jax.grad(fb.without_rules(loss), has_aux=True))(*args) if has_aux else (
            quick_jit(jax.grad(fb.without_rules(loss)))(*args), None
        )  # fmt: skip
        for found, want in zip(jax.tree.leaves(record.gradients[0]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-8, atol=1e-12)
        if has_aux:
            for found, want in zip(jax.tree.leaves(record.aux), jax.tree.leaves(expected_aux), strict=True):
                np.testing.assert_allclose(found, want, rtol=1e-12)
            assert record.gradients[1]["y"] is None
            assert record.gradients[3] is None
            assert record.steps[4].source["x"].text == "step 3 by reshape"


def test_a_scan_has_a_record_for_each_step():
    def loss(kernels, x):
        def body(h, kernel):
            h = jax.checkpoint(jax.jit(lambda h: fb.tanh(fb.dense(h, kernel))))(h)
            return h, h.sum()

        h, sums = jax.lax.scan(body, x, kernels, reverse=True)
        return fb.half_square(h, x) + sums.mean()

    with jax.enable_x64(True):
        args = jnp.stack([0.1 * jnp.eye(3), jnp.ones((3, 3)) * 0.2]), jnp.arange(3.0)
        record = fb.explain(loss, *args)
        gradient = jax.grad(fb.without_rules(loss), (0, 1))(*args)
    assert [s.op for s in record.steps] == ["dense", "tanh", "dense", "tanh", "half_square"]
    assert [record.steps[i].source["kernel"].text for i in (0, 2)] == ["kernels[1]", "kernels[0]"]
    assert record.steps[2].kept[1].origin == "parameter"
    assert record.agrees
    for found, want in zip(record.gradients, gradient):
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_any_output_with_a_cotangent_and_arguments_of_any_kind():
    def fn(params, batch, scale, *, bias, mode):
        assert mode == "double"
        y = fb.sigmoid(fb.dense(batch["x"], params)) * scale + bias
        return {"y": y, "n": jnp.argmax(y, -1)}

    x, w = jnp.ones((2, 3)), jnp.full((3, 2), 0.5)
    dy = {"y": jnp.arange(4.0).reshape(2, 2), "n": None}
    record = fb.explain(fn, w, {"x": x, "n": 3}, 2.0, bias=jnp.zeros((1, 2)), mode="double", cotangent=dy)
    _, pullback = jax.vjp(lambda w, x, s, b: fb.sigmoid(fb.dense(x, w)) * s + b, w, x, 2.0, jnp.zeros((1, 2)))
    want = pullback(dy["y"])
    dw, dbatch, dscale = record.gradients
    for found, expected in zip((dw, dbatch["x"], dscale, record.keyword_gradients["bias"]), want):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert dbatch["n"] is None
    assert [leaf.label for leaf in record.leaves] == ["params", "batch/x", "scale", "bias"]
    assert record.arguments[1]["mode"] == "double"
    assert record.output["n"].dtype == jnp.int32


def test_an_op_that_the_output_does_not_depend_on_is_told():
    def fn(x):
        return fb.tanh(x).sum(), fb.sigmoid(x)

    record = fb.explain(fn, jnp.ones(2), has_aux=True)
    assert [(s.op, s.reached) for s in record.steps] == [("tanh", True), ("sigmoid", False)]
    assert record.steps[1].cotangents == {"x": None}


def test_what_is_not_differentiated_is_neither_kept_nor_given_a_cotangent():
    x = jnp.ones((4, 3))
    record = fb.explain(lambda w: fb.dense(x, w).sum(), jnp.ones((3, 2)))
    (step,) = record.steps
    assert [k.name for k in step.kept] == ["x"]  # the kernel is kept for dx alone
    assert step.cotangents["x"] is None
    assert step.source["x"].text == "a constant"


def test_a_wrong_rule_is_recorded_wrong():
    """A backward that forgets a factor shows as it is: nothing is differentiated in another way."""
    right = RULES["tanh"]
    wrong = dataclasses.replace(right, backward=lambda saved, dy, **options: (2 * right.backward(saved, dy)[0],))

    def loss(x):
        with fb.context.switched(others=(("tanh", wrong),)):
            return fb.half_square(fb.tanh(x), jnp.zeros(3))

    x = jnp.array([0.1, 0.2, 0.3])
    record = fb.explain(loss, x)
    np.testing.assert_allclose(
        record.gradients[0], 2 * jax.grad(fb.without_rules(lambda x: fb.half_square(fb.tanh(x), 0 * x)))(x), rtol=1e-6
    )
    assert record.agrees  # with jax.grad of the function, whose rule is as wrong
    found = record.chain("x[1]")
    np.testing.assert_allclose(found.paths[0].factors[1].value, 2 * (1 - np.tanh(0.2) ** 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jax.vmap(lambda x: fb.sigmoid(x))(x).sum(), "sigmoid is called under jax.vmap"),
        (lambda x: jax.grad(lambda x: fb.sigmoid(x).sum())(x).sum(), "sigmoid is called inside of a function that is itself"),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, fb.sigmoid, x).sum(), "while_loop.*use jax.lax.scan"),
        (lambda x: jax.lax.cond(x[0] > 0, fb.sigmoid, jnp.sin, x).sum(), "branch of jax.lax.cond"),
        (lambda x: _somebodys(x).sum(), "sigmoid is called inside of a function with a jax.custom_vjp"),
        (lambda x: x.sum(), "called no op of fbackprop"),
        (lambda x: fb.without_rules(fb.sigmoid)(x).sum(), "called no op of fbackprop"),
        (lambda x: fb.sigmoid(x), r"returns float32\[3\], not a floating-point scalar; give cotangent="),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(fn, message):
    with pytest.raises(ValueError, match=message):
        fb.explain(fn, jnp.ones(3))


@jax.custom_vjp
def _somebodys(x):
    return fb.sigmoid(x)


_somebodys.defvjp(lambda x: (fb.sigmoid(x), x), lambda x, dy: (dy,))


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a function, got int"):
        fb.explain(3)
    with pytest.raises(TypeError, match="x of the function is a ShapeDtypeStruct"):
        fb.explain(lambda x: fb.sigmoid(x).sum(), jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(ValueError, match="cotangent has"):
        fb.explain(fb.sigmoid, jnp.ones(3), cotangent=jnp.ones(4))
    record = fb.explain(lambda x: fb.sigmoid(x).sum(), jnp.ones(3))
    with pytest.raises(ValueError, match="there is x"):
        record.leaf("y")


@pytest.mark.slow
def test_the_benchmark_runs(monkeypatch, capsys):
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "explain.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_explain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"layers": 1, "width": 16, "heads": 2, "length": 8, "batch": 1, "vocabulary": 16, "rounds": 2, "seconds": 1}
    monkeypatch.setattr("sys.argv", ["explain.py", *(f"--{name}={value}" for name, value in sizes.items())])
    module.main()
    printed = capsys.readouterr().out
    assert "agrees with jax.grad: True" in printed
    assert "an explanation takes" in printed
