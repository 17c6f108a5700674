"""Models: structure, the worked numbers of a small perceptron and a small classifier of images, all options by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import ops
from fbackprop.context import without_rules
from fbackprop.models import cnn, mlp


def kinds(model):
    return [layer.op.rule.name for layer in model.layers if hasattr(layer, "op")]


def test_perceptron_with_numbers():
    """The three-layer network of the documents, kernels transposed into (in, out): forward, gradients, a step of descent."""
    with jax.enable_x64(True):
        model = mlp((3, 2, 1))
        weights = ([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [[0.7, 0.8, 0.9], [1.0, 1.1, 1.2]], [[1.3, 1.4]])
        biases = ([0.1, 0.2, 0.3], [0.4, 0.5], [0.6])
        dense = [{"kernel": jnp.array(w).T, "bias": jnp.array(b)} for w, b in zip(weights, biases)]
        params = {"layers": (dense[0], {}, dense[1], {}, dense[2])}
        x, target = jnp.array([1.0, 2.0]), jnp.array([3.0])
        losses = []
        for _ in range(2):
            y, tape = model.forward(params, x)
            loss, saved = ops.half_square.forward(y, target)
            dparams, dx = model.backward(tape, ops.half_square.backward(saved, 1.0)[0])
            losses.append(float(loss))
            if len(losses) == 1:
                first = dparams, dx
            params = jax.tree.map(lambda p, d: p - 0.01 * d, params, dparams)
        dparams, dx = first
        np.testing.assert_allclose(losses, [42.8738, 0.769816049827], rtol=1e-11)
        np.testing.assert_allclose(dx, [22.5018, 29.66904], rtol=1e-12)
        np.testing.assert_allclose(
            dparams["layers"][0]["kernel"].T, [[21.3906, 42.7812], [23.8908, 47.7816], [26.391, 52.782]], rtol=1e-12
        )
        np.testing.assert_allclose(dparams["layers"][2]["bias"], [12.038, 12.964], rtol=1e-12)
        np.testing.assert_allclose(dparams["layers"][4]["kernel"].T, [[33.8916, 45.6518]], rtol=1e-12)


def test_classifier_with_numbers():
    """Conv, Conv, Flatten, Dense, Dense, softmax and cross-entropy on one 4×4 image, without activations."""
    with jax.enable_x64(True):
        model = cnn((1, 1), (3,), 2, kernel_size=(2, 2), padding="VALID", activation=None)
        image = jnp.arange(16.0).reshape(1, 4, 4, 1) / 10
        w4 = [[0.1, -0.2, 0.3, 0.4], [0.5, 0.1, -0.3, 0.2], [-0.1, 0.2, 0.4, -0.5]]
        w5 = [[0.3, -0.6, 0.9], [-0.2, 0.5, 0.7]]
        params = {
            "layers": (
                {"kernel": jnp.array([0.1, 0.2, 0.3, 0.4]).reshape(2, 2, 1, 1), "bias": jnp.array([0.1])},
                {"kernel": jnp.array([0.5, -0.4, 0.3, -0.2]).reshape(2, 2, 1, 1), "bias": jnp.array([0.05])},
                {},
                {"kernel": jnp.array(w4).T, "bias": jnp.array([0.01, 0.02, 0.03])},
                {"kernel": jnp.array(w5).T, "bias": jnp.array([0.1, -0.1])},
            )
        }
        assert jax.tree.structure(params) == jax.tree.structure(model.init(jax.random.key(0), image)[0])
        logits, tape = model.forward(params, image)
        np.testing.assert_allclose(logits, [[0.11044, -0.07846]], rtol=1e-12)
        loss, saved = ops.softmax_cross_entropy_with_integer_labels.forward(logits, jnp.array([0]))
        np.testing.assert_allclose(loss, [0.603150965817], rtol=1e-11)
        dlogits = ops.softmax_cross_entropy_with_integer_labels.backward(saved, jnp.ones(1))[0]
        dparams, dx = model.backward(tape, dlogits)
        layers = dparams["layers"]
        want = [[-0.015580273558, -0.013315698913], [-0.006521974978, -0.004257400333]]
        np.testing.assert_allclose(layers[0]["kernel"][..., 0, 0], want, atol=1e-12)
        want = [[-0.016757852373, -0.005434979148], [0.028533640528, 0.039856513753]]
        np.testing.assert_allclose(layers[1]["kernel"][..., 0, 0], want, atol=1e-12)
        np.testing.assert_allclose(layers[3]["bias"], [-0.226457464504, 0.49820642191, -0.090582985802], atol=1e-12)
        np.testing.assert_allclose(layers[4]["bias"], [-0.452914929009, 0.452914929009], atol=1e-12)
        want = [0.011775788154, 0.017980722682, -0.014221528771, -0.006159643035]
        np.testing.assert_allclose(dx[0, 0, :, 0], want, atol=1e-12)
        options = {"kernel_size": (2, 2), "padding": "VALID", "activation": None}
        probabilities = cnn((1, 1), (3,), 2, output_activation=ops.softmax, **options)
        y = probabilities({"layers": (*params["layers"], {})}, image)
        np.testing.assert_allclose(y, [[0.547085070991, 0.452914929009]], rtol=1e-11)


def test_structure():
    assert kinds(mlp((8, 4, 2))) == ["dense", "relu", "dense", "relu", "dense"]
    assert kinds(mlp([1], output_activation=ops.sigmoid)) == ["dense", "sigmoid"]
    full = mlp((8, 2), ops.gelu, batch_norm=True, dropout=0.1)
    assert kinds(full) == ["dense", "batch_norm", "gelu", "dropout", "dense"]
    assert [layer.use_bias for layer in full.layers if hasattr(layer, "features")] == [False, True]
    assert kinds(cnn()) == ["conv", "relu", "conv", "relu", "dense", "relu", "dense"]
    everything = cnn((4,), (5,), 3, pool=(2, 2), batch_norm=True, dropout=0.2, output_activation=ops.softmax)
    want = "conv batch_norm relu max_pool dense batch_norm relu dropout dense softmax"
    assert kinds(everything) == want.split()


MODELS = [
    (mlp((6, 5, 3), ops.tanh, batch_norm=True, dropout=0.25, output_activation=ops.log_softmax), (7, 4)),
    (mlp((3, 2), ops.sigmoid, use_bias=False, output_activation=ops.sigmoid), (5, 2)),
    (cnn((3, 4), (5,), 3, pool=(2, 2), batch_norm=True, dropout=0.25), (4, 8, 8, 2)),
    (cnn((3,), (), 2, kernel_size=(3,), strides=2, padding="CAUSAL", activation=ops.gelu), (4, 9, 2)),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("model", "shape"), MODELS, ids=lambda m: repr(m)[:40])
def test_by_hand_is_the_gradient(model, shape, train):
    """One jitted step by hand against jax.grad of the rules and of the definitions, in float64."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        variables = model.init(jax.random.key(0), x)
        params, state = jax.tree.map(lambda a: a.astype(jnp.float64) + 0.1, variables)
        key = jax.random.key(2)

        def loss(params, x):
            y, new = model.apply(params, x, state, key, train)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), new

        @jax.jit
        def by_hand(params, x):
            y, tape = model.forward(params, x, state, key, train)
            return tape.state, *model.backward(tape, jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        mine = by_hand(params, x)
        for fn in (loss, without_rules(loss)):
            (dparams, dx), new = jax.jit(jax.grad(fn, argnums=(0, 1), has_aux=True))(params, x)
            assert jax.tree.structure(mine) == jax.tree.structure((new, dparams, dx))
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves((new, dparams, dx))):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_computing_in_bfloat16_keeps_parameters_in_float32():
    model = cnn((3,), (5,), 3, batch_norm=True, dtype=jnp.bfloat16)
    x = jnp.ones((2, 4, 4, 1))
    params, state = model.init(jax.random.key(0), x)
    y, tape = model.forward(params, x, state, train=True)
    dparams, dx = model.backward(tape, jnp.ones_like(y))
    assert y.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((params, state, tape.state, dparams, dx)))


def test_messages():
    with pytest.raises(ValueError, match="mlp: features is empty"):
        mlp(())
    with pytest.raises(ValueError, match="Dense: features is 0, expected a positive integer"):
        mlp((3, 0))
    with pytest.raises(ValueError, match="Dense: features is 0"):
        cnn(classes=0)
    with pytest.raises(TypeError, match="serial: expected layers or ops, got tanh"):
        mlp((3, 2), jnp.tanh)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cnn(kernel=(3, 3))
    with pytest.raises(ValueError, match="Conv: x has 2 dimensions, expected at least 3"):
        cnn().init(jax.random.key(0), jnp.ones((8, 8)))
    with pytest.raises(ValueError, match=r"conv: a window of .* does not fit"):
        cnn(padding="VALID", pool=(4, 4)).init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
