"""Other backward rules: values stay, backwards are their formulas, nothing goes stale, what has no rule is refused.

LRP is compared with its formulas in NumPy on the matrices of linear ops, and with zennit and captum where they are installed.
"""

import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as S

import fbackprop as fb
from fbackprop import layers as L
from fbackprop import table
from fbackprop.alternatives import METHODS, OtherRule, available, clip, lrp, relevance, reversal, with_rules
from fbackprop.rules import RULES, rule

X = jnp.asarray([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])
DY = jnp.asarray([1.0, -2.0, 3.0, -4.0, 5.0, 6.0])
GUIDED = {"relu": "guided"}
OWN, THEIRS = jnp.where(X > 0, DY, 0), jnp.where((X > 0) & (DY > 0), DY, 0)


def pulled(fn, *args, dy=DY):
    return jax.vjp(fn, *args)[1](dy)[0]


def equal(found, expected):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def close(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


# Values.


@pytest.mark.parametrize("method", METHODS)
def test_values_are_bit_for_bit_those_of_the_function(method):
    choice = {"clip-value": clip(value=0.1), "clip-norm": clip(norm=0.1)}.get(method, method)
    some = ("relu", "dense", "lstm", "max_pool", "softmax")  # of the methods that take every op
    made = {op: with_rules(RULES[op].op, {op: choice}) for op in (some if METHODS[method].every else available()[method])}
    known = METHODS["lrp-0"].rules if method.startswith("lrp-") and method != "lrp-0" else {}
    # LRP-0 leaves what is linear as it is; the other forms of LRP share its activations.
    made = {n: fn for n, fn in made.items() if isinstance(fn.rule, OtherRule) and METHODS[method].maker(n) is not known.get(n)}
    inputs = {n: fn.rule.samples[2 if n == "batch_norm" else 0].make(seed=0) for n, fn in made.items()}

    arrays = {n: [a for a in args if hasattr(a, "dtype")] for n, (args, _) in inputs.items()}

    @jax.jit
    def values(given):
        found = {}
        for n, arrays in given.items():
            args, options = inputs[n]
            own, other = (
                lambda *arrays, fn=fn, args=args, options=options: fn(*arrays, *args[len(arrays) :], **options)
                for fn in (RULES[n].op, made[n])
            )
            found[n] = own(*arrays), other(*arrays), jax.vjp(other, *arrays)[0]
        return found

    for op, (own, other, differentiated) in values(arrays).items():
        for a, b, c in zip(*map(jax.tree.leaves, (own, other, differentiated))):
            equal(a, b)
            equal(a, c)
        rule = made[op].rule
        assert (rule.name, rule.formula, rule.exact) == (op, METHODS[method].formula, False)
        assert rule.method.startswith(method)
        assert rule.keeps


# Formulas.


@pytest.mark.parametrize(
    ("choice", "dx"),
    [
        ("guided", THEIRS),
        ("deconvolution", jnp.maximum(DY, 0)),
        ("straight-through", DY),
        (clip(value=2.5), jnp.where(X > 0, jnp.clip(DY, -2.5, 2.5), 0)),
        (clip(norm=1.0), OWN / np.sqrt(91.0)),
        (clip(norm=100.0), OWN),
        (reversal(0.5), -0.5 * OWN),
        ("reversal", -OWN),
        ("lrp-0", OWN),
    ],
)
def test_relu_by_formula(choice, dx):
    close(pulled(with_rules(fb.relu, {"relu": choice}), X), dx)
    close(pulled(jax.jit(with_rules(lambda x: fb.relu(x), {"relu": choice})), X), dx)


def test_relu6_is_closed_above():
    x = jnp.asarray([-1.0, 1.0, 7.0])
    equal(pulled(with_rules(fb.relu6, "guided"), x, dy=jnp.ones(3)), [0, 1, 0])
    equal(pulled(with_rules(fb.relu6, "deconvolution"), x, dy=jnp.asarray([1.0, -1.0, 1.0])), [1, 0, 1])


def test_straight_through_is_what_the_straight_through_ops_do():
    for op in (fb.hard_tanh, fb.sigmoid):
        equal(pulled(with_rules(op, {op.__name__: "straight-through"}), X), pulled(fb.step_ste, X))
    slopes = jax.vjp(with_rules(lambda s: fb.leaky_relu(X, s), {"leaky_relu": "straight-through"}), jnp.float32(0.1))[1](DY)
    equal(slopes[0], 0)  # no other argument learns
    wide = pulled(with_rules(lambda x: fb.leaky_relu(x, jnp.full((2, 1), 0.1)), {"leaky_relu": "straight-through"}), X[None],
                  dy=jnp.stack([DY, DY]))  # fmt: skip
    equal(wide, 2 * DY[None])


def test_clipping_and_reversal_are_of_all_that_an_op_sends_back():
    x, kernel = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[1.0, 2.0], [0.0, 1.0]])
    for choice, arrives in ((clip(value=0.25), [0.25, -0.25]), (clip(norm=0.5), [0.3, -0.4]), (reversal(2.0), [-6.0, 8.0])):
        found = jax.vjp(with_rules(fb.dense, {"dense": choice}), x, kernel)[1](jnp.asarray([[3.0, -4.0]]))
        a = jnp.asarray([arrives])
        close(found[0], a @ kernel.T)
        close(found[1], x.T @ a)
    # Several outputs have one norm.
    (args, options) = RULES["lstm"].samples[0].make(seed=0)
    y, pull = jax.vjp(lambda x: fb.lstm(x, *args[1:], **options), args[0])
    dy = jax.tree.map(jnp.ones_like, y)
    norm = np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(dy)))
    _, clipped = jax.vjp(lambda x: with_rules(fb.lstm, {"lstm": clip(norm=1.0)})(x, *args[1:], **options), args[0])
    close(clipped(dy)[0], pull(dy)[0] / norm)


