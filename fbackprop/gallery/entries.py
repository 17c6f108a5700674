"""What the gallery knows of each op: from its rule, from its sources, and from a file of figures that was measured.

``python -m fbackprop.gallery.entries [NAMES]`` measures: bytes on the first workload, errors on the first sample; it writes the
file, with new figures of the ops that are named, or else of those that are missing.
"""

import ast
import dataclasses
import functools
import inspect
import json
import pathlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop import compositions, one_line, ops
from fbackprop.checking import check
from fbackprop.context import without_rules
from fbackprop.files import write_json
from fbackprop.measuring import saved_bytes
from fbackprop.rules import RULES, Rule
from fbackprop.samples import Spec

__all__ = ["Entry", "Figures", "entries", "figures_of", "sources"]

FILE = pathlib.Path(__file__).with_name("figures.json")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one op. Bytes kept for the backward at a workload, arguments included: by the rule, by autodiff of the definition, at
    the least. Errors at a sample in float32, in units of the last place: of the rule, of jax.grad of the definition."""

    workload: str
    ours: int
    autodiff: int
    least: int
    error: float | None  # None where the rule is not meant to be the gradient
    autodiff_error: float | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op or composition."""

    name: str
    signature: str
    summary: str
    keeps: str
    doc: str
    formula: str  # the derivation
    file: str
    rule: Rule | None  # None for a composition
    figures: Figures | None

    def mentions(self, words: str) -> bool:
        """Whether each of the words stands somewhere in what is told of it."""
        told = f"{self.name} {self.summary} {self.keeps} {self.doc} {self.file}".lower()
        return all(word in told for word in words.lower().split())


def entries() -> dict[str, Entry]:
    """Every op and composition by name: ops first, by module."""
    known = _figures()
    rules = sorted((RULES[name] for name in ops.__all__), key=lambda rule: (rule.reference.__module__, rule.name))
    found = {rule.name: _entry(rule.name, rule.reference, rule, known.get(rule.name)) for rule in rules}
    for name in compositions.__all__:
        found[name] = _entry(name, getattr(compositions, name), None, None)
    return found


def _entry(name: str, fn: Any, rule: Rule | None, figures: Figures | None) -> Entry:
    doc = inspect.getdoc(fn) or ""
    module = inspect.getmodule(fn)
    keeps = rule.keeps if rule else "what the ops inside keep"
    formula = rule.formula if rule else "A composition: its backward is that of the ops inside, one after the other."
    summary = doc.split("\n\n")[0].replace("\n", " ").rstrip(".")
    if rule and not rule.exact:
        summary += " (not the gradient, by intent)"
    file = f"{module.__name__.replace('.', '/')}.py" if module else ""
    return Entry(name, f"{name}{_signature(fn)}", summary, keeps, doc, formula, file, rule, figures)


def _signature(fn: Any) -> str:
    parameters = inspect.signature(fn).parameters.values()
    return f"({', '.join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)})"


@functools.cache
def _figures() -> dict[str, Figures]:
    if not FILE.exists():
        return {}
    return {name: Figures(**figures) for name, figures in json.loads(FILE.read_text(encoding="utf-8")).items()}


def sources(entry: Entry) -> dict[str, str]:
    """The code of an op by heading: definition, forward, backward, what they call in their file; of a composition its own."""
    rule = entry.rule
    if rule is None:
        return {"composition": _source(getattr(compositions, entry.name))}
    found: dict[str, str]
    if rule.forward.__module__ == one_line.__name__:
        # The definition carries its decorator, in which the slope stands.
        said = "# forward:  the definition; kept is what the slope above names\n# backward: dx = dy · slope"
        found = {"definition and slope": _source(rule.reference), "forward and backward": said}
        called = [fn for name in _slopes(found["definition and slope"]) if (fn := _own(rule.reference, name))]
        shown: list[Any] = [rule.reference]
    else:
        shown = [rule.reference, rule.forward, rule.backward]
        found = {heading: _source(fn) for heading, fn in zip(("definition", "forward", "backward"), shown)}
        called = [other for fn in shown for other in _called(fn)]
    first = len(shown)
    for fn in called:  # grows while it is read: helpers of helpers
        if fn not in shown:
            shown.append(fn)
            called += _called(fn)
    if helpers := shown[first:]:
        found["called by these"] = "\n\n\n".join(map(_source, helpers))
    return found


