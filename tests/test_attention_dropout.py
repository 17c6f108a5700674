"""Dropout of attention's weights: the mask itself, values and gradients with the mask given, and the layer beside Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import dot_product_attention, layers
from fbackprop.context import without_rules
from fbackprop.measuring import saved_bytes
from fbackprop.ops import _attention, _attention_blocks, _attention_cudnn, _attention_dropout, attention

KEY = jax.random.key(5)
keyed = functools.partial(dot_product_attention, dropout_key=KEY)


def normal(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype or jnp.float32)


def qkv(b=2, t=5, n=4, h=8, s=None, k=None):
    keys = (b, s or t, k or n, h)
    return [normal(*shape, seed=i) for i, shape in enumerate([(b, t, n, h), keys, keys])]


@functools.partial(jax.jit, static_argnames=("b", "n", "t", "s", "rate", "broadcast"))
def drawn(key, b, n, t, s, rate, broadcast=False):
    """The mask [b, n, t, s] of zeros and ones, seen from outside: with even weights, and a value that tells of each key."""
    q, k, v = jnp.zeros((b, t, n, s)), jnp.zeros((b, s, n, s)), jnp.broadcast_to(jnp.eye(s)[:, None], (b, s, n, s))
    options = {"dropout_rate": rate, "dropout_key": key, "broadcast_dropout": broadcast}
    return jnp.round(dot_product_attention(q, k, v, **options) * s * (1 - rate), 3).swapaxes(1, 2)


def written_out(q, k, v, kept, rate, *, bias=0.0, seen=True, cap=None):
    """Attention as one would write it down, with the mask of dropout as an input."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    z = jnp.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
    z = z if cap is None else cap * jnp.tanh(z / cap)
    z = jnp.where(seen, z + bias, -jnp.inf)
    out = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(z) * kept / (1 - rate), v)
    return out, jax.nn.logsumexp(z, -1).swapaxes(1, 2)


# -------------------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_weight_is_kept_with_its_probability(rate):
    kept = np.asarray(drawn(KEY, 2, 4, 128, 96, rate))
    assert set(np.unique(kept)) == {0, 1}
    z = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert abs(z.sum()) < 4 * np.sqrt(z.size)
    for axis in range(4):
        sums = z.sum(axis) / np.sqrt(z.shape[axis])
        assert abs((sums**2).mean() - 1) < 5 * np.sqrt(2 / sums.size), "rows, columns or heads that are too alike, or too even"
        for lag in (1, 2):
            near, far = np.take(z, range(z.shape[axis] - lag), axis), np.take(z, range(lag, z.shape[axis]), axis)
            assert near.size == 0 or abs((near * far).sum()) < 5 * np.sqrt(near.size)


def test_one_mask_for_all_heads_or_one_for_each():
    shared, own = (np.asarray(drawn(KEY, 2, 2, 8, 32, 0.5, broadcast)) for broadcast in (True, False))
    assert (shared == shared[:1, :1]).all()
    assert all(0.3 < (a != b).mean() < 0.7 for a, b in [(own[0, 0], own[0, 1]), (own[0, 0], own[1, 0])])
    q, k, v = qkv()
    flags = {"dropout_rate": 0.5, "broadcast_dropout": True}
    np.testing.assert_array_equal(keyed(q, k, v, dropout_rate=0.5), keyed(q, k, v, **flags))


def test_a_key_has_its_mask():
    masks = [drawn(key, 1, 2, 16, 16, 0.5) for key in (KEY, jax.random.key_data(KEY), jax.random.key(6))]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0.3 < (masks[0] != masks[2]).mean() < 0.7
    keys = jax.random.split(KEY, 3)
    members = jax.vmap(lambda key: drawn(key, 1, 2, 16, 16, 0.5))(keys)
    np.testing.assert_array_equal(members, jnp.stack([drawn(key, 1, 2, 16, 16, 0.5) for key in keys]))


