"""Every number of the documents' examples, from the library's own ops and layers, in float64 to 1e-9.

``worked_examples.json`` holds the systems of five tutorials on backpropagation with the right numbers; ``document_says`` and
the notes tell where a document errs. The documents write weights (out, in) and multiply W x; the library (in, out) and x W.
Each system is computed in the documents' notation by ops, forward and backward by hand, and in ours by a model.
A test for each document compares *all* numbers of its entry, so that none is left out by mistake.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb

EXAMPLES = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())
GIVEN = {"source", "note", "inputs", "document_says"}  # what an entry tells, in contrast to what it computes


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(value):
    return jnp.asarray(value, jnp.float64)


def compare(expected, found, where=""):
    """Every number of ``expected`` against ``found``, which must have nothing else."""
    if isinstance(expected, dict):
        expected = {k: v for k, v in expected.items() if k not in GIVEN}
        assert set(expected) == set(found), f"{where}: expected {sorted(expected)}, computed {sorted(found)}"
        for key in expected:
            compare(expected[key], found[key], f"{where}/{key}")
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-9, atol=1e-9, err_msg=where)


def layer(W, x, b=None):
    """W x + b in the documents' notation: the forward of dense with the kernel Wᵀ."""
    return fb.dense.forward(x, W.T, b)


def layer_backward(saved, dy):
    dx, dkernel, db = fb.dense.backward(saved, dy)
    return dx, dkernel.T, db


def stack(*kernels_and_biases):
    """The parameters of a model in the documents' (out, in) notation, as serial wants them."""
    return {
        "layers": tuple(
            {} if p is None else {"kernel": p[0].T, **({} if len(p) == 1 else {"bias": p[1]})} for p in kernels_and_biases
        )
    }


def test_000_two_three_two():
    entry = EXAMPLES["000_two_three_two"]
    x, y, W1, W2 = (array(entry["inputs"][k]) for k in ("x", "y", "W1", "W2"))
    d1, saved1 = layer(W1, x)
    n1, saved2 = fb.sigmoid.forward(d1)
    d2, saved3 = layer(W2, n1)
    y_hat, saved4 = fb.sigmoid.forward(d2)
    loss, saved5 = fb.sum_of_squares.forward(y_hat, y)

    dy_hat, _ = fb.sum_of_squares.backward(saved5, jnp.ones(()))
    (dd2,) = fb.sigmoid.backward(saved4, dy_hat)
    dn1, dW2, _ = layer_backward(saved3, dd2)
    (dd1,) = fb.sigmoid.backward(saved2, dn1)
    dx, dW1, _ = layer_backward(saved1, dd1)

    # One path after another: the weight from input 0 to hidden node 0, through each output.
    paths = []
    for output in range(2):
        only = jnp.zeros(2).at[output].set(dd2[output])
        through, _, _ = layer_backward(saved3, only)
        (dd1_path,) = fb.sigmoid.backward(saved2, through)
        paths.append(layer_backward(saved1, dd1_path)[1][0, 0])
    found = {
        "forward": {"d1": d1, "n1": n1, "d2": d2, "y_hat": y_hat, "loss": loss},
        "gradients": {"W1": dW1, "W2": dW2, "x": dx},
        "paths_of_W1_0_0": {"through_output_0": paths[0], "through_output_1": paths[1], "sum": paths[0] + paths[1]},
    }
    compare(entry, found)

    model = fb.models.mlp((3, 2), fb.sigmoid, output_activation=fb.sigmoid, use_bias=False)
    gradient = jax.grad(lambda p, x: fb.sum_of_squares(model(p, x), y), (0, 1))
    dparams, dx = gradient(stack((W1,), None, (W2,), None), x)
    layers = dparams["layers"]
    compare(entry["gradients"], {"W1": layers[0]["kernel"].T, "W2": layers[2]["kernel"].T, "x": dx})


