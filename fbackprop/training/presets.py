"""What ``fbackprop train`` can train: the small systems of the seed documents, scikit-learn's digits, the user's files.

Language models stand in language.py.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop import data, ops
from fbackprop.layers import BatchNorm, Conv, Dense, Dropout, Flatten, Layer, MaxPool, serial
from fbackprop.models import mlp, resnet
from fbackprop.training.fit import Fit
from fbackprop.training.language import LANGUAGE_PRESETS, is_language_file, language_preset
from fbackprop.training.tasks import Preset, Task

__all__ = ["PRESETS", "file_preset"]


def _classifier(source: data.Dataset, model: Layer, seed: int) -> Task:
    """Softmax cross-entropy, and the accuracy on the held-out fifth."""
    params, state = jax.jit(model.init)(jax.random.key(seed), source.x[:1])

    def loss_fn(params: Any, batch: Any, state: Any, key: Any) -> Any:
        logits, state = model.apply(params, batch["x"], state=state, key=key, train=True)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        loss = ops.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, {"state": state, "accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    @jax.jit
    def sums(params: Any, state: Any, x: Any, y: Any) -> Any:
        logits = model(params, x, state)
        losses = ops.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.sum(), (logits.argmax(-1) == y).sum()

    def evaluate(params: Any, state: Any) -> dict[str, float]:
        parts = [slice(i, i + 1024) for i in range(0, len(source.test_y), 1024)]
        found = [sums(params, state, source.test_x[part], source.test_y[part]) for part in parts]
        loss, right = np.sum(jax.device_get(found), axis=0)
        return {"test_loss": float(loss) / len(source.test_y), "test_accuracy": float(right) / len(source.test_y)}

    examples = {"x": source.x, "y": source.y}
    return Task(model, params, state, examples, loss_fn, evaluate, source.fingerprint, len(source.test_y))


def _convolutional(shape: Sequence[int], classes: int) -> Layer:
    """Three convolutions of 3×3 with batch norm and relu; max pooling after the second and the third, while it fits."""
    layers: list[Any] = []
    height, width = shape[0], shape[1]
    for features, pool in ((16, False), (32, True), (64, True)):
        # No bias: batch norm would subtract it again. A short memory suits runs of a few hundred steps.
        layers += [Conv(features, (3, 3), use_bias=False), BatchNorm(momentum=0.9), ops.relu]
        if pool and min(height, width) >= 2:
            layers.append(MaxPool((2, 2), (2, 2)))
            height, width = height // 2, width // 2
    return serial(*layers, Flatten(), Dropout(0.3), Dense(classes))


def _digits_mlp(seed: int) -> Task:
    return _classifier(data.digits(), mlp((128, 64, 10)), seed)


def _digits_cnn(seed: int) -> Task:
    return _classifier(data.digits(images=True), _convolutional((8, 8), 10), seed)


def _digits_resnet(seed: int) -> Task:
    return _classifier(data.digits(images=True), resnet((1, 1, 1), (16, 32, 64), 10, stem="cifar"), seed)


def _regression(
    model: Layer, layers: Sequence[Any], system: dict[str, Any], after: Any, before: Sequence[str] = (), gate: bool = False
) -> Task:
    """Half the squared error, summed over the examples. The weights of ``layers`` come from a document."""
    examples = {name: np.array(system[name], np.float64) for name in ("x", "y")}

    def loss(params: Any, x: Any, y: Any) -> Any:
        predictions = model(params, x)
        wide = jnp.promote_types(predictions.dtype, jnp.float32)
        return ops.half_square(predictions.astype(wide), y.astype(wide)), predictions

    def loss_fn(params: Any, batch: Any) -> Any:
        return loss(params, batch["x"], batch["y"])[0]

    @jax.jit
    def evaluate(params: Any, state: Any) -> dict[str, Any]:
        x, y = (jnp.asarray(examples[name], jax.tree.leaves(params)[0].dtype) for name in ("x", "y"))
        value, predictions = loss(params, x, y)
        return {"loss": value, **({"accuracy": ((predictions > 0.5) == (y > 0.5)).mean()} if gate else {})}

    def numbers(result: Fit) -> dict[str, Any]:
        losses = [*result.history.steps["loss"], result.metrics["loss"]]
        return {"loss_by_step": losses, "parameters": jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), result.params)}

    params = {"layers": tuple(layers)}
    return Task(model, params, (), examples, loss_fn, evaluate, before=tuple(before), after=after, numbers=numbers)


def _dense(weights: Any, bias: Any) -> dict[str, np.ndarray]:
    """Parameters of a dense layer from weights in the documents' notation, (out, in)."""
    return {"kernel": np.array(weights, np.float64).T, "bias": np.array(bias, np.float64)}


