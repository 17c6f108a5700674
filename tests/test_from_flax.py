"""Weights from Flax: the same weights give the same outputs, state and gradients; what is ambiguous is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from fbackprop import layers, ops
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
from fbackprop.models import cnn, from_flax, mlp


def shaken(tree):
    """All leaves random (variances positive): zeros and ones hide mistakes."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        low, high = (0.5, 2.0) if "var" in str(path[-1]) else (-0.6, 0.6)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def assert_same(mine, theirs, rtol=2e-5):
    """Equal to rounding in float32, relative to the largest element of each leaf."""
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


class LinenBreadth(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.PReLU()(nn.ConvTranspose(6, (3, 3), strides=(2, 2))(x))
        x = nn.RMSNorm()(nn.GroupNorm(num_groups=3, use_fast_variance=False)(x))
        x = nn.ConvTranspose(4, (2, 2), transpose_kernel=True)(x)
        return nn.Dense(3)(nn.DenseGeneral((2, 5))(nn.InstanceNorm(use_fast_variance=False)(x)))


def test_layers_beyond_the_first_ones():
    model = serial(
        layers.ConvTranspose(6, (3, 3), strides=(2, 2)),
        layers.PReLU(),
        layers.GroupNorm(num_groups=3),
        layers.RMSNorm(),
        layers.ConvTranspose(4, (2, 2), transpose_kernel=True),
        layers.InstanceNorm(),
        layers.DenseGeneral((2, 5)),
        Dense(3),
    )
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    variables = shaken(jax.eval_shape(LinenBreadth().init, jax.random.key(1), x))
    names = [f"ConvTranspose_{i}" for i in (0, 1)]
    order = [names[0], "PReLU_0", "GroupNorm_0", "RMSNorm_0", names[1], "InstanceNorm_0", "DenseGeneral_0", "Dense_0"]
    for given in (None, order):
        params, state = from_flax(model, variables, names=given)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(1), x)[0])
    assert_same(model(params, x, state), LinenBreadth().apply(variables, x), 1e-4)


def weights(y):
    return jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(5, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.Conv(6, (2, 2), strides=2, padding="VALID")(x))
        x = nn.avg_pool(x, (2, 1), (1, 1))
        x = nn.tanh(nn.LayerNorm()(nn.Dense(7)(x.reshape(x.shape[0], -1))))
        return nn.Dense(3)(x)


