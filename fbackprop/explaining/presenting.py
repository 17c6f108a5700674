"""What a record says, as blocks in the reader's language: forward op by op, output, backward op by op, gradients, bytes."""

import re
from typing import Any

import jax
import numpy as np

from fbackprop.explaining import digits
from fbackprop.explaining.blocks import Block, Details, Formula, Heading, Note, Numbers, Paragraph, Table
from fbackprop.explaining.formulas import OpFormulas, formula, formulas
from fbackprop.explaining.record import Explanation, Kept, Source, Step
from fbackprop.explaining.words import OPS, said

__all__ = ["explanation_blocks", "kept_table", "whence"]


def explanation_blocks(explanation: Explanation, lang: str = "en") -> tuple[Block, ...]:
    """The whole of a record.

    Args:
      explanation: as ``explain`` made it, with values. lang: "en" or "ko".
    Raises:
      ValueError: where there is no such language. TypeError: where the values are traced.
    """
    return (
        Heading(said("title", lang, name=explanation.name), 1),
        *_beginning(explanation, lang),
        Heading(said("forward", lang)),
        Paragraph(said("forward_why", lang)),
        *(_forward(step, lang) for step in explanation.steps),
        Heading(said("loss", lang)),
        *_output(explanation, lang),
        Heading(said("backward", lang)),
        Paragraph(said("backward_how", lang)),
        *(_backward(step, lang) for step in reversed(explanation.steps)),
        Heading(said("gradients", lang)),
        gradient_table(explanation, lang),
        Heading(said("kept", lang)),
        kept_table(explanation, lang),
    )


def whence(source: Source, lang: str) -> str:
    """Where an array comes from: ``layers/0/kernel``, "step 3, by reshape"."""
    parts = [
        said("step", lang, index=i) if name == "y" else said("of_step", lang, name=name, index=i) for i, name in source.steps
    ]
    entries = "".join(name for name in source.through if name.startswith("["))
    parts += [f"`{leaf}{entries}`" for leaf in source.leaves]
    if not parts:
        return said("constant", lang)
    text = said("and", lang).join(parts)
    others = [name for name in source.through if not name.startswith("[")]
    return said("through", lang, source=text, names=", ".join(others)) if others else text


def _beginning(explanation: Explanation, lang: str) -> list[Block]:
    outputs = _flat_outputs(explanation)
    keeps, steps = digits.size(explanation.kept_bytes), len(explanation.steps)
    if len(outputs) == 1 and np.ndim(outputs[0]) == 0:
        summary = said("summary", lang, steps=steps, value=digits.number(digits.plain_array(outputs[0])[()]), bytes=keeps)
    else:
        summary = said("summary_many", lang, steps=steps, bytes=keeps)
    worst = max((float(digits.plain_array(d)) for d in explanation.differences.values()), default=0.0)
    agrees = explanation.agrees
    agreement = said("agrees" if agrees else "disagrees", lang, difference=digits.number(worst, 2))
    words = (summary, said("real", lang), *([agreement] if agrees else []))
    about: list[Block] = [Paragraph(" ".join(words)), Paragraph(said("reading", lang))]
    return about if agrees else [*about, Note(agreement)]


def _flat_outputs(explanation: Explanation) -> list[Any]:
    return jax.tree.leaves(explanation.output)


def _output(explanation: Explanation, lang: str) -> list[Block]:
    outputs = _flat_outputs(explanation)
    names = ["L"] if len(outputs) == 1 else [f"L{i}" for i in range(len(outputs))]
    found: list[Block] = []
    for name, value, source, d in zip(names, outputs, explanation.sources, explanation.cotangent):
        found += [Paragraph(said("loss_from", lang, name=name, source=whence(source, lang))), Numbers(name, value)]
        if d is not None:
            found.append(Numbers(f"d{name}", d))
    return found


def _title(step: Step) -> str:
    return " · ".join(part for part in (f"{step.index}. {step.op}", step.layer) if part)


def _shapes(arrays: dict[str, Any]) -> str:
    return ", ".join(f"{name} {digits.shape_text(np.shape(value))}" for name, value in arrays.items() if value is not None)


def _forward(step: Step, lang: str) -> Details:
    lines = _formulas(step)
    own: list[Block] = [
        Paragraph(OPS.get(step.op, step.summary) if lang == "ko" else step.summary),
        *_split(lines.between, step, forward=True),
        *map(formula, lines.forward),
    ]
    if options := ", ".join(f"{n}={v!r}" for n, v in step.options if v is not None and not callable(v)):
        own.append(Paragraph(said("options", lang, options=f"`{options}`")))
    sources = {name: whence(source, lang) for name, source in step.sources}
    taken = "; ".join(f"{name} ← {source}" for name, source in sources.items())
    own.append(Paragraph(said("takes", lang, names=taken)))
    for name, value in step.inputs.items():
        own.append(Numbers(name, value, said("from", lang, source=sources[name]).replace("`", "")))
    y = lines.forward[0] if lines.forward else step.summary
    own += [Numbers(name, value, y if name in ("y", "y/0") else "") for name, value in step.outputs.items()]
    own.append(Paragraph(_keeps(step.kept, lang)))
    return Details(f"{_title(step)}: {_shapes(step.inputs)} → {_shapes(step.outputs)}", tuple(own), f"forward-{step.index}")