def test_001_and_gate():
    entry = EXAMPLES["001_and_gate"]
    step = entry["step"]
    inputs = array(step["inputs"])
    pre = fb.dense(inputs, array(step["weights"])[:, None], array([step["bias"]]))[:, 0]
    out, saved = fb.step_ste.forward(pre)
    compare(step["pre"], pre)
    assert out.tolist() == step["out"]
    assert fb.step_ste(jnp.zeros(())) == 0  # step(x) = 0 for x ≤ 0
    assert fb.step_ste.backward(saved, pre)[0].tolist() == pre.tolist()  # straight through

    model = fb.models.mlp((1,), output_activation=fb.sigmoid)
    targets = array(step["out"])[:, None]
    optimizer = optax.sgd(entry["sigmoid_training"]["learning_rate"])
    params = stack((jnp.zeros((1, 2)), jnp.zeros(1)), None)

    def loss(params):
        return fb.half_square(model(params, inputs), targets)

    def update(carry, _):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        changes, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, changes), opt_state), value

    (params, _), losses = jax.jit(lambda c: jax.lax.scan(update, c, None, length=1000))((params, optimizer.init(params)))
    losses = [*losses, loss(params)]
    training = entry["sigmoid_training"]
    compare(training["loss_at_step"], {n: losses[int(n)] for n in training["loss_at_step"]})
    neuron = params["layers"][0]
    compare(training["final"], [*neuron["kernel"][:, 0], neuron["bias"][0]])
    assert (model(params, inputs) > 0.5).ravel().tolist() == [False, False, False, True]


def test_001_one_neuron():
    entry = EXAMPLES["001_one_neuron"]
    x, w, b, t = (array(entry["inputs"][k]) for k in "xwbt")
    a, saved_a = layer(w.reshape(1, 1), x.reshape(1), b.reshape(1))
    y, saved_y = fb.sigmoid.forward(a)
    error, saved_e = fb.half_square.forward(y, t.reshape(1))
    dy, _ = fb.half_square.backward(saved_e, jnp.ones(()))
    (dy_da,) = fb.sigmoid.backward(saved_y, jnp.ones(1))
    (da,) = fb.sigmoid.backward(saved_y, dy)
    dx, dw, db = layer_backward(saved_a, da)
    found = {"a": a[0], "y": y[0], "error": error, "dE_dy": dy[0], "dy_da": dy_da[0]}
    compare(entry, {**found, "G_w": dw[0, 0], "G_b": db[0], "dE_dx": dx[0]})


def test_002_error_sharing():
    """Sharing in proportion to the contributions: each receives its contribution times R / Σ, the rule LRP-0.

    Its cotangent is R / Σ, relevance for a unit; weighted with what went forward it is the share. It is not the gradient,
    which would give both the same.
    """
    entry = EXAMPLES["002_error_sharing"]
    contributions, error, ones = array(entry["contributions"]), entry["error"], jnp.ones((2, 1))
    shared = fb.relevance(lambda kernel, x: fb.dense(x, kernel), ones, contributions, amount=error)
    compare(entry["shares"], shared.input)
    assert np.isclose(shared.input.sum(), error, atol=1e-12)  # nothing is lost
    # The same by hand, and with the contributions in the weights in place of the inputs.
    total, saved = fb.with_rules(fb.dense, "lrp-0").forward(contributions, ones)
    back, _, _ = fb.with_rules(fb.dense, "lrp-0").backward(saved, error / total)
    compare(entry["shares"], contributions * back)
    weighted = fb.relevance(lambda kernel, x: fb.dense(x, kernel), contributions[:, None], jnp.ones(2), amount=error)
    compare(entry["shares"], weighted.input)
    gradient, _, _ = fb.dense.backward(saved, jnp.full(1, error))
    assert gradient[0] == gradient[1]


def test_003_sigmoid_neuron():
    entry = EXAMPLES["003_sigmoid_neuron"]
    x, W, b, target = (array(entry["inputs"][k]) for k in ("x", "W", "b", "target"))
    target = target.reshape(1)

    def forward(W, b):
        S, saved_s = layer(W[None], x, b.reshape(1))
        p, saved_p = fb.sigmoid.forward(S)
        error, saved_e = fb.half_square.forward(p, target)
        return (S, p, error), (saved_s, saved_p, saved_e)

    (S, p, error), (saved_s, saved_p, saved_e) = forward(W, b)
    dp, _ = fb.half_square.backward(saved_e, jnp.ones(()))
    (dp_ds,) = fb.sigmoid.backward(saved_p, jnp.ones(1))
    (ds,) = fb.sigmoid.backward(saved_p, dp)
    dx, dW, db = layer_backward(saved_s, ds)

    updated = {}
    for rate in entry["updated"]:
        new_W, new_b = W - float(rate) * dW[0], b - float(rate) * db[0]
        (_, new_p, new_error), _ = forward(new_W, new_b)
        updated[rate] = {"W": new_W, "b": new_b, "prediction": new_p[0], "error": new_error}
    found = {
        "S": S[0],
        "prediction": p[0],
        "error": error,
        "dE_dp": dp[0],
        "dp_dS": dp_ds[0],
        "gradients": {"W": dW[0], "b": db[0], "x": dx},
        "updated": updated,
    }
    compare(entry, found)
    model = fb.models.mlp((1,), output_activation=fb.sigmoid)
    y, tape = model.forward(stack((W[None], b.reshape(1)), None), x)
    dparams, dx = model.backward(tape, fb.half_square.backward(fb.half_square.forward(y, target)[1], jnp.ones(()))[0])
    neuron = dparams["layers"][0]
    compare(entry["gradients"], {"W": neuron["kernel"][:, 0], "b": neuron["bias"][0], "x": dx})


