r"""Blocks as a LaTeX document, for xelatex, lualatex or pdflatex; Korean by kotex.

Only packages of every TeX distribution are used. A matrix or a formula that is wider than the page is made smaller, long
tables run over pages, and what a font of TeX does not have is written in math mode.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import (
    Block,
    Details,
    Formula,
    Heading,
    Note,
    Numbers,
    Paragraph,
    Picture,
    Table,
    undoubled,
)
from fbackprop.explaining.formulas import is_math
from fbackprop.explaining.formulas import latex as formula_latex
from fbackprop.explaining.words import said

__all__ = ["escaped", "latex"]

_ONE_PAGE = 30  # rows of a table

_PREAMBLE = r"""\documentclass[11pt,a4paper]{article}
\usepackage{iftex}
\ifPDFTeX\usepackage[utf8]{inputenc}\fi
%(korean)s\usepackage[margin=25mm]{geometry}
\usepackage{amsmath,amssymb,booktabs,longtable,array,graphicx,xcolor}
\definecolor{fbblue}{HTML}{1F5FA8}\definecolor{fbfaint}{HTML}{656D76}\definecolor{fbnote}{HTML}{D9A400}
\setlength{\parindent}{0pt}\setlength{\parskip}{5pt}
\emergencystretch=3em
\allowdisplaybreaks
\newsavebox\fbbox
%% What is too wide is made smaller.
\newcommand\fit[1]{\par\noindent\sbox\fbbox{$\displaystyle #1$}%%
\ifdim\wd\fbbox>\linewidth\resizebox{\linewidth}{!}{\usebox\fbbox}\else\usebox\fbbox\fi\par}
\newcommand\note[1]{\par\medskip\noindent{\color{fbnote}\vrule width 2pt}\hspace{6pt}%%
\begin{minipage}[t]{0.93\linewidth}#1\end{minipage}\par\medskip}
\newcommand\fold[1]{\par\medskip\noindent\textbf{#1}\par}
\begin{document}
"""


def latex(blocks: Sequence[Block], lang: str = "en") -> str:
    """A whole document.

    Args:
      blocks: what to show. lang: "en" or "ko", the language that blocks are in.
    """
    body = _blocks(blocks, lang)
    hangul = lang == "ko" or any(not char.isascii() and _is_hangul(char) for char in body)  # an English text may cite some
    korean = "\\usepackage{kotex}\n" if hangul else ""
    return _PREAMBLE % {"korean": korean} + body + "\n\\end{document}\n"


def _blocks(blocks: Sequence[Block], lang: str) -> str:
    return "\n".join(_block(block, lang) for block in undoubled(blocks))


def _block(block: Block, lang: str) -> str:
    match block:
        case Heading(words, level):
            if level <= 1:
                return rf"{{\LARGE\bfseries {escaped(words)}\par}}\bigskip"
            return rf"\{'sub' * min(level - 2, 2)}section*{{{escaped(words)}}}"
        case Paragraph(words):
            return rf"{_code(words)}\par"
        case Formula(_, formula):
            return rf"{{\color{{fbblue}}\fit{{{formula}}}}}"
        case Numbers():
            return _numbers(block, lang)
        case Table():
            return _table(block)
        case Note(words):
            return rf"\note{{{_code(words)}}}"
        case Picture(_, words):
            return rf"{{\small\color{{fbfaint}} {escaped(words)}\par}}"
        case Details(summary, inner):
            return rf"\fold{{{escaped(summary)}}}" + "\n" + _blocks(inner, lang)
    raise TypeError(f"explain: expected a block, got {type(block).__name__}.")


_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "^": r"\^{}", "_": r"\_",
    "~": r"\~{}", "%": r"\%", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
}  # fmt: skip
_TEXT = {
    "…": r"\dots{}", "–": "--", "—": "---", "“": "``", "”": "''", "‘": "`", "’": "'", "·": r"\textperiodcentered{}", "−": "$-$",
    "▸": "", "°": r"\textdegree{}", "\u00a0": "~", "✓": r"$\checkmark$", "⋮": r"$\vdots$", "■": r"$\blacksquare$", "①": "(1)",
    "②": "(2)", "③": "(3)", "④": "(4)", "⑤": "(5)", "√": r"$\surd$", "\u0302": r"\^{}",
}  # fmt: skip


def escaped(words: str) -> str:
    """Plain text for LaTeX; signs of mathematics go into math mode."""
    found = ""
    for char in words:
        if char in _SPECIAL:
            found += _SPECIAL[char]
        elif char in _TEXT:
            found += _TEXT[char]
        elif char.isascii() or _is_hangul(char) or char in "éüäöèáíóúçñ":
            found += char
        else:
            found += f"${formula_latex(char) if not char.isspace() else ' '}$"
    return re.sub(r"([A-Za-z]+)\\\^\{\}", lambda m: m[1][:-1] + rf"$\hat{{{m[1][-1]}}}$", found).replace("$$", "")


def _is_hangul(char: str) -> bool:
    return unicodedata.name(char, "").startswith(("HANGUL", "CJK", "IDEOGRAPHIC", "FULLWIDTH"))


def _code(words: str) -> str:
    parts = re.split(r"`([^`]+)`", words)
    return "".join(rf"\texttt{{{_breakable(escaped(p))}}}" if i % 2 else escaped(p) for i, p in enumerate(parts))


def _breakable(words: str) -> str:
    return re.sub(r"(/|\\_|,)", r"\1\\allowbreak{}", words)


def _number(text: str) -> str:
    """A number as ``digits`` writes it, in math mode."""
    mantissa, _, exponent = text.replace("−", "-").replace("∞", r"\infty ").replace("NaN", r"\mathrm{NaN}").partition("e")
    mantissa = mantissa.replace(",", "{,}")
    if not exponent:
        return mantissa
    power = rf"10^{{{exponent}}}"
    return power if mantissa == "1" else rf"{mantissa}\cdot {power}"


def _name(name: str) -> str:
    """The name of an array in math mode: W1 as W₁, dkernel, layers/0/kernel."""
    if "/" in name and "∂" not in name:
        return rf"\text{{\texttt{{{escaped(name)}}}}}"
    if " " in name and not re.search(r"[=+−·/∂σ]", name):  # words
        return rf"\text{{{escaped(name)}}}"
    return formula_latex(name)


def _numbers(block: Numbers, lang: str) -> str:
    array = digits.plain_array(block.values)
    after = rf"\qquad{{\color{{fbfaint}}{formula_latex(block.formula)}}}" if is_math(block.formula) else ""
    if array.ndim == 0:
        return rf"\fit{{{_name(block.name)} = {_number(digits.number(array[()], block.digits))}{after}}}"
    if not digits.is_small(array):
        return rf"$\displaystyle {_name(block.name)}{after}$" + _summary(array, lang)
    cells = digits.cells(array, block.digits).reshape(-1, array.shape[-1])
    rows = r" \\ ".join(" & ".join(map(_number, row)) for row in cells)
    shape = "r" * cells.shape[1]
    return rf"\fit{{{_name(block.name)} = \left[\begin{{array}}{{{shape}}} {rows} \end{{array}}\right]{after}}}"


def _summary(array: np.ndarray, lang: str) -> str:
    found = digits.summary(array)
    parts = [rf"\quad ${escaped(found.shape).replace('$', '')}$"]
    if array.size:
        each = (("min", found.smallest), ("mean", found.mean), ("max", found.largest), ("norm", found.norm))
        parts += [
            rf"{{\color{{fbfaint}}{escaped(said('statistic_' + k, lang))}}} ${_number(digits.number(v, 4))}$" for k, v in each
        ]
    if found.bad:
        parts.append(rf"\textbf{{{escaped(said('not_finite', lang, count=found.bad))}}}")
    return rf"{{\small {' ~ '.join(parts)}}}\par"


def _table(block: Table) -> str:
    right = digits.right_aligned(block.rows, len(block.columns))
    cells = digits.table_cells(block.rows, len(block.columns))
    lengths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(block.columns)]
    widest = max(range(len(lengths)), key=lambda i: (not right[i], lengths[i]))
    kinds = ["r" if r else "l" for r in right]
    if sum(lengths) + 3 * len(lengths) > 88 and not right[widest]:
        share = max(0.2, 1 - (sum(lengths) - lengths[widest] + 3 * len(lengths)) / 88)
        kinds[widest] = rf">{{\raggedright\arraybackslash}}p{{{share:.2f}\linewidth}}"
    head = " & ".join(rf"\textbf{{{escaped(c)}}}" for c in block.columns)
    rows = [
        " & ".join(f"${_number(text)}$" if r and text else _breakable(_code(text)) for r, text in zip(right, row)) + r" \\"
        for row in cells
    ]
    small = r"\footnotesize" if sum(lengths) > 70 else r"\small"
    caption = rf"{{\small\color{{fbfaint}} {_code(block.caption)}\par}}" if block.caption else ""
    columns = f"@{{}}{''.join(kinds)}@{{}}"
    lines = "\n".join([r"\toprule", head + r" \\", r"\midrule", *rows, r"\bottomrule"])
    if len(rows) > _ONE_PAGE:  # over several pages, with the head on each; its columns fit from the second run on
        lines = lines.replace("\\midrule", "\\midrule\n\\endhead", 1)
        body = rf"\setlength{{\LTleft}}{{0pt}}\begin{{longtable}}{{{columns}}}" + f"\n{lines}\n" + r"\end{longtable}"
    else:
        body = rf"\par\medskip\noindent\begin{{tabular}}{{{columns}}}" + f"\n{lines}\n" + r"\end{tabular}\par\medskip"
    return f"{{{small}{body}}}\n{caption}"
