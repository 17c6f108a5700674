"""A record as text, LaTeX, a page and a picture: ``Explanation.text``, ``.latex``, ``.html`` and ``.graph``."""

import os
import pathlib
from collections.abc import Sequence

from fbackprop.explaining.blocks import Block, Heading, Picture
from fbackprop.explaining.graph import graph_svg
from fbackprop.explaining.presenting import explanation_blocks
from fbackprop.explaining.presenting_chains import chain_blocks
from fbackprop.explaining.record import Explanation
from fbackprop.explaining.words import said
from fbackprop.files import write_atomically

__all__ = ["html", "latex", "text", "written"]


def text(explanation: Explanation, lang: str, chains: Sequence[str], width: int) -> str:
    """See ``Explanation.text``."""
    from fbackprop.explaining import terminal

    return terminal.text(_blocks(explanation, lang, chains), lang, width)


def latex(explanation: Explanation, lang: str, chains: Sequence[str], file: str | os.PathLike[str] | None) -> str:
    """See ``Explanation.latex``."""
    from fbackprop.explaining.latex import latex

    return written(latex(_blocks(explanation, lang, chains), lang), file)


def html(explanation: Explanation, lang: str, chains: Sequence[str], file: str | os.PathLike[str] | None) -> str:
    """See ``Explanation.html``."""
    from fbackprop.explaining.page import page

    blocks = _blocks(explanation, lang, chains)
    words = said("picture_words", lang, steps=len(explanation.steps))
    first = next(i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.level == 2)
    picture = (Heading(said("picture", lang)), Picture(graph_svg(explanation, lang), words))
    return written(page([*blocks[:first], *picture, *blocks[first:]], lang), file)


def _blocks(explanation: Explanation, lang: str, chains: Sequence[str]) -> tuple[Block, ...]:
    chains = (chains,) if isinstance(chains, str) else chains
    own = explanation_blocks(explanation, lang)
    return (*own, *(block for place in chains for block in chain_blocks(explanation.chain(place), lang)))


def written(content: str, file: str | os.PathLike[str] | None) -> str:
    """The content, which is also in the file, where one is named."""
    if file is not None:
        write_atomically(pathlib.Path(file), content.encode())
    return content
