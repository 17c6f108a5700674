"""What single ops need when compiled for a GPU that is not there, and what linear_cross_entropy's gradient is worth.

    python benchmarks/aot.py [--target h200]

Writes two tables in Markdown: temporaries of value and gradient of attention over the length and of linear_cross_entropy at a
size of today, compiled for the target (as ``fbackprop bench aot``, whose needs it shares); and, on the CPU, the error of
some rows and columns of linear_cross_entropy's gradient against float64, for both of its schedules and for jax.grad.
"""

import argparse
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import fbackprop as fb
from fbackprop.measuring.aot import compiled_row, target_of

LENGTHS = (2048, 4096, 8192, 16384)
TOKENS, FEATURES, CLASSES = 512, 1024, 32064  # of the errors


def temporaries(target: Any, loss: Any, arrays: tuple[Any, ...], moved: tuple[int, ...]) -> str:
    row = compiled_row(target, "op", "ours", (jax.value_and_grad(loss, moved), arrays, ()))
    return row["note"] or f"{row['temp_bytes'] / 2**20:,.1f}"


def attention(name: str) -> None:
    target = target_of(name)
    print("| causal attention, bf16 2 × T × 8 × 64, our own blocks | MiB | jax.grad of the definition |")
    print("| --- | --- | --- |")
    for length in LENGTHS:
        array = jax.ShapeDtypeStruct((2, length, 8, 64), jnp.bfloat16)

        def loss(q: Any, k: Any, v: Any) -> jax.Array:
            return fb.dot_product_attention(q, k, v, is_causal=True, implementation="xla").astype(jnp.float32).sum()

        both = (temporaries(target, fn, (array,) * 3, (0, 1, 2)) for fn in (loss, fb.without_rules(loss)))
        print(f"| T = {length} | {' | '.join(both)} |", flush=True)
    print("\n| linear_cross_entropy, bf16, mean | MiB | jax.grad of the definition |")
    print("| --- | --- | --- |")
    for tokens, features, classes in ((8192, 4096, 128256), (16384, 768, 50257)):
        shapes = (tokens, features), (features, classes)
        x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        fns = fb.linear_cross_entropy, fb.without_rules(fb.linear_cross_entropy)
        both = (temporaries(target, fn, (x, kernel, labels), (0, 1)) for fn in fns)
        print(f"| N {tokens}, H {features}, V {classes} | {' | '.join(both)} |", flush=True)


def errors() -> None:
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(TOKENS, FEATURES)), jnp.bfloat16)
    kernel = jnp.asarray(draw.normal(size=(FEATURES, CLASSES)) * FEATURES**-0.5, jnp.bfloat16)
    labels = draw.integers(0, CLASSES, TOKENS)
    rows, columns = draw.integers(0, TOKENS, 32), np.concatenate([draw.integers(0, CLASSES, 64), labels[:64]])
    wide_x, wide_kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    z = wide_x @ wide_kernel
    dz = np.exp(z - z.max(1, keepdims=True))
    dz /= dz.sum(1, keepdims=True)
    dz[np.arange(TOKENS), labels] -= 1
    dx, dkernel = dz[rows] @ wide_kernel.T / TOKENS, wide_x.T @ dz[:, columns] / TOKENS

    def told(name: str, gradient: Any) -> None:
        got = [np.asarray(g, np.float64) for g in jax.jit(gradient)(x, kernel)]
        cells = []
        for mine, truth in ((got[0][rows], dx), (got[1][:, columns[:64]], dkernel[:, :64]), (got[1][:, columns], dkernel)):
            off = np.abs(mine - truth)
            cells += [f"{off.max() / np.abs(truth).max():.2e}", f"{np.sqrt(np.mean(off**2) / np.mean(truth**2)):.2e}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def loss(x: Any, kernel: Any) -> jax.Array:
        return fb.linear_cross_entropy(x, kernel, labels)

    print(f"\n| error at bf16, N {TOKENS}, H {FEATURES}, V {CLASSES} | dx: worst | rms ", end="")
    print("| dkernel, classes at random: worst | rms | and labels: worst | rms |")
    print("| --- " * 7 + "|")
    told("jax.grad", jax.grad(fb.without_rules(loss), (0, 1)))
    told("ours, in the forward", jax.grad(loss, (0, 1)))
    with mock.patch("fbackprop.ops.vocabulary._in_forward", return_value=False):
        jax.clear_caches()
        told("ours, in the backward", jax.grad(loss, (0, 1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="h200")
    chosen = parser.parse_args().target
    jax.config.update("jax_platforms", "cpu")
    attention(chosen)
    errors()
