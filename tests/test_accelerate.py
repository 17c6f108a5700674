"""accelerate: what is replaced, what must not be, and that nothing changes."""

import functools
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
import fbackprop.ops
from fbackprop.accelerating import attending, sites
from fbackprop.accelerating.program import Program
from fbackprop.accelerating.rewriting import rewritten

KEY = jax.random.key(0)
slow = pytest.mark.slow


def normal(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def ops_of(fn, *args):
    """The names of what is replaced."""
    return sorted(f.op for f in fb.accelerate(fn).traced(*args)[0].program.found if f.replaced)


_deep = False


@pytest.fixture(autouse=True)
def _depth(request):
    """Gradients are compared for the first case of each test, and for all of them with --slow: it takes a second each."""
    global _deep
    case = getattr(request.node, "callspec", None)
    _deep = request.config.getoption("--slow") or case is None or not any(case.indices.values())


def check(fn, *args, ops, tolerance=3e-5):
    """Replaces just these, and values and gradients are those of the function."""
    assert ops_of(fn, *args) == sorted(ops)
    if _deep:
        agree(fn, fb.accelerate(fn), *args, tolerance=tolerance)


def agree(before, after, *args, tolerance=3e-5):
    """Values and gradients of one weighted sum of all outputs, in programs that are compiled once for speed and not for the
    result: without the compiler's optimizations."""
    moving = tuple(i for i, a in enumerate(args) if jnp.issubdtype(jnp.result_type(*jax.tree.leaves(a)), jnp.floating))

    def total(fn, *args):
        y = [o for o in jax.tree.leaves(fn(*args)) if jnp.issubdtype(o.dtype, jnp.floating)]
        weights = [np.random.default_rng(i).normal(size=o.shape).astype(np.float32) for i, o in enumerate(y)]
        return sum((o.astype(jnp.float32) * w).sum() for o, w in zip(y, weights)), y

    run = [jax.jit(jax.value_and_grad(functools.partial(total, fn), moving, has_aux=True))(*args) for fn in (before, after)]
    old, new = map(jax.tree.leaves, run)
    assert [a.dtype for a in old] == [b.dtype for b in new]
    old, new = ([np.asarray(a, np.float64) for a in leaves] for leaves in (old, new))
    largest = max(np.abs(a).max(initial=0, where=np.isfinite(a)) for a in old)
    for a, b in zip(old, new, strict=True):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * min(largest, 10))


# ------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    ("pool", "op"),
    [
        (lambda x: nn.max_pool(x, (2, 2), (2, 2)), "max_pool"),
        pytest.param(lambda x: nn.max_pool(x, (3, 2), (2, 1), "SAME"), "max_pool", marks=slow),
        (lambda x: jax.lax.reduce_window(x, jnp.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), "min_pool"),
        (lambda x: nn.avg_pool(x, (2, 2), (2, 2)), "sum_pool"),
        (lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"), "max_pool"),
    ],
)
def test_pooling(pool, op):
    x = normal(2, 6, 8, 6)
    check(pool, x, ops=[op])
    if _deep:
        agree(pool, fb.accelerate(pool), jnp.round(x))  # equal elements


# -------------------------------------------------------------------------------------------------------------- norms


def two_pass(x, scale, bias, epsilon=1e-5):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon) * scale + bias


def one_pass(x, scale, bias, epsilon=1e-5):
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return scale * ((x - mean) * jax.lax.rsqrt(square - mean**2 + epsilon)) + bias


def by_var(x, scale, bias, epsilon=1e-5):
    return (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.parametrize("norm", [two_pass, one_pass, by_var])
def test_layer_norm(norm):
    with jax.numpy_rank_promotion("allow"):
        check(norm, normal(3, 5, 16), normal(16), normal(16, seed=1), ops=["layer_norm"])


@pytest.mark.parametrize(
    ("module", "shape", "op"),
    [
        (nn.LayerNorm(), (3, 16), "layer_norm"),
        pytest.param(nn.LayerNorm(use_fast_variance=False, use_bias=False), (3, 16), "layer_norm", marks=slow),
        pytest.param(nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)), (3, 4, 6), "layer_norm", marks=slow),
        (nn.RMSNorm(), (2, 3, 16), "rms_norm"),
        (nn.GroupNorm(4), (3, 4, 4, 8), "group_norm"),
        pytest.param(nn.InstanceNorm(), (3, 4, 4, 8), "group_norm", marks=slow),
        (nn.BatchNorm(use_running_average=False), (6, 4, 8), "batch_norm"),
    ],
)
def test_flax_norms(module, shape, op):
    x = normal(*shape) * 2 + 0.5
    variables = module.init(KEY, x)

    def fn(variables, x):
        return module.apply(variables, x, mutable=["batch_stats"])

    check(fn, variables, x, ops=[op])


