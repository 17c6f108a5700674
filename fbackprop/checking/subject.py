"""What is compared with what: a function, its reference, and one call of it taken apart into leaves."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.context import without_rules

__all__ = ["Call", "Subject", "subject_of"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call without its arrays: hashable where its options are, so that compiled programs can be kept by it.

    ``kinds`` tells of each leaf whether it is differentiated ("float"), another array ("array"), or a Python value.
    """

    tree: Any
    kinds: tuple[str, ...]
    constants: tuple[tuple[type, Any], ...]
    static: tuple[tuple[str, type, Any], ...]

    def bind(self, fn: Callable[..., Any]) -> Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any]]]:
        """``fn`` as a function of (differentiated leaves, other arrays), with (floating-point, other) outputs."""

        def flat(floats: Sequence[Any], arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            args, keywords = self.arguments(floats, arrays)
            leaves = jax.tree.leaves(fn(*args, **keywords))
            floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
            return (
                [leaf for leaf, f in zip(leaves, floating) if f],
                [leaf for leaf, f in zip(leaves, floating) if not f],
            )

        return flat

    def arguments(self, floats: Sequence[Any], arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and keywords with these leaves."""
        sources = {"float": iter(floats), "array": iter(arrays), "constant": iter(v for _, v in self.constants)}
        args, keywords = jax.tree.unflatten(self.tree, [next(sources[kind]) for kind in self.kinds])
        return args, {**keywords, **{name: value for name, _, value in self.static}}


@dataclasses.dataclass(frozen=True)
class Subject:
    """All that ``check`` was asked: ``fn`` and ``reference`` with the same arguments.

    names: of the differentiated leaves. groups: for each of them the number of the argument that it belongs to.
    array_names: of the other arrays: integers, masks, keys, and what ``argnums`` leaves out.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    reference_name: str
    exact: bool
    call: Call
    floats: tuple[jax.Array, ...]
    arrays: tuple[jax.Array, ...]
    names: tuple[str, ...]
    groups: tuple[int, ...]
    array_names: tuple[str, ...]
    judged_at_kinks: bool = True  # False for a custom_jvp, which is there to choose the derivative at its kinks

    @property
    def halves(self) -> tuple[Any, ...]:
        """What a custom_vjp was given last by ``defvjp``: the function itself does not tell one from the other."""
        return getattr(self.fn, "fwd", None), getattr(self.fn, "bwd", None)

    @property
    def arguments(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.groups))

    def argument_name(self, group: int) -> str:
        """The names of the leaves of one argument."""
        return ", ".join(name for name, g in zip(self.names, self.groups) if g == group)

    @property
    def custom(self) -> Any:
        """The jax.custom_vjp or jax.custom_jvp that is under test, if the function is one or wraps one."""
        inner: Any = self.fn
        while inner is not None and not isinstance(inner, (jax.custom_vjp, jax.custom_jvp)):
            inner = getattr(inner, "__wrapped__", None)
        return inner


def subject_of(
    fn: Callable[..., Any],
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    static: Mapping[str, Any],
    reference: Callable[..., Any] | None,
    exact: bool | None,
    argnums: int | Sequence[int] | None = None,
) -> Subject:
    """Finds the reference and takes the arguments apart. Raises where there is nothing that can be compared."""
    if not callable(fn):
        raise TypeError(f"check: expected a function, got {type(fn).__name__}.")
    name = getattr(fn, "__name__", type(fn).__name__)
    rule = getattr(fn, "rule", None)
    judged_at_kinks = True
    if reference is None:
        reference, told, judged_at_kinks = _reference(fn)
    else:
        told = f"the given {getattr(reference, '__name__', 'reference')}"
    paths, tree = jax.tree_util.tree_flatten_with_path((tuple(args), dict(keywords)))
    labels = _argument_names(fn, len(args))
    wanted = _wanted(name, argnums, len(args))
    kinds, floats, arrays, constants, names, groups, array_names = [], [], [], [], [], [], []
    tops: dict[Any, int] = {}
    for path, leaf in paths:
        top = path[:2]  # (args or keywords, which of them)
        label = labels[top[1].idx] if top[0].idx == 0 else top[1].key
        where = label + jax.tree_util.keystr(path[2:])
        kind, value = _leaf(name, where, leaf)
        if kind == "float" and wanted is not None and (top[0].idx, getattr(top[1], "idx", None)) not in wanted:
            kind = "array"
        kinds.append(kind)
        if kind == "float":
            floats.append(value)
            names.append(where)
            groups.append(tops.setdefault(top, len(tops)))
        elif kind == "array":
            arrays.append(value)
            array_names.append(where)
        else:
            constants.append((type(value), value))
    if not floats:
        raise ValueError(f"check: {name} was given no floating-point array, so there is nothing to differentiate.")
    options = tuple((key, type(value), value) for key, value in static.items())
    call = Call(tree, tuple(kinds), tuple(constants), options)
    judged = getattr(rule, "exact", not hasattr(fn, "own_rules")) if exact is None else exact
    leaves = tuple(floats), tuple(arrays), tuple(names), tuple(groups), tuple(array_names)
    return Subject(name, fn, reference, told, judged, call, *leaves, judged_at_kinks)


def _reference(fn: Callable[..., Any]) -> tuple[Callable[..., Any], str, bool]:
    """The definition that a function carries with it, how it is called in a report, and whether it is judged at kinks."""
    if rule := getattr(fn, "rule", None):
        return _twin(rule.reference), "its reference", True
    if original := getattr(fn, "own_rules", None):  # of with_rules
        return _twin(original), "its definition", True
    inner: Any = fn
    while inner is not None:
        if isinstance(inner, (jax.custom_vjp, jax.custom_jvp)):
            return _twin(inner.fun), "its undecorated function", isinstance(inner, jax.custom_vjp)
        inner = getattr(inner, "__wrapped__", None)
    return _twin(fn), "itself without custom rules", True


_twin = functools.lru_cache(maxsize=256)(without_rules)  # the same twin each time: compiled programs are kept by it


def _wanted(name: str, argnums: int | Sequence[int] | None, count: int) -> set[tuple[int, int]] | None:
    """The arguments to differentiate as (0, position), or None for all."""
    if argnums is None:
        return None
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if bad := [n for n in numbers if not -count <= n < count]:
        raise ValueError(f"check: argnums has {bad[0]}, but {name} was given {count} positional arguments.")
    return {(0, n % count) for n in numbers}


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional[:count] + [f"args[{i}]" for i in range(len(positional), count)]


def _leaf(name: str, where: str, leaf: Any) -> tuple[str, Any]:
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return "constant", leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"check: {name}: {where} is complex; only real numbers are compared.")
    return ("float" if jnp.issubdtype(leaf.dtype, jnp.floating) else "array"), jnp.asarray(leaf)
