"""Layers: the backward by hand against jax.grad of the rules and of the definitions; protocol, dtypes, messages."""

import dataclasses
import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fbackprop import layers, ops
from fbackprop.context import without_rules
from fbackprop.layers import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embed,
    Flatten,
    LayerNorm,
    MaxPool,
    residual,
    serial,
)


@dataclasses.dataclass(frozen=True)
class Case:
    layer: layers.Layer
    shape: tuple[int, ...]
    train: bool = False
    classes: int = 0  # integers below it as input
    twin: bool = True  # the definition has the same gradient

    def __str__(self):
        return f"{self.layer!r}{' in training' if self.train else ''} on {self.shape}"


BLOCK = serial(Conv(4, (3, 3), use_bias=False), BatchNorm(momentum=0.9), ops.relu, Dropout(0.3))
CASES = [
    Case(Dense(5), (3, 4)),
    Case(Dense(5, use_bias=False), (2, 3, 4)),
    Case(Dense(5), (4,)),
    Case(Conv(4, (3, 2)), (2, 5, 6, 3)),
    Case(Conv(4, 3, padding="CAUSAL", kernel_dilation=2), (2, 7, 3)),
    Case(Conv(4, [3, 3], strides=[2, 1], padding=[[1, 0], 2], use_bias=False), (5, 6, 3)),
    Case(Conv(6, (3, 3), padding="CIRCULAR", feature_group_count=3), (2, 5, 4, 3)),
    Case(Conv(3, (2, 2, 2), strides=2, padding="VALID"), (2, 4, 5, 4, 2)),
    Case(Conv(3, (3,), input_dilation=2, strides=None), (2, 1, 5, 2)),
    Case(BatchNorm(momentum=0.9), (6, 3), train=True),
    Case(BatchNorm(momentum=0.9), (6, 3)),
    Case(BatchNorm(use_scale=False), (2, 3, 4, 3), train=True),
    Case(BatchNorm(use_bias=False, use_scale=False), (6, 3), train=True),
    Case(LayerNorm(), (4, 6)),
    Case(LayerNorm(use_bias=False), (2, 3, 6)),
    Case(LayerNorm(use_scale=False, use_bias=False, epsilon=0.1), (6,)),
    Case(Embed(7, 3), (2, 5), classes=7),
    Case(Dropout(0.4), (6, 5), train=True),
    Case(Dropout(0.4), (6, 5)),
    Case(Dropout(0.4, broadcast_dims=[1]), (6, 5, 2), train=True),
    Case(MaxPool([2, 2], [2, 2]), (2, 4, 6, 3)),
    Case(MaxPool((3, 2), (2, 1), "SAME"), (2, 5, 6, 3)),
    Case(AvgPool((2, 2), (2, 2)), (2, 4, 6, 3)),
    Case(AvgPool((3, 3), padding="SAME", count_include_pad=False), (2, 5, 6, 3)),
    Case(Flatten(), (3, 2, 4)),
    *(Case(Activation(op), (3, 4)) for op in (ops.relu, ops.sigmoid, ops.tanh, ops.gelu, ops.silu, ops.elu, ops.softplus)),
    *(Case(make(), (3, 4)) for make in (layers.Relu, layers.Sigmoid, layers.Tanh, layers.Silu, layers.Elu, layers.Softplus)),
    Case(layers.Gelu(approximate=False), (3, 4)),
    Case(layers.LeakyRelu(negative_slope=0.3), (3, 4)),
    Case(layers.Softmax(axis=0), (3, 4)),
    Case(Activation(ops.log_softmax), (3, 4)),
    Case(Activation(ops.step_ste), (3, 4), twin=False),
    Case(serial(Dense(5), ops.tanh, Dense(2)), (3, 4)),
    Case(serial(), (3, 4)),
    Case(serial(BLOCK, MaxPool((2, 2), (2, 2)), Flatten(), Dense(3), BatchNorm()), (2, 4, 4, 2), train=True),
    Case(serial(BLOCK, MaxPool((2, 2), (2, 2)), Flatten(), Dense(3), BatchNorm()), (2, 4, 4, 2)),
    Case(serial(Embed(7, 3), LayerNorm(), Dense(2)), (2, 5), classes=7),
    Case(residual(serial(Dense(4), ops.sigmoid)), (3, 4)),
    Case(residual(BLOCK, Conv(4, (1, 1))), (2, 4, 4, 2), train=True),
    Case(residual(Dense(4), serial(Dense(4), BatchNorm())), (3, 4), train=True),
]


