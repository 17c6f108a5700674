"""The training step and whole runs: held against the large batch, plain optax loops and runs that never stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fbackprop import layers, ops
from fbackprop.models import mlp
from fbackprop.training import (
    OPTIMIZERS,
    RunError,
    Stopped,
    fit,
    gradient_errors,
    init_train_state,
    make_optimizer,
    make_step,
)

MODEL = mlp((16, 3))
DATA = {
    "x": np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32),
    "y": np.random.default_rng(1).integers(0, 3, 40).astype(np.int32),
}
PARAMS, _ = MODEL.init(jax.random.key(0), DATA["x"])

# Batch norm and dropout: a state that changes and a key that is used.
NOISY = layers.serial(
    layers.Dense(8, use_bias=False), layers.BatchNorm(momentum=0.9), ops.relu, layers.Dropout(0.5), layers.Dense(3)
)


def mean_loss(params, batch):
    return ops.softmax_cross_entropy_with_integer_labels(MODEL(params, batch["x"]), batch["y"]).mean()


def noisy_loss(params, batch, state, key):
    logits, state = NOISY.apply(params, batch["x"], state=state, key=key, train=True)
    loss = ops.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["y"]).mean()
    return loss, {"state": state, "accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def same(a, b) -> bool:
    plain = [
        jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, t) for t in (a, b)
    ]
    leaves = [jax.tree.leaves(t) for t in plain]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*leaves)
    )


# The step


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_the_step_is_the_textbook_loop(name):
    optimizer = make_optimizer(name, 0.01)
    step, train = make_step(mean_loss, optimizer), init_train_state(PARAMS, optimizer)
    params, opt_state = PARAMS, optimizer.init(PARAMS)

    @jax.jit
    def plain(params, opt_state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    for _ in range(3):
        train, metrics = step(train, DATA)
        params, opt_state, loss, grads = plain(params, opt_state, DATA)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(
            metrics["grad_norm"], np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))), rtol=1e-5
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), train.params, params)
    assert int(train.step) == 3
    assert int(train.skipped) == 0


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(), optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau())])
def test_optimizers_that_need_the_value_get_it(optimizer):
    step, train = make_step(mean_loss, optimizer), init_train_state(PARAMS, optimizer)
    losses = []
    for _ in range(6):
        train, metrics = step(train, DATA)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_lbfgs_searches_along_the_whole_batch():
    optimizer, results = optax.lbfgs(), []
    for accumulate in (1, 4):
        step, train = make_step(mean_loss, optimizer, accumulate=accumulate), init_train_state(PARAMS, optimizer)
        for _ in range(4):
            train, metrics = step(train, DATA)
        results.append(float(metrics["loss"]))
    assert results[0] < 0.9 * float(mean_loss(PARAMS, DATA))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


@pytest.mark.parametrize("accumulate", [2, 5, 40])
def test_micro_batches_equal_the_large_batch(accumulate):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
        data = {"x": DATA["x"].astype(np.float64), "y": DATA["y"]}
        results = []
        for parts in (1, accumulate):
            optimizer = optax.adam(0.01)
            step, train = make_step(mean_loss, optimizer, accumulate=parts), init_train_state(wide, optimizer)
            for _ in range(3):
                train, metrics = step(train, data)
            results.append((train.params, metrics))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


def test_micro_batches_share_state_and_draw_different_numbers():
    seen = []

    def loss(params, batch, state, key):
        noise = jax.random.uniform(key)
        jax.debug.callback(lambda n: seen.append(float(n)), noise)
        return jnp.sum(params["w"]) * noise, {"state": {"count": state["count"] + len(batch)}}

    optimizer = optax.sgd(0.1)
    train = init_train_state({"w": jnp.ones(2)}, optimizer, state={"count": jnp.zeros((), jnp.int32)})
    train, metrics = make_step(loss, optimizer, accumulate=3)(train, jnp.zeros((6, 1)))
    jax.effects_barrier()
    assert int(train.state["count"]) == 6
    assert len(set(seen)) == 3
    np.testing.assert_allclose(metrics["loss"], 2 * np.mean(seen), rtol=1e-6)


def test_bfloat16_computes_narrow_and_keeps_wide():
    seen = {}

    def loss(params, batch, state):
        logits = MODEL(params, batch["x"])
        seen.update(kernel=params["layers"][0]["kernel"].dtype, logits=logits.dtype, labels=batch["y"].dtype)
        losses = ops.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["y"])
        return losses.mean(), {"state": {"mean": logits.mean()}}

    optimizer = optax.adam(0.01)
    train = init_train_state(PARAMS, optimizer, state={"mean": jnp.zeros(())})
    train, metrics = make_step(loss, optimizer, dtype="bfloat16")(train, DATA)
    assert seen == {"kernel": jnp.bfloat16, "logits": jnp.bfloat16, "labels": jnp.int32}
    floats = [x.dtype for x in jax.tree.leaves(train._replace(key=())) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert set(floats) == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["grad_norm"].dtype == jnp.float32
    exact = jax.value_and_grad(mean_loss)(PARAMS, DATA)[0]
    assert metrics["loss"] != exact
    np.testing.assert_allclose(metrics["loss"], exact, rtol=2e-2)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_gradient_that_is_not_finite_skips_the_step(accumulate):
    optimizer = optax.adam(0.01)
    params, state = NOISY.init(jax.random.key(0), DATA["x"])
    step = make_step(noisy_loss, optimizer, accumulate=accumulate, donate=False)
    first, _ = step(init_train_state(params, optimizer, state=state), DATA)
    for bad in (np.nan, np.inf):
        x = DATA["x"].copy()
        x[7, 2] = bad
        after, metrics = step(first, {**DATA, "x": x})
        assert int(metrics["skipped"]) == 1
        assert int(after.skipped) == 1
        assert int(after.step) == 2
        assert same((after.params, after.state, after.opt_state), (first.params, first.state, first.opt_state))
    after, metrics = step(after, DATA)
    assert int(metrics["skipped"]) == 0
    assert int(after.skipped) == 1
    assert not same(after.params, first.params)


def test_a_large_but_finite_gradient_is_not_skipped():
    optimizer = optax.sgd(1e-30)
    train = init_train_state({"w": jnp.ones(4)}, optimizer)
    train, metrics = make_step(lambda p, b: 1e30 * jnp.sum(p["w"]), optimizer)(train, None)
    assert int(metrics["skipped"]) == 0
    np.testing.assert_allclose(train.params["w"], 0, atol=1e-6)


def test_buffers_are_donated_and_the_callers_parameters_stay():
    optimizer = optax.adam(0.01)
    first = init_train_state(PARAMS, optimizer)
    make_step(mean_loss, optimizer)(first, DATA)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))
    kept = init_train_state(PARAMS, optimizer)
    make_step(mean_loss, optimizer, donate=False)(kept, DATA)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_the_step_is_traced_once():
    traces = []

    def loss(params, batch, key):
        traces.append(1)
        return mean_loss(params, batch) + 0 * jax.random.uniform(key)

    optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(lambda step: 0.1 / (1 + step)))
    step, train = make_step(loss, optimizer), init_train_state(PARAMS, optimizer)
    for _ in range(4):
        train, _ = step(train, DATA)
    assert len(traces) == 1


def test_the_same_key_and_step_draw_the_same_numbers():
    optimizer = optax.sgd(0.1)
    params, state = NOISY.init(jax.random.key(0), DATA["x"])
    step = make_step(noisy_loss, optimizer)
    runs = [init_train_state(params, optimizer, state=state, key=key) for key in (1, jax.random.key(1), 2)]
    losses = [float(step(run, DATA)[1]["loss"]) for run in runs]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("loss", "options", "says"),
    [
        (mean_loss, {"accumulate": 3}, r"accumulate=3 .* \['x'\] has shape \(40, 5\)"),
        (mean_loss, {"accumulate": 0}, "accumulate is 0"),
        (mean_loss, {"dtype": "int8"}, "dtype is 'int8'; expected a floating-point type"),
        (mean_loss, {"dtype": "float99"}, "dtype is 'float99'"),
        (lambda p, b: jnp.ones(4), {}, r"shape \(4,\); expected a scalar"),
        (lambda p, b: (jnp.ones(()), 3), {}, "int beside the loss"),
        (lambda p, b: (jnp.ones(()), {}, {}), {}, "returned tuple; expected"),
        (lambda p, b: None, {}, "returned NoneType; expected"),
        (lambda p, b: (jnp.ones(()), {"loss": 1.0}), {}, "'loss'"),
        (lambda p, b: (jnp.ones(()), {"norms": jnp.ones(3)}), {}, r"'norms' has shape \(3,\)"),
        (lambda p, b, state: (jnp.ones(()), {"state": {"n": 1}}), {}, "a state of structure"),
    ],
)
def test_mistakes_get_a_sentence(loss, options, says):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=says):
        make_step(loss, optimizer, **options)(init_train_state(PARAMS, optimizer), DATA)


def test_an_unknown_optimizer_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"did you mean adam\?"):
        make_optimizer("adm", 0.1)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_step_lowers_for_every_platform(dtype):
    optimizer = optax.adam(0.01)
    params, state = NOISY.init(jax.random.key(0), DATA["x"])
    train = init_train_state(params, optimizer, state=state)
    step = make_step(noisy_loss, optimizer, dtype=dtype, accumulate=2)
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(train, DATA)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_gradient_errors_name_the_parameters_and_find_a_wrong_rule(monkeypatch):
    errors = gradient_errors(mean_loss, PARAMS, DATA)
    assert set(errors) == {f"layers.{i}.{leaf}" for i in (0, 2) for leaf in ("kernel", "bias")}
    assert max(errors.values()) < 1e-5
    from fbackprop.rules import rule

    @rule(forward=lambda x: (x * x, x), backward=lambda saved, dy: (2.02 * saved * dy,))
    def square_with_a_wrong_backward(x):
        return x * x

    from fbackprop.rules import RULES

    monkeypatch.delitem(RULES, "square_with_a_wrong_backward")
    found = gradient_errors(
        lambda p, b: square_with_a_wrong_backward(p["w"]).sum(), {"w": jnp.ones(3), "unused": jnp.ones(2)}, None
    )
    np.testing.assert_allclose([found["w"], found["unused"]], [0.01, 0.0], rtol=1e-4)


# Whole runs


def run(directory=None, steps=23, **options):
    params, state = NOISY.init(jax.random.key(0), DATA["x"])
    given = {"steps": steps, "batch_size": 6, "seed": 5, "state": state, "evaluate": evaluate, "progress": False, **options}
    return fit(noisy_loss, optax.adam(0.01), params, DATA, directory=directory, **given)


def evaluate(params, state):
    logits = NOISY(params, DATA["x"], state)
    loss = ops.softmax_cross_entropy_with_integer_labels(logits, DATA["y"]).mean()
    return {"test_loss": loss, "test_accuracy": (logits.argmax(-1) == DATA["y"]).mean()}


def everything(result):
    return (result.train_state, {name: np.array(values) for name, values in result.history.steps.items()})


def test_stopped_and_resumed_is_bitwise_the_run_that_never_stopped(tmp_path):
    whole = run(tmp_path / "whole")
    assert same(everything(run()), everything(whole))  # files change nothing
    for stop in (6, 10):  # an epoch has six steps: at its end, and in its middle
        run(tmp_path / f"{stop}", steps=stop)
        resumed = run(tmp_path / f"{stop}", resume=True)
        assert same(everything(resumed), everything(whole))
        metrics = json.loads((tmp_path / f"{stop}" / "metrics.json").read_text())
        assert metrics["steps"] == 23
        assert metrics["complete"]
        assert len(resumed.history.steps["loss"]) == 23
        assert metrics["test_accuracy"] == whole.metrics["test_accuracy"]
    assert (tmp_path / "10" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("how", ["exception", "signal"])
def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on_from_there(tmp_path, how):
    calls = []

    def interrupting(params, state):
        calls.append(1)
        if len(calls) == 2:
            if how == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(params, state)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped at step") as caught:
        run(tmp_path, evaluate=interrupting, evaluate_every=5)
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.step in (10, 11)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not metrics["complete"]
    assert metrics["steps"] == caught.value.step
    assert same(everything(run(tmp_path, resume=True)), everything(run()))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest, test_training

def evaluate(params, state):
    evaluate.calls += 1
    if evaluate.calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{}}

evaluate.calls = 0
test_training.run({directory!r}, evaluate=evaluate, evaluate_every=5, checkpoint_every=4)
"""


