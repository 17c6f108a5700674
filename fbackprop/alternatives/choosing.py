"""``with_rules``: the same function, in which some ops have another backward.

What was asked for, by name, as a number with a name, as a pair of functions or as a ``Rule``, becomes a ``Rule`` that is made
once and kept: it is part of the key of every jit cache (see ``fbackprop.context``).
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from fbackprop import context
from fbackprop.alternatives.makers import OtherRule, other_rule
from fbackprop.alternatives.methods import METHODS
from fbackprop.rules import RULES, Rule
from fbackprop.rules import _check_signatures as check_signatures

__all__ = ["Choice", "available", "clip", "lrp", "reversal", "with_rules"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Choice:
    """An alternative by its name, with the number that it takes. Made by ``lrp``, ``clip`` and ``reversal``."""

    method: str
    option: float | None = None

    def __str__(self) -> str:
        known = METHODS[self.method].option
        return self.method if known is None else f"{self.method} ({known[0]} = {self.option:g})"


def lrp(*, epsilon: float | None = None, gamma: float | None = None, alpha: float | None = None) -> Choice:
    """Layer-wise relevance propagation, by at most one of the numbers; without any it is LRP-0.

    Args:
      epsilon: LRP-ε, positive: what takes a part of the relevance where contributions cancel.
      gamma: LRP-γ, positive: how much more contributions count that have the sign of their sum.
      alpha: LRP-αβ, at least 1, with β = α − 1: the share of the positive contributions.
    Raises:
      ValueError: where more than one is given, or one is out of its range.
    """
    given = {n: v for n, v in (("epsilon", epsilon), ("gamma", gamma), ("alpha", alpha)) if v is not None}
    if len(given) > 1:
        raise ValueError(f"lrp: expected at most one of epsilon, gamma and alpha, got {' and '.join(given)}.")
    if not given:
        return Choice("lrp-0")
    ((name, value),) = given.items()
    least = 1.0 if name == "alpha" else 0.0
    value = _number("lrp", name, value)
    if value < least or (value == 0 and name == "epsilon"):
        expected = {"epsilon": "above 0 (lrp() is LRP-0)", "gamma": "of at least 0", "alpha": "of at least 1"}[name]
        raise ValueError(f"lrp: {name} is {value:g}, expected a number {expected}.")
    return Choice({"epsilon": "lrp-epsilon", "gamma": "lrp-gamma", "alpha": "lrp-alpha-beta"}[name], value)


def clip(*, value: float | None = None, norm: float | None = None) -> Choice:
    """Clips the cotangent that arrives at an op: each element to ±value, or the whole to a norm.

    The op's own backward goes on from there, so its parameters and its input receive less alike. The norm is that of one call
    of the op: of one example under ``vmap``, of one device's part inside ``shard_map``.

    Raises:
      ValueError: where not exactly one of them is given, or it is not positive.
    """
    if (value is None) == (norm is None):
        raise ValueError("clip: expected one of value and norm.")
    name, bound = ("norm", norm) if value is None else ("value", value)
    number = _number("clip", name, bound)
    if number <= 0:
        raise ValueError(f"clip: {name} is {number:g}, expected a positive number.")
    return Choice(f"clip-{name}", number)


def reversal(factor: float = 1.0) -> Choice:
    """Reverses the cotangent that arrives at an op and multiplies it with ``factor``, a Python number."""
    return Choice("reversal", _number("reversal", "factor", factor))


def _number(who: str, name: str, value: Any) -> float:
    """A static number: under vmap a traced factor that no output depends on would give a wrong gradient."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise ValueError(f"{who}: {name} must be a finite Python number, got {value!r}.")
    return float(value)


def available(op: str | None = None) -> dict[str, tuple[str, ...]]:
    """The alternatives there are: for each method the ops that have such a rule, or for one op the methods it has.

    Args:
      op: the name of an op; by default all of them.
    Raises:
      ValueError: where there is no such op.
    """
    if op is not None:
        _rule_of("available", op)
        return {op: tuple(name for name, method in METHODS.items() if method.maker(op))}
    return {name: tuple(n for n in RULES if method.maker(n)) for name, method in METHODS.items()}


