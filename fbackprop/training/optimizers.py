"""The optimizers that the command offers by name. All of them are optax's."""

import difflib
from collections.abc import Callable

import optax

__all__ = ["OPTIMIZERS", "make_optimizer"]

OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: optax.adam(rate),
    "adamw": lambda rate: optax.adamw(rate),
    "nadam": lambda rate: optax.nadam(rate),
    "radam": lambda rate: optax.radam(rate),
    "lamb": lambda rate: optax.lamb(rate),
    "lion": lambda rate: optax.lion(rate),
    "rmsprop": lambda rate: optax.rmsprop(rate),
    "adagrad": lambda rate: optax.adagrad(rate),
    "adabelief": lambda rate: optax.adabelief(rate),
}
"""Name -> function of the learning rate, a number or an optax schedule."""


def make_optimizer(name: str, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The optimizer of that name.

    Raises:
      ValueError: for a name that is not in ``OPTIMIZERS``, with the nearest one that is.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no optimizer {name!r}{hint}; known are {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name](rate)