def test_killed_between_checkpoints_and_resumed(tmp_path):
    script = KILLED.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [8, 12]
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert same(everything(run(tmp_path / "run", resume=True)), everything(run()))


def test_the_order_depends_on_seed_and_epoch_and_leaves_nothing_out():
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda b: seen.append(np.array(b)), batch, ordered=True)
        return jnp.sum(params["w"])

    def order(seed, **options):
        seen.clear()
        fit(
            loss,
            optax.sgd(0.1),
            {"w": jnp.ones(1)},
            np.arange(12),
            epochs=2,
            batch_size=4,
            seed=seed,
            progress=False,
            **options,
        )
        jax.effects_barrier()
        return np.concatenate(seen).reshape(2, 12)

    one = order(1)
    np.testing.assert_array_equal(np.sort(one), np.tile(np.arange(12), (2, 1)))
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one, order(2))
    np.testing.assert_array_equal(one, order(1))
    np.testing.assert_array_equal(order(1, shuffle=False), np.tile(np.arange(12), (2, 1)))


def test_skipped_steps_are_counted_and_reported(tmp_path, capsys):
    x = np.ones((8, 1), np.float32)
    x[3] = np.nan
    result = fit(
        lambda p, b: jnp.mean(p["w"] * b), optax.sgd(0.1), {"w": jnp.ones(())}, x, epochs=2, batch_size=2, directory=tmp_path
    )
    assert result.metrics["skipped_steps"] == 2
    assert sum(result.history.steps["skipped"]) == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped_steps"] == 2
    assert "the gradient is not finite" in capsys.readouterr().err
    np.testing.assert_allclose(result.params["w"], 1 - 6 * 0.1, rtol=1e-6)