OUR_CNN = serial(
    Conv(5, (3, 3), use_bias=False), BatchNorm(momentum=0.9), ops.relu, MaxPool((2, 2), (2, 2)),
    Conv(6, (2, 2), strides=2, padding="VALID"), ops.gelu, AvgPool((2, 1), (1, 1)), Flatten(),
    Dense(7), LayerNorm(), ops.tanh, Dense(3),
)  # fmt: skip
IMAGES = jax.random.normal(jax.random.key(0), (4, 9, 8, 2))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("wrap", [dict, freeze, jax.jit(lambda v: v)], ids=["dict", "FrozenDict", "sorted"])
def test_linen(train, wrap):
    theirs = LinenCnn()
    variables = shaken(theirs.init(jax.random.key(1), IMAGES))
    params, state = from_flax(OUR_CNN, wrap(variables))
    assert jax.tree.structure((params, state)) == jax.tree.structure(OUR_CNN.init(jax.random.key(0), IMAGES))

    def their_loss(p, x):
        y, new = theirs.apply({"params": p, "batch_stats": variables["batch_stats"]}, x, train, mutable=["batch_stats"])
        return jnp.sum(y * weights(y)), (y, new["batch_stats"])

    (dp, dx), (y, stats) = jax.grad(their_loss, argnums=(0, 1), has_aux=True)(variables["params"], IMAGES)
    mine, tape = OUR_CNN.forward(params, IMAGES, state, train=train)
    dparams, mine_dx = OUR_CNN.backward(tape, weights(mine))
    # The gradients, put into Flax's tree and through from_flax, must stand where ours do.
    want, new_state = from_flax(OUR_CNN, {"params": dp, "batch_stats": stats})
    assert_same((mine, mine_dx), (y, dx))
    assert_same(dparams, want)
    assert_same(tape.state, new_state)

    def our_loss(p, x):
        y, _ = OUR_CNN.apply(p, x, state, train=train)
        return jnp.sum(y * weights(y))

    assert_same(jax.grad(our_loss, argnums=(0, 1))(params, IMAGES), (dparams, mine_dx))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(7, 3, rngs=rngs)
        self.conv = nnx.Conv(2, 5, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(9 * 8 * 5, 7, rngs=rngs)
        self.other = nnx.LayerNorm(7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.sigmoid(self.other(self.hidden(x.reshape(x.shape[0], -1)))))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("pure", [False, True])
def test_nnx(train, pure):
    ours = serial(
        Conv(5, (3, 3), use_bias=False), BatchNorm(momentum=0.9), ops.relu, Flatten(),
        Dense(7), LayerNorm(), ops.sigmoid, Dense(3),
    )  # fmt: skip
    graph, params, rest = nnx.split(NnxCnn(nnx.Rngs(0)), nnx.Param, ...)
    params, rest = shaken(params), rest
    merged = nnx.merge_state(params, rest)
    p, s = from_flax(ours, nnx.to_pure_dict(merged) if pure else merged)

    def their_loss(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        model.train() if train else model.eval()
        y = model(x)
        return jnp.sum(y * weights(y)), (y, nnx.state(model))

    (dp, dx), (y, after) = jax.grad(their_loss, argnums=(0, 1), has_aux=True)(params, IMAGES)
    mine, tape = ours.forward(p, IMAGES, s, train=train)
    dparams, mine_dx = ours.backward(tape, weights(mine))
    assert_same((mine, mine_dx), (y, dx))
    assert_same(dparams, from_flax(ours, nnx.merge_state(dp, rest))[0])
    assert_same(tape.state, from_flax(ours, after)[1])
    with pytest.raises(ValueError, match=r"norm has the leaves \['bias', 'scale'\], expected \['bias', 'mean'"):
        from_flax(ours, params)


def test_embedding():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, i):
            return nn.Dense(4)(nn.LayerNorm(use_bias=False)(nn.Embed(7, 3)(i)))

    ours = serial(Embed(7, 3), LayerNorm(use_bias=False), Dense(4))
    tokens = jnp.array([[0, 6, 6], [2, 2, 1]])
    variables = shaken(Linen().init(jax.random.key(0), tokens))
    params, state = from_flax(ours, variables)
    y, tape = ours.forward(params, tokens)
    dp = jax.grad(lambda v: jnp.sum(Linen().apply(v, tokens) * weights(y)))(variables)
    assert_same(y, Linen().apply(variables, tokens))
    dparams, dx = ours.backward(tape, weights(y))
    assert_same(dparams, from_flax(ours, dp)[0])
    assert state == ()
    assert dx is None


def test_dropout_is_that_of_flax():
    x = jax.random.normal(jax.random.key(0), (6, 5))
    for dims in ((), (0,)):
        mine, _ = Dropout(0.3, dims).apply({}, x, key=jax.random.key(3), train=True)
        assert_same(mine, nn.Dropout(0.3, dims).apply({}, x, deterministic=False, rng=jax.random.key(3)))


def dense_tree(**shapes):
    rng = np.random.default_rng(1)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32), "bias": jnp.ones(s[-1])} for name, s in shapes.items()
    }


def kernels(params):
    return [p["kernel"] for p in params["layers"] if p]


def test_shapes_tell_the_order():
    """Constructed in another order than used: the features that are handed on decide, not the numbers."""
    tree = dense_tree(Dense_0=(8, 8), Dense_1=(5, 8), Dense_2=(8, 3))
    params, _ = from_flax(mlp((8, 8, 3)), {"params": tree})
    for got, name in zip(kernels(params), ("Dense_1", "Dense_0", "Dense_2")):
        assert got is tree[name]["kernel"] or jnp.array_equal(got, tree[name]["kernel"])


