"""What tests made from RULES cannot know: kinks, signatures, the values of Flax and optax, edges, sentences for bad input."""

import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.rules import RULES
from fbackprop.samples import Spec

TWINS = {  # functions that exist elsewhere under the same name
    **{name: getattr(jax.nn, name) for name in ("elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh")},
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "sigmoid_binary_cross_entropy": optax.losses.sigmoid_binary_cross_entropy,
    "softmax_cross_entropy": optax.losses.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": optax.losses.softmax_cross_entropy_with_integer_labels,
}


@pytest.mark.parametrize("name", TWINS)
def test_values_and_gradients_of_jax_nn_and_optax(name):
    for sample in RULES[name].samples:
        if "where" in dict(sample.options) and name == "log_softmax":
            continue  # −inf where left out, so sums of it say nothing
        args, options = sample.make(3)

        @jax.jit
        def both(*arrays, options=options):
            pairs = []
            for f in (getattr(fb, name), TWINS[name]):
                of_first = lambda x, f=f: f(x, *arrays[1:], **options)  # noqa: E731
                pairs.append((of_first(arrays[0]), jax.grad(lambda x, g=of_first: g(x).sum())(arrays[0])))
            return pairs

        (ours, mine), (theirs, gradient) = jax.tree.map(np.asarray, both(*args))
        known = np.isfinite(theirs)  # optax multiplies a label of 0 with log 0, and gives NaN; ours counts that as 0
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[known], theirs[known], rtol=2e-5, atol=2e-6, err_msg=str(sample))
        assert np.isfinite(mine).all()
        if known.all():
            np.testing.assert_allclose(mine, gradient, rtol=2e-4, atol=2e-5, err_msg=str(sample))


@pytest.mark.parametrize(
    ("function", "x", "slope"),
    [
        (fb.relu, 0.0, 0.0),
        (fb.relu, -0.0, 0.0),
        (fb.leaky_relu, 0.0, 1.0),
        (fb.elu, 0.0, 1.0),
        (lambda x: fb.elu(x, 0.5), 0.0, 0.5),
        (lambda x: fb.leaky_relu(x, 0.5), -1.0, 0.5),
    ],
)
def test_kinks_are_those_of_jax(function, x, slope):
    assert jax.grad(function)(x) == slope
    assert jax.grad(fb.without_rules(function))(x) == slope


def test_first_of_equal_maxima_receives_the_cotangent():
    x = jnp.zeros((1, 4, 4, 1))
    for window, strides in (((2, 2), (2, 2)), ((3, 3), (1, 1)), ((2, 3), (1, 2))):
        ours, theirs = (
            jax.grad(lambda x: (f(x, window, strides) * w).sum())(x)
            for w in [jax.random.normal(jax.random.key(0), fb.max_pool(x, window, strides).shape)]
            for f in (fb.max_pool, nn.max_pool)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_nan_is_the_maximum_wherever_it_stands():
    for place in np.ndindex(2, 2):
        x = jnp.zeros((1, 2, 2, 1)).at[0, place[0], place[1], 0].set(jnp.nan)
        assert jnp.isnan(fb.max_pool(x, (2, 2))).all()
        assert jnp.isnan(fb.max_pool.forward(x, (2, 2))[0]).all()


@pytest.mark.parametrize("function", [fb.gelu, lambda x: fb.gelu(x, False), fb.silu, fb.softplus, fb.sigmoid, fb.tanh, fb.elu])
def test_slopes_stay_finite_at_huge_inputs(function):
    x = jnp.array([-1e30, -1e10, -200.0, 200.0, 1e10, 1e30])
    slope = jax.vmap(jax.grad(function))(x)
    assert jnp.isfinite(slope).all(), slope
    assert ((slope[:3] == 0).all() and (jnp.abs(slope[3:]) <= 1).all()) or function is fb.elu


def test_relu_passes_infinite_cotangents_only_where_it_is_open():
    _, saved = fb.relu.forward(jnp.array([-1.0, 1.0]))
    assert fb.relu.backward(saved, jnp.array([jnp.inf, jnp.inf]))[0].tolist() == [0.0, jnp.inf]


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, ((1, 0), (2, 1))])
def test_conv_is_flax_conv(padding):
    x = jax.random.normal(jax.random.key(0), (2, 3, 7, 6, 4))  # two batch dimensions
    options = {"strides": (2, 1), "padding": padding, "kernel_dilation": (1, 2), "feature_group_count": 2}
    module = nn.Conv(6, (3, 2), **options)
    variables = module.init(jax.random.key(1), x)
    ours = fb.conv(x, variables["params"]["kernel"], variables["params"]["bias"], **options)
    np.testing.assert_allclose(ours, module.apply(variables, x), atol=1e-5)


