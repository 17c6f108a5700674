"""chain: the sum over all paths is the gradient, for every weight of the documents' networks, and paths are the documents'."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.training.presets import PRESETS

EXAMPLES = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(value):
    return jnp.asarray(value, jnp.float64)


def dense(W, b=None):
    """Parameters from the documents' notation, (out, in)."""
    return {"kernel": array(W).T, **({} if b is None else {"bias": array(b)})}


def two_three_two():
    given = EXAMPLES["000_two_three_two"]["inputs"]
    model = fb.models.mlp((3, 2), fb.sigmoid, output_activation=fb.sigmoid, use_bias=False)
    params = {"layers": (dense(given["W1"]), {}, dense(given["W2"]), {})}
    return lambda p, x, y: fb.sum_of_squares(model(p, x), y), params, array(given["x"]), array(given["y"])


def one_neuron():
    given = EXAMPLES["001_one_neuron"]["inputs"]
    model = fb.models.mlp((1,), output_activation=fb.sigmoid)
    params = {"layers": (dense([[given["w"]]], [given["b"]]), {})}
    return lambda p, x, y: fb.half_square(model(p, x), y), params, array([given["x"]]), array([given["t"]])


def and_gate():
    given = EXAMPLES["001_and_gate"]["step"]
    model = fb.models.mlp((1,), output_activation=fb.sigmoid)
    params = {"layers": (dense([given["weights"]], [given["bias"]]), {})}
    return lambda p, x, y: fb.half_square(model(p, x), y), params, array(given["inputs"]), array(given["out"])[:, None]


def sigmoid_neuron():
    given = EXAMPLES["003_sigmoid_neuron"]["inputs"]
    model = fb.models.mlp((1,), output_activation=fb.sigmoid)
    params = {"layers": (dense([given["W"]], [given["b"]]), {})}
    return lambda p, x, y: fb.half_square(model(p, x), y), params, array(given["x"]), array([given["target"]])


def three_layer():
    given = EXAMPLES["004_mlp"]["inputs"]
    model = fb.models.mlp((3, 2, 1))
    one, two, three = (dense(given[f"W{i}"], given[f"b{i}"]) for i in (1, 2, 3))
    params = {"layers": (one, {}, two, {}, three)}
    return lambda p, x, y: fb.half_square(model(p, x), y), params, array(given["x"]), array([given["y_true"]])


def cnn():
    given = EXAMPLES["004_cnn"]["inputs"]
    model = fb.models.cnn((1, 1), (3,), 2, kernel_size=(2, 2), padding="VALID", activation=None)
    convs = [{"kernel": array(given[f"K{i}"])[..., None, None], "bias": array([given[f"c{i}"]])} for i in (1, 2)]
    params = {"layers": (*convs, {}, dense(given["W4"], given["b4"]), dense(given["W5"], given["b5"]))}
    labels = jnp.zeros(1, jnp.int32)
    loss = fb.softmax_cross_entropy_with_integer_labels
    return lambda p, x: loss(model(p, x), labels).mean(), params, array(given["X"])[None, ..., None]


NETWORKS = (two_three_two, one_neuron, and_gate, sigmoid_neuron, three_layer, cnn)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_the_sum_over_all_paths_is_the_gradient_of_every_weight(network):
    loss, *args = network()
    record = fb.explain(loss, *args)
    expected = jax.grad(fb.without_rules(loss), argnums=tuple(range(len(args))))(*args)
    for leaf, gradient in zip(record.leaves, jax.tree.leaves(expected)):
        for index in itertools.product(*map(range, leaf.type.shape)):
            found = record.chain(f"{leaf.label}{list(index) if index else ''}")
            assert found.complete
            assert found.count == len(found.paths)
            scale = max([abs(p.product) for p in found.paths], default=1.0)
            assert abs(found.total - float(gradient[index])) <= 1e-12 * max(scale, 1e-3), (leaf.label, index)
            assert found.agrees
            assert found.difference <= 1e-12 * max(scale, 1e-3)
            for path in found.paths:
                assert np.isclose(np.prod([f.value for f in path.factors]), path.product, rtol=1e-12, atol=0)
            for vector in found.vectors:
                if vector.step == len(record.steps) - 1:
                    assert abs(vector.total - found.gradient) <= 1e-12 * max(scale, 1e-3)


