"""optax's own tests of its losses, which come in its wheel, with our functions in place of optax's.

They run as they stand but for forward mode, which ends at every custom_vjp: ``check_grads`` looks at reverse mode alone, and
second derivatives are reverse over reverse.
"""

import contextlib
import functools
import importlib
import re
import unittest
from unittest import mock

import jax
import jax.test_util
import optax
import pytest

import fbackprop as fb

MODULES = ("classification", "fenchel_young", "ranking", "regression", "segmentation", "self_supervised", "smoothing")

NAMES = [name for name in vars(optax.losses) if not name.startswith("_") and callable(getattr(optax.losses, name))]

HOMES = [importlib.import_module(f"optax.losses._{module}") for module in MODULES]

EXCEPTIONS = {
    "test_probability_validation": "dice_loss does not look at the values of its predictions: optax does where "
    "apply_softmax=False, and therefore cannot be jitted there",
}

QUICK = {"segmentation": {"test_dice_loss_weighting_parameters", "test_jit_compilation"}}
LONG = {"test_repeat_with_one_to_one_alignment", "test_with_one_to_one_alignment"}


def is_slow(module, name):
    """By default the first of several parameters, and of the segmentation losses, which compile most, two tests."""
    number = re.search(r"\d*$", name).group()
    return number not in ("", "0") or name not in QUICK.get(module, {name}) or name in LONG


@contextlib.contextmanager
def ours():
    """Ours in place of theirs, where optax's modules and their tests find them; and no forward mode."""
    reverse = functools.partial(jax.test_util.check_grads, modes=["rev"])
    places = [(module, name) for module in (optax.losses, *HOMES) for name in NAMES if hasattr(module, name)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(mock.patch.object(jax.test_util, "check_grads", reverse))
        stack.enter_context(mock.patch.object(jax, "hessian", lambda f: jax.jacrev(jax.jacrev(f))))
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, getattr(fb, name)))
        yield


def singles(suite):
    return [single for test in suite for single in (singles(test) if isinstance(test, unittest.TestSuite) else [test])]


def collected():
    found = []
    with ours():  # some of their tests take the functions when they are defined
        for module in MODULES:
            theirs = importlib.import_module(f"optax.losses._{module}_test")
            for test in singles(unittest.defaultTestLoader.loadTestsFromModule(theirs)):
                name = getattr(test, "_testMethodName", "doctest")
                marks = [pytest.mark.slow] if is_slow(module, name) else []
                found.append(pytest.param(test, id=f"{module}.{type(test).__name__}.{name}", marks=marks))
    return found


def test_every_loss_of_optax_is_here():
    missing = [name for name in NAMES if not hasattr(fb, name)]
    assert not missing


@pytest.mark.parametrize("test", collected())
def test_of_optax(test):
    if reason := EXCEPTIONS.get(getattr(test, "_testMethodName", "")):
        pytest.skip(reason)
    result = unittest.TestResult()
    with ours():
        test.run(result)
    problems = [text for _, text in (*result.failures, *result.errors)]
    assert not problems, "\n".join(problems)
    assert result.testsRun == 1
