"""The formulas of an op in a line or two, in the names of its arguments, as Unicode and as LaTeX.

The derivations stand in the docstrings of the ops' modules, each in the letters that suit it. Beside numbers a reader wants the
one line that made them: the ops that models are built of have it here, op by op; for the others it is taken from the docstring.
LaTeX is made from the Unicode, so a formula is written once.
"""

import dataclasses
import re
import unicodedata

from fbackprop.explaining.blocks import Formula
from fbackprop.rules import Rule

__all__ = ["OpFormulas", "formula", "formulas", "is_math", "latex"]


@dataclasses.dataclass(frozen=True)
class OpFormulas:
    """``forward``: lines for the output. ``backward``: a line for each argument that has a cotangent, by its name; ``between``:
    what these lines speak of."""

    forward: tuple[str, ...]
    backward: dict[str, str]
    between: tuple[str, ...] = ()


# op: the forward; then what stands between; then the cotangents.
_TABLE = """
dense | y = x kernel + bias | | dx = dy kernelᵀ | dkernel = xᵀ dy | dbias = Σ dy
conv | y[o, f] = Σ_k Σ_c x[o + k, c] kernel[k, c, f] + bias[f] | | dx[i, c] = Σ_k Σ_f dy[i − k, f] kernel[k, c, f] | \
dkernel[k, c, f] = Σ_o x[o + k, c] dy[o, f] | dbias[f] = Σ_o dy[o, f]
embed | y[n] = embedding[indices[n]] | | dembedding[v] = Σ dy[n] over n with indices[n] = v
relu | y = max(x, 0) | | dx = dy [x > 0]
relu6 | y = min(max(x, 0), 6) | | dx = dy [0 < x < 6]
leaky_relu | y = max(x, 0) + negative_slope min(x, 0) | | dx = dy (1 where x ≥ 0, else negative_slope) | \
dnegative_slope = Σ dy min(x, 0)
sigmoid | y = 1 / (1 + exp(−x)) | | dx = dy y (1 − y)
tanh | y = tanh(x) | | dx = dy (1 − y²)
silu | y = x σ(x) | σ = σ(x) | dx = dy (σ + x σ (1 − σ))
gelu | y = x Φ(x) | | dx = dy (Φ(x) + x Φ′(x))
soft_sign | y = x / (1 + |x|) | | dx = dy / (1 + |x|)²
mish | y = x t | t = tanh(softplus(x)) | dx = dy (t + x (1 − t²) σ(x))
celu | y = x where x > 0, else alpha (exp(x / alpha) − 1) | | dx = dy where x > 0, else dy exp(x / alpha) | \
dalpha = Σ dy (exp(x / alpha) (1 − x / alpha) − 1) where x ≤ 0
selu | y = λ x where x > 0, else λ α (exp(x) − 1) | | dx = λ dy where x > 0, else λ α dy exp(x)
squareplus | y = (x + √(x² + b)) / 2 | | dx = dy (1 + x / √(x² + b)) / 2 | db = Σ dy / (4 √(x² + b))
hard_silu | y = x min(max(x + 3, 0), 6) / 6 | | dx = dy where x ≥ 3, dy (2 x + 3) / 6 where −3 < x < 3, else 0
relu_squared | y = max(x, 0)² | | dx = 2 dy max(x, 0)
hard_tanh | y = min(max(x, −1), 1) | | dx = dy [−1 < x < 1]
hard_sigmoid | y = min(max(x + 3, 0), 6) / 6 | | dx = dy / 6 where −3 < x < 3, else 0
softplus | y = log(1 + exp(x)) | | dx = dy σ(x)
log_sigmoid | y = −log(1 + exp(−x)) | | dx = dy (1 − σ(x))
elu | y = x where x > 0, else alpha (exp(x) − 1) | | dx = dy where x > 0, else dy (y + alpha) | \
dalpha = Σ dy (exp(x) − 1) where x ≤ 0
step_ste | y = 1 where x > 0, else 0 | | dx = dy
sign_ste | y = sign(x) | | dx = dy
softmax | y = exp(x) / Σ exp(x) | | dx = y (dy − Σ dy y)
log_softmax | y = x − log Σ exp(x) | | dx = dy − exp(y) Σ dy
logsumexp | y = log Σ b exp(a) | p = b exp(a − y) | da = dy p | db = dy exp(a − y)
softmax_cross_entropy_with_integer_labels | y = log Σ exp(logits) − logits[labels] | p = softmax(logits) | \
dlogits = dy (p − onehot(labels))
softmax_cross_entropy | y = Σ labels (log Σ exp(logits) − logits) | p = softmax(logits) | dlogits = dy (p Σ labels − labels) | \
dlabels = dy (log Σ exp(logits) − logits)
sigmoid_binary_cross_entropy | y = log(1 + exp(logits)) − labels logits | | dlogits = dy (σ(logits) − labels) | \
dlabels = −dy logits
linear_cross_entropy | y = mean(log Σ exp(z) − z[labels]) | z = x kernel + bias, p = softmax(z), \
dz = dy (p − onehot(labels)) / n | dx = dz kernelᵀ | dkernel = xᵀ dz | dbias = Σ dz
sum_of_squares | y = Σ (predictions − targets)² | | dpredictions = 2 dy (predictions − targets) | \
dtargets = −2 dy (predictions − targets)
half_square | y = ½ Σ (predictions − targets)² | | dpredictions = dy (predictions − targets) | \
dtargets = −dy (predictions − targets)
mean_squared_error | y = (1 / n) Σ (predictions − targets)² | | dpredictions = (2 / n) dy (predictions − targets) | \
dtargets = −(2 / n) dy (predictions − targets)
max_pool | y[o] = max_k inputs[o s + k] | | dinputs[p] = Σ_o dy[o] [p is the first largest of window o]
min_pool | y[o] = min_k inputs[o s + k] | | dinputs[p] = Σ_o dy[o] [p is the first smallest of window o]
avg_pool | y[o] = (1 / n) Σ_k inputs[o s + k] | | dinputs[p] = (1 / n) Σ_o dy[o] [p in window o]
sum_pool | y[o] = Σ_k inputs[o s + k] | | dinputs[p] = Σ_o dy[o] [p in window o]
global_avg_pool | y = mean(inputs) | | dinputs = dy / n
global_max_pool | y = max(inputs) | | dinputs[p] = dy [p is the first largest]
layer_norm | y = scale x̂ + bias | x̂ = (x − μ) / √(σ² + ε), g = scale dy | \
dx = (g − mean(g) − x̂ mean(g x̂)) / √(σ² + ε) | dscale = Σ dy x̂ | dbias = Σ dy
rms_norm | y = scale x̂ | x̂ = x / √(mean(x²) + ε), g = scale dy | dx = (g − x̂ mean(g x̂)) / √(mean(x²) + ε) | dscale = Σ dy x̂
batch_norm | y = scale x̂ + bias | x̂ = (x − μ) / √(σ² + ε), g = scale dy | \
dx = (g − mean(g) − x̂ mean(g x̂)) / √(σ² + ε) | dscale = Σ dy x̂ | dbias = Σ dy
group_norm | y = scale x̂ + bias | x̂ = (x − μ) / √(σ² + ε), g = scale dy | \
dx = (g − mean(g) − x̂ mean(g x̂)) / √(σ² + ε) | dscale = Σ dy x̂ | dbias = Σ dy
dropout | y = x m / (1 − rate) | m = 1 where kept, else 0 | dx = dy m / (1 − rate)
dot_product_attention | y = p value | p = softmax(s query keyᵀ + bias), dp = dy valueᵀ, dz = p (dp − Σ p dp) | \
dquery = s dz key | dkey = s dzᵀ query | dvalue = pᵀ dy | dbias = dz
norm_dense | y = n kernel + bias | x̂ = (x − μ) / √(σ² + ε), n = scale x̂ + norm_bias, dn = dy kernelᵀ, g = scale dn | \
dx = (g − mean(g) − x̂ mean(g x̂)) / √(σ² + ε) | dkernel = nᵀ dy | dbias = Σ dy | dscale = Σ dn x̂ | dnorm_bias = Σ dn
residual_norm | s = x + residual, y = scale ŝ + bias | ŝ = (s − μ) / √(σ² + ε), g = scale dy | \
dx = ds + (g − mean(g) − ŝ mean(g ŝ)) / √(σ² + ε) | dresidual = dx | dscale = Σ dy ŝ | dbias = Σ dy
gelu_mlp | y = a down + down_bias | h = x up + up_bias, a = gelu(h), dh = (dy downᵀ) gelu′(h) | \
dx = dh upᵀ | dup = xᵀ dh | ddown = aᵀ dy | dup_bias = Σ dh | ddown_bias = Σ dy
swiglu_mlp | y = a down | h = x gate, u = x up, a = silu(h) u, da = dy downᵀ, dh = da u silu′(h), du = da silu(h) | \
dx = dh gateᵀ + du upᵀ | dgate = xᵀ dh | dup = xᵀ du | ddown = aᵀ dy
geglu_mlp | y = a down | h = x gate, u = x up, a = gelu(h) u, da = dy downᵀ, dh = da u gelu′(h), du = da gelu(h) | \
dx = dh gateᵀ + du upᵀ | dgate = xᵀ dh | dup = xᵀ du | ddown = aᵀ dy
rotary_embedding | y = R(θ) x | θ from the positions | dx = R(−θ) dy
rnn | hₜ = φ(xₜ kernel + hₜ₋₁ recurrent_kernel + bias) | daₜ = dhₜ φ′, dhₜ₋₁ = daₜ recurrent_kernelᵀ + dyₜ₋₁ | \
dx = da kernelᵀ | dkernel = xᵀ da | drecurrent_kernel = Σ hₜ₋₁ᵀ daₜ | dbias = Σ da | dcarry = dh₀
lstm | i, f, o = σ(xₜ kernel + hₜ₋₁ recurrent_kernel + bias), g = tanh(…), cₜ = f cₜ₋₁ + i g, hₜ = o tanh(cₜ) | \
dcₜ = dcₜ₊₁ f + dhₜ o (1 − tanh²(cₜ)), da = (dc g i (1 − i), dc cₜ₋₁ f (1 − f), dc i (1 − g²), dh tanh(c) o (1 − o)) | \
dx = da kernelᵀ | dkernel = xᵀ da | drecurrent_kernel = Σ hₜ₋₁ᵀ daₜ | dbias = Σ da | dcarry = dh₀, dc₀
gru | r, z = σ(xₜ kernel + hₜ₋₁ recurrent_kernel + bias), n = tanh(… + r v), hₜ = (1 − z) n + z hₜ₋₁ | \
dn′ = dhₜ (1 − z) (1 − n²), da = (dn′ v r (1 − r), dh (hₜ₋₁ − n) z (1 − z), dn′) | \
dx = da kernelᵀ | dkernel = xᵀ da | drecurrent_kernel = Σ hₜ₋₁ᵀ duₜ | dbias = Σ da | drecurrent_bias = Σ dv | dcarry = dh₀
"""


