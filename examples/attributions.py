"""What in a digit made the network say so: answers of one network, by other backward passes through the same forward.

    python examples/attributions.py [PICTURE.png]

Trains a small convolutional network on scikit-learn's digits, then draws, beside some digits that were not trained on, the
gradient of the winning logit and what ``with_rules`` makes of it. Of LRP it prints that relevance is conserved: the logit is
the relevance of the pixels, that of the biases, and what ε took.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fbackprop as fb
from fbackprop import layers as L
from fbackprop.alternatives import lrp
from fbackprop.data import digits
from fbackprop.drawing import FAINT, picture

MODEL = L.serial(
    L.Conv(8, (3, 3)), fb.relu, L.Conv(16, (3, 3)), fb.relu, L.MaxPool((2, 2), (2, 2)), L.Flatten(), L.Dense(10)
)  # fmt: skip
STEPS, BATCH, SHOWN = 200, 32, (0, 3, 4, 7, 8)
FORMS = {"LRP-ε, ε = 0.1": lrp(epsilon=0.1), "LRP-γ, γ = 0.5": lrp(gamma=0.5)}
TITLES = ["gradient", "gradient × input\n(= LRP-0 here)", "guided", "deconvolution", *FORMS]


def train(x: jax.Array, y: jax.Array) -> Any:
    """The parameters after ``STEPS`` steps of Adam, in one program."""
    params, _ = MODEL.init(jax.random.key(0), x[:1])
    optimizer = optax.adam(5e-3)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return fb.softmax_cross_entropy_with_integer_labels(MODEL(params, x[batch]), y[batch]).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.randint(key, (BATCH,), 0, len(x)))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])(params)


@jax.jit
def attributions(params: Any, x: jax.Array) -> tuple[list[jax.Array], list[Any]]:
    """For each of TITLES the shares of the pixels in the winning logit, and for each of FORMS the whole record, by image."""

    def winning(model: Any) -> Any:
        return jax.grad(lambda x: model(params, x).max(-1).sum())(x)

    gradient = winning(MODEL)
    maps = [gradient, gradient * x, *(winning(fb.with_rules(MODEL, rules)) for rules in ("guided", "deconvolution"))]
    # One image after the other, so that the biases' shares are told for each.
    records = [jax.vmap(lambda x: fb.relevance(MODEL, params, x[None], rules=rules))(x) for rules in FORMS.values()]  # noqa: B023
    return [*maps, *(record.input[:, 0] for record in records)], records


def sums(record: Any) -> list[str]:
    """How the logit of each image is shared out."""
    found = []
    for i in range(len(record.output)):
        own = jax.tree.map(lambda a: a[i], record)  # noqa: B023
        logit, pixels, biases, lost = (float(v) for v in (own.output.sum(), own.input.sum(), own.bias, own.lost))
        found.append(
            f"{logit:.2f} = pixels {pixels:.2f}\n+ biases {biases:.2f} + lost {abs(lost) if abs(lost) < 5e-3 else lost:.2f}"
        )
    return found


def draw(path: pathlib.Path, x: np.ndarray, rows: list[str], maps: list[np.ndarray], texts: list[list[str]]) -> None:
    """A row for each image, a column for each map; blue to red around 0, by the largest value of each map."""
    columns = 1 + len(maps)
    title = "What in the digit speaks for the answer: one forward, other backward passes"
    with picture(path, 1.6 * columns, 1.7 * len(x) + 1.1, title) as figure:
        axes = figure.subplots(len(x), columns)
        drawn: Any = None
        for i, name in enumerate(rows):
            axes[i, 0].imshow(x[i, ..., 0], cmap="gray_r", vmin=0, vmax=1)
            axes[i, 0].set_ylabel(name, fontsize=9)
            for axis, values in zip(axes[i, 1:], maps):
                largest = np.abs(values[i]).max()
                drawn = axis.imshow(values[i, ..., 0] / largest, cmap="RdBu_r", vmin=-1, vmax=1)
            for axis, text in zip(axes[i, -len(texts) :], texts):
                axis.set_xlabel(text[i], fontsize=7.5)
        for axis, name in zip(axes[0], ["digit", *TITLES]):
            axis.set_title(name, fontsize=9.5)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(FAINT)
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", fraction=0.015, pad=0.01, aspect=60, ticks=[-1, 0, 1])
        bar.ax.set_xticklabels(["speaks against", "0", "speaks for"], fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=pathlib.Path, metavar="PICTURE.png", help="default: in a new folder")
    path = parser.parse_args().picture or pathlib.Path(tempfile.mkdtemp(prefix="attributions-"), "digits.png")
    data = digits(images=True)
    params = train(jnp.asarray(data.x), jnp.asarray(data.y))
    logits = MODEL(params, jnp.asarray(data.test_x))
    print(f"{np.mean(np.argmax(logits, -1) == data.test_y):.1%} of {len(data.test_y)} digits right")
    first = [int(np.flatnonzero(data.test_y == digit)[0]) for digit in SHOWN]
    x, labels = jnp.asarray(data.test_x[first]), data.test_y[first]
    maps, records = attributions(params, x)
    texts = [sums(record) for record in records]
    for name, lines in zip(FORMS, texts):
        for label, line in zip(labels, lines):
            print(f"{name}: the {label}'s logit {line}".replace("\n", " "))
    exact = fb.relevance(MODEL, params, x)
    worst = abs(float(exact.lost)) / float(jnp.sum(exact.output))
    print(exact)
    rows = [f"{label}, read as {answer}" for label, answer in zip(labels, np.argmax(logits[jnp.asarray(first)], -1))]
    draw(path, np.asarray(x), rows, [np.asarray(m) for m in maps], texts)
    print(f"drawn in {path}")
    return 0 if worst < 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
