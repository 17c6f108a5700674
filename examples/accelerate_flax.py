"""A convolutional network of Flax on handwritten digits, accelerated by one changed line.

Model and loss are Flax's and optax's and stay as they are; the line is ``fast = fb.accelerate(loss)``. The report tells what
was replaced, and that outputs and gradients agree; then the network is trained, and a step is timed as it was and as it is.

    python examples/accelerate_flax.py [--steps 200] [--batch 128] [--rounds 20]
"""

import argparse
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fbackprop as fb
from fbackprop.measuring import interleave, ratio


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 64):
            x = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(nn.gelu(nn.Dense(128)(x.reshape(len(x), -1))))


model, optimizer = Cnn(), optax.adam(1e-3)


def loss(variables, images, labels):
    logits = model.apply(variables, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_of(loss):
    @jax.jit
    def step(variables, state, images, labels):
        value, gradient = jax.value_and_grad(loss)(variables, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    return step


def main(steps=200, batch=128, rounds=20):
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32), jnp.asarray(digits.target[order])
    held_out, images = images[:360], images[360:]
    answers, labels = labels[:360], labels[360:]

    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = optimizer.init(variables)
    before = step_of(loss)
    fast = fb.accelerate(loss)  # the changed line
    after = step_of(fast)

    first = (images[:batch], labels[:batch])
    print(fast.report(variables, *first))
    begin, value = (variables, state), fast(variables, *first)
    for i in range(steps):
        rows = np.random.default_rng(i).choice(len(images), batch)
        variables, state, value = after(variables, state, images[rows], labels[rows])
    right = (model.apply(variables, held_out).argmax(-1) == answers).mean()
    print(f"loss {value:.4f} after {steps} steps; {right:.1%} of {len(answers)} held-out digits are right")

    times = interleave([lambda: before(*begin, *first), lambda: after(*begin, *first)], rounds)
    slow, quick = (1e3 * statistics.median(t) for t in times)
    print(f"a step took {slow:.2f} ms and takes {quick:.2f} ms: {ratio(*times)} times as fast")
    return right, value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("steps", 200), ("batch", 128), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