def _called(fn: Any) -> list[Any]:
    """The functions of the same file whose names a function, or one inside of it, mentions."""

    def names(code: types.CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from names(constant)

    return [own for name in names(fn.__code__) if (own := _own(fn, name))]


def _own(fn: Any, name: str) -> Any:
    """The plain function of this name in the file of ``fn``."""
    found = getattr(inspect.getmodule(fn), name, None)
    return found if inspect.isfunction(found) and not hasattr(found, "rule") and found.__module__ == fn.__module__ else None


def _slopes(source: str) -> list[str]:
    """The names that stand in a decorator ``elementwise`` where derivatives do."""
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    calls = [d for d in definition.decorator_list if isinstance(d, ast.Call)]
    places = [place for call in calls for place in (*call.args, *(k.value for k in call.keywords if k.arg == "narrow"))]
    return [node.id for place in places for node in ast.walk(place) if isinstance(node, ast.Name)]


def _source(fn: Any) -> str:
    try:
        return inspect.getsource(fn).rstrip()
    except (OSError, TypeError):  # a function of another library, or one without a file
        return f"# {getattr(fn, '__module__', '?')}.{getattr(fn, '__name__', '?')}"


# Measuring.


def figures_of(rule: Rule) -> Figures:
    """Counts bytes on the op's first workload, and checks it on its first sample."""
    workload = rule.workloads[0]

    def unmade(value: Any) -> Any:
        return value.shaped(workload.dtype) if isinstance(value, Spec) else value

    dynamic, static = rule.split([unmade(v) for v in workload.args], {name: unmade(v) for name, v in workload.options})
    moving = [i for i, a in enumerate(dynamic) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)]

    def kept(op: Any) -> int:
        def call(*moved: Any) -> Any:
            arrays = dict(zip(rule.arguments, dynamic)) | {rule.arguments[i]: a for i, a in zip(moving, moved)}
            return op(**arrays, **dict(zip(rule.static, static)))

        return saved_bytes(call, *(dynamic[i] for i in moving))

    arrays = {n: a for n, a in zip(rule.arguments, dynamic) if hasattr(a, "dtype")}
    rest = {n: a for n, a in zip(rule.arguments, dynamic) if n not in arrays}
    y = jax.eval_shape(lambda arrays: rule.op(**arrays, **rest, **dict(zip(rule.static, static))), arrays)
    least = rule.minimum_bytes(y, dynamic, static)
    args, options = rule.samples[0].make()
    values, chosen = rule.split(args, options)
    report = check(rule.op, keywords=dict(zip(rule.arguments, values)), static=dict(zip(rule.static, chosen)))
    errors = [(e.ulps, e.reference_ulps) for e in report.errors] if rule.exact else []
    worst = [round(float(max(pair[i] for pair in errors)), 2) if errors else None for i in (0, 1)]
    return Figures(f"{workload}: {workload.dtype}", kept(rule.op), kept(without_rules(rule.op)), least or 0, worst[0], worst[1])


def main(names: Sequence[str]) -> None:
    """Measures these ops, or else those that the file does not have, and leaves out of it what is no op any more."""
    known = {name: figures for name, figures in _figures().items() if name in ops.__all__}
    for name in sorted(names or set(ops.__all__) - set(known)):
        known[name] = figures_of(RULES[name])
        write_json(FILE, {n: dataclasses.asdict(known[n]) for n in sorted(known)})


if __name__ == "__main__":
    main(sys.argv[1:])
