"""What ``fbackprop train`` does: preset and options, the check of the gradient, the run, the folder."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.data import Lazy
from fbackprop.diagnosing.course import diagnosis
from fbackprop.files import read_json, write_atomically, write_json
from fbackprop.loading import near
from fbackprop.training.batches import Batches
from fbackprop.training.checkpoints import RunError
from fbackprop.training.fit import Fit, Stopped, fit
from fbackprop.training.gradients import gradient_errors
from fbackprop.training.language import SIZE
from fbackprop.training.optimizers import make_optimizer
from fbackprop.training.presets import PRESETS, file_preset
from fbackprop.training.progress import percent
from fbackprop.training.tasks import Preset, Task

__all__ = ["DTYPES", "Options", "train"]

DTYPES = ("float32", "bfloat16", "float64")
_FILES = ("config.json", "metrics.json", "curves.png", "health.png", "samples.txt", "checkpoints")
_FREE = ("steps", "epochs", "versions")  # what may differ when a run is resumed


@dataclasses.dataclass(frozen=True)
class Options:
    """The options as they were given; None where they were not."""

    preset: str
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    dtype: str | None = None
    seed: int | None = None
    out: str | None = None
    resume: bool = False
    model: str | None = None
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    length: int | None = None
    health: int | None = None


def train(options: Options) -> int:
    """Runs the command and prints its results.

    Returns:
      0, or 130 where the run was interrupted (its checkpoint is written).
    Raises:
      ValueError (DataError, RunError among them): with one sentence, before anything was written.
    """
    started = time.perf_counter()
    preset = _preset(options.preset)
    if options.steps is not None and options.epochs is not None:
        raise RunError("--steps and --epochs are both given; expected one of the two.")
    directory = _directory(options)
    preset, size = _sized(preset, options, directory if options.resume else None)
    config = _config(options, preset, None if directory is None or not options.resume else directory)
    config |= {"size": size} if size else {}
    try:  # an unknown name is refused before the data are read
        make_optimizer(config["optimizer"], 1.0)
    except ValueError as error:
        raise RunError(str(error)) from None
    if config["dtype"] not in DTYPES:
        raise RunError(f"there is no dtype {config['dtype']!r} to train in; known are {', '.join(DTYPES)}.")
    with jax.enable_x64(True) if config["dtype"] == "float64" else contextlib.nullcontext():
        return _train(options, preset, config, directory, started)


def _train(options: Options, preset: Preset, config: dict[str, Any], directory: pathlib.Path | None, started: float) -> int:
    task = _in_dtype(preset.task(config["seed"]), np.float64 if config["dtype"] == "float64" else np.float32)
    count = task.count
    if options.batch is not None and options.batch > count:
        raise RunError(f"--batch {options.batch} is more than the {count} examples to train on.")
    config["batch"] = min(config["batch"] or count, count)
    config |= {"model": repr(task.model), "data": task.fingerprint}
    config |= {} if task.recipe is None else {"recipe": task.recipe}
    per_epoch = count // config["batch"]
    total = config["steps"] if config["steps"] is not None else config["epochs"] * per_epoch
    if options.resume and directory is not None:
        _require_same(config, directory)
    old = read_json(directory / "metrics.json") if options.resume and directory is not None else None
    complete = old is not None and old.get("complete") is True and old.get("steps") == total

    size = sum(np.size(leaf) for leaf in jax.tree.leaves(task.params))
    held_out = f", {task.held_out} held out" if task.held_out else ""
    notes: dict[str, Any] = {"preset": preset.name, "seed": config["seed"], "parameter_count": int(size)}
    notes |= {"device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})", "versions": config["versions"]}
    if not complete:
        print(f"{preset.name}: {count} examples{held_out}; {size} parameters; {config['optimizer']}, rate {config['lr']:g}, "
              f"batch {config['batch']}, {total} steps, {config['dtype']}, seed {config['seed']}")  # fmt: skip
        for line in task.before:
            print(line)
        notes |= _check(task, config)
    directory = _made(preset, directory)
    try:
        result = fit(
            task.loss_fn, make_optimizer(config["optimizer"], preset.rate(config["lr"], per_epoch)), task.params, task.examples,
            state=task.state, steps=total, batch_size=config["batch"], seed=config["seed"], shuffle=config["batch"] < count,
            dtype=config["dtype"] if config["dtype"] == "bfloat16" else None, evaluate=task.evaluate,
            evaluate_every=task.evaluate_every, unit=task.unit, directory=directory, resume=True, title=preset.name,
            config=config, notes=notes, monitor=options.health,
            seconds_before=0.0 if complete else time.perf_counter() - started,
        )  # fmt: skip
    except Stopped as stop:
        again = shlex.join(["fbackprop", "train", options.preset, "--out", str(directory), "--resume"])
        print(f"stopped at step {stop.step} of {stop.total}; to continue: {again}")
        return 130
    if complete:
        print(f"{directory} is complete ({total} of {total} steps), nothing to do; --steps or --epochs extends it.")
        return 0
    if extra := task.numbers(result):
        write_json(directory / "metrics.json", {**result.metrics, **extra})
    texts = task.files(result)
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    _print_results(task, result, directory, texts)
    return 0


def _preset(name: str) -> Preset:
    if name in PRESETS:
        return PRESETS[name]
    path = pathlib.Path(name)
    if path.exists() or path.suffix or os.sep in name:
        return file_preset(name)
    raise RunError(f"there is no preset {name!r}{near(name, PRESETS)}, or the path of a file.")


def _sized(preset: Preset, options: Options, resumed: pathlib.Path | None) -> tuple[Preset, dict[str, Any]]:
    """The preset with a model of the size that is asked for, by default that of the run that is resumed."""
    given = {name: getattr(options, name) for name in SIZE if getattr(options, name) is not None}
    saved = {} if resumed is None else (read_json(resumed / "config.json") or {}).get("size") or {}
    if given and preset.sized is None:
        raise RunError(f"--{next(iter(given))} is for language models; {preset.name} trains none.")
    for name, value in given.items() if resumed is not None else ():
        if saved.get(name) != value:
            began = saved.get(name, "the preset's")
            raise RunError(f"{resumed} cannot be resumed with --{name} {value}: the run began with {began}.")
    size = saved | given
    return (preset.sized(size) if size and preset.sized is not None else preset), size


def _directory(options: Options) -> pathlib.Path | None:
    """The folder that was named; None for a new one."""
    if options.out is None:
        if options.resume:
            raise RunError("--resume needs --out DIR, the run to continue.")
        return None
    directory = pathlib.Path(options.out)
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file; expected a folder for --out.")
    if options.resume and not (directory / "config.json").is_file():
        raise RunError(f"{directory} holds no run to resume (there is no config.json).")
    held = [name for name in _FILES if (directory / name).exists()]
    if held and not options.resume:
        raise RunError(f"{directory} holds a run already ({held[0]}); --resume continues it, another --out begins a new one.")
    return directory


def _config(options: Options, preset: Preset, resumed: pathlib.Path | None) -> dict[str, Any]:
    """The options of the run: as given, else those of the run that is resumed, else the preset's."""
    names = ("optimizer", "lr", "batch", "dtype", "seed", "steps", "epochs")
    config: dict[str, Any] = {"preset": preset.name, "seed": 0}
    config |= {name: getattr(preset, name) for name in names if name != "seed"}
    if resumed is not None:
        saved = read_json(resumed / "config.json")
        if saved is None or not set(names) <= set(saved):
            raise RunError(f"{resumed / 'config.json'} is not the record of a run.")
        _require_preset(preset, saved, resumed)
        config |= {name: saved[name] for name in names}
    config |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.steps is not None:
        config["epochs"] = None
    if options.epochs is not None:
        config["steps"] = None
    config["versions"] = {name: version(name) for name in ("fbackprop", "jax", "optax", "orbax-checkpoint")}
    return config