def test_paths_are_the_documents():
    expected = EXAMPLES["000_two_three_two"]["paths_of_W1_0_0"]
    loss, *args = two_three_two()
    found = fb.explain(loss, *args).chain("layers/0/kernel[0, 0]")
    by_output = {path.factors[0].into[0]: path for path in found.paths}
    for output in (0, 1):
        np.testing.assert_allclose(by_output[output].product, expected[f"through_output_{output}"], rtol=1e-9)
        assert [f.kind for f in by_output[output].factors] == ["loss", "activation", "weight", "activation", "input"]
    np.testing.assert_allclose(found.total, expected["sum"], rtol=1e-9)
    # By size, and each factor is what the document's formula says: 2(ŷ − y) · f′(d₂) · W₂ · f′(d₁) · n₀.
    assert [path.factors[0].into for path in found.paths] == [(1,), (0,)]
    values = [f.value for f in by_output[0].factors]
    forward, given = (EXAMPLES["000_two_three_two"][k] for k in ("forward", "inputs"))
    y_hat, n1 = forward["y_hat"][0], forward["n1"][0]
    formula = [2 * (y_hat - given["y"][0]), y_hat * (1 - y_hat), given["W2"][0][0], n1 * (1 - n1), given["x"][0]]
    np.testing.assert_allclose(values, formula, rtol=1e-9)


def test_a_batch_sums_over_its_examples_and_zeros_are_paths_too():
    loss, *args = and_gate()
    record = fb.explain(loss, *args)
    found = record.chain("layers/0/kernel[0, 0]")
    assert found.count == 4  # one for each example, though x₁ is 0 in two of them
    assert sorted(p.factors[-1].value for p in found.paths) == [0, 0, 1, 1]
    assert {p.factors[-1].kind for p in record.chain("layers/0/bias[0]").paths} == {"bias"}


def test_a_dead_unit_is_a_path_with_a_factor_of_zero():
    x, kernel = array([[1.0, -2.0]]), array([[1.0, 1.0], [1.0, 0.2]])

    def loss(kernel, x):
        return fb.half_square(fb.relu(fb.dense(x, kernel)), jnp.zeros((1, 2)))

    found = fb.explain(loss, kernel, x).chain("kernel[0, 0]")
    assert [[f.kind for f in p.factors] for p in found.paths] == [["loss", "activation", "input"]]
    assert found.paths[0].factors[1].value == 0
    assert found.total == 0


def test_glue_between_ops_has_its_factors():
    def loss(w, x):
        h = fb.tanh(fb.dense(x, w))
        return (fb.sigmoid((h + x).reshape(-1)) ** 2).mean()

    w, x = array([[0.3, -0.2], [0.5, 0.7]]), array([[0.4, -1.1], [0.9, 0.2]])
    record = fb.explain(loss, w, x)
    gradient = jax.grad(fb.without_rules(loss), (0, 1))(w, x)
    for label, expected in zip(("w", "x"), gradient):
        for i, j in itertools.product(range(2), range(2)):
            found = record.chain(f"{label}[{i}, {j}]")
            assert abs(found.total - float(expected[i, j])) < 1e-14
            assert found.agrees
    kinds = [f.kind for f in record.chain("w[0, 0]").paths[0].factors]
    assert kinds.count("jax") >= 2  # mean and square
    assert kinds[-1] == "input"
    assert record.chain("[0, 0]", argument="w").gradient == record.chain("w[0, 0]").gradient


def test_a_cotangent_that_is_not_one_is_a_factor():
    w, x = array([[0.3, -0.2], [0.5, 0.7]]), array([[0.4, -1.1]])
    record = fb.explain(lambda w: fb.tanh(fb.dense(x, w)), w, cotangent=array([[2.0, -3.0]]))
    (path,) = record.chain("w[1, 1]").paths
    assert [f.kind for f in path.factors] == ["cotangent", "activation", "input"]
    assert path.factors[0].value == -3