def test_the_norm_is_that_of_one_example_under_vmap():
    fn = with_rules(lambda x: fb.relu(x), {"relu": clip(norm=1.0)})
    x, dy = jnp.ones((2, 3)), jnp.asarray([[3.0, 0, 4], [0.1, 0, 0]])
    close(jax.vmap(lambda x, d: jax.vjp(fn, x)[1](d)[0])(x, dy), [[0.6, 0, 0.8], [0.1, 0, 0]])


def test_a_clip_that_meets_what_is_not_finite_says_so():
    for choice in (clip(value=1.0), clip(norm=1.0)):
        assert np.isnan(pulled(with_rules(fb.relu, {"relu": choice}), jnp.ones(2), dy=jnp.asarray([np.nan, 1.0]))).any()


# The switch.


MESH = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
INSIDE = {
    "plain": fb.relu,
    "jit": jax.jit(lambda x: fb.relu(x)),
    "scan": lambda x: jax.lax.scan(lambda c, v: (c, fb.relu(v)), 0.0, x)[1],
    "vmap": jax.vmap(lambda x: fb.relu(x)),
    "checkpoint": jax.checkpoint(lambda x: fb.relu(x)),
    "cond": lambda x: jax.lax.cond(x[1] < 0, fb.relu, jnp.zeros_like, x),
    "shard_map": lambda x: jax.shard_map(fb.relu, mesh=MESH, in_specs=S("i"), out_specs=S("i"))(x),
}


@pytest.mark.parametrize("name", INSIDE)
def test_inside_everything_and_never_stale(name):
    fn = INSIDE[name]
    other = with_rules(fn, GUIDED)
    for outer in (lambda f: f, jax.jit):
        for _ in range(2):  # they take turns on the same jitted inner functions
            equal(pulled(outer(fn), X), OWN)
            equal(pulled(outer(other), X), THEIRS)
            equal(outer(other)(X), fn(X))
        equal(jax.vjp(fb.without_rules(outer(fn)), X)[1](DY)[0], OWN)


def test_the_innermost_choice_holds():
    reverse = {"relu": reversal()}
    equal(pulled(with_rules(with_rules(fb.relu, GUIDED), reverse), X), THEIRS)
    equal(pulled(with_rules(lambda x: with_rules(fb.relu, reverse)(x), GUIDED), X), -OWN)
    # Choices for other ops come together.
    both = with_rules(with_rules(lambda x: fb.relu(fb.tanh(x)), GUIDED), {"tanh": "straight-through"})
    equal(pulled(both, X), THEIRS)
    # References stand aside, outside and inside.
    equal(pulled(fb.without_rules(with_rules(fb.relu, GUIDED)), X), THEIRS)
    equal(pulled(with_rules(fb.without_rules(fb.relu), GUIDED), X), OWN)
    # A method for a whole function does not speak of ops that it leaves alone.
    equal(pulled(with_rules(with_rules(lambda x: fb.dense(x, jnp.ones((6, 1))), "guided"), {"dense": reversal()}), X,
                 dy=jnp.ones(1)), -jnp.ones(6))  # fmt: skip
    equal(pulled(fb.relu, X), OWN)


