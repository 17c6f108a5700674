"""Who a rule is measured against: what a user of JAX would otherwise call, and the packages that offer the same.

jax.grad                              the function of that name in jax.nn, optax or Flax, else the definition; of a rule that is
                                      meant to differ from it (straight-through) x + stop_gradient(definition(x) − x)
checkpoint, dots_saveable,            the same under ``jax.checkpoint``, without a policy and with the two that are common
dots_with_no_batch_dims_saveable
jax-cce, tokamax                      their functions, where the package is installed
torch                                 PyTorch on the CPU, eager (``pytorch.py``)
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fbackprop.context import without_rules
from fbackprop.measuring.problems import Call, Problem

__all__ = ["AGAINST", "POLICIES", "Absent", "Rival", "rival"]

_LIBRARIES = ("jax.nn", "optax.losses", "optax", "flax.linen")

POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "checkpoint": None,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

AGAINST = ("jax.grad", *POLICIES, "jax-cce", "tokamax", "torch")


class Absent(Exception):
    """There is no such rival. The message says why; an empty one, that nobody expects it."""


class Rival(NamedTuple):
    """What computes the op, and who that is."""

    call: Call
    name: str


def rival(against: str, given: Problem) -> Rival:
    """The rival of that name for a problem. Raises Absent where there is none."""
    if against == "jax.grad":
        definition = without_rules(lambda arguments: given.rule.reference(**arguments))
        if not given.rule.exact:
            return Rival(functools.partial(_straight_through, definition), "stop_gradient")
        return _library(given) or Rival(definition, "the definition")
    if against in POLICIES:
        base = rival("jax.grad", given)
        checkpoint = functools.partial(jax.checkpoint, policy=POLICIES[against])
        arrays = set(given.names)

        def call(arguments: dict[str, Any]) -> Any:
            static = {n: v for n, v in arguments.items() if n not in arrays}
            inner = checkpoint(lambda dynamic: base.call({**dynamic, **static}))
            return inner({n: v for n, v in arguments.items() if n in arrays})

        return Rival(call, f"jax.checkpoint({base.name})")
    return _package(against, given)


def _straight_through(definition: Call, arguments: dict[str, Any]) -> Any:
    """What a user writes for it without a rule."""
    x = next(iter(arguments.values()))
    return x + jax.lax.stop_gradient(definition(arguments) - x)


def _library(given: Problem) -> Rival | None:
    """The function of the op's name in the first library that has one for this call."""
    name = given.rule.name
    for library in _LIBRARIES:
        try:
            function = getattr(importlib.import_module(library), name, None)
        except ImportError:
            continue
        if function is None or isinstance(function, type) or not callable(function):
            continue
        call = functools.partial(_bound, function, given)
        if _fits(call, given):
            return Rival(call, f"{library}.{name}")
    return None


def _fits(call: Call, given: Problem) -> bool:
    """Whether a function takes these arguments, can be differentiated, and gives outputs of the same shapes."""
    try:
        outputs = jax.eval_shape(lambda m, r: jax.vjp(lambda *m: given.outputs(call, m, r), *m)[0], given.moved, given.rest)
    except Exception:
        return False
    return [leaf.shape for leaf in outputs] == [leaf.shape for leaf in given.dy]


def _bound(function: Callable[..., Any], given: Problem, arguments: dict[str, Any]) -> Any:
    """Calls a function of another library as ours is called, by position where it takes positions. What only ours takes is
    left out at its default; elsewhere the call cannot be made."""
    theirs, ours = inspect.signature(function).parameters, given.rule.signature.parameters
    for name in set(arguments) - set(theirs):
        if arguments[name] is not None and arguments[name] != ours[name].default:
            raise TypeError(f"{function.__name__} takes no {name}")
    shared = [(parameter, arguments[name]) for name, parameter in theirs.items() if name in arguments]
    positional = [value for parameter, value in shared if parameter.kind is parameter.POSITIONAL_ONLY]
    keywords = {parameter.name: value for parameter, value in shared if parameter.kind is not parameter.POSITIONAL_ONLY}
    return function(*positional, **keywords)


def _package(against: str, given: Problem) -> Rival:
    table = _PACKAGES[against]
    if given.rule.name not in table:
        raise Absent("")
    make = table[given.rule.name]
    try:
        module = importlib.import_module(against.replace("-", "_"))
        if against == "tokamax":  # would read its options from our command line
            importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    except Exception as error:
        raise Absent(f"{against} does not import here ({type(error).__name__})") from None
    arguments = given.arguments(given.moved, given.rest)
    plain = {n for n, p in given.rule.signature.parameters.items() if _same(arguments[n], p.default)}
    if extra := set(arguments) - plain - make.takes:
        raise Absent(f"{against} has no {', '.join(sorted(extra))}")
    return Rival(functools.partial(make.call, module), f"{against}: {make.name}")


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, jax.Array) and type(value) is type(default) and value == default)


class _Port(NamedTuple):
    name: str
    takes: set[str]  # arguments; any other must stand at its default
    call: Callable[[Any, dict[str, Any]], Any]


_LINEAR = {"x", "kernel", "labels", "transposed"}


def _cce(module: Any, a: dict[str, Any]) -> Any:
    return module.linear_cross_entropy(a["x"], a["kernel"] if a["transposed"] else a["kernel"].T, a["labels"])


def _tokamax_loss(module: Any, a: dict[str, Any]) -> Any:
    kernel = a["kernel"].T if a["transposed"] else a["kernel"]
    return module.linear_softmax_cross_entropy_loss(a["x"], a["labels"], kernel, reduction="mean").astype("float32")


def _tokamax_norm(module: Any, a: dict[str, Any]) -> Any:
    return module.layer_norm(a["x"], a["scale"], a["bias"], epsilon=a["epsilon"])


def _tokamax_attention(module: Any, a: dict[str, Any]) -> Any:
    return module.dot_product_attention(a["query"], a["key"], a["value"], is_causal=a["is_causal"])


_PACKAGES: dict[str, dict[str, _Port]] = {
    "jax-cce": {"linear_cross_entropy": _Port("linear_cross_entropy", _LINEAR, _cce)},
    "tokamax": {
        "linear_cross_entropy": _Port("linear_softmax_cross_entropy_loss", _LINEAR, _tokamax_loss),
        "layer_norm": _Port("layer_norm", {"x", "scale", "bias", "epsilon"}, _tokamax_norm),
        "dot_product_attention": _Port("dot_product_attention", {"query", "key", "value", "is_causal"}, _tokamax_attention),
    },
}