def test_ambiguous_order_is_refused_and_names_settle_it():
    class Twisted(nn.Module):
        @nn.compact
        def __call__(self, x):
            second, first = nn.Dense(4), nn.Dense(4)  # Dense_0 is used last
            return second(nn.relu(first(x)))

    x = jax.random.normal(jax.random.key(0), (3, 4))
    variables = shaken(Twisted().init(jax.random.key(1), x))
    model = mlp((4, 4))
    with pytest.raises(ValueError, match=r"Dense_0, Dense_1 fit more than one layer .* names=\('Dense_0', 'Dense_1'\)"):
        from_flax(model, variables)
    params, state = from_flax(model, variables, names=("Dense_1", "Dense_0"))
    assert_same(model(params, x, state), Twisted().apply(variables, x))


def test_ambiguous_with_different_shapes():
    """Behind Flatten any number of features may come: (5, 4), (7, 4) may stand in either order."""
    model = serial(Dense(4), Flatten(), Dense(4))
    tree = dense_tree(Dense_0=(5, 4), Dense_1=(7, 4))
    with pytest.raises(ValueError, match="Dense_0, Dense_1 fit more than one layer"):
        from_flax(model, {"params": tree})
    params, _ = from_flax(model, {"params": tree}, ["Dense_1", "Dense_0"])
    assert [k.shape for k in kernels(params)] == [(7, 4), (5, 4)]


def test_one_alike_among_many():
    """What is ambiguous is told, what is not is left out of the sentence; many alike modules take no time."""
    tree = dense_tree(**{f"Dense_{i}": (4, 4) for i in range(1, 30)}, Dense_0=(2, 4), Dense_30=(4, 1))
    model = mlp([4] * 30 + [1])
    with pytest.raises(ValueError, match=r"from_flax: Dense_1, Dense_2, .*Dense_29 fit more than one") as caught:
        from_flax(model, {"params": tree})
    assert "Dense_30 fit" not in str(caught.value)
    assert "from_flax: Dense_0" not in str(caught.value)
    params, _ = from_flax(model, {"params": tree}, [f"Dense_{i}" for i in range(31)])
    assert jnp.array_equal(kernels(params)[10], tree["Dense_10"]["kernel"])
    with pytest.raises(ValueError, match="no module fits"):
        from_flax(mlp([4] * 30 + [2]), {"params": tree})


def test_lists_tell_the_order():
    class Setup(nn.Module):
        def setup(self):
            self.body = nn.Sequential([f for _ in range(12) for f in (nn.Dense(4), nn.relu)])

        def __call__(self, x):
            return self.body(x)

    class Ours(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])

        def __call__(self, x):
            for block in self.blocks:
                x = nnx.relu(block(x))
            return x

    model = serial(*[Dense(4), ops.relu] * 12)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    linen = nn.Sequential([f for _ in range(12) for f in (nn.Dense(4), nn.relu)])
    for module in (linen, Setup()):
        variables = shaken(module.init(jax.random.key(1), x))
        assert_same(model(from_flax(model, variables)[0], x), module.apply(variables, x))
    sequential = nnx.Sequential(*[f for i in range(12) for f in (nnx.Linear(4, 4, rngs=nnx.Rngs(i)), nnx.relu)])
    for module in (sequential, Ours(nnx.Rngs(3))):
        assert_same(model(from_flax(model, nnx.state(module))[0], x), module(x))


def test_residual_and_nested_paths():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(nn.relu(nn.Dense(9)(x))) + nn.Dense(6, use_bias=False)(x)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block(name="block")(x)
            return x + nn.relu(nn.Dense(6, use_bias=False, name="last")(x))

    model = serial(
        residual(serial(Dense(9), ops.relu, Dense(6)), Dense(6, use_bias=False)),
        residual(serial(Dense(6, use_bias=False), Activation(ops.relu))),
    )
    x = jax.random.normal(jax.random.key(0), (3, 4))
    variables = shaken(Linen().init(jax.random.key(1), x))
    params, state = from_flax(model, variables)
    assert jax.tree.structure((params, state)) == jax.tree.structure(model.init(jax.random.key(0), x))
    assert_same(model(params, x), Linen().apply(variables, x))
    # Python makes the outer module of f(g(x)) first: Dense_0 is used second.
    named, _ = from_flax(model, variables, ["block/Dense_1", "block/Dense_0", "block/Dense_2", "last"])
    assert_same(named, params)


