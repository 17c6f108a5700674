"""Why a deep network does not learn, and what was tried: gradients over depth, and the loss over the rate.

The same perceptron of ten hidden layers on handwritten digits, four times: sigmoid, tanh whose kernels are too small, tanh
and relu with the initialisers that suit them. Of the first, ``fb.health`` tells where the gradient goes, and tries changes
on copies.

    python examples/health.py [--full] [--out FOLDER]

Prints the examination of the stack of sigmoids, and writes two pictures: depth.png, which compares the four, and health.png.
The exit code is 1 if the sigmoids are not found to vanish, or nothing is found that helps.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.nn import initializers
from sklearn.datasets import load_digits

import fbackprop as fb
from fbackprop import layers, ops
from fbackprop.diagnosing import rate_sweep
from fbackprop.diagnosing.pictures import draw_depth, draw_rates
from fbackprop.drawing import picture

STACKS = {
    "sigmoid, LeCun": (ops.sigmoid, initializers.lecun_normal()),
    "tanh, kernels of 0.3 times LeCun's": (ops.tanh, initializers.variance_scaling(0.09, "fan_in", "normal")),
    "tanh, LeCun": (ops.tanh, initializers.lecun_normal()),
    "relu, He": (ops.relu, initializers.he_normal()),
}


def network(activation, initializer, depth, width):
    hidden = [part for _ in range(depth) for part in (layers.Dense(width, kernel_init=initializer), activation)]
    return layers.serial(*hidden, layers.Dense(10))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="as described; without, six small layers, and two of the four")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="where the pictures go (default: a new folder)")
    options = parser.parse_args()
    out = options.out or pathlib.Path(tempfile.mkdtemp(prefix="health-"))
    out.mkdir(parents=True, exist_ok=True)
    depth, width, steps = (10, 32, 40) if options.full else (6, 8, 5)
    digits: Any = load_digits()
    x, labels = jnp.asarray(digits.data[:128] / 16 - 0.5, jnp.float32), jnp.asarray(digits.target[:128])
    names = list(STACKS)[:: 1 if options.full else 3]

    gradients, rates, examined = {}, {}, []
    for name in names:
        model = network(*STACKS[name], depth, width)
        params, _ = model.init(jax.random.key(0), x)

        def loss(params, x, labels, model=model):
            return ops.softmax_cross_entropy_with_integer_labels(model(params, x), labels).mean()

        first = name == names[0]
        found = fb.health(loss, params, x, labels, rate=0.1, optimizer=optax.sgd(0.1), steps=steps, try_fixes=first)
        gradients[name] = [layer.gradient for layer in found.layers]
        rates[name] = found.rates or rate_sweep(loss, params, x, labels, rate=0.1, steps=steps)
        examined.append(found)
        print(f"{name:36} gradient at the first layer: {found.reach:.1e} times that at the last")

    print()
    print(examined[0])
    with picture(
        out / "depth.png", 10.5, 4.4, f"A perceptron of {depth} hidden layers on digits, before its first step"
    ) as figure:
        left, right = figure.subplots(1, 2)
        draw_depth(left, gradients, [str(i + 1) for i in range(depth + 1)])
        left.set_xlabel("layer")
        draw_rates(right, rates, float(examined[0].now.loss), steps)
        right.set_xlabel("rate")
    examined[0].plot(out / "health.png")
    print(f"\npictures in {out}: depth.png, health.png")
    # What the pictures are to show: the first stack loses its gradient and a change was found that helps; the last keeps it.
    (finding,) = examined[0].findings
    return 0 if finding.kind == "vanishing" and finding.proposal is not None and examined[-1].reach > 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
