"""What a preset is, and what becomes of it: data, model, loss, weights."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from fbackprop.layers import Layer
from fbackprop.training.fit import Fit

__all__ = ["Preset", "Task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """All that a run needs besides its options. ``examples`` are the training part: arrays, or windows of tokens."""

    model: Layer
    params: Any
    state: Any
    examples: dict[str, Any]
    loss_fn: Callable[..., Any]
    evaluate: Callable[[Any, Any], Mapping[str, Any]]
    fingerprint: str = ""  # of data that is not in the package
    held_out: int = 0  # examples that accuracy is measured on, 0 where none are held out
    before: tuple[str, ...] = ()  # lines to print before the first step
    after: Callable[[Fit], Sequence[str]] = lambda result: ()  # and after the last
    numbers: Callable[[Fit], dict[str, Any]] = lambda result: {}  # more for metrics.json
    files: Callable[[Fit], dict[str, str]] = lambda result: {}  # texts by the name of their file in the run's folder
    recipe: dict[str, Any] | None = None  # of which the model can be made without the data, for config.json
    unit: tuple[str, int] = ("examples", 1)  # as for ``fit``
    evaluate_every: int | None = None  # as for ``fit``
    check_on: int | None = None  # how many examples of the first batch the gradient is checked on; None: all

    @property
    def count(self) -> int:
        """How many examples there are to train on."""
        return len(next(iter(self.examples.values())))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named thing to train, with its default options. ``batch`` 0 means all examples; one of steps, epochs is None."""

    name: str
    summary: str
    task: Callable[[int], Task]  # of the seed
    optimizer: str
    lr: float
    batch: int
    steps: int | None = None
    epochs: int | None = None
    dtype: str = "float32"
    half_life: int | None = None  # epochs in which the rate halves; None: it stays
    schedule: Callable[[float, int], optax.ScalarOrSchedule] | None = None  # of lr and steps an epoch, in place of half_life
    sized: "Callable[[Mapping[str, Any]], Preset] | None" = None  # the same with a model of another size

    def rate(self, lr: float, per_epoch: int) -> optax.ScalarOrSchedule:
        """The learning rate as a function of the step. It knows nothing of the end of the run: a run that is extended
        takes the steps of one that was as long from the beginning."""
        if self.schedule is not None:
            return self.schedule(lr, per_epoch)
        if self.half_life is None:
            return lr
        warm, decay = per_epoch, 0.5 ** (1 / (self.half_life * per_epoch))
        return lambda step: lr * jnp.minimum((step + 1) / warm, 1.0) * jnp.maximum(decay**step, 0.01)
