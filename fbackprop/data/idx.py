"""Files in the IDX format, that of MNIST: images in one, their labels in another beside it, plain or compressed by gzip.

0 0 type axes   size of each axis, 4 bytes, the highest first   the elements, row by row
"""

import gzip
import math
import pathlib
import re
import struct
import zlib

import numpy as np

from fbackprop.data.datasets import DataError, Dataset, checked_labels, classification, held_out_fifth
from fbackprop.data.lazy import Images, page_digest

__all__ = ["is_idx", "load_idx"]

_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def is_idx(path: str | pathlib.Path) -> bool:
    """Whether a name is one of an IDX file: ``train-images-idx3-ubyte``, ``images.idx3-ubyte.gz``, ``images.idx``."""
    return re.search(r"[-.]idx\d?(-ubyte)?(\.gz)?$", pathlib.Path(path).name) is not None


def load_idx(path: str | pathlib.Path) -> Dataset:
    """Reads images and their labels.

    Args:
      path: the file of the images, with "images" in its name; the labels are in the file called "labels" in its place, and idx1
        in the place of idx3. Of pixels of a byte that are not compressed a batch is read at a time. Where the name begins with
        "train" and the files with "t10k" or "test" in its place are there, these are held out; else a fifth is.
    Raises:
      DataError: with one sentence, where a file is missing, malformed or not what was expected.
    """
    path = pathlib.Path(path)
    x, y = _pair(path)
    for other in ("t10k", "test"):
        test = path.with_name(path.name.replace("train", other, 1))
        if path.name.startswith("train") and test.is_file():
            return _with_test(path, x, y, *_pair(test))
    if x.dtype != np.uint8:
        return classification(str(path), x, y)
    labels = checked_labels(str(path), np.asarray(y))
    train, held_out = held_out_fifth(labels)
    digest = f"{page_digest(x)}-{page_digest(labels)}"
    return Dataset(str(path), Images(x, train), labels[train], Images(x, held_out), labels[held_out], _classes(labels), digest)


def _with_test(path: pathlib.Path, x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> Dataset:
    labels, test_labels = checked_labels(str(path), np.asarray(y)), np.asarray(test_y).astype(np.int32)
    classes = _classes(labels)
    if x.dtype != np.uint8 or test_x.dtype != np.uint8 or test_x.shape[1:] != x.shape[1:]:
        raise DataError(
            f"{path}: the images are {x.dtype} {x.shape[1:]} and those held out {test_x.dtype} {test_x.shape[1:]}; expected "
            "bytes of one shape."
        )
    if test_labels.size and not 0 <= test_labels.min() <= test_labels.max() < classes:
        raise DataError(f"{path}: the labels held out go up to {test_labels.max()}; expected the {classes} classes trained on.")
    both = "-".join(page_digest(array) for array in (x, labels, test_x, test_labels))
    train, held_out = np.arange(len(x)), np.arange(len(test_x))
    return Dataset(str(path), Images(x, train), labels, Images(test_x, held_out), test_labels, classes, both)


def _classes(labels: np.ndarray) -> int:
    return int(labels.max()) + 1


def _pair(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    if "images" not in path.name:
        raise DataError(f"{path}: the name has no 'images' in it; expected the file of the images, with 'labels' beside it.")
    beside = path.with_name(re.sub(r"idx\d", "idx1", path.name.replace("images", "labels")))
    x, y = read_idx(path), read_idx(beside)
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise DataError(f"{path}: the images have shape {x.shape}; expected [N, H, W] or [N, H, W, C], none of them 0.")
    if y.shape != x.shape[:1]:
        raise DataError(f"{beside}: the labels have shape {y.shape}; expected ({len(x)},), one for each image of {path.name}.")
    if y.dtype.kind not in "iu":
        raise DataError(f"{beside}: the labels are {y.dtype}; expected integers.")
    return x, y


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array in an IDX file; mapped into memory where it is not compressed."""
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
            shape, kind, start = _head(path, content[: 4 + 4 * 255], len(content))
            return np.frombuffer(content, kind, math.prod(shape), start).reshape(shape)
        with path.open("rb") as file:
            head = file.read(4 + 4 * 255)
        shape, kind, start = _head(path, head, path.stat().st_size)
        return np.memmap(path, kind, "r", start, shape) if math.prod(shape) else np.empty(shape, kind)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the file is not compressed by gzip, or not whole ({str(error).rstrip('.')}).") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error}).") from None


def _head(path: pathlib.Path, head: bytes, size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and where the elements begin."""
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or len(head) < 4 + 4 * head[3]:
        raise DataError(f"{path}: this is not an IDX file; it begins with {head[:4].hex(' ') or 'nothing'}.")
    kind, start = np.dtype(_TYPES[head[2]]), 4 + 4 * head[3]
    shape = struct.unpack(f">{head[3]}I", head[4:start])
    if size != (expected := start + math.prod(shape) * kind.itemsize):
        raise DataError(f"{path}: there are {size} bytes; expected {expected}, for an array {kind.name} {shape}.")
    return shape, kind, start