def with_rules(fn: Callable[P, R], rules: Any) -> Callable[P, R]:
    """Gives the same function with other backward passes: its values are those of ``fn``, its gradient is another.

    The result is pure like ``fn`` and works under ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``.
    The innermost choice for an op holds, also where one of the functions is inside ``without_rules``. ``op.forward`` and
    ``op.backward``, called by hand, remain the op's own, except those of the result for an op:
    ``with_rules(fb.relu, {"relu": "guided"})`` is an op again, which ``layers.serial`` takes.

    Args:
      fn: any function that calls ops of this library.
      rules: a dict from names of ops to what stands in for their backward: a name such as "guided" (``available()`` lists
        them), what ``lrp``, ``clip`` or ``reversal`` give, a pair ``(forward, backward)`` of functions as for ``rule`` (of its
        forward only what it saves is used), or a ``Rule`` of the same signature. Or one of "guided", "deconvolution" and the
        forms of LRP for the whole of ``fn``; an op that the method knows no rule for is then refused when it is differentiated.
    Raises:
      ValueError: where there is no such op or no such rule for it. TypeError: where a function has another signature.
    """
    if not callable(fn):
        raise TypeError(f"with_rules: expected a function, got {type(fn).__name__}.")
    others = _others(rules)
    others()  # raises here what is wrong, and not at the first call

    # Without the attributes of fn: those of an op would be its own rule and halves.
    @functools.wraps(fn, updated=())
    def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        with context.switched(others=_merged(context.mode().others, others())):
            return fn(*args, **kwargs)

    result: Any = twin
    own = getattr(fn, "rule", None)
    if isinstance(own, Rule):
        result.rule = dict(others()).get(own.name, own)
        result.forward, result.backward = result.rule.op.forward, result.rule.op.backward
    else:
        result.own_rules = fn  # what fb.check compares with
    return result


def _merged(outer: tuple[tuple[str, Rule], ...], inner: tuple[tuple[str, Rule], ...]) -> tuple[tuple[str, Rule], ...]:
    return tuple({**dict(outer), **dict(inner)}.items()) if outer else inner


def _others(rules: Any) -> Callable[[], tuple[tuple[str, Rule], ...]]:
    """What the switch is to know, asked for at each call: a whole method also speaks of ops that are registered later."""
    if isinstance(rules, (str, Choice)):
        choice = _choice("with_rules", rules)
        if METHODS[choice.method].refuses is None:
            whole = [f"'{name}'" for name, method in METHODS.items() if method.refuses]
            raise ValueError(
                f"with_rules: {choice.method} is for ops that are named, as in {{'relu': …}}; for a whole function there are "
                f"{', '.join(whole)}."
            )
        return lambda: _whole(choice, tuple(RULES.values()))
    if not isinstance(rules, Mapping):
        raise TypeError(f"with_rules: expected a dict such as {{'relu': 'guided'}} or a name such as 'lrp-0', got {rules!r}.")
    fixed = tuple((name, _chosen(_rule_of("with_rules", name), choice)) for name, choice in rules.items())
    return lambda: fixed


@functools.lru_cache(maxsize=256)
def _whole(choice: Choice, known: tuple[Rule, ...]) -> tuple[tuple[str, Rule], ...]:
    """The ops that the method has a rule for, with it, and those that it refuses. Others are not spoken of."""
    method = METHODS[choice.method]
    assert method.refuses is not None
    served = {rule.name: _made(choice, rule) for rule in known if method.maker(rule.name)}
    refused = {rule.name: _refusing(choice, rule) for rule in known if method.refuses(rule.name)}
    return tuple({**refused, **served}.items())


@functools.lru_cache(maxsize=4096)
def _made(choice: Choice, rule: Rule) -> Rule:
    maker = METHODS[choice.method].maker(rule.name)
    assert maker is not None
    made = maker(rule, choice.option)
    if not isinstance(made, OtherRule):  # it is the op's own
        return made
    return dataclasses.replace(made, method=str(choice), derivation=METHODS[choice.method].formula)