@pytest.mark.parametrize(
    "options", [pytest.param({"is_causal": True}, marks=pytest.mark.slow), {"local_window_size": (70, 9)}], ids=str
)
def test_the_mask_does_not_depend_on_the_blocks(options):
    """Blocks of a CPU and of other machines, forward and backward, beside the definition, which has none."""
    q, k, v = qkv(b=2, t=300, n=4, k=2, h=3)
    form = _attention.options_of(q, k, None, "is_causal" in options, options.get("local_window_size"), None, 0.4)
    inputs = _attention_dropout.with_rows(
        _attention.inputs_of(q, k, v, None, None, None, None, None), _attention_dropout.seed_of(KEY), False
    )
    plans = [_attention_blocks.plan(inputs.query.shape, 300, form, cpu) for cpu in (True, False)]
    assert plans[0] != plans[1]
    reference = functools.partial(keyed, dropout_rate=0.4, broadcast_dropout=False, **options)
    dy = normal(2, 300, 4, 3, seed=9)

    @jax.jit
    def expected(*args):
        y, pullback = jax.vjp(without_rules(reference), *args)
        return y, pullback(dy)

    y, cotangents = expected(q, k, v)
    for plan in plans:
        out, highest, total = jax.jit(lambda x, plan=plan: attention._blocks_forward(plan, form, x))(inputs)
        np.testing.assert_allclose(out.reshape(y.shape), y, rtol=1e-4, atol=1e-5)
        given = inputs, highest, total, dy.reshape(inputs.query.shape), None
        found = jax.jit(lambda *a, plan=plan: attention._blocks_backward(plan, form, *a))(*given)
        for a, b in zip(found, cotangents):
            np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=2e-5)


