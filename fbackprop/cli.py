"""The command ``fbackprop``. A subcommand is a function that adds its parser; what it runs is imported when it runs."""

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from fbackprop.cli_bench import bench
from fbackprop.cli_explain import explain
from fbackprop.cli_ops import ops
from fbackprop.options import FLOATS, array, checks, dtype, file, positive, static, whole, zero_or_more

__all__ = ["main"]

_TRAIN = """\
Trains a model with backward passes written by hand, and shows what came of it. Before the first step the gradient of
every parameter is compared with jax.grad of the definitions, on the first batch.

presets:
{presets}
  FILE.npz, FILE.csv  your own examples: in .npz the arrays x [N, features], [N, H, W] or [N, H, W, C] and
                      y [N], integers from 0; in CSV numbers, the label last, with or without a line of names.
                      A fifth is held out. Flat examples train a perceptron, images a convolutional network.
  images.idx, …-images-idx3-ubyte
                      images in the format of MNIST, their labels beside them in …-labels-idx1-ubyte, .gz or not; with
                      t10k-… beside train-… these are held out. Files that are not .gz are mapped into memory.
  FILE.txt, .md, .py  your own text, as bytes, for the GPT of stdlib-gpt; the last tenth is held out.
  FILE.bin, .npy      your own tokens for it: in .bin integers of 16 bits (of 32 in *.uint32.bin), in .npy integers [N].
                      Text and tokens are mapped into memory, not read.
"""

_TRAIN_END = """\
DIR receives config.json, metrics.json, curves.png, checkpoints/, where text is learned samples.txt, and with --health
health.png. Ctrl-C writes a checkpoint and stops; with --resume the run goes on and ends with the parameters, bit for bit,
of one that never stopped.

examples:
  fbackprop train digits-cnn
  fbackprop train stdlib-gpt --out runs/code && fbackprop generate runs/code --prompt 'def '
  fbackprop train book.txt --layers 4 --width 256 --heads 8 --length 256 --batch 8
  fbackprop train measurements.csv --epochs 50 --lr 0.001 --out runs/first
  fbackprop train measurements.csv --epochs 80 --out runs/first --resume

exit codes: 0 done; 2 refused, with one sentence that says why, and nothing written; 130 interrupted.
"""

_CHECK = """\
Compares backward passes with the gradient of their definitions in float64, and with finite differences. A function may
err by twice what jax.grad of its definition errs by in the same dtype, or by four units in the last place.

what to check:
  layer_norm            an op of the library, on all samples of its rule:
{ops}
  FILE.py::NAME         a function of yours: jax.custom_vjp, or any that JAX differentiates; NAME may be Class.method
  package.module:NAME   the same in a module that can be imported

A function of yours is compared with --reference, by default with its undecorated self. Its arguments come from one
--shape for each, in order, or from --args. --shape also puts another array in place of an op's samples.

shapes:
  4,8  scalar           normal numbers in float32, or in --dtype
  4,8:bfloat16          in another dtype
  4,8:positive          numbers from 0.5 to 1.5; after a dtype too: 4,8:float16:positive
  '4:int32<10'          integers from 0 to 9; with quotes, because of the shell
  4,8:bool              True and False
  key                   a random key

factories (--args NAME): a function in the same file, called without arguments or with the seed, that returns a tuple of
arguments, or a dict with args (the tuple) and, as in fbackprop.check: keywords, static, reference, exact, argnums.
"""