def test_a_choice_is_one_rule_and_one_trace():
    assert with_rules(fb.relu, GUIDED).rule is with_rules(fb.relu, {"relu": "guided"}).rule
    assert with_rules(fb.relu, {"relu": lrp()}).rule is fb.relu.rule
    traces = []

    @jax.jit
    def inner(x):
        traces.append(1)
        return fb.relu(x)

    for _ in range(3):
        equal(pulled(with_rules(lambda x: inner(x), GUIDED), X), THEIRS)
        equal(pulled(lambda x: inner(x), X), OWN)
    assert len(traces) == 2


def test_an_op_stays_an_op_and_is_a_layer():
    guided = with_rules(fb.relu, GUIDED)
    _, saved = guided.forward(X)
    equal(guided.backward(saved, DY)[0], THEIRS)
    model = L.serial(L.Dense(4), guided, L.Dense(2))
    params, _, x = drawn(model, (3, 6), np.float32)
    _, tape = model.forward(params, x)
    dy = jnp.asarray([[1.0, -1.0]] * 3)
    close(model.backward(tape, dy)[1], pulled(jax.jit(lambda x: with_rules(model, GUIDED)(params, x)), x, dy=dy))
    assert not hasattr(with_rules(model, GUIDED), "rule")


def test_the_checker_knows_that_it_is_not_the_gradient():
    for fn in (with_rules(fb.relu, {"relu": "straight-through"}), with_rules(lambda x: 2 * fb.relu(x), {"relu": reversal()})):
        report = fb.check(fn, X)
        assert report.ok, report
        assert "inexact" in str(report)
        assert not fb.check(fn, X, exact=True).ok


# One's own.


def test_a_pair_of_functions():
    def forward(x):
        return 17 * fb.relu(x), (x > 1,)  # of this forward only what it saves is used; it may call the op

    def backward(saved, dy):
        """dx = 7 dy where x > 1."""
        return (jnp.where(saved[0], 7 * dy, 0),)

    fn = with_rules(fb.relu, {"relu": (forward, backward)})
    equal(fn(X), fb.relu(X))
    y, pull = jax.vjp(fn, X)
    equal(y, fb.relu(X))
    equal(pull(DY)[0], jnp.where(X > 1, 7 * DY, 0))
    assert fn.rule.formula == "dx = 7 dy where x > 1."
    assert with_rules(fb.relu, {"relu": (forward, backward)}).rule is fn.rule

    def dense_backward(saved, dy, *, precision):
        assert precision == "highest"
        return fb.dense.rule.backward(saved, -dy, precision=precision)

    pair = (fb.dense.rule.forward, dense_backward)
    fn = with_rules(lambda x: fb.dense(x, jnp.ones((6, 1)), precision="highest"), {"dense": pair})
    equal(pulled(fn, X, dy=jnp.ones(1)), -jnp.ones(6))


def test_a_rule():
    made = with_rules(fb.relu, GUIDED).rule
    equal(pulled(with_rules(fb.relu, {"relu": made}), X), THEIRS)
    equal(pulled(with_rules(with_rules(fb.relu, {"relu": fb.relu.rule}), GUIDED), X), OWN)
    other = with_rules(fb.relu, {"relu": fb.hard_sigmoid.rule})  # of another op: its backward
    equal(other(X), fb.relu(X))
    equal(pulled(other, X), pulled(fb.hard_sigmoid, X))


# LRP by its formulas, on matrices.