def make(case):
    """Parameters (all random: an initial bias of zero hides mistakes), input, state and key in float64."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.integers(0, case.classes, case.shape) if case.classes else rng.normal(size=case.shape))
    params, state = case.layer.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    state = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 2.0, size=s.shape)), state)
    return params, x, state, jax.random.key(7)


def differentiated(fn, params, x, w):
    """y, new state, dparams and dx of sum(w · y) by jax.vjp of ``fn(params, x) -> (y, state)``."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        y, pull, state = jax.vjp(lambda p: fn(p, x), params, has_aux=True)
        return y, state, *pull(w), None
    y, pull, state = jax.vjp(fn, params, x, has_aux=True)
    return y, state, *pull(w)


def assert_close(got, want, rtol=1e-12, atol=1e-13):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def cotangent(y):
    return jnp.asarray(np.random.default_rng(5).normal(size=y.shape), y.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_hand_is_the_gradient(case):
    """Forward and backward, each in a jit of its own with the tape between them, against one vjp of the whole."""
    with jax.enable_x64(True):
        params, x, state, key = make(case)
        layer = case.layer

        def run(p, x):
            return layer.apply(p, x, state, key, case.train)

        y, tape = jax.jit(lambda p, x, s, k: layer.forward(p, x, s, k, case.train))(params, x, state, key)
        assert y.dtype == jnp.float64
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tape))
        w = cotangent(y)
        mine = (y, tape.state, *jax.jit(layer.backward)(tape, w))
        rules, twin = (jax.jit(lambda p, x, f=f: differentiated(f, p, x, w))(params, x) for f in (run, without_rules(run)))
        assert_close(mine, rules)
        assert_close(mine if case.twin else mine[:2], twin if case.twin else twin[:2])
        if not case.train:
            assert_close(layer(params, x, state), y)
            assert_close(tape.state, state)


def test_eagerly():
    """The same without jit."""
    with jax.enable_x64(True):
        case = Case(residual(serial(Dense(4), BatchNorm()), ops.tanh), (3, 4), train=True)
        params, x, state, _ = make(case)
        y, tape = case.layer.forward(params, x, state, train=True)
        w = cotangent(y)
        mine = (y, tape.state, *case.layer.backward(tape, w))
        assert_close(mine, differentiated(lambda p, x: case.layer.apply(p, x, state, train=True), params, x, w))


def test_every_layer_has_a_case():
    def inside(layer):
        yield type(layer).__name__
        if isinstance(layer, Activation):
            yield layer.op.rule.name.title().replace("_", "")
        for own in layer.layers if isinstance(layer, layers.Serial) else getattr(layer, "branches", {}).values():
            yield from inside(own)

    covered = {name for case in CASES for name in inside(case.layer)} | {"Layer", "Tape", "serial", "residual"}
    others = pathlib.Path(__file__).with_name("test_layers_breadth.py").read_text(encoding="utf-8")
    covered |= set(re.findall(r"\b(?:layers\.)?(\w+)\(", others))
    public = {name for name, value in vars(layers).items() if not name.startswith("_")}
    assert {n for n in public if not isinstance(getattr(layers, n), types.ModuleType)} <= covered


@pytest.mark.parametrize("case", CASES, ids=str)
def test_init(case):
    """From an array or from its shape: the same parameters, in float32."""
    x = jnp.zeros(case.shape, jnp.int32 if case.classes else jnp.float32)
    params, state = case.layer.init(jax.random.key(1), x)
    again = case.layer.init(jax.random.key(1), jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert_close(again, (params, state), rtol=0, atol=0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, state)))
    assert isinstance(hash(case.layer), int)