def test_a_run_is_not_overwritten_nor_continued_as_another(tmp_path):
    run(tmp_path, steps=4)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="holds a run already"):
        run(tmp_path, steps=4)
    with pytest.raises(RunError, match="with seed 5, not 6"):
        run(tmp_path, resume=True, seed=6)
    with pytest.raises(RunError, match="a run of 4 steps already; 3 are fewer"):
        run(tmp_path, resume=True, steps=3)
    with pytest.raises(RunError, match=r"another model or optimizer: params\.layers"):
        fit(
            mean_loss,
            optax.adam(0.01),
            PARAMS,
            DATA,
            steps=9,
            batch_size=6,
            seed=5,
            directory=tmp_path,
            resume=True,
            progress=False,
        )
    run(tmp_path, steps=4, resume=True)  # nothing left to do
    assert snapshot(tmp_path) == before
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(RunError, match="cannot be read"):
        run(tmp_path, resume=True)


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"epochs": 3}, "expected one of the two"),
        ({"batch_size": 41}, "batch_size is 41, more than the 40 examples"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
    ],
)
def test_options_out_of_range_get_a_sentence(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        run(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_data_without_a_common_axis_get_a_sentence():
    with pytest.raises(ValueError, match="expected one leading axis"):
        fit(mean_loss, optax.sgd(0.1), PARAMS, {**DATA, "y": DATA["y"][:7]}, steps=1)