@pytest.mark.parametrize("norm", [two_pass, by_var])
def test_layer_norm_spelled_out_in_bfloat16(norm):
    with jax.numpy_rank_promotion("allow"):
        args = normal(3, 5, 64, dtype="bfloat16"), *(normal(64, seed=i, dtype="bfloat16") for i in (0, 1))
        check(norm, *args, ops=["layer_norm"], tolerance=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(None, marks=slow)])
def test_layer_norm_of_bfloat16(dtype):
    module = nn.LayerNorm(dtype=dtype)  # None gives float32
    x = normal(4, 32, dtype="bfloat16")
    check(module.apply, module.init(KEY, x), x, ops=["layer_norm"], tolerance=0.02)


def channels_first(x, scale, bias):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale[None, :, None, None] + bias[None, :, None, None]
    return y, 0.9 + 0.1 * mean[0, :, 0, 0], var  # for running averages


def test_batch_norm_of_channels_that_stand_first():
    with jax.numpy_rank_promotion("allow"):
        check(channels_first, normal(4, 3, 5, 6), normal(3), normal(3, seed=1), ops=["batch_norm"])


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (jax.nn.gelu, "gelu"),
        (functools.partial(jax.nn.gelu, approximate=False), "gelu"),
        (lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))), "gelu"),
        (jax.nn.silu, "silu"),
        (lambda x: x / (1 + jnp.exp(-x)), "silu"),
        (jax.nn.mish, "mish"),
        (jax.nn.softplus, "softplus"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations(fn, op, dtype):
    x = normal(16, 128, dtype=dtype) * 2
    if dtype == "bfloat16" and "lambda" in getattr(fn, "__name__", ""):
        pytest.skip("constants of this spelling are rounded to bfloat16")
    check(fn, x, ops=[op], tolerance=3e-5 if dtype == "float32" else 0.03)


# ------------------------------------------------------------------------------------------------------- cross-entropy


def by_one_hot(logits, labels):
    return -(jax.nn.one_hot(labels, logits.shape[-1]) * jax.nn.log_softmax(logits)).sum(-1).mean()


def by_take(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1).mean()


def by_index(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def by_row(logits, labels):
    return jax.vmap(lambda row, label: jax.nn.logsumexp(row) - row[label])(logits, labels).mean()


def by_logsumexp(logits, labels):
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


INTEGER, SOFT = "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy"


@pytest.mark.parametrize(
    ("loss", "op"),
    [
        (optax.softmax_cross_entropy_with_integer_labels, INTEGER),
        (by_take, INTEGER),
        (by_logsumexp, INTEGER),
        (by_index, INTEGER),
        (by_row, INTEGER),
        (by_one_hot, SOFT),
    ],
)
def test_cross_entropy(loss, op):
    labels = np.array([0, 3, 6, 2, 1, 5])
    check(loss, normal(6, 7), labels, ops=[op])
    beyond = np.array([0, -1, 7, 2, -8, 5])  # whatever the program does with these: NaN or no loss
    if _deep or op == INTEGER:
        np.testing.assert_allclose(fb.accelerate(loss)(normal(6, 7), beyond), loss(normal(6, 7), beyond), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_labels_of_other_integers(dtype):
    labels = np.array([0, 3, 6, 2, 1, 5], dtype)
    for loss in (optax.softmax_cross_entropy_with_integer_labels, by_index):
        x = normal(6, 100)
        assert ops_of(loss, x, labels) == [INTEGER]
        np.testing.assert_allclose(fb.accelerate(loss)(x, labels), loss(x, labels), rtol=1e-5)


def test_a_label_of_another_row_is_left():
    labels = np.array([0, 3, 6, 2, 1, 5])

    def shifted(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(6) + 1, labels].mean()

    def first(logits):
        return -jax.nn.log_softmax(logits)[0, labels].mean()

    def clipped(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(6), jnp.clip(labels, 0, 5)].mean()

    x = normal(6, 7)
    assert [ops_of(f, x) for f in (shifted, first)] == [[], []]
    check(clipped, x, ops=[INTEGER])  # of the clipped labels


@pytest.mark.parametrize("loss", [optax.softmax_cross_entropy_with_integer_labels, by_take, by_logsumexp, by_one_hot])
def test_cross_entropy_of_labels_that_are_constants(loss):
    """As in contrastive losses, where row i belongs to column i."""
    op = SOFT if loss is by_one_hot else INTEGER
    a, b = normal(6, 4), normal(6, 4, seed=1)
    check(lambda a, b: loss(a @ b.T, jnp.arange(6)) + loss(b @ a.T, jnp.arange(6)), a, b, ops=[op, op])
    x = normal(6, 7)
    for labels in (np.array([0, 3, 6, 2, 1, 5]), jnp.array([0, -1, 6, 2, 1, 5]), jnp.zeros(6, int)):
        fn = functools.partial(loss, labels=labels)
        assert ops_of(fn, x) == [op]
        np.testing.assert_allclose(fb.accelerate(fn)(x), fn(x), rtol=1e-5)


def test_cross_entropy_of_soft_labels_that_are_constants():
    def weighted(x, w):
        return (optax.softmax_cross_entropy(x, np.eye(6, dtype="float32")) * w).sum()

    check(weighted, normal(6, 6), normal(6), ops=[SOFT])
    assert ops_of(lambda x: optax.softmax_cross_entropy(x, jnp.eye(6)), normal(6, 6)) == [SOFT]


def test_norms_with_constants():
    scale, bias = np.linspace(0.5, 2, 16, dtype="float32")[None], normal(1, 16, seed=1)
    check(lambda x: by_var(x, scale, bias), normal(5, 16), ops=["layer_norm"])
    check(lambda x, s: by_var(x, s, bias), normal(5, 16), normal(1, 16), ops=["layer_norm"])
    assert ops_of(lambda x: by_var(x, normal(5, 16), 0.0), normal(5, 16)) == ["layer_norm"]  # x̂ alone; its weights are no scale


# ----------------------------------------------------------------------------------------------------------- attention


def by_einsum(q, k, v, mask, low=-1e30):
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    p = jax.nn.softmax(jnp.where(mask, z, low), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def heads_first(q, k, v):
    z = (q @ jnp.swapaxes(k, -1, -2)) * q.shape[-1] ** -0.5
    z = jnp.where(jnp.tril(jnp.ones(z.shape[-2:], bool))[None, None], z, -jnp.inf)
    return jax.nn.softmax(z, axis=-1) @ v


def qkv(*shape):
    return [normal(*shape, seed=i) for i in range(3)]


ATTENTION = ["dot_product_attention"]


@pytest.mark.parametrize(
    "fn",
    [
        heads_first,
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        pytest.param(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=0.3), marks=slow),
        lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], is_causal=True),
        lambda q, k, v: jax.nn.dot_product_attention(q[:1], k[:1, :, :1], v[:1, :, :1], is_causal=True),
        pytest.param(lambda q, k, v: nn.dot_product_attention(q, k, v), marks=slow),
        lambda q, k, v: by_einsum(q, k, v, jnp.tril(jnp.ones((6, 6), bool))[None, None]),
    ],
    ids=["heads first", "causal", "scale", "grouped", "one head of keys", "plain", "einsum"],
)
def test_attention(fn):
    check(fn, *qkv(2, 6, 4, 5) if fn is not heads_first else qkv(2, 4, 6, 5), ops=ATTENTION)


def test_attention_with_a_mask_that_hides_all_from_some():
    mask = jax.random.bernoulli(KEY, 0.6, (2, 1, 6, 6)).at[0, 0, 2].set(False)
    check(by_einsum, *qkv(2, 6, 4, 5), mask, ops=ATTENTION)


def test_attention_of_flax():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    x = normal(2, 6, 8)

    def fn(variables, x, seen):
        mask = nn.combine_masks(nn.make_causal_mask(x[..., 0]), nn.make_attention_mask(seen, seen), dtype=bool)
        return module.apply(variables, x, mask=mask)

    seen = jnp.arange(6)[None] < jnp.array([[4], [6]])
    check(fn, module.init(KEY, x), x, seen, ops=ATTENTION, tolerance=1e-4)


@pytest.mark.parametrize("broadcast", [True, pytest.param(False, marks=slow)])
def test_attention_with_dropout_is_left(broadcast):
    """The same module without randomness is found."""
    module = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.3, broadcast_dropout=broadcast)
    x = normal(2, 6, 8)
    variables = module.init(KEY, x, deterministic=True)

    def fn(x, deterministic):
        return module.apply(variables, x, deterministic=deterministic, rngs={"dropout": KEY})

    assert ops_of(functools.partial(fn, deterministic=True), x) == ATTENTION
    assert ops_of(functools.partial(fn, deterministic=False), x) == []


