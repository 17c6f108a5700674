"""The renderings of a record: they show what is in it, LaTeX compiles, and a real browser shows the page without a fault."""

import ast
import html
import html.parser
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbackprop as fb
from fbackprop.explaining import blocks as b
from fbackprop.explaining import digits, explain, formulas, latex, page, terminal, words
from fbackprop.explaining.presenting import explanation_blocks, kept_table
from fbackprop.explaining.presenting_chains import chain_blocks
from fbackprop.explaining.presenting_keeping import keeping_blocks

ROOT = pathlib.Path(fb.__file__).parent
WORKED = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text(encoding="utf-8"))["000_two_three_two"]


def network(params, x, y):
    """The network of the first document."""
    hidden = fb.sigmoid(fb.dense(x, params["W1"]))
    return fb.sum_of_squares(fb.sigmoid(fb.dense(hidden, params["W2"])), y)


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        given = WORKED["inputs"]
        params = {name: jnp.array(given[name]).T for name in ("W1", "W2")}
        explanation = explain(network, params, jnp.array(given["x"]), jnp.array(given["y"]))
        return explanation, explanation.chain("W1[0, 0]")


@pytest.fixture(scope="module")
def large():
    """Arrays that are too large to be read, an image, an op in the middle that is not reached, what is not finite."""

    def loss(params, image, label):
        h = fb.max_pool(fb.relu(fb.conv(image, params["kernel"], params["bias"])), (2, 2), (2, 2))
        fb.tanh(params["bias"])
        return fb.softmax_cross_entropy_with_integer_labels(fb.dense(h.reshape(1, -1), params["out"]), label).mean()

    key = jax.random.key(0)
    params = {
        "kernel": jax.random.normal(key, (3, 3, 1, 4)), "bias": jnp.zeros(4), "out": 0.1 * jax.random.normal(key, (64, 10)),
    }  # fmt: skip
    return explain(loss, params, jax.random.uniform(key, (1, 8, 8, 1)), jnp.array([3]))


# --------------------------------------------------------------------------------------------------------------- words


def test_every_word_stands_in_both_languages_with_the_same_places():
    for key, both in words.WORDS.items():
        assert len(both) == len(words.LANGUAGES), key
        assert all(both), key
        places = [sorted(re.findall(r"\{(\w+)\}", text)) for text in both]
        assert places[0] == places[1], key
        if re.search("[a-z]{4}", both[0].replace("jax", "")) and key not in ("folded", "factor_jax"):
            assert re.search("[가-힣]", both[1]), key


def test_every_word_that_is_said_is_known_and_every_known_one_is_said():
    modules = [f for f in (ROOT / "explaining").rglob("*.py") if f.name != "words.py"]
    nodes = [node for file in modules for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    made = tuple(text for text in texts if re.fullmatch(r"[a-z]+_", text))  # the beginnings of f"column_{name}"
    assert set(made) >= {"column_", "factor_", "origin_", "statistic_"}
    assert not [key for key in words.WORDS if key not in texts and not key.startswith(made)], "nobody says these"


def test_an_unknown_language_is_told(small):
    for render in (small[0].text, small[0].latex, small[0].html):
        with pytest.raises(ValueError, match="there is no language 'de'; known are en, ko"):
            render("de")


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.034575278814, "0.0345753"), (-0.5, "−0.5"), (1.0, "1"), (123456.789, "123457"), (1e-9, "1e−9"), (-2.5e12, "−2.5e12"),
     (0.0, "0"), (np.inf, "∞"), (np.nan, "NaN"), (np.int32(12345), "12,345"), (True, "1")],
)  # fmt: skip
def test_a_number(value, text):
    assert digits.number(value) == text


def test_all_digits_are_those_of_the_dtype():
    assert digits.exact(np.float64(np.float32(0.1)), np.float32) == "0.1"
    assert digits.exact(np.float64(np.float32(0.1)), np.float64) == "0.10000000149011612"
    assert digits.exact(np.float64(-0.5), jnp.bfloat16) == "−0.5"
    assert digits.exact(np.int32(12345)) == "12,345"


