"""saved: the bytes kept for the backward, beside what jax.vjp itself says, and hints that come true."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import fbackprop as fb
from fbackprop.explaining.digits import size
from fbackprop.explaining.words import LANGUAGES
from fbackprop.measuring import saved_bytes

KEY = jax.random.key(0)


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def gpt(**options):
    model = fb.models.gpt(32, 3, 16, 2, 8, **options)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return model.loss, (jax.eval_shape(model.init, KEY, tokens)[0], tokens, tokens)


def cnn():
    model = fb.models.cnn((4,), (6,), 3, pool=(2, 2), batch_norm=True, dropout=0.5)
    x = jax.ShapeDtypeStruct((5, 8, 8, 1), jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, x)

    def loss(params, x, labels, state, key):
        logits, state = model.apply(params, x, state=state, key=key, train=True)
        return fb.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    return loss, (params, x, jax.ShapeDtypeStruct((5,), jnp.int32), state, jax.eval_shape(lambda: KEY))


CASES = {
    "gpt": lambda: gpt(),
    "gpt, full checkpoint": lambda: gpt(checkpoint="full"),
    "gpt, modern in bfloat16, unrolled": lambda: gpt(modern=True, dtype="bfloat16", scan=False),
    "cnn": cnn,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "full" in n else n for n in CASES])
def test_rows_add_up_to_what_jax_keeps(name):
    fn, args = CASES[name]()
    found = fb.saved(fn, *args, has_aux=name == "cnn")
    leaves, tree = jax.tree.flatten(args[0])
    # Others are closed over, as arrays: what is kept of them counts among the residuals.
    others = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if a.dtype != KEY.dtype else KEY, args[1:])

    def of_params(*leaves):
        out = fn(jax.tree.unflatten(tree, leaves), *others)
        return out[0] if name == "cnn" else out

    assert found.total == saved_bytes(of_params, *leaves)
    assert found.rivals[0].bytes == found.total
    assert found.rivals[1].bytes == saved_bytes(fb.without_rules(of_params), *leaves)
    assert found.total == found.parameters + found.arguments + found.activations == sum(found.by_op.values())
    assert str(found)


def test_rows_say_who_made_and_who_keeps():
    def loss(params, x):
        h = fb.relu(fb.dense(x, params["one"]))
        return fb.half_square(fb.sigmoid(fb.dense(h, params["two"])), jnp.zeros((4, 2)))

    args = shapes(({"one": jnp.ones((8, 16)), "two": jnp.ones((16, 2))}, jnp.ones((4, 8))))
    found = fb.saved(loss, *args)
    rows = {(r.op, r.name): (r.origin, r.shape, r.bytes, r.keepers) for r in found.rows}
    assert rows == {
        ("relu", "output"): ("op", (4, 16), 256, ("dense.x",)),
        ("relu", "bits"): ("op", (4, 4), 16, ()),
        ("sigmoid", "output"): ("op", (4, 2), 32, ("sigmoid.y",)),
        ("half_square", "error"): ("op", (4, 2), 32, ()),
        ("", "two"): ("parameter", (16, 2), 128, ("dense.kernel",)),
        ("", "x"): ("argument", (4, 8), 128, ("dense.x",)),  # the first kernel is for dx alone, which nobody wants
    }
    both = fb.saved(loss, *args, argnums=(0, 1))
    assert both.total == found.total + 8 * 16 * 4
    assert {r.name: r.origin for r in both.rows if not r.op} == {"one": "parameter", "two": "parameter", "x": "parameter"}


def test_products_that_no_gradient_needs_are_not_counted():
    x, kernel = shapes((jnp.ones((4, 8)), jnp.ones((8, 16))))
    product = 2 * 4 * 8 * 16
    for argnums, times in ((0, 2), ((0, 1), 3)):  # y and dkernel; and dx
        rules, definitions, *_ = fb.saved(lambda k, x: fb.dense(x, k).sum(), kernel, x, argnums=argnums).rivals
        assert rules.products == definitions.products == times * product


def test_what_is_kept_without_ops_and_where_calls_cannot_be_told_apart():
    def plain(x):
        return jnp.sin(x).sum()

    found = fb.saved(plain, jax.ShapeDtypeStruct((10,), jnp.float32))
    assert [(r.op, r.origin, r.bytes) for r in found.rows] == [("cos", "jax", 40)]
    mapped = fb.saved(lambda w: jax.vmap(lambda r: fb.sigmoid(r))(w).sum(), jax.ShapeDtypeStruct((10, 3), jnp.float32))
    assert mapped.total == 120


def test_hints_come_true():
    loss, args = gpt()
    found = fb.saved(loss, *args)
    (full,) = [h for h in found.hints if h.startswith('checkpoint="full"')]
    less = fb.saved(*(lambda fn, args: (fn, *args))(*gpt(checkpoint="full"))).total
    assert f"keeps {size(less)} in all" in full
    (narrow,) = [h for h in found.hints if "bfloat16" in h]
    wide = sum(r.bytes for r in found.rows if r.origin in ("op", "jax") and r.dtype == jnp.float32)
    assert f"{size(wide // 2)} less" in narrow
    assert not any("checkpoint=" in h for h in fb.saved(functools.partial(loss), *args).hints)


def test_hint_of_logits_that_need_not_be_formed():
    x, kernel, labels = shapes((jnp.ones((64, 8)), jnp.ones((8, 500)), jnp.zeros(64, jnp.int32)))

    def formed(kernel, x, labels):
        return fb.softmax_cross_entropy_with_integer_labels(fb.dense(x, kernel), labels).mean()

    def fused(kernel, x, labels):
        return fb.linear_cross_entropy(x, kernel, labels)

    found = fb.saved(formed, kernel, x, labels)
    (hint,) = [h for h in found.hints if "linear_cross_entropy" in h]
    assert "(64, 500)" in hint
    assert fb.saved(fused, kernel, x, labels).total < found.total / 2
    assert not any("linear_cross_entropy" in h for h in fb.saved(fused, kernel, x, labels).hints)


def test_hint_of_a_mask_and_of_plain_operations():
    def masked(x):
        return jnp.where(x > 0, jnp.exp(x), 0).sum()

    found = fb.saved(masked, jax.ShapeDtypeStruct((64, 64), jnp.float32))
    assert any("a byte for each element, 4 KiB; in bits it would be 512 B" in h for h in found.hints)
    assert any("kept by JAX for its own operations, most of it the output of exp" in h for h in found.hints)


def test_sizes_have_three_digits_up_to_the_next_unit():
    found = {n: size(n) for n in (0, 1023, 1024, 12 * 1024, 1000 * 1024, 2**20 - 1, 2**20, 1023 * 2**20, 5 * 2**40)}
    assert [*found.values()] == ["0 B", "1023 B", "1 KiB", "12 KiB", "1000 KiB", "1024 KiB", "1 MiB", "1023 MiB", "5120 GiB"]


def test_hints_are_in_the_language_that_was_asked_for(tmp_path):
    def masked(kernel, x):
        return jnp.where(x > 0, jnp.exp(fb.dense(x, kernel)), 0).sum()

    found = fb.saved(masked, *shapes((jnp.ones((64, 64)), jnp.ones((64, 64)))))
    assert len(found.hints) == len(found.advice) >= 3
    assert str(found) == found.text().rstrip()
    latin = re.compile(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}")
    for lang in LANGUAGES:
        text = re.sub(r"\s*\n[ │╭╰╮╯─]*", " ", found.text(lang, width=400))
        for hint in found.advice:
            said = hint.said(lang)
            assert said.replace("`", "") in text
            assert bool(latin.search(said)) == (lang == "en"), said
        found.html(lang, file=tmp_path / f"{lang}.html")
        assert all(rival.said(lang) in (tmp_path / f"{lang}.html").read_text() for rival in found.rivals)
        assert found.latex(lang).startswith("\\documentclass")
    with pytest.raises(ValueError, match="no language 'fr'"):
        found.text("fr")


def test_the_picture(tmp_path):
    loss, args = gpt()
    found = fb.saved(loss, *args)
    found.plot(tmp_path / "kept.png")
    found.plot(tmp_path / "kept.svg")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "kept.svg").read_text()
    with pytest.raises(ValueError, match=r"kept.jpg: a picture is written as .svg or .png"):
        found.plot(tmp_path / "kept.jpg")
    with pytest.raises(FileNotFoundError, match=r"x.html: there is no folder .*nowhere"):
        found.html(file=tmp_path / "nowhere" / "x.html")
    with pytest.raises(IsADirectoryError, match="this is a folder; expected a file"):
        found.html(file=tmp_path)
    assert not (tmp_path / "kept.jpg").exists()


def test_bad_calls_are_refused():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(TypeError, match="expected a function, got int"):
        fb.saved(3, x)
    with pytest.raises(ValueError, match="argnums is 1, but sigmoid was given 1 arguments"):
        fb.saved(fb.sigmoid, x, argnums=1)
    with pytest.raises(ValueError, match="no floating-point array"):
        fb.saved(fb.sigmoid, jax.ShapeDtypeStruct((3,), jnp.int32))
