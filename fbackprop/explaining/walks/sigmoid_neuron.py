"""Seed 003: one sigmoid neuron with two inputs, one example, and two learning rates."""

from typing import Any

from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.chained import chain_of
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend, local
from fbackprop.ops import dense, half_square, sigmoid

SYSTEM = {"x": [0.1, 0.3], "W": [0.5, 0.2], "b": 1.83, "target": 0.03}
RATES = ("0.01", "0.5")
PRINTED = 0.8743  # the prediction in the document


def predict(weights: Any, x: Any) -> Any:
    return sigmoid(dense(x, weights["W"][:, None], weights["b"].reshape(1)))


def network(weights: Any, x: Any, target: Any) -> Any:
    return half_square(predict(weights, x), target.reshape(1))


def walk(language: str) -> Walk:
    t = Telling("sigmoid-neuron", language)
    given = arrays(SYSTEM)
    weights, x, target = {"W": given["W"], "b": given["b"]}, given["x"], given["target"]
    record = explain(network, weights, x, target)
    sum_, activation, loss = record.steps
    prediction, gradient = activation.outputs["y"][0], record.gradients[0]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "Backpropagation by hand: a forward pass, an error, a partial derivative for each weight, a new forward pass with a "
        "smaller error. A partial derivative tells how the error changes when one weight is changed and all others stay.",
        "역전파를 손으로 해 본다. 순전파를 하고, 오차를 구하고, 가중치마다 편미분을 구해 고친 다음, 다시 순전파를 하면 오차가 "
        "줄어 있다. 편미분은 나머지는 그대로 두고 가중치 하나만 바꿀 때 오차가 어떻게 바뀌는지를 말해 준다.",
    )
    t.section("Forward", "순전파")
    t.formula("S = X₁ W₁ + X₂ W₂ + b,  p = σ(S)", r"S = X_1 W_1 + X_2 W_2 + b,\quad p = \sigma(S)")
    t.given(given)
    t.number("S", sum_.outputs["y"][0], "S = X₁ W₁ + X₂ W₂ + b")
    t.number("prediction", prediction, "p = σ(S) = 1 / (1 + exp(−S))")
    t.note(
        f"The document prints {PRINTED}: the digits are cut off. Rounded to four it is {round(float(prediction), 4)}.",
        f"문서에는 {PRINTED}이라고 되어 있는데, 뒷자리를 잘라 버린 값이다. 넷째 자리로 반올림하면 "
        f"{round(float(prediction), 4)}이다.",
    )
    t.kept(record)
    t.text(
        "These are the values that the backward pass is made of; that is why the forward pass is run first.",
        "역전파는 이 값들로 이루어진다. 그래서 순전파를 먼저 한다.",
    )
    t.section("Loss", "손실")
    t.formula("E = ½ (p − target)²", r"E = \tfrac12 (p - \text{target})^2")
    t.number("error", loss.outputs["y"], "E = ½ (p − target)²")
    t.section("Backward, factor by factor", "역전파: 인수를 하나씩")
    t.text(
        "There is no equation between E and a weight directly, so the chain rule goes by way of p and S.",
        "E와 가중치를 바로 잇는 식이 없으므로 연쇄 법칙으로 p와 S를 거쳐 간다.",
    )
    t.formula(
        "∂E/∂W₁ = ∂E/∂p · ∂p/∂S · ∂S/∂W₁",
        r"\frac{\partial E}{\partial W_1} = \frac{\partial E}{\partial p}"
        r"\cdot\frac{\partial p}{\partial S}\cdot\frac{\partial S}{\partial W_1}",
    )
    t.number("dE_dp", activation.upstream["y"][0], "∂E/∂p = p − target")
    t.text(
        "The sigmoid stands far to the right, where it is flat: its slope is less than half of the largest possible, ¼.",
        "시그모이드의 오른쪽 평평한 곳이라서 기울기가 최댓값 ¼의 절반도 되지 않는다.",
    )
    t.number("dp_dS", local(sigmoid, sum_.outputs["y"])[0], "∂p/∂S = p (1 − p)")
    t.text(
        "The last factor is the input of that weight: X₁ for W₁, X₂ for W₂. So W₂, whose input is three times as large, gets "
        "three times the gradient.",
        "마지막 인수는 그 가중치의 입력, 곧 W₁은 X₁, W₂는 X₂이다. 입력이 세 배인 W₂의 기울기가 세 배가 된다.",
    )
    t.number("gradients/W", gradient["W"], "dW = (p − target) · p (1 − p) · X", "dW")
    t.number("gradients/b", gradient["b"], "db = (p − target) · p (1 − p) · 1", "db")
    t.number("gradients/x", record.gradients[1], "dx = (p − target) · p (1 − p) · W", "dx")
    t.note(
        "The document says that the bias has no derivative, being constant, and is updated by the learning rate alone. It has "
        "one: the bias is a parameter, S changes by 1 when b changes by 1, so ∂S/∂b = 1 and ∂E/∂b = ∂E/∂p · ∂p/∂S. It is the "
        "largest gradient of all here.",
        "문서는 편향이 상수라 미분이 0이고 학습률만으로 업데이트한다고 말한다. 그렇지 않다. 편향도 파라미터이고 b가 1 커지면 "
        "S도 1 커지므로 ∂S/∂b = 1이며 ∂E/∂b = ∂E/∂p · ∂p/∂S이다. 이 예에서는 오히려 가장 큰 기울기이다.",
    )
    t.text(
        "All are positive: a larger weight means a larger error, so the step makes the weights smaller.",
        "모두 양수이다. 가중치를 키우면 오차가 커지므로, 업데이트는 가중치를 줄이는 쪽으로 간다.",
    )
    chain_of(t, record, "W[0]", ("S", "p", "E"))
    t.agreement(record)

    t.section("Update", "업데이트")
    t.text(
        "The same gradient with two learning rates. With 0.01 the error falls a little, with 0.5 fifty times as far per step. "
        "A rate that is too large would jump over the minimum: the gradient is true only near where it was computed.",
        "같은 기울기에 학습률 두 가지를 써 본다. 0.01이면 오차가 조금 줄고, 0.5이면 한 번에 거의 쉰 배쯤 더 줄어든다. 너무 "
        "크면 최솟값을 지나쳐 버린다. 기울기는 그것을 계산한 점 가까이에서만 맞기 때문이다.",
    )
    for rate in RATES:
        new = descend(weights, gradient, float(rate))
        p = predict(new, x)[0]
        t.number(f"updated/{rate}/W", new["W"], f"W − {rate} dW", f"W ({rate})")
        t.number(f"updated/{rate}/b", new["b"], f"b − {rate} db", f"b ({rate})")
        t.number(f"updated/{rate}/prediction", p, t.say("σ(S) with the new W and b", "새 W와 b의 σ(S)"), f"p ({rate})")
        t.number(f"updated/{rate}/error", network(new, x, target), "½ (p − target)²", f"E ({rate})")
    t.note(
        "The document says that backpropagation needs a convex error function. It does not: the chain rule holds for any that "
        "is differentiable. The error of this very neuron is not convex in its weights. Where it is not, gradient descent "
        "finds a local minimum or a saddle, which for networks is the usual case.",
        "문서는 역전파를 하려면 오차 함수가 볼록해야 한다고 말한다. 그럴 필요는 없다. 연쇄 법칙은 미분할 수 있으면 성립한다. "
        "이 뉴런의 오차부터가 가중치에 대해 볼록하지 않다. 볼록하지 않으면 경사 하강법이 국소 최솟값이나 안장점에 이를 수 "
        "있고, 신경망에서는 그것이 보통이다.",
    )
    return t.finished(t.say("A sigmoid neuron, by hand (seed 003)", "손으로 하는 시그모이드 뉴런 (문서 003)"))
