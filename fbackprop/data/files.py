"""The user's own data: an ``.npz`` file with the arrays x and y, or a CSV file with the label in the last column."""

import csv
import pathlib
import zipfile
import zlib

import numpy as np

from fbackprop.data.datasets import DataError, Dataset, classification
from fbackprop.refusing import first_line

__all__ = ["load"]


def load(path: str | pathlib.Path) -> Dataset:
    """Reads a file of examples and labels, checked, split and scaled as ``classification`` says.

    Args:
      path: ``*.npz`` with ``x`` [N, features], [N, H, W] or [N, H, W, C] and ``y`` [N]; or ``*.csv``, comma-separated
        numbers, one example a line, the label last, with or without one line of column names.
    Raises:
      DataError: with one sentence, where the file is missing, malformed or not what was expected.
    """
    path = pathlib.Path(path)
    readers = {".npz": _npz, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of the kind {path.suffix or '(no suffix)'} are not read; expected .npz or .csv.")
    try:
        x, y = reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: this is a folder; expected a file.") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error}).") from None
    return classification(str(path), x, y)


def _npz(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        # Never unpickles: an object array in a file from elsewhere could run code.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: the file holds a single array; expected an .npz file with the arrays x and y.")
            if missing := [name for name in ("x", "y") if name not in archive.files]:
                lacking = " and no array ".join(missing)
                raise DataError(f"{path}: there is no array {lacking}; the file holds {', '.join(archive.files) or 'nothing'}.")
            return archive["x"], archive["y"]
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        zipped = zipfile.is_zipfile(path)
        why = first_line(error) if "pickle" not in str(error) else "it holds Python objects" if zipped else "it is no archive"
        raise DataError(f"{path}: this is not an .npz file of plain arrays of numbers ({why}).") from None


def _csv(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    examples: list[np.ndarray] = []
    first = None  # the line of the first example, and how many columns it has
    names_seen = False
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                line = reader.line_num
                if not any(cell.strip() for cell in row):
                    continue
                if first is None and not names_seen and _is_header(row):
                    names_seen = True
                    continue
                first = first or (line, len(row))
                examples.append(_example(path, line, row, first))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: this is not a CSV file of text ({first_line(error)}).") from None
    if not examples:
        raise DataError(f"{path}: there are no examples in the file.")
    table = np.stack(examples)
    return table[:, :-1], table[:, -1]


def _example(path: pathlib.Path, line: int, row: list[str], first: tuple[int, int]) -> np.ndarray:
    if len(row) != first[1]:
        raise DataError(f"{path}: line {line} has {len(row)} columns; expected {first[1]}, as in line {first[0]}.")
    if len(row) < 2:
        raise DataError(f"{path}: line {line} has one column; expected features and a label, separated by commas.")
    try:
        return np.array(row, dtype=np.float64)
    except ValueError:
        column, cell = next((i, c.strip()) for i, c in enumerate(row, 1) if not _is_number(c))
        raise DataError(
            f"{path}: line {line}, column {column} holds {repr(cell) if cell else 'nothing'}; expected a number."
        ) from None


def _is_header(row: list[str]) -> bool:
    """Whether a line holds column names. The name of the label is no number; those of the features may count up from 0."""
    *features, label = (cell.strip() for cell in row)
    counted = features == [str(i) for i in range(len(features))]
    return not _is_number(label) and (counted or not any(map(_is_number, features)))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
