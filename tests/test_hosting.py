"""Models of ours inside models of Flax and Equinox: outputs, gradients and state are those of ours alone, through our rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop import layers, ops
from fbackprop.layers import serial

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 5))
MODEL = serial(layers.Dense(6), layers.BatchNorm(momentum=0.5), ops.gelu, layers.Dropout(0.5), layers.Dense(3))
PLAIN = serial(layers.Dense(6), ops.step_ste, layers.Dense(3))  # whose gradient passes the step only through the rule


def close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), a, b)


def test_linen_module_inside_a_linen_model():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(fb.to_flax(MODEL, name="ours")(x, train=train))

    net = Net()
    variables = net.init({"params": KEY}, X)
    own = variables["params"]["ours"]
    assert own["layers"]["0"]["kernel"].shape == (5, 6)
    assert variables["batch_stats"]["ours"]["layers"]["1"]["mean"].shape == (6,)
    np.testing.assert_array_equal(variables["batch_stats"]["ours"]["layers"]["1"]["mean"], 0)

    def loss(params, train):
        given = {**variables, "params": params}
        y, new = net.apply(given, X, train=train, mutable=["batch_stats"], rngs={"dropout": KEY})
        return jnp.sum(y**2), new

    (_, new), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(variables["params"], True)
    assert not np.allclose(new["batch_stats"]["ours"]["layers"]["1"]["mean"], 0)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    params = {"layers": (own["layers"]["0"], own["layers"]["1"], {}, {}, own["layers"]["4"])}
    state = MODEL.init(KEY, X)[1]
    dense = variables["params"]["Dense_0"]
    want = MODEL(params, X, state) @ dense["kernel"] + dense["bias"][None]
    close(net.apply(variables, X), want)
    # The same dropout as ours with the key of the stream: gradients agree where nothing is drawn.
    ours = jax.grad(lambda p: jnp.sum((MODEL(p, X, state) @ dense["kernel"] + dense["bias"][None]) ** 2))(params)
    theirs = jax.grad(lambda p: loss(p, False)[0])(variables["params"])["ours"]["layers"]
    close([ours["layers"][i] for i in (0, 1, 4)], [theirs[i] for i in ("0", "1", "4")])


def test_linen_runs_our_rules():
    pytest.importorskip("flax")
    module = fb.to_flax(PLAIN)
    variables = module.init(KEY, X)
    gradient = jax.grad(lambda v: module.apply(v, X).sum())(variables)["params"]["layers"]["0"]["kernel"]
    assert jnp.abs(gradient).max() > 0  # the straight-through step lets it through
    with pytest.raises(ValueError, match="needs a random key"):
        fb.to_flax(layers.Dropout(0.5)).apply({}, X, train=True)


def test_nnx_module():
    nnx = pytest.importorskip("flax.nnx")
    module = fb.to_nnx(MODEL, X, rngs=nnx.Rngs(0))
    first = nnx.state(module, nnx.Param)
    assert len(jax.tree.leaves(first)) == 6

    @nnx.jit
    def gradient(module):
        return nnx.grad(lambda module: jnp.sum(module(X) ** 2))(module)

    found = gradient(module)
    assert jax.tree.structure(found) == jax.tree.structure(first)
    mean = module.state["layers"]["1"]["mean"].get_value()
    assert not np.allclose(mean, 0)
    module.eval()
    params, state = MODEL.init(KEY, X)
    values = jax.tree.leaves(nnx.state(module, nnx.Param))
    params = jax.tree.unflatten(jax.tree.structure(params), values)
    state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(nnx.state(module, nnx.BatchStat)))
    close(module(X), MODEL(params, X, state))
    assert np.array_equal(mean, module.state["layers"]["1"]["mean"].get_value())


def test_equinox_module():
    eqx = pytest.importorskip("equinox")
    params, _ = PLAIN.init(KEY, X)
    module = fb.to_equinox(PLAIN, params)
    net = eqx.nn.Sequential([module, eqx.nn.Lambda(jnp.tanh)])
    close(net(X), jnp.tanh(PLAIN(params, X)))
    found = eqx.filter_jit(eqx.filter_grad(lambda m: m(X).sum()))(module)
    close(found.params, jax.grad(lambda p: PLAIN(p, X).sum())(params))


def test_equinox_module_with_state():
    eqx = pytest.importorskip("equinox")
    params, state = MODEL.init(KEY, X)
    module, held = eqx.nn.make_with_state(fb.to_equinox)(MODEL, params, state)

    @eqx.filter_jit
    def step(module, held):
        def loss(module):
            y, new = module(X, held, key=KEY)
            return jnp.sum(y**2), new

        return eqx.filter_value_and_grad(loss, has_aux=True)(module)

    (value, new), found = step(module, held)

    def ours(params):
        y, after = MODEL.apply(params, X, state, KEY, True)
        return jnp.sum(y**2), after

    (want, after), gradient = jax.value_and_grad(ours, has_aux=True)(params)
    close((value, found.params, new.get(module.index)), (want, gradient, after))
    quiet = eqx.nn.inference_mode(module)
    y, same = quiet(X, new)
    close(y, MODEL(params, X, after))
    close(same.get(module.index), after)


def test_bad_input_gets_a_sentence(monkeypatch):
    with pytest.raises(TypeError, match="to_flax: expected a layer or model of fbackprop, got relu"):
        fb.to_flax(ops.relu)  # type: ignore[arg-type]
    from fbackprop import hosting

    monkeypatch.setattr(hosting.importlib, "import_module", lambda name: exec(f"raise ModuleNotFoundError({name!r})"))
    hosting._equinox_classes.cache_clear()
    with pytest.raises(ImportError, match="to_equinox: Equinox is not installed; pip install equinox"):
        fb.to_equinox(PLAIN, {})
