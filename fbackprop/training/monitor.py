"""The monitor of a run: a look at one of its steps, compiled once and run beside the step, which stays as it is.

A look is a program of its own that computes the gradient of the step again, with taps in it (``fbackprop.diagnosing.looks``).
Between looks it costs nothing, and the run takes the same steps, bit for bit, with and without it. (Under ``lax.cond``
inside the step, the other way, the branch ran fifteen times slower on a CPU: XLA does not compile its convolutions well.)
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from fbackprop.diagnosing import course
from fbackprop.diagnosing.calls import discover
from fbackprop.diagnosing.looks import Look, look
from fbackprop.training.step import LossFn, TrainState, _floating, _objective, _split

__all__ = ["Monitor", "make_look"]


def make_look(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulate: int = 1, dtype: DTypeLike | None = None
) -> Callable[..., Look]:
    """Gives the jitted ``(train_state, batch, thorough=False) -> Look`` at the step that ``make_step``'s would take from there.

    It donates nothing and changes nothing. Where a step has several micro-batches, the look is at the first of them.

    Args:
      loss_fn, optimizer, accumulate, dtype: as for ``make_step``.
    """
    objective = _objective(loss_fn, None if dtype is None else _floating(dtype))
    update = optax.with_extra_args_support(optimizer).update

    @functools.partial(jax.jit, static_argnames="thorough")
    def looking(train: TrainState, batch: Any, thorough: bool = False) -> Look:
        key = jax.random.fold_in(train.key, train.step)
        if accumulate > 1:
            batch = jax.tree.map(lambda leaf: leaf[0], _split(batch, accumulate))
            key = jax.random.fold_in(key, 0)
        args = (batch, train.state, key)

        def updates(grads: Any, value: Any) -> Any:
            extra = {"value": value, "grad": grads, "value_fn": lambda p: objective(p, *args)[0]}
            return update(grads, train.opt_state, train.params, **extra)[0]

        return look(objective, train.params, args, discover(objective, train.params, args), updates, thorough=thorough)

    return looking


class Monitor:
    """The looks of a run: one every so many steps, one at what was skipped; and the rows that are kept of them."""

    def __init__(self, every: int, look: Callable[..., Look], rows: list[dict[str, Any]], always_the_same: bool = False):
        self.every, self.rows, self._same = every, rows, always_the_same
        self._look = look
        self._pending: list[tuple[int, int, Look]] = []  # step, steps done, a look that is still on the device

    def before_step(self, train: TrainState, batch: Any, done: int) -> None:
        """Looks at the step that is about to be taken, where one is due."""
        if done % self.every == 0:
            self._pending.append((done + 1, done, self._look(train, batch)))

    def after_skip(self, train: TrainState, batch: Any, step: int, done: int) -> None:
        """Looks at a batch whose step was skipped: with the parameters of then, if all steps since were skipped too."""
        then = train._replace(step=jnp.asarray(step - 1, jnp.int32))
        self._pending.append((step, done, self._look(then, batch, thorough=True)))

    def news(self) -> Iterator[str]:
        """Keeps a row of each look, and says what is found for the first time."""
        looks, self._pending = jax.device_get(self._pending), []
        for step, done, seen in looks:
            if done < step and not np.isfinite(seen["gradient"]).all():
                continue  # the step is skipped: a thorough look follows
            row = course.row(int(step), seen, self.rows[-1] if self.rows else None, self._same)
            if done >= step and not row["findings"]:
                message = f"step {step} was skipped; with the parameters of step {done} the same batch gives finite numbers."
                row["findings"] = [{"kind": "non-finite backward", "layer": "", "message": message,
                                    "cause": "not found: the parameters had moved on when it was looked at."}]  # fmt: skip
            known = {(found["kind"], found["layer"]) for found in course.told(self.rows)}
            self.rows.append(row)
            for found in row["findings"]:
                if (found["kind"], found["layer"]) not in known:
                    yield f"step {step}: {found['kind']}: {found['message']}"

    def summary(self) -> dict[str, Any]:
        """For metrics.json."""
        return course.summary(self.rows)

    def draw(self, path: pathlib.Path, title: str) -> None:
        """Layers × looks, as a picture."""
        if self.rows:
            from fbackprop.diagnosing.pictures import draw_course

            draw_course(self.rows, path, title)
