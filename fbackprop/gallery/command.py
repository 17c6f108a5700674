"""What ``fbackprop ops`` does: the table, or pages."""

import argparse
import sys

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from fbackprop.explaining.digits import size
from fbackprop.gallery.entries import Entry, Figures, entries, figures_of, sources
from fbackprop.loading import Refusal, near

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Prints what the options ask for; what it refuses is a Refusal."""
    known = entries()
    if unknown := [name for name in options.names if name not in known]:
        raise Refusal(f"there is no op {unknown[0]!r}{near(unknown[0], list(known))}.")
    if options.search and options.names:
        raise Refusal("name ops, or give --search WORD; not both.")
    if options.plot and (len(options.names) != 1 or known[options.names[0]].rule is None):
        raise Refusal("--plot draws one op; name it.")
    shown = [entry for entry in known.values() if not options.search or entry.mentions(options.search)]
    if not shown:
        raise Refusal(f"no op mentions {options.search!r}.")
    if options.plot:
        _plot(known[options.names[0]], options.plot)
    # Where nobody looks at a terminal, lines are not broken in the middle of words.
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for name in options.names:
        _page(console, known[name])
    if not options.names:
        _table(console, shown)
    return 0


def _plot(entry: Entry, path: object) -> None:
    from fbackprop.gallery.plots import draw

    assert entry.rule is not None
    if not draw(entry.rule, path):  # type: ignore[arg-type]
        raise Refusal(f"{entry.name} is not a function of single elements, which is what --plot draws.")


def _table(console: Console, shown: list[Entry]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for heading, justify in (("op", "left"), ("what it is", "left"), ("kept for the backward", "left"), ("bytes", "right"),
                             ("jax.grad's", "right"), ("error", "right"), ("jax.grad's", "right")):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in shown:
        name = Text(entry.name, "bold" if entry.rule else "")
        table.add_row(name, entry.summary, entry.keeps, *(_cells(entry.figures) if entry.rule else ("", "", "", "")))
    console.print(table)
    console.print(
        "Bytes: what is kept at the op's first workload, arguments included, by us and by jax.grad of the definition. "
        "Error: the worst of a gradient on the first sample in float32, in units of the last place, against float64.\n"
        "fbackprop ops NAME shows one with its derivation and sources; --search WORD those that mention a word.",
        style="bright_black",
    )


def _cells(figures: Figures | None) -> tuple[str, str, str, str]:
    if figures is None:
        return "–", "–", "–", "–"
    errors = ("–" if e is None else f"{e:.2g}" for e in (figures.error, figures.autodiff_error))
    return size(figures.ours), size(figures.autodiff), *errors  # type: ignore[return-value]


def _page(console: Console, entry: Entry) -> None:
    console.rule(Text(entry.signature, "bold"), align="left", style="bright_black")
    _, _, rest = entry.doc.partition("\n\n")
    console.print(f"{entry.summary}.\n")
    if rest:
        console.print(Padding(Text(rest), (0, 2, 1, 2), expand=False))
    _heading(console, f"Derivation ({entry.file})")
    console.print(Padding(Text(entry.formula), (0, 2, 1, 2), expand=False))
    if entry.rule is not None:
        _heading(console, "Kept for the backward")
        console.print(Padding(Text(_kept(entry)), (0, 2, 1, 2), expand=False))
        _curves(console, entry)
    for heading, code in sources(entry).items():
        _heading(console, heading.capitalize())
        console.print(
            Padding(Syntax(code, "python", theme="ansi_light", background_color="default"), (0, 2, 1, 2), expand=False)
        )


def _kept(entry: Entry) -> str:
    assert entry.rule is not None
    figures = entry.figures or figures_of(entry.rule)
    lines = [
        entry.keeps,
        f"{size(figures.ours)} at {figures.workload}; jax.grad of the definition {size(figures.autodiff)}, "
        f"the least {size(figures.least)}",
    ]
    if figures.error is not None:
        lines.append(f"worst error {figures.error:.2g} units in the last place, jax.grad's {figures.autodiff_error:.2g}")
    return "\n".join([*lines, *([f"computed again: {entry.rule.recomputes}"] if entry.rule.recomputes else [])])


def _curves(console: Console, entry: Entry) -> None:
    from fbackprop.gallery.plots import drawn

    assert entry.rule is not None
    if (text := drawn(entry.rule)) is not None:
        _heading(console, "The function and its derivative")
        console.print(Padding(text, (0, 2, 1, 2), expand=False))


def _heading(console: Console, words: str) -> None:
    console.print(words, style="bold blue")
