"""Normalizations and activations beside Flax's and jax.nn's: values, gradients, masks, memory, sentences."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes

X = 1 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
SCALE, BIAS, DY = jnp.linspace(0.5, 1.5, 6), jnp.linspace(-1.0, 1.0, 6), jax.random.normal(jax.random.key(1), X.shape)
MASK = jax.random.uniform(jax.random.key(2), (2, 3, 4, 1)) < 0.7
PARAMS = {"params": {"scale": SCALE, "bias": BIAS}}
STATISTICS = {"batch_stats": {"mean": BIAS, "var": SCALE}}

# Flax's variance is E[x²] − μ² by default; the definition here is that of the centred values.
FLAX = {
    "layer_norm": (nn.LayerNorm(use_fast_variance=False), fb.layer_norm, {}),
    "group_norm": (nn.GroupNorm(num_groups=3, use_fast_variance=False), fb.group_norm, {"num_groups": 3}),
    "group_norm of a size": (
        nn.GroupNorm(num_groups=None, group_size=3, use_fast_variance=False),
        fb.group_norm,
        {"num_groups": None, "group_size": 3},
    ),
    "instance_norm": (nn.InstanceNorm(use_fast_variance=False), fb.instance_norm, {}),
    "rms_norm": (nn.RMSNorm(), lambda x, scale, bias, **options: fb.rms_norm(x, scale, **options), {}),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", FLAX)
def test_norms_agree_with_flax(name, masked):
    module, ours, options = FLAX[name]
    mask = jnp.broadcast_to(MASK, X.shape).at[..., ::2].set(True) if masked else None

    def theirs(x, scale, bias):
        given = {"params": {"scale": scale, **({} if name == "rms_norm" else {"bias": bias})}}
        return module.apply(given, x, mask=mask)

    def both(fn):
        y, pullback = jax.vjp(fn, X, SCALE, BIAS)
        return y, *pullback(DY)

    got = jax.jit(lambda: both(lambda *a: ours(*a, **options, where=mask)))()
    for a, b in zip(got, jax.jit(lambda: both(theirs))()):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_batch_norm_with_a_mask_agrees_with_flax():
    module = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)

    def theirs(x, scale, bias):
        given = {"params": {"scale": scale, "bias": bias}, **STATISTICS}
        y, new = module.apply(given, x, mask=MASK, mutable=["batch_stats"])
        return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]

    def ours(x, scale, bias):
        return fb.batch_norm(x, scale, bias, BIAS, SCALE, train=True, momentum=0.9, where=MASK)

    def both(fn):
        y, pullback = jax.vjp(fn, X, SCALE, BIAS)
        return *y, *pullback((DY, SCALE, BIAS))

    for a, b in zip(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(theirs))()):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_masked_batch_norm_over_devices_counts_the_elements_of_all():
    """Not the mean of the means of the devices, whose masks keep different numbers."""
    x, mask, dy = (jnp.tile(a, (2, 1, 1, 1)) for a in (X, MASK, DY))
    x = x.at[2:].multiply(0.5)

    def gradient(x, mask, dy, axis_name=None):
        y, pullback = jax.vjp(lambda x: fb.batch_norm(x, train=True, axis_name=axis_name, where=mask), x)
        return *y, *pullback((dy, jnp.zeros(6), jnp.zeros(6)))

    whole = gradient(x, mask, dy)
    split = (a.reshape(4, 1, *a.shape[1:]) for a in (x, mask, dy))
    y, mean, var, dx = jax.vmap(lambda *a: gradient(*a, axis_name="d"), axis_name="d")(*split)
    for a, b in zip((y.reshape(x.shape), mean[0], var[0], dx.reshape(x.shape)), whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm", [fb.layer_norm, fb.rms_norm, fb.instance_norm, lambda *a, **k: fb.batch_norm(*a, train=True, **k)[0]]
)
def test_nothing_counted_and_garbage_under_the_mask_stay_finite(norm):
    x = X.at[0].set(jnp.nan).at[1, 0].set(jnp.inf)
    mask = jnp.isfinite(x)

    def loss(x, scale):
        return jnp.where(mask, norm(x, scale, where=mask), 0).sum()

    value, (dx, dscale) = jax.value_and_grad(loss, (0, 1))(jnp.where(mask, x, 7.0), SCALE)
    assert jnp.isfinite(value)
    assert jnp.isfinite(dx).all()
    assert jnp.isfinite(dscale).all()
    assert jnp.isfinite(jnp.where(mask, norm(x, where=mask), 0)).all()


JAX_NN = ["celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "log_sigmoid", "mish", "relu", "relu6",
          "selu", "sigmoid", "silu", "soft_sign", "softplus", "squareplus"]  # fmt: skip
POINTS = jnp.array([-1e30, -200.0, -50.0, -6.0, -3.0, -1.0, -0.3, 0.0, 1e-3, 0.7, 1.0, 3.0, 6.0, 20.0, 200.0, 1e30])


@pytest.mark.parametrize("name", JAX_NN)
def test_activations_agree_with_jax_nn(name):
    """Values and slopes, at the kinks and far out, where jax.nn's are finite."""
    ours, theirs = getattr(fb, name), getattr(jax.nn, name)
    points = jnp.clip(POINTS, -1e15, 1e15) if name == "squareplus" else POINTS  # its x² overflows, as in jax.nn
    for x in (points, points.astype(jnp.bfloat16)):
        y, slope = ours(x), jax.grad(lambda x: ours(x).astype(jnp.float32).sum())(x)
        assert (y.dtype, slope.dtype) == (x.dtype, x.dtype)
        assert jnp.isfinite(slope).all()
        with jax.enable_x64(True):
            wide = x.astype(jnp.float64)
            want, want_slope = theirs(wide), jax.vmap(jax.grad(theirs))(wide)
        tolerance = 1e-5 if x.dtype == jnp.float32 else 1e-2
        known = np.isfinite(want) & np.isfinite(want_slope)
        np.testing.assert_allclose(np.float64(y)[known], want[known], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(np.float64(slope)[known], want_slope[known], rtol=tolerance, atol=tolerance)


def test_the_slope_of_relu_squared_where_its_value_underflows_in_float16():
    x = jnp.array([-1e-3, 0, 1e-4, 2e-4, 3e-4, 1e-3], jnp.float16)
    np.testing.assert_array_equal(jax.grad(lambda x: fb.relu_squared(x).sum())(x), 2 * jnp.maximum(x, 0))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 0), (2, 3, 6)], ids=str)
