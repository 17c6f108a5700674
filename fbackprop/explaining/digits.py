"""Numbers for a reader: few digits, aligned; large arrays as a summary and a small picture."""

import dataclasses
import io
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = [
    "Summary", "cells", "exact", "heat_map", "is_small", "norm", "number", "plain_array", "right_aligned", "shape_text", "size",
    "summary", "table_cells",
]  # fmt: skip

COLUMNS, LINES, ELEMENTS = 10, 8, 64  # the largest array that is shown in full


def plain_array(values: Any) -> np.ndarray:
    """As a NumPy array of float64, integers or booleans; a random key as its words, what has no numbers as zeros."""
    if isinstance(values, Tracer):
        raise TypeError(
            "explain: a traced array has no numbers to show; return the explanation from jax.jit and show it outside."
        )
    if hasattr(values, "dtype") and jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        values = jax.random.key_data(values)
    array = np.asarray(values)
    if array.dtype == jax.dtypes.float0:
        return np.zeros(array.shape)
    if array.dtype.kind in "biu":
        return array
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def norm(array: Any) -> float:
    """The Euclidean norm of all elements."""
    return float(np.linalg.norm(plain_array(array).reshape(-1)))


def number(value: Any, digits: int = 6) -> str:
    """One number to so many significant digits, without idle zeros: 0.0345753, 12, 1.5e-09."""
    if isinstance(value, (bool, np.bool_)):
        return "1" if value else "0"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))
    value = complex(value) if isinstance(value, (complex, np.complexfloating)) else float(value)
    if isinstance(value, complex):
        return f"{value:.{digits}g}"
    if not math.isfinite(value) or value == 0:
        return {"inf": "∞", "-inf": "−∞", "nan": "NaN"}.get(str(value), "0")
    if 1e-4 <= abs(value) < 10 ** max(digits, 6):
        text = f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + f"e{int(exponent)}"
    return text.replace("-", "−")


def exact(value: Any, dtype: Any = None) -> str:
    """One number with all of the digits that it has in a dtype."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, float):
        return number(value)
    narrow = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize < 8
    return (str(np.dtype(dtype).type(value)) if narrow else repr(value)).replace("-", "−")


def size(count: int) -> str:
    """Bytes in words, to three digits: 640 B, 1.2 MiB."""
    if count < 1024:
        return f"{count} B"
    unit = 1 if count < 2**20 else 2 if count < 2**30 else 3
    value = count / 1024**unit
    return f"{value:.{3 if value < 999.5 else 4}g} {'BKMG'[unit]}iB"  # up to 1024 before the next unit


def shape_text(shape: tuple[int, ...], scalar: str = "1") -> str:
    """A shape in few characters: 32×10."""
    return "×".join(map(str, shape)) if shape else scalar


def cell(value: Any) -> str:
    """What stands in a cell of a table: words as they are, numbers short, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, (str, bool)):
        return str(value)
    array = plain_array(value)
    return number(array[()]) if array.ndim == 0 else "[" + ", ".join(cells(array.reshape(-1))) + "]"


def table_cells(rows: Any, columns: int) -> list[list[str]]:
    """The text of every cell of a table; the numbers of a column have the same decimals, where that suits them all."""
    found = [[cell(value) for value in row] for row in rows]
    for i in range(columns):
        scalars = [(n, row[i]) for n, row in enumerate(rows) if row[i] is not None and not isinstance(row[i], (str, bool))]
        arrays = [plain_array(value) for _, value in scalars]
        if arrays and all(a.ndim == 0 and a.dtype.kind == "f" for a in arrays):
            for (n, _), text in zip(scalars, cells(np.array([float(a) for a in arrays]))):
                found[n][i] = str(text)
    return found


def right_aligned(rows: Any, columns: int) -> list[bool]:
    """For each column of a table whether it holds numbers alone."""
    return [all(r[i] is None or not isinstance(r[i], (str, bool)) for r in rows) and bool(rows) for i in range(columns)]


def is_small(array: np.ndarray) -> bool:
    """Whether an array is shown in full."""
    if array.ndim == 0:
        return True
    fits = 0 < array.size <= ELEMENTS and array.shape[-1] <= COLUMNS and array.size // array.shape[-1] <= LINES
    return fits and (len([n for n in array.shape[:-1] if n > 1]) <= 1 or array.size <= 16)


