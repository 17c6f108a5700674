"""The command ``fbackprop bench``: what it can measure, each with its parser. What it runs is imported when it runs."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from fbackprop.cli_aot import bench_aot
from fbackprop.cli_gpu import bench_gpu
from fbackprop.options import FLOATS, array, dtype, file, one_of, picture, positive, several, static, whole

__all__ = ["bench"]

_BENCH_OPS = """\
Measures ops with their hand-written backward against what a user would otherwise have, in the same run and in turns.

against:
  jax.grad              of the function of jax.nn, optax or Flax where there is one, else of the definition
  checkpoint            the same under jax.checkpoint; also dots_saveable, dots_with_no_batch_dims_saveable
  jax-cce, tokamax      where installed
  torch                 PyTorch on the CPU, eager, where installed

settings:
  fused                 forward and backward in one compiled program
  stored                two programs: what is kept goes through memory, as under lax.scan over layers

Without NAMES: the ops of the fixed workloads:
{ops}
"""

_BENCH_OPS_END = """\
A time ratio is a rival's time over ours (above 1: ours is faster), the median over the turns, with its 95 % interval. Kept are
all arrays of jax.vjp(f, *args)[1], arguments included; temporaries are the compiler's, of the fused program; the error is the
worst against jax.grad of the definition in float64, over the largest element of each gradient.

Workloads are those of the ops; --shape gives others, one for each positional argument, spelled as in `fbackprop check --help`;
--workload names a function, called without arguments or with the seed, that returns a tuple of arguments, or a dict with args
and, if wanted, static (options by name) and note. A note that says "kernel frozen" makes that argument constant.

examples:
  fbackprop bench ops
  fbackprop bench ops max_pool layer_norm --json bench.json --plot bench.png
  fbackprop bench ops gelu --shape 2048,11008:bfloat16 --against jax.grad,checkpoint
  fbackprop bench ops lora_dense --shape 64,512 --shape 512,512 --shape 512,8 --shape 8,512 --note "kernel frozen"
  fbackprop bench ops conv --workload mine.py::images --rounds 30

exit codes: 0 done; 2 refused, with one sentence that says why; 130 interrupted: --json holds what was measured until then.
"""

_BENCH_SCALING = """\
Measures how memory and time grow, for value and gradient in one program: ours, jax.grad, and the best policy of jax.checkpoint
at each point.

sweeps:
  vocabulary   linear_cross_entropy, 1k to 256k classes
  length       dot_product_attention, causal, 512 to 16k positions
  depth        reversible, 1 to 64 layers
"""

_BENCH_SCALING_END = """\
What needs more temporaries than --memory is compiled and its bytes are shown, but it is not run.

examples:
  fbackprop bench scaling --plot scaling.png --json scaling.json
  fbackprop bench scaling length --most 4096

exit codes: 0 done; 2 refused, with one sentence that says why; 130 interrupted: --json holds what was measured until then.
"""


_BENCH_MODELS = """\
Measures steps of training (loss, gradient, plain SGD) of whole models, from the same weights and in turns, on the device that
JAX finds. Before the clock starts the losses of the first steps are compared: who computes something else is refused.

models:
  cnn      conv 32, pool, conv 64, pool, dense 128, dense 10; 128 images of 28×28
  gpt      GPT-2's form: 4 layers, width 256, 8 heads, 8 sequences of 256 tokens
  lstm     one layer of width 256, 32 sequences of 128 tokens
  resnet   ResNet-20 for CIFAR, 32 images of 32×32

ours          the model of this library
accelerated   fbackprop.accelerate of Flax's model

against, each where it is installed:
  flax, equinox                     under jax.grad
  flax checkpoint, …                the same with jax.checkpoint around each block (cnn, lstm: around the model), without a
                                    policy, with dots_saveable and with dots_with_no_batch_dims_saveable
  torch, torch.compile              PyTorch on the CPU
"""

_BENCH_MODELS_END = """\
A ratio is a rival's time over ours (above 1: ours is faster), the median over the turns, with its 95 % interval; compile times
are of one compilation each.

examples:
  fbackprop bench models
  fbackprop bench models cnn gpt --json models.json --plot models.png
  fbackprop bench models gpt --against "flax,flax dots_saveable,torch"

