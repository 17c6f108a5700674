"""The walks: every number of ``worked_examples.json`` is in its walk, shown to the digits of the file, in both languages.

The file comes from an implementation without this library (tests/test_worked_examples.py holds the ops against it); the walks
take their numbers from the record of a run.
"""

import json
import math
import pathlib
import re

import numpy as np
import pytest

import fbackprop as fb
from fbackprop.explaining import blocks as b
from fbackprop.explaining import terminal
from fbackprop.explaining.walks import WALKS, walk

EXAMPLES = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text())
ENTRIES = {
    "and-gate": "001_and_gate",
    "neuron": "001_one_neuron",
    "two-three-two": "000_two_three_two",
    "error-sharing": "002_error_sharing",
    "sigmoid-neuron": "003_sigmoid_neuron",
    "three-layer": "004_mlp",
    "cnn": "004_cnn",
    "vanishing": "vanishing_fixture",
}
HANGUL = re.compile("[가-힣]")


@pytest.fixture(scope="module")
def told():
    """Each walk once in each language."""
    found = {}

    def tell(name, language):
        if (name, language) not in found:
            found[name, language] = walk(name, language)
        return found[name, language]

    return tell


def leaves(entry, path=""):
    """(path, number) for every number of an entry, as it stands in the file."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(entry, list):
        for i, value in enumerate(entry):
            yield from leaves(value, f"{path}[{i}]")
    elif not isinstance(entry, str):
        yield path, entry


def decimals(number):
    """How many the file has."""
    mantissa, _, exponent = repr(number).partition("e")
    return len(mantissa.partition(".")[2]) - int(exponent or 0)


def flat(blocks):
    for block in blocks:
        yield block
        if isinstance(block, b.Details):
            yield from flat(block.blocks)


def numbers_in(text):
    """Every number that is printed."""
    return [float(n.replace("−", "-")) for n in re.findall(r"[−-]?\d+(?:\.\d+)?(?:e[−-]?\d+)?", text.replace(",", ""))]


def test_every_entry_has_a_walk():
    assert set(ENTRIES) == set(WALKS)
    assert set(ENTRIES.values()) == set(EXAMPLES)


@pytest.mark.parametrize("name", WALKS)
def test_every_number_of_the_file_is_shown(told, name):
    found = told(name, "en")
    shown = [np.ravel(np.asarray(n.values, np.float64)) for n in flat(found.blocks) if isinstance(n, b.Numbers)]
    values = np.sort(np.concatenate(shown))
    printed = np.sort(numbers_in(terminal.text(found.blocks, "en", 120)))

    def among(number, sorted_numbers, error):
        i = np.searchsorted(sorted_numbers, number - error)
        return i < len(sorted_numbers) and sorted_numbers[i] <= number + error

    for path, number in leaves(EXAMPLES[ENTRIES[name]]):
        error = 0.501 * 10.0 ** -decimals(number) if isinstance(number, float) else 0.0
        exact = error if abs(number) > 1e-6 else abs(number) * 1e-9
        assert among(number, values, exact), f"{name}{path}: {number} is not among the numbers of the walk"
        assert among(number, printed, exact), f"{name}{path}: {number} is not printed to its digits"


@pytest.mark.parametrize("name", WALKS)
def test_numbers_by_key(told, name):
    """``--json`` has the keys of the file, and more."""

    def compare(expected, found, path=""):
        if isinstance(expected, dict):
            for key in [key for key, value in expected.items() if not isinstance(value, str)]:
                assert key in found, f"{name}{path}: no {key}"
                compare(expected[key], found[key], f"{path}/{key}")
        else:
            np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=1e-9, atol=1e-9, err_msg=f"{name}{path}")

    compare(EXAMPLES[ENTRIES[name]], told(name, "en").numbers)
    json.dumps(told(name, "en").numbers, allow_nan=False)


@pytest.mark.parametrize("name", WALKS)
def test_both_languages_tell_the_same(told, name):
    english, korean = told(name, "en"), told(name, "ko")
    assert english.numbers == korean.numbers
    assert [type(block) for block in english.blocks] == [type(block) for block in korean.blocks]
    assert HANGUL.search(korean.title)
    for section in korean.sections:
        assert HANGUL.search(section.title)
    for one, other in zip(flat(english.blocks), flat(korean.blocks)):
        if isinstance(one, (b.Paragraph, b.Note)):
            assert HANGUL.search(other.text), other.text
            assert len(HANGUL.findall(one.text)) < 25, one.text  # 액, 웨, 앤
        if isinstance(one, b.Numbers):
            np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_has_its_parts(told, name):
    sections = [section.title.lower() for section in told(name, "en").sections]
    for part in ("show", "forward", "loss", "backward", "update"):
        part = "error" if (name, part) == ("error-sharing", "loss") else part
        assert any(part in title for title in sections), f"{name} has no section on {part}"
    assert all(section.blocks for section in told(name, "en").sections)


def test_paths_add_up(told):
    paths = told("two-three-two", "en").numbers["paths_of_W1_0_0"]
    assert math.isclose(paths["through_output_0"] + paths["through_output_1"], paths["sum"], abs_tol=1e-15)
    assert math.isclose(paths["sum"], told("two-three-two", "en").numbers["gradients"]["W1"][0][0], abs_tol=1e-15)


def test_three_layers_dead_and_alive(told):
    numbers = told("three-layer", "en").numbers
    assert [h > 0 for h in numbers["after_update"]["h1"]] == [False, False, True]
    assert [row == [0, 0] for row in numbers["after_update"]["dW1"]] == [True, True, False]
    assert all(h > 0 for h in numbers["small_rate"]["h1"])
    # What the document says is shown as the document's, and is not what is right.
    for name, value in numbers["document_says"].items():
        assert not np.allclose(numbers["forward"][name], value, atol=0.05)
    assert np.allclose(numbers["recomputed"]["h1_without_b1"], numbers["document_says"]["h1"])
    assert not np.allclose(numbers["recomputed"]["h2_from_its_h1"], numbers["document_says"]["h2"], atol=0.05)


def test_the_gradient_is_not_the_share(told):
    numbers = told("error-sharing", "en").numbers
    assert numbers["gradient"] == [0.6, 0.6]
    assert math.isclose(sum(numbers["shares"]), numbers["error"], abs_tol=1e-12)


def test_a_wrong_rule_shows(told):
    """The numbers are those of the rules: with another backward of sigmoid they are others."""
    forward, backward = fb.sigmoid.rule.forward, fb.sigmoid.rule.backward
    wrong = {"sigmoid": (forward, lambda saved, dy: (backward(saved, dy)[0] * 1.5,))}
    right, found = told("neuron", "en").numbers, fb.with_rules(walk, wrong)("neuron").numbers
    assert found["y"] == right["y"]
    assert math.isclose(found["G_w"], 1.5 * right["G_w"])


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"no example 'gate'; known are and-gate"):
        walk("gate")
    with pytest.raises(ValueError, match=r"no language 'de'; known are en, ko"):
        walk("neuron", "de")