def shared(name, x, W, b, R):
    """R_in and R_bias of z = x W + b by the formulas, in float64 NumPy; q[i, j] with the bias as the last row."""
    q = np.concatenate([x[:, None] * W, b[None]])
    z = q.sum(0)
    plus, minus = np.maximum(q, 0), np.minimum(q, 0)
    if name == "lrp-0":
        share = q / z
    elif name == "lrp-epsilon":
        share = q / (z + np.where(z < 0, -0.3, 0.3))
    elif name == "lrp-gamma":
        weighted = q + 0.5 * np.where(z < 0, minus, plus)
        share = weighted / weighted.sum(0)
    else:
        sums = [np.where(part.sum(0) == 0, 1, part.sum(0)) for part in (plus, minus)]  # nothing contributes nothing
        share = 3 * plus / sums[0] - 2 * minus / sums[1]
    found = (share * R).sum(1)
    return found[:-1], (share * R)[-1]


LINEAR = {
    "dense": (lambda x, b: fb.dense(x, KERNEL, b), (5,), (4,)),
    "conv": (lambda x, b: fb.conv(x, IMAGE_KERNEL, b, strides=2), (5, 6, 2), (3,)),
    "conv, grouped": (lambda x, b: fb.conv(x, GROUPED_KERNEL, b, feature_group_count=2, padding="VALID"), (5, 6, 2), (2,)),
    "conv_transpose": (lambda x, b: fb.conv_transpose(x, IMAGE_KERNEL, b, strides=(2, 2)), (2, 3, 2), (3,)),
    "avg_pool": (lambda x, b: fb.avg_pool(x, (2, 2), (2, 2)), (4, 4, 2), ()),
}
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
IMAGE_KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 3)))
GROUPED_KERNEL = IMAGE_KERNEL[:, :, :1, :2]
CHOICES = {"lrp-0": lrp(), "lrp-epsilon": lrp(epsilon=0.3), "lrp-gamma": lrp(gamma=0.5), "lrp-alpha-beta": lrp(alpha=3)}


@pytest.mark.parametrize("op", LINEAR)
def test_lrp_of_linear_ops_is_its_formula(op):
    fn, shape, bias_shape = LINEAR[op]
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, b = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=bias_shape))
        names = ("lrp-0", "lrp-epsilon") if op == "avg_pool" else CHOICES
        W, z = jax.jit(lambda x, b: (jax.jacobian(fb.without_rules(fn))(x, b), fn(x, b)))(x, b)
        W, z = np.asarray(W).reshape(-1, x.size).T, np.asarray(z)
        bias = z.ravel() - np.asarray(x).ravel() @ W
        R = rng.normal(size=z.shape)
        found = jax.jit(lambda x, b, c: {n: jax.vjp(with_rules(fn, CHOICES[n]), x, b)[1](c) for n in names})(
            x, b, jnp.asarray(R / z)
        )
        for name, (dx, db) in found.items():
            expected, expected_bias = shared(name, np.asarray(x).ravel(), W, bias, R.ravel())
            close((x * dx).ravel(), expected, 1e-12)
            if bias_shape:
                close(b * db, expected_bias.reshape(z.shape).sum(tuple(range(z.ndim - 1))), 1e-12)


def test_the_relevance_of_weights_is_what_flows_through_them():
    rng = np.random.default_rng(3)
    x, c = jnp.asarray(rng.normal(size=(6, 5))), jnp.asarray(rng.normal(size=(6, 4)))
    for choice in CHOICES.values():
        dx, dkernel = jax.vjp(with_rules(fb.dense, {"dense": choice}), x, jnp.asarray(KERNEL, x.dtype))[1](c)
        close(jnp.sum(x * dx), jnp.sum(KERNEL * dkernel), 1e-4)


def is_activation(op):
    return RULES[op].reference.__module__.endswith(("activations", "piecewise"))


@pytest.mark.parametrize("op", [*filter(is_activation, available()["lrp-0"])])
def test_an_activation_hands_relevance_on(op):
    """R_in = R_out, so its value at 0 is 0; and nothing is divided by zero there."""
    fn = RULES[op].op
    x = jnp.linspace(-4.0, 4.0, 9)
    dx = pulled(with_rules(lambda x: fn(x), "lrp-0"), x, dy=jnp.ones(9))
    assert fn(jnp.zeros(())) == 0
    close(x * dx, fn(x), 1e-5)
    assert np.isfinite(dx).all()
    close(dx[4], jax.grad(fb.without_rules(fn))(0.0), 1e-6)


# Relevance of models.


