"""Losses over a vocabulary and what they are made of: blocks, schedules, memory, edges, the values of optax."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes
from fbackprop.ops import _vocabulary as blocks
from fbackprop.rules import RULES

LINEAR = RULES["linear_cross_entropy"]


def problem(tokens=300, features=8, classes=700, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-2, classes + 2, tokens)
    labels[::7] = -100
    weights = rng.uniform(0.5, 2.0, tokens)
    x, kernel, bias = (rng.normal(size=s) for s in ((tokens, features), (features, classes), (classes,)))
    x, kernel, bias = (jnp.asarray(v, dtype) for v in (x, kernel / 2, bias))
    return x, kernel, jnp.asarray(labels), bias, jnp.asarray(weights, jnp.float32)


def optax_loss(x, kernel, labels, bias, weights, smoothing=0.0, cap=None, z_loss=0.0, reduction="mean"):
    """Written with optax, logits as a whole: the independent truth."""
    z = x @ kernel + bias[None]
    z = z if cap is None else cap * jnp.tanh(z / cap)
    keep = (labels >= 0) & (labels < z.shape[1])
    targets = optax.smooth_labels(jax.nn.one_hot(jnp.where(keep, labels, 0), z.shape[1]), smoothing)
    loss = optax.softmax_cross_entropy(z, targets) + z_loss * jax.nn.logsumexp(z, -1) ** 2
    weights = jnp.where(keep, weights, 0)
    loss = jnp.where(keep, loss, 0) * weights
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / weights.sum()}[reduction]


OPTIONS = [
    {"reduction": r, "label_smoothing": s, "soft_cap": c, "z_loss": z}
    for r, (s, c, z) in itertools.product(("mean", "sum", "none"), [(0.0, None, 0.0), (0.1, 3.0, 0.01)])
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(
    ("transposed", "accumulated"),
    [(False, True), (True, False), *(pytest.param(same, same, marks=pytest.mark.slow) for same in (False, True))],
)
def test_every_schedule_in_several_blocks_is_optax(monkeypatch, options, transposed, accumulated):
    monkeypatch.setattr(blocks, "_LOGITS", 1)  # 256 classes a block, so that 700 are two blocks and one that overlaps
    monkeypatch.setattr(blocks, "_ACCUMULATOR", 1 << 26 if accumulated else 0)
    assert blocks.class_blocks(300, 700) == (3, 256)
    assert blocks.token_blocks(300, 8, jnp.float32)[0] > 1
    x, kernel, labels, bias, weights = problem()
    assert (labels >= 700).any()
    assert (labels < -1).any()
    dy = jax.random.normal(jax.random.key(1), (300,)) if options["reduction"] == "none" else jnp.float32(1.7)

    @jax.jit
    def ours(x, kernel, bias, weights, dy):  # the rule itself: calls of the op are cached, whatever the sizes of blocks
        static = {"ignore_index": -100, "transposed": transposed, "return_log_probs": False, "return_entropy": False, **options}
        given = kernel.T if transposed else kernel
        y, saved = LINEAR.forward(x, given, labels, bias, weights=weights, **static)
        again = LINEAR.primal(x, given, labels, bias, weights=weights, **static)
        dx, dkernel, dlabels, dbias, dweights = LINEAR.backward(saved, dy, **static)
        assert dlabels is None
        return y, again, (dx, dkernel.T if transposed else dkernel, dbias, dweights)

    @jax.jit
    def theirs(*args):
        short = {"label_smoothing": "smoothing", "soft_cap": "cap"}
        named = {short.get(n, n): v for n, v in options.items()}
        fn = lambda x, kernel, bias, weights: optax_loss(x, kernel, labels, bias, weights, **named)  # noqa: E731
        y, pullback = jax.vjp(fn, *args[:4])
        return y, pullback(args[4])

    y, again, got = ours(x, kernel, bias, weights, dy)
    expected, want = theirs(x, kernel, bias, weights, dy)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(again, y, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6 * float(jnp.abs(b).max()) + 1e-7)


def test_log_probabilities_and_entropy_in_several_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_LOGITS", 1)
    x, kernel, labels, bias, _ = problem(tokens=299)
    kept = (labels >= 0) & (labels < 700)

    def truth(x, kernel, bias):
        log_p = jax.nn.log_softmax(x @ kernel + bias[None])
        picked = jnp.take_along_axis(log_p, jnp.where(kept, labels, 0)[:, None], 1)[:, 0]
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return tuple(jnp.where(kept, v, 0) for v in (-picked, picked, entropy))

    def ours(x, kernel, bias):
        return fb.linear_cross_entropy(
            x, kernel, labels, bias, reduction="none", return_log_probs=True, return_entropy=True
        )  # fmt: skip

    dy = tuple(jax.random.normal(jax.random.key(i), (299,)) for i in range(3))
    results = [
        jax.jit(lambda *a, f=f: (lambda y, pull: (y, pull(dy)))(*jax.vjp(f, *a)))(x, kernel, bias) for f in (ours, truth)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-6 * float(jnp.abs(b).max()))


def test_tokens_without_a_label_count_for_nothing():
    x, kernel, labels, bias, weights = problem(12, 4, 9)
    labels = labels.at[:4].set(jnp.array([-100, -1, 9, 2**31 - 1]))
    kept = (labels >= 0) & (labels < 9)
    args = x[kept], kernel, labels[kept], bias
    whole = jax.value_and_grad(lambda x: fb.linear_cross_entropy(x, kernel, labels, bias, weights=weights))(x)
    part = jax.value_and_grad(lambda x: fb.linear_cross_entropy(x, *args[1:], weights=weights[kept]))(args[0])
    np.testing.assert_allclose(whole[0], part[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1][kept], part[1], rtol=1e-5, atol=1e-7)
    assert (whole[1][~kept] == 0).all()
    masked = jax.value_and_grad(lambda x: fb.linear_cross_entropy(x, kernel, jnp.abs(labels) % 9, bias, weights=kept))(x)
    plain = jax.value_and_grad(lambda x: fb.linear_cross_entropy(x, kernel, labels, bias))(x)
    for a, b in zip(masked, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    none = fb.linear_cross_entropy(x, kernel, labels, ignore_index=None, reduction="none")
    assert ((none == 0) == ~kept).all()
    nothing = jax.value_and_grad(lambda x: fb.linear_cross_entropy(x, kernel, jnp.full(12, -100)))(x)
    assert nothing[0] == 0
    assert (nothing[1] == 0).all()
    assert fb.linear_cross_entropy(x[:0], kernel, labels[:0]) == 0
    assert fb.linear_cross_entropy(x[:0], kernel, labels[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "none"])  # one for each schedule
@pytest.mark.parametrize("nothing", [jnp.nan, -jnp.inf])
def test_what_stands_at_tokens_without_a_label_is_not_read(reduction, nothing):
    x, kernel, labels, bias, _ = problem(12, 4, 9)
    out = (labels < 0) | (labels >= 9)
    assert 0 < out.sum() < 12

    def gradients(x):
        return jax.grad(lambda *a: fb.linear_cross_entropy(*a[:2], labels, a[2], reduction=reduction).sum(), (0, 1, 2))(
            x, kernel, bias
        )

    for got, expected in zip(gradients(jnp.where(out[:, None], nothing, x)), gradients(x), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_classes_that_the_bias_forbids():
    """−inf in the bias, as for a padded vocabulary: no probability, no gradient, and no NaN."""
    x, kernel, labels, bias, _ = problem(12, 4, 9)
    labels, forbidden = labels % 6, bias.at[6:].set(-jnp.inf)
    for options in ({}, {"reduction": "none", "return_entropy": True, "return_log_probs": True}):
        padded, short = (
            jax.vjp(lambda x, k, b=b, n=n, o=options: fb.linear_cross_entropy(x, k[:, :n], labels, b[:n], **o), x, kernel)
            for b, n in ((forbidden, 9), (bias, 6))
        )
        dy = jax.tree.map(jnp.ones_like, padded[0])
        for a, b in zip(jax.tree.leaves((padded[0], padded[1](dy))), jax.tree.leaves((short[0], short[1](dy))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_float16_keeps_gradients_that_a_scaled_loss_makes_large_enough():
    x, kernel, labels, *_ = problem(64, 8, 700, jnp.float16)
    labels = jnp.abs(labels) % 700
    ours, theirs = (
        jax.grad(lambda k: f(k) * 2.0**14)(kernel)
        for f in (
            lambda k: fb.linear_cross_entropy(x, k, labels),
            lambda k: optax_loss(*(v.astype(jnp.float32) for v in (x, k)), labels, jnp.zeros(700), jnp.ones(64)),
        )
    )
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2e-2, atol=2e-2)


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_of_the_fixed_workload(dtype):
    """A fifth of the temporaries of jax.grad; kept are dx and dkernel, or what the logits are made of."""
    n, d, v = 2048, 256, 50257
    x, kernel, labels = (jax.ShapeDtypeStruct(s, t) for s, t in (((n, d), dtype), ((d, v), dtype), ((n,), jnp.int32)))
    arguments = (n * d + d * v) * jnp.dtype(dtype).itemsize

    def both(fn):
        return compiled(lambda x, k, t: jax.value_and_grad(lambda x, k: fn(x, k, t), (0, 1))(x, k), x, kernel, labels)

    ours, theirs = (both(f).memory_analysis().temp_size_in_bytes for f in (fb.linear_cross_entropy, LINEAR.reference))
    assert 5 * ours <= theirs
    assert saved_bytes(lambda x, k: fb.linear_cross_entropy(x, k, jnp.zeros(n, jnp.int32)), x, kernel) == arguments
    none = saved_bytes(lambda x, k: fb.linear_cross_entropy(x, k, jnp.zeros(n, jnp.int32), reduction="none"), x, kernel)
    assert none == arguments + 3 * 4 * n
    one = saved_bytes(lambda x: fb.linear_cross_entropy(x, jnp.zeros((d, v), dtype), jnp.zeros(n, jnp.int32)), x)
    assert one == n * d * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("accumulated", [True, False])
def test_what_is_frozen_costs_no_product(monkeypatch, accumulated):
    """Matrix products in the compiled program: two with everything in a block, one less for each that is frozen."""
    monkeypatch.setattr(blocks, "_LOGITS", 1)
    monkeypatch.setattr(blocks, "_ACCUMULATOR", 1 << 26 if accumulated else 0)
    n, d, v = 515, 64 + accumulated, 1021  # of no other test, as traces are cached
    x, kernel, labels = jnp.ones((n, d)), jnp.ones((d, v)), jnp.zeros(n, jnp.int32)

    def products(argnums):
        fn = lambda x, k: fb.linear_cross_entropy(x, k, labels, z_loss=0.5)  # noqa: E731
        fn = jax.grad(fn, argnums) if argnums else fn
        text = compiled(fn, x, kernel).as_text()
        return len(re.findall(r" dot\(|onednn\$matmul", text))

    forward = 1 if accumulated else 2  # where the backward forms the logits again
    assert products(()) == 1
    assert products((0, 1)) == forward + 2
    assert products((0,)) == forward + 1
    assert products((1,)) == forward + 1


def test_kernel_gradient_is_summed_in_float32():
    """4096 tokens that all pull at the same class: bfloat16 alone stops counting at 256."""
    x, kernel, labels = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16), jnp.zeros(4096, jnp.int32)
    for options in ({"reduction": "sum"}, {"reduction": "none"}):
        dkernel = jax.grad(lambda k, o=options: fb.linear_cross_entropy(x, k, labels, **o).sum())(kernel)
        assert dkernel.tolist() == [[-2048.0, 2048.0]]


X, KERNEL, LABELS = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.zeros(3, jnp.int32)
BAD = [
    (
        lambda: fb.linear_cross_entropy(X, KERNEL.T, LABELS),
        "x has 4 features, kernel expects 5 .*transposed=True takes",
    ),
    (lambda: fb.linear_cross_entropy(X, KERNEL[0], LABELS), r"expected x \[..., features\] and kernel \[features, classes\]"),
    (lambda: fb.linear_cross_entropy(X, KERNEL, jnp.zeros(3)), "labels must be integers, got float32"),
    (lambda: fb.linear_cross_entropy(X, KERNEL, LABELS[:2]), "labels must have the shape of x without the features"),
    (lambda: fb.linear_cross_entropy(X, KERNEL, LABELS, weights=jnp.ones(2)), "weights must have the shape of x without"),
    (lambda: fb.linear_cross_entropy(X, KERNEL, LABELS, jnp.ones(4)), r"bias has shape \(4,\), expected \(5,\)"),
    (lambda: fb.linear_cross_entropy(X, KERNEL[:, :0], LABELS), "kernel has no classes"),
    (
        lambda: fb.linear_cross_entropy(X, KERNEL, LABELS, reduction="avg"),
        "reduction must be one of none, mean, sum",
    ),
    (lambda: fb.linear_cross_entropy(X, KERNEL, LABELS, label_smoothing=2.0), r"label_smoothing must lie in \[0, 1\], got 2.0"),
    (lambda: fb.linear_cross_entropy(X, KERNEL, LABELS, soft_cap=0.0), "soft_cap must be positive"),
    (lambda: fb.logsumexp(X, axis=2), "logsumexp: axis 2 is out of range"),
    (lambda: fb.logsumexp(X, b=jnp.ones(3)), "logsumexp: shapes that do not broadcast together: a .*, b "),
    (lambda: fb.logsumexp(X[0], b=X), "logsumexp: b and where have at most the dimensions of a"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[s[:30] for _, s in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()


# ------------------------------------------------------------------------------------- logsumexp and what stands on it


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": -1},
        {"axis": (0, 2), "keepdims": True},
        {"axis": 1, "b": jnp.array([1.0, -2.0, 0.5])[None, :, None]},
        {"axis": 1, "b": jnp.array([1.0, -2.0, 0.5])[None, :, None], "return_sign": True},
        {"axis": 2, "where": jnp.array([True, True, False, True])},
        {"axis": (0, 1, 2), "b": jnp.float32(3.0), "where": jnp.array([True, False, True])[:, None], "keepdims": True},
    ],
    ids=str,
)
def test_logsumexp_is_that_of_jax(options):
    a = 3 * jax.random.normal(jax.random.key(0), (2, 3, 4))
    ours, theirs = (jax.vjp(lambda a, f=f: f(a, **options), a) for f in (fb.logsumexp, jax.nn.logsumexp))
    dy = jax.tree.map(jnp.ones_like, ours[0])
    for x, y in zip(jax.tree.leaves((ours[0], ours[1](dy))), jax.tree.leaves((theirs[0], theirs[1](dy))), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_logsumexp_where_jax_gives_nan_or_nothing():
    inf = jnp.inf
    rows = jnp.array([[-inf, -inf, -inf], [1.0, -inf, 1.0], [inf, 0.0, -inf]])
    y, pullback = jax.vjp(lambda a: fb.logsumexp(a, -1), rows)
    np.testing.assert_allclose(y, [-inf, 1 + math.log(2), inf], rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones(3))[0], [[0, 0, 0], [0.5, 0, 0.5], [1, 0, 0]], rtol=1e-6)  # jax issue 6811
    left_out = jax.value_and_grad(lambda a: fb.logsumexp(a, where=jnp.zeros(3, bool)))(jnp.ones(3))
    assert left_out[0] == -inf
    assert (left_out[1] == 0).all()
    hidden = jax.grad(lambda a: fb.logsumexp(a, where=jnp.array([True, False])))(jnp.array([0.0, jnp.nan]))
    assert hidden.tolist() == [1.0, 0.0]
    # An element with the factor 0 counts for nothing, however large; the slope of its factor is that of any other.
    db = jax.grad(lambda b: fb.logsumexp(jnp.array([0.0, 1.0]), b=b))(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(db, [1.0, math.e], rtol=1e-6)
    assert fb.logsumexp(jnp.array([0.0, 500.0, inf]), b=jnp.array([1.0, 0.0, 0.0])) == 0
    assert jnp.isnan(fb.logsumexp(jnp.array([0.0, 1.0]), b=jnp.array([1.0, -1.0])))
    big = fb.logsumexp(jnp.array([1e30, 1e30]))
    np.testing.assert_allclose(big, 1e30)


def test_cross_entropies_of_infinite_logits():
    inf = jnp.inf
    logits = jnp.array([[inf, 0.0, 1.0], [-inf, 0.0, inf], [0.0, 1.0, -inf], [-inf, 2.0, -inf]])
    labels = jnp.array([0, 2, 1, 1])
    want = jnp.array([0.0, 0.0, math.log(1 + math.exp(-1)), 0.0])
    onehot = jax.nn.one_hot(labels, 3)
    for fn in (
        lambda z: fb.softmax_cross_entropy_with_integer_labels(z, labels),
        lambda z: fb.softmax_cross_entropy(z, onehot),
        lambda z: fb.linear_cross_entropy(jnp.ones((1, 1)), jnp.zeros((1, 3)), labels[2:3], z[2], reduction="none"),
    ):
        y, pullback = jax.vjp(fn, logits)
        np.testing.assert_allclose(y, want if len(y) > 1 else want[2:3], rtol=1e-6, atol=1e-7)
        (d,) = pullback(jnp.ones(len(y)))
        assert jnp.isfinite(d).all()
        assert (d[:2] == 0).all()  # nothing finite moves these rows
        np.testing.assert_allclose(d[2], [1 / (1 + math.e), -1 / (1 + math.e), 0], rtol=1e-5)


def test_log_softmax_of_large_float16_arrays():
    """jax issue 40409: the cotangents of more than 2**16 elements add up beyond float16 although the gradient is small."""
    x = jnp.zeros(100_000, jnp.float16).at[0].set(5.0)
    dx = jax.grad(lambda x: fb.log_softmax(x).astype(jnp.float32).sum())(x)
    p = jax.nn.softmax(x.astype(jnp.float32))
    assert jnp.isfinite(dx).all()
    np.testing.assert_allclose(dx.astype(jnp.float32), 1 - 100_000 * p, rtol=2e-3)


def test_binary_cross_entropy_keeps_one_array_for_labels_that_are_constant():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert saved_bytes(lambda z: fb.sigmoid_binary_cross_entropy(z, jnp.ones((64, 64))), x) == 64 * 64 * 4
    assert saved_bytes(lambda z: fb.sigmoid_binary_cross_entropy(z, jnp.ones((64, 64), int)), x) == 64 * 64 * 4
    assert saved_bytes(fb.sigmoid_binary_cross_entropy, x, x) == 2 * 64 * 64 * 4


LOSSES = ["linear_cross_entropy", "logsumexp", "log_softmax", "softmax", "softmax_cross_entropy", "half_square"]
LOSSES += ["softmax_cross_entropy_with_integer_labels", "sigmoid_binary_cross_entropy"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_what_is_kept_is_the_minimum(name, dtype):
    """The formula of the rule, for every sample, with everything differentiated."""
    rule = RULES[name]
    for sample in rule.samples:
        args, options = sample.make(0, dtype)
        dynamic, static = rule.split(args, options)
        y, saved = jax.eval_shape(lambda d=dynamic, s=static: rule.call(rule.forward, d, s))
        kept = sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(saved))
        assert kept <= rule.minimum_bytes(y, dynamic, static), sample
