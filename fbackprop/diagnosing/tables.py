"""The table that a person reads."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fbackprop.diagnosing.record import Health

__all__ = ["number", "rendered", "text"]


def text(health: "Health") -> str:
    """The layers as a table, and the findings."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    dead = any(math.isfinite(row.dead) for row in health.layers)
    saturated = any(math.isfinite(row.saturated) for row in health.layers)
    table.add_column("layer", no_wrap=True)
    for name in ["gradient", "gain", "weight", "update/weight", *(["dead", "after a step"] if dead else []),
                 *(["saturated"] if saturated else [])]:  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in health.layers:
        shares = [percent(row.dead), percent(row.dead_after)] if dead else []
        shares += [percent(row.saturated)] if saturated else []
        ratio = row.ratio if health.after is not None else math.nan
        table.add_row(row.name, number(row.gradient), number(row.gain), number(row.weight), number(ratio), *shares)
    loss = float(health.now.loss)
    head = f"loss {loss:.6g}"
    if health.after is not None:
        head += f", after a step {float(health.after.loss):.6g}"
    if health.as_it_is is not None:
        head += f", after {health.as_it_is.steps} on this batch {health.as_it_is.loss:.6g}"
    if math.isfinite(health.reach):
        head += f"; the gradient at the first layer is {health.reach:.3g} times that at the last"
    count = len(health.findings)
    verdict = f"{count} finding{'s' * (count != 1)}" if count else "nothing wrong was found"
    return "\n".join([f"health: {verdict}", head, "", rendered(table), "", *map(str, health.findings)]).rstrip()


def rendered(table: Any) -> str:
    """A table of rich as plain text."""
    from rich.console import Console

    console = Console(width=160, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "" if math.isnan(value) else "inf"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else ""