def cells(array: np.ndarray, digits: int = 6) -> np.ndarray:
    """The text of each element, all with the same number of decimals, so that columns align."""
    flat = array.reshape(-1)
    if array.dtype.kind in "biuc":
        texts = [number(v, digits) for v in flat]
    else:
        sizes = np.abs(flat[np.isfinite(flat) & (flat != 0)])
        largest, smallest = (float(sizes.max()), float(sizes.min())) if sizes.size else (1.0, 1.0)
        decimals = min(max(digits - 1 - math.floor(math.log10(largest)), 0), 15)
        if 1e-4 <= largest < 10 ** max(digits, 6) and smallest >= 10 * 10.0**-decimals:
            idle = min((_idle(f"{v:.{decimals}f}") for v in flat if math.isfinite(v)), default=0)
            texts = [_fixed(v, decimals - idle, digits) for v in flat]
        else:
            texts = [number(v, digits) for v in flat]
    return np.array(texts, dtype=object).reshape(array.shape)


def _idle(text: str) -> int:
    return len(text) - len(text.rstrip("0")) if "." in text else 0


def _fixed(value: float, decimals: int, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return number(value, digits)
    return f"{value:.{decimals}f}".replace("-", "−")


@dataclasses.dataclass(frozen=True)
class Summary:
    """A large array in a line. ``bad`` counts the elements that are not finite; the other numbers leave them out."""

    shape: str
    smallest: float
    mean: float
    largest: float
    norm: float
    first: tuple[str, ...]
    bad: int


def summary(array: np.ndarray, first: int = 5, digits: int = 4) -> Summary:
    """The summary of an array of any size."""
    values = np.abs(array) if array.dtype.kind == "c" else array.astype(np.float64)
    good = values[np.isfinite(values)]
    least, mean, most, norm = (f(good) if good.size else math.nan for f in (np.min, np.mean, np.max, np.linalg.norm))
    texts = cells(array.reshape(-1)[:first], digits) if array.size else np.array([], object)
    bad = int(values.size - good.size)
    return Summary(shape_text(array.shape), float(least), float(mean), float(most), float(norm), tuple(texts), bad)


# Blue below zero, white at zero, red above; grey where not finite.
_LEVELS = 15
_NEGATIVE, _POSITIVE = (33, 102, 172), (178, 24, 43)


def _palette() -> list[int]:
    colours: list[int] = []
    for level in range(-_LEVELS, _LEVELS + 1):
        end, share = (_POSITIVE if level > 0 else _NEGATIVE), abs(level) / _LEVELS
        colours += [round(248 + (c - 248) * share) for c in end]
    return [*colours, 128, 128, 128]


def heat_map(array: np.ndarray, kernel: bool = False, rows: int = 16, columns: int = 28) -> tuple[bytes, int, int]:
    """A small picture (PNG) of an array: rows of its last axis, averaged where there are many; (content, width, height).

    Of images the first one, with its channels side by side; of the ``kernel`` of a convolution one filter beside the other.
    """
    from PIL import Image

    flat = _flattened(np.real(array).astype(np.float64), kernel)
    flat = _averaged(_averaged(flat, rows, 0), columns, 1)
    most = np.abs(flat[np.isfinite(flat)]).max(initial=0)
    levels = np.full(flat.shape, 2 * _LEVELS + 1, np.uint8)
    good = np.isfinite(flat)
    levels[good] = np.rint(flat[good] / (most or 1) * _LEVELS).astype(int) + _LEVELS
    height, width = flat.shape
    picture = Image.frombytes("P", (width, height), levels.tobytes())
    picture.putpalette(_palette())
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue(), width, height


def _flattened(array: np.ndarray, kernel: bool) -> np.ndarray:
    """With two axes."""
    if array.ndim == 4 and kernel:
        kernels = array.reshape(*array.shape[:2], -1)[:, :, :8]  # [H, W, I · O]
        return np.concatenate([np.pad(kernels[..., i], ((0, 0), (0, 1))) for i in range(kernels.shape[2])], 1)[:, :-1]
    if array.ndim == 4:
        image = array[0, :, :, :2]
        return np.concatenate(list(np.moveaxis(image, -1, 0)), 1)
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _averaged(array: np.ndarray, count: int, axis: int) -> np.ndarray:
    if array.shape[axis] <= count:
        return array
    edges = np.linspace(0, array.shape[axis], count, endpoint=False).astype(int)
    widths = np.diff([*edges, array.shape[axis]])
    return np.add.reduceat(array, edges, axis) / np.expand_dims(widths, 1 - axis)
