"""Mutation testing of the rules: the engine makes wrong programs, all of them wrong, and ``check`` finds them."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop import ops  # noqa: F401  (fills RULES)
from fbackprop.checking.mutation import KINDS, chosen, judge, judge_rule, killer, programs_of, trace
from fbackprop.rules import RULES, Rule
from fbackprop.samples import normal, sample

BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "mutants.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("mutants", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rule_of(reference, backward, *samples):
    """A rule that saves all of its arguments."""

    def forward(x, w):
        return reference(x, w), (x, w)

    return Rule(reference.__name__, reference, forward, backward, samples=samples)


def weighted(x, w):
    return jnp.where(x > 0, jnp.tanh(3.0 * x) * w, 2.0 * x)


def weighted_backward(saved, dy):
    x, w = saved
    t = jnp.tanh(3.0 * x)
    return dy * jnp.where(x > 0, 3.0 * w * (1 - t * t), 2.0), (dy * jnp.where(x > 0, t, 0.0)).sum(0, keepdims=True)


WEIGHTED = rule_of(weighted, weighted_backward, sample(normal(4, 3), normal(1, 3)))


def whats(program, primitive):
    return {m.what for m in program.mutants if m.site.split()[0] == primitive}


@pytest.fixture(scope="module")
def program():
    return trace(WEIGHTED, WEIGHTED.samples[0])


def test_it_makes_mutants_of_each_kind(program):
    assert {m.kind for m in program.mutants} == set(KINDS) - {"axis"}
    assert whats(program, "tanh") >= {"negated", "logistic", "left out", "rounded to bfloat16"}
    assert whats(program, "sub") >= {"operands swapped", "add", "constant 0 + 1", "operand 0 is 0", "operand 1 is 0"}
    assert whats(program, "select_n") >= {"the other branch", "always operand 1", "always operand 2"}
    assert whats(program, "outputs") >= {"cotangent 0 zero", "cotangent 1 scaled by 1.001", "cotangent 1 one element off"}
    assert len({m.key for m in program.mutants}) == len(program.mutants)
    assert all(m.before and m.what and str(m).startswith("weighted(4×3, 1×3) float32: ") for m in program.mutants)


def test_the_program_itself_is_right_and_every_mutant_of_it_is_another(program):
    """Were a mutant the program unchanged, its cotangents would be equal and the check would not mind."""
    assert killer(program, -1) == ""
    assert not program.changes(-1, seed=0)
    for mutant in program.mutants:
        outcome = judge(program, mutant)
        assert program.changes(mutant.number, seed=0) == (outcome.verdict == "killed"), str(mutant)
        assert outcome.changes_sample == (outcome.verdict == "killed"), str(mutant)


def test_mutants_are_numbered_like_the_table_that_chooses_their_variants(program):
    assert program.table.shape == (len(program.mutants) + 1, len(program.equations) + 1)
    assert not program.table[-1].any()
    assert program.table[:-1].any(1).all()
    assert len(np.unique(program.table, axis=0)) == len(program.table)


def test_what_changes_nothing_is_not_made():
    def backward(saved, dy):
        x, w = saved
        dead = jnp.sin(x)  # noqa: F841
        same, again = x * w, x * w
        one = jnp.ones((4, 3)) * 1.0
        return (dy * same + dy * again) * one, (dy * x).sum(0, keepdims=True)

    def double(x, w):
        return x * x * w

    program = trace(rule_of(double, backward, sample(normal(4, 3), normal(1, 3))), sample(normal(4, 3), normal(1, 3)))
    primitives = [e.primitive.name for e in program.equations]
    assert "sin" not in primitives, "no output depends on it"
    assert "operands swapped" not in whats(program, "add") | whats(program, "mul"), "they commute"
    factors = [m for m in program.mutants if "mul 0" in m.before.split("(")[-1] and "replaced by mul 1" in m.what]
    assert not factors, "x w computed twice is the same value"
    assert not [m for m in program.mutants if m.kind == "axis" and m.site.startswith("broadcast_in_dim")]


def test_axes_and_constants_that_give_the_same_are_left_out():
    def backward(saved, dy):
        x, w = saved
        return jnp.transpose(jnp.transpose(dy)[::-1]) + 0.0 * x, jnp.sum(dy, (0, 2)) + w.T.sum()

    def cube(x, w):
        return x + 0 * w.sum()

    given = sample(normal(4, 3, 4), normal(3))
    axes = [m for m in trace(rule_of(cube, backward, given), given).mutants if m.kind == "axis"]
    assert {m.what for m in axes if m.site.startswith("transpose")} >= {"permutation (0, 1, 2)"}
    assert "permutation (2, 1, 0)" not in {m.what for m in axes if m.site == "transpose 0"}
    assert {m.what for m in axes if m.site.startswith("rev")} == {f"dimension {i} turned around" for i in range(3)}
    narrow = trace(rule_of(cube, lambda saved, dy: (dy.transpose(0, 2, 1).transpose(0, 2, 1), dy.sum((0, 2))),
                           sample(normal(1, 3, 1), normal(3))), sample(normal(1, 3, 1), normal(3)))  # fmt: skip
    assert not [m for m in narrow.mutants if m.kind == "axis"], "all elements stay where they are"
    assert not {"reduce_max", "left out"} & whats(narrow, "reduce_sum"), "a sum over one element"


def test_programs_inside_of_equations_are_mutated():
    def backward(saved, dy):
        x, w = saved
        total = jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(3), dy * x)[0]
        return dy * w, jax.lax.cond(True, lambda v: v * 1.0, lambda v: -v, jax.jit(lambda v: v[None])(total))

    def product(x, w):
        return x * w

    rule = rule_of(product, backward, sample(normal(4, 3), normal(1, 3)))
    program = trace(rule, rule.samples[0])
    inside = [m for m in program.mutants if m.site.startswith("scan") and "add 0" in m.what]
    assert {m.what.split(": ")[1] for m in inside} >= {"negated", "sub", "operand 0 is 0"}
    assert not any(e.primitive.name in ("jit", "pjit") for e in program.equations)
    assert {judge(program, m).verdict for m in inside} == {"killed"}


def test_a_cast_to_float32_left_out_rounds_all_that_follows():
    program = trace(RULES["layer_norm"], RULES["layer_norm"].samples[0], "bfloat16")
    casts = [m for m in program.mutants if m.what.startswith("cast left out")]
    assert casts
    assert all(len(m.choices) > 1 for m in casts)
    assert all(program.variants[i][k - 1].kind == "cast" for m in casts for i, k in m.choices)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "dense", "step_ste"])
def test_the_mutants_of_cheap_rules_are_killed(benchmark, name):
    outcomes = judge_rule(RULES[name], limit=60)
    assert 40 <= len(outcomes) <= 60
    row = benchmark.row(name, outcomes, benchmark.explained())
    assert row.killed > 30
    assert not row.survivors, "\n".join(row.survivors)


def test_a_survivor_that_nobody_explained_is_told(benchmark):
    """A rule whose sample does not tell its two arguments apart, so that a mixed-up operand survives."""

    def doubled(x, w):
        return x * w

    given = sample(normal(3, mean=2.0, scale=0.0), normal(3, mean=2.0, scale=0.0))
    rule = rule_of(doubled, lambda saved, dy: (dy * saved[1], dy * saved[0]), given)
    outcomes = judge_rule(rule)
    row = benchmark.row(rule.name, outcomes, {})
    assert any("operand 1 replaced by saved 0" in line for line in row.survivors)
    assert "changes nothing on the sample" in row.survivors[0]
    reasons = {o.mutant.everywhere: "the arguments are equal" for o in outcomes}
    assert benchmark.row(rule.name, outcomes, reasons).survivors == ()
    assert row.share < benchmark.SHARE <= benchmark.row(rule.name, outcomes, reasons).share == 1


def test_a_rule_that_is_wrong_itself_is_refused():
    def wrong(x, w):
        return x * w

    rule = rule_of(wrong, lambda saved, dy: (dy * saved[1], dy), sample(normal(3), normal(3)))
    with pytest.raises(RuntimeError, match="finds fault without a mutation"):
        judge_rule(rule)


def test_a_limit_chooses_the_same_mutants_each_time_and_all_samples_of_them():
    programs = programs_of(RULES["sum_of_squares"])
    few = [m for p in chosen(programs, 12) for m in p.mutants]
    assert 0 < len(few) <= 12
    assert few == [m for p in chosen(programs_of(RULES["sum_of_squares"]), 12) for m in p.mutants]
    names = {m.everywhere for m in few}
    assert [m.key for m in few] == [m.key for p in programs for m in p.mutants if m.everywhere in names]
    assert [m.key for p in chosen(programs, None) for m in p.mutants] == [m.key for p in programs for m in p.mutants]


def test_every_explanation_is_of_a_mutant_that_is_made(benchmark):
    entries = json.loads(benchmark.EXPLANATIONS.read_text())
    assert all(entry["reason"] and entry["mutants"] for entry in entries)
    keys = [key for entry in entries for key in entry["mutants"]]
    assert len(set(keys)) == len(keys)
    assert {key.split(" | ")[0] for key in keys} <= set(RULES)
    for name in ("relu", "elu"):
        made = {k for p in programs_of(RULES[name]) for m in p.mutants for k in (m.key, m.everywhere)}
        assert {key for key in keys if key.split(" | ")[0] == name} <= made


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_all_mutants_of_every_rule_are_killed_or_explained(benchmark, name):
    row = benchmark.measured(name, None, benchmark.explained())
    assert not row.survivors, "\n".join(row.survivors)
    assert row.share >= benchmark.SHARE
