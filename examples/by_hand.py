"""Backpropagation by hand: a network trained without jax.grad, and held against jax.grad.

The network (convolution, batch norm, dropout, dense layers) learns handwritten digits in float64 with nothing but the two
halves of each layer: ``model.forward``, ``loss.forward``, ``loss.backward``, ``model.backward``, and p − rate · dp. Then the
same training runs twice with ``jax.grad``: through the registered rules, and through the plain definitions, which know
nothing of our backward passes. All three must end with the same parameters.

    python examples/by_hand.py [--steps 40]

Prints the largest differences between the parameters; the exit code is 1 if one is larger than 1e-12.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

from fbackprop import ops, without_rules
from fbackprop.layers import BatchNorm, Conv, Dense, Dropout, Flatten, MaxPool, serial

RATE = 0.2
BATCH = 64
TOLERANCE = 1e-12

model = serial(
    Conv(8, (3, 3), use_bias=False, param_dtype="float64"),
    BatchNorm(momentum=0.9, param_dtype="float64"),
    ops.relu,
    MaxPool((2, 2), (2, 2)),
    Flatten(),
    Dense(32, param_dtype="float64"),
    ops.tanh,
    Dropout(0.1),
    Dense(10, param_dtype="float64"),
)
loss = ops.softmax_cross_entropy_with_integer_labels


@jax.jit
def step_by_hand(params, state, x, labels, key):
    # Forward: each layer keeps on the tape what its backward needs.
    logits, tape = model.forward(params, x, state=state, key=key, train=True)
    losses, saved = loss.forward(logits, labels)
    # Backward: L = mean(losses), so dL/dlosses = 1/n; from there the chain rule, layer by layer.
    dlosses = jnp.full_like(losses, 1 / losses.size)
    dlogits, *_ = loss.backward(saved, dlosses)
    dparams, _ = model.backward(tape, dlogits)
    return descend(params, dparams), tape.state, losses.mean()


def mean_loss(params, state, x, labels, key):
    logits, state = model.apply(params, x, state=state, key=key, train=True)
    return loss(logits, labels).mean(), state


@jax.jit
def step_by_rules(params, state, *batch):
    (value, state), dparams = jax.value_and_grad(mean_loss, has_aux=True)(params, state, *batch)
    return descend(params, dparams), state, value


@jax.jit
def step_by_definitions(params, state, *batch):
    (value, state), dparams = jax.value_and_grad(without_rules(mean_loss), has_aux=True)(params, state, *batch)
    return descend(params, dparams), state, value


def descend(params, dparams):
    return jax.tree.map(lambda p, d: p - RATE * d, params, dparams)


def train(step, x, labels, steps):
    params, state = model.init(jax.random.key(0), x[:BATCH])
    value = None
    for i in range(steps):
        rows = jax.random.randint(jax.random.key(i), (BATCH,), 0, len(x))
        params, state, value = step(params, state, x[rows], labels[rows], jax.random.key(1000 + i))
    return params, state, float(value)


def difference(a, b):
    return max(float(jnp.abs(p - q).max()) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with jax.enable_x64(True):
        digits = load_digits()
        x, labels = jnp.asarray(digits.images[..., None] / 16.0), jnp.asarray(digits.target)
        by_hand, state, value = train(step_by_hand, x, labels, steps)
        by_rules, *_ = train(step_by_rules, x, labels, steps)
        by_definitions, *_ = train(step_by_definitions, x, labels, steps)
        accuracy = float((model(by_hand, x, state).argmax(-1) == labels).mean())
        differences = {
            "by hand and jax.grad of the rules": difference(by_hand, by_rules),
            "by hand and jax.grad of the definitions": difference(by_hand, by_definitions),
            "jax.grad of the rules and of the definitions": difference(by_rules, by_definitions),
        }
    print(f"{steps} steps by hand: loss {value:.4f}, accuracy {accuracy:.1%}")
    print("largest difference between parameters in float64:")
    for what, size in differences.items():
        print(f"  {what:46} {size:.1e}")
    return 1 if max(differences.values()) > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
