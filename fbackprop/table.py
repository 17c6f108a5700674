"""The table of rules, for the README: ``python -m fbackprop.table README.md`` writes it between its two marks."""

import inspect
import pathlib
import sys

from fbackprop import ops  # noqa: F401  (fills RULES)
from fbackprop.rules import RULES, Rule

__all__ = ["insert", "rules_table"]

BEGIN, END = "<!-- rules: begin (python -m fbackprop.table README.md) -->", "<!-- rules: end -->"


def rules_table() -> str:
    """A Markdown table with a row for each rule, by module and name."""
    rows = sorted(RULES.values(), key=lambda rule: (rule.reference.__module__, rule.name))
    lines = ["| op | what it is | kept for the backward | derivation |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [_row(rule) for rule in rows if rule.reference.__module__.startswith("fbackprop.")])


def _row(rule: Rule) -> str:
    signature = ", ".join(rule.signature.parameters)
    summary = (inspect.getdoc(rule.reference) or "").splitlines()[0].rstrip(".")
    if not rule.exact:
        summary += " (not the gradient, by intent)"
    file = rule.reference.__module__.replace(".", "/") + ".py"
    return f"| `{rule.name}({signature})` | {summary} | {rule.keeps} | [{pathlib.PurePath(file).name}]({file}) |"


def insert(text: str) -> str:
    """The text with the table between its marks replaced by the present one."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{rules_table()}\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = pathlib.Path(name)
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