def test_serial_structure_and_keys():
    model = serial(Dense(3), ops.relu, BatchNorm(), Dropout(0.5), serial(Dense(2)))
    params, state = model.init(jax.random.key(0), jnp.ones((4, 2)))
    shapes = jax.tree.map(jnp.shape, params)
    norm = {"scale": (3,), "bias": (3,)}
    inner = {"layers": ({"kernel": (3, 2), "bias": (2,)},)}
    assert shapes == {"layers": ({"kernel": (2, 3), "bias": (3,)}, {}, norm, {}, inner)}
    assert jax.tree.map(jnp.shape, state) == {"layers": ((), (), {"mean": (3,), "var": (3,)}, (), ())}
    assert serial(Dense(3), ops.relu).init(jax.random.key(0), jnp.ones((4, 2)))[1] == ()
    assert_close(jax.jit(model.init)(jax.random.key(0), jnp.ones((4, 2))), (params, state), rtol=1e-6, atol=1e-7)
    # Two equal layers do not begin with equal parameters.
    two, _ = serial(Dense(3), Dense(3)).init(jax.random.key(0), jnp.ones((4, 3)))
    assert not jnp.array_equal(two["layers"][0]["kernel"], two["layers"][1]["kernel"])
    # Layer i draws from fold_in(key, i): two layers of dropout do not drop the same elements.
    x, key = jnp.ones((20, 30)), jax.random.key(5)
    drop = Dropout(0.5)
    chained, _ = serial(drop, drop).apply({"layers": ({}, {})}, x, key=key, train=True)
    masks = [drop.apply({}, x, key=jax.random.fold_in(key, i), train=True)[0] for i in (0, 1)]
    assert jnp.array_equal(chained, masks[0] * masks[1])
    assert not jnp.array_equal(masks[0], masks[1])


def test_state_is_a_scan_carry_and_moves():
    layer = BatchNorm(momentum=0.5, dtype=jnp.bfloat16)
    x = 3 + jax.random.normal(jax.random.key(0), (5, 16, 3), jnp.bfloat16)
    params, state = layer.init(jax.random.key(0), x[0])
    last, _ = jax.lax.scan(lambda s, x: (layer.apply(params, x, s, train=True)[1], None), state, x)
    assert last["mean"].dtype == jnp.float32
    np.testing.assert_allclose(last["mean"], 3.0, atol=0.6)
    # Inference stands on the state and leaves it alone.
    y, same = layer.apply(params, x[0], last)
    assert same is last
    assert not jnp.allclose(y, layer.apply(params, x[0], state)[0])


@pytest.mark.parametrize("layer", [Dense(4), Conv(4, (3,)), LayerNorm(), BatchNorm()], ids=repr)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_flax(layer, dtype, x_dtype, param_dtype):
    layer = dataclasses.replace(layer, dtype=dtype, param_dtype=param_dtype)
    x = jax.random.normal(jax.random.key(0), (2, 6, 3)).astype(x_dtype)
    params, state = layer.init(jax.random.key(0), x)
    assert all(p.dtype == param_dtype for p in jax.tree.leaves(params))
    y, tape = layer.forward(params, x, state)
    twin = {"Dense": nn.Dense, "LayerNorm": nn.LayerNorm, "BatchNorm": nn.BatchNorm, "Conv": nn.Conv}[layer.name]
    options = {n: getattr(layer, n) for n in ("features", "kernel_size") if hasattr(layer, n)}
    options |= {"use_running_average": True} if layer.name == "BatchNorm" else {}
    theirs = twin(dtype=dtype, param_dtype=param_dtype, **options)
    want = theirs.apply({"params": params, **({"batch_stats": state} if state else {})}, x)
    assert y.dtype == want.dtype == layer(params, x, state).dtype
    eps = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=4 * eps, atol=4 * eps)
    dparams, dx = layer.backward(tape, jnp.ones_like(y))
    assert dx.dtype == x_dtype
    assert all(d.dtype == param_dtype for d in jax.tree.leaves(dparams))


def test_norms_do_not_round_their_input():
    """Computing in bfloat16, the mean is subtracted before anything is rounded."""
    x = 1000 + jax.random.normal(jax.random.key(0), (16, 32))
    for layer in (LayerNorm(dtype=jnp.bfloat16), BatchNorm(dtype=jnp.bfloat16)):
        params, state = layer.init(jax.random.key(0), x)
        y, _ = layer.apply(params, x, state, train=True)
        exact, _ = dataclasses.replace(layer, dtype=None).apply(params, x, state, train=True)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)


PAIRS = [(Dense, nn.Dense), (Conv, nn.Conv), (Embed, nn.Embed), (LayerNorm, nn.LayerNorm), (BatchNorm, nn.BatchNorm)]