def _require_preset(preset: Preset, saved: dict[str, Any], directory: pathlib.Path) -> None:
    if saved.get("preset") != preset.name:
        raise RunError(f"{directory} holds a run of {saved.get('preset')}, not of {preset.name}.")


def _require_same(config: dict[str, Any], directory: pathlib.Path) -> None:
    """Refuses to resume a run with other options, another model or other data than it began with."""
    saved = read_json(directory / "config.json") or {}
    for name, value in config.items():
        if name in _FREE or saved.get(name) == value:
            continue
        if name in ("model", "data"):
            what = "the model is not the one" if name == "model" else "the data are not those"
            raise RunError(f"{directory} cannot be resumed: {what} that the run began with ({saved.get(name)}, now {value}).")
        raise RunError(f"{directory} cannot be resumed with --{name} {value}: the run began with {saved.get(name)}.")


def _in_dtype(task: Task, dtype: Any) -> Task:
    """The task with its parameters, state and examples of one floating-point type."""
    return dataclasses.replace(task, **{name: _cast(getattr(task, name), dtype) for name in ("params", "state", "examples")})


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Lazy):
            return leaf
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _check(task: Task, config: dict[str, Any]) -> dict[str, float]:
    """Compares the gradient on the first batch with that of the twin, prints the worst error and returns it."""
    count, seed = task.count, config["seed"]
    batch = Batches(task.examples, count, config["batch"], seed, config["batch"] < count)(0)
    batch = jax.tree.map(lambda array: array[: task.check_on], batch)
    dtype = config["dtype"] if config["dtype"] == "bfloat16" else None
    errors = gradient_errors(task.loss_fn, task.params, batch, state=task.state, key=seed, dtype=dtype)
    worst = float(np.max(list(errors.values())))
    found = {"gradient_check_max_error": worst}
    words = f"{worst:.1e} in {config['dtype']}"
    if config["dtype"] != "float64":
        with jax.enable_x64(True):
            wide = [_cast(tree, np.float64) for tree in (task.params, batch, task.state)]
            exact = gradient_errors(task.loss_fn, wide[0], wide[1], state=wide[2], key=seed)
        found["gradient_check_max_error_float64"] = float(np.max(list(exact.values())))
        words += f", {found['gradient_check_max_error_float64']:.1e} in float64"
    print(f"gradients  worst error {words}, against jax.grad of the definitions ({len(errors)} arrays, first batch)")
    return found