def drawn(model, shape, dtype=np.float64):
    """Parameters, with biases that are not 0, state and input, by NumPy: nothing is compiled for them."""
    rng = np.random.default_rng(5)

    def some(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape, scale=max(leaf.size, 4) ** -0.25), dtype)

    params, state = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))
    return *jax.tree.map(some, (params, state)), jnp.asarray(rng.normal(size=shape), dtype)


def small_cnn():
    model = L.serial(
        L.Conv(4, (3, 3)), L.BatchNorm(), fb.relu, L.MaxPool((2, 2), (2, 2)), L.AvgPool((2, 2)), L.Flatten(),
        L.residual(L.serial(L.Dense(16), fb.gelu)), L.Dropout(0.5), L.Dense(10),
    )  # fmt: skip
    params, state, x = drawn(model, (2, 6, 6, 1))
    return model, params, jax.tree.map(jnp.abs, state), x


def test_relevance_is_conserved_and_told_layer_by_layer():
    with jax.enable_x64(True):
        model, params, state, x = small_cnn()

        @jax.jit
        def run(params, x):
            found, large = (relevance(model, params, x, rules=rules, state=state) for rules in ("lrp-0", lrp(epsilon=1e-2)))
            return found, large, model(params, x, state)

        found, large, y = run(params, x)
        assert abs(found.lost) <= 1e-12
        assert abs(found.bias) > 1e-2
        close(found.output, jnp.where(y == y.max(-1, keepdims=True), y, 0))
        arrived = [*found.inputs[1:], found.output]
        for layer, above, below, biases in zip(model.layers, arrived, found.inputs, found.biases):
            assert abs(above.sum() - below.sum() - sum(b.sum() for b in biases.values())) <= 1e-12, layer
        assert set(found.biases[1]) == {"bias", "mean"}
        assert set(found.biases[6]) == {"body/layers/0/bias"}
        assert abs(large.lost) > 1e-3  # ε takes a part
        lines = str(large).splitlines()
        assert lines[0] == "relevance, lrp-epsilon (epsilon = 0.01)"
        assert lines[2].startswith("Dense(features=10)")
        assert len(lines) == 3 + len(model.layers)


def test_relevance_in_float32_of_any_function():
    """Conserved to a millionth; a function that is no chain of layers is one line of the table."""
    model = L.serial(L.Dense(64), fb.relu, L.Dense(32), fb.relu, L.Dense(10))
    params, _, x = drawn(model, (16, 32), np.float32)

    def anybody(params, x):
        return model(params, x)

    found, whole = jax.jit(lambda params, x: (relevance(model, params, x), relevance(anybody, params, x)))(params, x)
    assert found.input.dtype == jnp.float32
    assert abs(found.lost) <= 1e-6 * jnp.sum(jnp.abs(found.output))
    assert abs(found.bias) > 0.1
    close(whole.input, found.input)
    assert str(whole).splitlines()[2].split()[0] == "anybody"
    with pytest.raises(ValueError, match="serial: params is"):
        relevance(model, {"layers": params["layers"][:4]}, x)


def test_batch_norm_is_as_if_folded_into_the_convolution():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        x, kernel = jnp.asarray(rng.normal(size=(2, 5, 5, 2))), IMAGE_KERNEL
        bias, scale, shift, mean, c = (jnp.asarray(rng.normal(size=3)) for _ in range(5))
        var = jnp.asarray(rng.uniform(0.5, 2, size=3))
        k = scale / jnp.sqrt(var + 1e-5)

        def apart(x):
            return fb.batch_norm(fb.conv(x, kernel, bias), scale, shift, mean, var)

        def folded(x):
            return fb.conv(x, kernel * k.reshape(1, 1, 1, 3), (bias - mean) * k + shift)

        dy = jnp.broadcast_to(c, (2, 5, 5, 3))
        close(pulled(with_rules(apart, "lrp-0"), x, dy=dy), pulled(with_rules(folded, "lrp-0"), x, dy=dy), 1e-12)
    with pytest.raises(ValueError, match="batch_norm has no LRP rule in training"):
        jax.grad(lambda x: with_rules(fb.batch_norm, "lrp-0")(x, train=True)[0].sum())(jnp.ones((3, 2)))


