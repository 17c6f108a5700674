"""Ops and compositions of the catalogue beside the function of jax.nn, jax.numpy, optax or Flax that they are known from."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes

X = 1 + 2 * jax.random.normal(jax.random.key(0), (4, 6))
MASK = jax.random.uniform(jax.random.key(2), (4, 6)) < 0.6
MOST = MASK.at[:2].set(True)  # a variance is no 0
ROW, COLUMN = jnp.linspace(-1.0, 1.0, 6)[None], jnp.linspace(0.5, 2.0, 4)[:, None]
KINKS = jnp.array([[-3.0, -1.0, -0.5, 0.0, 1.0, 2.0]])


def same(ours, theirs, *arrays, tolerance=2e-6):
    """Values and gradients, in one program for each."""

    def both(fn):
        y, pullback = jax.vjp(fn, *arrays)
        return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    got, want = jax.jit(lambda: both(ours))(), jax.jit(lambda: both(theirs))()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


NORM = optax.safe_norm

CASES = {
    "sparse_plus": (fb.sparse_plus, jax.nn.sparse_plus, KINKS),
    "sparse_sigmoid": (fb.sparse_sigmoid, jax.nn.sparse_sigmoid, KINKS),
    "log1mexp": (fb.log1mexp, jax.nn.log1mexp, jnp.exp(X / 2)),
    "glu": (lambda x: fb.glu(x, 0), lambda x: jax.nn.glu(x, 0), X),
    "swiglu": (fb.swiglu, lambda x: x[:, :3] * jax.nn.silu(x[:, 3:]), X),
    "geglu": (
        lambda x: fb.geglu(x, approximate=False),
        lambda x: x[:, :3] * jax.nn.gelu(x[:, 3:], approximate=False),
        X,
    ),
    "reglu": (fb.reglu, lambda x: x[:, :3] * jax.nn.relu(x[:, 3:]), KINKS),
    "logmeanexp": (lambda x: fb.logmeanexp(x, 1, MASK), lambda x: jax.nn.logmeanexp(x, 1, MASK), X),
    "softmin": (lambda x: fb.softmin(x, 0, MASK), lambda x: jax.nn.softmax(-x, 0, MASK), X),
    "standardize": (fb.standardize, jax.nn.standardize, X),
    "standardize where": (lambda x: fb.standardize(x, 0, where=MOST), lambda x: jax.nn.standardize(x, 0, where=MOST), X),
    "standardize fast": (
        lambda x, m: fb.standardize(x, mean=m, where=MASK),
        lambda x, m: jax.nn.standardize(x, mean=m, where=MASK),
        X,
        COLUMN / 4,
    ),
    "standardize variance": (
        lambda x, v: fb.standardize(x, 0, None, v),
        lambda x, v: jax.nn.standardize(x, 0, None, v),
        X,
        jnp.square(ROW) + 1,
    ),
    "safe_norm": (lambda x, m: fb.safe_norm(x, m, axis=-1), lambda x, m: NORM(x, m, axis=-1), X, jnp.float32(1.0)),
    "safe_norm 3": (lambda x: fb.safe_norm(x, 0.0, 3, 0), lambda x: NORM(x, 0.0, 3, 0), X),
    "safe_norm inf": (lambda x: fb.safe_norm(x, 0.0, jnp.inf, 1), lambda x: NORM(x, 0.0, jnp.inf, 1), X),
    "safe_norm of zeros": (lambda x: fb.safe_norm(x, 0.0, axis=1), lambda x: NORM(x, 0.0, axis=1), 0 * X),
    "prelu": (fb.prelu, lambda x, a: jnp.where(x >= 0, x, a[None] * x), X, ROW[0]),
    "embed_attend": (fb.embed_attend, lambda q, e: q @ e.T, X, X[:3]),
    "pool max": (
        lambda x: fb.pool(x[..., None], 0.0, jax.lax.max, (2,), (2,), "SAME"),
        lambda x: jnp.maximum(nn.max_pool(x[..., None], (2,), (2,), "SAME"), 0),
        X,
    ),
    "pool any": (
        lambda x: fb.pool(x[..., None], -jnp.inf, jnp.logaddexp, (2,)),
        lambda x: jnp.logaddexp(x[:, :-1], x[:, 1:])[..., None],
        X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    ours, theirs, *arrays = CASES[name]
    same(ours, theirs, *arrays, tolerance=2e-5)


def test_rotary_embedding_turns_pairs_and_leaves_products_to_distance():
    q, k = (jax.random.normal(jax.random.key(i), (1, 9, 1, 8)) for i in (1, 2))
    q, k = (jnp.broadcast_to(a[:, :1], a.shape) for a in (q, k))  # the same vector at every position
    for interleaved in (False, True):
        turned = [fb.rotary_embedding(a, interleaved=interleaved)[0, :, 0] for a in (q, k)]
        products = turned[0] @ turned[1].T
        for d in range(-3, 4):
            np.testing.assert_allclose(np.diagonal(products, d), products[4, 4 + d], rtol=2e-4, atol=2e-4)
    positions = jnp.array([[3, 0, 7, 1, 1, 2, 8, 5, 4]])
    every = fb.rotary_embedding(q)
    np.testing.assert_allclose(fb.rotary_embedding(q, positions)[0], every[0, positions[0]], rtol=1e-5, atol=1e-5)
    assert saved_bytes(fb.rotary_embedding, q) == 0


def test_gradients_are_finite_where_those_of_the_plain_formula_are_not():
    zero = jnp.zeros((2, 3))
    assert jnp.isnan(jax.grad(lambda x: jnp.linalg.norm(x, axis=1).sum())(zero)).all()
    np.testing.assert_array_equal(jax.grad(lambda x: fb.safe_norm(x, 0.0, axis=1).sum())(zero), zero)
    assert jnp.isfinite(jax.grad(lambda x: fb.l2_normalize(x).sum())(zero)).all()
    assert jnp.isfinite(jax.grad(lambda x: fb.logmeanexp(x, 1).sum())(zero - jnp.inf)).all()
    np.testing.assert_array_equal(fb.logmeanexp(zero, 1, zero > 0), [-jnp.inf, -jnp.inf])


def test_stochastic_depth_drops_whole_examples_and_keeps_a_byte_each():
    x = jnp.ones((200, 3, 4))
    y = fb.stochastic_depth(x, 0.25, jax.random.key(0))
    assert set(np.unique(y).round(5)) == {0.0, np.float32(4 / 3).round(5)}
    assert all(len(np.unique(example)) == 1 for example in np.asarray(y))
    assert saved_bytes(lambda x: fb.stochastic_depth(x, 0.25, jax.random.key(0)), x) == 200
    np.testing.assert_array_equal(fb.stochastic_depth(x, 0.25, deterministic=True), x)


def test_bytes_kept():
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    for op in (fb.glu, fb.swiglu, fb.geglu, fb.reglu, fb.sparse_plus, fb.log1mexp):
        assert saved_bytes(op, x) == 2 * 64 * 512
    assert saved_bytes(fb.sparse_sigmoid, x) == 64 * 512 / 4
    assert saved_bytes(fb.standardize, x) == 2 * 64 * 512 + 2 * 4 * 64
    assert saved_bytes(fb.l2_normalize, x) == 2 * 64 * 512 + 4 * 64


BAD = [
    (lambda: fb.glu(X, 3), "glu: axis 3 is out of range"),
    (lambda: fb.swiglu(X[:, :3]), "swiglu: axis -1 of x has 3 elements, expected an even number"),
    (lambda: fb.safe_norm(X, 0.0, "nuc", 0), "safe_norm: ord is 'nuc', expected"),
    (lambda: fb.safe_norm(X, 0.0, 1), "would be a norm of matrices"),
    (lambda: fb.standardize(X, mean=X[:, :3]), "standardize: mean does not broadcast"),
    (lambda: fb.standardize(X, algorithm="slow"), "algorithm is 'slow', expected 'fast' or 'stable'"),
    (lambda: fb.rotary_embedding(X), "rotary_embedding: expected x"),
    (lambda: fb.rotary_embedding(X[None], X[None]), "positions must be integers"),
    (lambda: fb.einsum_dense(X, X, einsum_str="ab,cd->ac"), "b, d would be summed in one operand alone"),
    (lambda: fb.einsum_dense(X, X, einsum_str="ab,bc->ac"), "axis b has size 6 in x and 4 in the kernel"),
    (lambda: fb.einsum_dense(X, X, einsum_str="ab,bc"), "expected an equation of two operands with an arrow"),
    (lambda: fb.dense_general(X, X, axis=0, batch_dims=(0,)), "dense_general: batch_dims is"),
    (lambda: fb.spectral_norm(X, X), r"spectral_norm: expected kernel \[..., out\] and u \[1, out\]"),
    (lambda: fb.bidirectional(fb.lstm, X, (), (), merge="mean"), "bidirectional: merge is 'mean'"),
    (lambda: fb.conv_lstm(X, X, X), "conv_lstm: expected x"),
    (lambda: fb.stochastic_depth(X, 0.5), "a random key is needed"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
