"""Tests that every rule gets by standing in RULES. Adding an op adds its tests; nothing here names an op.

By default each rule runs in float32 on its first sample and, one in two, in bfloat16 on its second; ``--slow`` runs all of
them, and the other dtypes. Rules of the one-line form are formulas in one and the same code: what that code decides, how it
behaves under vmap and the like, is by default tested on some of them. Losses that optax has too, which pass optax's own tests
(test_optax_suite.py), run by default on one sample.
"""

import contextlib
import dataclasses
import functools
import inspect
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop
from fbackprop import one_line, ops
from fbackprop.checking import THOROUGH, check
from fbackprop.context import without_rules
from fbackprop.measuring import saved_bytes
from fbackprop.rules import RULES, Rule
from fbackprop.samples import Spec

DTYPES = ("float32", "bfloat16", "float16", "float64")


ONE_LINE = [rule for rule in RULES.values() if rule.forward.__module__ == one_line.__name__]


# Their halves have siblings among the others, or only sums and elementwise operations, which the engine's tests transform.
PLAIN = frozenset(
    [
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "avg_pool",
        "dense",
        "einsum_dense",
        "geglu",
        "geglu_mlp",
        "global_avg_pool",
        "global_max_pool",
        "glu",
        "gru",
        "half_square",
        "hard_sigmoid",
        "hard_tanh",
        "instance_norm",
        "l2_normalize",
        "leaky_relu",
        "log_softmax",
        "logsumexp",
        "mean_absolute_error",
        "mean_squared_error",
        "min_pool",
        "mish",
        "reglu",
        "relu6",
        "residual_norm",
        "rms_norm",
        "rnn",
        "rotary_embedding",
        "sigmoid_binary_cross_entropy",
        "softmax",
        "softmax_cross_entropy",
        "sparse_sigmoid",
        "spectral_scale",
        "sum_of_squares",
        "sum_pool",
        "swiglu",
        "swiglu_mlp",
        "weight_norm",
    ]
)


LIGHT = frozenset(
    name for name, rule in RULES.items() if hasattr(optax.losses, name) and rule.reference.__module__ != "fbackprop.ops.losses"
)