def test_a_single_layer():
    x = jnp.ones((2, 3))
    variables = shaken(nn.Dense(4).init(jax.random.key(0), x))
    params, state = from_flax(Dense(4), variables)
    assert_same(Dense(4)(params, x, state), nn.Dense(4).apply(variables, x))
    layer = nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    params, state = from_flax(BatchNorm(use_scale=False, use_bias=False), nnx.state(layer))
    assert params == {}
    assert sorted(state) == ["mean", "var"]


def test_cnn_preset_from_linen():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (3, 4):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (2, 2), (2, 2))
            x = nn.Dense(5, use_bias=False)(x.reshape(x.shape[0], -1))
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(10)(x)

    model = cnn((3, 4), (5,), pool=(2, 2), batch_norm=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = shaken(Linen().init(jax.random.key(1), x))
    params, state = from_flax(model, variables)
    assert_same(model(params, x, state), Linen().apply(variables, x))


TREE = dense_tree(Dense_0=(2, 4), Dense_1=(4, 3))
SCALE = {"GroupNorm_0": {"scale": jnp.ones(3)}}
MESSAGES = [  # layer, variables, names, message
    (mlp((4, 5)), TREE, None, r"no module fits Dense\(features=5\) after 4 features, layer 1 of those with parameters"),
    (mlp((4, 5)), TREE, None, r"Dense_1 has bias \(3,\), kernel \(4, 3\), expected bias \(5,\), kernel \(4, 5\)"),
    (mlp((4,)), TREE, None, r"has no layer left for Dense_1 \(bias \(3,\), kernel \(4, 3\)\)"),
    (mlp((4, 3, 2)), TREE, None, "layer 2 of those with parameters: there is none left"),
    (mlp((4, 3), use_bias=False), TREE, None, r"Dense_0 has the leaves \['bias', 'kernel'\], expected \['kernel'\]"),
    (mlp((4, 3)), {**TREE, **SCALE}, None, r"no layer left for GroupNorm_0 \(scale \(3,\)\)"),
    (LayerNorm(use_bias=False), SCALE, None, "GroupNorm_0 is a GroupNorm"),
    (serial(Flatten()), TREE, None, "no layer left for Dense_0"),
    (Conv(4, (2,)), dense_tree(Conv_0=(2, 4)), None, r"Conv_0 has kernel \(2, 4\), expected kernel \(2, 2, 4\)"),
    (mlp((4, 3)), TREE, ["Dense_0"], "expected 2 different paths"),
    (mlp((4, 3)), TREE, ["Dense_0", "Dense_0"], "expected 2 different paths"),
    (mlp((4, 3)), TREE, ["Dense_0", "Dense_7"], "names has 'Dense_7', variables has Dense_0, Dense_1"),
    (mlp((4, 3)), TREE, ["Dense_1", "Dense_0"], r"Dense_1 has bias \(3,\), .*, expected bias \(4,\)"),
    (Dense(4), TREE, ["Dense_0"], r"names leaves out Dense_1 \("),
]


@pytest.mark.parametrize(("model", "tree", "names", "message"), MESSAGES, ids=[m[-1][:40] for m in MESSAGES])
def test_messages(model, tree, names, message):
    with pytest.raises(ValueError, match=message):
        from_flax(model, {"params": tree}, names)


def test_messages_about_variables():
    with pytest.raises(ValueError, match=r"collections \['cache'\]"):
        from_flax(mlp((4, 3)), {"params": TREE, "cache": {}})
    with pytest.raises(TypeError, match="variables is a list, expected linen's"):
        from_flax(mlp((4, 3)), [TREE])