def test_targets_and_amounts():
    weights = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])
    x = jnp.asarray([[1.0, 2.0], [2.0, 1.0]])
    model = L.Dense(2, use_bias=False)
    close(relevance(model, {"kernel": weights}, x, 1).input, x * weights[None, :, 1])
    each = jax.vmap(lambda x: relevance(model, {"kernel": weights}, x, 1).input)(x)
    close(each, x * weights[None, :, 1])
    close(relevance(model, {"kernel": weights}, x, jnp.asarray([0, 1])).input, x * weights.T)
    close(relevance(model, {"kernel": weights}, x, amount=[14.0, 1.0]).input, jnp.asarray([[2.0, 12.0], [0.4, 0.6]]))
    nothing = relevance(model, {"kernel": weights}, jnp.zeros((1, 2)), 0, amount=1.0)  # a zero contributes nothing to a zero
    equal(nothing.input, jnp.zeros((1, 2)))


# Refusals.


def test_every_op_has_an_lrp_rule_or_is_refused():
    served = set(available()["lrp-0"])
    for name in ("lrp-epsilon", "lrp-gamma", "lrp-alpha-beta"):
        assert set(available()[name]) == served
    rules = dict(with_rules(lambda: fb.context.mode().others, "lrp-0")())
    assert set(rules) == set(RULES)
    for op in set(RULES) - served:
        with pytest.raises(ValueError, match=f"with_rules: {op} has no rule 'lrp-0'"):
            rules[op].forward()


def test_an_op_that_is_registered_later_is_refused_too():
    lrp_of = with_rules(lambda x: RULES["twice"].op(x), "lrp-0")
    try:

        @rule(forward=lambda x: (2 * x, ()), backward=lambda saved, dy: (2 * dy,))
        def twice(x):
            """Two x."""
            return 2 * x

        equal(lrp_of(X), 2 * X)
        with pytest.raises(ValueError, match="twice has no rule 'lrp-0'"):
            jax.grad(lambda x: lrp_of(x).sum())(X)
        own = with_rules(with_rules(twice, {"twice": twice.rule}), "lrp-0")
        equal(pulled(own, X), 2 * DY)
    finally:
        RULES.pop("twice", None)


def refused(error, words, call):
    return pytest.param(error, words, call, id=words[:40])


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        refused(TypeError, "with_rules: expected a function, got int", lambda: with_rules(3, GUIDED)),
        refused(ValueError, "no op 'rellu'; did you mean 'relu'", lambda: with_rules(fb.relu, {"rellu": "guided"})),
        refused(ValueError, "no rule 'guidde'; did you mean 'guided'", lambda: with_rules(fb.relu, {"relu": "guidde"})),
        refused(ValueError, "gelu has no rule 'guided'. It is defined", lambda: with_rules(fb.gelu, {"gelu": "guided"})),
        refused(ValueError, "gelu has no rule 'guided'", lambda: jax.grad(with_rules(fb.gelu, "guided"))(1.0)),
        refused(ValueError, "no rule 'lrp-0'. Take the logit", lambda: with_rules(fb.softmax, {"softmax": "lrp-0"})),
        refused(ValueError, "sigmoid has no rule 'lrp-0'. Its values", lambda: jax.grad(with_rules(fb.sigmoid, "lrp-0"))(1.0)),
        refused(ValueError, "It is a loss: take the relevance", lambda: jax.grad(with_rules(fb.half_square, "lrp-0"))(X, X)),
        refused(ValueError, "batch_norm in inference", lambda: with_rules(fb.layer_norm, {"layer_norm": "lrp-gamma"})),
        refused(ValueError, "reversal is for ops that are named", lambda: with_rules(fb.relu, "reversal")),
        refused(ValueError, "clip-norm needs a number", lambda: with_rules(fb.relu, {"relu": "clip-norm"})),
        refused(TypeError, "expected a dict such as", lambda: with_rules(fb.relu, ["relu"])),
        refused(TypeError, "for relu expected a name such as 'guided', a pair", lambda: with_rules(fb.relu, {"relu": 3})),
        refused(TypeError, "its forward takes (y)", lambda: with_rules(fb.relu, {"relu": (lambda y: y, lambda s, dy: dy)})),
        refused(TypeError, "its backward takes (s)", lambda: with_rules(fb.relu, {"relu": (lambda x: x, lambda s: s)})),
        refused(
            TypeError, "must return (y, saved), got int",
            lambda: jax.grad(with_rules(fb.relu, {"relu": (lambda x: 1, lambda s, dy: (dy,))}))(1.0),
        ),
        refused(TypeError, "the rule given for relu takes (x, kernel", lambda: with_rules(fb.relu, {"relu": fb.dense.rule})),
        refused(ValueError, "lrp: epsilon is 0", lambda: lrp(epsilon=0)),
        refused(ValueError, "lrp: alpha is 0.5", lambda: lrp(alpha=0.5)),
        refused(ValueError, "at most one of epsilon, gamma and alpha", lambda: lrp(epsilon=1, gamma=1)),
        refused(ValueError, "clip: expected one of value and norm", lambda: clip()),
        refused(ValueError, "clip: value is -1", lambda: clip(value=-1)),
        refused(ValueError, "factor must be a finite Python number", lambda: reversal(jnp.ones(()))),
        refused(ValueError, "available: there is no op 'rel'", lambda: available("rel")),
        refused(ValueError, "target is 6, expected one of the 6 outputs", lambda: relevance(lambda p, x: fb.relu(x), {}, X, 6)),
        refused(ValueError, "target is int32 (2,)", lambda: relevance(lambda p, x: fb.relu(x), {}, X, [0, 1])),
        refused(ValueError, "x is of int32, which has no relevance", lambda: relevance(lambda p, x: x, {}, jnp.arange(3))),
        refused(ValueError, "expected a form of LRP", lambda: relevance(lambda p, x: x, {}, X, rules="guided")),
        refused(ValueError, "amount has shape (3,)", lambda: relevance(lambda p, x: x, {}, X, amount=[1, 2, 3])),
        refused(ValueError, "output must be an array", lambda: relevance(lambda p, x: x.sum(), {}, X)),
    ],
)  # fmt: skip
def test_errors_are_sentences(error, words, call):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