def test_conv_backward_makes_no_loop_over_batch_dimensions_and_none_needs_one():
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    image = jax.random.normal(jax.random.key(0), (5, 6, 2))
    one = jax.grad(lambda k: fb.conv(image, k).sum())(kernel)
    many = jax.grad(lambda k: fb.conv(image[None, None], k).sum())(kernel)
    np.testing.assert_allclose(one, many, rtol=1e-5)


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool_is_flax_avg_pool(count_include_pad):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    args = ((3, 2), (2, 1), "SAME", count_include_pad)
    np.testing.assert_allclose(fb.avg_pool(x, *args), nn.avg_pool(x, *args), rtol=1e-5, atol=1e-6)


def test_places_that_no_window_meets_get_nothing():
    x = jnp.ones((1, 5, 1))
    assert jax.grad(lambda x: fb.max_pool(x, (1,), (3,)).sum())(x).ravel().tolist() == [1, 0, 0, 1, 0]
    assert jax.grad(lambda x: fb.avg_pool(x, (2,), (3,)).sum())(x).ravel().tolist() == [0.5, 0.5, 0, 0.5, 0.5]


def test_dropout_draws_flax_masks_and_the_same_in_every_precision():
    x, key = jnp.ones((64, 33)), jax.random.key(5)
    ours = fb.dropout(x, 0.3, key)
    flax = nn.Dropout(0.3, deterministic=False)
    np.testing.assert_allclose(ours, flax.apply({}, x, rng=key), rtol=1e-6)
    assert ((fb.dropout(x.astype(jnp.bfloat16), 0.3, key) != 0) == (ours != 0)).all()
    with jax.enable_x64(True):
        assert ((fb.dropout(x.astype(jnp.float64), 0.3, key) != 0) == (ours != 0)).all()
    assert abs(float((ours == 0).mean()) - 0.3) < 0.03
    assert (fb.dropout(x, 1.0, key) == 0).all()
    assert fb.dropout(x, 0.5, deterministic=True) is not None
    mask = fb.dropout.forward(x, 0.3, key)[1].named().mask
    assert mask.dtype == bool
    assert mask.nbytes == x.size
    assert len(jnp.unique(fb.dropout(x, 0.5, key, broadcast_dims=(0,)), axis=0)) == 1


def test_embed_repeats_add_up_and_outsiders_are_nan():
    table = jax.random.normal(jax.random.key(0), (5, 3), jnp.bfloat16)
    counts = jax.grad(lambda t: fb.embed(t, jnp.zeros(1000, jnp.int32)).astype(jnp.float32).sum())(table)
    assert counts[0].tolist() == [1000.0] * 3  # bfloat16 alone stops counting at 256
    y = fb.embed(table, jnp.array([-1, 5]))
    assert (y[0] == table[4]).all()
    assert jnp.isnan(y[1]).all()
    assert jnp.isfinite(jax.grad(lambda t: fb.embed(t, jnp.array([5])).sum())(table)).all()