def capped(q, k, v, squash=jnp.tanh):
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    z = 20.0 * squash(z / 20)
    z = jnp.where(jnp.tril(jnp.ones((6, 6), bool))[None, None], z, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(z), v)


def with_bias(q, k, v, bias, mask):
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias[None]
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, 5 * jnp.tanh(z / 5), -1e9)), v)


@pytest.mark.parametrize(
    ("fn", "more"),
    [
        pytest.param(capped, (), id="cap"),
        pytest.param(lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, bias=b), [normal(1, 4, 6, 6)], id="bias"),
        pytest.param(
            lambda q, k, v, b, m: by_einsum(q, k, v + 0 * b[0, 0, 0, 0], m), [normal(1, 4, 6, 6), normal(2, 1, 6, 6) > 0],
            id="mask beside something else", marks=slow,
        ),
        pytest.param(
            lambda q, k, v, b, m: jax.nn.dot_product_attention(q, k, v, bias=b, mask=m, is_causal=False),
            [normal(1, 4, 6, 6), normal(2, 1, 6, 6) > -1], id="bias and mask", marks=slow,
        ),
    ],
)  # fmt: skip
def test_attention_with_a_cap_or_a_bias(fn, more):
    check(fn, *qkv(2, 6, 4, 5), *more, ops=ATTENTION)


