"""accelerate: a feed-forward block becomes one op, where nothing of it is used elsewhere."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.accelerating import feeding
from fbackprop.measuring import saved_bytes

B, T, D, F = 2, 16, 8, 64
silu, gelu = jax.nn.silu, functools.partial(jax.nn.gelu, approximate=False)


@pytest.fixture(autouse=True)
def small_blocks_count(monkeypatch, request):
    if "size" not in request.node.name:
        monkeypatch.setattr(feeding, "HIDDEN", 0)


def arrays(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, T, D), (D, F), (D, F), (F, D), (F,)
    return tuple(jax.random.normal(k, s, dtype) / 2 for k, s in zip(keys, shapes))


def gated(x, gate, up, down, bias, act=silu):
    return jnp.dot(act(jnp.dot(x, gate)) * jnp.dot(x, up), down)


def turned(x, gate, up, down, bias):
    h = x.reshape(-1, D)
    return (h @ up) * jax.nn.gelu(jax.lax.dot_general(h, gate.T, (((1,), (1,)), ((), ())))) @ down


def plain(x, gate, up, down, bias, act=jax.nn.gelu):
    return jnp.dot(act(jnp.dot(x, up) + bias[None, None]), down) + x


def no_bias(x, gate, up, down, bias):
    return jnp.dot(gelu(jnp.dot(x, up)), down) * 2


def of_flax(x, gate, up, down, bias):
    params = {"up": {"kernel": up, "bias": bias}, "down": {"kernel": down, "bias": bias[:D]}}

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="down")(nn.gelu(nn.Dense(F, name="up")(x)))

    return Block().apply({"params": params}, x)


def of_equinox(x, gate, up, down, bias):
    """Kernels [out, in], which stand first in the products."""

    def one(x):
        return down.T @ jax.nn.gelu(up.T @ x + bias)

    return jax.vmap(jax.vmap(one))(x)


def gated_of_equinox(x, gate, up, down, bias):
    return jax.vmap(jax.vmap(lambda x: down.T @ (silu(gate.T @ x) * (up.T @ x))))(x)


def one_batch_axis_of_equinox(x, gate, up, down, bias):
    return jax.vmap(lambda x: down.T @ gelu(up.T @ x))(x.reshape(-1, D))


def ops_of(fn, *args):
    return sorted(f.op for f in fb.accelerate(fn).traced(*args)[0].program.found if f.replaced)


def total(fn, *args):
    return jnp.sin(fn(*args).astype(jnp.float32)).sum()


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (gated, "swiglu_mlp"),
        (turned, "geglu_mlp"),
        (plain, "gelu_mlp"),
        (no_bias, "gelu_mlp"),
        (of_flax, "gelu_mlp"),
        (of_equinox, "gelu_mlp"),
        (gated_of_equinox, "swiglu_mlp"),
        (one_batch_axis_of_equinox, "gelu_mlp"),
        pytest.param(functools.partial(gated, act=gelu), "geglu_mlp", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_becomes_one(fn, op, dtype):
    args, run = arrays(dtype), fb.accelerate(fn)
    assert ops_of(fn, *args) == [op]
    if dtype == "bfloat16" and fn is not plain:
        return
    old, new = (jax.jit(jax.value_and_grad(functools.partial(total, f), (0, 1, 2, 3, 4)))(*args) for f in (fn, run))
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(b, a, rtol=0, atol=(1e-5 if dtype == "float32" else 0.1) * np.abs(a).max(initial=1e-3))


def test_a_block_keeps_what_its_first_products_gave():
    args = arrays()
    hidden, given = 4 * B * T * F, sum(4 * a.size for a in args[:4])
    assert saved_bytes(fb.accelerate(gated), *args) == given + 2 * hidden
    assert saved_bytes(fb.accelerate(no_bias), *args) == given - 4 * D * F + hidden


def activation_too(x, gate, up, down, bias):
    a = silu(jnp.dot(x, gate))
    return jnp.dot(a * jnp.dot(x, up), down) + a.sum()


def hidden_too(x, gate, up, down, bias):
    u = jnp.dot(x, up)
    return jnp.dot(silu(jnp.dot(x, gate)) * u, down) + u.mean()


def pre_activation_too(x, gate, up, down, bias):
    h = jnp.dot(x, up)
    return jnp.dot(jax.nn.gelu(h), down) + h.mean()


def two_inputs(x, gate, up, down, bias):
    return jnp.dot(silu(jnp.dot(x, gate)) * jnp.dot(2 * x, up), down)


def dropped(x, gate, up, down, bias):
    h = silu(jnp.dot(x, gate)) * jnp.dot(x, up)
    return jnp.dot(jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0), down)


def bias_of_places(x, gate, up, down, bias):
    return jnp.dot(jax.nn.gelu(jnp.dot(x, up) + x[0, :, :1]), down)


def square_bias(x, gate, up, down, bias):
    """As many positions as features: the bias lies along the positions."""
    h = jnp.dot(x, up[:, :T]) + bias[:T][None, :, None]
    return jnp.dot(jax.nn.gelu(jnp.concatenate([h, h], 0)), down[:T])


def precise(x, gate, up, down, bias):
    return jnp.dot(silu(jnp.dot(x, gate, precision="highest")) * jnp.dot(x, up), down)


def squared(x, gate, up, down, bias):
    s = silu(jnp.dot(x, gate))
    return jnp.dot(s * s, down)


def other_activation(x, gate, up, down, bias):
    return jnp.dot(jax.nn.mish(jnp.dot(x, gate)) * jnp.dot(x, up), down)


@pytest.mark.parametrize(
    "fn",
    [
        activation_too, hidden_too, pre_activation_too, two_inputs, dropped, bias_of_places, square_bias, precise, squared,
        other_activation,
    ],
)  # fmt: skip
def test_what_is_no_block_keeps_its_products(fn):
    with jax.numpy_rank_promotion("allow"):
        args, run = arrays(), fb.accelerate(fn)
        assert not any("mlp" in op for op in ops_of(fn, *args))
        np.testing.assert_allclose(run(*args), fn(*args), rtol=1e-4, atol=1e-5)


def test_a_bias_along_positions_is_no_bias_of_features():
    def along_positions(x, up, down, bias):
        return jnp.dot(jax.nn.gelu(jnp.dot(x, up) + jnp.broadcast_to(bias[:, None], (64, 64))), down)

    x, up, down = (jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(3))
    bias = jnp.arange(64.0) / 64
    assert ops_of(along_positions, x, up, down, bias) == ["gelu"]
    assert ops_of(lambda *a: along_positions(*a[:3], a[3].T[:, 0]), x, up, down, jnp.ones((64, 64))) == ["gelu"]


def test_from_its_size_on_a_block_is_merged():
    def found(rows):
        return ops_of(plain, *(jnp.zeros(s) for s in ((rows, 1, D), (D, F), (D, F), (F, D), (F,))))

    assert "gelu_mlp" in found(feeding.HIDDEN // F)
    assert {"gelu", "gelu_mlp"} & set(found(feeding.HIDDEN // F - 1)) == {"gelu"}
