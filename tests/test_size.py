"""The engine stays small: code lines of rules.py and context.py, without docstrings, comments and blank lines."""

import ast
import io
import pathlib
import tokenize

import fbackprop

NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in NOT_CODE for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def test_the_engine_is_under_four_hundred_lines():
    root = pathlib.Path(fbackprop.__file__).parent
    assert sum(code_lines((root / name).read_text(encoding="utf-8")) for name in ("rules.py", "context.py")) < 400
