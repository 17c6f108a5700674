"""One trace serves every platform: what a program is lowered for decides the form, not where it was traced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import fbackprop as fb
from fbackprop.measuring import saved_bytes
from fbackprop.ops._order import again, in_turn, zeros


def text(fn, *args, platform):
    """The gradient of a function of arrays, lowered for a platform that need not be here."""

    def loss(*args):
        return jnp.sum(jnp.square(fn(*args).astype(jnp.float32)))

    return export.export(jax.jit(jax.grad(loss, tuple(range(len(args))))), platforms=(platform,))(*args).mlir_module()


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_takes_heads_in_turns_on_a_cpu_only(dtype):
    q = jax.ShapeDtypeStruct((2, 2048, 4, 32), dtype)

    def attend(q, k, v):
        return fb.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    def heads(platform):
        found = re.findall(r"tensor<(\d)x(\d)x\d{2,3}x1x\d{3,4}xf32>", text(attend, q, q, q, platform=platform))
        return set(found)  # of blocks of logits, (batch, head) at once

    assert heads("cpu") == {("1", "1")}
    assert heads("cuda") == heads("tpu") == {("2", "4")}


def test_a_program_for_two_platforms_gives_the_same_here():
    x, kernel = normal(2, 6, 5, 8), normal(3, 3, 2, 8)

    def loss(x, kernel):
        return jnp.sum(jnp.square(fb.conv(x, kernel, feature_group_count=4, strides=2)))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    both = export.export(gradient, platforms=("cpu", "cuda"))(x, kernel)
    for got, want in zip(both.call(x, kernel), jax.grad(fb.without_rules(loss), (0, 1))(x, kernel)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [4, 32])
def test_grouped_convolutions_are_the_compilers_elsewhere_than_on_a_cpu(groups):
    x, kernel = normal(2, 6, 5, 32), normal(3, 3, 32 // groups, 32)

    def conv(x, kernel):
        return fb.conv(x, kernel, feature_group_count=groups)

    here, there = (text(conv, x, kernel, platform=platform) for platform in ("cpu", "cuda"))
    assert f"feature_group_count = {groups}" in there
    assert f"batch_group_count = {groups}" in there
    assert there.count("stablehlo.convolution") == 3
    assert f"group_count = {groups}" not in here


def test_the_backward_of_a_convolution_exchanges_features_by_name():
    # The form that compilers recognize: a kernel that is reversed in space and nothing else.
    found = text(lambda x, k: fb.conv(x, k, strides=2), normal(2, 8, 8, 4), normal(3, 3, 4, 6), platform="cuda")
    assert "[0, 1, o, i]" in found
    assert "stablehlo.transpose" not in found.split("[0, 1, o, i]")[0]


def test_accelerators_keep_the_order_and_compute_again_and_a_cpu_does_not():
    def fn(x, y):
        x, y = in_turn(jnp.sin(x), y)
        return x + again(y, x) + zeros((3,), x.dtype, x)

    x = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(fn)(x, x), jnp.sin(x) + x)
    here, there = (export.export(jax.jit(fn), platforms=(p,))(x, x).mlir_module() for p in ("cpu", "cuda"))
    assert here.count("stablehlo.optimization_barrier") == 0
    assert there.count("stablehlo.optimization_barrier") == 3
    np.testing.assert_array_equal(jax.vmap(fn, (0, None))(jnp.stack([x, 2 * x]), x)[1], jnp.sin(2 * x) + x)
    check_grads(jax.jit(fn), (x, x), order=2, modes=["rev"], rtol=1e-2)


def test_order_does_not_keep_what_only_a_frozen_kernel_needs():
    x, kernel = normal(64, 8), normal(8, 4)
    up, down = normal(8, 16), normal(16, 8)
    bare, hidden = kernel.nbytes, 64 * 16 * 4
    assert saved_bytes(lambda x: fb.dense(x, kernel), x) == bare
    assert saved_bytes(lambda x: fb.gelu_mlp(x, up, down), x) == up.nbytes + down.nbytes + hidden