def test_numbers_of_an_array_align_and_lose_no_small_one():
    assert list(digits.cells(np.array([0.0345, -0.5, 0.0, 1.0]))) == ["0.0345", "−0.5000", "0", "1.0000"]
    assert list(digits.cells(np.array([1e-9, 1.0]))) == ["1e−9", "1"]
    assert list(digits.cells(np.array([1.0, np.nan]))) == ["1", "NaN"]


def test_a_summary_and_its_picture():
    array = np.zeros((40, 30))
    array[0, 0], array[1, 1] = np.nan, 3.0
    found = digits.summary(array)
    assert (found.shape, found.largest, found.norm, found.bad) == ("40×30", 3.0, 3.0, 1)
    content, width, height = digits.heat_map(array)
    assert content.startswith(b"\x89PNG")
    assert (width, height) == (28, 16)
    assert digits.heat_map(np.ones((3, 3, 1, 4)), kernel=True)[1:] == (15, 3)
    assert digits.heat_map(np.ones((2, 8, 8, 1)))[1:] == (8, 8)


def test_traced_values_are_told(small):
    with pytest.raises(TypeError, match=r"return the explanation from jax\.jit"):
        jax.jit(lambda e: jnp.sum(len(e.text())))(small[0])


# ------------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("name", fb.RULES)
def test_every_op_renders_in_all_forms(name):
    rule = fb.RULES[name]
    found = formulas.formulas(rule)
    assert set(found.backward) <= set(rule.arguments), "formulas of arguments that there are not"
    if name in formulas.TABLE:
        assert found.forward
        assert found.backward
    lines = [*found.forward, *found.between, *found.backward.values()]
    written = [formulas.formula(line) for line in (*lines, f"an op {name}")]
    for block in written:
        assert block.latex.isascii(), block
        opened, closed = (block.latex.count(c) - block.latex.count(f"\\{c}") for c in "{}")
        assert opened == closed, block
        assert "?" not in block.latex, block
    assert name in terminal.text(written)
    assert latex.latex(written).isascii()
    page.page(written)


def test_formulas_name_the_arguments_that_the_record_shows():
    for name, found in formulas.TABLE.items():
        rule = fb.RULES[name]
        differentiable = {
            n for n in rule.arguments if re.search(rf"\bd{n}\b", inspect.getdoc(rule.reference) or "") or n == "x"
        }
        assert not differentiable - set(found.backward) - {"where"}, name


def test_latex_of_a_formula():
    assert formulas.latex("dx = (g − x̂ mean(g x̂)) / √(σ² + ε)") == (
        r"\mathrm{d}x = (g - \hat{x} \operatorname{mean}(g\, \hat{x})) / \sqrt{\sigma ^{2} + \varepsilon }"
    )
    assert formulas.latex("h_t = recurrent_kernelᵀ") == r"h_{t} = \mathit{recurrent\_kernel}^{\top}"


def test_a_formula_leaves_out_what_was_not_given(small):
    text = small[0].text()
    assert "y = x kernel\n" in text
    assert "+ bias" not in text.replace("y = x · kernel + bias", "")


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_has_the_numbers_of_the_document(small):
    text = small[0].text(chains=["W1[0, 0]"])
    assert str(small[0]) == small[0].text()
    shown = np.array([float(x.replace("−", "-")) for x in re.findall(r"−?\d+\.\d+", text)])
    for value in (*np.ravel(WORKED["gradients"]["W1"]), *np.ravel(WORKED["gradients"]["W2"]), WORKED["forward"]["loss"]):
        assert np.abs(shown - value).min() < 5e-7 + 1e-6 * abs(value), value
    for value in WORKED["paths_of_W1_0_0"].values():
        assert np.abs(shown - value).min() < 5e-7, value