def _read(text: str) -> dict[str, OpFormulas]:
    found = {}
    for line in text.strip().splitlines():
        name, forward, between, *backward = (part.strip() for part in re.split(r"\s\|(?=\s)", line))
        lines = {part.split("[")[0].split(" = ")[0].removeprefix("d"): part for part in backward}
        found[name] = OpFormulas((forward,), lines, (between,) if between else ())
    return found


TABLE = _read(_TABLE)


def formulas(rule: Rule) -> OpFormulas:
    """The formulas of an op: of the table, or else the lines of its module's docstring that speak of it."""
    if rule.name in TABLE:
        return TABLE[rule.name]
    lines = [line.strip() for line in rule.formula.splitlines() if line.startswith("    ")]
    own = [line[len(rule.name) :].strip() for line in lines if re.match(rf"{rule.name}\b", line)] or lines
    pieces = [part.strip() for line in own for part in re.split(r"\s{3,}", line) if "=" in part]
    backward = {n: p for n in rule.arguments for p in pieces if re.match(rf"d{n}\b", p)}
    forward = tuple(p for p in pieces if re.match(r"(y|L|h_t)\b", p))[:1]
    between = tuple(p for p in pieces if p not in forward and p not in backward.values())[:6]
    return OpFormulas(forward or between[:1], backward, between if forward else between[1:])