def where_positions(q, k, v, change):
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    i, j = jnp.arange(z.shape[-2])[:, None], jnp.arange(z.shape[-1])[None]
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(change(z, i, j), -1), v)


CAUSAL = {"is_causal": True}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda z, i, j: jnp.where((i >= j)[None, None], z, -jnp.inf), CAUSAL),
        (lambda z, i, j: jnp.where((i < j)[None, None], -1e9, z), CAUSAL),
        (lambda z, i, j: z + jnp.where(i >= j, 0.0, -1e9)[None, None], CAUSAL),
        (lambda z, i, j: z - jnp.where(i >= j, 0.0, jnp.inf)[None, None], CAUSAL),
        (lambda z, i, j: jnp.where(np.tri(*z.shape[-2:], dtype=bool)[None, None], z, -1e9), CAUSAL),
        (lambda z, i, j: jnp.where(jnp.tril(jnp.ones_like(z)) == 0, -1e9, z), CAUSAL),
        (lambda z, i, j: jnp.where(((i >= j) & (i - j < 3))[None, None], z, -1e9), {"local_window_size": (2, 0)}),
        (lambda z, i, j: jnp.where((abs(i - j) <= 2)[None, None], z, -1e9), {"local_window_size": (2, 2)}),
        (lambda z, i, j: jnp.where((j <= i + 2)[None, None], z, -1e9), {"local_window_size": (5, 2)}),
        (lambda z, i, j: jnp.where((i >= 0)[None, None] & (j >= 0)[None, None], z, -1e9), {}),
        (lambda z, i, j: jnp.where(((i >= j) & (i != 4))[None, None], z, -1e9), {"mask"}),
        (lambda z, i, j: jnp.where(((i >= j) | (j == 5))[None, None], z, -1e9), {"mask"}),
        (lambda z, i, j: jnp.where((i >= j)[None, None], z - 0.1 * abs(i - j)[None, None], -jnp.inf), {"bias", *CAUSAL}),
        (lambda z, i, j: z + jnp.where(i >= j, 0.0, -3.0)[None, None], {"bias"}),
    ],
)
def test_attention_with_constants(change, told, monkeypatch):
    """Where they are a band, the op is told so and gets no array."""
    given = {}

    def spy(*args, **options):
        given.update({k: v for k, v in options.items() if v is not None and v is not False})
        return fb.ops.dot_product_attention(*args, **options)

    fn = functools.partial(where_positions, change=change)
    monkeypatch.setattr(attending, "ops", SimpleNamespace(dot_product_attention=spy))
    check(fn, *qkv(2, 6, 4, 5), ops=ATTENTION)
    given.clear()
    jax.eval_shape(fb.accelerate(fn), *qkv(2, 6, 4, 5))
    del given["scale"]
    assert (given if isinstance(told, dict) else set(given)) == told


def test_attention_with_two_masks():
    def fn(q, k, v, seen):
        return where_positions(
            q, k, v, lambda z, i, j: jnp.where(seen[:, None, None], jnp.where(i >= j, z, -jnp.inf), -jnp.inf)
        )

    with jax.numpy_rank_promotion("allow"):
        check(fn, *qkv(2, 6, 4, 5), jnp.arange(6)[None] < jnp.array([[4], [6]]), ops=ATTENTION)


