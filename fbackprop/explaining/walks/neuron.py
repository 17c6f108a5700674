"""Seed 001: one neuron with one weight; the chain rule with three factors."""

from typing import Any

from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.chained import chain_of
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend, local
from fbackprop.ops import dense, half_square, sigmoid

SYSTEM = {"x": 1.0, "w": 0.5, "b": 0.25, "t": 0.0}
RATE = 0.5


def network(weights: Any, x: Any, t: Any) -> Any:
    a = dense(x.reshape(1), weights["w"].reshape(1, 1), weights["b"].reshape(1))
    return half_square(sigmoid(a), t.reshape(1))


def walk(language: str) -> Walk:
    t = Telling("neuron", language)
    given = arrays(SYSTEM)
    weights, x, target = {"w": given["w"], "b": given["b"]}, given["x"], given["t"]
    record = explain(network, weights, x, target)
    sum_, activation, loss = record.steps
    a, y = sum_.outputs["y"][0], activation.outputs["y"][0]
    gradient, dx = record.gradients[0], record.gradients[1]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "A network is a composition of simple functions, and the derivative of a composition is the product of the derivatives "
        "of its parts. So no one differentiates the whole: each part is differentiated by itself, from the back, and the "
        "results are multiplied. The smallest case has one weight, one bias, one input.",
        "신경망은 간단한 함수들의 합성이고, 합성함수의 미분은 각 부분의 미분을 곱한 것이다. 그래서 전체를 한꺼번에 미분하지 "
        "않고, 뒤에서부터 부분마다 따로 미분해 곱한다. 가장 작은 예는 가중치, 편향, 입력이 하나씩인 신경망이다.",
    )
    t.formula("{f(g(x))}′ = f′(g(x)) · g′(x)", r"\{f(g(x))\}' = f'(g(x)) \cdot g'(x)")
    t.note(
        "The document's equation (3) prints f′(g(x)) · f(g′(x)). The second factor is the derivative of the inner function, "
        "g′(x); its equations (1) and (2), and all that follows, have it right.",
        "문서의 식 (3)은 f′(g(x)) · f(g′(x))로 적혀 있다. 두 번째 인수는 안쪽 함수의 도함수 g′(x)이다. 식 (1), (2)와 그 뒤의 "
        "계산은 맞다.",
    )
    t.section("Forward", "순전파")
    t.formula("a = x w + b,  y = σ(a)", r"a = xw + b,\quad y = \sigma(a)")
    t.text(
        "The document has symbols only; the numbers are an instance of ours.", "문서에는 기호만 있으므로 숫자는 여기서 정했다."
    )
    t.given(given)
    t.number("a", a, "a = x w + b")
    t.number("y", y, "y = σ(a) = 1 / (1 + exp(−a))")
    t.text(
        "The forward pass comes first, because the factors below are made of its values: the output y (for σ′) and the input "
        "x.",
        "순전파가 먼저인 까닭은 아래의 인수들이 순전파에서 나온 값, 곧 출력 y(σ′를 위해)와 입력 x로 이루어지기 때문이다.",
    )
    t.kept(record)
    t.section("Loss", "손실")
    t.formula("E = ½ (y − t)²", r"E = \tfrac12 (y - t)^2")
    t.number("error", loss.outputs["y"], "E = ½ (y − t)²")
    t.text(
        "The half is there so that the derivative is the error itself, y − t. (The document calls it the mean squared error; "
        "with one output it is half of that.)",
        "½은 미분했을 때 오차 y − t만 남게 하려고 붙인다. (문서는 평균 제곱 오차라고 부르지만, 출력이 하나이면 그 절반이다.)",
    )
    t.section("Backward, factor by factor", "역전파: 인수를 하나씩")
    t.text("How the loss changes with the output: by the error.", "출력이 바뀔 때 손실이 바뀌는 정도: 오차만큼.")
    t.number("dE_dy", activation.upstream["y"][0], "∂E/∂y = y − t")
    t.text(
        "How the output changes with the sum: by the slope of the sigmoid, which is y(1 − y). It is at most ¼, where y is ½, "
        "and nearly 0 where the sigmoid is flat.",
        "합 a가 바뀔 때 출력이 바뀌는 정도: 시그모이드의 기울기 y(1 − y). y = ½일 때 ¼로 가장 크고, 시그모이드가 평평한 "
        "곳에서는 거의 0이다.",
    )
    t.number("dy_da", local(sigmoid, sum_.outputs["y"])[0], "∂y/∂a = σ′(a) = y (1 − y)")
    t.text(
        "How the sum changes with the weight: by x, what the weight is multiplied by. With the bias: by 1, so the gradient of "
        "the bias is what arrives at the sum.",
        "가중치가 바뀔 때 합이 바뀌는 정도: 가중치에 곱해지는 x만큼. 편향이 바뀔 때는 1만큼이므로, 합에 도착한 값이 그대로 "
        "편향의 기울기가 된다.",
    )
    t.number("G_w", gradient["w"], "G_w = (y − t) · σ′(a) · x")
    t.number("G_b", gradient["b"], "G_b = (y − t) · σ′(a) · 1")
    t.text(
        "And with the input: by w. Nobody changes the input, but in a deeper network it is the output of the layer before, and "
        "∂E/∂x is what that layer's backward pass begins with.",
        "입력이 바뀔 때는 w만큼이다. 입력을 고치지는 않지만, 더 깊은 신경망에서는 입력이 앞 층의 출력이므로 ∂E/∂x가 앞 층 "
        "역전파의 출발점이 된다.",
    )
    t.number("dE_dx", dx, "∂E/∂x = (y − t) · σ′(a) · w")
    chain_of(t, record, "w", ("a", "y", "E"))
    t.agreement(record)
    t.section("Update", "업데이트")
    t.formula(
        "w := w − α ∂E/∂w,  b := b − α ∂E/∂b",
        r"w := w - \alpha \frac{\partial E}{\partial w},\quad b := b - \alpha \frac{\partial E}{\partial b}",
    )
    t.text(
        f"The document leaves α open; with α = {RATE}:",
        f"문서는 α를 정하지 않았다. α = {RATE}이면 다음과 같다.",
    )
    t.keep("learning_rate", RATE)
    updated = descend(weights, gradient, RATE)
    t.number("updated/w", updated["w"], "w − α G_w")
    t.number("updated/b", updated["b"], "b − α G_b")
    t.number(
        "after_update/error", network(updated, x, target), t.say("E with the new w and b: smaller", "새 w와 b의 E: 더 작다")
    )
    return t.finished(t.say("One neuron (seed 001)", "뉴런 하나 (문서 001)"))