# Unicode to LaTeX.

_SYMBOLS = {
    "−": "-", "Σ": r"\sum ", "·": r"\cdot ", "σ": r"\sigma ", "μ": r"\mu ", "γ": r"\gamma ", "β": r"\beta ", "α": r"\alpha ",
    "ε": r"\varepsilon ", "φ": r"\varphi ", "θ": r"\theta ", "δ": r"\delta ", "λ": r"\lambda ", "ρ": r"\rho ", "τ": r"\tau ",
    "ζ": r"\zeta ", "η": r"\eta ", "π": r"\pi ", "Φ": r"\Phi ", "Ω": r"\Omega ", "Π": r"\prod ", "Δ": r"\Delta ",
    "ℓ": r"\ell ", "∂": r"\partial ", "×": r"\times ", "±": r"\pm ", "∓": r"\mp ", "½": r"\tfrac12 ", "¼": r"\tfrac14 ",
    "∞": r"\infty ", "≥": r"\ge ", "≤": r"\le ", "≠": r"\ne ", "≈": r"\approx ", "∝": r"\propto ", "∈": r"\in ", "…": r"\dots ",
    "←": r"\leftarrow ", "→": r"\to ", "↦": r"\mapsto ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "‖": r"\Vert ", "|": r"\vert ", "∘": r"\circ ", "⊙": r"\odot ", "∇": r"\nabla ", "′": "'", "{": r"\{", "}": r"\}", 
    "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "~": r"\sim ", "\\": r"\backslash ", "`": "", "¹": "^1",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⊕": r"\oplus ", "⊗": r"\otimes ", "∧": r"\wedge ", "∨": r"\vee ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "∀": r"\forall ", "∃": r"\exists ", "∉": r"\notin ", "⊂": r"\subset ", "∫": r"\int ",
    "⋯": r"\cdots ", "⋮": r"\vdots ", "⇒": r"\Rightarrow ", "⇔": r"\Leftrightarrow ", "≡": r"\equiv ", "≪": r"\ll ",
    "≫": r"\gg ", "∼": r"\sim ", "⊤": r"\top ", "⊥": r"\bot ", "†": r"\dagger ",
    "Γ": r"\Gamma ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Ψ": r"\Psi ", "Ξ": r"\Xi ", "κ": r"\kappa ", "ν": r"\nu ",
    "ξ": r"\xi ", "χ": r"\chi ", "ψ": r"\psi ", "ω": r"\omega ", "ι": r"\iota ", "υ": r"\upsilon ", "ϕ": r"\phi ",
    "ϵ": r"\epsilon ", "⅓": r"\tfrac13 ", "¾": r"\tfrac34 ", "∑": r"\sum ", "∏": r"\prod ", "✓": r"\checkmark ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀˣᵃᵘᵖᵇᵏⁿᵗᐟ", [*"0123456789+-", r"\top", *"xaupbknt", "/"]))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₜᵢⱼₖₙ", [*"0123456789+-", *"tijkn"]))
_FUNCTIONS = {"exp", "log", "tanh", "sinh", "cosh", "sin", "cos", "max", "min", "ln", "arg"}
_OPERATORS = re.compile("softmax|onehot|mean|sign|silu|gelu|lse|relu|softplus|argmax|var")
_WORDS = re.compile("where|else|over|with|for|and|the|is|in|of|from|first|largest|smallest|window|kept|positions|each|if|by|to")

_TOKENS = re.compile(
    r"(?P<hat>.)\u0302|(?P<text>[가-힣]+)|(?P<space>\s+)|(?P<word>[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*)|"
    rf"(?P<raised>[{''.join(_RAISED)}]+)|(?P<lowered>[{''.join(_LOWERED)}]+)|"
    r"_(?P<under>\{[^{}]*\}|[A-Za-z0-9]+)|(?P<root>√)|(?P<power>\^)|(?P<char>.)"
)


def latex(text: str) -> str:
    """A formula in LaTeX (math mode, without dollars), from Unicode."""
    text = "".join(unicodedata.normalize("NFD", c) if c in "ŝŷêâĥẑ" else c for c in text)
    parts: list[str] = []
    closing: list[int] = []  # how deep the brackets of open roots are
    depth = 0
    tokens = list(_TOKENS.finditer(text))
    for i, token in enumerate(tokens):
        kind, value = token.lastgroup, token.group(token.lastgroup or 0)
        if kind == "hat":
            parts.append(
                rf"\hat{{{_word(value) if value.isalpha() and value.isascii() else _SYMBOLS.get(value, value).strip()}}}"
            )
        elif kind == "text":
            parts.append(rf"\text{{{value}}}")
        elif kind == "word":
            parts.append(_word(value))
        elif kind == "raised":
            parts.append("^{" + "".join(_RAISED[c] for c in value) + "}")
        elif kind == "lowered":
            parts.append("_{" + "".join(_LOWERED[c] for c in value) + "}")
        elif kind == "under":
            parts.append(f"_{{{latex(value.strip('{}'))}}}")
        elif kind == "space":
            parts.append(r"\quad " if len(value) > 2 else r"\, " if _beside(tokens, i) else " ")
        elif kind == "root":
            if text[token.end() : token.end() + 1] == "(":
                closing.append(depth)
                parts.append(r"\sqrt{")
            else:
                parts.append(r"\surd ")
        elif kind == "power":
            parts.append(r"\hat{\ }" if not text[token.end() :].strip() else "^")
        elif value in "([" or value in ")]":
            depth += value in "(["
            root = value == "(" and closing and closing[-1] == depth - 1 and parts[-1] == r"\sqrt{"
            depth -= value in ")]"
            if value in ")]" and closing and closing[-1] == depth:
                closing.pop()
                parts.append("}")
            elif not root:
                parts.append(value)
        else:
            parts.append(_symbol(value))
    return "".join([*parts, "}" * len(closing)]).strip()


def _beside(tokens: list[re.Match[str]], i: int) -> bool:
    """Whether a space stands between two factors, which LaTeX would set without one."""
    if i == 0 or i + 1 == len(tokens):
        return False
    before, after = tokens[i - 1].group(), tokens[i + 1].group()
    return bool(re.fullmatch(r"[\w)\]′'½]|.*[\wᵀ²₀-₉]", before)) and bool(re.match(r"[\w([√½]", after))


def _word(word: str) -> str:
    if len(word) == 1:
        return word if word.isascii() else _symbol(word)
    if match := re.fullmatch(r"(d?)([A-Za-z])(?:_?(\d+)|_hat)", word):  # W1, dW1, y_hat
        letter = f"{match[2]}_{{{match[3]}}}" if match[3] else rf"\hat{{{match[2]}}}"
        return (r"\mathrm{d}" if match[1] else "") + letter
    base, _, under = word.partition("_")
    if under and (len(base) == 1 or base in _FUNCTIONS):
        return f"{_word(base).strip()}_{{{_word(under)}}}"
    escaped = word.replace("_", r"\_")
    if word in _FUNCTIONS:
        return f"\\{word} "
    if _OPERATORS.fullmatch(word):
        return rf"\operatorname{{{escaped}}}"
    if _WORDS.fullmatch(word):
        return rf"\ \text{{{escaped}}}\ "
    if word[0] == "d" and len(word) > 2:
        return rf"\mathrm{{d}}\mathit{{{escaped[1:]}}}"
    if word[0] == "d":
        return rf"\mathrm{{d}}{word[1]}"
    return rf"\mathit{{{escaped}}}"


def _symbol(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char.isascii():
        return char
    plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    return rf"\text{{{plain or '?'}}}"


def formula(text: str) -> Formula:
    """A block of one formula."""
    return Formula(text, latex(text))


def is_math(text: str) -> bool:
    """Whether it is a formula rather than words."""
    return "=" in text or "∂" in text