@pytest.mark.parametrize(("mine", "theirs"), [*PAIRS, (Dropout, nn.Dropout)], ids=lambda c: c.__name__)
def test_options_are_those_of_flax(mine, theirs):
    """Names, defaults and initializers; an option that Flax has and we have not is refused, not swallowed."""
    known = {f.name: f.default for f in dataclasses.fields(theirs)}
    for field in dataclasses.fields(mine):
        assert field.name in known
        if field.name.endswith("_init"):
            arrays = [init(jax.random.key(0), (5, 7), jnp.float32) for init in (field.default, known[field.name])]
            np.testing.assert_array_equal(*arrays)
        else:
            assert field.default == known[field.name]
    with pytest.raises(TypeError, match="unexpected keyword"):
        mine(features=3, use_bais=False)


@pytest.mark.parametrize(("mine", "theirs"), [(MaxPool, nn.max_pool), (AvgPool, nn.avg_pool)])
def test_pooling_options_are_those_of_flax(mine, theirs):
    want = [p for p in inspect.signature(theirs).parameters.values() if p.name != "inputs"]
    got = list(inspect.signature(mine).parameters.values())
    assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in want]


def test_integer_input_of_dense_is_promoted_as_in_flax():
    x = jnp.arange(6).reshape(2, 3)
    params, _ = Dense(2).init(jax.random.key(0), x)
    y, tape = Dense(2).forward(params, x)
    np.testing.assert_allclose(y, nn.Dense(2).apply({"params": params}, x), rtol=1e-6)
    dparams, dx = Dense(2).backward(tape, jnp.ones_like(y))
    assert dx is None
    np.testing.assert_allclose(dparams["kernel"], x.T.astype(jnp.float32) @ jnp.ones((2, 2)))


def test_layers_are_static_in_jit():
    traces = []

    def f(layer, params, x):
        traces.append(layer)
        return layer(params, x)

    params, _ = Conv(2, (3,)).init(jax.random.key(0), jnp.ones((4, 3)))
    jitted = jax.jit(f, static_argnums=0)
    jitted(Conv(2, [3]), params, jnp.ones((4, 3)))
    jitted(Conv(2, (3,)), params, jnp.ones((4, 3)))
    assert len(traces) == 1


