"""What people get wrong: each call is refused with a sentence that names the op or layer, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

import fbackprop as fb
from fbackprop import layers as L
from fbackprop.rules import RULES

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 24).reshape(4, 6)
SEQUENCE = jnp.ones((2, 5, 6))
OWN = [name for name, rule in RULES.items() if rule.reference.__module__.startswith("fbackprop.")]


def refused(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", OWN)
def test_what_a_signature_says_holds_for_every_op(name):
    rule = RULES[name]
    args, options = rule.samples[0].make()
    bound = rule.signature.bind(*args, **options)
    bound.apply_defaults()

    def call(argument, value):
        return lambda: rule.op(**{**bound.arguments, argument: value})

    for argument, parameter in rule.signature.parameters.items():
        if parameter.annotation in (ArrayLike, ArrayLike | None) and argument not in rule.static:
            wrong = {"abc": "'abc'", (1.0, 2.0): "a tuple"} | ({None: "None"} if parameter.annotation == ArrayLike else {})
            for value, said in wrong.items():
                assert str(refused(call(argument, value))).startswith(f"{name}: {argument} is {said}, expected an array")
        if parameter.annotation is bool:
            error = refused(call(argument, "none"))
            assert str(error) == f"{name}: {argument} is 'none', expected True or False."
    assert "'bogus'" in str(refused(lambda: rule.op(*args, **options, bogus=1)))


WRONG_CALLS = [
    (lambda: fb.relu({"kernel": X}), "relu: x is a dict, expected an array"),
    (lambda: fb.relu([1.0, 2.0]), "relu: x is a list, expected an array; jnp.asarray makes one"),
    (lambda: jax.jit(lambda x: fb.relu([x, x]))(X), "relu: x is a list"),
    (lambda: fb.relu.forward(None), "relu: x is None, expected an array"),
    (lambda: fb.without_rules(fb.gelu)(X, approximate="tanh"), "gelu: approximate is 'tanh', expected True or False"),
    (lambda: fb.softmax(X, axs=1), r"'axs' \(did you mean axis\?\); the signature is softmax\(x, axis=-1, where=None\)"),
    (lambda: fb.softmax(X, axis=3.7), "softmax: axis is 3.7, expected an integer, a tuple of integers or None"),
    (lambda: fb.softmax(X, where=X), r"softmax: .*where .*boolean.* \(given: x float32\[4, 6\], where float32\[4, 6\]\)"),
    (lambda: fb.dense(X, X.T, precision="bogus"), r"(?s)dense: Precision .*precision 'bogus'\)"),
    (lambda: fb.elu(X, X[0, :5]), r"elu: .*shapes.* \(given: x float32\[4, 6\], alpha float32\[5\]\)"),
    (lambda: fb.dropout(X, 0.5, 3), r"dropout: .*key data.* \(given: x float32\[4, 6\], rate 0.5, key 3\)"),
    (lambda: fb.silu.forward(X + 1j), "silu: its backward by hand is for real numbers"),
    (lambda: L.Dense(3).init(X, KEY), r"Dense.init: key is float32\[4, 6\], expected a random key"),
    (lambda: L.serial(L.Dense(3)).init(X, KEY), r"serial: key is float32\[4, 6\], expected a random key"),
    (lambda: L.serial(L.Dropout(0.5))({"layers": ({},)}, "abc"), "serial: x is 'abc', expected an array"),
    (lambda: L.serial(fb.relu).apply({"layers": ({},)}, X, (), 3, True), "serial: key is 3, expected a random key"),
    (lambda: L.Dense(3)(L.Dense(3).init(KEY, X), X), "Dense: params is a tuple, .* init gives two things, params and state"),
    (lambda: L.serial(L.Dense(3))(L.serial(L.Dense(3)).init(KEY, X), X), r"serial: params .*\(init gives params and state\)"),
    (lambda: L.Dense(3).init(KEY, None), "Dense: x is None, expected an array"),
    (lambda: L.Dropout(0.5).apply({}, X, (), "key", True), "Dropout: key is 'key', expected a random key"),
    (lambda: L.Dropout("0.5"), "Dropout: rate is '0.5', expected a probability"),
    (lambda: L.Lstm(3).init(None, SEQUENCE), "Lstm.init: key is None, expected a random key"),
    (lambda: L.Lstm(3).init(KEY, SEQUENCE[..., :0]), "Lstm: the last axis of x has no elements"),
    (lambda: L.Lstm(3).init(KEY, X), r"Lstm: x has 2 dimensions, expected \[batch, time, features\]"),
    (lambda: L.Lstm(3)({"w": X}, SEQUENCE), r"Lstm: params has the leaves \['w'\], expected \['bias', 'kernel', 'recurrent"),
    (lambda: L.ConvLstm(3, (3, 3)).init(KEY, SEQUENCE), r"ConvLstm: .* expected \[batch, time, \*space, channels\]"),
    (lambda: L.Bidirectional(L.Lstm(3), L.Lstm(3))({}, SEQUENCE), r"Bidirectional: .*\['backward', 'forward'\]"),
    (lambda: L.Bidirectional([1], L.Lstm(3)), r"Bidirectional: expected recurrent layers, such as Lstm\(64\), got \[1\]"),
    (lambda: L.parallel(L.Dense(3)).init(None, X), "Dense.init: key is None"),
    (lambda: L.parallel(fb.relu)({"layers": ({},)}, X, {"a": 1}), r"parallel: state is a dict of \['a'\]"),
    (lambda: L.parallel(L.Flatten(), fb.relu)({"layers": ({}, {})}, SEQUENCE), "parallel: outputs of .* but for the last axis"),
    (lambda: L.repeat(L.Dense(6), 3)(L.Dense(6).init(KEY, X)[0], X), r"repeat: a leaf .* expected a leading axis of 3"),
    (lambda: L.repeat(L.Dense(6), 3).init(None, X), "repeat: key is None"),
    (lambda: L.WeightNorm(L.Dense(3), variable_filter="kernel"), "WeightNorm: variable_filter is 'kernel', expected words"),
    (lambda: L.SpectralNorm(L.Dense(3))({}, X, L.SpectralNorm(L.Dense(3)).init(KEY, X)[1]), "SpectralNorm: params .*'kernel'"),
    (lambda: fb.models.gpt(7, 1, 4, 1, 8).init(None, jnp.zeros((1, 4), int)), r"\w+.init: key is None"),
]  # fmt: skip


SAVED = {
    name: op.forward(X, *others)[1] for name, op, *others in (("dense", fb.dense, X.T), ("norm", fb.layer_norm, X[0], X[0]))
}
STEPS, WEIGHTS = jnp.ones((3, 2, 4)), (jnp.ones((4, 12)), jnp.ones((3, 12)))

WRONG_CALLS += [
    (lambda: fb.dense.backward(SAVED["dense"], jnp.ones((4, 2))), r"dense.backward: dy has shape \(4, 2\), y had \(4, 4\)"),
    (lambda: fb.layer_norm.backward(SAVED["norm"], X[:1]), r"layer_norm.backward: dy has shape \(1, 6\), y had \(4, 6\)"),
    (
        lambda: fb.lstm.backward(fb.lstm.forward(STEPS, *WEIGHTS)[1], STEPS),
        "lstm.backward: dy is .*, expected the structure of y",
    ),
    (lambda: fb.einsum_dense(X, X, einsum_str=3), r"einsum_dense: expected an equation such as .* \(3, x \(4, 6\)"),
    (lambda: L.Dense(3, kernel_init="he_normal").init(KEY, X), "Dense: kernel_init is 'he_normal', expected a function"),
    (lambda: L.Lstm(3, dtype="f32").init(KEY, SEQUENCE), "Lstm: dtype is 'f32', expected a dtype, such as 'float32'"),
    (lambda: L.Conv(3, None), "Conv: kernel_size is None, expected one positive integer for each dimension"),
    (lambda: L.ConvLstm(3, 3), r"ConvLstm: kernel_size is 3, expected one for each axis of space, such as \(3, 3\)"),
    (lambda: fb.spectral_norm(X, X[:1], epsilon=-1.0), "spectral_norm: epsilon is -1.0, expected a number from 0"),
    (lambda: L.repeat(L.Dense(6), 3).init(X, KEY), r"repeat: key is float32\[4, 6\], expected a random key"),
    (lambda: fb.rotary_embedding(jnp.ones((3, 2, 4)), base=-1.0), "rotary_embedding: base is -1.0, expected a number above 0"),
    (lambda: fb.smooth_labels(X, 0.1, where=X[:1] > 0), r"smooth_labels: where must be .* got bool where \(1, 6\), labels \(4"),
    (lambda: fb.smooth_labels(X, 0.1, where=X), "smooth_labels: where must be booleans of the shape of labels, got float32"),
    (lambda: L.MaxPool(2), r"MaxPool: window_shape must name a size for each spatial dimension, such as \(2, 2\); got 2"),
    (lambda: L.AdaptiveAvgPool(7), r"AdaptiveAvgPool: output_size must name a size .* such as \(7, 7\); got 7"),
    (lambda: L.Einsum(3, "ab->ab"), "Einsum: expected the shape of the kernel .*got shape 3"),
    (lambda: fb.spectral_norm(X, X[:1], n_steps="a"), "spectral_norm: n_steps is 'a'"),
    (lambda: fb.pool(jnp.ones((1, 4, 4, 1)), 0.0, None, (2, 2)), "pool: reduce_fn is None, expected a function"),
    (
        lambda: fb.make_fenchel_young_loss(fb.logsumexp)(X, X[:, :3]),
        r"fenchel_young_loss: .* got scores \(4, 6\), targets \(4, 3\)",
    ),
    (lambda: fb.relevance(3, {}, X), "relevance: expected a model or a function, got int"),
    (lambda: fb.health(3, {"a": X}), "health: expected a loss of params, got int"),
    (lambda: fb.from_flax(L.Dense, {"params": {}}), "from_flax: expected a layer or model of fbackprop, got Dense"),
    (lambda: fb.to_nnx(L.Dense(3), X, rngs=0), "to_nnx: rngs is a int, expected an nnx.Rngs"),
    (lambda: fb.to_equinox(L.Dense(3), L.Dense(3).init(KEY, X)), "to_equinox: params is a tuple, .* init gives two things"),
]


@pytest.mark.parametrize("case", range(len(WRONG_CALLS)))
def test_it_is_said_in_a_sentence(case):
    call, sentence = WRONG_CALLS[case]
    error = refused(call)
    assert re.search(sentence, str(error)), error


def test_an_error_of_jax_keeps_its_kind():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda t: fb.rms_norm(X, X[0], t > 0 if t else 1e-6))(1.0)


def test_complex_numbers_have_the_gradient_of_the_definition():
    z = X + 1j * jnp.cos(X)
    for op in (fb.silu, fb.mish, fb.glu, fb.tanh):
        ours, theirs = (jax.grad(lambda z, f=f: jnp.abs(f(z)).sum())(z) for f in (op, fb.without_rules(op)))
        np.testing.assert_array_equal(ours, theirs)


def test_integers_are_computed_as_floats_where_a_layer_would_round():
    x = jnp.arange(12).reshape(2, 6)
    for layer in (L.repeat(L.Dense(6), 2), L.PReLU(negative_slope_init=0.5)):
        params, _ = layer.init(KEY, x)
        assert layer(params, -x).dtype == jnp.float32
        np.testing.assert_allclose(layer(params, -x), layer(params, -x.astype(jnp.float32)))


def test_a_module_of_nnx_without_a_stream_for_dropout_trains_where_nothing_is_dropped():
    nnx = pytest.importorskip("flax.nnx")
    module = fb.to_nnx(L.Dense(3), X, rngs=nnx.Rngs(params=0))
    assert module(X).shape == (4, 3)


def test_no_rows_have_no_losses():
    logits, labels = jnp.zeros((0, 5)), jnp.zeros(0, int)
    for loss in (fb.softmax_cross_entropy_with_integer_labels, fb.multiclass_hinge_loss, fb.multiclass_sparsemax_loss):
        assert loss(logits, labels).shape == (0,)
        assert jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits).shape == (0, 5)


def test_numbers_that_would_give_nan_are_refused():
    error = refused(lambda: fb.triplet_margin_loss(X, X, X, norm_degree=float("nan")))
    assert str(error) == "triplet_margin_loss: norm_degree must be 1 or more, got nan."
    norms = [n for n in OWN if "epsilon" in RULES[n].static]
    assert len(norms) >= 10
    for name in norms:
        rule = RULES[name]
        args, options = rule.samples[0].make()
        for epsilon in (-1.0, float("nan"), "1e-6", None):
            error = refused(lambda: rule.op(*args, **{**options, "epsilon": epsilon}))
            assert str(error) == f"{name}: epsilon is {epsilon!r}, expected a number from 0."
    assert (
        str(refused(lambda: fb.batch_norm(X, train=True, momentum=5.0)))
        == "batch_norm: momentum is 5.0, expected a number from 0 to 1."
    )