def test_no_digit_of_a_wide_array_is_cut_off():
    values = np.random.default_rng(0).normal(size=(3, 8))
    for width in (40, 60, 100, 200):
        text = terminal.text([b.Numbers("dkernel", values, digits=12)], width=width)
        assert max(map(len, text.splitlines())) <= width
        found = sorted(float(x.replace("−", "-")) for x in re.findall(r"−?\d+\.\d+", text))
        np.testing.assert_allclose(found, sorted(values.reshape(-1)), rtol=1e-9)


def test_the_factors_have_the_labels_of_the_document(small):
    korean, english = (next(x for x in chain_blocks(small[1], lang) if isinstance(x, b.Table)) for lang in ("ko", "en"))
    assert korean.columns == ("경로", "손실", "액", "웨", "액", "앤", "곱")
    assert english.columns == ("path", "loss", "activation", "weight", "activation", "input", "product")
    first, second, total = english.rows
    assert [np.prod(row[1:-1]) for row in (first, second)] == pytest.approx([first[-1], second[-1]])
    assert first[-1] + second[-1] == pytest.approx(total[-1])
    assert total[-1] == pytest.approx(WORKED["paths_of_W1_0_0"]["sum"])


def test_every_step_is_there_forward_and_backward(large):
    found = [x for x in explanation_blocks(large) if isinstance(x, b.Details)]
    titles = [x.summary.split(":")[0] for x in found]
    steps = [f"{s.index}. {s.op}" for s in large.steps]
    assert [t.split(" · ")[0] for t in titles] == [*steps, *reversed(steps)]
    unreached = next(x for x in found if x.anchor == "backward-3")
    assert "does not depend on this call" in str(unreached)


def test_the_table_of_bytes_sums_to_what_is_kept(large):
    table = kept_table(large)
    assert sum(row[-1] for row in table.rows) == large.kept_bytes
    assert len(table.rows) == sum(len(step.kept) for step in large.steps)