def test_cross_entropy_edges():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [300.0, -300.0, 0.0]])
    labels = jnp.array([2, 1])
    loss, saved = fb.softmax_cross_entropy_with_integer_labels.forward(logits, labels)
    gradient, *_ = fb.softmax_cross_entropy_with_integer_labels.backward(saved, jnp.ones(2))
    assert jnp.isfinite(loss).all()
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)
    onehot = jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(fb.softmax_cross_entropy(logits, onehot), loss, rtol=1e-6)
    soft = jax.grad(lambda z: fb.softmax_cross_entropy(z, onehot).sum())(logits)
    np.testing.assert_allclose(soft, gradient, atol=1e-6)
    assert jnp.isnan(fb.softmax_cross_entropy_with_integer_labels(logits, jnp.array([3, 0]))[0])
    last = fb.softmax_cross_entropy_with_integer_labels(logits, jnp.array([-1, -1]))
    np.testing.assert_allclose(last, fb.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2, 2])))
    rows = fb.softmax_cross_entropy_with_integer_labels(logits, labels, where=jnp.array([True, False]))
    assert rows[1] == 0  # as in optax: a mask of rows leaves rows out
    assert (jax.grad(lambda z: fb.softmax_cross_entropy_with_integer_labels(
        z, labels, where=jnp.array([True, False])).sum())(logits)[1] == 0).all()  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_log_softmax_keeps_what_is_beyond_the_last_place_of_one(masked):
    x = jnp.array([[0.0, -20.0, -30.0], [5.0, 5.0, -40.0], [-jnp.inf, 3.0, -jnp.inf], [1.0, 2.0, 3.0], [-jnp.inf] * 3])
    where = jnp.array([[True, True, False]] * 5) if masked else None
    z = np.where(where, x, -np.inf).astype(np.float64) if masked else np.asarray(x, np.float64)
    top = z.max(1, keepdims=True)
    largest = (z == top) & (np.cumsum(z == top, 1) == 1)
    with np.errstate(invalid="ignore"):
        truth = (z - top) - np.log1p(np.where(largest, 0, np.exp(z - top)).sum(1, keepdims=True))
    got = np.asarray(fb.log_softmax(x, where=where))[:4]
    np.testing.assert_allclose(got, truth[:4], rtol=3e-7)
    assert got[0, 0] < -1e-9
    assert not np.isnan(np.asarray(jax.grad(lambda x: fb.log_softmax(x, where=where)[:4, 0].sum())(x))).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_of_sharp_rows_in_low_precision(dtype):
    """p as it is kept does not sum to one; without the correction the error is three times that of autodiff."""
    x = (10 * jax.random.normal(jax.random.key(0), (4096, 8))).astype(dtype)
    dy = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
    with jax.enable_x64(True):
        truth = np.asarray(jax.vjp(lambda x: jax.nn.softmax(x), x.astype(jnp.float64))[1](dy.astype(jnp.float64))[0])
    ours = jax.vjp(fb.softmax, x)[1](dy)[0]
    theirs = jax.vjp(fb.without_rules(fb.softmax), x)[1](dy)[0]
    error, rival = (np.sqrt(np.mean((np.asarray(g, np.float64) - truth) ** 2)) for g in (ours, theirs))
    assert error <= 1.5 * rival


def _batch_norm_loss(x, scale, bias, mean, var, weights, axis_name=None):
    y, new_mean, new_var = fb.batch_norm(x, scale, bias, mean, var, train=True, momentum=0.8, axis_name=axis_name)
    return (y * weights).sum(), (new_mean * 3).sum() + (new_var * 5).sum()


@pytest.mark.parametrize("kind", ["vmap", "shard_map", "shard_map unchecked"])
def test_batch_norm_over_devices_is_batch_norm_of_the_whole(kind):
    key = jax.random.key(0)
    x, w = jax.random.normal(key, (16, 3, 4)) * 2 + 1, jax.random.normal(jax.random.key(1), (16, 3, 4))
    scale, bias, mean, var = jnp.arange(1.0, 5), jnp.ones(4), jnp.zeros(4), jnp.ones(4)
    want = jax.grad(lambda *a: sum(_batch_norm_loss(*a, w)), (0, 1, 2, 3, 4))(x, scale, bias, mean, var)
    definition = jax.grad(fb.without_rules(lambda *a: sum(_batch_norm_loss(*a, w))), (0, 1, 2, 3, 4))(x, scale, bias, mean, var)
    for a, b in zip(want, definition):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    if kind == "vmap":  # each of four groups differentiates its own share of the loss

        def share(x, w, *rest):
            total, state = _batch_norm_loss(x, *rest, w, "d")
            return total + state / 4

        x4, w4 = (a.reshape(4, 4, *a.shape[1:]) for a in (x, w))
        gradient = jax.grad(share, (0, 2, 3, 4, 5))
        dx, *rest = jax.vmap(gradient, (0, 0, None, None, None, None), axis_name="d")(x4, w4, scale, bias, mean, var)
        dmean, dvar = rest[2:]
        for a, b in zip((dx.reshape(x.shape), *(r.sum(0) for r in rest[:2]), dmean.sum(0), dvar.sum(0)), want):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        return

    def whole(x, scale, bias, mean, var):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
        spread = jax.sharding.PartitionSpec("d")
        alike = jax.sharding.PartitionSpec()

        def local(x, w, *rest):
            total, state = _batch_norm_loss(x, *rest, w, "d")
            return jax.lax.psum(total, "d"), state

        total, state = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spread, spread, alike, alike, alike, alike),
            out_specs=(alike, alike),
            check_vma=kind == "shard_map",
        )(x, w, scale, bias, mean, var)
        return total + state

    got = jax.grad(whole, (0, 1, 2, 3, 4))(x, scale, bias, mean, var)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 0.9, 30.0])