# The page.


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "other_rules.md"


def test_the_page_is_true(capsys):
    text = PAGE.read_text(encoding="utf-8")
    assert table.insert(text) == text, "run: python -m fbackprop.table docs/other_rules.md"
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, scope)
    # Numbers differ from one version of JAX to the other: random numbers, rounding.
    printed, shown = (
        re.sub(r"-?\d[\d.]*(e[+-]?\d+)? *", "#", part)
        for part in (capsys.readouterr().out, re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0])
    )
    assert re.sub(" +", " ", printed) == re.sub(" +", " ", shown)
    close(relevance(lambda w, x: fb.dense(x, w), jnp.ones((2, 1)), jnp.asarray([3.0, 2.0]), amount=0.6).input, [0.36, 0.24])


# Independent implementations, on the same weights.


@pytest.fixture(scope="module")
def torch():
    """PyTorch, with what zennit wants of torchvision (two classes that are not used here) if that is not installed."""
    module = pytest.importorskip("torch")
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, RuntimeError):
        names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        for name in ("Bottleneck", "BasicBlock"):
            setattr(sys.modules[names[-1]], name, type(name, (), {}))
    return module


def networks(torch):
    """(our model, params, x NHWC, their model, x NCHW): an MLP, and a CNN with max and mean pooling."""
    nn, rng = torch.nn, np.random.default_rng(0)

    def dense(i, o, order=None):
        W, b = rng.normal(size=(i, o)) * (2 / i) ** 0.5, rng.normal(size=o) * 0.3
        layer = nn.Linear(i, o).double()
        layer.weight.data, layer.bias.data = torch.tensor((W if order is None else W[order]).T.copy()), torch.tensor(b)
        return {"kernel": jnp.asarray(W), "bias": jnp.asarray(b)}, layer

    def conv(i, o):
        W, b = rng.normal(size=(3, 3, i, o)) * (2 / 9 / i) ** 0.5, rng.normal(size=o) * 0.3
        layer = nn.Conv2d(i, o, 3, padding=1).double()
        layer.weight.data, layer.bias.data = torch.tensor(W.transpose(3, 2, 0, 1).copy()), torch.tensor(b)
        return {"kernel": jnp.asarray(W), "bias": jnp.asarray(b)}, layer

    (p1, t1), (p2, t2), (p3, t3) = dense(12, 20), dense(20, 16), dense(16, 5)
    x = rng.normal(size=(4, 12))
    mlp = L.serial(L.Dense(20), fb.relu, L.Dense(16), fb.relu, L.Dense(5))
    yield mlp, {"layers": (p1, {}, p2, {}, p3)}, x, nn.Sequential(t1, nn.ReLU(), t2, nn.ReLU(), t3), x

    order = np.arange(2 * 2 * 6).reshape(2, 2, 6).transpose(2, 0, 1).ravel()  # flattened NHWC against NCHW
    (c1, k1), (c2, k2), (p, t) = conv(2, 4), conv(4, 6), dense(24, 5, order)
    pool = {"window_shape": (2, 2), "strides": (2, 2)}
    first, second = [L.Conv(4, (3, 3)), fb.relu, L.MaxPool(**pool)], [L.Conv(6, (3, 3)), fb.relu, L.AvgPool(**pool)]
    cnn = L.serial(*first, *second, L.Flatten(), L.Dense(5))

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(k1, nn.ReLU(), nn.MaxPool2d(2), k2, nn.ReLU(), nn.AvgPool2d(2))
            self.head = t

        def forward(self, x):
            return self.head(self.features(x).flatten(1))

    x = rng.normal(size=(3, 8, 8, 2))
    yield cnn, {"layers": (c1, {}, {}, c2, {}, {}, {}, p)}, x, Theirs(), x.transpose(0, 3, 1, 2).copy()


