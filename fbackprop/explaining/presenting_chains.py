"""What a chain says, as blocks: the factors of each path in a row, their products, and the sum, which is the gradient."""

import math

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import Block, Details, Formula, Heading, Note, Paragraph, Table
from fbackprop.explaining.chains import Chain, Factor, Path
from fbackprop.explaining.words import WORDS, said

__all__ = ["chain_blocks"]

_SHOWN = 12  # rows of a table of paths


def chain_blocks(chain: Chain, lang: str = "en") -> tuple[Block, ...]:
    """A chain with the labels of its factors: loss, activation, weight, …, activation, input; 손실, 액, 웨, …, 액, 앤.

    Args:
      chain: as ``explanation.chain`` made it. lang: "en" or "ko".
    Raises:
      ValueError: where there is no such language.
    """
    agreement = said(
        "chain_sum", lang, total=digits.number(chain.total, 10), gradient=digits.number(chain.gradient, 10),
        difference=digits.number(chain.difference, 2),
    )  # fmt: skip
    about = _about(chain, lang)
    found: list[Block] = [Heading(said("chain_title", lang, place=chain.place)), Paragraph(about)]
    if not chain.paths and chain.complete:
        return tuple(found)
    words = said("chain_factors", lang)
    found.append(Formula(f"∂L/∂w = Σ ({words})", rf"\frac{{\partial L}}{{\partial w}} = \sum\,(\text{{{_tex(words)}}})"))
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in chain.paths:
        groups.setdefault(tuple(_label(f, lang) for f in path.factors), []).append(path)
    if any("weight" in [f.kind for f in path.factors] for path in chain.paths):
        found.append(Paragraph(said("chain_labels", lang)))
    found += [_table(chain, labels, paths, lang) for labels, paths in groups.items()]
    if chain.paths:
        found.append(Details(said("chain_path", lang), (_factors(chain.paths[0], lang),)))
    if chain.vectors and (not chain.complete or len(chain.paths) > 1):
        found.append(Details(said("chain_vector", lang), (Paragraph(said("chain_vector_about", lang)), _vectors(chain, lang))))
    return (*found, Paragraph(agreement) if chain.agrees else Note(agreement))


def _tex(words: str) -> str:
    return words.replace("·", r"$\cdot$").replace("…", r"\dots{}")


def _about(chain: Chain, lang: str) -> str:
    if chain.complete:
        if len(chain.paths) <= 1:
            return said("chain_one" if chain.paths else "chain_none", lang)
        return said("chain_about", lang, count=f"{len(chain.paths):,}")
    return said("chain_many", lang, count=f"{chain.count:,}" if chain.count is not None else said("uncounted", lang))


def _label(factor: Factor, lang: str) -> str:
    key = f"factor_{factor.kind}"
    words = factor.op if factor.kind == "jax" else said(key, lang) if key in WORDS else factor.kind
    return words.split(" (")[0]


def _table(chain: Chain, labels: tuple[str, ...], paths: list[Path], lang: str) -> Table:
    rows: list[tuple[object, ...]] = [
        (str(i + 1), *(f.value for f in path.factors), path.product) for i, path in enumerate(paths[:_SHOWN])
    ]
    blank = (None,) * len(labels)
    if len(paths) > _SHOWN:
        rest = math.fsum(path.product for path in paths[_SHOWN:])
        rows.append((said("chain_rest", lang, count=len(paths) - _SHOWN), *blank, rest))
    if chain.complete and len(paths) == len(chain.paths) > 1:
        rows.append((said("chain_total", lang), *blank, chain.total))
    return Table((said("column_path", lang), *labels, said("column_product", lang)), tuple(rows))


def _factors(path: Path, lang: str) -> Table:
    rows = []
    for factor in path.factors:
        place = factor.op if factor.step is None else f"{factor.step}. {factor.op}"
        rows.append(
            (
                _whole(factor, lang),
                place,
                f"∂{_element(factor.output, factor.at)}/∂{_element(factor.input, factor.into)}",
                factor.value,
            )
        )
    columns = ("label", "op", "derivative", "value")
    return Table(tuple(said(f"column_{c}", lang) for c in columns), tuple(rows))


def _whole(factor: Factor, lang: str) -> str:
    key = f"factor_{factor.kind}"
    return said(key, lang) if key in WORDS else factor.kind


def _element(name: str, index: tuple[int, ...]) -> str:
    return name + (f"[{', '.join(map(str, index))}]" if index else "")


def _vectors(chain: Chain, lang: str) -> Table:
    rows = tuple((f"{v.step}. {v.op}", v.total, v.upstream_norm, v.local_norm) for v in chain.vectors)
    columns = ("op", "total", "upstream", "local")
    return Table(tuple(said(f"column_{c}", lang) for c in columns), rows)
