"""What stands where an array would, and reads rows when they are asked for."""

import hashlib
from typing import Any

import numpy as np

__all__ = ["Images", "Lazy", "Windows", "page_digest"]


class Lazy:
    """Rows along the first axis of an array of this shape and dtype, made when they are asked for: ``rows[indices]``."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> np.ndarray:
        raise NotImplementedError


class Windows(Lazy):
    """A sequence of tokens as windows of ``length`` and the token after: window i is tokens[i · length : (i + 1) · length + 1].

    It stands for an array [windows, length + 1] of int32.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length
        self.shape = max(0, len(tokens) - 1) // length, length + 1

    def __getitem__(self, chosen: Any) -> np.ndarray:
        index = np.arange(len(self))[chosen]
        rows = [self.tokens[i * self.length : (i + 1) * self.length + 1] for i in np.ravel(index)]
        return np.reshape(rows, (*np.shape(index), self.length + 1)).astype(np.int32)


class Images(Lazy):
    """Some of the images of a file, pixels of a byte, as float32 in [0, 1]. It stands for an array [chosen, H, W, C]."""

    dtype = np.dtype(np.float32)

    def __init__(self, pixels: np.ndarray, chosen: np.ndarray):
        self.pixels, self.chosen = pixels if pixels.ndim == 4 else pixels[..., None], chosen
        self.shape = len(chosen), *self.pixels.shape[1:]

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self.pixels[self.chosen[chosen]].astype(np.float32) / 255


def page_digest(array: np.ndarray) -> str:
    """A fingerprint of the type of an array and of pages of it all over; not of every element, as there may be billions."""
    flat = array.reshape(-1)
    digest = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    for start in np.unique(np.linspace(0, max(0, len(flat) - 4096), 256).astype(int)):
        digest.update(np.ascontiguousarray(flat[start : start + 4096]).tobytes())
    return digest.hexdigest()[:16]