def test_batch_norm_of_large_arrays_keeps_the_tolerance(mean):
    """Large arrays take another way on a CPU, raw moments while they do not cancel: near zero and far from it."""
    x = jax.random.normal(jax.random.key(0), (8, 32, 32, 32)) + mean
    dy, vector = jax.random.normal(jax.random.key(1), x.shape), jnp.linspace(0.5, 1.5, 32)

    def gradient(fn, x, vector, dy):
        return jax.vjp(lambda x, scale: fn(x, scale, vector, train=True)[0], x, vector)[1](dy)

    ours, theirs = (jax.jit(lambda *a: gradient(fn, *a))(x, vector, dy) for fn in (fb.batch_norm, fb.batch_norm.rule.reference))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, vector, dy)]
        truth = [np.asarray(t) for t in gradient(fb.batch_norm.rule.reference, *wide)]
    for a, b, t in zip(ours, theirs, truth):
        error, rival = (np.abs(np.asarray(g, np.float64) - t) for g in (a, b))
        assert error.max() <= max(2 * rival.max(), 4 * 2**-23 * np.abs(t).max())
        if t.size >= 4096:
            assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((rival**2).mean())


def test_norms_stay_exact_far_from_zero():
    """E[x²] − μ² would lose everything here."""
    x = 1000 + jax.random.normal(jax.random.key(0), (64, 8))
    with jax.enable_x64(True):
        truth = np.asarray(fb.layer_norm(x.astype(jnp.float64)))
    np.testing.assert_allclose(fb.layer_norm(x), truth, atol=5e-3)
    np.testing.assert_allclose(fb.batch_norm(x, train=True)[0].std(0), 1, rtol=1e-3)


