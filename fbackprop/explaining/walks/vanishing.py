"""A stack of sigmoids in which each layer multiplies the gradient by exactly w / 4: it vanishes, stays, or explodes."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fbackprop.explaining.record import Explanation
from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.drawing import lines
from fbackprop.explaining.walks.frame import Telling, Walk, local
from fbackprop.ops import dense, sigmoid

WEIGHTS, DEPTH = (1, 4, 8), 20
SHOWN = ((1, 10), (1, 20), (8, 10), (8, 20))  # (w, layers)


def stack(weights: Any, y: Any) -> Any:
    for _ in range(DEPTH):
        y = sigmoid(dense(y, weights["w"].reshape(1, 1), weights["b"]))
    return y[0]


def record_of(w: float) -> Explanation:
    """y ← σ(w y − w / 2) from ½, which stays at ½, where the slope of the sigmoid is ¼."""
    weights = {"w": jnp.asarray(float(w)), "b": jnp.full(1, -w / 2)}
    return explain(stack, weights, jnp.full(1, 0.5))


def gradients(record: Explanation) -> np.ndarray:
    """∂y_n/∂y_k for k = n, n − 1, …, 0: what arrives at each layer, last what arrives at the input."""
    arriving = [step.upstream["y"][0] for step in reversed(record.steps) if step.op == "sigmoid"]
    return np.asarray([*arriving, record.steps[0].cotangents["x"][0]])


def walk(language: str) -> Walk:
    t = Telling("vanishing", language)
    records = {w: record_of(w) for w in WEIGHTS}
    arriving = {w: gradients(record) for w, record in records.items()}
    one = records[1]

    t.section("What it shows", "무엇을 보여 주는가")
    t.text(
        "Seed 003 ends by saying that backpropagation helps to understand vanishing and exploding gradients. Here is the "
        "smallest case in which they can be computed exactly: the chain of a deep network is 웨 액 웨 액 …, a product, and a "
        "product of many numbers below 1 vanishes, of many above 1 explodes.",
        "문서 003은 역전파를 알면 기울기 소실과 폭발도 이해할 수 있다는 말로 끝난다. 여기서는 그것을 정확히 계산할 수 있는 "
        "가장 작은 예를 본다. 깊은 신경망의 연쇄는 웨 액 웨 액 …의 곱이고, 1보다 작은 수를 많이 곱하면 사라지고 1보다 큰 수를 "
        "많이 곱하면 폭발한다.",
    )
    t.formula("yₖ₊₁ = σ(w yₖ − w/2),  y₀ = ½", r"y_{k+1} = \sigma(w y_k - w/2),\quad y_0 = \tfrac12")
    t.section("Forward", "순전파")
    t.text(
        "Every layer stays at ½: the sum is w/2 − w/2 = 0 and σ(0) = ½. So every layer stands where the sigmoid is steepest, "
        "and it cannot go better than this.",
        "모든 층이 ½에 머문다. 합이 w/2 − w/2 = 0이고 σ(0) = ½이기 때문이다. 시그모이드가 가장 가파른 자리이므로 이보다 나을 "
        "수 없다.",
    )
    first = [step.outputs["y"][0] for step in one.steps if step.op == "sigmoid"][:5]
    t.number("forward/y", jnp.stack(first), "y₁ … y₅, w = 1", "y₁ … y₅")
    t.text(
        "The backward pass needs each layer's output, as σ′ = y(1 − y); that is why the forward pass comes first and keeps it.",
        "역전파에는 σ′ = y(1 − y)를 위해 층마다 출력이 필요하다. 그래서 순전파를 먼저 하고 출력을 남겨 둔다.",
    )
    t.section("Loss", "손실")
    t.text(
        "None: we look at how the last output changes with the first input. Any loss would multiply the same factors by its "
        "own.",
        "손실은 두지 않고, 마지막 출력이 첫 입력에 따라 얼마나 변하는지를 본다. 어떤 손실이든 같은 인수들에 자기 인수를 곱할 "
        "뿐이다.",
    )
    t.section("Backward, one layer", "역전파: 한 층")
    t.text(
        "액, the slope of the sigmoid at 0, is ¼, the largest that it can be:",
        "액, 곧 0에서 시그모이드의 기울기는 ¼이며 이것이 최댓값이다.",
    )
    t.number("backward/slope", local(sigmoid, jnp.zeros(())), "σ′(0) = ½ (1 − ½)", "σ′(0)")
    t.text(
        "웨 is w. So one layer multiplies what arrives by w/4, exactly:",
        "웨는 w이다. 따라서 한 층은 도착한 값에 정확히 w/4를 곱한다.",
    )
    rows = []
    words = t.say("vanishes|stays|explodes", "사라진다|그대로이다|폭발한다").split("|")
    for w, word in zip(WEIGHTS, words):
        factors = arriving[w][1:] / arriving[w][:-1]
        t.number(
            f"backward/factor/w={w}", factors[0], f"{w} · ¼", t.say(f"factor of a layer, w = {w}", f"한 층의 인수, w = {w}")
        )
        rows.append((w, float(factors.min()), float(factors.max()), word))
    columns = t.say("w|smallest factor|largest factor|the gradient", "w|가장 작은 인수|가장 큰 인수|기울기는").split("|")
    t.table(columns, rows, t.say(f"Factors of all {DEPTH} layers.", f"{DEPTH}개 층 모두의 인수."))
    t.section("Backward, the whole stack", "역전파: 전체")
    t.formula("∂yₙ/∂y₀ = (w/4)ⁿ", r"\frac{\partial y_n}{\partial y_0} = \left(\frac{w}{4}\right)^n")
    t.text(
        "What arrives at a layer n layers before the output is the derivative through these n layers:",
        "출력에서 n층 앞에 도착한 값이 그 n개 층을 지나는 미분이다.",
    )
    for w, n in SHOWN:
        t.number(f"values/w={w},n={n}", arriving[w][n], f"({w}/4)^{n}", t.say(f"{n} layers, w = {w}", f"{n}개 층, w = {w}"))
    t.text(
        "Exact to the last bit, since a quarter is a power of two. With w = 4 the product stays 1: the weights would have to "
        "be just so. That is what good initialisation, relu (slope 1 where it is alive), normalization and residual "
        "connections are for.",
        "¼이 2의 거듭제곱이라 마지막 비트까지 정확하다. w = 4이면 곱이 1로 유지되는데, 가중치가 꼭 그만큼이어야 한다. 좋은 "
        "초기화, relu(살아 있으면 기울기 1), 정규화, 잔차 연결이 필요한 까닭이 이것이다.",
    )
    curves = {f"w = {w}": arriving[w] for w in reversed(WEIGHTS)}
    words = t.say(
        "The gradient over the layers it has passed, on a logarithmic scale: straight lines, up for w = 8, level for w = 4, "
        "down for w = 1.",
        "지나온 층의 수에 따른 기울기 (로그 눈금). w = 8은 위로, w = 4는 수평으로, w = 1은 아래로 곧게 뻗는다.",
    )
    across = t.say("layers passed, from the output back", "출력에서 거슬러 지나온 층의 수")
    t.picture(lines(curves, across, "|∂yₙ/∂yₖ|", logarithmic=True), words)
    for w, found in arriving.items():
        t.keep(f"by_layer/w={w}", found)
    t.section("Update", "업데이트")
    t.text(
        "A step is the gradient times the rate. At the first layer of 20 with w = 1 it is a millionth of a millionth of what "
        "it is at the last: that layer does not learn. With w = 8 it is a million times as large: no single rate suits both "
        "ends.",
        "업데이트는 기울기에 학습률을 곱한 것이다. w = 1이고 층이 20개이면 첫 층의 업데이트는 마지막 층의 1조분의 1쯤이라 "
        "배우지 못한다. w = 8이면 백만 배쯤이 된다. 어떤 학습률 하나로도 양 끝을 다 맞출 수 없다.",
    )
    t.agreement(one)
    return t.finished(t.say("Vanishing and exploding gradients", "기울기 소실과 폭발"))
