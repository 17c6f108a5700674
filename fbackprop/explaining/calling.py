"""What a call is named by: the function, and each array among the arguments."""

import functools
import inspect
from typing import Any, NamedTuple

from fbackprop.explaining.program import paths_of

__all__ = ["Arguments", "labels_of", "name_of"]


class Arguments(NamedTuple):
    """The arguments of a call without their arrays."""

    tree: Any
    others: tuple[Any, ...]  # each leaf that is no array, None in the place of one
    places: tuple[int, ...]  # of the arrays among the leaves
    labels: tuple[tuple[str, int | str, str], ...]  # of the arrays: label, argument, path in it


def name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return "the function" if name == "<lambda>" else name


def labels_of(fn: Any, args: Any, kwargs: Any) -> list[tuple[str, int | str, str]]:
    """For each leaf of the arguments its label, its argument and its path in it."""
    try:
        names = [p.name for p in inspect.signature(fn).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    except (TypeError, ValueError):
        names = []
    given = [*enumerate(args), *sorted(kwargs.items())]
    found: list[tuple[str, int | str, str]] = []
    taken: set[str] = set()
    for argument, tree in given:
        name = argument if isinstance(argument, str) else names[argument] if argument < len(names) else f"argument {argument}"
        for path in paths_of(tree):
            label = path if argument == 0 and path else f"{name}/{path}" if path else name
            if label in taken:
                label = f"argument {argument}/{path}" if path else f"argument {argument}"
            taken.add(label)
            found.append((label, argument, path))
    return found