def _formulas(step: Step) -> OpFormulas:
    """Without the arguments that were not given."""
    given = {name.split("/")[0] for name in step.inputs}
    absent = [name for name in step.rule.arguments if name not in given]

    def without(line: str) -> str:
        for name in absent:
            line = re.sub(rf" \+ {name}\b(\[[^]]*\])?|(?<![\w]){name} (?=\S)(?![=+−])", "", line)
        return line

    found = formulas(step.rule)
    backward = {name: without(line) for name, line in found.backward.items() if name in given}
    return OpFormulas(tuple(map(without, found.forward)), backward, tuple(map(without, found.between)))


def _split(lines: tuple[str, ...], step: Step, forward: bool) -> list[Formula]:
    """Formulas in between: those without cotangents belong to the forward, the others to the backward."""
    pieces = [piece for line in lines for piece in _pieces(line)]
    dys = [re.search(r"\bd[a-z](?![a-z])", piece) is not None for piece in pieces]
    return [formula(piece) for piece, back in zip(pieces, dys) if back is not forward]


def _pieces(line: str) -> list[str]:
    """``a = f(b, c), d = e`` as two: a comma parts where a name and = follow."""
    return re.split(r",\s+(?=[^\s=,()]+ = )", line)


def _keeps(kept: tuple[Kept, ...], lang: str) -> str:
    if not kept:
        return said("keeps_nothing", lang)
    return said("keeps", lang, names=", ".join(f"`{k.name}` ({digits.size(k.bytes)})" for k in kept))


def _backward(step: Step, lang: str) -> Details:
    title = _title(step)
    if not step.reached:
        return Details(title, (Paragraph(said("unreached", lang)),), f"backward-{step.index}")
    lines = _formulas(step)
    own: list[Block] = []
    if not step.rule.exact:
        own.append(Note(said("straight", lang)))
    own.append(Paragraph(said("upstream", lang)))
    own += [Numbers(f"d{name}", d, f"∂L/∂{name}") for name, d in step.upstream.items() if d is not None]
    own += _split(lines.between, step, forward=False)
    handed = {name: d for name, d in step.cotangents.items() if d is not None}
    own.append(Paragraph(said("hands", lang)))
    shown: set[str] = set()
    for name, d in handed.items():
        line = lines.backward.get(name.split("/")[0], "")
        if line and line not in shown:
            own.append(formula(line))
            shown.add(line)
        own.append(Numbers(f"d{name}", d, line))
    if not shown:
        own.insert(0, Details(said("derivation", lang), tuple(map(formula, _derivation(step)))))
    arriving = {f"d{name}": d for name, d in step.upstream.items()}
    norms = ", ".join(f"‖d{name}‖ {digits.number(digits.norm(d), 3)}" for name, d in handed.items())
    return Details(f"{title}: {_shapes(arriving)} → {norms}", tuple(own), f"backward-{step.index}")


def _derivation(step: Step) -> list[str]:
    return [line.strip() for line in step.formula.splitlines() if line.startswith("    ") and "=" in line]


def gradient_table(explanation: Explanation, lang: str = "en") -> Table:
    """A row for each array among the arguments that has a gradient."""
    rows = []
    for leaf in explanation.leaves:
        if leaf.gradient is not None:
            value, d = explanation.values[leaf.value], digits.plain_array(explanation.values[leaf.gradient])
            largest = float(np.abs(d).max(initial=0.0))
            rows.append((leaf.label, digits.shape_text(leaf.type.shape), digits.norm(value), digits.norm(d), largest))
    columns = ("argument", "shape", "value_norm", "norm", "largest")
    return Table(tuple(said(f"column_{c}", lang) for c in columns), tuple(rows))


def kept_table(explanation: Explanation, lang: str = "en") -> Table:
    """What each op call keeps for its backward, in bytes."""
    rows = []
    given = 0
    for step in explanation.steps:
        for kept in step.kept:
            if kept.origin in ("parameter", "argument") and not kept.again:
                given += kept.bytes
            what = said(f"origin_{kept.origin}", lang) + (f" ({said('again', lang)})" if kept.again else "")
            shape = digits.shape_text(kept.shape)
            rows.append((f"{step.index}. {step.op}", kept.name, shape, str(kept.dtype), what, 0 if kept.again else kept.bytes))
    columns = ("step", "name", "shape", "dtype", "what", "bytes")
    caption = said("kept_caption", lang, bytes=digits.size(explanation.kept_bytes), given=digits.size(given))
    return Table(tuple(said(f"column_{c}", lang) for c in columns), tuple(rows), caption)