exit codes: 0 done; 2 refused, with one sentence that says why; 130 interrupted: --json holds what was measured until then.
"""


def bench(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure time, memory and error against jax.grad and other libraries")
    inner = parser.add_subparsers(dest="bench", metavar="WHAT", required=True, parser_class=type(parser))
    for add in BENCHES:
        add(inner)


def _bench_ops(subparsers: Any) -> None:
    parser = subparsers.add_parser("ops", help="every op against its rivals", add_help=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", help="ops (default: those of the fixed workloads)")
    add("--all", action="store_true", help="every op that has a workload; takes long")
    add("--against", type=several("rival", _rivals), default=None, metavar="A,B", help="only these rivals (default: all)")
    add("--settings", type=several("setting", _settings), default=None, metavar="A,B", help="fused, stored (default: both)")
    _add_effort(add, "workload", 2.0)
    add("--shape", type=array, action="append", default=[], metavar="SHAPE", help="one argument of a workload of your own")
    add("--static", type=static, action="append", default=[], metavar="NAME=VALUE", help="an option of it, a Python literal")
    add("--dtype", type=dtype, default="float32", metavar="NAME", help=f"of it: {', '.join(FLOATS)} (default: float32)")
    add("--note", default="", metavar="TEXT", help='words for it; "NAME frozen" makes that argument constant')
    add("--workload", action="append", default=[], metavar="FILE.py::NAME", help="a function that returns the arguments")
    add("--seed", type=whole(0), default=0, metavar="N", help="decides the arrays of your own workloads (default: 0)")
    _add_files(add)
    add("-h", "--help", action=_BenchOpsHelp, nargs=0, default=argparse.SUPPRESS, help="show this message and exit")
    parser.set_defaults(run=_run)


class _BenchOpsHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from fbackprop.measuring.command import fixed_ops

        lines = textwrap.fill(", ".join(fixed_ops()), 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        parser.description, parser.epilog = _BENCH_OPS.format(ops=lines), _BENCH_OPS_END
        parser.print_help()
        parser.exit()


def _bench_scaling(subparsers: Any) -> None:
    parser = subparsers.add_parser("scaling", help="memory and time over vocabulary, length and depth")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _BENCH_SCALING, _BENCH_SCALING_END
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", type=_sweep, help="vocabulary, length, depth (default: all)")
    add("--most", type=whole(1), metavar="N", help="no sizes above this")
    add("--memory", type=positive, default=4.0, metavar="GIB", help="run nothing with more temporaries (default: 4)")
    _add_effort(add, "point", 3.0)
    _add_files(add)
    parser.set_defaults(run=_run)


def _bench_models(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="steps of training against Flax, Equinox and PyTorch")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _BENCH_MODELS, _BENCH_MODELS_END
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", type=_model, help="cnn, gpt, lstm, resnet (default: all)")
    add("--against", type=several("rival", _sides), default=None, metavar="A,B", help="only these rivals (default: all)")
    _add_effort(add, "model", 20.0)
    _add_files(add)
    parser.set_defaults(run=_run)


def _add_effort(add: Callable[..., Any], what: str, seconds: float) -> None:
    add("--rounds", type=whole(1), metavar="N", help="so many turns (default: as many as fit the time, within limits)")
    add("--seconds", type=positive, default=seconds, metavar="S", help=f"time for the turns of a {what} (default: {seconds:g})")


def _add_files(add: Callable[..., Any]) -> None:
    add("--json", type=file, metavar="FILE", help="write the rows to this file, too; kept up to date while it runs")
    add("--plot", type=picture, metavar="FILE", help="draw them: .png or .svg")


def _run(arguments: argparse.Namespace) -> int:
    from fbackprop.measuring import command

    return getattr(command, f"bench_{arguments.bench}")(arguments)


BENCHES: tuple[Callable[[Any], None], ...] = (_bench_ops, _bench_models, _bench_scaling, bench_aot, bench_gpu)
"""What ``bench`` measures; as SUBCOMMANDS."""


def _rivals() -> tuple[str, ...]:
    from fbackprop.measuring.rivals import AGAINST

    return AGAINST


def _settings() -> tuple[str, ...]:
    from fbackprop.measuring.programs import SETTINGS

    return SETTINGS


def _sides() -> tuple[str, ...]:
    from fbackprop.measuring.steps import AGAINST

    return AGAINST


def _model(text: str) -> str:
    from fbackprop.measuring.twins import MODELS

    return one_of("model", text, MODELS)


def _sweep(text: str) -> str:
    from fbackprop.measuring.scaling import SWEEPS

    return one_of("sweep", text, SWEEPS)