def cases(dtypes=("float32",), every=True, some=False):
    """Each rule × sample × dtype. By default: where there are dtypes the first sample in float32 and the second in bfloat16,
    else the first two samples, without ``every`` the first; with ``some`` neither plain rules nor most of the one-line form;
    of light rules the first sample in float32, with ``every``. The others are slow, and of bfloat16 one rule in two: the
    others' turn is in the next version of Python, and .ci/run has both."""
    found = []
    for place, rule in enumerate(RULES.values()):
        for number, sample in enumerate(rule.samples):
            for dtype in dtypes:
                if len(dtypes) > 1:
                    slow = (number, dtype) not in ((0, "float32"), (min(1, len(rule.samples) - 1), "bfloat16"))
                else:
                    slow = number > (1 if every else 0)
                slow = slow or (some and rule.name in PLAIN) or (rule in ONE_LINE[3:] and (some or dtype != "float32"))
                slow = slow or (dtype == "bfloat16" and (place + sys.version_info.minor) % 2 == 1)
                slow = slow or (rule.name in LIGHT and (number > 0 or dtype != "float32" or not every))
                label = "-".join([rule.name, f"[{sample}]", *([dtype] if len(dtypes) > 1 else [])])
                given = (rule, sample, dtype) if len(dtypes) > 1 else (rule, sample)
                found.append(pytest.param(*given, id=label, marks=[pytest.mark.slow] if slow else []))
    return found


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@dataclasses.dataclass(eq=False)
class Call:
    """One call of an op: its arguments that are not static, by name, and a function of those that are arrays."""

    rule: Rule
    arguments: dict[str, Any]
    static: dict[str, Any]

    @classmethod
    def of(cls, rule, sample, dtype="float32", seed=0):
        args, options = sample.make(seed, dtype)
        dynamic, static = rule.split(args, options)
        return cls(rule, dict(zip(rule.arguments, dynamic)), dict(zip(rule.static, static)))

    @classmethod
    def unmade(cls, rule, sample):
        """Floating-point arrays as shapes alone: for large samples, of which only bytes are asked."""

        def made(value):
            return value.shaped(sample.dtype) if isinstance(value, Spec) else value

        dynamic, static = rule.split([made(v) for v in sample.args], {name: made(v) for name, v in sample.options})
        return cls(rule, dict(zip(rule.arguments, dynamic)), dict(zip(rule.static, static)))

    @property
    def arrays(self):
        return {name: value for name, value in self.arguments.items() if hasattr(value, "dtype")}

    @property
    def floats(self):
        return {name: value for name, value in self.arrays.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def __call__(self, arrays, op=None):
        return (op or self.rule.op)(**{**self.arguments, **arrays}, **self.static)

    def check(self, op=None, **options):
        return check(op or self.rule.op, keywords=self.arguments, static=self.static, **options)


def random_like(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def close(ours, theirs, tolerance=1e-9):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        largest = np.abs(b[np.isfinite(b)]).max(initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


# ------------------------------------------------------------------------------------------------- the table itself


def test_the_table_and_the_public_names_are_the_same():
    assert set(ops.__all__) == set(RULES), "fbackprop/ops/__init__.py: its __all__ and RULES differ"
    for name, rule in RULES.items():
        assert getattr(fbackprop, name, None) is rule.op, f"fbackprop.{name} is not the op of the rule {name}"
        assert name in fbackprop.__all__


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_samples_workloads_documentation_and_formula(name):
    rule = RULES[name]
    assert rule.samples, f"{name} has no samples"
    assert rule.workloads, f"{name} has no workloads"
    assert rule.keeps, f"{name} does not tell what it keeps for the backward"
    assert any(c in rule.formula for c in "=·Σ"), f"the module of {name} has no formula in its docstring"
    assert any(word in rule.formula.lower() for word in name.split("_")), f"the module of {name} does not speak of it"
    doc = inspect.getdoc(rule.op) or ""
    assert len(doc.splitlines()) > 1, f"the docstring of {name} is a single line"
    assert "->" in doc, f"the docstring of {name} does not tell the shapes"
    assert all(p.annotation is not inspect.Parameter.empty for p in rule.signature.parameters.values())
    assert rule.signature.return_annotation is not inspect.Signature.empty
    given = [rule.signature.bind(*s.args, **dict(s.options)).arguments for s in rule.samples]
    arrays = {argument for arguments in given for argument, value in arguments.items() if isinstance(value, Spec)}
    assert arrays == set(rule.arguments), f"{name}: no sample gives an array for {set(rule.arguments) - arrays}"


ELSEWHERE = {
    **{name: getattr(jax.nn, name) for name in RULES if hasattr(jax.nn, name)},
    **{name: getattr(optax.losses, name) for name in RULES if hasattr(optax.losses, name)},
}


# --------------------------------------------------------------------------------------------------- right, and wrong


@pytest.mark.parametrize(("rule", "sample", "dtype"), cases(DTYPES))
def test_check_is_clean(rule, sample, dtype):
    with precision(dtype):
        report = Call.of(rule, sample, dtype).check()
    assert report.ok, f"\n{report}"
    assert rule.exact == bool(report.errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("rule", "sample", "dtype"), cases(DTYPES))
def test_check_is_clean_with_other_values(rule, sample, dtype, seed):
    with precision(dtype):
        report = Call.of(rule, sample, dtype, seed).check(seed=seed)
    assert report.ok, f"\n{report}"


MUTATIONS = ("scaled by 1.01", "one element off", "zeroed", "reversed", "constant added")


def mutate(d, which):
    """The mutation number ``which`` of a cotangent; none of them for a negative number."""
    flat = d.reshape(-1)
    largest = jnp.abs(flat).max()
    wrong = [
        flat * 1.01,
        flat.at[jnp.abs(flat).argmax()].multiply(1.05),
        jnp.zeros_like(flat),
        flat[::-1],
        flat + 0.01 * jnp.maximum(largest, 0.1),
    ]
    return jnp.where(which < 0, flat, jnp.stack(wrong)[which]).astype(d.dtype).reshape(d.shape)


def with_mutations(rule):
    """The rule with one more argument, [mutation of the cotangent of each argument]: one program for all of them."""

    def reference(mutations, **arguments):
        return rule.reference(**arguments)

    def forward(mutations, **arguments):
        y, saved = rule.forward(**arguments)
        return y, (saved, mutations)

    def backward(saved, dy, **options):
        rules_own, mutations = saved
        cotangents = rule.backward(rules_own, dy, **options)
        wrong = [None if d is None else mutate(d, mutations[i]) for i, d in enumerate(cotangents)]
        return (*wrong, None)

    parameters = list(rule.signature.parameters.values())
    extra = inspect.Parameter("mutations", inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.Signature([*parameters, extra])
    reference.__name__ = rule.name
    reference.__signature__ = forward.__signature__ = signature  # type: ignore[attr-defined]
    backward.__signature__ = inspect.signature(rule.backward)  # type: ignore[attr-defined]
    return dataclasses.replace(rule, reference=reference, forward=forward, backward=backward, primal=None)


def sample_for(rule, argument):
    """The first sample that gives this argument a cotangent, and that cotangent."""
    for sample in rule.samples:
        call = Call.of(rule, sample)
        if argument in call.floats:
            y, saved = rule.op.forward(**call.arguments, **call.static)
            d = rule.op.backward(saved, random_like(y))[rule.arguments.index(argument)]
            if d is not None:
                return sample, np.asarray(d)
    return None, None


def float_arguments(rule):
    return dict.fromkeys(name for sample in rule.samples for name in Call.of(rule, sample).floats)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two mutations", "all"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if rule in ONE_LINE[3:] or name in LIGHT else ())
        for name, rule in RULES.items()
        if rule.exact
    ],
)
def test_a_wrong_backward_is_caught_for_every_cotangent(name, every):
    """Mutations of each cotangent, in float32: refused, with that argument named and no other."""
    rule = RULES[name]
    wrong = with_mutations(rule)
    caught = dict.fromkeys(float_arguments(rule), 0)
    for argument in caught:
        sample, d = sample_for(rule, argument)
        assert sample is not None, f"{name}: no sample gives {argument} a cotangent"
        call = Call.of(rule, sample)
        none = np.full(len(rule.arguments), -1)

        def report_of(mutations, call=call):
            keywords = {**call.arguments, "mutations": jnp.asarray(mutations)}
            return check(wrong.op, keywords=keywords, static=call.static, checks=("runs", "zero", "cotangents", "linear"))

        assert report_of(none).ok, "the control: without a mutation it is right"
        for which, mutation in enumerate(MUTATIONS[: None if every else 2]):
            mutations = none.copy()
            mutations[rule.arguments.index(argument)] = which
            if mutation != "constant added" and not d.any():
                continue  # a cotangent that is truly zero cannot be scaled
            if mutation == "reversed" and np.abs(d.reshape(-1)[::-1] - d.reshape(-1)).max() < 1e-2 * np.abs(d).max():
                continue  # one element, or the same backwards
            report = report_of(mutations)
            assert not report.ok, f"{name}: the cotangent of {argument}, {mutation}, was not noticed\n{report}"
            assert {f.where for f in report.findings} == {argument}, f"{argument}, {mutation}:\n{report}"
            caught[argument] += 1
    assert all(caught.values()), caught


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.exact])
def test_an_inexact_backward_is_linear_and_a_wrong_one_is_caught_where_that_can_be(name):
    rule = RULES[name]
    wrong, call = with_mutations(rule), Call.of(rule, rule.samples[0])
    for argument in call.floats:
        for which, mutation in enumerate(MUTATIONS):
            mutations = np.full(len(rule.arguments), -1)
            mutations[rule.arguments.index(argument)] = which
            keywords = {**call.arguments, "mutations": jnp.asarray(mutations)}
            report = check(wrong.op, keywords=keywords, static=call.static)
            assert report.ok == (mutation not in ("one element off", "constant added")), f"{mutation}\n{report}"
        # Judged as if it were exact it is refused: it is inexact indeed.
        assert not call.check(exact=True).ok