def test_tape_under_vmap():
    layer = serial(Dense(3), ops.tanh)
    params, _ = layer.init(jax.random.key(0), jnp.ones(4))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    def one(x):
        y, tape = layer.forward(params, x)
        return layer.backward(tape, y)

    dparams, dx = jax.vmap(one)(x)
    want = jax.grad(lambda p, x: 0.5 * jnp.sum(layer(p, x) ** 2), argnums=(0, 1))(params, x)
    assert_close((jax.tree.map(lambda d: d.sum(0), dparams), dx), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_by_hand_over_devices(check_vma):
    """A batch spread over 4 devices, batch norm over all of it: the cotangents of the whole batch."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    whole = serial(Dense(3), BatchNorm(), ops.tanh)
    spread = serial(Dense(3), BatchNorm(axis_name="batch"), ops.tanh)
    x = jax.random.normal(jax.random.key(0), (8, 5))
    params, state = whole.init(jax.random.key(1), x)

    def by_hand(params, state, x):
        y, tape = spread.forward(params, x, state, train=True)
        dparams, dx = spread.backward(tape, y)
        return tape.state, dparams if check_vma else jax.lax.psum(dparams, "batch"), dx

    specs = (spec(), spec(), spec("batch"))
    got = jax.jit(jax.shard_map(by_hand, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma))(params, state, x)
    y, tape = whole.forward(params, x, state, train=True)
    assert_close(got, (tape.state, *whole.backward(tape, y)), rtol=2e-5, atol=1e-6)


KEY = jax.random.key(0)
X = jnp.ones((2, 3))
NORM, NORM_STATE = BatchNorm().init(KEY, X)
MESSAGES = [
    (lambda: Dropout(0.5).apply({}, X, train=True), "Dropout: train=True needs a random key and key is None"),
    (lambda: serial(Dropout(0.5)).forward({"layers": ({},)}, X, train=True), "Dropout: train=True needs a random key"),
    (lambda: BatchNorm().apply(NORM, X, train=True), r"BatchNorm: state is \(\), expected the running mean and var"),
    (lambda: BatchNorm()(NORM, X), "BatchNorm: state is .* train=False"),
    (lambda: BatchNorm()(NORM, X, {"mean": X[0]}), r"BatchNorm: state is the leaves \['mean'\]"),
    (lambda: Dense(3)({"kernel": X}, X), r"Dense: params has the leaves \['kernel'\], expected \['bias', 'kernel'\]"),
    (lambda: Dense(3)((), X), "Dense: params is a tuple, expected"),
    (lambda: Dense(2, use_bias=False)({"kernel": X}, X), r"Dense: kernel has shape \(2, 3\), expected \(3, 2\) \(x \(2, 3\)"),
    (lambda: Dense(0), "Dense: features is 0, expected a positive integer"),
    (lambda: Dense(3).init(None, X), "Dense.init: key is None"),
    (lambda: Dense(3).init(KEY, jnp.float32(1)), "Dense: x has 0 dimensions, expected at least 1"),
    (lambda: Dense(3).init(KEY, jnp.ones((2, 0))), "Dense.init: the last axis of x has no elements"),
    (lambda: Conv(4, (3, 3)).init(KEY, X), "Conv: x has 2 dimensions, expected at least 3"),
    (lambda: Conv(4, (3, 3), feature_group_count=2).init(KEY, jnp.ones((4, 4, 3))), "3 channels, which 2 groups do not divide"),
    (lambda: Conv(3, (3, 3), feature_group_count=2), "Conv: features is 3, which 2 groups do not divide"),
    (lambda: Conv(3, (3, 0)), r"Conv: kernel_size is \(3, 0\)"),
    (lambda: Embed(2, 3)({"embedding": X}, X), "Embed: x is of float32, expected integers"),
    (lambda: Dropout(1.5), "Dropout: rate is 1.5, expected a probability"),
    (lambda: Flatten()({}, 3.0), "Flatten: x is a single number"),
    (lambda: Activation(jnp.tanh), "Activation: expected an op of fbackprop.ops, .* got tanh"),
    (lambda: Activation(ops.relu, slope=1), "Activation: relu has no option slope"),
    (lambda: Activation(ops.dense), "Activation: dense also needs kernel"),
    (lambda: layers.Softmax(where=X), "must be hashable Python values"),
    (lambda: serial(Dense(2), jnp.tanh), "serial: expected layers or ops, got tanh"),
    (lambda: serial(Flatten), r"serial: expected layers or ops, got Flatten; write Flatten\(…\)"),
    (lambda: serial(Dense(2))({"layers": ()}, X), "serial: params is .* with 0 entries, expected .* with 1 entries"),
    (lambda: serial(Dense(2))({"kernel": X}, X), r"serial: params is a dict of \['kernel'\]"),
    (lambda: serial(Flatten())({"layers": ({},)}, X, {"mean": X}), r"serial: state is a dict of \['mean'\]"),
    (lambda: residual(Dense(2)).init(KEY, X), r"residual: the body's output has shape \(2, 2\) and x \(2, 3\)"),
    (
        lambda: residual(Dense(3))({"kernel": X}, X),
        r"residual: params is a dict of \['kernel'\], expected a dict of \['body'\]",
    ),
    (lambda: Flatten().backward(Dropout(0.1).forward({}, X)[1], X), "Flatten.backward: expected the tape of Flatten.forward"),
    (lambda: Dropout(0.1).backward(Flatten().forward({}, X)[1], X), "Dropout.backward: expected the tape of Dropout.forward"),
    (lambda: layers.Relu().backward(layers.Tanh().forward({}, X)[1], X), r"Activation\(relu\).backward: expected the tape"),
    (lambda: Dropout(0.1).backward(Dropout(0.1).forward({}, X)[1], X.T), r"dy has shape \(3, 2\), y had \(2, 3\)"),
    (lambda: serial(Flatten()).backward(Flatten().forward({}, X)[1], X), "serial.backward: expected the tape"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[m[:50] for _, m in MESSAGES])
def test_messages(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_errors_say_which_layer():
    model = serial(Flatten(), serial(Dense(2), Dense(4)))
    assert repr(model) == "serial(Flatten(), serial(Dense(features=2), Dense(features=4)))"
    params, _ = model.init(KEY, X)
    wrong = {"layers": ({}, {"layers": (params["layers"][1]["layers"][0], {"kernel": X, "bias": X[0]})})}
    with pytest.raises(ValueError, match="Dense: kernel has shape") as caught:
        model(wrong, X)
    assert caught.value.__notes__ == ["In serial, layer 1: Dense(features=4).",
                                      "In serial, layer 1: serial(Dense(features=2), Dense(features=4))."]  # fmt: skip
