"""The checker: its reference, its truth, its report, its costs. What it must catch and must not stands in tests/bank.py."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fbackprop.checking import CHECKS, DEPTHS, THOROUGH, Finding, Report, assert_correct, check
from fbackprop.rules import RULES, rule

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


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


# tests/bank.py holds the wrong rules, one for each way to be wrong; these serve the tests of what the report says.
WRONG = {
    "one part in a thousand": dense(lambda s, dy: (1.001 * right(s, dy)[0], right(s, dy)[1])),
    "zero": dense(lambda s, dy: (right(s, dy)[0], jnp.zeros_like(s[1]))),
    "shape": tanh(lambda y, dy: (dy[0],)),
}


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


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "float64"))]
)
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
    report = check(WRONG["one part in a thousand"], X, W)
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
        assert_correct(WRONG["one part in a thousand"], X, W)


def test_checks_can_be_chosen_and_unknown_names_are_refused():
    report = check(WRONG["zero"], X, W, checks=["types", "repeat"])
    assert report.ok
    assert report.checks == ("types", "repeat")
    with pytest.raises(ValueError, match=r"no check 'speling'; there are runs, value, .*finite differences"):
        check(jnp.tanh, X, checks=["value", "speling"])
    # A function that cannot be differentiated is never ok, whatever was chosen.
    assert not check(WRONG["shape"], X, checks=["types"]).ok


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


# ------------------------------------------------------------------------------------------------------- the definition


def truth_of(fn, x):
    """The gradient of the sum of ``fn`` by the checker's truth, against which a zero backward is measured."""
    zero = jax.custom_vjp(lambda x: fn(x).sum())
    zero.defvjp(lambda x: (fn(x).sum(), x), lambda x, dy: (jnp.full_like(x, 1e3),))
    report = check(zero, x, checks=["cotangents"])
    finding = next(f for f in report.findings if f.check == "cotangents")
    return finding, report