def _made(preset: Preset, directory: pathlib.Path | None) -> pathlib.Path:
    """The folder, made if need be; a new runs/PRESET-N where none was named."""
    number = 1
    while directory is None:
        path = pathlib.Path("runs") / f"{preset.name}-{number}"
        with contextlib.suppress(FileExistsError):
            _make(path, exist_ok=False)
            directory = path
        number += 1
    _make(directory, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise RunError(f"{directory}: this folder cannot be written to.")
    return directory


def _make(path: pathlib.Path, exist_ok: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise RunError(f"{path}: the folder cannot be made ({error.strerror or error}).") from None


def _print_results(task: Task, result: Fit, directory: pathlib.Path, texts: dict[str, str]) -> None:
    for line in task.after(result):
        print(line)
    metrics = result.metrics
    if "test_accuracy" in metrics:
        print(f"accuracy   {percent(metrics['test_accuracy'])} of {task.held_out} held-out examples")
    elif "accuracy" in metrics:
        print(f"accuracy   {percent(metrics['accuracy'])} of {task.count} rows")
    if metrics["skipped_steps"]:
        print(f"skipped    {metrics['skipped_steps']} of {metrics['steps']} steps, whose gradient was not finite")
    print(f"time       {metrics['seconds']:.1f} s for {metrics['steps']} steps, compiling included")
    unit = f"{task.unit[0]}_per_second"
    if metrics.get(unit):
        peak = metrics["peak_memory_bytes"] / 2**30
        print(f"speed      {metrics[unit]:,.0f} {task.unit[0]} a second; {peak:.2f} GiB at most")
    if "health" in metrics:
        for line in diagnosis(result.history.looks):
            print(line)
    names = ", ".join(["config.json", "metrics.json", "curves.png", *(["health.png"] if "health" in metrics else []), *texts])
    print(f"files      {directory}{os.sep}: {names}, checkpoints{os.sep}")
    for name, text in texts.items():
        print(f"{name}, its beginning:")
        print("\n".join(f"    {line}" for line in text.splitlines()[:14]))