# --------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(("rate", "broadcast", "cap"), [(0.3, False, 2.0), (0.6, True, None)])
def test_values_and_gradients_are_those_with_the_mask_given(rate, broadcast, cap):
    """In float64, of an attention written here that gets the mask as an array: grouped heads and all options together."""
    kept = drawn(KEY, 2, 4, 6, 7, rate, broadcast)
    lengths = jnp.array([7, 4])
    i, j = jnp.arange(6)[:, None], jnp.arange(7)[None]
    near = (j <= i + 2) & (j >= i - 4)
    seen = near[None, None] & (j[None, None] < lengths[:, None, None, None])
    mask = jnp.asarray(np.random.default_rng(3).random((2, 1, 6, 7)) < 0.8).at[..., :2].set(True)
    mask = mask.at[..., 4:, :4].set(True)  # each query sees some
    with jax.enable_x64(True):
        args = [a.astype(jnp.float64) for a in (*qkv(t=6, s=7, k=2), normal(1, 4, 1, 7))]

        def ours(q, k, v, bias):
            return keyed(
                q, k, v, bias, mask, dropout_rate=rate, broadcast_dropout=broadcast, soft_cap=cap, return_residual=True,
                local_window_size=(4, 2), key_value_seq_lengths=lengths,
            )  # fmt: skip

        def theirs(q, k, v, bias):
            return written_out(q, k, v, kept, rate, bias=bias, seen=seen & mask, cap=cap)

        dy = normal(2, 6, 4, 8, seed=7, dtype=jnp.float64), normal(2, 6, 4, seed=8, dtype=jnp.float64)

        def run(fn, *args):
            y, pullback = jax.vjp(fn, *args)
            return jax.tree.leaves((y, pullback(dy)))

        for a, b in zip(*(jax.jit(functools.partial(run, fn))(*args) for fn in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_the_gradient_under_vmap_over_the_key_alone():
    """lse does not depend on the key: its cotangent counts once for each member all the same."""
    q, k, v = qkv(b=1)

    keys = jax.random.split(KEY, 3)

    def total(q, many):
        def one(key):
            out, lse = dot_product_attention(q, k, v, dropout_rate=0.5, dropout_key=key, return_residual=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

        return jnp.sum(jax.vmap(one)(keys)) if many else sum(one(keys[i]) for i in range(3))

    many, one_by_one = (jax.jit(jax.grad(total), static_argnums=1)(q, flag) for flag in (True, False))
    np.testing.assert_allclose(many, one_by_one, rtol=1e-5, atol=1e-6)


def test_everything_dropped():
    q, k, v = qkv()
    (out, lse), pullback = jax.vjp(lambda *a: keyed(*a, dropout_rate=1.0, return_residual=True), q, k, v)
    assert not out.any()
    np.testing.assert_allclose(lse, dot_product_attention(q, k, v, return_residual=True)[1], rtol=1e-6)
    assert not any(d.any() for d in pullback((jnp.ones_like(out), jnp.zeros_like(lse))))


# ------------------------------------------------------------------------------------------------------- cost, bad input


def test_without_dropout_nothing_of_it_is_compiled():
    def program(**options):
        fn = jax.jit(lambda *a: jax.vjp(functools.partial(dot_product_attention, **options), *a)[1](a[0]))
        return fn.lower(*qkv()).as_text()

    assert program() == program(dropout_rate=0.0, dropout_key=KEY, broadcast_dropout=False) == program(dropout_rate=0)


def test_the_seed_is_all_that_is_kept():
    args = [jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)] * 3
    assert saved_bytes(functools.partial(keyed, dropout_rate=0.1), *args) == saved_bytes(dot_product_attention, *args) + 8


BAD = [
    ({"dropout_rate": 1.5}, r"dropout_rate must lie in \[0, 1\], got 1.5"),
    ({"dropout_rate": float("nan")}, r"dropout_rate must lie in \[0, 1\], got nan"),
    ({"dropout_rate": 0.5, "dropout_key": None}, "a random key is needed; pass dropout_key"),
    ({"dropout_rate": 0.5, "dropout_key": 3}, "must be one random key, .*got int32"),
    ({"dropout_rate": 0.5, "dropout_key": jax.random.split(KEY)}, r"must be one random key, .* of shape \(2,\)"),
    ({"dropout_rate": 0.5, "broadcast_dropout": 1}, "broadcast_dropout must be True or False, got 1"),
    ({"dropout_rate": jnp.ones(())}, "dropout_rate is static"),
    ({"dropout_rate": 0.5, "implementation": "cudnn"}, "cuDNN's attention is not used with dropout_rate"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[b[1] for b in BAD])
def test_bad_input_gets_a_sentence(options, sentence):
    args = [a.astype(jnp.bfloat16) for a in qkv()]
    with pytest.raises((TypeError, ValueError), match=f"dot_product_attention: .*{sentence}"):
        keyed(*args, **options)


def test_left_to_itself_dropout_is_not_given_to_cudnn(monkeypatch):
    monkeypatch.setattr(_attention_cudnn, "present", lambda device: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = [a.astype(jnp.bfloat16) for a in qkv()]
    for rate, chosen in ((0.0, True), (0.5, False)):
        form = _attention.options_of(args[0], args[1], None, False, None, None, rate)
        assert attention._on_cudnn((*args, *(None,) * 5), form, None, False) is chosen


# -------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("normalize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_layer_is_that_of_flax_with_the_mask_given(normalize):
    """Flax's random stream is another one, so its attention gets our mask; and its own dropout is off in inference."""
    options = {"normalize_qk": normalize, "dropout_rate": 0.4, "broadcast_dropout": False}
    layer, x = layers.MultiHeadAttention(2, **options), normal(2, 5, 6, seed=1)
    kept = drawn(KEY, 2, 2, 5, 5, 0.4)

    def masked(q, k, v, **_):
        return written_out(q, k, v, kept, 0.4)[0]

    flax = nn.MultiHeadDotProductAttention(2, **options)
    shapes = jax.eval_shape(functools.partial(flax.init, deterministic=True), KEY, x)["params"]
    own, _ = layer.init(KEY, x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)
    params = jax.tree.map(lambda a: normal(*a.shape, seed=2), own)
    given = nn.MultiHeadDotProductAttention(2, **options, deterministic=True, attention_fn=masked)

    @jax.jit
    def theirs(params, x):
        y, pullback = jax.vjp(lambda p, x: given.apply({"params": p}, x), params, x)
        return flax.apply({"params": params}, x, deterministic=True), y, *pullback(jnp.cos(y))

    @jax.jit
    def ours(params, x):
        y, pullback = jax.vjp(lambda p, x: layer.apply(p, x, key=KEY, train=True)[0], params, x)
        return layer(params, x), y, *pullback(jnp.cos(y))

    @jax.jit
    def by_hand(params, x):
        y, tape = layer.forward(params, x, key=KEY, train=True)
        return layer(params, x), y, *layer.backward(tape, jnp.cos(y))

    expected = jax.tree.leaves(theirs(params, x))
    for own in (ours, by_hand):
        for a, b in zip(jax.tree.leaves(own(params, x)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_the_layer_drops_in_training_alone():
    layer, x = layers.MultiHeadAttention(2, dropout_rate=0.5), normal(2, 5, 6)
    params, _ = layer.init(KEY, x)
    np.testing.assert_array_equal(layer.apply(params, x, key=KEY)[0], layers.MultiHeadAttention(2)(params, x))
    with pytest.raises(ValueError, match="MultiHeadAttention: train=True needs a random key and key is None"):
        layer.apply(params, x, train=True)
    layers.MultiHeadAttention(2).apply(params, x, train=True)  # without dropout no key is asked for
    with pytest.raises(ValueError, match="MultiHeadAttention: dropout_rate is 2, expected a probability"):
        layers.MultiHeadAttention(2, dropout_rate=2)


def test_initializers_of_the_projection_out():
    ones, twos = (jax.nn.initializers.constant(n) for n in (1.0, 2.0))
    x = jnp.zeros((2, 5, 6))
    given, _ = layers.MultiHeadAttention(2, out_kernel_init=ones, out_bias_init=twos, normalize_qk=True).init(KEY, x)
    plain, _ = layers.MultiHeadAttention(2).init(KEY, x)
    assert (given["out"]["kernel"] == 1).all()
    assert (given["out"]["bias"] == 2).all()
    assert (given["query_ln"]["scale"] == 1).all()
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(given[name]["kernel"], plain[name]["kernel"])