def test_vector_form_where_paths_are_too_many():
    """A convolutional network with batch norm, pooling and dropout, as digits-cnn has."""
    layers = fb.layers.Conv(2, (3, 3), use_bias=False), fb.layers.BatchNorm(), fb.relu, fb.layers.MaxPool((2, 2), (2, 2))
    model = fb.layers.serial(*layers, fb.layers.Flatten(), fb.layers.Dropout(0.3), fb.layers.Dense(3))
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (4, 6, 6, 1), jnp.float64), jnp.array([0, 2, 1, 1])
    params, state = jax.tree.map(array, model.init(key, x))

    def loss(params, x):
        logits, _ = model.apply(params, x, state=state, key=key, train=True)
        return fb.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    record = jax.jit(lambda p, x: fb.explain(loss, p, x))(params, x)
    gradient = float(jax.grad(fb.without_rules(loss))(params, x)["layers"][0]["kernel"][0, 1, 0, 1])
    counted = record.chain("layers/0/kernel[0, 1, 0, 1]")
    assert counted.complete is (counted.count <= 4096)
    few = record.chain("layers/0/kernel[0, 1, 0, 1]", paths=1, largest=8)
    blind = record.chain("layers/0/kernel[0, 1, 0, 1]", paths=0, entries=0)
    assert (few.count, blind.count) == (counted.count, None)
    assert np.isclose(counted.vectors[0].total, gradient, rtol=1e-12, atol=0)
    for found in (few, blind):
        assert not found.complete
        assert abs(found.total - gradient) <= 1e-12 * abs(gradient)
        assert found.agrees
        sizes = [abs(p.product) for p in found.paths]
        assert sizes == sorted(sizes, reverse=True)
        assert "not all" in str(found)
    assert len(few.paths) == 8
    if counted.complete:  # the search did find the largest
        np.testing.assert_allclose(few.paths[0].product, counted.paths[0].product, rtol=1e-12)


@pytest.mark.slow
def test_vector_form_of_a_weight_of_digits_cnn():
    def double(tree):
        return jax.tree.map(lambda a: array(a) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.asarray(a), tree)

    task, key = PRESETS["digits-cnn"].task(0), jax.random.key(3)
    params, state, batch = double(task.params), double(task.state), double({k: v[:8] for k, v in task.examples.items()})

    def loss(params, batch):
        return task.loss_fn(params, batch, state, key)[0]

    record = fb.explain(loss, params, batch)
    expected = jax.jit(jax.grad(fb.without_rules(loss)))(params, batch)
    rng = np.random.default_rng(0)
    for leaf, gradient in zip(record.leaves, jax.tree.leaves(expected), strict=False):
        index = tuple(int(rng.integers(n)) for n in leaf.type.shape)
        found = record.chain(f"{leaf.label}{list(index)}", largest=2)
        largest = float(jnp.abs(gradient).max())
        assert abs(found.total - float(gradient[index])) <= 1e-12 * largest, leaf.label
        assert found.difference <= 1e-12 * largest
        assert found.agrees


def test_what_is_no_element_is_refused():
    loss, *args = two_three_two()
    record = fb.explain(loss, *args)
    for place, message in (
        ("layers/0/kernel", "names no element"),
        ("layers/0/kernel[2, 0]", "whose shape is \\(2, 3\\)"),
        ("layer/0/kernel[0, 0]", "no argument is called"),
    ):
        with pytest.raises(ValueError, match=message):
            record.chain(place)
    with pytest.raises(ValueError, match="nothing at 'z'"):
        record.chain("z[0]", argument="x")
    tokens = fb.explain(lambda t, i: fb.embed(t, i).sum(), jnp.ones((3, 2)), jnp.array([1]))
    with pytest.raises(ValueError, match="int"):
        tokens.chain("i[0]")
