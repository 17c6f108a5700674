"""The rows of ``fbackprop bench ops`` for a person: a block for each workload, and a line for each op at the end."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from fbackprop.measuring.programs import SETTINGS
from fbackprop.measuring.times import geometric_mean

__all__ = ["Row", "block", "mebibytes", "opponents", "rivals_table", "score", "summary"]

Row = dict[str, Any]


def block(rows: Sequence[Row]) -> Table:
    """The rows of one workload: a line for us, and one for each rival with both settings."""
    first, widths = rows[0], (32, 19, 17, 9, 9, 8)
    table = Table(box=None, padding=(0, 1, 0, 0), title=f"[bold]{first['op']}[/]  {escape(first['workload'])}")
    table.title_justify = "left"
    table.title_style = ""
    heads = ("against", "times faster: fused", "stored", "kept MiB", "temp MiB", "error")
    for head, width in zip(heads, widths):
        table.add_column(head, justify="left" if head == "against" else "right", width=width, style="", header_style="dim")
    kept, least = mebibytes(first["residual_bytes"]), first["residual_bytes_minimum"]
    mine = {row["setting"]: row for row in rows}
    times = [f"{mine[s]['milliseconds']:.3g} ms" if s in mine else "" for s in SETTINGS]
    table.add_row("ours", *times, kept, mebibytes(first["temp_bytes"]), _error(first["error"]))
    for against in dict.fromkeys(row["against"] for row in rows):
        theirs = {row["setting"]: row for row in rows if row["against"] == against}
        row = next(iter(theirs.values()))
        cells = [_speed(theirs[s]) if s in theirs else "" for s in SETTINGS]
        kept, temp = mebibytes(row["residual_bytes_against"]), mebibytes(row["temp_bytes_against"])
        table.add_row(against, *cells, kept, temp, _error(row["error_against"]))
    if least is not None:
        table.add_row("least that any backward keeps", "", "", mebibytes(least), "", "", style="dim")
    return table


def summary(rows: Sequence[Row]) -> Table:
    """A line for each op: geometric means over its workloads, against jax.grad; where it recomputes, jax.checkpoint too."""
    table = Table(box=None, padding=(0, 1, 0, 0), title="geometric means over the workloads of an op", title_justify="left")
    heads = ("op", "against", "fused", "stored", "slower", "kept / least", "kept / theirs", "error / theirs")
    for head in heads:
        table.add_column(head, justify="left" if head in ("op", "against") else "right", header_style="dim")
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        for against in opponents(own):
            chosen = [row for row in own if row["against"] == against]
            slower = sum(row["time_ratio_high"] < 0.95 for row in chosen)
            quotients = (
                _quotient(chosen, "residual_bytes", "residual_bytes_minimum"),
                _quotient(chosen, "residual_bytes", "residual_bytes_against"),
                _quotient(chosen, "error", "error_against"),
            )
            scores = [_number(score(chosen, setting)) for setting in SETTINGS]
            name = f"{op} *" if own[0]["recomputes"] else op
            table.add_row(name, against, *scores, f"{slower} of {len(chosen)}" if slower else "", *map(_number, quotients))
    starred = any(row["recomputes"] for row in rows)
    table.caption = "slower: rows whose interval lies wholly below 0.95" + ("; *: recomputes by design" if starred else "")
    table.caption_justify = "left"
    table.caption_style = "dim"
    return table


def rivals_table(rows: Sequence[Row]) -> Table:
    """A line for each op, a column for each rival: geometric means of the time ratios over its workloads, fused / stored."""
    table = Table(box=None, padding=(0, 1, 0, 0), title="each rival, fused/stored", title_justify="left")
    rivals = list(dict.fromkeys(row["against"] for row in rows))
    for head in ("op", *rivals):
        short = head.replace("dots_with_no_batch_dims", "no_batch").removesuffix("_saveable")
        table.add_column(short, justify="left" if head == "op" else "right", header_style="dim")
    for op in dict.fromkeys(row["op"] for row in rows):
        cells = []
        for against in rivals:
            chosen = [row for row in rows if row["op"] == op and row["against"] == against]
            cells.append("/".join(_number(score(chosen, setting)) for setting in SETTINGS) if chosen else "–")
        table.add_row(op, *cells)
    return table


def opponents(rows: Sequence[Row]) -> list[str]:
    """Whom an op is held against: ``jax.grad``, and ``jax.checkpoint`` too if the rule recomputes by design. Where neither was
    measured, the first that was."""
    known = dict.fromkeys(row["against"] for row in rows)
    wanted = ("checkpoint", "jax.grad") if rows[0]["recomputes"] else ("jax.grad",)
    return [against for against in wanted if against in known] or [next(iter(known))]


def score(rows: Sequence[Row], setting: str) -> float:
    """The geometric mean of the time ratios in a setting; NaN where there are none."""
    return geometric_mean([row["time_ratio"] for row in rows if row["setting"] == setting])


def mebibytes(count: int | None) -> str:
    """MiB, with three digits."""
    if count is None:
        return "–"
    size = count / 2**20
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}" if size >= 0.01 or size == 0 else "<0.01"


def _quotient(rows: Sequence[Row], numerator: str, denominator: str) -> float:
    return geometric_mean(list(_quotients(rows, numerator, denominator)))


def _quotients(rows: Sequence[Row], numerator: str, denominator: str) -> Iterator[float]:
    for row in rows:
        if row[numerator] and row[denominator]:
            yield row[numerator] / row[denominator]


def _speed(row: Row) -> str:
    def short(value: float) -> str:
        return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"

    text = f"{short(row['time_ratio'])} [{short(row['time_ratio_low'])}, {short(row['time_ratio_high'])}]"
    color = "red" if row["time_ratio_high"] < 0.95 else "green" if row["time_ratio_low"] > 1.05 else ""
    return f"[{color}]{escape(text)}[/]" if color else escape(text)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}" if value < 99.95 else f"{value:.0f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