def test_pieces_pack_any_shape(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    dy = jnp.ones(shape) * 2
    for ours, theirs in ((fb.relu, jax.nn.relu), (fb.leaky_relu, jax.nn.leaky_relu), (fb.hard_tanh, jax.nn.hard_tanh)):
        for a, b in zip(jax.vjp(ours, x)[1](dy), jax.vjp(theirs, x)[1](dy)):
            np.testing.assert_allclose(a, b)


def test_bytes_kept():
    wide, half = jax.ShapeDtypeStruct((64, 768), jnp.float32), jax.ShapeDtypeStruct((64, 768), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((768,), jnp.bfloat16)
    elements = 64 * 768
    for x in (wide, half):
        assert saved_bytes(fb.relu, x) == elements / 4
        assert saved_bytes(fb.leaky_relu, x) == elements / 4
        for op in (fb.gelu, fb.silu, fb.mish, fb.softplus, fb.tanh, fb.sigmoid, fb.relu_squared):
            assert saved_bytes(op, x) == elements * x.dtype.itemsize, op
    assert saved_bytes(fb.layer_norm, half, vector, vector) == 2 * elements + 2 * 768 + 2 * 4 * 64
    assert saved_bytes(fb.rms_norm, half, vector) == 2 * elements + 2 * 768 + 4 * 64
    image = jax.ShapeDtypeStruct((4, 8, 8, 64), jnp.bfloat16)
    assert saved_bytes(fb.group_norm, image) == 2 * 4 * 64 * 64 + 2 * 4 * 4 * 32
    assert saved_bytes(lambda x: fb.batch_norm(x, train=True)[0], image) == 2 * 4 * 64 * 64 + 2 * 4 * 64


def test_relu_in_one_program_is_a_choice_without_bits():
    """The change of type and its reverse vanish: no array of bytes is left."""
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    program = jax.jit(lambda x, dy: jax.vjp(fb.relu, x)[1](dy)).lower(x, x).compile()
    assert "u8[" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes == 0


BAD = [
    (lambda: fb.group_norm(X), "group_norm: num_groups 32 must divide the 6 channels of x"),
    (lambda: fb.group_norm(X, num_groups=None, group_size=4), "group_norm: group_size 4 must divide the 6 channels"),
    (lambda: fb.group_norm(X, num_groups=0), "group_norm: num_groups 0 must divide"),
    (lambda: fb.group_norm(X, num_groups=3, group_size=2), "group_norm: one of num_groups and group_size is expected, got num"),
    (lambda: fb.group_norm(X, num_groups=None), "group_norm: one of num_groups and group_size is expected, got neither"),
    (lambda: fb.group_norm(X, SCALE[:3], num_groups=3), r"group_norm: scale has shape \(3,\), expected \(6,\)"),
    (lambda: fb.group_norm(SCALE, num_groups=3), r"group_norm: x must be \[batch, …, channels\]"),
    (lambda: fb.instance_norm(X.astype(int)), "instance_norm: x must be of a floating-point dtype"),
    (lambda: fb.rms_norm(X, SCALE[:3]), r"rms_norm: scale has shape \(3,\), expected \(6,\)"),
    (lambda: fb.rms_norm(X, axis=4), "rms_norm: axis 4 is out of range"),
    (lambda: fb.layer_norm(X, where=SCALE), "layer_norm: where must be a mask of booleans, got float32"),
    (lambda: fb.layer_norm(X, where=MASK[0]), "layer_norm: where must have the dimensions of x"),
    (lambda: fb.batch_norm(X, train=True, where=MASK[..., :0]), "batch_norm: where must have the dimensions of x"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[re.sub(r"\W+", "_", s)[:40] for _, s in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
