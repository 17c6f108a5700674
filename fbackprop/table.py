"""Tables for the README and docs/other_rules.md: ``python -m fbackprop.table FILE`` writes them between their two marks."""

import inspect
import pathlib
import re
import sys

from fbackprop import ops  # noqa: F401  (fills RULES)
from fbackprop.alternatives import METHODS, available
from fbackprop.rules import RULES, Rule

__all__ = ["insert", "methods_table", "rules_table"]


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


def methods_table() -> str:
    """A Markdown table with a row for each other backward rule."""
    lines = ["| rule | what it does | backward | ops | source |", "| --- | --- | --- | --- | --- |"]
    ops_of = available()
    for method in METHODS.values():
        served = ", ".join(f"`{op}`" for op in ops_of[method.name])
        if method.every:
            served = "any"
        elif method.name.startswith("lrp-") and method.name != "lrp-0":
            served = "those of `lrp-0`"
        name, default = method.option or ("", None)
        number = f", {name}" * bool(name) + (f" = {default:g}" if default is not None else "")
        formula = method.formula.replace("|", "\\|")
        lines.append(f"| `{method.name}`{number} | {method.summary} | {formula} | {served} | {method.source} |")
    return "\n".join(lines)


_TABLES = {"rules": rules_table, "methods": methods_table}
_MARKS = re.compile(r"(<!-- (rules|methods): begin .*?-->\n).*?(<!-- \2: end -->)", re.DOTALL)


def insert(text: str) -> str:
    """The text with the tables between their marks replaced by the present ones."""
    return _MARKS.sub(lambda found: f"{found[1]}{_TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = pathlib.Path(name)
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
