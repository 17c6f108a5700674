"""dot_product_attention beyond what every rule is tested for: values of jax.nn, edge cases, bad input, memory, cuDNN."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import dot_product_attention
from fbackprop.context import without_rules
from fbackprop.measuring import saved_bytes
from fbackprop.ops import _attention, _attention_blocks, _attention_cudnn


def arrays(*shapes, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]


def qkv(b=2, t=5, n=4, h=8, s=None, k=None, **options):
    kv = (b, s or t, k or n, h)
    return arrays((b, t, n, h), kv, kv, **options)


@functools.partial(jax.jit, static_argnums=0)
def gradients(fn, dy, *args):
    y, pullback = jax.vjp(fn, *args)
    return y, *pullback(dy)


def agree(ours, theirs, args, tolerance=2e-5):
    dy = jax.random.normal(jax.random.key(9), args[0].shape, args[0].dtype)
    for a, b in zip(gradients(ours, dy, *args), gradients(theirs, dy, *args), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "scale": 0.3},
        {"local_window_size": (2, 1)},
        {"query_seq_lengths": jnp.array([3, 5], jnp.int32), "key_value_seq_lengths": jnp.array([4, 6], jnp.int32)},
        {"mask": jax.random.bernoulli(jax.random.key(1), 0.7, (2, 1, 5, 6)).at[..., 0].set(True)},
    ],
    ids=",".join,
)
def test_values_and_gradients_are_those_of_jax(options):
    (bias,) = arrays((1, 4, 5, 6))
    args = (*qkv(s=6, k=2), bias)
    agree(*(functools.partial(f, **options) for f in (dot_product_attention, jax.nn.dot_product_attention)), args)


def test_without_a_batch_and_with_lse():
    args = [a[0] for a in qkv(b=1)]
    for ours, theirs in zip(*(f(*args, return_residual=True) for f in (dot_product_attention, jax.nn.dot_product_attention))):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


BLOCKS = [
    {"is_causal": True},
    {"is_causal": True, "local_window_size": (40, 0), "soft_cap": 3.0},
    {"local_window_size": (30, 50)},
    {"query_seq_lengths": jnp.array([200, 333]), "key_value_seq_lengths": jnp.array([333, 0])},
]


@pytest.mark.parametrize("options", [BLOCKS[1], *(pytest.param(b, marks=pytest.mark.slow) for b in (BLOCKS[0], *BLOCKS[2:]))])
def test_many_blocks_are_the_definition(options):
    """Lengths that no block divides, heads in turns, in float64."""
    with jax.enable_x64(True):
        bias, ids = *arrays((1, 4, 1, 333), dtype=jnp.float64), jnp.arange(666).reshape(2, 333) // 100
        args = (*qkv(t=333, k=2, h=4, dtype=jnp.float64), bias)
        fn = functools.partial(dot_product_attention, segment_ids=ids, **options)
        agree(fn, without_rules(fn), args, 1e-11)


def test_blocks_elsewhere_than_on_a_cpu_are_the_definition(monkeypatch):
    """All heads at once; and none of the keys for the last queries."""
    plan = _attention_blocks.plan
    monkeypatch.setattr(_attention_blocks, "plan", lambda query, keys, options, cpu: plan(query, keys, options, False))
    args = qkv(b=1, t=300, s=130, n=2, h=3)
    fn = functools.partial(dot_product_attention, local_window_size=(20, 3))
    agree(fn, without_rules(fn), args)
    assert not fn(*args)[:, 150:].any()


def test_segment_ids_as_a_pair():
    args = qkv(s=6)
    ids = jnp.array([[0, 0, 1, 1, 7]] * 2), jnp.array([[0, 1, 1, 0, 2, 1]] * 2)
    mask = ids[0][:, None, :, None] == ids[1][:, None, None, :]
    ours, theirs = (functools.partial(dot_product_attention, **o) for o in ({"segment_ids": ids}, {"mask": mask}))
    agree(ours, theirs, args, 1e-6)


def test_a_query_that_sees_no_key_is_zero_and_has_no_gradient():
    args = qkv()
    for mask in (jnp.zeros((1, 1, 5, 5), bool), jnp.eye(5, dtype=bool)[None, None].at[0, 0, 2].set(False)):
        (out, lse), pullback = jax.vjp(lambda *a, m=mask: dot_product_attention(*a, mask=m, return_residual=True), *args)
        assert not out[:, 2].any()
        assert (lse[:, 2] == -jnp.inf).all()
        found = pullback((jnp.ones_like(out), jnp.zeros_like(lse)))
        assert all(jnp.isfinite(d).all() for d in found)
        assert not found[0][:, 2].any()


def test_large_logits_in_low_precision_give_weights_that_sum_to_one():
    q, k, v = (30 * a.astype(jnp.bfloat16) for a in qkv(t=16, n=1))
    dv = jax.grad(lambda v: dot_product_attention(q, k, v).astype(jnp.float32).sum())(v)
    np.testing.assert_allclose(dv[..., 0].astype(jnp.float32).sum((1, 2)), 16, rtol=1e-2)


# ------------------------------------------------------------------------------------------------------------- bad input

F = jnp.zeros
GOOD = F((2, 5, 4, 8)), F((2, 5, 2, 8)), F((2, 5, 2, 8))
BAD = [
    ((F((5, 8)), *GOOD[1:]), {}, r"query, key and value are \[B, T, N, H\]"),
    ((F((2, 5, 4, 8), jnp.bfloat16), *GOOD[1:]), {}, "one floating-point dtype, got query bfloat16"),
    ((GOOD[0], F((2, 5, 3, 8)), F((2, 5, 3, 8))), {}, "4 query heads do not divide over 3 heads"),
    ((GOOD[0], GOOD[1], F((2, 6, 2, 8))), {}, "key and value must have one shape"),
    ((GOOD[0], F((3, 5, 2, 8)), F((3, 5, 2, 8))), {}, "query is a batch of 2, key and value of 3"),
    ((GOOD[0], F((2, 5, 2, 7)), F((2, 5, 2, 7))), {}, "a query has 8 features, a key 7"),
    ((GOOD[0], F((2, 0, 2, 8)), F((2, 0, 2, 8))), {}, "no axis may have length 0"),
    (GOOD, {"mask": F((1, 1, 5, 5))}, "mask must be boolean"),
    (GOOD, {"mask": F((1, 2, 5, 5), bool)}, r"mask must broadcast to \[B, N, T, S\] = \(2, 4, 5, 5\), got \(1, 2, 5, 5\)"),
    (GOOD, {"bias": F((5, 5), bool)}, "bias must be of a floating-point dtype, got bool; booleans go to mask"),
    (GOOD, {"query_seq_lengths": F((2,))}, "query_seq_lengths must be integers"),
    (GOOD, {"key_value_seq_lengths": F((3,), int)}, r"key_value_seq_lengths must be \[B\], here \(2,\); got \(3,\)"),
    (GOOD, {"segment_ids": F((2, 6), int)}, "segment_ids of queries must be"),
    ((F((2, 6, 4, 8)), *GOOD[1:]), {"segment_ids": F((2, 6), int)}, "segment_ids is a pair"),
    (GOOD, {"local_window_size": -1}, "local_window_size is a number of keys"),
    (GOOD, {"local_window_size": (1, -2)}, "local_window_size is a number of keys"),
    (GOOD, {"soft_cap": 0.0}, "soft_cap must be a positive number"),
    (GOOD, {"is_causal": 1}, "is_causal must be True or False"),
    (GOOD, {"scale": float("nan")}, "scale must be a finite number"),
    (GOOD, {"scale": jnp.ones(())}, "scale is static"),
    (GOOD, {"implementation": "triton"}, "implementation must be None, 'xla' or 'cudnn'"),
    (GOOD, {"implementation": "cudnn"}, "cuDNN's attention computes in bfloat16 and float16, not in float32"),
]


@pytest.mark.parametrize(("args", "options", "sentence"), BAD, ids=[b[2] for b in BAD])
def test_bad_input_gets_a_sentence(args, options, sentence):
    with pytest.raises((TypeError, ValueError), match=f"dot_product_attention: .*{sentence}"):
        dot_product_attention(*args, **options)


# ---------------------------------------------------------------------------------------------------------------- memory


def test_it_keeps_the_arguments_and_two_numbers_a_query():
    args = [jax.ShapeDtypeStruct((4, 2048, n, 128), jnp.bfloat16) for n in (32, 8, 8)]
    fn = functools.partial(dot_product_attention, is_causal=True)
    kept = saved_bytes(fn, *args)
    assert kept == sum(a.size * 2 for a in args) + 2 * 4 * 4 * 2048 * 32
    rule = dot_product_attention.rule
    assert kept <= rule.minimum_bytes(args[0], *rule.split(args, {"is_causal": True}))


def temporaries(length, **options):
    args = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 4
    fn = functools.partial(dot_product_attention, **options)
    step = jax.jit(lambda dy, *a: jax.vjp(fn, *a)[1](dy))
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"is_causal": True}, {}, {"local_window_size": (64, 0)}], ids=str)
def test_temporaries_grow_linearly_with_the_length(options):
    found = [temporaries(n, **options) for n in (2048, 4096, 8192, 16384)]
    assert all(b <= 2.2 * a for a, b in itertools.pairwise(found)), found


@pytest.mark.parametrize(("options", "share"), [({"is_causal": True}, 0.57), ({"local_window_size": (64, 0)}, 0.02), ({}, 1.0)])
@pytest.mark.parametrize("cpu", [True, False])
def test_blocks_that_no_query_sees_are_not_computed(options, share, cpu):
    shape, window = (1, 16384, 1, 2, 8), options.get("local_window_size")
    form = _attention.options_of(np.zeros((1, 1, 2, 8)), np.zeros((1, 1, 1, 8)), None, "is_causal" in options, window, None)
    plan = _attention_blocks.plan(shape, shape[1], form, cpu)
    pairs = sum(len(g.starts) * g.queries * g.keys for g in plan.groups)
    assert pairs <= share * shape[1] ** 2
    rows = [(r, g.queries) for g in plan.groups for r, _ in g.starts]
    assert sum(n for _, n in rows) == shape[1]
    assert [r for r, _ in rows] == sorted({r for r, _ in rows})


# ----------------------------------------------------------------------------------------------------------------- cuDNN


def test_the_choice_of_cudnn():
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert _attention_cudnn.present(gpu)
    for other in (("gpu", "7.5"), ("gpu", "gfx942"), ("cpu", "")):
        assert not _attention_cudnn.present(types.SimpleNamespace(platform=other[0], compute_capability=other[1]))

    def refusal(t=8, s=8, h=64, dtype=jnp.bfloat16, bias=None, lengths=None, ids=None, return_residual=False, **options):
        q, k = jnp.zeros((2, t, 4, h), dtype), jnp.zeros((2, s, 2, h), dtype)
        chosen = {"scale": None, "is_causal": False, "window": None, "soft_cap": None, **options}
        form = _attention.options_of(q, k, **chosen)
        arguments = q, k, k, bias, None, lengths, None, ids
        return _attention_cudnn.refusal(*arguments, options=form, return_residual=return_residual)

    for good in ({}, {"is_causal": True}, {"window": (3, 0)}, {"s": 9}, {"lengths": 1, "is_causal": True}):
        assert not refusal(**good), good
    for bad in (
        {"dtype": jnp.float32}, {"h": 36}, {"h": 256}, {"bias": 1}, {"ids": 1}, {"soft_cap": 2.0}, {"return_residual": True},
        {"window": (3, 1)}, {"window": 2, "lengths": 1, "is_causal": True}, {"s": 9, "is_causal": True},
    ):  # fmt: skip
        assert refusal(**bad), bad


def test_cudnn_that_is_not_there_gets_a_sentence():
    with pytest.raises((RuntimeError, ValueError), match="dot_product_attention: implementation='cudnn' needs an NVIDIA GPU"):
        dot_product_attention(*qkv(dtype=jnp.bfloat16), implementation="cudnn")


@pytest.mark.parametrize("lengths", [{"query_seq_lengths": jnp.array([3, 5]), "key_value_seq_lengths": jnp.array([0, 4])}])
def test_the_halves_around_cudnn(monkeypatch, lengths):
    """With jax.nn's own implementation in its place: what is kept, passed on and set to zero."""
    monkeypatch.setattr(_attention_cudnn, "IMPLEMENTATION", "xla")
    args = qkv(t=5, h=16, k=2, dtype=jnp.bfloat16)
    theirs, ours = (functools.partial(dot_product_attention, implementation=i, **lengths) for i in ("cudnn", "xla"))
    dy = jnp.ones_like(args[0])
    for a, b in zip(gradients(theirs, dy, *args), gradients(ours, dy, *args)):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=3e-2)
