"""What the monitor of a run costs: the training step with it against the step without, on the digits CNN and on a small GPT.

    python benchmarks/health.py [--models digits-cnn gpt] [--rounds 20] [--every 50] [--json FILE]

A look is a program beside the step, which is the same with and without it: what it costs is its own time, once every so many
steps. In each round the step and the look run one after the other, in an order that turns from round to round. The figure is
the median, with a 95 % interval, of look / step within a round; the overhead of a run is that divided by ``--every``.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fbackprop as fb
from fbackprop.diagnosing import health
from fbackprop.measuring import ratio
from fbackprop.training import init_train_state, make_step
from fbackprop.training.monitor import make_look
from fbackprop.training.presets import PRESETS


def digits_cnn() -> tuple[Any, Any, Any, Any, optax.GradientTransformation]:
    task = PRESETS["digits-cnn"].task(0)
    batch = {name: jnp.asarray(task.examples[name][:64]) for name in ("x", "y")}
    batch["x"] = batch["x"].astype(jnp.float32)
    return task.loss_fn, task.params, task.state, batch, optax.adam(3e-3)


def small_gpt() -> tuple[Any, Any, Any, Any, optax.GradientTransformation]:
    """4 layers, width 256, length 256, batch 8, 256 tokens."""
    model = fb.models.gpt(256, 4, 256, 4, 256)
    tokens = jax.random.randint(jax.random.key(0), (8, 257), 0, 256)
    params, _ = model.init(jax.random.key(1), tokens[:, :-1])

    def loss_fn(params: Any, batch: Any) -> Any:
        return model.loss(params, batch[:, :-1], batch[:, 1:])

    return loss_fn, params, (), tokens, optax.adamw(1e-3)


MODELS = {"digits-cnn": digits_cnn, "gpt": small_gpt}


def measure(name: str, rounds: int, every: int, seconds: float) -> dict[str, Any]:
    loss_fn, params, state, batch, optimizer = MODELS[name]()
    step, look = make_step(loss_fn, optimizer), make_look(loss_fn, optimizer)
    train = init_train_state(params, optimizer, state=state)

    def stepping() -> float:
        nonlocal train
        start = time.perf_counter()
        train, metrics = step(train, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    def looking() -> float:
        start = time.perf_counter()
        jax.block_until_ready(look(train, batch))
        return time.perf_counter() - start

    compiling = {"step": stepping(), "look": looking()}
    trial = stepping() + looking()
    repeats = max(1, int(seconds / trial))
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            once = (stepping, looking)[which]
            times[which].append(sum(once() for _ in range(repeats)) / repeats)
    look_to_step = ratio(times[1], times[0])
    return {
        "model": name, "every": every, "rounds": rounds, "step_ms": 1e3 * float(np.median(times[0])),
        "look": list(look_to_step), "overhead_percent": [100 * value / every for value in look_to_step],
        "compile_seconds": {kind: round(value, 2) for kind, value in compiling.items()},
    }  # fmt: skip


def examination() -> float:
    """Seconds of fb.health with trials on a perceptron of the digits whose sigmoids let the gradient vanish."""
    model = fb.models.mlp([32] * 8 + [10], fb.sigmoid)
    x = jax.random.normal(jax.random.key(0), (64, 64))
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 10)
    params, _ = model.init(jax.random.key(2), x)
    start = time.perf_counter()
    health(lambda p: fb.softmax_cross_entropy_with_integer_labels(model(p, x), labels).mean(), params, rate=0.1)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn")
    parser.add_argument("--examination", action="store_true", help="also time fb.health with trials")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    found = []
    for name in options.models:
        one = measure(name, options.rounds, options.every, options.seconds)
        found.append(one)
        look, (median, low, high) = one["look"], one["overhead_percent"]
        print(f"{name}: step {one['step_ms']:.1f} ms; a look takes {look[0]:.2f} [{look[1]:.2f}, {look[2]:.2f}] steps; "
              f"one in {options.every} steps: {median:.1f} % [{low:.1f}, {high:.1f}]; "
              f"compiling: step {one['compile_seconds']['step']} s, look {one['compile_seconds']['look']} s")  # fmt: skip
    result: dict[str, Any] = {"jax": jax.__version__, "machine": platform.machine(), "device": jax.devices()[0].platform}
    result["models"] = found
    if options.examination:
        result["health_seconds"] = round(examination(), 2)
        print(f"fb.health with trials on a perceptron of 9 layers: {result['health_seconds']} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
