"""Types of options: from text to value, or a sentence that says what was expected."""

import argparse
import ast
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

__all__ = ["FLOATS", "array", "checks", "dtype", "file", "one_of", "picture", "positive", "several", "static", "whole",
           "zero_or_more"]  # fmt: skip

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int32", "int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64")


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number < 2**31:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return number

    return parse


def positive(text: str) -> float:
    return _number(text, "above 0", lambda number: number > 0)


def zero_or_more(text: str) -> float:
    return _number(text, "from 0", lambda number: number >= 0)


def _number(text: str, where: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and fits(number)):
        raise argparse.ArgumentTypeError(f"expected a number {where}, got {text!r}")
    return number


def file(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, expected a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "cannot be written to" if path.parent.is_dir() else "does not exist"
        raise argparse.ArgumentTypeError(f"the folder {path.parent} {why}")
    return path


def one_of(what: str, name: str, known: Any) -> str:
    """The name, refused where it is not known."""
    from fbackprop.loading import near

    if name not in known:
        raise argparse.ArgumentTypeError(f"there is no {what} {name!r}{near(name, known)}")
    return name


def several(what: str, known: Callable[[], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """Names with commas between, each known and in the order that they are known in."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = {one_of(what, name.strip(), known()) for name in text.split(",")}
        return tuple(name for name in known() if name in chosen)

    return parse


def picture(text: str) -> pathlib.Path:
    path = file(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .svg, got {text!r}")
    return path


_ARRAY = re.compile(r"(scalar|\(\)|\d+(?:,\d+)*)(?::(?!positive$|positive<)([a-z]\w*))?(:positive)?(?:<(\d+))?")


def dtype(text: str) -> str:
    return one_of("dtype", text, FLOATS)


def checks(text: str) -> tuple[str, ...]:
    """Names of checks with commas between; what is a space in a name may be a hyphen."""
    from fbackprop.checking import DEPTHS

    known = {name.replace(" ", "-"): name for name in DEPTHS["full"]}
    return tuple(known[one_of("check", name.strip().replace(" ", "-"), known)] for name in text.split(","))


def static(text: str) -> tuple[str, Any]:
    """A name and a Python literal."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as axis=-1, got {text!r}")
    try:
        return name, ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        hint = f" (a string has quotes of its own: \"{name}='{value}'\")" if value.isidentifier() else ""
        raise argparse.ArgumentTypeError(f"expected a Python literal for {name}, got {value!r}{hint}") from None


def array(text: str) -> tuple[Any, str | None]:
    """How an array is drawn, and its dtype, None where it is not said."""
    from fbackprop.samples import Spec

    if text == "key":
        return Spec("key"), None
    match = _ARRAY.fullmatch(re.sub(r"\s*,\s*", ",", text.strip()))
    if match is None:
        kinds = "4,8 or scalar or 4,8:bfloat16 or 4,8:positive or '4:int32<10' or 4,8:bool or key"
        raise argparse.ArgumentTypeError(f"expected such as {kinds}, got {text!r}")
    shape, dtype, positive, below = tuple(map(int, re.findall(r"\d+", match[1]))), match[2], match[3], match[4]
    one_of("dtype", dtype or "float32", (*FLOATS, *INTEGERS, "bool"))
    if dtype in INTEGERS:
        most = 2 ** min(31, int(dtype.strip("uint")) - (dtype[0] == "i")) - 1
        if positive or not 1 <= int(below or 0) <= most:
            raise argparse.ArgumentTypeError(f"integers are below a bound from 1 to {most}, as in '4:{dtype}<10', got {text!r}")
        return Spec("labels", shape, high=int(below)), dtype
    if below or (positive and dtype == "bool"):
        suffix = f"<{below}" if below else "positive"
        raise argparse.ArgumentTypeError(f"{suffix} is not for {dtype or 'floating-point numbers'}, in {text!r}")
    if dtype == "bool":
        return Spec("mask", shape, high=0.5), dtype
    return (Spec("uniform", shape, 0.5, 1.5) if positive else Spec("normal", shape)), dtype
