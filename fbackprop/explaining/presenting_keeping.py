"""What ``saved`` found, as blocks: bytes by array, and beside them what other ways to the same gradient keep."""

from collections.abc import Sequence

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import Block, Heading, Note, Paragraph, Table
from fbackprop.explaining.keeping import Keeping, Row
from fbackprop.explaining.words import said

__all__ = ["keeping_blocks"]

ARGUMENTS = 8
"""Rows of arguments that are shown one by one."""


def keeping_blocks(keeping: Keeping, lang: str = "en") -> tuple[Block, ...]:
    """The table of residual bytes of a function, the rivals, and the hints.

    Args:
      keeping: as ``saved`` made it. lang: "en" or "ko".
    Raises:
      ValueError: where there is no such language.
    """
    totals = {"total": keeping.total, "parameters": keeping.parameters, "arguments": keeping.arguments}
    sizes = {name: digits.size(count) for name, count in totals.items()}
    columns = ("maker", "name", "keepers", "array", "bytes")
    given = [row for row in keeping.rows if row.origin in ("parameter", "argument")]
    rows = [
        (_maker(row, lang), row.name, _grouped(row.keepers), _array(row), row.bytes)
        for row in keeping.rows
        if row not in given[ARGUMENTS:]
    ]
    if rest := given[ARGUMENTS:]:
        rows.append((said("origin_argument", lang), said("more", lang, count=len(rest)), "", "", sum(r.bytes for r in rest)))
    least = min((rival.products for rival in keeping.rivals), default=0) or 1
    rivals = tuple((r.said(lang), r.bytes, digits.size(r.bytes), round(r.products / least, 3)) for r in keeping.rivals)
    ways = ("way", "bytes", "size", "products")
    hints = tuple(Note(hint.said(lang)) for hint in keeping.advice)
    return (
        Heading(said("keeping_title", lang, name=keeping.name), 1),
        Paragraph(said("keeping_about", lang, **sizes, own=digits.size(keeping.activations))),
        Table(tuple(said(f"column_{c}", lang) for c in columns), tuple(rows)),
        Heading(said("keeping_rivals", lang)),
        Table(tuple(said(f"column_{c}", lang) for c in ways), rivals, said("keeping_rivals_about", lang)),
        *((Heading(said("keeping_hints", lang)), *hints) if hints else ()),
    )


def _maker(row: Row, lang: str) -> str:
    if row.origin in ("parameter", "argument"):
        return said(f"origin_{row.origin}", lang)
    return row.op if row.origin == "op" else f"JAX: {row.op}"


def _array(row: Row) -> str:
    return f"{row.dtype}{list(row.shape)}" + (f" ×{row.times}" if row.times > 1 else "")


def _grouped(keepers: Sequence[str]) -> str:
    """ "dense.x", "attention.key" and "attention.value" as "dense: x; attention: key, value"."""
    found: dict[str, list[str]] = {}
    for keeper in keepers:
        op, name = keeper.split(".", 1)
        found.setdefault(op, []).append(name)
    return "; ".join(f"{op}: {', '.join(names)}" for op, names in found.items())
