"""Layers with parameters or options beyond the first ones: by hand, against their twin without rules, and against Flax."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop import layers, ops
from fbackprop.layers import named, parallel, remat, repeat, residual, serial

KEY = jax.random.key(3)
STEPS, IMAGES = (2, 5, 3), (2, 4, 6, 3)


@dataclasses.dataclass
class Case:
    layer: Any
    shape: tuple[int, ...]
    flax: Any = None
    train: bool = False
    options: dict = dataclasses.field(default_factory=dict)
    flax_options: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return f"{self.layer!r}{'-train' if self.train else ''}"


CASES = [
    Case(layers.PReLU(negative_slope_init=0.3), (3, 4), nn.PReLU(negative_slope_init=0.3)),
    Case(layers.DenseGeneral((2, 5)), (2, 3, 4), nn.DenseGeneral((2, 5))),
    Case(layers.DenseGeneral(5, axis=(1, -1)), (2, 3, 6, 4), nn.DenseGeneral(5, axis=(1, -1))),
    Case(layers.DenseGeneral(5, axis=-1, batch_dims=(0,)), (2, 3, 4), nn.DenseGeneral(5, batch_dims=(0,))),
    Case(layers.Einsum((4, 2, 5), "...c,cnh->...nh"), (2, 3, 4), nn.Einsum((4, 2, 5), "abc,cnh->abnh")),
    Case(layers.Einsum((3, 4, 5), "bnc,nch->bnh"), (2, 3, 4), nn.Einsum((3, 4, 5), "bnc,nch->bnh")),
    Case(layers.ConvTranspose(4, (3, 3), strides=(2, 2)), IMAGES, nn.ConvTranspose(4, (3, 3), strides=(2, 2))),
    Case(
        layers.ConvTranspose(4, (3,), 2, "VALID", transpose_kernel=True),
        (2, 5, 3),
        nn.ConvTranspose(4, (3,), (2,), "VALID", transpose_kernel=True),
    ),
    Case(layers.RMSNorm(), (3, 6), nn.RMSNorm()),
    Case(layers.GroupNorm(num_groups=3), (*IMAGES[:-1], 6), nn.GroupNorm(num_groups=3, use_fast_variance=False)),
    Case(
        layers.GroupNorm(num_groups=None, group_size=2),
        (2, 4, 6),
        nn.GroupNorm(num_groups=None, group_size=2, use_fast_variance=False),
    ),
    Case(layers.InstanceNorm(), IMAGES, nn.InstanceNorm(use_fast_variance=False)),
    Case(layers.MinPool((2, 2), (2, 2)), IMAGES),
    Case(layers.SumPool((2, 2)), IMAGES),
    Case(layers.AdaptiveAvgPool((2, 3)), IMAGES),
    Case(layers.AdaptiveMaxPool((2, 3)), IMAGES),
    Case(layers.GlobalAvgPool(), IMAGES),
    Case(layers.GlobalMaxPool(keepdims=True), IMAGES),
    Case(layers.StochasticDepth(0.5), (6, 4), train=True),
    Case(residual(serial(layers.Dense(4), layers.StochasticDepth(0.5))), (6, 4), train=True),
    Case(layers.MultiHeadAttention(2), (2, 5, 6), nn.MultiHeadDotProductAttention(2)),
    Case(
        layers.MultiHeadAttention(2, qkv_features=8, out_features=3, use_bias=False),
        (2, 5, 6),
        nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=3, use_bias=False),
    ),
    Case(layers.MultiHeadAttention(2, normalize_qk=True), (2, 5, 16), nn.MultiHeadDotProductAttention(2, normalize_qk=True)),
    Case(layers.MultiHeadAttention(2, dropout_rate=0.5), (2, 5, 6), train=True),
    Case(layers.MultiHeadAttention(4, num_kv_heads=2, is_causal=True, rope_base=1e4, soft_cap=5.0), (2, 5, 16)),
    Case(layers.Rnn(4, activation="relu", reverse=True), STEPS),
    Case(layers.Rnn(4), STEPS, options={"lengths": jnp.array([3, 5])}),
    Case(layers.Lstm(4), STEPS),
    Case(layers.Gru(4, segments=2), STEPS),
    Case(layers.Bidirectional(layers.Lstm(4), layers.Gru(2)), STEPS),
    Case(layers.ConvLstm(2, (3,)), (2, 3, 4, 2)),
    Case(parallel(layers.Dense(4), serial(layers.Dense(3), ops.tanh)), (3, 4)),
    Case(parallel(layers.Dense(4), layers.BatchNorm(), merge="sum"), (3, 4), train=True),
    Case(repeat(serial(layers.Dense(4), layers.Dropout(0.5)), 2), (3, 4), train=True),
    Case(repeat(residual(serial(layers.Dense(4), layers.BatchNorm(), ops.gelu)), 3), (3, 4), train=True),
    Case(remat(serial(named(layers.Dense(4), "inner"), ops.gelu, layers.Dense(2)), names=("inner",)), (3, 4)),
    Case(layers.WeightNorm(layers.Dense(4)), (3, 5)),
    Case(layers.WeightNorm(serial(layers.Dense(4), ops.relu, layers.Dense(2)), feature_axes=None), (3, 5)),
    Case(layers.SpectralNorm(layers.Dense(4)), (3, 5), train=True),
    Case(layers.SpectralNorm(serial(layers.Conv(4, (3,)), layers.BatchNorm())), (2, 5, 3), train=True),
]


def random(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def close(got, want, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max(initial=0)))


FAST = {"PReLU", "DenseGeneral", "ConvTranspose", "GroupNorm", "StochasticDepth", "Parallel", "Repeat"}


def params():
    """Slow are those of which a sibling is tested: one kind of code makes all layers of one op, another those of several."""
    names = [case.layer.name for case in CASES]
    slow = [name in names[:i] or name not in FAST for i, name in enumerate(names)]
    return [pytest.param(case, id=str(case), marks=pytest.mark.slow if s else ()) for case, s in zip(CASES, slow)]


@pytest.mark.parametrize("case", params())
def test_by_hand(case):
    """Forward and backward by hand, with the tape between two programs, beside Flax, or else the twin without rules."""
    layer, x = case.layer, random(jax.ShapeDtypeStruct(case.shape, jnp.float32), 1)
    own, state = jax.eval_shape(layer.init, KEY, x) if case.flax else layer.init(KEY, x)
    given = random(own)
    if case.flax is not None:
        theirs = jax.eval_shape(case.flax.init, KEY, x)["params"]
        assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, own)

    def run(params, x):
        return layer.apply(params, x, state, KEY, case.train, **case.options)

    def reference(params, x):
        return (case.flax.apply({"params": params}, x), state) if case.flax else fb.without_rules(run)(params, x)

    @jax.jit
    def differentiated(params, x, dy):
        y, pullback, new = jax.vjp(reference, params, x, has_aux=True)
        return y, new, pullback(dy)

    dy = random(jax.eval_shape(run, given, x)[0], 2)
    want = differentiated(given, x, dy)
    if case.options:
        y, pullback, new = jax.vjp(run, given, x, has_aux=True)
        found = y, new, pullback(dy)
    else:
        y, tape = jax.jit(lambda p, x: layer.forward(p, x, state, KEY, case.train))(given, x)
        found = y, tape.state, jax.jit(layer.backward)(tape, dy)
    close(found, want, 1e-4)


def gates(cell, names):
    """Flax's matrices of each gate, side by side, and the bias of those that have one."""
    kernels, biases = [], []
    for name in names:
        kernels.append(cell[name]["kernel"])
        biases += [cell[name]["bias"]] if "bias" in cell[name] else []
    return jnp.concatenate(kernels, -1), jnp.concatenate(biases) if biases else None


