"""Our training step against the same model in Flax under jax.grad: same weights, same batches, the same step function.

    python benchmarks/step.py [--models digits-mlp digits-cnn] [--rounds 200] [--json FILE]

In each round both sides do a few steps, one after the other, in an order that alternates, so that whatever else the
machine does meets both. The figure is the median over the rounds of ours / Flax, with a 95 % interval of that median.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from fbackprop import layers, ops
from fbackprop.measuring import ratio
from fbackprop.models import from_flax, mlp
from fbackprop.training import init_train_state, make_step


class FlaxMlp(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


class FlaxCnn(nn.Module):
    """The model of the preset digits-cnn without its dropout: the two sides would draw different numbers."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        for features, pool in ((16, False), (32, True), (64, True)):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def our_cnn() -> layers.Layer:
    parts: list[Any] = []
    for features, pool in ((16, False), (32, True), (64, True)):
        parts += [layers.Conv(features, (3, 3), use_bias=False), layers.BatchNorm(momentum=0.9), ops.relu]
        parts += [layers.MaxPool((2, 2), (2, 2))] if pool else []
    return layers.serial(*parts, layers.Flatten(), layers.Dense(10))


MODELS: dict[str, tuple[nn.Module, layers.Layer, tuple[int, ...]]] = {
    "digits-mlp": (FlaxMlp(), mlp((128, 64, 10)), (64,)),
    "digits-cnn": (FlaxCnn(), our_cnn(), (8, 8, 1)),
}


def flax_loss(model: nn.Module) -> Callable[..., Any]:
    def loss_fn(params: Any, batch: Any, state: Any) -> Any:
        logits, new = model.apply({"params": params, **state}, batch["x"], train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, {"state": {**state, **new}}

    return loss_fn


def our_loss(model: layers.Layer) -> Callable[..., Any]:
    def loss_fn(params: Any, batch: Any, state: Any) -> Any:
        logits, state = model.apply(params, batch["x"], state=state, train=True)
        return ops.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {"state": state}

    return loss_fn


class Side:
    """One of the two: a step and the train state that it carries along."""

    def __init__(self, loss_fn: Callable[..., Any], params: Any, state: Any, batch: Any):
        optimizer = optax.adam(1e-3)
        self.step, self.train, self.batch = (
            make_step(loss_fn, optimizer),
            init_train_state(params, optimizer, state=state),
            batch,
        )
        self.losses: list[float] = []

    def run(self, steps: int) -> float:
        """Seconds for so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.train, metrics = self.step(self.train, self.batch)
        jax.block_until_ready(self.train)
        seconds = time.perf_counter() - start
        self.losses.append(float(metrics["loss"]))
        return seconds


def sides(name: str, batch_size: int) -> tuple[Side, Side]:
    theirs, ours, shape = MODELS[name]
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(batch_size, *shape)).astype(np.float32), "y": rng.integers(0, 10, batch_size, np.int32)}
    batch = jax.tree.map(jnp.asarray, batch)
    variables = theirs.init(jax.random.key(0), batch["x"], train=False)
    state = {name: value for name, value in variables.items() if name != "params"}
    params, our_state = from_flax(ours, variables)
    return Side(our_loss(ours), params, our_state, batch), Side(flax_loss(theirs), variables["params"], state, batch)


def measure(name: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """Times both sides and checks that they did the same work."""
    ours, theirs = sides(name, batch_size)
    for side in (ours, theirs):  # compile, and settle
        side.run(3)
    steps = max(1, int(0.01 / min(ours.run(10) / 10, theirs.run(10) / 10)))
    times = []
    for index in range(rounds):
        order = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        seconds = {id(side): side.run(steps) / steps for side in order}
        times.append((seconds[id(ours)], seconds[id(theirs)]))
    np.testing.assert_allclose(ours.losses[:2], theirs.losses[:2], rtol=1e-4)  # later, rounding has grown
    us, them = np.array(times).T
    speed = ratio(us, them)
    return {
        "model": name,
        "batch": batch_size,
        "ours_us": 1e6 * float(np.median(us)),
        "flax_us": 1e6 * float(np.median(them)),
        "ratio": speed.median,
        "interval": [speed.low, speed.high],
        "rounds": rounds,
        "steps_per_round": steps,
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    given = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {platform.machine()}")
    print(f"{'model':<12} {'ours, µs':>10} {'flax, µs':>10} {'ratio':>7}   95 % interval")
    results = []
    for name in given.models:
        row = measure(name, given.rounds, given.batch)
        results.append(row)
        low, high = row["interval"]
        print(f"{name:<12} {row['ours_us']:>10.0f} {row['flax_us']:>10.0f} {row['ratio']:>7.3f}   {low:.3f} to {high:.3f}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "device": device.device_kind, "results": results}, file, indent=2)
    return results


if __name__ == "__main__":
    main()
