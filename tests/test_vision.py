"""Residual networks and vision transformers: counts, Flax with the same weights, gradients of the definitions, sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import fbackprop as fb
from fbackprop.models import from_flax, named, resnet, vit

IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 2)), jnp.float32)


def count(model, shape):
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160),
     ("vit-s16", 22_050_664), ("vit-b16", 86_567_656)],
)  # fmt: skip
def test_parameters_of_named_sizes(name, expected):
    assert count(named(name), (1, 224, 224, 3)) == expected


def test_resnet_50_halves_the_image_five_times():
    model = named("resnet50")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    shapes = []
    for layer, own, old in zip(model.layers, params["layers"], state["layers"]):
        x = jax.eval_shape(layer, own, x, old)
        shapes.append(x.shape[1])
    assert list(dict.fromkeys(shapes)) == [112, 56, 28, 14, 7, 2048, 1000]


class FlaxResNet(nn.Module):
    """The same network as a person would write it with Flax's modules."""

    bottleneck: bool
    stem: str
    train: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)

        def conv(features, size, stride=1):
            return nn.Conv(features, (size, size), stride, size // 2, use_bias=False)

        if self.stem == "imagenet":
            x = nn.relu(norm(conv(4, 7, 2)(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = nn.relu(norm(conv(4, 3)(x)))
        for stage, features in enumerate((4, 6)):
            stride, out = (2, 1)[stage == 0], features * (4 if self.bottleneck else 1)
            if self.bottleneck:
                y = nn.relu(norm(conv(features, 1)(x)))
                y = nn.relu(norm(conv(features, 3, stride)(y)))
                y = norm(conv(out, 1)(y))
            else:
                y = nn.relu(norm(conv(features, 3, stride)(x)))
                y = norm(conv(features, 3)(y))
            if stride > 1 or x.shape[-1] != out:
                x = norm(conv(out, 1, stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


def drawn(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.2, 0.9, s.shape) * rng.choice([-1, 1], s.shape), s.dtype), tree)


@pytest.mark.parametrize(("bottleneck", "stem"), [(False, "cifar"), (True, "imagenet")])
def test_resnet_is_the_network_of_flax_modules(bottleneck, stem):
    theirs = FlaxResNet(bottleneck, stem)
    variables = jax.eval_shape(theirs.init, jax.random.key(0), IMAGE)
    variables = {**variables, "params": drawn(variables["params"])}
    variables["batch_stats"] = jax.tree.map(lambda s: jnp.linspace(0.5, 1.5, s.size), variables["batch_stats"])
    ours = resnet((1, 1), (4, 6), 5, bottleneck=bottleneck, stem=stem)
    numbers = {"Conv": 0, "BatchNorm": 0}
    order = []
    for path in ["Conv", "BatchNorm"] * (len(variables["batch_stats"])):
        order.append(f"{path}_{numbers[path]}")
        numbers[path] += 1
    params, state = from_flax(ours, variables, [*order, "Dense_0"])
    expected = jax.jit(theirs.apply)(variables, IMAGE)
    np.testing.assert_allclose(jax.jit(ours)(params, IMAGE, state), expected, rtol=2e-4, atol=2e-4)


def test_resnet_by_hand_is_the_gradient_of_its_definitions():
    model = resnet((1, 1), (4, 6), 5, bottleneck=True, stem="cifar")
    with jax.enable_x64(True):
        x = IMAGE.astype(jnp.float64)
        params, state = jax.eval_shape(model.init, jax.random.key(0), x)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), drawn(params))
        state = jax.tree.map(lambda s: jnp.ones(s.shape), state)

        def loss(params, x):
            return jnp.sum(jnp.sin(model.apply(params, x, state, train=True)[0]))

        @jax.jit
        def by_hand(params, x):
            y, tape = model.forward(params, x, state, train=True)
            return model.backward(tape, jnp.cos(y))

        twin = jax.jit(jax.grad(fb.without_rules(loss), (0, 1)))(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), by_hand(params, x), twin)


def test_a_resnet_begins_as_its_shortcuts():
    params, _ = jax.eval_shape(resnet((2,), (4,), 5).init, jax.random.key(0), IMAGE)
    model = resnet((1,), (4,), 5, stem="cifar").layers[3]
    own, state = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))
    np.testing.assert_array_equal(own["body"]["layers"][-1]["scale"], np.zeros(4))
    np.testing.assert_allclose(model(own, jnp.ones((1, 4, 4, 4)), state), 1)
    assert params


class FlaxViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), name="patches")(x).reshape(x.shape[0], -1, 8)
        token = self.param("class", nn.initializers.zeros, (1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token[None], (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("position", nn.initializers.zeros, (x.shape[1], 8))[None]
        for i in range(2):
            y = nn.LayerNorm(name=f"one{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(y, y)
            y = nn.Dense(32, name=f"up{i}")(nn.LayerNorm(name=f"two{i}")(x))
            x = x + nn.Dense(8, name=f"down{i}")(nn.gelu(y, approximate=False))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def test_vit_is_the_network_of_flax_modules_and_has_the_gradient_of_its_definitions():
    model = vit(8, 4, 5, layers=2, width=8, heads=2, channels=2, scan=False)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), IMAGE)[0])
    theirs = {
        "patches": {"kernel": params["patches"]["kernel"].reshape(4, 4, 2, 8), "bias": params["patches"]["bias"]},
        **{name: params[name]["embedding"] for name in ("class", "position")},
        **{name: params[name] for name in ("head", "norm")},
    }
    for i, p in enumerate(params["blocks"]):
        parts = {}
        for j, name in enumerate(("query", "key", "value")):
            columns = slice(8 * j, 8 * j + 8)
            kernel, bias = p["qkv"]["kernel"][:, columns], p["qkv"]["bias"][columns]
            parts[name] = {"kernel": kernel.reshape(8, 2, 4), "bias": bias.reshape(2, 4)}
        parts["out"] = {"kernel": p["out"]["kernel"].reshape(2, 4, 8), "bias": p["out"]["bias"]}
        theirs |= {f"attention{i}": parts, f"one{i}": p["attention_norm"], f"two{i}": p["mlp_norm"]}
        theirs |= {f"up{i}": p["up"], f"down{i}": p["down"]}
    expected = jax.jit(FlaxViT().apply)({"params": theirs}, IMAGE)
    np.testing.assert_allclose(jax.jit(model)(params, IMAGE), expected, rtol=2e-4, atol=2e-4)

    def loss(params, x):
        return jnp.sum(jnp.sin(model(params, x)))

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, IMAGE))
        ours, twin = (jax.jit(jax.grad(f, (0, 1)))(*wide) for f in (loss, fb.without_rules(loss)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, twin)


def test_messages():
    with pytest.raises(ValueError, match=r"resnet: depths is \(1, 1\) and features \(4,\), expected one number each"):
        resnet((1, 1), (4,))
    with pytest.raises(ValueError, match=r"resnet: depths\[1\] is 0"):
        resnet((1, 0), (4, 6))
    with pytest.raises(ValueError, match="stem is 'mnist', expected 'imagenet' or 'cifar'"):
        resnet(stem="mnist")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ViT: images of 30 pixels do not divide into patches of 16"):
        vit(30)
    with pytest.raises(ValueError, match=r"ViT: x has shape \(3, 8, 8, 2\), expected \(batch, 8, 8, 3\)"):
        vit(8, 4).init(jax.random.key(0), IMAGE)
    with pytest.raises(TypeError, match="vit: there is no option 'depth'"):
        vit(depth=3)