def _and_gate(seed: int) -> Task:
    system = data.AND_GATE
    rows = np.array(system["x"])
    gate = _dense(system["step_weights"], system["step_bias"])
    sums = ops.dense(rows, gate["kernel"], gate["bias"])
    before = ["the gate AND by a step, y = step(0.5 x₁ + 0.5 x₂ − 0.7):", "    x₁  x₂      sum   step"]
    for (a, b), total, out in zip(rows, np.ravel(sums), np.ravel(ops.step_ste(sums))):
        before.append(f"    {a:2.0f}  {b:2.0f}   {total:+.2f}      {out:.0f}")
    model = mlp((1,), output_activation=ops.sigmoid)

    def after(result: Fit) -> list[str]:
        w, b = _weights(result)
        outputs = np.ravel(model(result.params, jnp.asarray(rows, jnp.result_type(*jax.tree.leaves(result.params)))))
        lines = [f"the gate AND by a sigmoid, y = σ({w[0]:.6f} x₁ + {w[1]:.6f} x₂ − {-b[0]:.6f}):", "    x₁  x₂   sigmoid"]
        return [*lines, *(f"    {x[0]:2.0f}  {x[1]:2.0f}   {y:.4f}" for x, y in zip(rows, outputs)), *_losses(result)]

    zeros = _dense([[0.0, 0.0]], [0.0])
    return _regression(model, (zeros, {}), system, after, before, gate=True)


def _sigmoid_neuron(seed: int) -> Task:
    system = data.SIGMOID_NEURON

    def after(result: Fit) -> list[str]:
        w, b = _weights(result)
        return [f"weights    {w[0]:.6f} and {w[1]:.6f}, bias {b[0]:.6f}", *_losses(result)]

    model = mlp((1,), output_activation=ops.sigmoid)
    return _regression(model, (_dense(system["W"], system["b"]), {}), system, after)


def _three_layer(seed: int) -> Task:
    system = data.THREE_LAYER
    one, two, three = (_dense(system[f"W{i}"], system[f"b{i}"]) for i in (1, 2, 3))
    return _regression(mlp((3, 2, 1)), (one, {}, two, {}, three), system, _losses)


def _weights(result: Fit) -> tuple[np.ndarray, np.ndarray]:
    layer = result.params["layers"][0]
    return np.ravel(layer["kernel"]), np.ravel(layer["bias"])


def _losses(result: Fit) -> list[str]:
    """The loss after 0, 1, 2, 5, 10, … updates."""
    losses = [*result.history.steps["loss"], result.metrics["loss"]]
    chosen = sorted({k for k in (0, 1, 2, 5, *(10**i for i in range(1, 9))) if k < len(losses)} | {len(losses) - 1})
    return ["loss       " + "   ".join(f"{losses[k]:.9g} ({k})" for k in chosen) + "   (after so many updates)"]


def file_preset(path: str) -> Preset:
    """A preset for the user's own file: a perceptron for flat examples, convolutions for images, a GPT for text and tokens."""
    if is_language_file(pathlib.Path(path)):
        return language_preset(path)

    def task(seed: int) -> Task:
        kind = pathlib.Path(path).suffix.lower()
        if kind not in (".npz", ".csv") and not data.is_idx(path):
            what = kind or "(no suffix)"
            raise data.DataError(f"{path}: files of the kind {what} are not read; fbackprop train --help lists others.")
        source = data.load_idx(path) if data.is_idx(path) else data.load(path)
        model = _convolutional(source.x.shape[1:], source.classes) if source.images else mlp((128, 64, source.classes))
        return _classifier(source, model, seed)

    return Preset(pathlib.Path(path).stem, f"the file {path}", task, "adam", 2e-3, 64, epochs=20, half_life=10)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("and-gate", "the gate AND: a step shows it, a sigmoid learns it from zeros (seed 001)",
               _and_gate, "sgd", data.AND_GATE["learning_rate"], 0, steps=1000, dtype="float64"),
        Preset("sigmoid-neuron", "one sigmoid neuron, one example (seed 003)",
               _sigmoid_neuron, "sgd", data.SIGMOID_NEURON["learning_rate"], 0, steps=100, dtype="float64"),
        Preset("three-layer", "a network of three layers with the numbers of seed 004",
               _three_layer, "sgd", data.THREE_LAYER["learning_rate"], 0, steps=100, dtype="float64"),
        Preset("digits-mlp", "a perceptron on scikit-learn's handwritten digits",
               _digits_mlp, "adam", 2e-3, 64, epochs=30, half_life=10),
        Preset("digits-cnn", "a convolutional network on the same digits, 98 % and more",
               _digits_cnn, "adam", 3e-3, 64, epochs=20, half_life=4),
        Preset("digits-resnet", "a residual network of 8 layers on the same digits",
               _digits_resnet, "adam", 3e-3, 64, epochs=12, half_life=3),
        *LANGUAGE_PRESETS,
    )
}  # fmt: skip
"""The presets by name."""
