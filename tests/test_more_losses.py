"""Losses against optax, in float64; CTC against all paths; kinks, ties, −inf, masked rows; sentences for bad input."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.rules import RULES
from fbackprop.samples import Spec

NAMES = sorted(name for name in RULES if hasattr(optax.losses, name))


def richest(rule):
    """The first sample of those that give most arguments; optax gives NaN where something is impossible."""

    def given(sample):
        kinds = [v.kind for v in (*sample.args, *dict(sample.options).values()) if isinstance(v, Spec)]
        return 0 if "impossible" in kinds else len(kinds)

    return max(rule.samples, key=given)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_optax(name):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):  # which optax needs
        args, options = richest(RULES[name]).make(3, "float64")
        if name.startswith("ctc"):
            args = tuple(a.astype(jnp.float64) if a.dtype == bool else a for a in args)
        floats = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating) and not (name.startswith("ctc") and i)]

        def total(f, moved, extra):
            given = list(args)
            for i, a in zip(floats, moved):
                given[i] = a
            y = jax.tree.leaves(f(*given, **{**options, **extra}))
            return sum(jnp.sum(v * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape))) for v in y)

        traced = {n: v for n, v in options.items() if isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.floating)}
        functions = getattr(fb, name), getattr(optax.losses, name)
        moved = [args[i] for i in floats]
        ours, theirs = jax.jit(lambda *a: [jax.value_and_grad(total, (1, 2))(f, *a) for f in functions])(moved, traced)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            known = np.isfinite(b)  # optax gives NaN to the labels of what is left out, and ours 0
            assert known.any()
            assert np.isfinite(a).all()
            np.testing.assert_allclose(np.asarray(a)[known], np.asarray(b)[known], rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ CTC


def spelt(path, blank):
    return [k for k, _ in itertools.groupby(path) if k != blank]


def by_all_paths(log_p, frames, labels, blank):
    """The loss of one sequence from the definition: every path that spells the labels."""
    classes = range(log_p.shape[-1])
    paths = np.array([p for p in itertools.product(classes, repeat=frames) if spelt(p, blank) == list(labels)])
    return -jax.nn.logsumexp(log_p[np.arange(frames)[None], paths].sum(1))


def test_ctc_is_the_sum_over_all_paths():
    """Repeated labels, no labels, padded frames and labels, another blank; the gradient against autodiff of the sum."""
    cases = [([1, 1], 4), ([1, 2], 3), ([], 4), ([2], 1)]
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(0), (len(cases), 4, 3), jnp.float64)
        frames = jnp.array([[t >= n for t in range(4)] for _, n in cases])
        labels = jnp.array([row + [-1] * (2 - len(row)) for row, _ in cases])
        for blank, shift in ((0, 0), (2, -1)):
            own = jnp.where(labels < 0, labels, labels + shift)

            def truth(z, blank=blank, shift=shift):
                log_p = jax.nn.log_softmax(z)
                rows = [by_all_paths(log_p[i], n, [k + shift for k in row], blank) for i, (row, n) in enumerate(cases)]
                return jnp.stack(rows)

            def ours(z, own=own, blank=blank):
                return fb.ctc_loss(z, frames, own, own < 0, blank_id=blank)

            weights = jnp.array([1.0, -2.0, 3.0, 0.5])
            np.testing.assert_allclose(ours(logits), truth(logits), rtol=1e-12)
            a, b = (jax.jit(jax.grad(lambda z, f=f: (f(z) * weights).sum()))(logits) for f in (ours, truth))
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_ctc_of_long_sequences_is_as_exact_as_autodiff_and_its_gradient_is_probability_minus_posterior():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((2, 150, 12)), jnp.float32)
    labels = jnp.asarray(rng.integers(1, 12, (2, 30)))
    paddings = jnp.arange(150)[None] >= jnp.array([[150], [120]]), jnp.arange(30)[None] >= jnp.array([[30], [11]])

    def gradient(z, f):
        return jax.grad(lambda z: f(z, paddings[0].astype(z.dtype), labels, paddings[1].astype(z.dtype)).sum())(z)

    ours, theirs = (np.asarray(jax.jit(gradient, static_argnums=1)(logits, f)) for f in (fb.ctc_loss, optax.losses.ctc_loss))
    with jax.enable_x64(True):
        truth = np.asarray(jax.jit(gradient, static_argnums=1)(logits.astype(jnp.float64), optax.losses.ctc_loss))
    assert np.abs(ours - truth).max() <= 2 * np.abs(theirs - truth).max()
    np.testing.assert_allclose(ours.sum(-1), 0, atol=1e-5)  # probabilities and posteriors both sum to one
    assert not ours[1, 120:].any()
    posterior = np.asarray(jax.nn.softmax(logits)) - ours
    assert posterior[0].min() > -1e-5
    np.testing.assert_allclose(posterior[0].sum(-1), 1, atol=1e-5)


def test_ctc_at_the_edges():
    z, none = jax.random.normal(jax.random.key(0), (3, 4, 3)), jnp.zeros((3, 4), bool)
    labels = jnp.array([[1, 2], [1, 7], [2, -4]])
    loss = fb.ctc_loss(z, none, labels, jnp.array([[0, 0], [0, 0], [0, 1]]))
    assert jnp.isnan(loss).tolist() == [False, True, False]  # a label beyond the classes, unless it is padding
    empty = fb.ctc_loss(z, none, jnp.zeros((3, 0), int), jnp.zeros((3, 0)))
    np.testing.assert_allclose(empty, -jax.nn.log_softmax(z)[..., 0].sum(1), rtol=1e-6)

    def impossible(z):
        return fb.ctc_loss(z, none, labels[:, :1].clip(0, 2), jnp.zeros((3, 1))).sum()

    for logits in (z.at[0, :, 1].set(-jnp.inf), z.at[:, 2].set(-jnp.inf), z.at[:, :, 0].set(-jnp.inf)):
        assert jnp.isfinite(jax.grad(impossible)(logits)).all()


# ---------------------------------------------------------------------------------------------------------------- edges


def test_kinks_and_ties_are_those_of_jax():
    one = jnp.array([1.0, 1.0, -1.0])
    for ours, theirs, x in (
        (fb.hinge_loss, optax.losses.hinge_loss, jnp.array([1.0, 2.0, -1.0])),
        (fb.perceptron_loss, optax.losses.perceptron_loss, jnp.array([0.0, 1.0, -0.0])),
        (fb.sparsemax_loss, lambda z, t: optax.losses.sparsemax_loss(z, t > 0), jnp.array([1.0, -1.0, 1.0])),
        (lambda p, t: fb.huber_loss(p, t), optax.losses.huber_loss, jnp.array([2.0, 1.0, 0.0])),
    ):
        label = one > 0 if ours is fb.sparsemax_loss else one
        a, b = (jax.grad(lambda x, f=f: f(x, label).sum())(x) for f in (ours, theirs))
        np.testing.assert_array_equal(a, b)
    scores, labels = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1, 0])
    for name in ("multiclass_hinge_loss", "multiclass_perceptron_loss", "multiclass_sparsemax_loss"):
        a, b = (jax.grad(lambda s, f=f: f(s, labels).sum())(scores) for f in (getattr(fb, name), getattr(optax.losses, name)))
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert jax.grad(fb.mean_absolute_error)(0.0) == jax.grad(jnp.abs)(0.0) == 1
    triplet = jax.grad(lambda a: fb.triplet_margin_loss(a, a, a, margin=0.0, eps=0.0).sum())(jnp.ones((2, 3)))
    assert not triplet.any()  # no distance at all: finite


def test_log_cosh_keeps_small_errors_and_survives_large_ones():
    e = jnp.array([1e-3, -1e-4, 700.0, -3e4], jnp.float32)
    np.testing.assert_allclose(fb.log_cosh(e)[:2], e[:2] ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(fb.log_cosh(e)[2:], jnp.abs(e[2:]) - np.log(2), rtol=1e-6)


ROWS = {
    "kl_divergence": (jnp.full((2, 3), -1.0), jnp.full((2, 3), 0.3)),
    "generalized_kl_divergence": (jnp.full((2, 3), -1.0), jnp.full((2, 3), 0.3)),
    "kl_divergence_with_log_targets": (jnp.full((2, 3), -1.0), jnp.full((2, 3), -2.0)),
    "poly_loss_cross_entropy": (jnp.ones((2, 3)), jnp.full((2, 3), 0.3)),
    "cosine_similarity": (jnp.ones((2, 3)), jnp.ones((2, 3))),
    "ranking_softmax_loss": (jnp.ones((2, 3)), jnp.ones((2, 3))),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_without_elements_give_zero_and_receive_nothing(name):
    function, (a, b) = getattr(fb, name), ROWS[name]
    where = jnp.array([[True, True, False], [False, False, False]])
    value, slopes = jax.value_and_grad(lambda a, b: jnp.sum(function(a, b, where=where)), (0, 1))(a, b)
    assert jnp.isfinite(value)
    for slope in slopes:
        assert jnp.isfinite(slope).all()
        assert not slope[~where].any()
    nothing = jax.value_and_grad(lambda a: jnp.sum(function(a, b, where=jnp.zeros((2, 3), bool))))(a)
    assert not any(v.any() for v in nothing)
    if name != "ranking_softmax_loss":
        assert function(a[:, :0], b[:, :0]).shape == (2,)


def test_what_is_impossible_and_not_wanted_costs_nothing():
    log_p, t = jnp.array([[-jnp.inf, jnp.log(0.5), jnp.log(0.5)]]), jnp.array([[0.0, 0.25, 0.75]])
    three = (fb.kl_divergence, t), (fb.generalized_kl_divergence, t), (fb.kl_divergence_with_log_targets, jnp.log(t))
    for f, target in three:
        value, slopes = jax.value_and_grad(lambda *a, f=f: f(*a).sum(), (0, 1))(log_p, target)
        np.testing.assert_allclose(value, 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-5)
        assert all(jnp.isfinite(s).all() for s in slopes)
    for f in (fb.safe_softmax_cross_entropy, fb.poly_loss_cross_entropy):
        value, slopes = jax.value_and_grad(lambda *a, f=f: f(*a).sum(), (0, 1))(log_p, t)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(s).all() for s in slopes)


def test_a_narrow_target_is_not_rounded_again():
    """A teacher in bfloat16, a student in float32."""
    l, t = jnp.linspace(-3, -1, 8)[None], jnp.linspace(-4, -1, 8, dtype=jnp.bfloat16)[None]
    dl = jax.grad(lambda l: fb.kl_divergence_with_log_targets(l, t).sum())(l)
    np.testing.assert_allclose(np.float64(dl), -np.exp(np.float64(t)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (4,), (4, 1), (4, 4)])
def test_a_temperature_for_each_pair(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    temperature, labels = jnp.asarray(np.random.default_rng(1).uniform(0.3, 2, shape), jnp.float32), jnp.array([0, 0, 1, 1])
    with jax.numpy_rank_promotion("allow"):  # for optax
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda x, tau, f=f: f(x, labels, tau), (0, 1)))(x, temperature)
            for f in (fb.ntxent, optax.losses.ntxent)
        )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_margin_for_each_triplet_and_an_epsilon_for_each_vector():
    rng = np.random.default_rng(0)
    a, b, c = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    margin, eps = jnp.asarray([0.1, 1.0, 5.0, 20.0]), jnp.asarray([1e-6, 0.1, 1.0, 2.0])

    def triplet(module):
        return lambda *args: (module.triplet_margin_loss(*args[:3], margin=args[3], eps=args[4]) * jnp.arange(4.0)).sum()

    def cosine(module):
        return lambda *args: (module.cosine_similarity(*args[:2], epsilon=4 * args[4][:, None]) * jnp.arange(4.0)).sum()

    for build in (triplet, cosine):
        ours, theirs = (jax.value_and_grad(build(m), (0, 1, 2, 3, 4))(a, b, c, margin, eps) for m in (fb, optax.losses))
        for own, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


def test_a_target_beyond_float16_has_a_gradient():
    """exp 12 is infinite in float16; a 64th of it is not."""
    l, t = jnp.full((1, 1), 11.75, jnp.float16), jnp.full((1, 1), 12, jnp.float16)
    y, pullback = jax.vjp(fb.kl_divergence_with_log_targets, l, t)
    np.testing.assert_allclose(np.float64(y), [np.exp(12) / 4], rtol=1e-3)
    dl, dt = pullback(jnp.full(1, 1 / 64, jnp.float16))
    np.testing.assert_allclose(np.float64([dl, dt]).ravel(), [-np.exp(12) / 64, 1.25 * np.exp(12) / 64], rtol=2e-3)


def test_similar_vectors_at_the_edges():
    assert fb.ntxent(jnp.ones((3, 2)), jnp.array([0, 1, 2])) == 0  # no pairs
    assert fb.ntxent(jnp.ones((3, 2)), jnp.array([1, 1, 1])) == 0  # nothing to tell them from
    x = jnp.zeros((4, 2)).at[0].set(1.0)
    assert jnp.isfinite(jax.grad(lambda x: fb.ntxent(x, jnp.array([0, 0, 1, 1])))(x)).all()
    value, slope = jax.value_and_grad(lambda x: fb.cosine_similarity(x, jnp.ones((4, 2))).sum())(x)
    np.testing.assert_allclose(value, 1, rtol=1e-6)  # of the first alone
    assert not slope[1:].any()
    with jax.enable_x64(True):
        a, p, n = (jnp.asarray(np.random.default_rng(i).standard_normal((3, 4))) for i in range(3))
        for degree in (1, 3, 2.5):
            near, far = (((jnp.abs(a - v) ** degree).sum(-1) + 1e-6) ** (1 / degree) for v in (p, n))
            ours = fb.triplet_margin_loss(a, p, n, norm_degree=degree)
            np.testing.assert_allclose(ours, jnp.maximum(near - far + 1, 0), rtol=1e-10)


def test_dice_of_classes_that_are_not_there():
    z, t = jnp.full((1, 4, 2), -200.0), jnp.zeros((1, 4, 2))
    value, slope = jax.value_and_grad(lambda z: fb.dice_loss(z, t, smooth=0.0, apply_softmax=False).sum())(jnp.exp(z))
    assert value == 0
    assert jnp.isfinite(slope).all()


def test_focal_loss_of_sure_predictions():
    z, t = jnp.array([300.0, -300.0, 300.0, -300.0, 0.0]), jnp.array([1.0, 0.0, 0.0, 1.0, 1.0])
    for gamma in (0.0, 0.5, 2.0):
        slopes = jax.grad(lambda *a, g=gamma: fb.sigmoid_focal_loss(*a, alpha=0.3, gamma=g).sum(), (0, 1))(z, t)
        assert all(jnp.isfinite(s).all() for s in slopes)


def test_a_label_over_several_axes_counts_in_their_order():
    """As in optax, whose own tests tell: row-major over the axes as they are given."""
    z, labels = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.array([7, 2])
    ours = fb.softmax_cross_entropy_with_integer_labels(z, labels, (2, 1))
    theirs = optax.losses.softmax_cross_entropy_with_integer_labels(z, labels, (2, 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_fenchel_young_of_logsumexp_is_cross_entropy_and_runs_its_rule():
    z, t = jax.random.normal(jax.random.key(0), (3, 4)), jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 4)))
    loss = fb.make_fenchel_young_loss(fb.logsumexp)
    np.testing.assert_allclose(loss(z, t), fb.softmax_cross_entropy(z, t), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda z: loss(z, t).sum())(z), jax.nn.softmax(z) - t, atol=1e-6)
    assert "custom_vjp" in str(jax.make_jaxpr(loss)(z, t))


X, LABELS = jnp.ones((2, 3)), jnp.zeros(2, int)
CTC = jnp.ones((2, 4, 3)), jnp.zeros((2, 4)), jnp.ones((2, 2), int), jnp.zeros((2, 2))
BAD = [
    (lambda: fb.squared_error(X, X[:1]), "squared_error: targets must have the shape of predictions, got"),
    (lambda: fb.huber_loss(X, jnp.ones(2)), "huber_loss: targets must broadcast with predictions"),
    (lambda: fb.log_cosh(LABELS), "log_cosh: predictions must be of a floating-point dtype"),
    (lambda: fb.perceptron_loss(X, X[:1]), "perceptron_loss: predictor_outputs and targets must have one shape"),
    (lambda: fb.multiclass_hinge_loss(X, X), "multiclass_hinge_loss: labels must be integers, got float32"),
    (lambda: fb.multiclass_sparsemax_loss(X, LABELS[:1]), r"multiclass_sparsemax_loss: expected scores \[\.\.\., classes\]"),
    (
        lambda: fb.ntxent(X, jnp.array([0, 1]), jnp.ones((3, 1))),
        r"ntxent: temperature has shape \(3, 1\), expected a number, or a",
    ),
    (
        lambda: fb.cosine_similarity(X, X, epsilon=jnp.ones(3)),
        r"cosine_similarity: epsilon has shape \(3,\), expected a number, or a shape that broadcasts to \(2, 1\), one number",
    ),
    (lambda: fb.triplet_margin_loss(X, X, X, margin=jnp.ones(3)), r"triplet_margin_loss: margin has shape \(3,\), expected a"),
    (lambda: fb.kl_divergence(X, jnp.ones((2, 4))), "kl_divergence: shapes that do not broadcast together"),
    (lambda: fb.kl_divergence(X, X, axis=2), "kl_divergence: axis 2 is out of range"),
    (
        lambda: fb.poly_loss_cross_entropy(X, jnp.ones((2, 4))),
        "poly_loss_cross_entropy: labels must broadcast to the shape of logits",
    ),
    (lambda: fb.smooth_labels(LABELS, 0.1), "smooth_labels: labels must be of a floating-point dtype"),
    (lambda: fb.cosine_distance(X, jnp.ones((2, 4))), "cosine_similarity: predictions and targets must broadcast together"),
    (lambda: fb.triplet_margin_loss(X, X, X, norm_degree=0.5), "norm_degree must be 1 or more, got 0.5"),
    (lambda: fb.ntxent(X, jnp.zeros(3, int)), r"ntxent: expected embeddings \[n, d\] and labels \[n\]"),
    (lambda: fb.dice_loss(X, X, reduction="all"), 'dice_loss: reduction must be "mean", "sum" or "none", got \'all\''),
    (lambda: fb.dice_loss(X, X, axis=1), "dice_loss: axis 1 names the dimension of the classes"),
    (lambda: fb.dice_loss(X, X, class_weights=jnp.ones(2)), r"dice_loss: class_weights must have the shape \(3,\)"),
    (lambda: fb.ctc_loss(*CTC, blank_id=3), "ctc_loss: blank_id must be one of the 3 classes, got 3"),
    (lambda: fb.ctc_loss(CTC[0], CTC[1][:, :2], *CTC[2:]), r"ctc_loss: expected logits \[batch, frames, classes\]"),
    (lambda: fb.ctc_loss(*CTC[:2], CTC[2], CTC[3][:1]), "ctc_loss: expected labels and label_paddings"),
    (lambda: fb.ctc_loss(*CTC, log_epsilon=jnp.array(-5.0)), "log_epsilon is static"),
    (lambda: fb.make_fenchel_young_loss(3), "make_fenchel_young_loss: max_fun must be a function of scores, got int"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[re.sub(r"\W+", "_", s)[:40] for _, s in BAD])
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        call()