IMAGE, KERNEL = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, 8))
BAD = [
    (lambda: fb.dense(jnp.ones((32, 5)), jnp.ones((7, 10))), "dense: x has 5 features, kernel expects 7"),
    (lambda: fb.dense(jnp.ones((3, 5)), jnp.ones((5, 4)), jnp.ones(3)), r"dense: bias has shape \(3,\), expected \(4,\)"),
    (lambda: fb.dense(jnp.ones((3, 5), jnp.int32), jnp.ones((5, 4))), "dense: x must be of a floating-point dtype, got int32"),
    (lambda: fb.dense(jnp.ones(5), jnp.ones(5)), r"dense: expected x \[..., in\] and kernel \[in, out\]"),
    (lambda: fb.dense(jnp.ones((3, 5)), jnp.ones((5, 4)), presicion=None), "dense: got an unexpected keyword"),
    (lambda: fb.dense(jnp.ones(5)), "dense: missing a required argument: 'kernel'"),
    (lambda: fb.embed(jnp.ones((3, 5)), jnp.ones(4)), "embed: indices must be integers, got float32"),
    (lambda: fb.conv(IMAGE, jnp.ones((3, 3, 3, 8))), "conv: x has 4 features in 1 group, kernel expects 3 a group"),
    (lambda: fb.conv(IMAGE, KERNEL, feature_group_count=3), "conv: feature_group_count 3 must divide"),
    (lambda: fb.conv(IMAGE, KERNEL, padding="SOME"), "conv: padding must be one of SAME, VALID, CIRCULAR, REFLECT, CAUSAL"),
    (lambda: fb.conv(IMAGE, KERNEL, padding="CAUSAL"), "conv: CAUSAL padding is for one spatial dimension"),
    (lambda: fb.conv(IMAGE, KERNEL, strides=0), "conv: strides must be a positive integer or 2 of them, got 0"),
    (lambda: fb.conv(IMAGE, KERNEL, strides=[1, 1]), "conv: strides is static, so it must be a hashable"),
    (lambda: fb.conv(IMAGE[:, :2], KERNEL, padding="VALID"), "conv: a window of .* does not fit"),
    (lambda: fb.max_pool(IMAGE, (6, 6)), "max_pool: a window of .* does not fit"),
    (lambda: fb.max_pool(IMAGE, 2), "max_pool: window_shape must name a size for each spatial dimension"),
    (lambda: fb.max_pool(IMAGE.astype(int), (2, 2)), "max_pool: inputs must be of a floating-point dtype"),
    (lambda: fb.avg_pool(jnp.ones(3), (2, 2)), "avg_pool: inputs must be"),
    (lambda: fb.softmax(jnp.ones(3), axis=1), "softmax: axis 1 is out of range for an array with 1 dimensions"),
    (lambda: fb.softmax(jnp.ones((3, 3)), axis=jnp.array(1)), "softmax: axis is static"),
    (lambda: fb.dropout(jnp.ones(3), 0.5), "dropout: a random key is needed"),
    (lambda: fb.dropout(jnp.ones(3), 1.5, jax.random.key(0)), r"dropout: rate must lie in \[0, 1\], got 1.5"),
    (lambda: fb.layer_norm(jnp.ones((2, 3)), jnp.ones(2)), r"layer_norm: scale has shape \(2,\), expected \(3,\)"),
    (lambda: fb.batch_norm(jnp.ones((2, 3))), "batch_norm: inference needs the running averages"),
    (lambda: fb.batch_norm(jnp.ones((2, 3)), mean=jnp.ones(3)), "batch_norm: mean and var are given together"),
    (lambda: fb.batch_norm(jnp.ones((0, 3)), train=True), "batch_norm: no elements to average over"),
    (lambda: fb.half_square(jnp.ones(3), jnp.ones((3, 1))), "half_square: predictions and targets must have one shape"),
    (lambda: fb.mean_squared_error(jnp.ones(0), jnp.ones(0)), "mean_squared_error: no elements"),
    (
        lambda: fb.softmax_cross_entropy_with_integer_labels(jnp.ones((3, 4)), jnp.ones(3)),
        "labels must be integers, got float32",
    ),
    (
        lambda: fb.softmax_cross_entropy_with_integer_labels(jnp.ones((3, 4)), jnp.ones((3, 4), int)),
        "labels must have the shape of the logits without the classes",
    ),
    (
        lambda: fb.softmax_cross_entropy(jnp.ones((3, 4)), jnp.ones((2, 4))),
        "softmax_cross_entropy: labels must broadcast to the shape of logits",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[re.sub(r"\W+", "_", s)[:40] for _, s in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
    with pytest.raises((TypeError, ValueError), match=sentence):
        jax.eval_shape(jax.grad(lambda s: jnp.sum(jax.tree.leaves(call())[0]) * s), 1.0)


def test_workloads_are_the_fixed_ones():
    """Workloads live in the rules; the list that the benchmarks are judged by is fixed."""
    fixed = json.loads((pathlib.Path(fb.__file__).parent / "workloads.json").read_text())["workloads"]
    for name in {w["op"] for w in fixed} & set(RULES):
        want = [(w["dtype"], sorted(map(tuple, w["shapes"].values()))) for w in fixed if w["op"] == name]
        have = []
        for workload in RULES[name].workloads:
            specs = [v for v in (*workload.args, *(v for _, v in workload.options)) if isinstance(v, Spec) and v.kind != "key"]
            shapes = sorted(v.shape for v in specs)
            have.append((workload.dtype, shapes))
        if name == "batch_norm":  # the list names x alone; ours adds the vectors of parameters
            have = [(dtype, [s for s in shapes if len(s) > 1]) for dtype, shapes in have]
        if name in ("lstm", "gru"):  # the list names x and a state; ours adds the weights, and the lstm has two states
            have = [(w.dtype, sorted([w.args[0].shape, w.args[4].shape[-2:]])) for w in RULES[name].workloads]
        assert sorted(have) == sorted(want), name
