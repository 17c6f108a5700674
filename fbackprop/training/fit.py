"""A whole run: batches in an order that the seed decides, evaluation, history, checkpoints, curves.

What happens at step k depends on the arguments and on k alone: the order of the examples on (seed, epoch), every random
number on (seed, k). A run that was stopped, anywhere, and resumed therefore ends with the parameters of one that never
stopped, bit for bit.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fbackprop.files import read_json, write_json
from fbackprop.training.batches import Batches
from fbackprop.training.checkpoints import Checkpoints, RunError
from fbackprop.training.monitor import Monitor, make_look
from fbackprop.training.progress import Reporter, interrupts, peak_bytes
from fbackprop.training.step import LossFn, TrainState, init_train_state, make_step

__all__ = ["Fit", "History", "Stopped", "fit"]

Evaluate = Callable[[Any, Any], Mapping[str, Any]]

_FETCH_EVERY = 64  # steps between two looks at the metrics, which wait for the device;
_FETCH_SECONDS = 2.0  # or so much time, where steps take long
_SAVE_SECONDS = 10.0  # between two checkpoints, where no number of steps is given


class History(NamedTuple):
    """``steps``: each metric's value at every step, from the first one on (``loss[k]``: before update k + 1).
    ``evaluations``: what ``evaluate`` gave, with the number of updates done then as ``step``. ``looks``: what is kept of
    each look of the monitor (``fbackprop.diagnosing.course``)."""

    steps: dict[str, list[float]]
    evaluations: list[dict[str, float]]
    looks: list[dict[str, Any]]


class Fit(NamedTuple):
    """What a run leaves: parameters and model state, all of the train state, the history and the summary."""

    params: Any
    state: Any
    train_state: TrainState
    history: History
    metrics: dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A run that was interrupted, after its checkpoint was written. ``step`` is the number of updates done."""

    def __init__(self, step: int, total: int, directory: pathlib.Path | None):
        where = (
            f"the checkpoint lies in {directory}, and resume=True continues"
            if directory
            else "no directory was given to keep it in"
        )
        super().__init__(f"stopped at step {step} of {total}; {where}.")
        self.step, self.total, self.directory = step, total, directory


