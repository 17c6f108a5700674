"""Blocks as one HTML file that needs nothing else: style, script and pictures stand in it, and it may load nothing.

Folds are ``<details>``. Pointing at a number, or reaching it with Tab and the arrow keys, shows its index, all of its digits
and the formula that it comes from. An array that is too large to read is shown by its shape, a few statistics, its first
elements and a small picture.
"""

import base64
import functools
import importlib.resources
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import Block, Details, Formula, Heading, Note, Numbers, Paragraph, Picture, Table
from fbackprop.explaining.words import said

__all__ = ["page"]

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_LONG = ' class="long"'
_FEW = 14  # folds that are open from the beginning, where there are no more


def page(blocks: Sequence[Block], lang: str = "en") -> str:
    """A whole HTML document.

    Args:
      blocks: what to show; the first heading of level 1 is the title. lang: "en" or "ko", the language that blocks are in.
    """
    writing = _Writing(lang, few=_count(blocks) <= _FEW)
    headings = [b for b in blocks if isinstance(b, Heading)]
    title = next((h.text for h in headings if h.level <= 1), "fbackprop")
    body = [writing.block(block) for block in blocks]
    start = next((i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.level > 1), len(body))
    body.insert(start, writing.controls([h.text for h in headings if h.level == 2], folds=_count(blocks) > 0))
    style, script = _file("page.css"), _file("page.js")
    return (
        f'<!DOCTYPE html>\n<html lang="{lang}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + f'\n</main>\n<div id="tip" role="tooltip" hidden></div>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )


@functools.cache
def _file(name: str) -> str:
    return importlib.resources.files("fbackprop.explaining").joinpath(name).read_text(encoding="utf-8")


def _count(blocks: Sequence[Block]) -> int:
    return sum(1 + _count(b.blocks) for b in blocks if isinstance(b, Details))