@pytest.mark.parametrize(
    ("name", "fn", "derivative"),
    [
        ("a cast to bfloat16", lambda x: jnp.exp(x.astype(jnp.bfloat16)).astype(jnp.float32), np.exp),
        ("a constant of float32", lambda x: jnp.exp(x * np.float32(3.0)), lambda x: 3 * np.exp(3 * x)),
        ("reduce_precision", lambda x: jnp.exp(jax.lax.reduce_precision(x, 8, 7)), np.exp),
        (
            "a scan in bfloat16",
            lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x.astype(jnp.bfloat16), None, 1)[0],
            np.cos,
        ),
        (
            "a custom_jvp",
            lambda x: jax.nn.silu(x.astype(jnp.bfloat16)),
            lambda x: (s := 1 / (1 + np.exp(-x))) * (1 + x * (1 - s)),
        ),
        ("a cond", lambda x: jax.lax.cond(x.sum() > -1e9, jnp.sin, jnp.cos, x.astype(jnp.float16)), np.cos),
        (
            "a matmul in bfloat16",
            lambda x: jnp.dot(x.astype(jnp.bfloat16), jnp.eye(5, dtype=jnp.bfloat16) * 3, preferred_element_type=jnp.float32),
            lambda x: np.full(x.shape, 3.0),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_truth_is_float64_whatever_the_definition_casts_to(name, fn, derivative):
    finding, report = truth_of(fn, X)
    dy = finding.numbers["truth"] / derivative(np.asarray(X, np.float64))[finding.index]
    again = np.float64(dy) * derivative(np.asarray(X, np.float64))[finding.index]
    # The cotangent of y is a float32 number; a truth rounded anywhere would not give one.
    assert abs(dy - np.float32(dy)) < 1e-12 * abs(dy), f"{name}: {dy!r}"
    assert again == pytest.approx(finding.numbers["truth"], rel=1e-14)
    assert not any("not all float64" in note for note in report.notes)


@pytest.mark.parametrize("draw", ["normal", "uniform", "bernoulli", "gumbel", "truncated"])
def test_random_bits_are_the_same_in_both_precisions(draw):
    draws = {
        "normal": lambda k, x: jax.random.normal(k, x.shape),
        "uniform": lambda k, x: jax.random.uniform(k, x.shape),
        "bernoulli": lambda k, x: jax.random.bernoulli(k, 0.3, x.shape).astype(jnp.float32),
        "gumbel": lambda k, x: jax.random.gumbel(k, x.shape),
        "truncated": lambda k, x: jax.random.truncated_normal(k, -1.0, 1.0, x.shape),
    }
    report = check(lambda x, k: x * draws[draw](k, x), X, jax.random.key(3))
    assert report.ok, f"\n{report}"


def test_what_cannot_be_widened_is_told():
    def half(x):
        return jax.pure_callback(lambda v: np.asarray(v) * np.float32(0.5), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    fn = jax.custom_jvp(half)
    fn.defjvp(lambda p, t: (half(*p), t[0] * 0.5))
    report = check(lambda x: fn(x) * x, X)
    assert report.ok, f"\n{report}"
    assert any("pure_callback" in note for note in report.notes)


def test_the_truth_is_computed_on_the_cpu_whatever_the_device_of_the_arguments():
    x = jax.device_put(X, jax.devices()[3])
    assert check(jnp.tanh, x).ok
    assert not check(tanh(lambda y, dy: (dy * (1 - y * y) * 1.001,)), x).ok


def test_nested_custom_vjps_are_opened_and_a_custom_jvp_counts_as_the_definition():
    wrong = tanh(lambda y, dy: (dy * (1 - y * y) * 1.001,))
    for fn in (
        lambda x: wrong(x) * 2,
        lambda x: jax.lax.scan(lambda c, r: (wrong(c + r), c), x[0], x)[0],
        lambda x: jax.vmap(wrong)(x),
        lambda x: jax.lax.cond(x.sum() > -1e9, wrong, jnp.sin, x),
        jax.checkpoint(lambda x: wrong(x) * 2),
        jax.jit(lambda x: wrong(x) * 2),
    ):
        assert "cotangents" in {f.check for f in check(fn, X).findings}
    zeros = jnp.zeros((3, 4))
    other = jax.custom_vjp(jax.nn.relu)  # relu'(0) = 0 is in the custom_jvp of its definition
    other.defvjp(lambda x: (jax.nn.relu(x), x), lambda x, dy: (dy * (x >= 0),))
    assert not check(other, zeros).ok


def test_a_custom_jvp_under_test_is_opened_and_not_judged_at_its_kinks():
    def made(slope):
        fn = jax.custom_jvp(lambda x: jnp.maximum(x, 0))
        fn.defjvp(lambda p, t: (jnp.maximum(p[0], 0), t[0] * jnp.where(p[0] > 0, slope, 0)))
        return fn

    mixed = jnp.where(X > 0.5, 0.0, X)
    assert check(made(1.0), mixed).ok
    assert not check(made(1.001), X).ok


def test_a_reference_that_jax_cannot_differentiate_is_differentiated_by_differences():
    def root(x):  # Newton's method for the square root
        return jax.lax.while_loop(lambda c: c[0] < 30, lambda c: (c[0] + 1, 0.5 * (c[1] + x / c[1])), (0, jnp.ones_like(x)))[1]

    def made(factor):
        fn = jax.custom_vjp(root)
        fn.defvjp(lambda x: (root(x), root(x)), lambda y, dy: (factor * dy * 0.5 / y,))
        return fn

    x = jnp.abs(X) + 0.5
    report = check(made(1.0), x)
    assert report.ok, f"\n{report}"
    assert any("finite differences" in note for note in report.notes)
    assert not check(made(1.001), x).ok
    with pytest.raises(ValueError, match="too many for finite differences"):
        check(made(1.0), jnp.ones(4000))


def test_a_cotangent_that_is_zero_but_for_rounding_may_be_zero():
    x, t = jnp.linspace(0.3, 0.9, 40), jnp.ones(40)

    def made(slope):  # of t, whose true one is sin² + cos² − 1 = 0
        value = lambda x, t: x**2 + t * (jnp.sin(x) ** 2 + jnp.cos(x) ** 2 - 1)  # noqa: E731
        return custom(value, lambda x, t: (value(x, t), x), lambda x, dy: (2 * x * dy, slope * dy))

    assert check(made(0.0), x, t).ok
    assert {f.where for f in check(made(1e-3), x, t).findings} == {"t"}


def test_argnums_choose_what_is_differentiated():
    fn = dense(lambda s, dy: (right(s, dy)[0], jnp.zeros_like(s[1])))
    assert check(fn, X, W, argnums=0).ok
    assert {f.where for f in check(fn, X, W, argnums=(1,)).findings} == {"w"}
    assert [e.where for e in check(fn, X, W, argnums=-1).errors] == ["w"]
    with pytest.raises(ValueError, match="argnums has 2, but"):
        check(fn, X, W, argnums=2)


def test_depths():
    report = check(jnp.tanh, X, depth="full")
    assert report.ok, f"\n{report}"
    assert report.checks == DEPTHS["full"] == (*CHECKS, *THOROUGH)
    assert check(jnp.tanh, X).checks == DEPTHS["quick"]
    with pytest.raises(ValueError, match="no depth 'deep'; there are 'quick' and 'full'"):
        check(jnp.tanh, X, depth="deep")


@pytest.mark.parametrize(
    ("backward", "words"),
    [
        (lambda y, dy: (-dy * (1 - y * y),), "It is minus the truth"),
        (lambda y, dy: (dy * (1 - y * y) / 30,), "the truth divided by 30"),
        (lambda y, dy: (dy,), "the cotangent of y itself"),
        (lambda y, dy: ((dy * (1 - y * y))[::-1],), "backwards along axis 0"),
        (lambda y, dy: (jnp.roll(dy * (1 - y * y), 1, 1),), "moved by 1 along axis 1"),
        (lambda y, dy: (jnp.broadcast_to((dy * (1 - y * y)).sum(0), y.shape),), "the same along axis 0"),
        (lambda y, dy: (dy * (1 - y * y) * jnp.where(y < 0, 1.5, 1),), "those where the argument is negative"),
        (lambda y, dy: ((dy * (1 - y * y)).at[-1].multiply(2),), "all at 5 of 6 along axis 0"),
        (lambda y, dy: (dy[0, 0] * (1 - y * y),), "stands for the whole cotangent of y"),
    ],
)
def test_the_likely_cause_is_told(backward, words):
    findings = [f for f in check(tanh(backward), X, checks=["cotangents"]).findings if f.check == "cotangents"]
    assert words in findings[0].message


def test_exchanged_cotangents_are_told():
    square = jnp.asarray(RNG.normal(size=(5, 5)), jnp.float32)
    fn = dense(lambda s, dy: right(s, dy)[::-1])
    assert "It is the cotangent of w" in str(check(fn, square, square * 2))


@pytest.mark.slow
def test_quick_takes_less_than_five_seconds_on_a_typical_rule():
    """Compilation included: three array arguments, small shapes."""
    fn = jax.custom_vjp(lambda x, w, b: jnp.tanh(x @ w + b[None, :]))

    def forward(x, w, b):
        y = jnp.tanh(x @ w + b[None, :])
        return y, (x, w, y)

    def backward(saved, dy):
        x, w, y = saved
        g = dy * (1 - y * y)
        return g @ w.T, x.T @ g, g.sum(0)

    fn.defvjp(forward, backward)
    jax.block_until_ready(jnp.tanh(X) @ W)
    start = time.perf_counter()
    assert check(fn, X, W, W[0]).ok
    assert time.perf_counter() - start < 5
