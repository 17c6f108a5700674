"""The small systems of the seed documents, in their own notation: weights are (out, in)."""

from typing import Any

__all__ = ["AND_GATE", "SIGMOID_NEURON", "THREE_LAYER"]

AND_GATE: dict[str, Any] = {
    "x": [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]],
    "y": [[0.0], [0.0], [0.0], [1.0]],
    # The gate as a perceptron: step(x · weights + bias), with step(0) = 0.
    "step_weights": [[0.5, 0.5]],
    "step_bias": [-0.7],
    "learning_rate": 0.5,
}
"""Seed 001: the four rows of the gate AND; a step decides it, a sigmoid learns it from zeros."""

SIGMOID_NEURON: dict[str, Any] = {
    "x": [[0.1, 0.3]],
    "y": [[0.03]],
    "W": [[0.5, 0.2]],
    "b": [1.83],
    "learning_rate": 0.01,
}
"""Seed 003: one sigmoid neuron, one example, half the squared error."""

THREE_LAYER: dict[str, Any] = {
    "x": [[1.0, 2.0]],
    "y": [[3.0]],
    "W1": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    "b1": [0.1, 0.2, 0.3],
    "W2": [[0.7, 0.8, 0.9], [1.0, 1.1, 1.2]],
    "b2": [0.4, 0.5],
    "W3": [[1.3, 1.4]],
    "b3": [0.6],
    "learning_rate": 0.01,
}
"""Seed 004: dense layers of 2, 3, 2 and 1, ReLU in between, one example, half the squared error."""
