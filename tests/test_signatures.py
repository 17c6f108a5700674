"""Functions that exist in jax.nn, optax.losses or flax.linen have the signature that they have there."""

import dataclasses
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


# Options of Flax's layers that ours do not have, and why.
NOT_OPTIONS = {
    "the rule computes, and nothing in its place": {
        "attention_fn", "attn_weights_value_einsum_cls", "conv_general_dilated", "conv_general_dilated_cls", "dot_general",
        "dot_general_cls", "out_dot_general", "out_dot_general_cls", "promote_dtype", "qk_attn_weights_einsum_cls",
        "qkv_dot_general", "qkv_dot_general_cls",
    },
    "train, key and state are arguments of apply": {
        "collection_name", "decode", "deterministic", "rng_collection", "use_running_average",
    },
    "sums are in float32 or wider, variances of differences from the mean": {
        "force_float32_reductions", "force_fp32_for_softmax", "use_fast_variance",
    },
    "features are last and on one device; the ops have axis": {
        "axis", "axis_index_groups", "axis_name", "feature_axes", "reduction_axes",
    },
    "a kernel is masked by multiplying it": {"mask"},
    "results have the dtype of what is wrapped": {"dtype", "error_on_non_matrix", "preferred_element_type"},
    "Bidirectional wraps layers; their order and result have its own names": {
        "backward_rnn", "forward_rnn", "merge_fn", "return_carry", "time_major",
    },
}  # fmt: skip
LAYERS = sorted(
    name
    for name, layer in vars(fb.layers).items()
    if dataclasses.is_dataclass(layer) and dataclasses.is_dataclass(getattr(flax.linen, name, None))
)


@pytest.mark.parametrize("name", LAYERS)
def test_options_of_layers_are_those_of_flax(name):
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(getattr(module, name)) if f.name not in ("parent", "name")}
        for module in (fb.layers, flax.linen)
    )
    assert set(theirs) - set(ours) <= set.union(*NOT_OPTIONS.values())
    for option in set(ours) & set(theirs):
        if not callable(theirs[option]) and dataclasses.MISSING not in (ours[option], theirs[option]):
            assert ours[option] == theirs[option], option


def test_every_exception_is_an_option_of_flax():
    known = {f.name for name in LAYERS for f in dataclasses.fields(getattr(flax.linen, name))}
    assert set.union(*NOT_OPTIONS.values()) <= known


def test_an_option_that_a_layer_does_not_have_gets_a_sentence():
    for call, sentence in (
        (lambda: fb.layers.LayerNorm(reduction_axes=(1,)), r"LayerNorm: got an unexpected keyword argument 'reduction_axes'; "),
        (
            lambda: fb.layers.Dense(3, use_bais=False),
            r"'use_bais' \(did you mean use_bias\?\); the signature is Dense\(features, ",
        ),
        (lambda: fb.layers.Dense(), r"Dense: missing a required argument: 'features'; the signature is .*kernel_init=init, "),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()