def test_attention_over_many_positions_is_proved_with_few(monkeypatch):
    """An array of all logits, 2 heads of 512 queries and keys, would be too large here."""
    for module in (attending, sites):
        monkeypatch.setattr(module, "MOST", 2**16)
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    for dtype in ("float32", "bfloat16"):
        q, k = (jax.ShapeDtypeStruct((2, 512, heads, 4), dtype) for heads in (6, 2))
        assert ops_of(causal, k, k, k) == ATTENTION
        assert ops_of(causal, q, k, k) == ATTENTION  # grouped heads


def test_another_cap_is_left():
    assert ops_of(functools.partial(capped, squash=lambda z: jnp.tanh(z) ** 3), *qkv(2, 6, 4, 5)) == []
    assert ops_of(functools.partial(capped, squash=lambda z: jnp.tanh(1.1 * z)), *qkv(2, 6, 4, 5)) == ATTENTION
    # A cap of logits with the bias in them is another function than a bias on capped logits.
    assert ops_of(with_bias, *qkv(2, 6, 4, 5), normal(4, 6, 6), normal(2, 1, 6, 6) > -1) == []


# -------------------------------------------------------------------------------------------------------- dense layers


def test_dense_over_several_batch_axes():
    x, w = normal(3, 5, 4), normal(4, 6)
    check(lambda x, w: jnp.dot(x, w), x, w, ops=["dense"])
    check(lambda x, w: jax.vmap(jax.vmap(lambda x: w.T @ x))(x), x, w, ops=["dense"])
    assert ops_of(jnp.dot, x[0], w) == []


# --------------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (nn.Conv(8, (3, 3), feature_group_count=4), ["conv"]),
        (nn.Conv(8, (3, 3), feature_group_count=8, strides=2, padding="VALID"), ["conv"]),
        (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), ["conv_transpose"]),
        (nn.Conv(8, (3, 3)), []),
    ],
)
def test_convolutions(module, op):
    x = normal(2, 7, 6, 8)
    check(module.apply, module.init(KEY, x), x, ops=op)


# ----------------------------------------------------------------------------------------------------------- recurrence


class OverTime(eqx.Module):
    cell: Any

    def __call__(self, x):
        zeros = jnp.zeros(self.cell.hidden_size)
        start = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros
        return jax.lax.scan(lambda s, x: (self.cell(x, s), None), start, x)[0]


def flax_rnn(cell, **options):
    module, x = nn.RNN(cell, **options), normal(3, 5, 2)
    return module.apply, module.init(KEY, x), x


def equinox_rnn(cell):
    return lambda m, x: jax.vmap(m)(x), OverTime(cell(2, 4, key=KEY)), normal(3, 5, 2)


def haiku_rnn(name, **options):
    hk = pytest.importorskip("haiku")
    x, first = normal(3, 5, 2), normal(5 if options.get("time_major", True) else 3, 4)

    def unrolled(x, first):
        state = hk.LSTMState(first, first + 1) if name == "LSTM" else first
        return hk.dynamic_unroll(getattr(hk, name)(4), x, state, **options)

    model = hk.without_apply_rng(hk.transform(unrolled))
    return model.apply, model.init(KEY, x, first), x, first


def forgetful(w, x, how=lambda f, c: f * c):
    """An LSTM in plain JAX, gates in the order f, o, i, g, with a forget bias."""

    def step(carry, x):
        h, c = carry
        f, o, i, g = jnp.split(jnp.dot(jnp.concatenate([x, h], -1), w), 4, -1)
        c = how(jax.nn.sigmoid(f + 1), c) + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((3, 4))
    return jax.lax.scan(step, (zeros, zeros), x)


@pytest.mark.parametrize(
    ("made", "op"),
    [
        pytest.param(functools.partial(flax_rnn, nn.LSTMCell(4), reverse=True, keep_order=True), "lstm", marks=slow),
        (functools.partial(flax_rnn, nn.OptimizedLSTMCell(4)), "lstm"),
        (functools.partial(flax_rnn, nn.GRUCell(4), return_carry=True), "gru"),
        (functools.partial(equinox_rnn, eqx.nn.LSTMCell), "lstm"),
        pytest.param(functools.partial(equinox_rnn, eqx.nn.GRUCell), "gru", marks=slow),
        (lambda: (forgetful, normal(6, 16), normal(5, 3, 2)), "lstm"),
        (functools.partial(haiku_rnn, "GRU"), "gru"),
        (functools.partial(haiku_rnn, "GRU", time_major=False, reverse=True), "gru"),
        (functools.partial(haiku_rnn, "LSTM", time_major=False, reverse=True), "lstm"),
    ],
    ids=[
        "flax, reversed", "flax, optimized", "flax gru", "equinox", "equinox gru", "plain", "haiku gru", "haiku gru, reversed",
        "haiku lstm",
    ],
)  # fmt: skip
def test_recurrence(made, op):
    check(*made(), ops=[op])