_CHECK_END = """\
checks:
  quick      {quick}
  with --full also {full}

examples:
  fbackprop check layer_norm max_pool
  fbackprop check --all --dtype bfloat16 --json checked.json
  fbackprop check ops.py::my_softmax --shape 4,8 --static axis=-1
  fbackprop check ops.py::my_loss --shape 4,8 --shape '4:int32<8' --reference plain_loss --full
  fbackprop check ops.py::attention --args make_arguments --seeds 5

exit codes: 0 nothing found; 1 something is wrong; 2 refused, with one sentence that says why; 130 interrupted.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fbackprop: {message.rstrip('.')}; {self.prog} --help tells more.\n")


def _train(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help="train a preset or your own data", add_help=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _TRAIN_END
    add = parser.add_argument
    add("preset", metavar="PRESET", help="a preset, or the path of a file")
    add("--steps", type=whole(1), metavar="N", help="how many steps; or")
    add("--epochs", type=whole(1), metavar="N", help="how many passes over the examples (default: the preset's)")
    add("--batch", type=whole(1), metavar="N", help="examples in a step (default: the preset's)")
    add("--lr", type=positive, metavar="RATE", help="learning rate, the peak where it decays (default: the preset's)")
    add("--optimizer", metavar="NAME", help="sgd, momentum, adam, adamw, lion, rmsprop, … (default: the preset's)")
    add("--model", metavar="NAME", help="for text and tokens: a GPT of a size that has a name, such as gpt2-124m")
    add("--layers", type=whole(1), metavar="N", help="blocks of a language model; also, in place of the preset's or model's:")
    add("--width", type=whole(1), metavar="N", help="features of its stream; the preset's rate falls with them")
    add("--heads", type=whole(1), metavar="N", help="heads of attention")
    add("--length", type=whole(1), metavar="N", help="tokens of a window")
    add("--dtype", metavar="NAME", help="what to compute in: float32, bfloat16 (with float32 parameters) or float64")
    add("--seed", type=whole(0), metavar="N", help="decides initial weights, order and dropout (default: 0)")
    add("--out", metavar="DIR", help="where the files go; it must not hold a run yet (default: a new runs/PRESET-N)")
    add("--resume", action="store_true", help="continue the run in DIR; --steps or --epochs may extend it")
    look = "look every N steps (default: 50) at gradients, gains, updates, dead and saturated units; writes health.png"
    add("--health", type=whole(1), nargs="?", const=50, metavar="N", help=look)
    add("-h", "--help", action=_TrainHelp, nargs=0, default=argparse.SUPPRESS, help="show this message and exit")
    parser.set_defaults(run=_run_train)


class _TrainHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from fbackprop.training.presets import PRESETS

        presets = "\n".join(f"  {preset.name:<18}  {preset.summary}" for preset in PRESETS.values())
        parser.description = _TRAIN.format(presets=presets)
        parser.print_help()
        parser.exit()


def _run_train(arguments: argparse.Namespace) -> int:
    from fbackprop.training.command import Options, train

    return train(Options(**{name: value for name, value in vars(arguments).items() if name not in ("run", "command")}))


def _generate(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="draw text from a language model that was trained")
    parser.description = "Continues a prompt with the newest checkpoint of a run of stdlib-gpt, stdlib-lstm or your own text."
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="the folder of the run, such as runs/stdlib-gpt-1")
    add("--prompt", metavar="TEXT", help="what to continue; for a model of tokens, numbers (default: a new line, or token 0)")
    add("--tokens", type=whole(1), default=400, metavar="N", help="how many to draw (default: 400)")
    add("--temperature", type=zero_or_more, default=0.8, metavar="T", help="0 takes the likeliest each time (default: 0.8)")
    add("--top-k", type=whole(1), metavar="K", help="draw from the K likeliest alone (default: from all)")
    add("--seed", type=whole(0), default=0, metavar="S", help="decides the draws (default: 0)")
    parser.set_defaults(run=_run_generate)


def _run_generate(arguments: argparse.Namespace) -> int:
    from fbackprop.training.generating import GenerateOptions, generate_from_run

    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    return generate_from_run(GenerateOptions(**given))


def _check(subparsers: Any) -> None:
    parser = subparsers.add_parser("check", help="check backward passes, the library's or your own", add_help=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("targets", nargs="*", metavar="WHAT", help="an op, FILE.py::NAME or package.module:NAME")
    add("--all", action="store_true", help="every op of the library")
    add("--full", action="store_true", help="also other values, shapes, dtypes, transformations and 8 devices; slower")
    add("--checks", type=checks, metavar="A,B", help="only these checks (names below)")
    add("--dtype", type=dtype, default="float32", metavar="NAME", help=f"{', '.join(FLOATS)} (default: float32)")
    add("--seed", type=whole(0), default=0, metavar="N", help="decides the random arrays (default: 0)")
    add("--seeds", type=whole(1), default=1, metavar="N", help="so many seeds, from --seed on (default: 1)")
    add("--shape", type=array, action="append", default=[], metavar="SHAPE", help="one positional argument; may be repeated")
    add("--args", metavar="NAME", help="a function in the same file that returns the arguments")
    add("--reference", metavar="NAME", help="the definition, in the same file")
    add("--static", type=static, action="append", default=[], metavar="NAME=VALUE", help="an option, as a Python literal")
    add("--inexact", action="store_true", help="it is meant to differ from the gradient (straight-through)")
    add("--json", type=file, metavar="FILE", help="write what was found to this file, too")
    add("-v", "--verbose", action="store_true", help="the table of errors of what is right, too")
    add("-h", "--help", action=_CheckHelp, nargs=0, default=argparse.SUPPRESS, help="show this message and exit")
    parser.set_defaults(run=_run_check)


class _CheckHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from fbackprop.checking import CHECKS, THOROUGH
        from fbackprop.loading import ops

        def lines(names: Any, indent: int) -> str:
            words = ", ".join(name.replace(" ", "-") for name in names)
            return textwrap.fill(words, 120 - indent, break_on_hyphens=False).replace("\n", "\n" + " " * indent)

        parser.description = _CHECK.format(ops=" " * 24 + lines(ops(), 24))
        parser.epilog = _CHECK_END.format(quick=lines(CHECKS, 13), full=lines(THOROUGH, 19))
        parser.print_help()
        parser.exit()


def _run_check(arguments: argparse.Namespace) -> int:
    from fbackprop.checking.command import run

    return run(arguments)


SUBCOMMANDS: tuple[Callable[[Any], None], ...] = (_train, _generate, _check, explain, bench, ops)
"""Each adds its parser, with the function that runs it as the default ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (by default those of the process) and returns its exit code."""
    parser = _Parser(
        prog="fbackprop", description="Backpropagation by hand in JAX: train models, check and measure backward passes."
    )
    parser.add_argument("--version", action="version", version=f"fbackprop {version('fbackprop')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in SUBCOMMANDS:
        add(subparsers)
    given = parser.parse_args(arguments)
    with contextlib.suppress(AttributeError):  # a terminal that lacks a sign shows another
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return given.run(given)
    except ValueError as error:
        if not _is_refusal(error):
            raise
        print(f"fbackprop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fbackprop: interrupted.", file=sys.stderr)
        return 130


def _is_refusal(error: ValueError) -> bool:
    """Whether the error is a sentence for the person who gave the command, and no fault of the program."""
    from fbackprop.data import DataError
    from fbackprop.loading import Refusal
    from fbackprop.training import RunError

    return isinstance(error, (Refusal, DataError, RunError))