@functools.lru_cache(maxsize=1024)
def _refusing(choice: Choice, rule: Rule) -> Rule:
    """A rule that gives values, and raises where it is differentiated."""
    op = rule.name
    message = (
        f"with_rules: {_no_rule(op, choice.method)} Or give it one of your own inside, with_rules(fn, "
        f'{{"{op}": (forward, backward)}}), or leave its gradient in place there, with {{"{op}": fb.RULES["{op}"]}}.'
    )

    def forward(**given: Any) -> Any:
        raise ValueError(message)

    primal = rule.primal or (lambda **given: rule.forward(**given)[0])
    return dataclasses.replace(other_rule(rule, forward, rule.backward), primal=primal, method=str(choice), derivation=message)


def _no_rule(op: str, method: str) -> str:
    return f"{op} has no rule {method!r}. {METHODS[method].advice(op)}"


def _chosen(rule: Rule, choice: Any) -> Rule:
    """The rule that stands in for an op's own."""
    if isinstance(choice, (str, Choice)):
        choice = _choice("with_rules", choice)
        if METHODS[choice.method].maker(rule.name) is None:
            known = ", ".join(f"'{name}'" for name in available(rule.name)[rule.name])
            raise ValueError(f"with_rules: {_no_rule(rule.name, choice.method)} It has {known}.")
        return _made(choice, rule)
    if isinstance(choice, Rule):
        if choice.signature.parameters.keys() != rule.signature.parameters.keys() or choice.static != rule.static:
            raise TypeError(
                f"with_rules: the rule given for {rule.name} takes {_parameters(choice)}; expected {_parameters(rule)}."
            )
        return choice if choice.reference is rule.reference else _given(rule, choice.forward, choice.backward)
    if isinstance(choice, tuple) and len(choice) == 2 and all(map(callable, choice)):
        return _given(rule, *choice)
    raise TypeError(
        f"with_rules: for {rule.name} expected a name such as 'guided', a pair (forward, backward) or a Rule, got {choice!r}."
    )


@functools.lru_cache(maxsize=1024)
def _given(rule: Rule, forward: Callable[..., Any], backward: Callable[..., Any]) -> Rule:
    """The user's pair. y comes from the op's own forward, so that values stay; the compiler drops what is computed twice."""

    def both(**given: Any) -> Any:
        rest = tuple((name, other) for name, other in context.mode().others if name != rule.name)
        with context.switched(others=rest):  # it may call the op itself
            result = forward(**given)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"with_rules: the forward given for {rule.name} must return (y, saved), got {type(result).__name__}."
            )
        return rule.forward(**given)[0], result[1]

    theirs = dataclasses.replace(rule, forward=forward, backward=backward)
    check_signatures(theirs)
    text = inspect.getdoc(backward) or f"The backward {getattr(backward, '__name__', '')} that was given."
    made = other_rule(rule, both, backward, "what the given forward saves", theirs.backward_static)
    return dataclasses.replace(made, method="your own", derivation=text)


def _parameters(rule: Rule) -> str:
    return f"({', '.join(rule.signature.parameters)}) with static ({', '.join(rule.static)})"


def _choice(who: str, given: str | Choice) -> Choice:
    if isinstance(given, Choice):
        return given
    if given not in METHODS:
        names = list(METHODS)
        raise ValueError(f"{who}: there is no rule {given!r}{_nearest(given, names)} There are {', '.join(names)}.")
    option = METHODS[given].option
    if option is not None and option[1] is None:
        raise ValueError(f"{who}: {given} needs a number: fb.alternatives.clip({option[0]}=…).")
    return Choice(given, None if option is None else option[1])


def _rule_of(who: str, name: Any) -> Rule:
    if name not in RULES:
        raise ValueError(f"{who}: there is no op {name!r}{_nearest(str(name), list(RULES))}")
    return RULES[name]


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]!r}?" if found else "."