def test_other_cells_are_left_alone():
    def peephole(f, c):
        return f * c * 0.999

    def fn(w, x):
        return forgetful(w, x, peephole)

    assert ops_of(fn, normal(6, 16), normal(5, 3, 2)) == []


def reset(w, x, scale=lambda r, h: r * h, keep=lambda z, h: (1 - z) * h):
    """A GRU in plain JAX with the reset gate before the product."""

    def step(h, x):
        r, z = jnp.split(jax.nn.sigmoid(jnp.dot(jnp.concatenate([x, h], -1), w[:, :8])), 2, -1)
        n = jnp.tanh(jnp.dot(jnp.concatenate([x, scale(r, h)], -1), w[:, 8:]))
        h = keep(z, h) + z * n
        return h, h

    return jax.lax.scan(step, jnp.ones((3, 4)) / 2, x)


def test_a_reset_gate_before_the_product():
    w, x = normal(6, 12), normal(5, 3, 2)
    check(reset, w, x, ops=["gru"])
    for other in (
        functools.partial(reset, scale=lambda r, h: r * h * h),
        functools.partial(reset, scale=lambda r, h: jax.lax.stop_gradient(r) * h),
        functools.partial(reset, scale=lambda r, h: jnp.tanh(r) * h),
        functools.partial(reset, keep=lambda z, h: h),
        functools.partial(reset, keep=lambda z, h: z * h),
    ):
        assert ops_of(other, w, x) == []


def test_recurrence_with_lengths_of_flax():
    module, x = nn.RNN(nn.LSTMCell(4), return_carry=True), normal(3, 5, 2)
    with_lengths = functools.partial(module.apply, seq_lengths=jnp.array([5, 2, 3]))
    agree(with_lengths, fb.accelerate(with_lengths), module.init(KEY, x), x)


# ---------------------------------------------------------------------------------------- what must be left as it is


def ddof(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5)


def epsilon_outside(x):
    return (x - x.mean(-1, keepdims=True)) / (jnp.sqrt(x.var(-1, keepdims=True)) + 1e-5)


def epsilon_after(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5 * x.shape[-1] ** -0.5 * x.mean())


def stopped_mean(x):
    return (x - jax.lax.stop_gradient(x.mean(-1, keepdims=True))) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def variance_used(x):
    var = x.var(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(var + 1e-5), var


def other_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.0447 * x**3)))


def stopped_silu(x):
    return x * jax.lax.stop_gradient(jax.nn.sigmoid(x))


@jax.custom_jvp
def straight_through(x):
    return x * jax.nn.sigmoid(x)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


@jax.custom_vjp
def foreign(x):
    return jax.nn.gelu(x)


foreign.defvjp(lambda x: (jax.nn.gelu(x), None), lambda _, dy: (7 * dy,))


def max_from_zero(x):
    return jax.lax.reduce_window(x.reshape(1, 64, 32, 1), 0.0, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def windows_of_padding(x):
    return jax.lax.reduce_window(
        x.reshape(1, 64, 32, 1), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0), (2, 2), (0, 0), (0, 0))
    )


def weights_too(x):
    q = x.reshape(2, 4, 16, 16)
    p = jax.nn.softmax(q @ q.swapaxes(-1, -2))
    return p @ q, p


def dropped_weights(x):
    q = x.reshape(2, 4, 16, 16)
    p = jax.nn.softmax(q @ q.swapaxes(-1, -2))
    return jnp.where(jax.random.bernoulli(KEY, 0.9, p.shape), p / 0.9, 0) @ q


def two_axes(x):
    q = x.reshape(2, 4, 16, 16)
    return jax.nn.softmax(q @ q.swapaxes(-1, -2), axis=(-1, -2)) @ q


def over_queries(x):
    q = x.reshape(2, 4, 16, 16)
    return jax.nn.softmax(q @ q.swapaxes(-1, -2), axis=-2) @ q


def stopped_weights(x):
    q = x.reshape(2, 4, 16, 16)
    return jax.lax.stop_gradient(jax.nn.softmax(q @ q.swapaxes(-1, -2))) @ q


def stopped_logits(x):
    q = x.reshape(2, 4, 16, 16)
    return jax.nn.softmax(jax.lax.stop_gradient(q @ q.swapaxes(-1, -2))) @ q


def log_probabilities_too(x):
    logp = jax.nn.log_softmax(x)
    return -jnp.take_along_axis(logp, jnp.arange(16)[:, None], axis=-1), logp


