"""Convolution, its transpose and pooling: the values of Flax, depthwise and grouped forms, edges, bytes, bad input."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same_gradients(ours, theirs, *args, atol=2e-5):
    dy = normal(9, *jax.eval_shape(ours, *args).shape)

    def both(*args):
        (y, pullback), (expected, expected_pullback) = jax.vjp(ours, *args), jax.vjp(theirs, *args)
        return (y, *pullback(dy)), (expected, *expected_pullback(dy))

    for own, other in zip(*jax.jit(both)(*args), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize(
    ("padding", "strides", "transpose_kernel"),
    [
        ("SAME", (2, 1), False),
        ("SAME", (5, 2), True),
        ("VALID", (3, 2), True),
        ("CIRCULAR", (2, 1), False),
        ("CIRCULAR", (3, 2), True),
        (2, (2, 3), False),
        (((1, 2), (0, 3)), (3, 1), False),
    ],
)
def test_conv_transpose_is_flax_conv_transpose(padding, strides, transpose_kernel):
    x, options = normal(0, 2, 4, 3, 2), {"strides": strides, "padding": padding, "transpose_kernel": transpose_kernel}
    options["kernel_dilation"] = (1, 2)
    theirs = nn.ConvTranspose(3, (4, 2), **options)
    variables = theirs.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    bias = normal(2, 3)

    def flax(x, kernel, bias):
        return theirs.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    assert_same_gradients(lambda *a: fb.conv_transpose(*a, **options), flax, x, kernel, bias)


def test_conv_transpose_in_one_dimension_without_a_batch():
    x, kernel = normal(0, 5, 2), normal(1, 3, 2, 4)
    want = jax.lax.conv_transpose(x[None], kernel, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0]
    np.testing.assert_allclose(fb.conv_transpose(x, kernel, strides=2), want, rtol=1e-5, atol=1e-6)


def test_the_kernel_gradient_of_conv_transpose_dilates_no_image():
    x, kernel = normal(0, 1, 4, 4, 2), normal(1, 4, 4, 2, 3)
    jaxpr = str(jax.make_jaxpr(lambda s, dy: fb.conv_transpose.backward(s, dy))(
        fb.conv_transpose.forward(x, kernel, strides=2)[1], jnp.ones((1, 8, 8, 3))))  # fmt: skip
    assert set(re.findall(r"lhs_dilation=\(([^)]*)\)", jaxpr)) == {"1, 1"}


@pytest.mark.parametrize(
    ("features", "groups", "out", "window", "options"),
    [
        (6, 6, 6, (3, 2), {"strides": (2, 3), "padding": ((3, 0), (1, 4)), "kernel_dilation": (3, 2)}),
        (6, 6, 6, (3,), {"padding": "CAUSAL", "strides": 4}),
        (6, 6, 6, (2, 3), {"padding": "CIRCULAR"}),
        (6, 6, 12, (3, 3), {"strides": 2}),
        (40, 20, 40, (3,), {"kernel_dilation": 2}),
        (36, 2, 40, (2, 2), {"strides": 2, "padding": 1}),
        (1, 1, 8, (3, 2), {"strides": (2, 3), "padding": ((3, 0), (1, 4)), "kernel_dilation": (2, 3)}),
    ],
)
def test_depthwise_grouped_and_thin_convolutions_are_the_compilers(features, groups, out, window, options):
    x, kernel = normal(0, 2, *(9, 8)[: len(window)], features), normal(1, *window, features // groups, out)
    options = {**options, "feature_group_count": groups}
    assert_same_gradients(
        lambda x, k: fb.conv(x, k, **options), fb.without_rules(lambda x, k: fb.conv(x, k, **options)), x, kernel, atol=1e-4
    )


def test_depthwise_convolution_sums_half_precision_in_float32():
    x, kernel = jnp.ones((1, 64, 64, 4), jnp.bfloat16), jnp.ones((3, 3, 1, 4), jnp.bfloat16)
    _, saved = fb.conv.forward(x, kernel, feature_group_count=4)
    _, dkernel, _ = fb.conv.backward(saved, jnp.ones((1, 64, 64, 4), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(dkernel[1, 1, 0], np.float32), 4096)


def test_min_pool_is_max_pool_of_the_negative():
    options = ((3, 2), (2, 1), ((1, 1), (0, 1)))
    assert_same_gradients(lambda x: fb.min_pool(x, *options), lambda x: -fb.max_pool(-x, *options), normal(0, 2, 6, 7, 3))


def test_dilated_pooling_by_hand():
    x = jnp.array([1.0, 9.0, 3.0, 4.0, 2.0, 8.0, 5.0])[:, None]
    options = {"window_shape": (3,), "window_dilation": (2,)}  # elements i, i + 2, i + 4
    assert fb.max_pool(x, **options).ravel().tolist() == [3, 9, 5]
    assert jax.grad(lambda x: fb.max_pool(x, **options).sum())(x).ravel().tolist() == [0, 1, 1, 0, 0, 0, 1]
    assert fb.min_pool(x, **options).ravel().tolist() == [1, 4, 2]
    assert fb.sum_pool(x, **options).ravel().tolist() == [6, 21, 10]
    assert jax.grad(lambda x: fb.sum_pool(x, **options).sum())(x).ravel().tolist() == [1, 1, 2, 1, 2, 1, 1]
    np.testing.assert_allclose(fb.avg_pool(x, **options).ravel(), [2, 7, 10 / 3], rtol=1e-6)


@pytest.mark.parametrize("options", [((2, 2), (2, 3), ((1, 0), (2, 1))), ((2, 2), (2, 2)), ((1, 3), (4, 3))], ids=str)
def test_average_pooling_of_many_features(options):
    """Windows that lie apart, of few elements, over vectors of features take a path of their own."""
    pool = lambda x: fb.avg_pool(x, *options)  # noqa: E731
    assert_same_gradients(pool, fb.without_rules(pool), normal(0, 2, 5, 7, 16))


def test_places_of_windows_with_more_than_a_byte_of_them():
    x = normal(0, 1, 300, 2)
    _, saved = fb.max_pool.forward(x, (290,))
    assert saved.named().place.dtype == jnp.uint16
    np.testing.assert_array_equal(saved.named().place[0], [np.argmax(x[0, i : i + 290], 0) for i in range(11)])


def test_adaptive_pooling_by_hand():
    x = jnp.arange(5.0)[:, None]  # windows [0, 1], [1, 2, 3], [3, 4]
    assert fb.adaptive_avg_pool(x, (3,)).ravel().tolist() == [0.5, 2, 3.5]
    assert fb.adaptive_max_pool(x, (3,)).ravel().tolist() == [1, 3, 4]
    np.testing.assert_allclose(
        jax.grad(lambda x: fb.adaptive_avg_pool(x, (3,)).sum())(x).ravel(), [1 / 2, 5 / 6, 1 / 3, 5 / 6, 1 / 2], rtol=1e-6
    )
    assert fb.adaptive_avg_pool(x, (7,)).shape == (7, 1)  # larger than the image: elements again


def test_the_first_of_equal_maxima_receives_the_cotangent_of_global_and_adaptive_pooling():
    x = jnp.zeros((1, 2, 3, 1))
    assert jax.grad(lambda x: fb.global_max_pool(x).sum())(x).ravel().tolist() == [1, 0, 0, 0, 0, 0]
    assert jax.grad(lambda x: fb.adaptive_max_pool(x, (1, 1)).sum())(x).ravel().tolist() == [1, 0, 0, 0, 0, 0]
    assert jax.grad(lambda x: fb.min_pool(x, (2, 3)).sum())(x).ravel().tolist() == [1, 0, 0, 0, 0, 0]


def test_global_pooling_shapes():
    x = normal(0, 2, 3, 4, 5)
    np.testing.assert_allclose(fb.global_avg_pool(x), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fb.global_max_pool(x, keepdims=True), x.max((1, 2), keepdims=True))
    np.testing.assert_array_equal(fb.global_max_pool(x, dims=1), x.max(2))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: fb.max_pool(x, (2, 2), (2, 2)), 2 * 4 * 4 * 3),
        (lambda x: fb.min_pool(x, (3, 3), (2, 2), "SAME", window_dilation=(2, 2)), 2 * 4 * 4 * 3),
        (lambda x: fb.adaptive_max_pool(x, (3, 3)), 2 * 3 * 3 * 3),
        (lambda x: fb.global_max_pool(x), 2 * 3),
        (lambda x: fb.avg_pool(x, (2, 2)), 0),
        (lambda x: fb.sum_pool(x, (2, 2)), 0),
        (lambda x: fb.adaptive_avg_pool(x, (3, 3)), 0),
        (lambda x: fb.global_avg_pool(x), 0),
    ],
)
def test_bytes_kept_by_pooling(call, expected):
    assert saved_bytes(call, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)) == expected


IMAGE, KERNEL = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fb.conv_transpose(IMAGE, KERNEL, transpose_kernel=True), "conv_transpose: x has 4 features, kernel expects 8"),
        (lambda: fb.conv_transpose(IMAGE, KERNEL, jnp.ones(4)), "conv_transpose: bias has shape (4,), expected (8,)"),
        (lambda: fb.conv_transpose(IMAGE, KERNEL, strides=0), "conv_transpose: strides must be a positive integer"),
        (lambda: fb.conv_transpose(IMAGE, KERNEL, kernel_dilation=-1), "conv_transpose: kernel_dilation must be a positive"),
        (lambda: fb.conv_transpose(IMAGE, KERNEL, padding="CAUSAL"), "conv_transpose: padding must be one of SAME, VALID"),
        (lambda: fb.conv_transpose(IMAGE[:, :1], KERNEL, padding=0), "conv_transpose: a window of (3, 3) does not fit"),
        (lambda: fb.conv_transpose(IMAGE[0, 0], KERNEL), "conv_transpose: x must be [..., *spatial, features]"),
        (lambda: fb.conv_transpose(IMAGE[:, :0], KERNEL), "conv_transpose: an image of (0, 5) has an empty spatial"),
        (lambda: fb.conv(IMAGE[:, :0], KERNEL), "conv: an image of (0, 5) has an empty spatial dimension"),
        (lambda: fb.conv(IMAGE, KERNEL, kernel_dilation=0), "conv: kernel_dilation must be a positive integer"),
        (lambda: fb.min_pool(IMAGE, (3, 3), window_dilation=(3, 1)), "min_pool: a window of (7, 3) does not fit"),
        (lambda: fb.max_pool(IMAGE, (3, 3), window_dilation=(0, 1)), "max_pool: window_dilation must be a positive integer"),
        (lambda: fb.sum_pool(IMAGE[:, :0], (2, 2), padding="SAME"), "sum_pool: an image of (0, 5) has an empty spatial"),
        (lambda: fb.avg_pool(IMAGE, (2,), padding=((1, -1),)), "avg_pool: padding must give (before, behind) ≥ 0"),
        (lambda: fb.adaptive_avg_pool(IMAGE, 3), "adaptive_avg_pool: output_size must name a size for each"),
        (lambda: fb.adaptive_max_pool(IMAGE, (0, 2)), "adaptive_max_pool: output_size must be a positive integer"),
        (lambda: fb.adaptive_max_pool(IMAGE[:, :0], (2, 2)), "adaptive_max_pool: an image of (0, 5) has an empty spatial"),
        (lambda: fb.global_avg_pool(IMAGE[0, 0]), "global_avg_pool: inputs must be [batch, *spatial, features]"),
        (lambda: fb.global_max_pool(IMAGE[:, :0]), "global_max_pool: an image of (0, 5) has an empty spatial"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()