@pytest.mark.parametrize("name", ["bidirectional", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lstm", "gru", "rnn"))])
def test_recurrent_layers_beside_flax(name):
    x = random(jax.ShapeDtypeStruct(STEPS, jnp.float32), 1)

    def lstm_params(cell):
        kernel, _ = gates(cell, ("ii", "if", "ig", "io"))
        recurrent, bias = gates(cell, ("hi", "hf", "hg", "ho"))
        return {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}

    def gru_params(cell):
        kernel, bias = gates(cell, ("ir", "iz", "in"))
        recurrent, last = gates(cell, ("hr", "hz", "hn"))
        return {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias, "recurrent_bias": last}

    def rnn_params(cell):
        return {"kernel": cell["i"]["kernel"], "recurrent_kernel": cell["h"]["kernel"], "bias": cell["i"]["bias"]}

    if name == "bidirectional":
        theirs: Any = nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.GRUCell(4)))
        ours: Any = layers.Bidirectional(layers.Lstm(4), layers.Gru(4))
        variables = random(jax.eval_shape(theirs.init, KEY, x))
        cells = list(variables["params"].values())
        lstm, gru = sorted((c.get("cell", c) for c in cells), key=lambda c: "ii" not in c)
        params = {"forward": lstm_params(lstm), "backward": gru_params(gru)}
    else:
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}[name](4)
        theirs, ours = nn.RNN(cell), {"lstm": layers.Lstm, "gru": layers.Gru, "rnn": layers.Rnn}[name](4)
        variables = random(jax.eval_shape(theirs.init, KEY, x))
        params = {"lstm": lstm_params, "gru": gru_params, "rnn": rnn_params}[name](variables["params"]["cell"])
    close(ours(params, x), theirs.apply(variables, x))


