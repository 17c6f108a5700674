"""Sequences of tokens: the standard library's source, the user's text and token files, cut into windows as they are read.

A file is mapped into memory, not read: of a window only its own pages are, when its turn comes. Text is taken as bytes, of
which there are 256.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from fbackprop.data.datasets import DataError
from fbackprop.data.lazy import Windows, page_digest
from fbackprop.refusing import first_line

__all__ = ["TEXT", "TOKENS", "TokenData", "load_tokens", "standard_library"]

TEXT = (".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".js", ".log")
"""What the name of a file of text ends in."""

TOKENS = (".bin", ".npy")
"""And of one of tokens."""

_BLOCK = 1 << 22
_NO_SOURCE = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
}


class TokenData(NamedTuple):
    """Windows to train on and windows held out. ``text``: whether tokens are bytes of text."""

    name: str
    train: Windows
    test: Windows
    vocabulary: int
    text: bool
    fingerprint: str  # of the tokens as they came: a resumed run must find the same ones


def standard_library(length: int) -> TokenData:
    """The source of Python's standard library on this machine, without tests and tables of characters, as bytes; each tenth
    file is held out."""
    root = pathlib.Path(os.__file__).parent
    paths = [p for p in sorted(root.rglob("*.py")) if not _NO_SOURCE & set(p.relative_to(root).parts)]
    parts = [np.fromfile(path, np.uint8) for path in paths if path.is_file()]
    if not parts:
        raise DataError(f"{root}: the source of the standard library is not here, expected files *.py.")
    kept = np.concatenate([part for i, part in enumerate(parts) if i % 10 != 5])
    held_out = np.concatenate([part for i, part in enumerate(parts) if i % 10 == 5] or [kept[:0]])
    return _checked("the standard library", kept, held_out, length, 256, True, np.concatenate([kept, held_out]))


def load_tokens(path: str | pathlib.Path, length: int) -> TokenData:
    """Maps a file of text or of tokens; its last tenth is held out.

    Args:
      path: text, as bytes (names that end as in ``TEXT``); ``*.npy`` with one axis of unsigned or signed integers; ``*.bin``,
        integers of 16 bits one after the other, the lowest byte first, or of 32 bits where the name ends in ``.uint32.bin``.
        The vocabulary is the largest token and one.
      length: of a window.
    Raises:
      DataError: with one sentence, where the file is missing, too short or not what was expected.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise DataError(f"{path}: this is a folder; expected a file.")
        tokens = _mapped(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error}).") from None
    text = path.suffix.lower() in TEXT
    vocabulary = 256 if text else _vocabulary(path, tokens)
    cut = len(tokens) - max(len(tokens) // 10, min(length + 1, len(tokens) // 2))
    return _checked(str(path), tokens[:cut], tokens[cut:], length, vocabulary, text, tokens)


def _mapped(path: pathlib.Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            why = "it holds Python objects" if "object" in str(error).lower() else first_line(error)
            raise DataError(f"{path}: this is not an .npy file of integers ({why}).") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{path}: the array is {tokens.dtype} {tokens.shape}; expected integers [tokens].")
        return tokens
    size = path.stat().st_size
    kind = (
        np.dtype(np.uint8) if path.suffix.lower() in TEXT else np.dtype("<u4" if path.name.endswith(".uint32.bin") else "<u2")
    )
    if size % kind.itemsize:
        raise DataError(f"{path}: there are {size} bytes; expected a multiple of {kind.itemsize}, the size of a {kind.name}.")
    return np.memmap(path, kind, "r") if size else np.empty(0, kind)


def _vocabulary(path: pathlib.Path, tokens: np.ndarray) -> int:
    largest, smallest = 1, 0
    for i in range(0, len(tokens), _BLOCK):
        part = tokens[i : i + _BLOCK]
        largest, smallest = max(largest, int(part.max())), min(smallest, int(part.min()))
    if smallest < 0 or largest >= 2**24:
        odd = smallest if smallest < 0 else largest
        hint = "; tokens of 32 bits stand in files called *.uint32.bin" if path.suffix == ".bin" else ""
        raise DataError(f"{path}: the token {odd} is out of range; expected 0 to {2**24 - 1}{hint}.")
    return largest + 1


def _checked(
    name: str, train: np.ndarray, test: np.ndarray, length: int, vocabulary: int, text: bool, whole: np.ndarray
) -> TokenData:
    unit = "bytes" if text else "tokens"
    if len(train) <= length or len(test) <= length:
        raise DataError(f"{name}: there are {len(whole)} {unit}; expected at least {2 * length + 2}, two windows of {length}.")
    return TokenData(name, Windows(train, length), Windows(test, length), vocabulary, text, page_digest(whole))