def test_the_straight_through_backward_is_the_one_that_is_documented():
    x, dy = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0]), jnp.array([1.0, -2.0, 3.0, 4.0, 5.0])
    y, pullback = jax.vjp(fbackprop.step_ste, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(pullback(dy)[0], dy)


# ------------------------------------------------------------------------------------------ halves and transformations


@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_the_halves_by_hand_are_the_vjp(rule, sample):
    """forward and backward by hand give what jax.vjp through the op gives; None for what is not floating-point."""
    call = Call.of(rule, sample)
    dy = random_like(jax.eval_shape(call, call.arrays))

    @jax.jit
    def vjp(floats, dy):
        y, pullback = jax.vjp(lambda floats: call(floats), floats)
        return y, pullback(dy)[0]

    y, expected = vjp(call.floats, dy)
    by_hand, saved = rule.op.forward(**call.arguments, **call.static)
    close(by_hand, y, 1e-5)
    cotangents = rule.op.backward(saved, dy)
    assert len(cotangents) == len(rule.arguments)
    named = dict(zip(rule.arguments, cotangents))
    close({name: named[name] for name in call.floats}, expected, 1e-5)
    for name, d in named.items():
        if name not in call.floats and not isinstance(call.arguments[name], float):
            assert d is None, f"{name}: expected None, got {d!r}"
        elif name in call.floats:
            assert (d.dtype, d.shape) == (call.floats[name].dtype, call.floats[name].shape)


OTHER_ARGUMENTS = ("low precision", "edges", "jacobian")  # they compile most


@pytest.mark.parametrize(("rule", "sample"), cases(every=False, some=True))
def test_check_is_clean_under_transformations(rule, sample):
    """vmap over each argument, scan, cond, checkpoint, eager; and saved bytes."""
    report = Call.of(rule, sample).check(checks=("transformations", "saved bytes"))
    assert report.ok, f"\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_check_is_clean_on_devices_and_differentiated_twice(rule, sample):
    """Second order, eight devices, retraces. (What the engine does there for all rules has tests in test_engine.py.)"""
    rest = [name for name in THOROUGH if name not in (*OTHER_ARGUMENTS, "transformations", "saved bytes")]
    report = Call.of(rule, sample).check(checks=rest)
    assert report.ok, f"\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_check_is_clean_with_other_arguments(rule, sample):
    """bfloat16 and float16 at several magnitudes, edge values, short axes, the whole Jacobian."""
    report = Call.of(rule, sample).check(checks=OTHER_ARGUMENTS)
    assert report.ok, f"\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_transformations_and_second_order_in_float64(rule, sample):
    """Where rounding hides nothing."""
    with jax.enable_x64(True):
        report = Call.of(rule, sample, "float64").check(checks=("transformations", "second order"))
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_it_lowers_for_cpu_cuda_and_tpu(rule, sample):
    call = Call.of(rule, sample)
    dy = random_like(jax.eval_shape(call, call.arrays))
    rest = {n: v for n, v in call.arrays.items() if n not in call.floats}

    def both(floats, rest, dy):
        keys = {n: jax.random.wrap_key_data(v) if is_key[n] else v for n, v in rest.items()}
        y, pullback = jax.vjp(lambda f: call({**keys, **f}), floats)
        return y, pullback(dy)[0]

    is_key = {n: jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for n, v in rest.items()}
    rest = {n: jax.random.key_data(v) if is_key[n] else v for n, v in rest.items()}
    exported = jax.export.export(jax.jit(both), platforms=("cpu", "cuda", "tpu"))(call.floats, rest, dy)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert len(exported.out_avals) == len(jax.tree.leaves((dy, call.floats)))


# ---------------------------------------------------------------------------------------------------------- memory


def kept(call, op, *wanted):
    """Bytes kept for the cotangents of these arguments, counted without running anything."""
    frozen = {n: v for n, v in call.arrays.items() if n not in wanted}
    return saved_bytes(lambda *moved: call({**frozen, **dict(zip(wanted, moved))}, op), *(call.floats[n] for n in wanted))


@pytest.mark.parametrize(("rule", "sample"), cases())
def test_it_keeps_no_more_for_fewer_arguments(rule, sample):
    call = Call.of(rule, sample)
    together = kept(call, rule.op, *call.floats)
    for name in call.floats:
        alone = kept(call, rule.op, name)
        assert alone <= together, f"{name} alone keeps {alone} bytes, all arguments together {together}"


@pytest.mark.parametrize("name", RULES)
def test_on_its_workloads_it_keeps_the_minimum_and_no_more_than_autodiff(name):
    rule = RULES[name]
    for workload in rule.workloads:
        call = Call.unmade(rule, workload)
        ours, autodiff = (kept(call, op, *call.floats) for op in (rule.op, without_rules(rule.op)))
        least = rule.minimum_bytes(
            jax.eval_shape(call, call.arrays), tuple(call.arguments.values()), tuple(call.static.values())
        )
        assert least is not None, f"{name} does not tell the least that has to be kept"
        assert ours <= autodiff, f"{workload}: {ours} bytes kept, autodiff {autodiff}"
        assert ours <= least, f"{workload}: {ours} bytes kept, the least is {least}"


# --------------------------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize(("rule", "sample"), cases(every=False))
def test_without_rules_gives_forward_mode(rule, sample):
    with jax.enable_x64(True):
        call = Call.of(rule, sample, "float64")
        twin = without_rules(lambda floats: call(floats))
        tangents = random_like(call.floats)

        @jax.jit
        def derivatives(floats, tangents):
            y, dot = jax.jvp(twin, (floats,), (tangents,))
            dy = random_like(y)
            backward = jax.vjp(twin, floats)[1](dy)[0]
            inner = lambda a, b: sum((u * v).sum() for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
            return inner(dy, dot), inner(backward, tangents)

        close(*derivatives(call.floats, tangents))
        _, linear = jax.eval_shape(lambda f: jax.linearize(twin, f), call.floats)
        jax.eval_shape(linear, tangents)
        jax.eval_shape(jax.hessian(lambda f: sum((leaf**2).sum() for leaf in jax.tree.leaves(twin(f)))), call.floats)
        with pytest.raises((TypeError, NotImplementedError)):
            jax.jvp(lambda floats: call(floats), (call.floats,), (tangents,))


# ------------------------------------------------------------------------------------------------------------ speed


def seconds(fn, calls=200):
    start = time.perf_counter()
    for _ in range(calls):
        y = fn()
    jax.block_until_ready(y)
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_an_eager_call_costs_at_most_twice_that_of_the_same_function_elsewhere(name):
    args, options = RULES[name].samples[0].make()
    ours, theirs = (functools.partial(f, *args, **options) for f in (RULES[name].op, ELSEWHERE[name]))
    seconds(ours), seconds(theirs)
    medians = []
    for _ in range(3):
        medians.append(statistics.median(seconds(ours) / seconds(theirs) for _ in range(9)))
        if medians[-1] <= 2:
            return
    raise AssertionError(f"an eager call of {name} costs {medians} times that of {ELSEWHERE[name]}")
