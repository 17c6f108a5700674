"""The command ``fbackprop explain``: its parser. What it runs is imported when it runs."""

import argparse
import os
from typing import Any

from fbackprop.options import file, one_of, whole

__all__ = ["explain"]

_EXPLAIN = """\
Shows how a gradient comes about, with every number taken from the library's own rules: forward, loss, backward factor by
factor, update.

examples of the documents:
  and-gate        the gate AND: a step decides it, a sigmoid learns it               (seed 001)
  neuron          one neuron with one weight: three factors                          (seed 001)
  two-three-two   two inputs, three hidden nodes, two outputs: the sum over paths    (seed 000)
  error-sharing   an error shared out in proportion, and why it is not the gradient  (seed 002)
  sigmoid-neuron  one neuron by hand, with two learning rates                        (seed 003)
  three-layer     three layers with ReLU: a forgotten bias, two dead units           (seed 004)
  cnn             two convolutions, two dense layers, softmax and cross-entropy      (seed 004)
  vanishing       each layer multiplies by w / 4: what vanishes and what explodes
Where a document's number is wrong, both are shown, and why.

or a model that is trained, on a digit that it has not seen:
  --model digits-mlp | digits-cnn | digits-resnet
"""

_EXPLAIN_END = """\
examples:
  fbackprop explain two-three-two --step
  fbackprop explain three-layer --lang ko --html three-layer.html
  fbackprop explain --model digits-cnn --html digit.html
  fbackprop train digits-cnn --out runs/mine && fbackprop explain --model digits-cnn --checkpoint runs/mine --example 7

exit codes: 0 done; 2 refused, with one sentence that says why; 130 interrupted.
"""


def explain(subparsers: Any) -> None:
    parser = subparsers.add_parser("explain", help="see how a gradient comes about, step by step")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _EXPLAIN, _EXPLAIN_END
    add = parser.add_argument
    add("name", nargs="?", type=_example, metavar="NAME", help="an example of the documents, or")
    add("--model", type=_model, metavar="PRESET", help="a model on a real example")
    add(
        "--checkpoint",
        metavar="DIR",
        help="the run of it, as `fbackprop train PRESET --out DIR` left it (default: a short training)",
    )
    add("--example", type=whole(0), metavar="N", help="which of the digits that are held out (default: 0)")
    add("--step", action="store_true", help="wait for a key after each section: Enter goes on, b back, q ends")
    add("--html", type=file, metavar="FILE", help="write it as a page, too")
    add("--latex", type=file, metavar="FILE", help="write it as LaTeX, too")
    add("--json", type=file, metavar="FILE", help="write its numbers, too, by key")
    add("--lang", type=_language, default=None, metavar="en|ko", help="English or Korean (default: as LANG says)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from fbackprop.explaining.command import run

    arguments.lang = arguments.lang or language_of(os.environ)
    return run(arguments)


def language_of(environment: Any) -> str:
    """Korean where the locale is, else English."""
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    return "ko" if locale.lower().startswith("ko") else "en"


def _example(text: str) -> str:
    from fbackprop.explaining.walks import WALKS

    return one_of("example", text, WALKS)


def _model(text: str) -> str:
    from fbackprop.explaining.walks import MODELS

    return one_of("model to explain", text, MODELS)


def _language(text: str) -> str:
    from fbackprop.explaining.words import LANGUAGES

    return one_of("language", text, LANGUAGES)