def test_004_mlp():
    entry = EXAMPLES["004_mlp"]
    given = {k: array(v) for k, v in entry["inputs"].items()}
    x, target, rate = given["x"], given["y_true"].reshape(1), entry["inputs"]["learning_rate"]
    weights = {k: given[k] for k in ("W1", "b1", "W2", "b2", "W3", "b3")}

    def forward(w):
        a1, s1 = layer(w["W1"], x, w["b1"])
        h1, s2 = fb.relu.forward(a1)
        a2, s3 = layer(w["W2"], h1, w["b2"])
        h2, s4 = fb.relu.forward(a2)
        y, s5 = layer(w["W3"], h2, w["b3"])
        J, s6 = fb.half_square.forward(y, target)
        return {"a1": a1, "h1": h1, "a2": a2, "h2": h2, "y": y, "J": J}, (s1, s2, s3, s4, s5, s6)

    def backward(saved):
        s1, s2, s3, s4, s5, s6 = saved
        dy, _ = fb.half_square.backward(s6, jnp.ones(()))
        dh2, dW3, db3 = layer_backward(s5, dy)
        (da2,) = fb.relu.backward(s4, dh2)
        dh1, dW2, db2 = layer_backward(s3, da2)
        (da1,) = fb.relu.backward(s2, dh1)
        dx, dW1, db1 = layer_backward(s1, da1)
        return {"W1": dW1, "W2": dW2, "W3": dW3, "b1": db1, "b2": db2, "b3": db3, "x": dx}

    def descend(w, gradient):
        return {k: v - rate * gradient[k] for k, v in w.items()}

    values, saved = forward(weights)
    gradients = backward(saved)
    updated = descend(weights, gradients)
    losses, w = [], weights
    for _ in entry["loss_by_step"]:
        now, saved = forward(w)
        losses.append(now["J"])
        w = descend(w, backward(saved))
    found = {
        "forward": values,
        "gradients": gradients,
        "updated": updated,
        "after_update": forward(updated)[0],
        "loss_by_step": losses,
    }
    compare(entry, found)
    # Two of three units of the first layer are dead after one step: their input is negative.
    assert (forward(updated)[0]["h1"] == 0).tolist() == [True, True, False]
    # Where the document errs, its numbers are not these.
    for name, printed in entry["document_says"].items():
        if name != "note":
            assert not np.allclose(values[name], printed, atol=0.05), name

    model = fb.models.mlp((3, 2, 1))
    params = stack((weights["W1"], weights["b1"]), None, (weights["W2"], weights["b2"]), None, (weights["W3"], weights["b3"]))
    optimizer = optax.sgd(rate)
    dparams, dx = jax.grad(lambda p, x: fb.half_square(model(p, x), target), (0, 1))(params, x)

    def documents(tree):
        return {
            f"{letter}{i + 1}": (layers["kernel"].T if letter == "W" else layers["bias"])
            for i, layers in enumerate(tree["layers"][::2])
            for letter in "Wb"
        }

    compare(entry["gradients"], {**documents(dparams), "x": dx})
    changes, _ = optimizer.update(dparams, optimizer.init(params))
    compare(entry["updated"], documents(optax.apply_updates(params, changes)))


