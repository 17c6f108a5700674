"""The examples in batches, in an order that the seed decides."""

from typing import Any

import jax
import numpy as np

from fbackprop.data import Lazy

__all__ = ["Batches"]


class Batches:
    """``batches(k)`` is the batch of step k, whatever came before: the order of the examples follows from (seed, epoch)."""

    def __init__(self, data: Any, examples: int, batch_size: int, seed: int, shuffle: bool):
        self._data = jax.tree.map(lambda leaf: leaf if isinstance(leaf, Lazy) else np.asarray(leaf), data)
        self._examples, self._size = examples, batch_size
        self._seed, self._shuffle = seed, shuffle
        self.per_epoch = examples // batch_size
        self._epoch, self._order = -1, np.arange(examples)

    def __call__(self, step: int) -> Any:
        epoch, index = divmod(step, self.per_epoch)
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._examples)
        chosen = self._order[index * self._size : (index + 1) * self._size]
        return jax.tree.map(lambda array: array[chosen], self._data)
