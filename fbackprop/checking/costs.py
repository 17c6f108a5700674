"""What a backward costs besides being right: compilations of eager calls, and bytes that are kept."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.checking.examination import Examination, other, vjp
from fbackprop.checking.report import Finding
from fbackprop.measuring import saved_bytes as count_saved_bytes
from fbackprop.ops._arithmetic import nbytes
from fbackprop.refusing import sentence

__all__ = ["retraces", "saved_bytes"]


def retraces(examination: Examination) -> Iterator[Finding]:
    """A second eager call with other values compiles nothing that the first one has compiled."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure:
        return
    dy = [jnp.asarray(v) for v in evidence.dys[0]]
    others = [other(leaf) for leaf in subject.floats]
    jax.block_until_ready(others)

    def compiled_by(flat: Any) -> int:
        for _ in range(2):
            vjp(flat, list(subject.floats), list(subject.arrays), dy)
        with _compilations() as events:
            vjp(flat, others, list(subject.arrays), dy)
        return len(events)

    try:
        theirs = compiled_by(evidence.definition.walked)
        ours = compiled_by(subject.call.bind(subject.fn))
    except Exception:  # told by "transformations"
        return
    if ours > theirs:
        message = (
            f"a further eager call compiles {ours} programs anew, its definition {theirs}: a jitted function is made at each "
            "call; make it once, outside."
        )
        yield Finding("retraces", subject.name, message, None, {"compiled": ours, "reference": theirs})


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """The programs that JAX compiles meanwhile."""
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def saved_bytes(examination: Examination) -> Iterator[Finding]:
    """No more is kept for the backward than ``jax.grad`` of the definition keeps, arguments included.

    Where y is much smaller than the arguments, as the losses of rows are, one number more for each of its elements is nothing.
    """
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure or (subject.custom is None and not hasattr(subject.fn, "rule")):
        return
    try:
        ours, theirs = (
            count_saved_bytes(lambda *f, flat=flat: flat(list(f), list(subject.arrays))[0], *subject.floats)
            for flat in (subject.call.bind(subject.fn), evidence.definition.opened)
        )
    except Exception as error:
        examination.notes.append(f"saved bytes: could not be counted ({sentence(error)}).")
        return
    rows = nbytes(*evidence.value_types)
    spare = rows if 4 * rows <= max(map(nbytes, subject.floats)) else 0
    if ours > theirs + spare:
        message = f"it keeps {ours:,} bytes for the backward, jax.grad of the reference {theirs:,}: save less, or recompute."
        yield Finding("saved bytes", subject.name, message, None, {"bytes": ours, "reference_bytes": theirs})
