"""What ``fbackprop explain`` does: a walk, shown in the terminal, at once or section by section, and written to files."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fbackprop.explaining.blocks import Block, Heading
from fbackprop.explaining.latex import latex
from fbackprop.explaining.page import page
from fbackprop.explaining.terminal import renderable
from fbackprop.explaining.walks import Walk, walk
from fbackprop.files import write_atomically, write_json
from fbackprop.loading import Refusal

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
      Refusal, RunError: with one sentence, before anything was written.
    """
    told = _told(arguments)
    show(told, arguments.lang, steps=arguments.step)
    written = []
    if arguments.html is not None:
        write_atomically(arguments.html, page(told.blocks, arguments.lang).encode())
        written.append(arguments.html)
    if arguments.latex is not None:
        write_atomically(arguments.latex, latex(told.blocks, arguments.lang).encode())
        written.append(arguments.latex)
    if arguments.json is not None:
        write_json(arguments.json, {"name": told.name, "title": told.title, "numbers": told.numbers})
        written.append(arguments.json)
    if written:
        print(f"written: {', '.join(map(str, written))}")
    return 0


def _told(arguments: argparse.Namespace) -> Walk:
    if (arguments.name is None) == (arguments.model is None):
        given = "neither is given" if arguments.name is None else f"got {arguments.name} and --model {arguments.model}"
        raise Refusal(f"explain: expected the name of an example or --model, {given}; fbackprop explain --help lists them.")
    for option in ("checkpoint", "example"):
        if arguments.model is None and getattr(arguments, option) is not None:
            raise Refusal(f"explain: --{option} is for --model; {arguments.name} has its own numbers.")
    if arguments.model is None:
        return walk(arguments.name, arguments.lang)
    from fbackprop.explaining.walks.trained import walk_model

    return walk_model(arguments.model, arguments.checkpoint, arguments.example or 0, arguments.lang)


# In the terminal.

_KEYS = {
    "\r": "next", "\n": "next", " ": "next", "n": "next", "\x1b[C": "next", "\x1b[B": "next",
    "b": "back", "\x1b[D": "back", "\x1b[A": "back", "q": "quit", "\x1b": "quit", "\x04": "quit", "": "quit",
}  # fmt: skip


def show(told: Walk, lang: str, steps: bool) -> None:
    """Prints a walk; with ``steps`` a section for each key, where there is somebody to press one."""
    from rich.console import Console

    console = Console(highlight=False)
    sections: list[Sequence[Block]] = [(Heading(section.title), *section.blocks) for section in told.sections]
    sections[0] = (Heading(told.title, 1), *sections[0])
    if steps and not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("fbackprop: --step waits for keys of a terminal and there is none; all is shown at once.", file=sys.stderr)
        steps = False
    if not steps:
        for blocks in sections:
            console.print(renderable(blocks, lang), "")
        return
    with _keys() as key:
        walk_through(sections, key, lambda blocks: console.print(renderable(blocks, lang), ""), lang)


def walk_through(sections: Sequence[Any], key: Callable[[], str], show_one: Callable[[Any], None], lang: str) -> None:
    """Shows one section after the other, as the keys say."""
    at = 0
    show_one(sections[at])
    while at < len(sections) - 1:
        where = f"{at + 1}/{len(sections)}"
        hint = (
            f"── {where} · Enter: 다음 · b: 뒤로 · q: 끝 " if lang == "ko" else f"── {where} · Enter: next · b: back · q: quit "
        )
        sys.stdout.write(hint)
        sys.stdout.flush()
        pressed = _KEYS.get(key())
        while pressed is None or (pressed == "back" and at == 0):
            pressed = _KEYS.get(key())
        sys.stdout.write("\r\x1b[K")
        if pressed == "quit":
            return
        at += 1 if pressed == "next" else -1
        show_one(sections[at])


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """A function that waits for one key, without Enter; Ctrl-C remains Ctrl-C."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        import msvcrt

        yield lambda: msvcrt.getwch()  # type: ignore[attr-defined]
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        # What one key sends arrives at once: an arrow is three bytes.
        yield lambda: os.read(terminal, 8).decode(errors="replace")
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
