"""What an explanation costs: of GPT's loss beside an ordinary step of value and gradient, both compiled, taken in turns.

    python benchmarks/explain.py [--layers 4] [--width 256] [--heads 8] [--length 256] [--batch 8] [--vocabulary 256]

The figure is the ratio of the times, with its 95 % interval; the bar is 5.
"""

import argparse
import time

import jax

import fbackprop as fb
from fbackprop.measuring import interleave, ratio

SIZES = {"layers": 4, "width": 256, "heads": 8, "length": 256, "batch": 8, "vocabulary": 256, "rounds": 12, "seconds": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    model = fb.models.gpt(given.vocabulary, given.layers, given.width, given.heads, given.length)
    tokens = jax.random.randint(jax.random.key(0), (given.batch, given.length + 1), 0, given.vocabulary)
    args = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])[0], tokens[:, :-1], tokens[:, 1:]

    def compiled(fn: object) -> tuple[object, float]:
        start = time.perf_counter()
        return jax.jit(fn).lower(*args).compile(), time.perf_counter() - start  # type: ignore[call-overload]

    step, _ = compiled(jax.value_and_grad(model.loss))
    explain, seconds = compiled(lambda *args: fb.explain(model.loss, *args))
    record = explain(*args)  # type: ignore[operator]
    values = sum(leaf.nbytes for leaf in jax.tree.leaves(record))
    print(f"{record!r}: compiled in {seconds:.1f} s, {values / 2**20:.0f} MiB, agrees with jax.grad: {record.agrees}")
    calls = (lambda: explain(*args)), (lambda: step(*args))  # type: ignore[operator]
    longer, shorter = interleave(calls, given.rounds, 0.01, given.seconds, settled=True)
    print(f"an explanation takes {ratio(longer, shorter)} times a step of {1e3 * sorted(shorter)[len(shorter) // 2]:.0f} ms")


if __name__ == "__main__":
    main()