def fit(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Any,
    data: Any,
    *,
    state: Any = (),
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    shuffle: bool = True,
    accumulate: int = 1,
    dtype: Any = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    directory: str | pathlib.Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
    title: str = "training",
    config: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    seconds_before: float = 0.0,
    unit: tuple[str, int] = ("examples", 1),
    monitor: int | None = None,
) -> Fit:
    """Trains, and writes ``metrics.json``, ``curves.png`` and ``checkpoints/`` into ``directory`` if there is one.

    Args:
      loss_fn, optimizer, accumulate, dtype: as for ``make_step``.
      params, state: where the run begins. They are copied.
      data: a pytree of arrays with one leading axis, the examples; a batch is the same pytree, of ``batch_size`` of them.
      steps, epochs: how long; one of the two. An epoch has ⌊examples / batch_size⌋ steps: the examples left over are
        left out, others in each epoch.
      seed: decides the order of the examples and every random number.
      shuffle: False takes the examples as they come.
      evaluate: ``(params, state) -> {name: number}``, called every ``evaluate_every`` steps (by default at the ends of
        about twenty epochs) and at the end. Names that end in "loss" or "accuracy" are drawn.
      resume: continue the run in ``directory``; where it has no checkpoint yet, from the beginning; a complete run is
        returned as it is. ``steps`` and
        ``epochs`` may differ from before, all else must be as it was.
      checkpoint_every: in steps; by default every ten seconds. One is written at the end, and on Ctrl-C, always.
      config: written into ``directory`` as ``config.json``, for whoever resumes the run.
      title, notes, seconds_before: the head of bar and picture, more for ``metrics.json``, time to add to its ``seconds``.
      unit: what throughput is told in, and how many of them an example is: ("tokens", 1024).
      monitor: every so many steps a look at the step: gradient norms and gains of the layers, updates, dead and saturated
        units; and one at a batch that was skipped, for what is not finite first. What they find is told when it is found,
        and stands in ``metrics["health"]``; ``directory`` receives ``health.png``. The steps stay the same, bit for bit.
    Raises:
      ValueError: for arguments out of range; RunError where ``directory`` holds a run and ``resume`` is false, or a
        run of another model or with other options. Nothing is written then.
      Stopped: on Ctrl-C (a KeyboardInterrupt), after the checkpoint, the metrics and the curves were written.
    """
    examples, total = _checked(data, steps, epochs, batch_size, evaluate_every, checkpoint_every, monitor)
    options = {"examples": examples, "batch_size": batch_size, "seed": seed, "shuffle": shuffle, "accumulate": accumulate}
    options["dtype"] = None if dtype is None else str(np.dtype(dtype))
    started = time.perf_counter() - seconds_before
    train = init_train_state(params, optimizer, state=state, key=seed)
    place = None if directory is None else _Place(pathlib.Path(directory), options)
    history = History({}, [], [])
    if place is not None:
        train, history, seconds = place.start(train, resume, total)
        started -= seconds
    per_epoch = examples // batch_size
    if evaluate_every is None:
        evaluate_every = per_epoch * -(-total // (20 * per_epoch))
    run = _Run(
        step=make_step(loss_fn, optimizer, accumulate=accumulate, dtype=dtype),
        batches=Batches(data, examples, batch_size, seed, shuffle),
        train=train, done=int(train.step), total=total, history=history, pending=[], evaluate=evaluate,
        evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, place=place, started=started,
        title=title, notes=dict(notes or {}), unit=(unit[0], unit[1] * batch_size),
        monitor=None if monitor is None else Monitor(
            monitor, make_look(loss_fn, optimizer, accumulate=accumulate, dtype=dtype), history.looks, batch_size == examples
        ),
    )  # fmt: skip
    if place is not None and run.done == total and (finished := place.finished(total)) is not None:
        return Fit(train.params, train.state, train, history, finished)
    if place is not None and config is not None:
        place.directory.mkdir(parents=True, exist_ok=True)
        write_json(place.directory / "config.json", dict(config))
    with Reporter(title, total, run.done, progress) as reporter:
        run.go(reporter)
    return Fit(run.train.params, run.train.state, run.train, run.history, run.summary())


@dataclasses.dataclass
class _Run:
    step: Callable[..., Any]
    batches: Batches
    train: TrainState
    done: int
    total: int
    history: History
    pending: list[dict[str, jax.Array]]  # metrics that are still on the device
    evaluate: Evaluate | None
    evaluate_every: int
    checkpoint_every: int | None
    place: "_Place | None"
    started: float
    title: str
    notes: dict[str, Any]
    unit: tuple[str, int]  # what a step takes in
    monitor: Monitor | None
    saved_at: float = 0.0
    looked: tuple[int, float] | None = None  # the step and the time of the last look; None before the first step
    timed: tuple[int, float] = (0, 0.0)  # steps and seconds without compiling, evaluations and checkpoints

    def go(self, reporter: Reporter) -> None:
        self.saved_at = time.perf_counter()
        try:
            with interrupts() as asked:
                while self.done < self.total:
                    batch = self.batches(self.done)
                    if self.monitor is not None:
                        self.monitor.before_step(self.train, batch, self.done)
                    self.train, metrics = self.step(self.train, batch)
                    self.done += 1
                    self.pending.append(metrics)
                    if self.looked is None:
                        jax.block_until_ready(metrics)  # the first step compiles
                        self._look()
                    if len(self.pending) >= _FETCH_EVERY or self._waited():
                        self._fetch(reporter)
                    if asked.is_set():
                        raise KeyboardInterrupt
                    if self.done % self.evaluate_every == 0 or self.done == self.total:
                        self._evaluate(reporter)
                    if self._due() and self.done < self.total:
                        self._save(reporter)
                if self.evaluate and not (self.history.evaluations and self.history.evaluations[-1]["step"] == self.done):
                    self._evaluate(reporter)
                self._save(reporter)
                self._write(complete=True)
        except KeyboardInterrupt:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.train)) or int(self.train.step) != self.done:
                raise  # interrupted twice, inside a step: what is left is the last checkpoint
            self._save(reporter)
            self._write(complete=False)
            raise Stopped(self.done, self.total, self.place and self.place.directory) from None

    def summary(self, complete: bool = True) -> dict[str, Any]:
        steps, last = self.history.steps, (self.history.evaluations or [{}])[-1]
        return {
            "steps": self.done,
            "epochs": self.done / self.batches.per_epoch,
            "complete": complete,
            "seconds": round(time.perf_counter() - self.started, 3),
            "loss": steps["loss"][-1] if steps else None,
            "grad_norm": steps["grad_norm"][-1] if steps else None,
            "skipped_steps": int(self.train.skipped),
            f"{self.unit[0]}_per_second": self._rate(),
            "peak_memory_bytes": peak_bytes(),
            **{name: value for name, value in last.items() if name != "step"},
            **self.notes,
            **({"health": self.monitor.summary()} if self.monitor is not None else {}),
            "evaluations": self.history.evaluations,
        }

    def _due(self) -> bool:
        if self.checkpoint_every is not None:
            return self.done % self.checkpoint_every == 0
        return time.perf_counter() - self.saved_at > _SAVE_SECONDS

    def _fetch(self, reporter: Reporter) -> None:
        first = self.done - len(self.pending)
        rows, self.pending = jax.device_get(self.pending), []
        bad = []
        for step, row in enumerate(rows, first + 1):
            for name, value in row.items():
                self.history.steps.setdefault(name, []).append(float(value))
            if row["skipped"]:
                bad.append(step)
        if bad:
            which = f"step {bad[0]}" if len(bad) == 1 else f"{len(bad)} steps from {bad[0]} to {bad[-1]}"
            reporter.line(f"{which} skipped: the gradient is not finite ({int(self.train.skipped)} skipped so far).")
        if self.monitor is not None:
            if bad:
                self.monitor.after_skip(self.train, self.batches(bad[0] - 1), bad[0], self.done)
            for line in self.monitor.news():
                reporter.line(line)
        if self.looked is not None:
            step, at = self.looked
            self.timed = self.timed[0] + self.done - step, self.timed[1] + time.perf_counter() - at
        self._look()
        reporter.advance(self.done, self._last(), self._speed())

    def _waited(self) -> bool:
        return self.looked is not None and time.perf_counter() - self.looked[1] > _FETCH_SECONDS

    def _look(self) -> None:
        self.looked = self.done, time.perf_counter()

    def _last(self) -> dict[str, float]:
        return {name: self.history.steps[name][-1] for name in ("loss", "grad_norm") if name in self.history.steps}

    def _rate(self) -> float | None:
        steps, seconds = self.timed
        return round(steps * self.unit[1] / seconds, 1) if steps and seconds else None

    def _speed(self) -> str:
        return "" if self._rate() is None else f"{self._rate():,.0f} {self.unit[0]}/s"

    def _evaluate(self, reporter: Reporter) -> None:
        self._fetch(reporter)
        if self.evaluate is None:
            return
        values = {name: float(value) for name, value in self.evaluate(self.train.params, self.train.state).items()}
        self.history.evaluations.append({"step": self.done, **values})
        reporter.evaluation(self.done, self.total, {**self._last(), **values}, self._speed())
        self._look()

    def _save(self, reporter: Reporter) -> None:
        self._fetch(reporter)
        self.saved_at = time.perf_counter()
        if self.place is not None:
            self.place.save(self.train, self.history, self.saved_at - self.started)
        self._look()

    def _write(self, complete: bool) -> None:
        if self.place is None:
            return
        from fbackprop.training.curves import draw

        draw(self.history, self.place.directory / "curves.png", self.title)
        if self.monitor is not None:
            self.monitor.draw(self.place.directory / "health.png", self.title)
        write_json(self.place.directory / "metrics.json", self.summary(complete))