def test_conv_lstm_beside_flax():
    x = random(jax.ShapeDtypeStruct((2, 3, 5, 4, 2), jnp.float32), 1)
    theirs, ours = nn.RNN(nn.ConvLSTMCell(3, (3, 3))), layers.ConvLstm(3, (3, 3))
    variables = random(jax.eval_shape(theirs.init, KEY, x))
    cell = variables["params"]["cell"]

    def ordered(a):  # Flax's gates stand in the order i, g, f, o, and one is added to f
        i, g, f, o = jnp.split(a, 4, -1)
        return jnp.concatenate([i, f, g, o], -1)

    bias = cell["ih"]["bias"] + cell["hh"]["bias"]
    bias = ordered(bias + jnp.repeat(jnp.array([0.0, 0.0, 1.0, 0.0]), 3))
    params = {"kernel": ordered(cell["ih"]["kernel"]), "recurrent_kernel": ordered(cell["hh"]["kernel"]), "bias": bias}
    close(ours(params, x), theirs.apply(variables, x))


def test_weight_and_spectral_norm_beside_flax():
    x = random(jax.ShapeDtypeStruct((3, 5), jnp.float32), 1)
    theirs = nn.WeightNorm(nn.Dense(4))
    variables = random(jax.eval_shape(theirs.init, KEY, x))["params"]
    layer = variables.get("layer_instance", variables.get("Dense_0"))
    scale = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables) if "scale" in jax.tree_util.keystr(path))
    params = {"layer": layer, "scale": {"kernel": scale}}
    close(layers.WeightNorm(layers.Dense(4))(params, x), theirs.apply({"params": variables}, x))

    spectral = nn.SpectralNorm(nn.Dense(4))
    variables = random(jax.eval_shape(lambda k, x: spectral.init(k, x, update_stats=True), KEY, x))
    dense = next(v for v in variables["params"].values() if "kernel" in v)

    def state_of(variables):
        leaves = jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
        found = {"u" if "/u" in jax.tree_util.keystr(path) else "sigma": leaf for path, leaf in leaves}
        return {"layer": (), **{name: {"kernel": leaf} for name, leaf in found.items()}}

    y, new = spectral.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    close(layers.SpectralNorm(layers.Dense(4)).apply(dense, x, state_of(variables), train=True), (y, state_of(new)))


def test_attention_to_another_sequence_and_a_mask():
    layer, flax = layers.MultiHeadAttention(2), nn.MultiHeadDotProductAttention(2)
    x, context = (random(jax.ShapeDtypeStruct((2, n, 6), jnp.float32), n) for n in (3, 5))
    params = random(jax.eval_shape(flax.init, KEY, x, context)["params"])
    mask = jax.random.bernoulli(KEY, 0.7, (2, 1, 3, 5)).at[..., 0].set(True)
    got, _ = layer.apply(params, x, context=context, mask=mask)
    close(got, flax.apply({"params": params}, x, context, mask=mask))


def test_remat_keeps_the_input_and_what_is_named():
    body = serial(named(layers.Dense(64), "inner"), ops.gelu, layers.Dense(64))
    x = jnp.zeros((128, 64))
    params, _ = body.init(KEY, x)

    def kept(layer):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(layer.forward(params, x)[1]))

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept(remat(body)) <= weights + x.nbytes
    assert weights + x.nbytes < kept(remat(body, names=("inner",))) <= weights + 2 * x.nbytes < kept(body)


BAD = [
    (lambda: layers.DenseGeneral(4, axis=2).init(KEY, jnp.ones((2, 3))), "DenseGeneral: axis 2 is out of range"),
    (lambda: layers.MultiHeadAttention(3).init(KEY, jnp.ones((2, 3, 4))), "4 features do not divide into 3 heads"),
    (lambda: layers.MultiHeadAttention(3, num_kv_heads=2), "3 heads cannot share 2"),
    (lambda: layers.Lstm(0), "Lstm: features is 0"),
    (lambda: layers.Lstm(3).init(KEY, jnp.ones((2, 3))), r"expected \[batch, time, features\]"),
    (lambda: layers.Bidirectional(layers.Dense(3), layers.Lstm(3)), "expected recurrent layers"),
    (lambda: layers.StochasticDepth(1.5), "expected a probability"),
    (lambda: layers.StochasticDepth(0.5).apply({}, jnp.ones((2, 3)), train=True), "needs a random key"),
    (lambda: layers.WeightNorm(ops.relu), "WeightNorm: expected a layer"),  # type: ignore[arg-type]
    (lambda: layers.SpectralNorm(layers.Dense(2)).apply({}, jnp.ones((2, 3))), "expected layer, u and sigma"),
    (lambda: repeat(layers.Dense(4), 2).init(KEY, jnp.ones((2, 3))), "repeat: .* expected the same shape"),
    (lambda: repeat(layers.Dense(4), 0), "repeat: times is 0"),
    (lambda: parallel(), "parallel: expected layers"),
    (lambda: remat(layers.Dense(3), "dots"), "remat: policy is 'dots'"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
