"""A classification data set: checked, split into a training part and a fixed held-out fifth, and scaled.

The split depends on the labels alone, never on a seed, so that the accuracies of two runs can be compared.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

__all__ = ["DataError", "Dataset", "classification", "digits", "held_out_fifth"]


class DataError(ValueError):
    """Data that cannot be trained on. The message is one sentence that names what came and what was expected."""


class Dataset(NamedTuple):
    """Training and held-out examples: ``x`` [N, features] or [N, H, W, C] in float32, ``y`` [N] integers in [0, classes)."""

    name: str
    x: Any  # arrays, or images that are read when they are asked for
    y: np.ndarray
    test_x: Any
    test_y: np.ndarray
    classes: int
    fingerprint: str  # of the examples as they came: a resumed run must find the same ones

    @property
    def images(self) -> bool:
        return self.x.ndim == 4


def classification(name: str, x: Any, y: Any, *, scale: float | None = None) -> Dataset:
    """Checks examples and labels, holds a fifth of them out, and scales the inputs.

    Args:
      name: what the messages call the data.
      x: numbers [N, features], [N, H, W] or [N, H, W, C], all finite.
      y: integer labels [N], from 0, of at least two classes; whole numbers in a floating dtype are taken too.
      scale: the inputs are divided by it; None brings them to zero mean and unit deviation instead (of the training
        part; each feature by itself for flat inputs, all pixels together for images).
    Raises:
      DataError: for anything else.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise DataError(f"{name}: x has shape {x.shape}; expected [N, features], [N, H, W] or [N, H, W, C], none of them 0.")
    if y.shape != x.shape[:1]:
        raise DataError(f"{name}: y has shape {y.shape}; expected ({len(x)},), one label for each example of x {x.shape}.")
    for what, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: {what} holds values of dtype {array.dtype}; expected numbers.")
    if not np.isfinite(x).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(x))[0]))
        raise DataError(f"{name}: x holds {x[where]} at {list(where)}; expected finite numbers.")
    labels = checked_labels(name, y)
    digest = hashlib.sha256(repr((x.shape, x.dtype.str)).encode())
    digest.update(x.tobytes())
    digest.update(labels.tobytes())
    train, test = held_out_fifth(labels)
    inputs = x.astype(np.float64)
    if x.ndim == 3:
        inputs = inputs[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        if scale is None:
            axes = None if x.ndim > 2 else 0
            mean, deviation = inputs[train].mean(axes), inputs[train].std(axes)
            inputs = (inputs - mean) / np.where(deviation > 0, deviation, 1.0)
            inputs = np.where(np.isfinite(deviation), inputs, np.nan)
        else:
            inputs = inputs / scale
        inputs = inputs.astype(np.float32)
    if not np.isfinite(inputs).all():
        raise DataError(f"{name}: x holds values up to {np.abs(x).max():.3g}, too far apart to be scaled into float32.")
    classes = int(labels.max()) + 1
    return Dataset(name, inputs[train], labels[train], inputs[test], labels[test], classes, digest.hexdigest()[:16])


def checked_labels(name: str, y: np.ndarray) -> np.ndarray:
    """Labels as int32, refused where they are not integers from 0 of at least two classes."""
    if len(y) < 5:
        raise DataError(f"{name}: there are {len(y)} examples; expected at least 5, a fifth of which is held out.")
    if not np.isfinite(y).all() or (y != np.floor(y)).any():
        odd = y[~np.isfinite(y) | (y != np.floor(y))][0]
        raise DataError(f"{name}: the labels hold {odd}; expected integers from 0 to the number of classes − 1.")
    if y.min() < 0 or y.max() >= len(y):
        odd = y.min() if y.min() < 0 else y.max()
        raise DataError(
            f"{name}: the labels hold {odd:g}, out of range; expected integers from 0 to the number of classes − 1, "
            f"and no more classes than the {len(y)} examples."
        )
    if y.min() == y.max():
        raise DataError(f"{name}: every label is {y[0]:g}; expected at least two classes.")
    return y.astype(np.int32)


def held_out_fifth(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices (training, held out) of a stratified split that is the same on each call.

    labels [N] -> indices of about 4/5 N and 1/5 N examples, each sorted: within every class, in an order that is drawn
    once, every fifth example is held out.
    """
    drawn = np.random.RandomState(0).permutation(len(labels))
    order = np.lexsort((drawn, labels))
    held_out = np.zeros(len(labels), bool)
    held_out[order[2::5]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def digits(images: bool = False) -> Dataset:
    """Scikit-learn's handwritten digits: 1,797 images of 8×8 pixels, ten classes, in [0, 1]; flat or as [N, 8, 8, 1]."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return classification("digits", x.reshape(-1, 8, 8) if images else x, y, scale=16.0)
