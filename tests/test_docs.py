"""docs/check.md is true: each check has a section, its example is found by that check, and says what is printed there."""

import pathlib
import re

import pytest

from fbackprop.checking import DEPTHS

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "check.md").read_text(encoding="utf-8")
PARTS = {part.splitlines()[0]: part for part in re.split(r"\n(?=#+ )", TEXT.replace("```python\nimport os", "```"))}
SECTIONS = {title[4:]: part for title, part in PARTS.items() if title.startswith("### ")}
PREAMBLE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]


def code_and_output(part):
    code, output = (re.findall(rf"```{kind}\n(.*?)```", part, re.DOTALL) for kind in ("python", "text"))
    return code[0], output[0]


def words(text):
    """Without line breaks and numbers, which differ from machine to machine, and the words of JAX's own errors."""
    text = re.sub(r"Error: .*", "Error", " ".join(text.split()))
    return re.sub(r"-?\b\d[\d.,]*(e[+-]?\d+)?", "#", text)


@pytest.fixture(scope="module")
def scope(request):
    names: dict = {}
    exec(PREAMBLE, names)
    return names


def test_each_check_has_a_section_in_the_order_in_which_they_run():
    assert tuple(SECTIONS) == DEPTHS["full"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_example_is_found_by_the_check_that_it_stands_for(name, scope):
    code, output = code_and_output(SECTIONS[name])
    # Chosen by name, so that the example of a thorough check does not run all of them here.
    here = dict(scope)
    full = 'depth="full"' in code
    exec(code.replace('depth="full"', f"checks=[{name!r}]"), here)
    assert full == (name not in DEPTHS["quick"]), f"the section {name} shows another depth"
    found = [str(finding) for finding in here["report"].findings if finding.check == name]
    assert words(output) in [words(finding) for finding in found], found


def test_the_first_example_prints_its_table(scope):
    _, output = code_and_output(PARTS["# check: is a backward pass right?"])
    assert [words(line) for line in output.splitlines()] == [words(line) for line in str(scope["report"]).splitlines()]


def test_the_test_that_it_recommends(scope):
    here = dict(scope)
    exec(code_and_output(PARTS["## In a test, and in CI"] + "```text\n```")[0], here)
    here["test_my_rule"]()
