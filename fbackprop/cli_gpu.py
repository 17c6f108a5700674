"""The command ``fbackprop bench gpu``: its parser. What it runs is imported when it runs."""

import argparse
from typing import Any

from fbackprop.options import file, one_of, picture, positive, whole

__all__ = ["bench_gpu"]

_ABOUT = """\
Measures language models under training on a GPU: tokens a second, model FLOP utilization against a matrix product of the same
run, and peak memory. A step is loss, gradient and plain SGD; parameters in float32, computed in bfloat16, attention by cuDNN.

models (examples × tokens):
  gpt2-124m   16 × 1024          llama-1b    8 × 2048

variants, from the same weights and in turns:
  ours                      the model of this library, its blocks under a scan; and unrolled
  flax, flax checkpoint, …  Flax with cuDNN's attention: as it is, and with jax.checkpoint around each block, without a policy,
                            with dots_saveable and with dots_with_no_batch_dims_saveable
  accelerated, …            fbackprop.accelerate of Flax's model, as it is and with dots_saveable
"""

_END = """\
Before the clock starts the losses of the first steps are compared: who computes something else is refused. Utilization counts
the products of the plain model, nothing twice. Times faster is against Flax under its fastest policy, the median over the
turns, with its 95 % interval. Where JAX finds no GPU the command says what it skipped.

examples:
  fbackprop bench gpu
  fbackprop bench gpu gpt2-124m --batch 32 --json gpu.json --plot gpu.png
  fbackprop bench gpu --device cpu --size small     the same on a CPU, with models small enough for it

exit codes: 0 done, or nothing to measure on; 2 refused, with one sentence that says why; 130 interrupted: --json holds what was
measured until then.
"""


def bench_gpu(subparsers: Any) -> None:
    parser = subparsers.add_parser("gpu", help="tokens a second, utilization and memory of language models on a GPU")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _ABOUT, _END
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", type=_name, help="gpt2-124m, llama-1b (default: both)")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="where to measure (default: gpu)")
    add("--size", choices=("named", "small"), default="named", help="small: tiny models of the same form (default: named)")
    add("--batch", type=whole(1), metavar="N", help="examples in a step (default: as above)")
    add("--length", type=whole(1), metavar="N", help="tokens of each (default: as above)")
    add("--rounds", type=whole(1), metavar="N", help="so many turns (default: as many as fit the time, within limits)")
    add("--seconds", type=positive, default=60.0, metavar="S", help="time for the turns of a model (default: 60)")
    add("--json", type=file, metavar="FILE", help="write the rows to this file, too; kept up to date while it runs")
    add("--plot", type=picture, metavar="FILE", help="draw them: .png or .svg")
    parser.set_defaults(run=_run)


def _name(text: str) -> str:
    from fbackprop.measuring.gpu import NAMES

    return one_of("model", text, NAMES)


def _run(arguments: argparse.Namespace) -> int:
    from fbackprop.measuring.gpu import bench_gpu as run

    return run(arguments)
