"""rnn, lstm, gru and linear_recurrence: the values and gradients of Flax, lengths, directions, segments, bytes, bad input."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes

STEPS, BATCH, FEATURES, HIDDEN = 6, 3, 4, 5


def columns(cell, names, leaf="kernel"):
    return jnp.concatenate([cell[name][leaf] for name in names], -1)


def as_lstm(cell, x, **options):
    h, carry = fb.lstm(
        x, columns(cell, ("ii", "if", "ig", "io")), columns(cell, ("hi", "hf", "hg", "ho")),
        columns(cell, ("hi", "hf", "hg", "ho"), "bias"), **options,
    )  # fmt: skip
    return h, carry


def as_gru(cell, x, **options):
    ours = ("ir", "iz", "in")
    kernels = columns(cell, ours), columns(cell, ("hr", "hz", "hn")), columns(cell, ours, "bias")
    return fb.gru(x, *kernels, recurrent_bias=cell["hn"]["bias"], **options)


def as_rnn(cell, x, **options):
    return fb.rnn(x, cell["i"]["kernel"], cell["h"]["kernel"], cell["i"]["bias"], **options)


CELLS = {
    "lstm": (nn.OptimizedLSTMCell(HIDDEN), as_lstm),
    "gru": (nn.GRUCell(HIDDEN), as_gru),
    "rnn": (nn.SimpleCell(HIDDEN), as_rnn),
    "rnn, relu": (nn.SimpleCell(HIDDEN, activation_fn=jax.nn.relu), functools.partial(as_rnn, activation="relu")),
}
ARGUMENTS = {  # weights of each op
    name: tuple(jax.random.normal(jax.random.key(i), shape) / 2 for i, shape in enumerate(shapes))
    for name, shapes in {
        "lstm": ((FEATURES, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN,)),
        "gru": ((FEATURES, 3 * HIDDEN), (HIDDEN, 3 * HIDDEN), (3 * HIDDEN,)),
        "rnn": ((FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,)),
    }.items()
}
X = jax.random.normal(jax.random.key(9), (STEPS, BATCH, FEATURES))


def close(ours, theirs, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


@pytest.mark.parametrize("options", [{}, {"reverse": True, "lengths": (2, 6, 3)}], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients_are_those_of_flax(name, options):
    module, op = CELLS[name]
    reverse, lengths = options.get("reverse", False), options.get("lengths")
    lengths = None if lengths is None else jnp.array(lengths)
    model = nn.RNN(module, time_major=True, return_carry=True, reverse=reverse, keep_order=True)
    params = model.init(jax.random.key(1), X)["params"]
    leaves, tree = jax.tree.flatten(params)  # Flax's biases start at zero
    params = tree.unflatten([p + jax.random.normal(jax.random.key(i), p.shape) / 4 for i, p in enumerate(leaves)])
    within = 1.0 if lengths is None else (jnp.arange(STEPS)[:, None] < lengths[None])[..., None].astype(X.dtype)

    def theirs(params, x):
        carry, h = model.apply({"params": params}, x, seq_lengths=lengths)
        return h * within, carry

    def ours(params, x):
        return op(params["cell"], x, reverse=reverse, lengths=lengths)

    @jax.jit
    def both(params, x):
        def one(fn):
            y, pullback = jax.vjp(fn, params, x)
            return y, pullback(jax.tree.map(jnp.cos, y))

        return one(ours), one(theirs)

    close(*both(params, X))


def test_a_gru_with_the_reset_gate_before_the_matmul_is_that_of_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x, h: hk.dynamic_unroll(hk.GRU(HIDDEN), x, h, reverse=True)))
    first = jax.random.normal(jax.random.key(2), (BATCH, HIDDEN))
    params = model.init(jax.random.key(1), X, first)
    params = {"gru": params["gru"] | {"b": jax.random.normal(jax.random.key(3), (3 * HIDDEN,)) / 4}}

    def ours(params, x, first):
        def order(w):  # Haiku: z, r, n, and z is the share of n
            z, r, n = jnp.split(w, 3, -1)
            return jnp.concatenate([r, -z, n], -1)

        p = params["gru"]
        return fb.gru(x, *map(order, (p["w_i"], p["w_h"], p["b"])), first, reset_after=False, reverse=True)

    @jax.jit
    def both(*args):
        def one(fn):
            y, pullback = jax.vjp(fn, *args)
            return y, pullback(jax.tree.map(jnp.cos, y))

        return one(ours), one(model.apply)

    close(*both(params, X, first))


@pytest.mark.parametrize("name", [*ARGUMENTS, "gru, reset before"])
def test_segments_change_nothing_but_what_is_kept(name):
    lengths, (name, *before) = jnp.array([0, 6, 4]), name.split(", ")
    op = functools.partial(getattr(fb, name), **({"reset_after": False} if before else {}))

    def run(segments, reverse):
        def of(*args):
            return op(*args, lengths=lengths, reverse=reverse, segments=segments)

        y, pullback = jax.vjp(of, X, *ARGUMENTS[name])
        return y, pullback(jax.tree.map(jnp.cos, y))

    for reverse, segments in ((False, 4), (True, 3)):  # 4 does not divide 6
        close(*jax.jit(lambda s=segments, r=reverse: (run(s, r), run(None, r)))())


def test_bytes_kept_are_the_least_and_with_segments_grow_with_the_root_of_the_length():
    def kept(steps, segments):
        shapes = ((steps, 8, 16), (16, 128), (32, 128), (128,), (2, 8, 32))
        given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        bytes_ = saved_bytes(lambda *a: fb.lstm(*a, segments=segments), *given)
        return bytes_ - 4 * sum(np.prod(s) for s in shapes[:3])  # beside x and the kernels

    assert kept(64, None) == 4 * 8 * 32 * (5 * 64 + 1)
    assert kept(64, 8) == 4 * (128 + 2 * 8 * 8 * 32)
    assert kept(1024, 32) < 4.01 * kept(64, 8)  # √16 for 16 times the steps
    assert kept(1024, 32) < kept(1024, None) / 75


def test_temporaries_with_segments_are_a_part_of_those_without():
    shapes = ((256, 8, 8), (8, 128), (32, 128), (128,))
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

    def temporary(segments):
        step = jax.jit(jax.grad(lambda *a: fb.lstm(*a, segments=segments)[0].sum(), range(4)))
        return step.lower(*given).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(None) / 3


def test_frozen_arguments_cost_nothing():
    kernel, recurrent_kernel, bias = ARGUMENTS["lstm"]
    everything = saved_bytes(fb.lstm, X, kernel, recurrent_kernel, bias)
    assert everything - saved_bytes(lambda x: fb.lstm(x, kernel, recurrent_kernel, bias), X) == X.nbytes
    bias_alone = saved_bytes(lambda b: fb.lstm(X, kernel, recurrent_kernel, b), bias)
    assert everything - bias_alone == X.nbytes + kernel.nbytes


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("lstm", True), ("gru", True), ("rnn", False)])
def test_what_stands_beyond_a_length_takes_no_part(name, reverse):
    lengths, op = jnp.array([0, -1, 99]), getattr(fb, name)
    beyond = jnp.arange(STEPS)[:, None, None] >= lengths[None, :, None]
    first = jax.random.normal(jax.random.key(3), (2, BATCH, HIDDEN))

    @jax.jit
    def run(x):
        carry = first if name == "lstm" else first[1]
        y, pullback = jax.vjp(lambda x, *w: op(x, *w, carry, lengths=lengths, reverse=reverse), x, *ARGUMENTS[name])
        return y, pullback(jax.tree.map(jnp.ones_like, y))

    result = run(jnp.where(beyond, jnp.nan, X))
    close(result, run(X), 0)
    (h, carry), (dx, *_) = result
    assert (jnp.where(beyond, h, 0) == 0).all()
    assert (jnp.where(beyond, dx, 0) == 0).all()
    carry = jnp.stack(jax.tree.leaves(carry))
    assert (carry[:, :2] == first[-len(carry) :, :2]).all()
    assert (carry[-1, 2] == h[0 if reverse else -1, 2]).all()


def test_a_carry_may_be_a_pair_or_one_array_and_sequences_may_have_no_batch():
    pair = jax.random.normal(jax.random.key(3), (2, HIDDEN))

    def loss(carry):
        return fb.lstm(X[:, 0], *ARGUMENTS["lstm"], carry)[0].sum()

    one = jax.grad(loss)(pair)
    two = jax.grad(loss)((pair[0], pair[1]))
    assert isinstance(two, tuple)
    close(jnp.stack(two), one, 0)


def test_a_sequence_in_two_parts_is_the_sequence():
    whole, last = fb.gru(X, *ARGUMENTS["gru"])
    first, carry = fb.gru(X[:2], *ARGUMENTS["gru"])
    second, carry = fb.gru(X[2:], *ARGUMENTS["gru"], carry)
    close((jnp.concatenate([first, second]), carry), (whole, last), 1e-6)


def test_a_gate_that_rounds_to_one_keeps_its_slope_in_half_precision():
    x = jnp.full((3, 1, 1), 7.0, jnp.bfloat16)
    weights = (jnp.ones((1, 4), jnp.bfloat16), jnp.zeros((1, 4), jnp.bfloat16))
    in_half = jax.grad(lambda x: fb.lstm(x, *weights)[0].astype(jnp.float32).sum())(x)
    in_full = jax.grad(lambda x: fb.lstm(x, *(w.astype(jnp.float32) for w in weights))[0].sum())(x.astype(jnp.float32))
    assert (in_half != 0).all()
    np.testing.assert_allclose(in_half.astype(jnp.float32), in_full, rtol=0.03)


def test_what_is_behind_a_shut_gate_is_not_lost_in_float16():
    """The cotangent of the gate, 2.5e-8 · tanh 1, is zero in float16; 64 times it is not."""
    kernel, recurrent_kernel = jnp.array([[0, 0, 0, 1]], jnp.float16), jnp.array([[0, 0, 0, 64]], jnp.float16)
    x, c, h = jnp.full((1, 1, 1), -17.5, jnp.float16), jnp.full((1, 1), 2, jnp.float16), jnp.zeros((1, 1), jnp.float16)
    dh = jax.grad(lambda h: fb.lstm(x, kernel, recurrent_kernel, None, (c, h))[0].sum())(h)
    np.testing.assert_allclose(np.float64(dh), 64 * np.tanh(1) * np.exp(-17.5), rtol=0.05)


W4, W3, W1 = ARGUMENTS["lstm"], ARGUMENTS["gru"], ARGUMENTS["rnn"]


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: fb.lstm(X[0, 0], *W4), ValueError, "lstm: expected x [T, B, F], kernel [F, 4H] and recurrent_kernel [H, 4H]"),
        (lambda: fb.lstm(X[:0], *W4), ValueError, "lstm: x has no time steps (x (0, 3, 4)"),
        (lambda: fb.lstm(X[..., :3], *W4), ValueError, "lstm: x has 3 features, kernel expects 4 (x (6, 3, 3)"),
        (lambda: fb.lstm(X, *W3), ValueError, "lstm: kernel has 15 columns, expected 20"),
        (lambda: fb.gru(X, *W4), ValueError, "gru: kernel has 20 columns, expected 15"),
        (lambda: fb.gru(X, W3[0], W3[1], W1[2]), ValueError, "gru: bias has shape (5,), expected (15,)"),
        (lambda: fb.gru(X, *W3, recurrent_bias=W3[2]), ValueError, "gru: recurrent_bias has shape (15,), expected (5,)"),
        (
            lambda: fb.gru(X, *W3, recurrent_bias=W1[2], reset_after=False), ValueError,
            "gru: recurrent_bias stands inside of the reset gate",
        ),
        (lambda: fb.rnn(X, *W1, X[0]), ValueError, "rnn: carry has shape (3, 4), expected (3, 5)"),
        (lambda: fb.lstm(X, *W4, X[0]), ValueError, "lstm: carry must be (c, h)"),
        (lambda: fb.lstm(X, *W4, (X[0],)), ValueError, "lstm: carry must be (c, h)"),
        (lambda: fb.lstm(X, *W4, (X[0], X[0])), ValueError, "lstm: carry has shape (3, 4), expected (3, 5)"),
        (lambda: fb.lstm(X, *W4, lengths=jnp.ones(3)), TypeError, "lstm: lengths must be integers, got float32"),
        (lambda: fb.lstm(X, *W4, lengths=jnp.ones(2, int)), ValueError, "lstm: lengths has shape (2,), expected (3,)"),
        (lambda: fb.lstm(X, *W4, segments=7), ValueError, "lstm: segments must be a number from 1 to the 6 steps of x, got 7"),
        (lambda: fb.lstm(X.astype(int), *W4), TypeError, "lstm: x must be of a floating-point dtype, got int32"),
        (lambda: fb.rnn(X, *W1, activation="gelu"), ValueError, "rnn: activation must be \"tanh\" or \"relu\", got 'gelu'"),
        (lambda: fb.linear_recurrence(X, X[0]), ValueError, "linear_recurrence: expected a and b of one shape [T, ...], got"),
        (lambda: fb.linear_recurrence(X[:0], X[:0]), ValueError, "linear_recurrence: there are no steps"),
        (lambda: fb.linear_recurrence(X, X, X), ValueError, "linear_recurrence: h0 has shape (6, 3, 4), expected (3, 4)"),
        (lambda: fb.linear_recurrence(X, X.astype(int)), TypeError, "linear_recurrence: b must be of a floating-point dtype"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


# ----------------------------------------------------------------------------------------------------- linear_recurrence


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_linear_recurrence_is_the_loop_in_numpy(reverse, parallel):
    a, b, h = (np.random.default_rng(i).uniform(-1, 1, s) for i, s in enumerate(((9, 4), (9, 4), (4,))))
    expected, state = np.zeros_like(b), h
    for t in reversed(range(9)) if reverse else range(9):
        state = expected[t] = a[t] * state + b[t]
    y = fb.linear_recurrence(*(jnp.asarray(v, jnp.float32) for v in (a, b, h)), reverse=reverse, parallel=parallel)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_long_linear_recurrence_in_half_precision_adds_up():
    ones = jnp.ones(4096, jnp.bfloat16)
    assert fb.linear_recurrence(ones, ones)[-1] == 4096  # bfloat16 alone stops counting at 256
    da, db = jax.grad(lambda a, b: fb.linear_recurrence(a, b)[-1].astype(jnp.float32), (0, 1))(ones, ones)
    assert (db == 1).all()
    assert da[-1] == 4096


def test_linear_recurrence_keeps_two_arrays_and_for_b_alone_one():
    given = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    a, h0 = jnp.ones((64, 8)), jnp.ones(8)
    assert saved_bytes(fb.linear_recurrence, given, given) == 2 * a.nbytes
    assert saved_bytes(fb.linear_recurrence, given, given, h0) == 2 * a.nbytes
    assert saved_bytes(lambda b: fb.linear_recurrence(a, b), given) == a.nbytes