def other_cross_entropy(x):
    logp = jax.nn.log_softmax(x) * 1.001
    return -jnp.take_along_axis(logp, jnp.arange(16)[:, None], axis=-1)


@pytest.mark.parametrize(
    "fn",
    [
        ddof, epsilon_outside, epsilon_after, stopped_mean, variance_used, other_gelu, stopped_silu, straight_through, foreign,
        max_from_zero, windows_of_padding, weights_too, dropped_weights, two_axes, over_queries, stopped_weights,
        stopped_logits, log_probabilities_too, other_cross_entropy,
    ],
)  # fmt: skip
def test_near_misses_are_left_alone(fn):
    x = normal(16, 128)
    before, after = (jax.make_jaxpr(f)(x) for f in (fn, fb.accelerate(fn)))
    assert ops_of(fn, x) == []
    assert str(before).count("custom_vjp") == str(after).count("custom_vjp")
    if _deep and fn is not max_from_zero:  # JAX has no derivative of that
        agree(fn, fb.accelerate(fn), x, tolerance=1e-6)


def test_two_derivatives_of_one_function():
    """The programs of both are the same word for word."""

    @jax.custom_jvp
    def right(x):
        return x * jax.nn.sigmoid(x)

    def slope(x):
        return jax.nn.sigmoid(x) * (1 + x * (1 - jax.nn.sigmoid(x)))

    right.defjvp(lambda primals, tangents: (right(*primals), tangents[0] * slope(*primals)))
    x = normal(16, 128)
    assert [ops_of(f, x) for f in (right, straight_through, right)] == [["silu"], [], ["silu"]]


def test_a_mask_of_keys_that_hides_all():
    mask = jnp.array([True, False]).reshape(2, 1, 1, 1) & jnp.ones((2, 1, 1, 6), bool)
    fast = fb.accelerate(by_einsum)
    assert ops_of(by_einsum, *qkv(2, 6, 4, 5), mask) == ATTENTION
    np.testing.assert_allclose(fast(*qkv(2, 6, 4, 5), mask), by_einsum(*qkv(2, 6, 4, 5), mask), rtol=1e-5, atol=1e-6)


def test_integers_are_left_alone():
    x = jnp.arange(64).reshape(1, 8, 8, 1)
    pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    assert ops_of(pool, x) == []
    np.testing.assert_array_equal(fb.accelerate(pool)(x), pool(x))


def test_near_misses_are_told():
    found = fb.accelerate(weights_too).traced(normal(16, 128))[0].program.found
    assert [(f.op, "used elsewhere" in f.why) for f in found] == [("dot_product_attention", True)]


def deep_rnn(x):
    hk = pytest.importorskip("haiku")

    def unrolled(x):
        core = hk.DeepRNN([hk.LSTM(4), hk.LSTM(4)])
        return hk.dynamic_unroll(core, x, core.initial_state(3))[0]

    model = hk.without_apply_rng(hk.transform(unrolled))
    return model.apply(model.init(KEY, x), x)


def flax_dropout(x):
    module = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    return module.apply(module.init({"params": KEY, "dropout": KEY}, x), x, rngs={"dropout": KEY})


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (deep_rnn, "4 arrays are carried"),
        (flax_dropout, "its weights pass through dropout"),
    ],
)
def test_reasons_are_sentences(fn, sentence):
    found = fb.accelerate(fn).traced(normal(5, 3, 4))[0].program.found
    assert any(sentence in f.why for f in found), found


# -------------------------------------------------------------------------------------------------- where it is looked


def silu_and_norm(x):
    return jax.nn.silu(x) + by_var(x, 1.0, 0.0)


def rebuilt(x):
    return jax.jit(silu_and_norm)(x)


def in_scan(x):
    return jax.lax.scan(lambda c, a: (silu_and_norm(c) * a, c.sum()), x, jnp.arange(1.0, 4.0))


def in_checkpoint(x):
    return jax.checkpoint(silu_and_norm, policy=jax.checkpoint_policies.nothing_saveable)(x)


def in_cond(x):
    return jax.lax.cond(x.sum() > 0, silu_and_norm, lambda x: 2 * x, x)


def in_vmap(x):
    return jax.vmap(silu_and_norm)(x.reshape(4, 4, 16, 8).reshape(4, 16, 32))


@pytest.mark.parametrize("fn", [rebuilt, in_scan, in_checkpoint, in_cond, in_vmap])
def test_inside_of(fn):
    check(fn, normal(16, 128), ops=["layer_norm", "silu"])