def _code(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def _formula(words: str) -> str:
    """With h_t and max_k as subscripts; names of arguments keep their underscores."""
    return re.sub(r"(?<![A-Za-z0-9_])(max|min|\w|Σ)_(\w+)", r"\1<sub>\2</sub>", escape(words))


def _attributes(**values: str) -> str:
    return "".join(f' data-{name}="{escape(value)}"' for name, value in values.items() if value)


class _Writing:
    """Blocks in HTML; counts the headings, which the contents link to."""

    def __init__(self, lang: str, few: bool):
        self.lang, self.few, self.headings = lang, few, 0

    def controls(self, headings: list[str], folds: bool) -> str:
        links = [f'<a href="#part-{i + 1}">{escape(text)}</a>' for i, text in enumerate(headings)]
        found = f'<nav aria-label="{said("contents", self.lang)}">{"".join(links)}</nav>' if len(links) > 2 else ""
        if folds:
            names = (("open-all", "open_all"), ("close-all", "close_all"))
            found += "<p>" + " ".join(f'<button id="{i}">{said(key, self.lang)}</button>' for i, key in names) + "</p>"
        return found + f'<p class="hint">{said("page_hint", self.lang)}</p>'

    def block(self, block: Block) -> str:
        match block:
            case Heading(words, level):
                if level != 2:
                    return f"<h{min(max(level, 1), 6)}>{escape(words)}</h{min(max(level, 1), 6)}>"
                self.headings += 1
                return f'<h2 id="part-{self.headings}">{escape(words)}</h2>'
            case Paragraph(words):
                return f"<p>{_code(words)}</p>"
            case Formula(words, _):
                return f'<div class="formula">{_formula(words)}</div>'
            case Numbers():
                return self.numbers(block)
            case Table():
                return _table(block)
            case Note(words):
                return f'<div class="note" role="note"><b>{said("note", self.lang)}</b>{_code(words)}</div>'
            case Picture(svg, words):
                label = f"<figcaption>{escape(words)}</figcaption>" if words else ""
                return f'<figure><div tabindex="0">{_inline(svg, words)}</div>{label}</figure>'
            case Details(summary, inner, anchor):
                head, _, rest = summary.partition(": ")
                name = f' id="{escape(anchor)}"' if anchor else ""
                inside = "\n".join(self.block(b) for b in inner)
                shown = escape(head) + (f" <span>{escape(rest)}</span>" if rest else "")
                return (
                    f"<details{name}{' open' if self.few else ''}><summary>{shown}</summary><div>\n{inside}\n</div></details>"
                )
        raise TypeError(f"explain: expected a block, got {type(block).__name__}.")

    def numbers(self, block: Numbers) -> str:
        array = digits.plain_array(block.values)
        if not digits.is_small(array):
            return self.large(block, array)
        cells = digits.cells(array, block.digits).reshape(-1, array.shape[-1] if array.ndim else 1)
        values, dtype = array.reshape(cells.shape), getattr(block.values, "dtype", None)
        rows = "".join(
            "<tr>" + "".join(_cell(text, value, dtype) for text, value in zip(*row)) + "</tr>" for row in zip(cells, values)
        )
        kind = "numbers" + (" tall" if len(cells) > 1 else "") + (" wide" if cells.shape[1] > 3 else "")
        data = _attributes(name=block.name, formula=block.formula, shape=digits.shape_text(array.shape, ""))
        one = " one" if array.ndim == 0 else ""
        label = escape(f"{block.name}{', ' + block.formula if block.formula else ''}")
        return (
            f'<div class="{kind}" tabindex="0" role="group" aria-label="{label}"{data}><b>{escape(block.name)} =</b>'
            f'<table class="matrix{one}">{rows}</table></div>'
        )

    def large(self, block: Numbers, array: np.ndarray) -> str:
        found = digits.summary(array)
        data = _attributes(name=block.name, formula=block.formula, more=f"{found.shape} {array.dtype}")
        inside = f'<span class="shape">{found.shape}</span>'
        if array.size:
            content, width, height = digits.heat_map(array, kernel="kernel" in block.name)
            scale = max(2, min(7, 56 // height, 112 // width))
            words = escape(said("heat_words", self.lang, name=block.name))
            inside = (
                f'<img alt="{words}" width="{width * scale}" height="{max(height * scale, 12)}" '
                f'src="data:image/png;base64,{base64.b64encode(content).decode()}">'
            )
            each = (("min", found.smallest), ("mean", found.mean), ("max", found.largest), ("norm", found.norm))
            pairs = "".join(
                f"<div><dt>{said('statistic_' + key, self.lang)}</dt><dd>{digits.number(v, 4)}</dd></div>" for key, v in each
            )
            inside += (
                f'<dl><div class="shape">{found.shape}</div>{pairs}</dl><span class="first">{", ".join(found.first)}, …</span>'
            )
        if found.bad:
            inside += f'<span class="bad">{said("not_finite", self.lang, count=found.bad)}</span>'
        return (
            f'<div class="numbers tall" tabindex="0" role="group" aria-label="{escape(block.name)}"{data}>'
            f'<b>{escape(block.name)} =</b><div class="large">{inside}</div></div>'
        )


def _cell(text: str, value: np.generic, dtype: Any) -> str:
    whole = digits.exact(value, dtype)
    return f'<td data-x="{whole}">{text}</td>' if whole != text else f"<td>{text}</td>"


def _table(block: Table) -> str:
    right = digits.right_aligned(block.rows, len(block.columns))
    kind = [' class="right"' if r else "" for r in right]
    head = "".join(f"<th{k}>{escape(c)}</th>" for k, c in zip(kind, block.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{k or _LONG * (len(text) > 36)}>{_code(text)}</td>" for k, text in zip(kind, row)) + "</tr>\n"
        for row in digits.table_cells(block.rows, len(block.columns))
    )
    caption = f'<p class="caption">{_code(block.caption)}</p>' if block.caption else ""
    table = f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>{caption}'


def _inline(svg: str, words: str) -> str:
    """An SVG file as a part of a page: without its prologue and its metadata."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    return re.sub(r"<svg\b", f'<svg role="img" aria-label="{escape(words)}"', svg, count=1).strip()
