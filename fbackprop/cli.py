"""The command ``fbackprop``. A subcommand is a function that adds its parser; what it runs is imported when it runs."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

__all__ = ["main"]

_TRAIN = """\
Trains a model with backward passes written by hand, and shows what came of it. Before the first step the gradient of
every parameter is compared with jax.grad of the definitions, on the first batch.

presets:
{presets}
  FILE.npz, FILE.csv  your own examples: in .npz the arrays x [N, features], [N, H, W] or [N, H, W, C] and
                      y [N], integers from 0; in CSV numbers, the label last, with or without a line of names.
                      A fifth is held out. Flat examples train a perceptron, images a convolutional network.
"""

_TRAIN_END = """\
DIR receives config.json, metrics.json, curves.png and checkpoints/. Ctrl-C writes a checkpoint and stops; with --resume
the run goes on and ends with the parameters, bit for bit, of one that never stopped.

examples:
  fbackprop train digits-cnn
  fbackprop train measurements.csv --epochs 50 --lr 0.001 --out runs/first
  fbackprop train measurements.csv --epochs 80 --out runs/first --resume

exit codes: 0 done; 2 refused, with one sentence that says why, and nothing written; 130 interrupted.
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
    add("preset", metavar="PRESET", help="a preset, or the path of an .npz or CSV file")
    add("--steps", type=_whole(1), metavar="N", help="how many steps; or")
    add("--epochs", type=_whole(1), metavar="N", help="how many passes over the examples (default: the preset's)")
    add("--batch", type=_whole(1), metavar="N", help="examples in a step (default: the preset's)")
    add("--lr", type=_positive, metavar="RATE", help="learning rate, the peak where it decays (default: the preset's)")
    add("--optimizer", metavar="NAME", help="sgd, momentum, adam, adamw, lion, rmsprop, … (default: the preset's)")
    add("--dtype", metavar="NAME", help="what to compute in: float32, bfloat16 (with float32 parameters) or float64")
    add("--seed", type=_whole(0), metavar="N", help="decides initial weights, order and dropout (default: 0)")
    add("--out", metavar="DIR", help="where the files go; it must not hold a run yet (default: a new runs/PRESET-N)")
    add("--resume", action="store_true", help="continue the run in DIR; --steps or --epochs may extend it")
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


SUBCOMMANDS: tuple[Callable[[Any], None], ...] = (_train,)
"""Each adds its parser, with the function that runs it as the default ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (by default those of the process) and returns its exit code."""
    parser = _Parser(prog="fbackprop", description="Backpropagation by hand in JAX: train models with it.")
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
        print("fbackprop: interrupted before the first step.", file=sys.stderr)
        return 130


def _is_refusal(error: ValueError) -> bool:
    """Whether the error is a sentence for the person who gave the command, and no fault of the program."""
    from fbackprop.data import DataError
    from fbackprop.training import RunError

    return isinstance(error, (DataError, RunError))


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number < 2**31:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return number

    return parse


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number
