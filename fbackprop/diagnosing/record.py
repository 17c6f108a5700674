"""``health``: a step of a training run looked at, judged, and the fixes tried."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fbackprop.diagnosing.findings import Finding, gains, judge
from fbackprop.diagnosing.fixes import with_trials
from fbackprop.diagnosing.looks import Look
from fbackprop.diagnosing.trials import Bench, Change, Trial, reach

if TYPE_CHECKING:
    import optax

__all__ = ["Health", "LayerHealth", "health", "layer_rows", "rate_sweep"]

SWEEP = tuple(10.0 ** (k / 2) for k in range(-4, 5))


class LayerHealth(NamedTuple):
    """A layer in numbers. NaN where one does not apply."""

    name: str
    gradient: float  # the norm of its parameters' gradient
    weight: float  # of its parameters
    update: float  # of the optimizer's update of them
    gain: float  # the norm of the cotangents of what it reads, over that of what it gives
    dead: float  # the largest share of dead units among its activations
    saturated: float  # the largest share of saturated elements
    dead_after: float  # the share of dead units after the step

    @property
    def ratio(self) -> float:
        """Update to weight."""
        return self.update / self.weight if self.weight else math.nan


@dataclasses.dataclass(frozen=True)
class Health:
    """What ``health`` found. ``str`` is a table; ``findings`` are data."""

    findings: tuple[Finding, ...]
    now: Look  # at the parameters as they are
    after: Look | None  # at those after one step; None where no rate or optimizer was given
    as_it_is: Trial | None  # the steps without a change
    rates: tuple[tuple[float, float], ...]  # (rate, or factor of it; loss after as many steps)
    rate: float | None

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def reach(self) -> float:
        """The norm of the cotangent of the first layer's output, over that of the last layer's."""
        return reach(self.now)

    @property
    def layers(self) -> tuple[LayerHealth, ...]:
        """The layers, in the order of their calls."""
        return layer_rows(self.now, self.after)

    def __str__(self) -> str:
        from fbackprop.diagnosing.tables import text

        return text(self)

    def plot(self, file: str | pathlib.Path) -> None:
        """Draws gradient norms and gains over depth, updates, and the loss over the rate, into a .png or .svg file."""
        from fbackprop.diagnosing.pictures import draw

        draw(self, pathlib.Path(file))


def health(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    rate: float | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    opt_state: Any = None,
    try_fixes: bool = True,
    steps: int = 20,
    seed: int = 0,
) -> Health:
    """Looks at one training step: norms, gains, dead and saturated units, what is not finite; and tries what would help.

    Args:
      loss: ``loss(params, *batch)`` gives a scalar, or a scalar and anything else. What it does by ops of this library is
        looked at call by call; of other code only the parameters' gradients are.
      params: a pytree of floating-point arrays. It is left alone, and so is all else: trials work on copies.
      batch: arrays, keys, whatever the loss takes.
      rate: the learning rate: that of plain gradient descent, or, beside ``optimizer``, the one that messages name.
      optimizer: any optax optimizer; opt_state: its state, by default that of its beginning. Without a rate and an
        optimizer no step is taken, and trials take theirs with Adam at 0.001.
      try_fixes: whether changes are tried for the findings, and rates from 1/100 to 100 times the one given.
      steps: how many steps a trial has, all of them on this batch.
      seed: decides the kernels of trials that draw them anew.
    Returns:
      A record; ``print`` it, or read ``findings`` and ``layers``.
    Raises:
      ValueError: where an argument is out of range, params holds no arrays, or the loss gives no scalar.
      TypeError: where params holds something that is not of floating-point numbers.
    """
    import optax  # when it is needed, not whenever fbackprop is imported

    _check(loss, params, rate, optimizer, opt_state, steps)
    known = rate is not None or optimizer is not None
    chosen = optimizer if optimizer is not None else optax.sgd(rate) if rate is not None else optax.adam(1e-3)
    bench = Bench(loss, params, batch, chosen, opt_state, rate, steps, seed)
    now, *stepped = bench.look(params, bench.opt_state)
    after = bench.look(*stepped)[0] if known else None
    findings = judge(now, after)
    as_it_is, rates = None, []
    if try_fixes:
        findings = [with_trials(finding, bench, now, known) for finding in findings]
        as_it_is = bench.trial(Change())
        if known:
            rates = [(factor * (rate or 1.0), loss) for factor, loss in bench.sweep(SWEEP)]
    return Health(tuple(findings), now, after, as_it_is, tuple(rates), rate)


def rate_sweep(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    rate: float,
    optimizer: "optax.GradientTransformation | None" = None,
    steps: int = 20,
    factors: Sequence[float] = SWEEP,
) -> tuple[tuple[float, float], ...]:
    """For each factor of the rate: the rate, and the loss after so many steps on this batch, on copies of the parameters.

    Args and errors as for ``health``; ``factors``: by default nine from 1/100 to 100.
    """
    import optax

    _check(loss, params, rate, optimizer, None, steps)
    bench = Bench(loss, params, batch, optax.sgd(rate) if optimizer is None else optimizer, None, rate, steps, 0)
    return tuple((rate * factor, value) for factor, value in bench.sweep(factors))


def layer_rows(now: Look, after: Look | None = None) -> tuple[LayerHealth, ...]:
    """A look, layer by layer."""
    rows = []
    for i, (layer, gain) in enumerate(zip(now.layout.layers, gains(now))):
        own = now.layout.of_layer(i)
        if not own and not layer.places:
            continue
        if layer.is_loss and not layer.places:
            continue
        gradient, weight, update = (float(now[name][i]) for name in ("gradient", "weight", "update"))
        then = math.nan if after is None else _most(after["dead"][own])
        rows.append(
            LayerHealth(layer.name, gradient, weight, update, gain, _most(now["dead"][own]), _most(now["saturated"][own]), then)
        )
    return tuple(rows)


def _most(shares: np.ndarray) -> float:
    known = shares[np.isfinite(shares)]
    return float(known.max()) if known.size else math.nan


def _check(loss: Any, params: Any, rate: Any, optimizer: Any, opt_state: Any, steps: Any) -> None:
    if not callable(loss):
        raise TypeError(f"health: expected a loss of params, got {type(loss).__name__}.")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("health: params holds no arrays.")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype") or not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            got = leaf.dtype if hasattr(leaf, "dtype") else type(leaf).__name__
            raise TypeError(f"health: params holds {got} at {name}; expected arrays of floating-point numbers.")
    if rate is not None and not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0):
        raise ValueError(f"health: rate is {rate!r}, expected a number above 0.")
    if optimizer is not None and not hasattr(optimizer, "update"):
        raise TypeError(f"health: optimizer is a {type(optimizer).__name__}, expected one of optax's, such as optax.sgd(0.1).")
    if opt_state is not None and optimizer is None:
        raise ValueError("health: opt_state is given without the optimizer that it is of.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"health: steps is {steps!r}, expected a whole number, 1 or more.")
