"""The command ``fbackprop bench aot``: its parser. What it runs is imported when it runs."""

import argparse
from typing import Any

from fbackprop.options import file, whole

__all__ = ["bench_aot"]

_ABOUT = """\
Compiles training steps for devices that are not there, and tells the memory that their programs need and the work of their
matrix products: the loss and its gradient, parameters in float32, computed in bfloat16, no optimizer. Nothing runs.

models (examples × tokens, or pixels along an edge):
  gpt2-124m   16 × 1024          llama-1b    8 × 2048          resnet50    128 × 224
  and the others of fbackprop.models.SIZES; ops by name, at their workloads

variants:
  ours                    blocks under a scan; also unrolled, and under jax.checkpoint
  jax.grad                the same model without our rules; also unrolled
  flax                    Flax's model of the same size, and the same through fbackprop.accelerate (language models)
  checkpoint, …           jax.checkpoint around each block (resnet50: around the model) without a policy, with dots_saveable and
                          with dots_with_no_batch_dims_saveable; also with the loss in chunks of tokens, each computed again
"""

_END = """\
On a GPU attention is cuDNN's, for all variants; its own matrix products are not in the column of FLOPs, which counts programs
as traced; how often its forward runs stands beside. On several devices the data are shared out and bytes are of one.

targets: h200; FILE.txtpb, XLA's description of another GPU; TPUs by topology, such as v5e:2x2 or v5p:2x2x1.
needed:  for GPUs jax[cuda12], for TPUs jax[tpu], of the version of jax that is installed; no device.

examples:
  fbackprop bench aot
  fbackprop bench aot gpt2-124m --target h200 --target v5e:2x2 --json aot.json
  fbackprop bench aot conv max_pool --target h200

exit codes: 0 done; 2 refused, with one sentence that says why; 130 interrupted: --json holds what was compiled until then.
"""


def bench_aot(subparsers: Any) -> None:
    parser = subparsers.add_parser("aot", help="memory of training steps, compiled for devices that are not there")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _ABOUT, _END
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", help="models, or ops (default: the three models above)")
    add("--target", action="append", default=[], metavar="TARGET", help="what to compile for; more than once (default: h200)")
    add("--batch", type=whole(1), metavar="N", help="examples of a batch")
    add("--length", type=whole(1), metavar="N", help="tokens of an example, or pixels along an edge")
    add("--json", type=file, metavar="FILE", help="write the rows to this file, too; kept up to date while it runs")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from fbackprop.measuring.aot import bench_aot as run

    return run(arguments)