def test_004_cnn():
    entry = EXAMPLES["004_cnn"]
    g = {k: array(v) for k, v in entry["inputs"].items()}
    image = g["X"][..., None]
    kernels = {k: g[k][..., None, None] for k in ("K1", "K2")}

    def forward(w):
        c1, s1 = fb.conv.forward(image, w["K1"], w["c1"].reshape(1), padding="VALID")
        c2, s2 = fb.conv.forward(c1, w["K2"], w["c2"].reshape(1), padding="VALID")
        d4, s4 = layer(w["W4"], c2.reshape(-1), w["b4"])
        logits, s5 = layer(w["W5"], d4, w["b5"])
        J, s6 = fb.softmax_cross_entropy_with_integer_labels.forward(logits, jnp.asarray(0))
        values = {"conv1": c1[..., 0], "conv2": c2[..., 0], "dense4": d4, "logits": logits, "softmax": fb.softmax(logits)}
        return {**values, "J": J}, (s1, s2, s4, s5, s6)

    def backward(saved):
        s1, s2, s4, s5, s6 = saved
        dlogits, *_ = fb.softmax_cross_entropy_with_integer_labels.backward(s6, jnp.ones(()))
        dd4, dW5, db5 = layer_backward(s5, dlogits)
        dflat, dW4, db4 = layer_backward(s4, dd4)
        dc1, dK2, dc2 = fb.conv.backward(s2, dflat.reshape(2, 2, 1))
        dX, dK1, dc1_bias = fb.conv.backward(s1, dc1)
        cut = {"K1": dK1[..., 0, 0], "K2": dK2[..., 0, 0], "c1": dc1_bias[0], "c2": dc2[0], "X": dX[..., 0]}
        return {**cut, "W4": dW4, "W5": dW5, "b4": db4, "b5": db5}

    weights = {**{k: g[k] for k in ("c1", "c2", "W4", "b4", "W5", "b5")}, **kernels}
    values, saved = forward(weights)
    gradients = backward(saved)
    moved = {k: v - entry["learning_rate"] * gradients[k].reshape(v.shape) for k, v in weights.items()}
    after = forward(moved)[0]["J"]
    rate = entry["learning_rate"]
    compare(entry, {"forward": values, "gradients": gradients, "learning_rate": rate, "J_after_update": after})

    model = fb.models.cnn((1, 1), (3,), 2, kernel_size=(2, 2), padding="VALID", activation=None)
    params = {
        "layers": (
            {"kernel": kernels["K1"], "bias": g["c1"].reshape(1)},
            {"kernel": kernels["K2"], "bias": g["c2"].reshape(1)},
            {},
            {"kernel": g["W4"].T, "bias": g["b4"]},
            {"kernel": g["W5"].T, "bias": g["b5"]},
        )
    }
    loss, labels = fb.softmax_cross_entropy_with_integer_labels, jnp.zeros(1, jnp.int32)
    logits, tape = model.forward(params, image[None])
    J, saved = loss.forward(logits, labels)
    dparams, dX = model.backward(tape, loss.backward(saved, jnp.ones(1))[0])
    first, second, _, fourth, fifth = dparams["layers"]
    compare(entry["forward"]["J"], J[0])
    compare(
        entry["gradients"],
        {
            "K1": first["kernel"][..., 0, 0],
            "c1": first["bias"][0],
            "K2": second["kernel"][..., 0, 0],
            "c2": second["bias"][0],
            "W4": fourth["kernel"].T,
            "b4": fourth["bias"],
            "W5": fifth["kernel"].T,
            "b5": fifth["bias"],
            "X": dX[0, ..., 0],
        },
    )


@pytest.mark.parametrize("name", list(EXAMPLES["vanishing_fixture"]["values"]))
def test_vanishing(name):
    """y ← σ(w y − w/2) stays at ½, where σ' = ¼: each layer multiplies the gradient by w/4 exactly."""
    w, n = (int(part.split("=")[1]) for part in name.split(","))
    kernel, bias = jnp.full((1, 1), float(w)), jnp.full(1, -w / 2)
    y, tapes = jnp.full(1, 0.5), []
    for _ in range(n):
        a, saved_a = fb.dense.forward(y, kernel, bias)
        y, saved_y = fb.sigmoid.forward(a)
        tapes.append((saved_a, saved_y))
    dy = jnp.ones(1)
    for saved_a, saved_y in reversed(tapes):
        dy, _, _ = fb.dense.backward(saved_a, *fb.sigmoid.backward(saved_y, dy))
    assert dy[0] == EXAMPLES["vanishing_fixture"]["values"][name]


def test_no_entry_is_forgotten():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")} | {"vanishing_fixture"}
    assert set(EXAMPLES) <= tested
