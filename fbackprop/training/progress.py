"""What a person sees while a run goes on: a bar, and now and then a line above it."""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

__all__ = ["Reporter", "interrupts", "peak_bytes", "percent"]


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
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=done, values="")

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, values: Mapping[str, float], rate: str = "") -> None:
        if self._bar is not None:
            words = [*_words(values), *([rate] if rate else []), _gib(peak_bytes())]
            self._bar.update(self._task, completed=done, **({"values": "  ".join(words)} if values else {}))

    def line(self, text: str) -> None:
        if self._console is not None:
            (self._bar.console if self._bar is not None else self._console).print(text, markup=False, soft_wrap=True)

    def evaluation(self, step: int, total: int, values: Mapping[str, float], rate: str = "") -> None:
        words = [*_words(values), *([rate, _gib(peak_bytes())] if rate else [])]
        self.line(f"step {step:>{len(str(total))}}/{total}   {'   '.join(words)}")


def _words(values: Mapping[str, float]) -> list[str]:
    return [f"{name.replace('_', ' ')} {percent(v) if name.endswith('accuracy') else f'{v:.4g}'}" for name, v in values.items()]


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def peak_bytes() -> int:
    """The most memory held so far: of the device where it counts it, else of the process."""
    counted = jax.local_devices()[0].memory_stats()
    if counted and "peak_bytes_in_use" in counted:
        return int(counted["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


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
