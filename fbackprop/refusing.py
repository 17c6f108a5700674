"""What an op says of a call that it cannot carry out: a sentence that names the op, what came and what was expected.

What a signature says is checked here, once for all ops: an argument of type ``ArrayLike`` is no string, list or dict, and no
``None`` unless the type has it; one of type ``bool`` is True or False, and not the word of another library's option.
What JAX or NumPy says when they meet something else gets the name of the op, and what it was given.
"""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

__all__ = ["bound", "first_line", "kind", "named", "refuse_kinds", "sentence"]

_NOT_ARRAYS = (str, bytes, list, tuple, dict, set, frozenset)


def refuse_kinds(who: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Refuses values that are not what the signature says.

    Raises:
      TypeError: with a sentence.
    """
    for name, value in given.items():
        wanted = parameters[name].annotation
        if wanted in (ArrayLike, ArrayLike | None):
            if isinstance(value, _NOT_ARRAYS) or (value is None and wanted == ArrayLike):
                hint = "; jnp.asarray makes one of numbers" if isinstance(value, (list, tuple)) else ""
                raise TypeError(f"{who}: {name} is {kind(value)}, expected an array{hint}.")
        elif wanted is bool and not (isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))):
            raise TypeError(f"{who}: {name} is {value!r}, expected True or False.")


def bound(who: str, signature: inspect.Signature, args: Sequence[Any], keywords: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name.

    Raises:
      TypeError: where they do not fit: a sentence with the signature, without types, and names like one that is unknown.
    """
    try:
        return signature.bind(*args, **keywords)
    except TypeError as error:
        told = str(error)
    try:
        signature.bind_partial(*args, **keywords)
    except TypeError as error:  # a name that is unknown tells more than one that is missing for it
        told = str(error)
    bare = [p.replace(annotation=p.empty, default=_Word.of(p.default)) for p in signature.parameters.values()]
    unknown = [name for name in keywords if name not in signature.parameters]
    near = [n for name in unknown for n in difflib.get_close_matches(name, signature.parameters, 1, cutoff=0.5)]
    hint = f" (did you mean {' and '.join(near)}?)" if near else ""
    raise TypeError(f"{who}: {told}{hint}; the signature is {who}{inspect.Signature(bare)}.")


class _Word(str):
    """A function among the defaults, by its name."""

    __repr__ = str.__str__

    @classmethod
    def of(cls, default: Any) -> Any:
        is_function = callable(default) and default is not inspect.Parameter.empty
        return cls(getattr(default, "__name__", "…")) if is_function else default


def named(who: str, error: Exception, given: Mapping[str, Any]) -> Exception:
    """The error of a call, with the name of the op and what it was given, unless it has a name or is a special one of JAX."""
    message = str(error).strip()
    if type(error) not in (TypeError, ValueError) or re.match(r"\w+: ", message):
        return error
    return type(error)(f"{who}: {message} (given: {', '.join(f'{n} {_brief(v)}' for n, v in given.items())})")


def first_line(error: BaseException) -> str:
    """What an error says, in a line without a full stop; the name of its type where it says nothing."""
    first, *more = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return (f"{first} {more[0]}" if first.endswith(":") and more else first).rstrip(".")


def sentence(error: BaseException) -> str:
    """An error as a part of a sentence: its type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'it says no more'}"


def kind(value: Any) -> str:
    """What a value is, in a word or two."""
    return repr(value) if value is None or isinstance(value, (str, bytes)) else f"a {type(value).__name__}"


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 and "\n" not in text else kind(value)
