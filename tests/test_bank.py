"""The checker held with the bank: every wrong rule is caught by the check that is named for it, every right one passes."""

import bank
import jax
import pytest

from fbackprop.checking import check

SEEDS = range(5)
NAMES = [entry.name for entry in bank.WRONG]


def caught(entry, seed, checks=None):
    """The arguments that each check named."""
    with jax.enable_x64(entry.x64):
        fn, args, options = entry.make(seed)
        if entry.depth != "quick":
            options = {**options, "depth": entry.depth}
        report = check(fn, *args, checks=checks, **options)
    found = {}
    for finding in report.findings:
        found.setdefault(finding.check, set()).add(finding.where)
    return found, report


def assert_passes(entry, seed, shape):
    with jax.enable_x64(entry.x64):
        fn, args, options = entry.make(seed, shape)
        report = check(fn, *args, **options)
    assert report.ok, f"{entry.name} {shape}, seed {seed}\n{report}"


def test_the_bank_is_large_and_holds_everything_that_shipped():
    assert len(bank.WRONG) >= 40
    assert len(bank.RIGHT) >= 60
    assert sum(len(entry.shapes) for entry in bank.RIGHT) >= 300
    for entries in (bank.WRONG, bank.RIGHT):
        assert len({entry.name for entry in entries}) == len(entries)
    assert len(bank.ANCHORS) + len(bank.NOT_POSSIBLE) == 11
    assert not set(bank.ANCHORS) & set(bank.NOT_POSSIBLE)
    assert set(bank.ANCHORS.values()) <= set(NAMES)
    assert all(bank.NOT_POSSIBLE.values())
    assert all(entry.source and entry.where for entry in bank.WRONG)
    names = {entry.name for entry in bank.RIGHT}
    assert {name for name in bank.SLOW if name not in names and not name.startswith(("flax", "equinox"))} == set()
    assert sum(not entry.slow for entry in bank.RIGHT) >= 60


@pytest.mark.parametrize("entry", bank.WRONG, ids=NAMES)
def test_functions_are_the_same_for_every_seed_and_values_are_not(entry):
    with jax.enable_x64(entry.x64):
        (first, args, _), (second, others, _) = entry.make(0), entry.make(1)
    assert first is second
    leaves = [jax.tree.leaves(a) for a in (args, others)]
    assert [(leaf.shape, leaf.dtype) for leaf in leaves[0]] == [(leaf.shape, leaf.dtype) for leaf in leaves[1]]


def some(entries, share, always=()):
    """Each ``share``-th entry by default, and those that are named; the others with ``--slow``."""
    kept = [e.name in always or number % share == 0 for number, e in enumerate(entries)]
    return [pytest.param(e, id=e.name, marks=() if keep else pytest.mark.slow) for e, keep in zip(entries, kept)]


@pytest.mark.parametrize("entry", some([e for e in bank.WRONG if e.depth == "quick"], 2, bank.ANCHORS.values()))
def test_a_wrong_rule_is_caught_by_the_check_that_is_named_for_it(entry):
    found, report = caught(entry, 0)
    assert found.get(entry.check) == set(entry.where.split(", ")), f"\n{report}"
    alone, report = caught(entry, 0, [entry.check])
    assert set(alone) == {entry.check}, f"\n{report}"


@pytest.mark.parametrize("entry", some([e for e in bank.WRONG if e.depth != "quick"], 2, bank.ANCHORS.values()))
def test_what_only_shows_in_depth_is_caught_there(entry):
    alone, report = caught(entry, 0, [entry.check])
    assert alone == {entry.check: set(entry.where.split(", "))}, f"\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize("entry", bank.WRONG, ids=NAMES)
def test_a_wrong_rule_is_caught_whatever_the_seed(entry):
    for seed in SEEDS:
        found, report = caught(entry, seed)
        assert found.get(entry.check) == set(entry.where.split(", ")), f"seed {seed}\n{report}"


@pytest.mark.parametrize("entry", some([e for e in bank.RIGHT if not e.slow], 2))
def test_a_right_function_passes(entry):
    assert_passes(entry, 0, entry.shapes[0])


@pytest.mark.slow
@pytest.mark.parametrize("entry", bank.RIGHT, ids=lambda e: e.name)
def test_a_right_function_passes_at_every_shape_whatever_the_seed(entry):
    for shape in entry.shapes:
        for seed in SEEDS:
            assert_passes(entry, seed, shape)
