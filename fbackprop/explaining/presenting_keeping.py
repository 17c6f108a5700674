"""What ``saved`` found, as blocks: bytes by array, and beside them what other ways to the same gradient keep."""

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import Block, Heading, Note, Paragraph, Table
from fbackprop.explaining.keeping import Keeping, Row
from fbackprop.explaining.words import said

__all__ = ["keeping_blocks"]


def keeping_blocks(keeping: Keeping, lang: str = "en") -> tuple[Block, ...]:
    """The table of residual bytes of a function, the rivals, and the hints (which are in English).

    Args:
      keeping: as ``saved`` made it. lang: "en" or "ko".
    Raises:
      ValueError: where there is no such language.
    """
    totals = {"total": keeping.total, "given": keeping.parameters + keeping.arguments, "own": keeping.activations}
    sizes = {name: digits.size(count) for name, count in totals.items()}
    columns = ("maker", "name", "shape", "dtype", "times", "bytes")
    rows = tuple(
        (_maker(row, lang), row.name, digits.shape_text(row.shape), str(row.dtype), row.times, row.bytes)
        for row in keeping.rows
    )
    least = min((rival.products for rival in keeping.rivals), default=0) or 1
    rivals = tuple((r.name, r.bytes, digits.size(r.bytes), round(r.products / least, 3)) for r in keeping.rivals)
    ways = ("way", "bytes", "size", "products")
    return (
        Heading(said("keeping_title", lang, name=keeping.name), 1),
        Paragraph(said("keeping_about", lang, **sizes)),
        Table(tuple(said(f"column_{c}", lang) for c in columns), rows),
        Heading(said("keeping_rivals", lang)),
        Table(tuple(said(f"column_{c}", lang) for c in ways), rivals, said("keeping_rivals_about", lang)),
        *(Note(hint) for hint in keeping.hints),
    )


def _maker(row: Row, lang: str) -> str:
    if row.origin in ("parameter", "argument"):
        return said(f"origin_{row.origin}", lang)
    return row.op if row.origin == "op" else f"JAX: {row.op}"
