"""The rules for transformer blocks: values of Flax, what is kept and formed, sentences for bad input. Gradients: the table."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes
from fbackprop.ops.reversing import _sine_layer
from fbackprop.rules import RULES


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------- values of others


def gated_values(activation):
    x, gate, up, down = random(0, 3, 5, 8), random(1, 8, 12), random(2, 8, 12), random(3, 12, 8)
    return (x, gate, up, down), (activation(x @ gate) * (x @ up)) @ down


def test_values_are_those_of_jax_nn_and_flax():
    args, expected = gated_values(jax.nn.silu)
    close(fb.swiglu_mlp(*args), expected)
    for approximate in (True, False):
        args, expected = gated_values(functools.partial(jax.nn.gelu, approximate=approximate))
        close(fb.geglu_mlp(*args, approximate=approximate), expected)
    x, kernel, bias, scale, shift = random(0, 3, 5, 8), random(1, 8, 6), random(2, 6), random(3, 8), random(4, 8)
    dense = nn.Dense(6).bind({"params": {"kernel": kernel, "bias": bias}})
    norm = nn.LayerNorm(epsilon=1e-5).bind({"params": {"scale": scale, "bias": shift}})
    close(fb.norm_dense(x, kernel, bias, scale, shift, epsilon=1e-5), dense(norm(x)))
    plain = nn.LayerNorm(use_scale=False, use_bias=False).bind({})
    close(fb.norm_dense(x, kernel, bias), dense(plain(x)))
    rms = nn.RMSNorm().bind({"params": {"scale": scale}})
    close(fb.norm_dense(x, kernel, bias, scale, norm="rms"), dense(rms(x)))
    y, s = fb.residual_norm(x, 2 * x, scale, shift, epsilon=1e-5)
    close(y, norm(3 * x))
    close(s, 3 * x)
    close(fb.residual_norm(x, 2 * x, scale, norm="rms")[0], rms(3 * x))


def test_lora_dense_is_the_layer_with_the_merged_kernel():
    x, kernel, a, b, bias = random(0, 4, 5, 8), random(1, 8, 6), random(2, 8, 2), random(3, 2, 6), random(4, 6)
    close(fb.lora_dense(x, kernel, a, b, bias, scale=0.5), fb.dense(x, kernel + 0.5 * a @ b, bias))
    ours, theirs = (
        jax.grad(lambda x, a, b: jnp.sin(f(x, a, b)).sum(), (0, 1, 2))(x, a, b)
        for f in (
            lambda x, a, b: fb.lora_dense(x, kernel, a, b, scale=0.5),
            lambda x, a, b: x @ (kernel + 0.5 * a @ b),
        )
    )
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-4)


def test_a_stream_in_float32_feeds_a_block_in_bfloat16():
    y, s = fb.residual_norm(random(0, 4, 8, dtype=jnp.bfloat16), random(1, 4, 8))
    assert (y.dtype, s.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_both_outputs_of_residual_norm_under_vmap_over_a_parameter(norm):
    """s does not depend on scale and bias; its cotangent must be counted once for each member all the same."""
    x, residual, scale, bias = random(0, 4, 8), random(1, 4, 8), random(2, 3, 8), random(3, 3, 8)

    def loss(fn, x, scale, bias):
        y, s = fn(x, residual, scale, bias, norm=norm)
        return (jnp.sin(y) + jnp.cos(s)).sum()

    for axes in ((None, 0, None), (None, None, 0), (None, 0, 0)):
        given = (x, scale if axes[1] == 0 else scale[0], bias if axes[2] == 0 else bias[0])
        ours, theirs = (
            jax.grad(lambda *a, f=f, axes=axes: jax.vmap(functools.partial(loss, f), axes)(*a).sum(), (0, 1, 2))(*given)
            for f in (fb.residual_norm, fb.without_rules(fb.residual_norm))
        )
        for mine, other in zip(ours, theirs):
            np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-4)


def test_slopes_stay_finite_at_huge_inputs():
    x = jnp.array([[-1e30, 1e30, -1e10, 200.0]])
    eye = jnp.eye(4)
    for mlp in (fb.gelu_mlp, functools.partial(fb.gelu_mlp, approximate=False)):
        assert np.isfinite(jax.grad(lambda x, f=mlp: f(x, eye, eye).sum())(x)).all()
    for mlp in (fb.swiglu_mlp, fb.geglu_mlp, functools.partial(fb.geglu_mlp, approximate=False)):
        assert np.isfinite(jax.grad(lambda x, f=mlp: f(x, eye, jnp.zeros((4, 4)), eye).sum())(x)).all()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("norm_dense", [(4, 8)]), ("gelu_mlp", [(4, 5), (5, 8)]), ("swiglu_mlp", [(4, 5), (4, 5), (5, 8)])],
)
def test_columns_of_the_last_kernel_over_devices(name, shapes):
    """x does not vary over the devices, dy does: what puts the backward in order varies as both together do."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4), *shapes)]
    mesh = jax.make_mesh((8,), ("columns",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.PartitionSpec(None, "columns")
    specs = (*(jax.sharding.PartitionSpec() for _ in shapes), columns)

    def gradients(fn):
        return jax.jit(jax.grad(lambda arrays: (fn(*arrays) ** 2).sum()))(arrays)

    op = getattr(fb, name)
    mapped = jax.shard_map(lambda *arrays: op(*arrays), mesh=mesh, in_specs=specs, out_specs=columns)
    for ours, whole in zip(gradients(mapped), gradients(op), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- memory


def test_an_mlp_keeps_what_the_catalogue_asks_for():
    x, kernel, down = struct(8192, 4096), struct(4096, 11008), struct(11008, 4096)
    assert round(saved_bytes(fb.swiglu_mlp, x, kernel, kernel, down) / 2**20) == 666
    assert saved_bytes(fb.without_rules(fb.swiglu_mlp), x, kernel, kernel, down) > 1300 * 2**20
    assert saved_bytes(fb.geglu_mlp, x, kernel, kernel, down) == saved_bytes(fb.swiglu_mlp, x, kernel, kernel, down)
    assert saved_bytes(fb.gelu_mlp, x, kernel, down) == 2 * (8192 * (4096 + 11008) + 2 * 4096 * 11008)


MINIMAL = ("gelu_mlp", "swiglu_mlp", "geglu_mlp", "norm_dense", "residual_norm", "lora_dense", "dropout", "dense", "embed")


@pytest.mark.parametrize("name", [*MINIMAL, "reversible"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_the_minimum(name, dtype):
    rule = RULES[name]
    for sample in rule.samples:
        args, options = sample.make(0, dtype)
        dynamic, static = rule.split(args, options)
        y = jax.eval_shape(lambda *d, rule=rule, static=static: rule.call(rule.op, d, static), *dynamic)
        given = [a for a in dynamic if a is not None]
        where = [i for i, a in enumerate(dynamic) if a is not None]

        def call(*arrays, rule=rule, static=static, dynamic=dynamic, where=where):
            values = list(dynamic)
            for i, array in zip(where, arrays):
                values[i] = array
            return rule.call(rule.op, values, static)

        kept, least = saved_bytes(call, *given), rule.minimum_bytes(y, dynamic, static)
        assert kept == least, f"{name} ({sample}) keeps {kept} bytes, the minimum is {least}"


def test_the_gradient_of_a_frozen_kernel_is_never_formed():
    n, d, r = 64, 96, 2
    args = random(0, n, d), random(1, d, d), random(2, d, r), random(3, r, d), random(4, d)

    def flops(frozen):
        def pullback(*args):
            return jax.vjp(functools.partial(fb.lora_dense, frozen=frozen), *args)[1](jnp.ones((n, d)))

        return jax.jit(pullback).lower(*args).compile().cost_analysis()["flops"]

    dense = 2 * n * d * d
    # y is not asked for, so dy Wᵀ is the one large product; kernel · a · b is not formed either.
    assert dense < flops(True) < 1.3 * dense < 2 * dense < flops(False)
    ours, trained = (jax.grad(lambda *a, f=f: fb.lora_dense(*a, frozen=f).sum(), (0, 1, 2, 3, 4))(*args) for f in (True, False))
    np.testing.assert_array_equal(ours[1], 0)
    for i in (0, 2, 3, 4):
        np.testing.assert_array_equal(ours[i], trained[i])
    without = jax.grad(fb.without_rules(lambda k: fb.lora_dense(args[0], k, *args[2:]).sum()))(args[1])
    np.testing.assert_array_equal(without, 0)


def test_dropout_keeps_a_byte_an_element_or_the_key_alone():
    x, key = random(0, 64, 96), jax.random.key(3)
    gradients, bytes_kept = [], []
    for save in ("mask", "key"):
        of = functools.partial(fb.dropout, rate=0.25, key=key, save=save)
        gradients.append(jax.grad(lambda x, of=of: (of(x) * x).sum())(x))
        bytes_kept.append(saved_bytes(of, x))
    np.testing.assert_array_equal(*gradients)
    assert bytes_kept == [x.size, 8]
    with pytest.raises(ValueError, match='save must be "mask" or "key", got \'bits\''):
        fb.dropout(x, 0.25, key, save="bits")


# ---------------------------------------------------------------------------------------------------------- reversible


def test_reversible_keeps_no_activation_of_any_layer():
    d = 32

    def activations(fn, depth):
        kernel, x = struct(depth, d, d, dtype=jnp.float32), struct(128, 2 * d, dtype=jnp.float32)
        return saved_bytes(lambda k, x: fn(_sine_layer, _sine_layer, k, k, x), kernel, x) - 4 * depth * d * d

    ours = [activations(fb.reversible, depth) for depth in (1, 8, 64)]
    assert ours == [2 * 4 * 128 * 2 * d] * 3, "the output alone, in twice the precision"
    theirs = [activations(fb.without_rules(fb.reversible), depth) for depth in (1, 8, 64)]
    assert theirs[2] > 40 * theirs[0]


def test_reversible_temporaries_do_not_grow_with_the_depth():
    d, x = 32, struct(512, 64, dtype=jnp.float32)

    def temporary(fn, depth):
        kernel = struct(depth, d, d, dtype=jnp.float32)
        gradient = jax.jit(jax.grad(lambda k, x: fn(_sine_layer, _sine_layer, k, k, x).sum(), argnums=1))
        return gradient.lower(kernel, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(fb.reversible, 4), temporary(fb.reversible, 64)
    assert many - few < 60 * 4 * 2 * d * d + 2**16, "parameters and their gradients may grow, activations may not"
    assert temporary(fb.without_rules(fb.reversible), 64) > 10 * many


def _noisy_layer(params, x):
    x = fb.dropout(fb.dense(x, params["kernel"]), 0.5, params["key"])
    return x * params["on"]


def test_reversible_takes_keys_and_integers_among_the_parameters():
    """Dropout inside: the backward draws the mask of the forward."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, params = random(1, 5, 8), {"kernel": 0.3 * random(0, 3, 4, 4), "key": keys, "on": jnp.array([1, 0, 1])}

    def loss(fn, kernel, x):
        moved = {**params, "kernel": kernel}
        return jnp.sin(fn(_noisy_layer, _noisy_layer, moved, moved, x)).sum()

    ours, theirs = (
        jax.grad(functools.partial(loss, f), (0, 1))(params["kernel"], x)
        for f in (fb.reversible, fb.without_rules(fb.reversible))
    )
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-4)
    assert jnp.abs(ours[0][1]).max() == 0, "the layer that is off"


# ----------------------------------------------------------------------------------------------------------- sentences


def _halved(params, x):
    return x[..., :1] * params


BAD = {
    "gelu_mlp: x has 5 features, up expects 4": lambda: fb.gelu_mlp(random(0, 2, 5), random(1, 4, 6), random(2, 6, 3)),
    "gelu_mlp: up gives 6 hidden features, down expects 7": lambda: fb.gelu_mlp(
        random(0, 2, 4), random(1, 4, 6), random(2, 7, 3)
    ),
    "gelu_mlp: down_bias has shape (6,), expected (3,)": lambda: fb.gelu_mlp(
        random(0, 2, 4), random(1, 4, 6), random(2, 6, 3), None, random(3, 6)
    ),
    "swiglu_mlp: gate must be of a floating-point dtype": lambda: fb.swiglu_mlp(
        random(0, 2, 4), jnp.ones((4, 6), int), random(1, 4, 6), random(2, 6, 3)
    ),
    "swiglu_mlp: gate gives 5 hidden features": lambda: fb.swiglu_mlp(
        random(0, 2, 4), random(1, 4, 5), random(1, 4, 6), random(2, 6, 3)
    ),
    "geglu_mlp: expected x [..., in], gate [in, hidden]": lambda: fb.geglu_mlp(
        random(0, 2, 4), random(1, 4), random(1, 4, 6), random(2, 6, 3)
    ),
    'norm_dense: norm must be "layer" or "rms", got \'batch\'': lambda: fb.norm_dense(
        random(0, 2, 4), random(1, 4, 3), norm="batch"
    ),
    "norm_dense: x has 4 features, kernel expects 5": lambda: fb.norm_dense(random(0, 2, 4), random(1, 5, 3)),
    "norm_dense: scale has shape (3,), expected (4,)": lambda: fb.norm_dense(
        random(0, 2, 4), random(1, 4, 3), scale=random(2, 3)
    ),
    "norm_dense: bias has shape (4,), expected (3,)": lambda: fb.norm_dense(random(0, 2, 4), random(1, 4, 3), random(2, 4)),
    "residual_norm: x and residual must have one shape": lambda: fb.residual_norm(random(0, 2, 4), random(1, 4)),
    "lora_dense: b has shape (3, 6), expected (2, 6)": lambda: fb.lora_dense(
        random(0, 2, 4), random(1, 4, 6), random(2, 4, 2), random(3, 3, 6)
    ),
    "lora_dense: x has 4 features, a expects 5": lambda: fb.lora_dense(
        random(0, 2, 4), random(1, 4, 6), random(2, 5, 2), random(3, 2, 6)
    ),
    "reversible: the last axis of x is split in halves": lambda: fb.reversible(
        _sine_layer, _sine_layer, random(0, 2, 3, 3), random(1, 2, 3, 3), random(2, 5, 7)
    ),
    "reversible: every array of params_f and params_g has a first axis of one length": lambda: fb.reversible(
        _sine_layer, _sine_layer, random(0, 2, 3, 3), random(1, 3, 3, 3), random(2, 5, 6)
    ),
    "reversible: f must return one array of the shape that it is given, half of x: (5, 3)": lambda: fb.reversible(
        _halved, _sine_layer, random(0, 2), random(1, 2, 3, 3), random(2, 5, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_gets_a_sentence(sentence):
    with pytest.raises((TypeError, ValueError)) as raised:
        BAD[sentence]()
    assert sentence in str(raised.value)


def test_reversible_refuses_to_close_over_traced_values():
    kernels, x = random(0, 2, 3, 3), random(1, 5, 6)

    def closed(w):
        return fb.reversible(lambda k, x: jnp.tanh(x @ k) * w, _sine_layer, kernels, kernels, x).sum()

    def partial(w):
        return fb.reversible(functools.partial(lambda w, k, x: x * w, w), _sine_layer, kernels, kernels, x).sum()

    for loss in (closed, partial):
        for run in (jax.grad(loss), jax.jit(loss)):
            with pytest.raises((TypeError, ValueError), match="reversible: f closes over a traced value"):
                run(2.0)
        assert np.isfinite(loss(2.0)), "a constant is allowed"
