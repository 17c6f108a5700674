"""The command ``fbackprop ops``: its parser. What it runs is imported when it runs."""

import argparse
from typing import Any

from fbackprop.options import picture

__all__ = ["ops"]

_ABOUT = """\
Shows the ops: without NAMES a table of all, with what each keeps for its backward, how many bytes that is, and how exact its
gradient is, beside jax.grad of its definition; with NAMES a page for each: what it computes, the derivation, the definition,
the forward and the backward as they are written, and for functions of single elements a plot of it and its derivative.
"""

_END = """\
examples:
  fbackprop ops
  fbackprop ops --search attention
  fbackprop ops gelu
  fbackprop ops mish --plot mish.png

exit codes: 0 done; 2 refused, with one sentence that says why.
"""


def ops(subparsers: Any) -> None:
    parser = subparsers.add_parser("ops", help="show the ops: a table, or the derivation and sources of one")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _ABOUT, _END
    add = parser.add_argument
    add("names", nargs="*", metavar="NAMES", help="ops to show a page of (default: a table of all)")
    add("--search", metavar="WORD", help="only ops whose name, summary or documentation mentions this, or each of these words")
    add("--plot", type=picture, metavar="FILE", help="draw the op and its derivative: .png or .svg")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from fbackprop.gallery.command import run

    return run(arguments)
