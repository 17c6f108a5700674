"""What a person sees while a run goes on: a bar, and now and then a line above it."""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Reporter", "interrupts", "percent"]


class Reporter:
    """A progress bar and lines on stderr; no bar where stderr is not a terminal, nothing at all where ``show`` is false."""

    def __init__(self, title: str, total: int, done: int, show: bool):
        self._bar: Any = None
        self._console: Any = None
        if not show:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(file=sys.stderr, highlight=False)
        if self._console.is_terminal:
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=done, loss="")

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, loss: float | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **({} if loss is None else {"loss": f"loss {loss:.4g}"}))

    def line(self, text: str) -> None:
        if self._console is not None:
            (self._bar.console if self._bar is not None else self._console).print(text, markup=False, soft_wrap=True)

    def evaluation(self, step: int, total: int, values: Mapping[str, float]) -> None:
        words = [
            f"{name.replace('_', ' ')} {percent(v) if name.endswith('accuracy') else f'{v:.4g}'}" for name, v in values.items()
        ]
        self.line(f"step {step:>{len(str(total))}}/{total}   {'   '.join(words)}")


def percent(fraction: float) -> str:
    """0.98765 as "98.77 %", never rounded up to 100 %."""
    return f"{math.floor(fraction * 10000 + 1e-6) / 100:.2f} %"


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event, so that a step is not cut in two; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