def test_what_saved_found_renders_in_all_forms():
    def loss(params, x):
        return fb.half_square(fb.tanh(fb.dense(x, params["kernel"])), jnp.zeros((4, 3)))

    keeping = fb.saved(loss, {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, jax.ShapeDtypeStruct((4, 2), jnp.float32))
    for lang in words.LANGUAGES:
        blocks = keeping_blocks(keeping, lang)
        arrays, rivals = (x for x in blocks if isinstance(x, b.Table))
        assert sum(row[-1] for row in arrays.rows) == keeping.total
        assert [row[1] for row in rivals.rows] == [rival.bytes for rival in keeping.rivals]
        assert digits.size(keeping.total) in terminal.text(blocks, lang)
        assert not Parsed(page.page(blocks, lang)).faults
        assert latex.latex(blocks, lang)


def test_korean_is_korean(large):
    text = re.sub(r"`[^`]*`", "", terminal.text(explanation_blocks(large, "ko"), "ko"))
    known = {w for s in large.steps for w in (s.op, *s.inputs, *(k.name for k in s.kept))}
    sentences = [line for line in text.splitlines() if len(re.findall(r"\b[A-Za-z]{3,}\b", line)) > 6]
    assert all(known & set(re.findall(r"\w+", line)) for line in sentences), sentences
    assert all(word in text for word in ("순전파", "역전파", "기울기"))


# ---------------------------------------------------------------------------------------------------------------- page


class Parsed(html.parser.HTMLParser):
    """Whether tags close as they opened, and where they point."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.links, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src", "action", "data", "xlink:href") if found.get(name)]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in ("meta", "link", "img", "br", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "rect"):
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_the_page_needs_nothing_and_its_links_lead_somewhere(small, large, lang):
    for explanation, chains in ((small[0], ["W1[0, 0]"]), (large, [])):
        text = explanation.html(lang, chains=chains)
        parsed = Parsed(text)
        assert not parsed.faults
        assert not parsed.open
        assert not re.search("https?://", text)
        assert "default-src 'none'" in text
        assert f'<html lang="{lang}">' in text
        assert all(link.startswith(("#", "data:")) for link in parsed.links), parsed.links
        assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
        assert len(set(parsed.ids)) == len(parsed.ids)


def test_pointing_at_a_number_has_its_digits_and_its_formula(small):
    text = small[0].html()
    gradient = np.asarray(small[0].gradients[0]["W1"])
    assert f'data-x="{float(gradient[0, 0])!r}"' in text
    assert 'data-name="dkernel" data-formula="dkernel = xᵀ dy"' in text


def test_a_large_array_adds_little_to_a_page():
    values = np.random.default_rng(0).normal(size=(1024, 256))
    one, two = (len(page.page([b.Numbers("x", values)] * count)) for count in (1, 2))
    assert two - one < 2000, "the 400 arrays of a GPT of 4 layers must stay below 2 MiB"


def test_what_comes_from_outside_is_escaped():
    hostile = '<script>alert("x")</script> & $x_1$ \\input{x} % #'
    blocks = [
        b.Heading(hostile), b.Paragraph(f"{hostile} `{hostile}`"), b.Note(hostile), b.Numbers(hostile, 1.0, hostile),
        b.Table((hostile,), ((hostile,), (1.5,)), hostile), b.Details(hostile, (b.Paragraph(hostile),), "a"),
        b.Numbers("large [bold]", np.ones((20, 20))), b.Formula(hostile, "x"),
    ]  # fmt: skip
    text = page.page(blocks)
    assert not Parsed(text).faults
    assert "<script>alert" not in text
    assert r"\input" not in latex.latex(blocks)
    assert "large [bold]" in terminal.text(blocks)


def test_files_are_whole_or_not_there(small, tmp_path):
    explanation = small[0]
    assert explanation.html(file=tmp_path / "a.html") == (tmp_path / "a.html").read_text(encoding="utf-8")
    assert explanation.latex(file=str(tmp_path / "a.tex")) == (tmp_path / "a.tex").read_text(encoding="utf-8")
    assert explanation.graph(tmp_path / "a.svg") == tmp_path / "a.svg"
    with pytest.raises(ValueError, match="no argument is called 'W3'"):
        explanation.html(chains=["W3[0]"], file=tmp_path / "b.html")
    with pytest.raises(ValueError, match=r"b\.pdf: a picture is written as \.svg or \.png"):
        explanation.graph(tmp_path / "b.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.svg", "a.tex"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
    "--window-size=2200,900",
]
PROBE = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const inner = frame.contentDocument, root = inner.documentElement, view = frame.contentWindow;
    inner.getElementById("open-all")?.click();
    const block = inner.querySelector(".numbers .matrix td")?.closest(".numbers"), tip = inner.getElementById("tip");
    block?.focus();
    const focused = [tip.hidden, tip.textContent];
    block?.dispatchEvent(new view.KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
    block?.querySelector("td").dispatchEvent(new view.MouseEvent("mouseover", {bubbles: true}));
    return {width: view.innerWidth, needed: root.scrollWidth, folds: inner.querySelectorAll("details").length,
            open: inner.querySelectorAll("details[open]").length, at: inner.querySelectorAll("td.at").length,
            loaded: view.performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).map((e) => e.name),
            focused, pointed: tip.textContent};
  });
  const shown = document.createElement("pre");
  shown.id = "found"; shown.textContent = JSON.stringify(found); document.body.append(shown);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_page_without_a_fault(small, large, tmp_path):
    pages = [small[0].html("ko", chains=["W1[0, 0]"]), large.html("en", chains=["out[0, 0]"])]
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        for text in pages
        for width in (400, 1600)
    )
    (tmp_path / "all.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{PROBE}</body>", encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", f"file://{tmp_path / 'all.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Refused" in line]
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert [frame["width"] for frame in found] == [400, 1600, 400, 1600]
    for frame in found:
        assert frame["needed"] <= frame["width"], "it scrolls sideways"
        assert frame["open"] == frame["folds"] > 0
        assert frame["loaded"] == []
        assert frame["at"] == 1
        assert frame["focused"][0] is False
    assert found[0]["focused"][1].startswith("x\n")
    assert found[0]["pointed"].startswith("x[0] = 1")


# --------------------------------------------------------------------------------------------------------------- LaTeX

ENGINE = next(filter(None, map(shutil.which, ("xelatex", "pdflatex"))), None)


def has_kotex():
    finder = shutil.which("kpsewhich")
    return finder is not None and subprocess.run([finder, "kotex.sty"], capture_output=True).stdout.strip() != b""


@pytest.mark.skipif(ENGINE is None, reason="needs LaTeX")
@pytest.mark.parametrize("lang", ["en", "ko"])
def test_latex_compiles(small, large, lang, tmp_path):
    if lang == "ko" and not has_kotex():
        pytest.skip("needs kotex")
    every = [formulas.formula(line) for rule in fb.RULES.values() for line in lines_of(rule)]
    hostile = b.Paragraph('a_b^c #1 %2 & {x} \\y ~ <z> | "q" `a/b_c` 50 % → ∂L/∂x · x̂ ‖d‖ ½ σ′(a) ≤ … “quote”')
    blocks = [*explanation_blocks(large, lang), *chain_blocks(small[1], lang), hostile, *every]
    (tmp_path / "a.tex").write_text(latex.latex(blocks, lang), encoding="utf-8")
    command = [ENGINE, "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=90)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "a.log").read_text(errors="replace")
    assert "Missing character" not in log
    assert (tmp_path / "a.pdf").stat().st_size > 10_000


def lines_of(rule):
    found = formulas.formulas(rule)
    return [*found.forward, *found.between, *found.backward.values()]


# --------------------------------------------------------------------------------------------------------------- graph


def deep(params, x):
    for kernel in params:
        x = fb.tanh(fb.dense(x, kernel)) + x
    return fb.half_square(x, jnp.zeros_like(x))


def shapes(file):
    root = xml.etree.ElementTree.parse(file).getroot()
    space = "{http://www.w3.org/2000/svg}"
    boxes = [r for r in root.iter(f"{space}rect") if r.get("rx") == "6"]
    texts = ["".join(t.itertext()) for t in root.iter(f"{space}text")]
    paths = [p for p in root.iter(f"{space}path") if p.find(f"{space}title") is not None]
    return root, [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in boxes], texts, paths


def test_the_graph_has_every_op_and_every_flow_twice(large, tmp_path):
    _, boxes, texts, paths = shapes(large.graph(tmp_path / "a.svg"))
    for step in large.steps:
        assert f"{step.index}. {step.op}" in texts
    assert len(boxes) == len(large.steps) + 1, "each op, and the output"
    assert len(paths) == 2 * 5, "conv, relu, max_pool, dense, loss, L; forward and backward"
    norm = np.linalg.norm(np.asarray(large.steps[4].cotangents["x"]))
    assert f"‖d‖ {digits.number(norm, 2)}" in texts
    assert "1×64 (reshape)" in texts


def test_cards_do_not_overlap_and_stand_inside(tmp_path):
    def attention(params, x):
        q, k, v = (fb.dense(x, params[n])[:, None] for n in "qkv")
        return fb.half_square(fb.dot_product_attention(q, k, v)[:, 0] + x, jnp.zeros_like(x))

    explanation = explain(attention, {n: jnp.eye(4) for n in "qkv"}, jnp.ones((2, 3, 4)))
    root, boxes, _, _ = shapes(explanation.graph(tmp_path / "a.svg"))
    width, height = float(root.get("width")), float(root.get("height"))
    for i, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_repeated_layers_are_folded(tmp_path):
    explanation = explain(deep, [jnp.eye(3)] * 14, jnp.ones((2, 3)))
    _, boxes, texts, _ = shapes(explanation.graph(tmp_path / "a.svg"))
    assert len(explanation.steps) == 29
    assert len(boxes) < 10
    assert any(re.search(r"the same \d+ more times", text) for text in texts)


def test_a_picture_of_the_graph(small, tmp_path):
    for lang in ("en", "ko"):
        file = small[0].graph(tmp_path / f"{lang}.png", lang)
        assert file.read_bytes().startswith(b"\x89PNG")