def same(ours, theirs):
    theirs = theirs.detach().numpy()
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    assert np.abs(theirs).max() > 0.05
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_zennit(torch):
    zennit = pytest.importorskip("zennit")
    from zennit.attribution import Gradient  # type: ignore[import-not-found]
    from zennit.composites import DeconvNet, GuidedBackprop, LayerMapComposite  # type: ignore[import-not-found]
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, Pass  # type: ignore[import-not-found]

    pairs = {
        lrp(): (Epsilon(1e-12), Norm(1e-12)),
        lrp(epsilon=0.1): (Epsilon(0.1), Norm(0.1)),
        lrp(gamma=0.25): (Gamma(0.25, 1e-12), Norm(1e-12)),
        lrp(alpha=2): (AlphaBeta(2, 1, 1e-12), Norm(1e-12)),
    }
    with jax.enable_x64(True):
        for model, params, x, theirs, x_theirs in networks(torch):
            given = torch.tensor(x_theirs, requires_grad=True)
            y = theirs(given).detach()
            target = y.argmax(-1)
            one = torch.nn.functional.one_hot(target, 5)
            close(model(params, x), y, 1e-12)
            ours = jax.jit(lambda x: [relevance(model, params, x, rules=choice).input for choice in pairs])(x)
            for found, (weighted, mean) in zip(ours, pairs.values()):
                kinds = [(torch.nn.AvgPool2d, mean), (zennit.types.Linear, weighted), (torch.nn.ReLU, Pass())]
                with Gradient(theirs, LayerMapComposite(kinds)) as attribute:
                    same(found, attribute(given, y * one)[1])
            for name, composite in (("guided", GuidedBackprop()), ("deconvolution", DeconvNet())):
                _, pull = jax.vjp(lambda x: with_rules(model, name)(params, x), jnp.asarray(x))
                with Gradient(theirs, composite) as attribute:
                    same(pull(jnp.asarray(one.numpy(), jnp.float64))[0], attribute(given, one.double())[1])


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_captum(torch):
    pytest.importorskip("captum")
    from captum.attr import LRP, Deconvolution, GuidedBackprop  # type: ignore[import-not-found]
    from captum.attr._utils.lrp_rules import EpsilonRule  # type: ignore[import-not-found]

    with jax.enable_x64(True):
        for model, params, x, theirs, x_theirs in networks(torch):
            given = torch.tensor(x_theirs, requires_grad=True)
            target = theirs(given).argmax(-1)
            for module in theirs.modules():
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.AvgPool2d)):
                    module.rule = EpsilonRule(epsilon=0.1)
            same(relevance(model, params, x, rules=lrp(epsilon=0.1)).input, LRP(theirs).attribute(given, target=target))
            for name, method in (("guided", GuidedBackprop), ("deconvolution", Deconvolution)):
                _, pull = jax.vjp(lambda x: with_rules(model, name)(params, x), jnp.asarray(x))
                dy = jnp.asarray(torch.nn.functional.one_hot(target, 5).numpy(), jnp.float64)
                same(pull(dy)[0], method(theirs).attribute(given, target=target))