def test_inside_of_while():
    def fn(x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, silu_and_norm(s[1])), (0, x))[1]

    assert ops_of(fn, normal(16, 128)) == ["layer_norm", "silu"]
    np.testing.assert_allclose(fb.accelerate(fn)(normal(16, 128)), fn(normal(16, 128)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checked", [True, False])
def test_inside_of_shard_map(checked):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(x, w):
        def part(x, w):
            return jax.lax.psum((silu_and_norm(x) * w).sum(), "i")

        return jax.shard_map(part, mesh=mesh, in_specs=(jax.P("i"), jax.P()), out_specs=jax.P(), check_vma=checked)(x, w)

    check(fn, normal(32, 128), normal(1, 128), ops=["layer_norm", "silu"])


def test_outside_transformations():
    x, fast = normal(4, 16, 128), fb.accelerate(silu_and_norm)
    np.testing.assert_allclose(jax.vmap(fast)(x), silu_and_norm(x), rtol=1e-4, atol=1e-5)
    carried = jax.lax.scan(lambda c, a: (c + fast(a), None), x[0], x)[0]
    np.testing.assert_allclose(
        carried, jax.lax.scan(lambda c, a: (c + silu_and_norm(a), None), x[0], x)[0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(jax.checkpoint(fast)(x[0]), silu_and_norm(x[0]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- calling


def test_arguments_and_results_are_those_of_the_function():
    def fn(params, x, *, train, name="a"):
        assert isinstance(train, bool)
        y = jax.nn.gelu(params["w"] * x)
        return {"y": y, "name": name, "none": None, "train": train, "three": 3.0}

    fast = fb.accelerate(fn)
    x = normal(16, 128)
    out = fast({"w": x}, x, train=True)
    assert (out["name"], out["none"], out["train"], out["three"]) == ("a", None, True, 3.0)
    np.testing.assert_allclose(out["y"], jax.nn.gelu(x * x), rtol=1e-5, atol=1e-6)
    assert fb.accelerate(fast) is fast
    assert fast.__name__ == "fn"
    with pytest.raises(TypeError, match="accelerate: expected a function, got int"):
        fb.accelerate(3)  # type: ignore[arg-type]


def test_closing_over_what_is_differentiated():
    x = normal(16, 128)

    def loss(w):
        return fb.accelerate(lambda x: jax.nn.silu(w * x).sum())(x)

    np.testing.assert_allclose(jax.grad(loss)(2.0), jax.grad(lambda w: jax.nn.silu(w * x).sum())(2.0), rtol=1e-5)


def test_without_rules_is_the_function_as_it_was():
    x = normal(16, 128)
    assert "custom_vjp" in str(jax.make_jaxpr(fb.accelerate(jax.nn.gelu))(x))
    assert "custom_vjp" not in str(jax.make_jaxpr(fb.without_rules(fb.accelerate(jax.nn.gelu)))(x))


def test_effects_stay_in_order(capfd):
    def fn(x):
        jax.debug.print("first", ordered=True)
        y = jax.nn.gelu(x)
        jax.debug.print("second", ordered=True)
        return y

    jax.block_until_ready(jax.jit(fb.accelerate(fn))(normal(16, 128)))
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["first", "second"]


def test_a_key_is_an_argument_like_others():
    def fn(key, x):
        return jax.nn.gelu(x) * jax.random.bernoulli(key, 0.5, x.shape)

    np.testing.assert_allclose(fb.accelerate(fn)(KEY, normal(16, 128)), fn(KEY, normal(16, 128)), rtol=1e-5, atol=1e-6)


def test_a_program_is_walked_once_for_each_equation():
    program = Program.of(jax.make_jaxpr(lambda x: x + 1)(1.0))
    assert not rewritten(program).changes


def test_report():
    def loss(params, x, y):
        h = jax.nn.gelu(x @ params["w"])
        return optax.softmax_cross_entropy_with_integer_labels(by_var(h, 1.0, 0.0), y).mean(), weights_too(h)[1]

    x, w, y = normal(16, 32), normal(32, 128, seed=1), jnp.arange(16)
    report = fb.accelerate(loss).report({"w": w}, x, y)
    assert sorted(f.op for f in report.replaced) == sorted(["gelu", "layer_norm", INTEGER])
    assert report.agrees
    assert report.kept_after < report.kept_before
    text = str(report)
    assert "gelu" in text
    assert "test_accelerate.py" in text
    assert "agree" in text
    assert report.timed(rounds=6, seconds=0.001).speed is not None


def test_report_of_shapes():
    report = fb.accelerate(jax.nn.gelu).report(jax.ShapeDtypeStruct((64, 128), jnp.float32))
    assert [f.op for f in report.found] == ["gelu"]
    assert report.kept_after < report.kept_before
