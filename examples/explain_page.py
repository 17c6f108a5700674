"""The backward pass of a small CNN on one handwritten digit, as a page and as a picture.

The network learns for some steps, then one digit of the test part runs through it and back. The page shows each op with its
formula, its numbers and its gradients, and the chain of factors for one weight; it opens in any browser, without network.

    python examples/explain_page.py [--steps 100] [--digit 3] [--lang en|ko] [--to DIR]

Writes DIR/digit.html, DIR/digit.svg and DIR/digit.png (by default into a temporary folder) and prints where.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from fbackprop import ops
from fbackprop.explaining import explain
from fbackprop.layers import Conv, Dense, Flatten, MaxPool, serial

model = serial(Conv(6, (3, 3)), ops.relu, MaxPool((2, 2), (2, 2)), Flatten(), Dense(16), ops.tanh, Dense(10))
optimizer = optax.adam(0.01)


def loss(params, image, label):
    return ops.softmax_cross_entropy_with_integer_labels(model(params, image), label).mean()


@jax.jit
def step(params, state, images, labels):
    value, gradient = jax.value_and_grad(loss)(params, images, labels)
    changes, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, changes), state, value


def trained(images, labels, steps):
    params, _ = model.init(jax.random.key(0), images[:1])
    state = optimizer.init(params)
    for i in range(steps):
        rows = jax.random.randint(jax.random.key(i), (64,), 0, len(images))
        params, state, _ = step(params, state, images[rows], labels[rows])
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--digit", type=int, default=3, help="which of the digits that were not trained on")
    parser.add_argument("--lang", choices=("en", "ko"), default="en")
    parser.add_argument("--to", type=pathlib.Path, help="an existing folder")
    options = parser.parse_args()

    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    params = trained(images[:1500], labels[:1500], options.steps)
    at = 1500 + options.digit
    image, label = images[at : at + 1], labels[at : at + 1]
    explanation = explain(loss, params, image, label)

    folder = options.to or pathlib.Path(tempfile.mkdtemp(prefix="explain-"))
    # A weight of the last layer, from the liveliest hidden unit to the score of the right class.
    unit = int(jnp.abs(explanation.steps[-2].inputs["x"][0]).argmax())
    place = f"layers/6/kernel[{unit}, {int(label[0])}]"
    page = explanation.html(options.lang, chains=[place], file=folder / "digit.html")
    for name in ("digit.svg", "digit.png"):
        explanation.graph(folder / name, options.lang)
    print(f"a {int(label[0])}, taken for a {int(model(params, image).argmax())}; loss {float(explanation.output):.4f}")
    print(f"gradients are those of jax.grad: {explanation.agrees}")
    print(f"written: {folder / 'digit.html'} ({len(page.encode()) / 1024:.0f} KiB), digit.svg, digit.png")


if __name__ == "__main__":
    main()
