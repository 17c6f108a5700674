"""accelerate: a projection to a vocabulary and the cross-entropy after it become linear_cross_entropy, where that is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.accelerating import projecting

B, T, D, V = 3, 5, 6, 37
LINEAR, PLAIN = "linear_cross_entropy", "softmax_cross_entropy_with_integer_labels"
ce = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(projecting, "CLASSES", 8)
    monkeypatch.setattr(projecting, "LOGITS", 1)


LABELS = (jnp.arange(B * T) * 7 % V).reshape(B, T)


def arrays(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, bias = (jax.random.normal(k, s, dtype) for k, s in zip(keys, ((B, T, D), (D, V), (V,))))
    return x, kernel, bias, LABELS


def mean(x, kernel, bias, labels):
    return ce(x @ kernel, labels).mean()


def with_bias(x, kernel, bias, labels):
    return ce((x @ kernel + bias[None, None]).reshape(-1, V), labels.reshape(-1)).sum()


def next_token(x, kernel, bias, labels):
    return ce((x @ kernel)[:, :-1], labels[:, 1:]).mean()


def next_token_flat(x, kernel, bias, labels):
    return ce((x @ kernel + bias[None, None])[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)).mean()


def weighted(x, kernel, bias, labels):
    return (ce(x @ kernel, labels) * (labels + 0.5)).sum() / labels.sum()


def masked(x, kernel, bias, labels):
    return jnp.where((labels % 3 > 0), ce(x @ kernel, jnp.where((labels % 3 > 0), labels, 0)), 0).sum() / (labels % 3 > 0).sum()


def left_out(x, kernel, bias, labels):
    return jnp.where((labels % 3 > 0), 0, ce(x @ kernel, labels)).sum()


def tied(x, kernel, bias, labels):
    table = kernel.T  # [classes, features]
    return -jnp.take_along_axis(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, table)), labels[..., None], -1).mean()


def cut_later(x, kernel, bias, labels):
    logp = jax.nn.log_softmax(jnp.dot(x, kernel))
    return -jnp.take_along_axis(logp[:, :-1], labels[:, 1:, None], axis=-1).mean()


def one_hot(x, kernel, bias, labels):
    return -(jax.nn.one_hot(labels, V) * jax.nn.log_softmax(x @ kernel)).sum(-1).mean()


def capped(x, kernel, bias, labels):
    return ce(3 * jnp.tanh((x @ kernel + bias[None, None]) / 3), labels).mean()


def mapped(x, kernel, bias, labels):
    return ce(jax.vmap(jax.vmap(lambda h: kernel.T @ h))(x), labels).mean()


def widened(x, kernel, bias, labels):
    return ce((x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).astype(jnp.float32), labels).mean()


def later_places(x, kernel, bias, labels):
    later = jnp.broadcast_to(jnp.arange(T)[None] > 1, labels.shape)
    return jnp.where(later, ce(x @ kernel, labels), 0).sum() / later.sum()


def all_constants(x, kernel, bias, labels):
    row = np.linspace(-1, 1, V, dtype="float32")[None, None]
    return (ce(x @ kernel + row, LABELS) * np.linspace(0, 1, B * T, dtype="float32").reshape(B, T)).sum()


@pytest.mark.parametrize(
    "loss",
    [
        mean,
        later_places,
        all_constants,
        with_bias,
        next_token,
        next_token_flat,
        weighted,
        masked,
        left_out,
        tied,
        cut_later,
        one_hot,
        capped,
        mapped,
        widened,
    ],
)  # fmt: skip
def test_a_projection_and_its_loss_become_one(loss, request):
    run = fb.accelerate(loss)
    assert [f.op for f in run.traced(*arrays())[0].program.found] == [LINEAR]
    if loss not in (next_token_flat, masked, capped) and not request.config.getoption("--slow"):
        return  # gradients take a second each
    old, new = (jax.value_and_grad(f, (0, 1, 2))(*arrays()) for f in (loss, run))
    tolerance = 0.02 if loss is widened else 2e-6
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * float(jnp.abs(a).max(initial=0)))


@pytest.mark.parametrize("label", [-1, -V - 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (-V, V, V + 5))])
def test_labels_that_are_no_class(label):
    def taken(x, kernel, labels):
        return ce(x @ kernel, labels).sum()

    def hot(x, kernel, labels):
        return -(jax.nn.one_hot(labels, V) * jax.nn.log_softmax(x @ kernel)).sum()

    def seen(x, kernel, labels):  # a label that is no class, where it is left out
        return jnp.where(jnp.arange(T)[None] > 0, ce(x @ kernel, labels), 0).sum()

    x, kernel, *_ = arrays()
    for loss in (taken, hot, seen):
        run = fb.accelerate(loss)
        for place in (0, 2):
            np.testing.assert_allclose(*(f(x, kernel, LABELS.at[1, place].set(label)) for f in (loss, run)), rtol=1e-5)
    assert LINEAR in [f.op for f in fb.accelerate(taken).traced(x, kernel, LABELS)[0].program.found if f.replaced]


def logits_too(x, kernel, bias, labels):
    logits = x @ kernel
    return ce(logits, labels).mean(), logits.argmax(-1)


def each_loss(x, kernel, bias, labels):
    return ce(x @ kernel, labels)


def hardest(x, kernel, bias, labels):
    return ce(x @ kernel, labels).mean(-1).max()


def precise(x, kernel, bias, labels):
    return ce(jnp.dot(x, kernel, precision="highest"), labels).mean()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (logits_too, "used elsewhere"),
        (each_loss, "the loss of each token"),
        (hardest, "the loss of each token"),
        (precise, "asks for a precision"),
    ],
)
def test_what_is_nearly_one_is_told(loss, why):
    found = fb.accelerate(loss).traced(*arrays())[0].program.found
    assert next(f for f in found if f.op == LINEAR).why.count(why) == 1
    assert PLAIN in [f.op for f in found if f.replaced]


def doubled(x, kernel, bias, labels):
    return ce(2 * (x @ kernel), labels).mean()


def weights_of_places(x, kernel, bias, labels):
    return (ce(x @ kernel, labels) * jnp.arange(T)[None]).sum()


def split_classes(x, kernel, bias, labels):
    return ce((x @ kernel[:, :36]).reshape(B, 2 * T, 18), jnp.concatenate([labels, labels], 1) % 18).mean()


def tokens_twice(x, kernel, bias, labels):
    logits = jnp.broadcast_to((x @ kernel)[:, :, None], (B, T, 2, V))
    return ce(logits, jnp.stack([labels, labels], -1)).mean()


def share_of_features(x, kernel, bias, labels):
    return ce(jnp.concatenate([x @ kernel, bias[None, None] + jnp.zeros((B, T, V))], -1), labels).mean()


@pytest.mark.parametrize("loss", [doubled, weights_of_places, split_classes, tokens_twice, share_of_features])
def test_what_is_something_else_stays(loss):
    run = fb.accelerate(loss)
    assert LINEAR not in [f.op for f in run.traced(*arrays())[0].program.found if f.replaced]
    np.testing.assert_allclose(run(*arrays()), loss(*arrays()), rtol=1e-6)


def test_a_kernel_that_is_too_large_is_told_with_its_size(monkeypatch):
    monkeypatch.setattr(projecting, "accumulates", lambda kernel: False)
    found = fb.accelerate(mean).traced(*arrays())[0].program.found
    assert "million elements, more than 67: it would be leaner, but compute the logits twice" in found[0].why


def indexed(x, kernel, bias, labels):
    logp = jax.nn.log_softmax((x @ kernel).reshape(-1, V))
    return -logp[jnp.arange(B * T), labels.reshape(-1)].mean()


def test_labels_that_are_an_index():
    run, (x, kernel, bias, labels) = fb.accelerate(indexed), arrays()
    assert [f.op for f in run.traced(x, kernel, bias, labels)[0].program.found] == [LINEAR]
    for label in (-1, -V - 1, V + 3):
        beyond = labels.at[1, 2].set(label)
        np.testing.assert_allclose(run(x, kernel, bias, beyond), indexed(x, kernel, bias, beyond), rtol=1e-5)


def test_small_vocabularies_keep_their_cross_entropy(monkeypatch):
    monkeypatch.setattr(projecting, "CLASSES", V + 1)
    assert [f.op for f in fb.accelerate(mean).traced(*arrays())[0].program.found] == [PLAIN, "dense"]


def test_the_logits_of_a_large_vocabulary_are_not_kept():
    """Of GPT-2's size: the proof, too, does with the vocabulary alone."""
    types = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((4, 256, 768), "bfloat16"), ((768, 50257), "bfloat16"), ((4, 256), "int32"))
    ]

    def loss(x, kernel, labels):
        return ce((x @ kernel)[:, :-1], labels[:, 1:]).mean()

    run = fb.accelerate(loss)
    assert [f.op for f in run.traced(*types)[0].program.found] == [LINEAR]
    before, after = (jax.eval_shape(lambda *a, f=f: jax.vjp(f, *a)[1], *types) for f in (loss, run))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(kept)) for kept in (before, after)]
    assert sizes[1] < sizes[0] / 1.2