class _Place:
    """The folder of a run."""

    def __init__(self, directory: pathlib.Path, options: dict[str, Any]):
        self.directory, self.options = directory, options
        self._checkpoints = Checkpoints(directory / "checkpoints")

    def start(self, train: TrainState, resume: bool, total: int) -> tuple[TrainState, History, float]:
        """Where the run begins: as given, or at the newest checkpoint."""
        last = self._checkpoints.latest()
        if not resume and (last is not None or (self.directory / "metrics.json").exists()):
            raise RunError(f"{self.directory} holds a run already; give another directory, or resume=True to continue it.")
        if last is None:
            return train, History({}, [], []), 0.0
        record = self._checkpoints.record()
        for name, value in self.options.items():
            if name not in record["options"] or record["options"][name] != value:
                raise RunError(f"{self.directory} holds a run with {name} {record['options'].get(name)!r}, not {value!r}.")
        if last > total:
            raise RunError(f"{self.directory} holds a run of {last} steps already; {total} are fewer.")
        history = History(record["steps"], record["evaluations"], record.get("looks", []))
        return self._checkpoints.restore(train), history, record["seconds"]

    def finished(self, total: int) -> dict[str, Any] | None:
        """The metrics of a run that was completed with so many steps."""
        metrics = read_json(self.directory / "metrics.json") or {}
        return metrics if metrics.get("complete") is True and metrics.get("steps") == total else None

    def save(self, train: TrainState, history: History, seconds: float) -> None:
        if self._checkpoints.latest() != int(train.step):
            self._checkpoints.save(train, {**history._asdict(), "options": self.options, "seconds": seconds})


def _checked(
    data: Any,
    steps: int | None,
    epochs: int | None,
    batch_size: int,
    evaluate_every: int | None,
    checkpoint_every: int | None,
    monitor: int | None,
) -> tuple[int, int]:
    """The number of examples and of steps."""
    shapes = {jax.tree_util.keystr(path) or "data": np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(data)}
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(f"fit: the arrays of data have the shapes {shapes}; expected one leading axis, of the examples.")
    examples = counts.pop()[0]
    if (steps is None) == (epochs is None):
        raise ValueError(f"fit: steps is {steps} and epochs is {epochs}; expected one of the two.")
    numbers = {"steps": steps, "epochs": epochs, "evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    numbers["monitor"] = monitor
    for name, value in {**numbers, "batch_size": batch_size}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"fit: {name} is {value!r}; expected a whole number, 1 or more.")
    if batch_size > examples:
        raise ValueError(f"fit: batch_size is {batch_size}, more than the {examples} examples.")
    return examples, steps if steps is not None else (epochs or 0) * (examples // batch_size)
