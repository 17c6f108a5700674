"""Functions that exist in jax.nn, optax.losses or flax.linen have the signature that they have there."""

import inspect

import flax.linen
import jax
import optax
import pytest

import fbackprop as fb

LIBRARIES = (jax.nn, optax.losses, flax.linen)


def function_of(library, name):
    found = getattr(library, name, None)
    return None if found is None or inspect.isclass(found) or not callable(found) else found


def elsewhere():
    """The function that each of ours is known from: that of the first library which has one of its name."""
    found = {}
    for name in fb.__all__:
        theirs = [f for f in (function_of(library, name) for library in LIBRARIES) if f is not None]
        if theirs and function_of(fb, name) is not None:
            found[name] = theirs[0]
    return found


ELSEWHERE = elsewhere()

# Keyword-only arguments of ours, after theirs, with what they are where nobody gives them.
ADDED = {
    "avg_pool": {"window_dilation": None},
    "dot_product_attention": {
        "segment_ids": None,
        "soft_cap": None,
        "dropout_rate": 0.0,
        "dropout_key": None,
        "broadcast_dropout": True,
    },
    "max_pool": {"window_dilation": None},
}

# Arguments of ours with a default where theirs have none.
OPTIONAL = {"pool": {"strides": None, "padding": "VALID"}}


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_signatures_are_those_of_the_library_that_a_function_is_known_from(name):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (getattr(fb, name), ELSEWHERE[name]))
    if extra := ADDED.get(name, {}):
        ours, added = ours[: -len(extra)], ours[-len(extra) :]
        assert [(p.name, p.default) for p in added] == list(extra.items())
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for a, b in zip(ours, theirs, strict=True):
        assert a.name == b.name
        assert a.default == OPTIONAL.get(name, {}).get(b.name, b.default)
        assert a.kind == b.kind or (b.kind in positional and a.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def test_every_loss_of_optax_is_compared():
    losses = {name for name in vars(optax.losses) if not name.startswith("_") and function_of(optax.losses, name)}
    assert losses <= set(ELSEWHERE)


@pytest.mark.parametrize("name", sorted({*ADDED, *OPTIONAL}))
def test_exceptions_are_still_needed(name):
    theirs = inspect.signature(ELSEWHERE[name]).parameters
    assert not set(ADDED.get(name, ())) & set(theirs)
    assert all(theirs[n].default is inspect.Parameter.empty for n in OPTIONAL.get(name, ()))
