"""The checker, held with wrong rules that it must catch, each by the check that is named for it, and right ones that pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fbackprop.checking import CHECKS, Finding, Report, assert_correct, check
from fbackprop.rules import RULES, rule

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
WIDE = jnp.asarray(RNG.normal(size=(64, 80)), jnp.float32)
GAIN = jnp.asarray(RNG.normal(size=80), jnp.float32)


def custom(fun, forward, backward):
    """somebody's jax.custom_vjp"""
    wrong = jax.custom_vjp(fun)
    wrong.defvjp(forward, backward)
    return wrong


def dense(backward, value=lambda x, w: x @ w):
    return custom(lambda x, w: x @ w, lambda x, w: (value(x, w), (x, w)), backward)


def tanh(backward):
    return custom(jnp.tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), backward)


def right(s, dy):
    return dy @ s[1].T, s[0].T @ dy


memory = []


def corrupting(y, dy):
    """A backward that keeps something from one call to the next."""
    memory.append(0)
    count = jax.pure_callback(lambda _: np.float32(RNG.normal()), jax.ShapeDtypeStruct((), jnp.float32), dy)
    return (dy * (1 - y * y) * (1 + 1e-3 * count),)


# name: (function, arguments, the check that must find it, the argument that must be named)
WRONG = {
    "one part in a thousand": (dense(lambda s, dy: (1.001 * right(s, dy)[0], right(s, dy)[1])), (X, W), "cotangents", "x"),
    "one element of thirty": (tanh(lambda y, dy: ((dy * (1 - y * y)).at[2, 3].multiply(1.5),)), (X,), "cotangents", "x"),
    "sign": (dense(lambda s, dy: (right(s, dy)[0], -right(s, dy)[1])), (X, W), "cotangents", "w"),
    "rows multiplied by the first": (tanh(lambda y, dy: (jnp.full_like(dy, dy[0, 0]) * (1 - y * y),)), (X,), "cotangents", "x"),
    "right for ones only": (tanh(lambda y, dy: (dy.mean() * (1 - y * y),)), (X,), "cotangents", "x"),
    "lost where it stands alone": (
        tanh(lambda y, dy: (jnp.where((dy != 0).sum() == 1, 0, dy * (1 - y * y)),)), (X,), "one-hot", "x",
    ),
    "a constant added": (tanh(lambda y, dy: (dy * (1 - y * y) + 1e-3,)), (X,), "zero", "x"),
    "not linear": (tanh(lambda y, dy: (dy * (1 - y * y) * (1 + 1e-3 * jnp.abs(dy)),)), (X,), "linear", "x"),
    "zero": (dense(lambda s, dy: (right(s, dy)[0], jnp.zeros_like(s[1]))), (X, W), "nonzero", "w"),
    "NaN": (tanh(lambda y, dy: (jnp.where(y > 0.5, jnp.nan, dy * (1 - y * y)),)), (X,), "finite", "x"),
    "another value under differentiation": (dense(right, lambda x, w: x @ w + 100), (X, W), "value", "output 0"),
    "float32 for bfloat16": (
        tanh(lambda y, dy: ((dy * (1 - y * y)).astype(jnp.float32),)), (X.astype(jnp.bfloat16),), "types", "x",
    ),
    "shape": (tanh(lambda y, dy: (dy[0],)), (X,), "runs", "tanh"),
    "arity": (dense(lambda s, dy: right(s, dy)[:1]), (X, W), "runs", "<lambda>"),
    "rounded to bfloat16": (
        tanh(lambda y, dy: ((dy * (1 - y * y)).astype(jnp.bfloat16).astype(jnp.float32),)), (WIDE,), "rms", "x",
    ),
    "summed in bfloat16": (
        custom(
            lambda x, gain: x * gain[None, :],
            lambda x, gain: (x * gain[None, :], (x, gain)),
            lambda s, dy: (
                dy * s[1][None, :],
                jax.lax.reduce((dy * s[0]).astype(jnp.bfloat16), jnp.bfloat16(0), jax.lax.add, (0,)).astype(jnp.float32),
            ),
        ),
        (WIDE, GAIN),
        "cotangents",
        "gain",
    ),
    "another result each time": (tanh(corrupting), (X,), "repeat", "x"),
    "stop_gradient in the definition": (lambda x: x * jax.lax.stop_gradient(x), (X,), "finite differences", "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backward_is_caught_by_the_check_that_is_named_for_it(name):
    fn, args, by, where = WRONG[name]
    report = check(fn, *args)
    assert not report.ok
    found = [f for f in report.findings if f.check == by]
    assert found, f"{by} found nothing:\n{report}"
    assert {f.where for f in found} == {where}
    assert all(f.message.strip().endswith(".") or f.check == "runs" for f in report.findings)
    alone = check(fn, *args, checks=[by])
    assert not alone.ok
    assert {f.check for f in alone.findings} == {by}


def test_an_argument_that_is_only_wrong_when_differentiated_alone():
    plain = custom(lambda x, w: x @ w, lambda x, w: (x @ w, (x, w)), right)

    def forward(x, w):
        wrong = x.perturbed and not w.perturbed  # prunes one thing too many
        return x.value @ w.value, (x.value, w.value * (0.0 if wrong else 1.0))

    pruned = jax.custom_vjp(lambda x, w: x @ w)
    pruned.defvjp(forward, right, symbolic_zeros=True)
    assert check(plain, X, W).ok
    report = check(pruned, X, W)
    assert {(f.check, f.where) for f in report.findings} == {("alone", "x")}


RIGHT = {
    "dense": (lambda x, w: x @ w, (X, W)),
    "somebody's dense": (dense(right), (X, W)),
    "jit of somebody's": (jax.jit(dense(right)), (X, W)),
    "relu at its kink": (jax.nn.relu, (jnp.zeros((3, 4)),)),
    "max of ties": (lambda x: x.max(-1), (jnp.ones((3, 4)),)),
    "sort": (lambda x: jnp.sort(x, -1), (X,)),
    "abs and sign": (lambda x: jnp.abs(x) + jnp.sign(x), (X,)),
    "logsumexp of large numbers": (lambda x: jax.nn.logsumexp(x * 100, -1), (X,)),
    "cross-entropy with labels": (optax.softmax_cross_entropy_with_integer_labels, (X, jnp.arange(6) % 5)),
    "a key": (
        lambda x, k: jnp.where(jax.random.bits(k, x.shape, jnp.uint32) > jnp.uint32(2**31), x, 0),
        (X, jax.random.key(1)),
    ),
    "a boolean mask": (lambda x, m: jnp.where(m, x, -jnp.inf).max(-1), (X, X > -5)),
    "integer outputs": (lambda x: (x.max(-1), x.argmax(-1)), (X,)),
    "parameters": (
        lambda p, x: {"loss": (jnp.tanh(x @ p["w"] + p["b"][None, :]) ** 2).sum(), "mean": x.mean()},
        ({"w": W, "b": W[0], "none": None}, X),
    ),
    "scalar": (jnp.sin, (jnp.float32(0.3),)),
    "no elements": (lambda x: x * 2, (jnp.zeros((0, 3)),)),
    "mixed dtypes": (lambda x, w: x @ w, (X.astype(jnp.bfloat16), W)),
    "mixed dtypes, cast inside": (lambda x, w: x.astype(jnp.float32) @ w, (X.astype(jnp.bfloat16), W)),
    "infinite": (lambda x: jnp.log(x), (jnp.array([0.0, 1.0]),)),
    "all of it constant": (lambda x: jnp.sign(x), (X,)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name, dtype):
    fn, args = RIGHT[name]
    with jax.enable_x64(dtype == "float64"):

        def cast(leaf):
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return jnp.asarray(leaf, dtype) if floating and "mixed dtypes" not in name else leaf

        report = check(fn, *jax.tree.map(cast, args))
    assert report.ok, f"\n{report}"


def test_an_op_is_compared_with_its_reference_and_an_inexact_one_is_not():
    before = dict(RULES)

    def make(backward, exact):
        return rule(forward=lambda x: (jnp.sign(x), x), backward=backward, exact=exact)(_sign)

    try:
        through = make(lambda x, dy: (dy,), False)
        assert check(through, X).ok
        assert "inexact" in str(check(through, X))
        assert not check(through, X, exact=True).ok
        assert {f.check for f in check(make(lambda x, dy: (dy + 1,), False), X).findings} == {"zero", "linear"}
        assert not check(make(lambda x, dy: (dy,), True), X).ok
    finally:
        RULES.clear()
        RULES.update(before)


def _sign(x):
    return jnp.sign(x)


def test_an_explicit_reference_and_static_options():
    assert check(
        jax.nn.softmax, X, reference=lambda x, axis: jnp.exp(x) / jnp.exp(x).sum(axis, keepdims=True), static={"axis": 0}
    ).ok
    report = check(jax.nn.softmax, X, reference=lambda x, axis: jnp.exp(x) / jnp.exp(x).sum(keepdims=True), static={"axis": 0})
    assert {f.check for f in report.findings} >= {"value", "cotangents"}
    wrong = check(lambda x: x * 2, X, reference=lambda x: x[0])
    assert [f.check for f in wrong.findings] == ["runs"]
    assert "float32[6, 5]" in str(wrong)
    assert "float32[5]" in str(wrong)


def test_arguments_by_keyword_and_python_values():
    def fn(x, w=None, power=1, *, shift=None):
        return (x @ w) ** power + shift[None, :]

    report = check(fn, X, keywords={"w": W, "shift": W[0], "power": 2})
    assert report.ok
    assert [e.where for e in report.errors] == ["shift", "w", "x"] or sorted(e.where for e in report.errors) == [
        "shift",
        "w",
        "x",
    ]


def test_the_report_is_data_and_a_table():
    report = check(WRONG["one part in a thousand"][0], X, W)
    assert isinstance(report, Report)
    assert report.checks == tuple(CHECKS)
    finding = next(f for f in report.findings if f.check == "cotangents")
    assert isinstance(finding, Finding)
    assert len(finding.index) == 2
    assert finding.numbers["error"] > finding.numbers["tolerance"] > 0
    assert abs(finding.numbers["ours"] - 1.001 * finding.numbers["truth"]) < 1e-5
    assert "1.001 times the truth" in finding.message
    for record in (report, finding):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.ok = True  # type: ignore[misc]
    text = str(report)
    for word in ("undecorated function", "cotangent of", "float32", "[6, 5]", "[cotangents] x", "jax.grad's"):
        assert word in text
    x, w = report.errors
    assert x.relative == pytest.approx(1e-3, rel=0.2)
    assert w.ulps < 4
    assert "ok" in str(check(jnp.tanh, X))


def test_assert_correct_raises_with_the_table():
    assert_correct(jnp.tanh, X)
    with pytest.raises(AssertionError, match=r"cotangents\] x"):
        assert_correct(WRONG["one part in a thousand"][0], X, W)


def test_checks_can_be_chosen_and_unknown_names_are_refused():
    report = check(WRONG["zero"][0], X, W, checks=["types", "repeat"])
    assert report.ok
    assert report.checks == ("types", "repeat")
    with pytest.raises(ValueError, match=r"no check 'speling'; there are runs, value, .*finite differences"):
        check(jnp.tanh, X, checks=["value", "speling"])
    # A function that cannot be differentiated is never ok, whatever was chosen.
    assert not check(WRONG["shape"][0], X, checks=["types"]).ok


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check(3, X), TypeError, "expected a function, got int"),
        (lambda: check(jnp.tanh, jnp.arange(3)), ValueError, "no floating-point array"),
        (lambda: check(lambda x: x > 0, X), ValueError, "returns no floating-point array"),
        (lambda: check(jnp.tanh, X.astype(jnp.complex64)), TypeError, "x is complex"),
    ],
)
def test_what_cannot_be_checked_gets_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_at_most_six_programs_and_none_for_other_values():
    compiled = []
    log = jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    assert log is None

    def fn(x, w, gain):
        return jnp.tanh(x @ w) * gain[None, :]

    first, others = (X, W, W[0]), (X + 1, W * 2, W[1])
    compiled.clear()
    assert check(fn, *first).ok
    assert 0 < len(compiled) <= 8, "six programs, and what JAX compiles to move arrays"
    compiled.clear()
    assert check(fn, *others, seed=1).ok
    assert not compiled


def test_a_backward_that_is_replaced_is_checked_anew():
    fn = jax.custom_vjp(jnp.tanh)
    fn.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: (dy * (1 - y * y),))
    assert check(fn, X).ok
    fn.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: (dy * (1 + y * y),))
    assert not check(fn, X).ok


def test_float64_inputs_are_held_to_the_precision_of_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        assert check(tanh(lambda y, dy: (dy * (1 - y * y),)), x).ok
        assert not check(tanh(lambda y, dy: (dy * (1 - y * y) * (1 + 1e-12),)), x).ok
