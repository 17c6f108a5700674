"""Seed 001: the gate AND, decided by a step and learned by a sigmoid."""

from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.context import without_rules
from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.drawing import lines
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend, local
from fbackprop.ops import dense, half_square, sigmoid, step_ste

SYSTEM = {"weights": [0.5, 0.5], "bias": -0.7, "inputs": [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]}
RATE, STEPS, SHOWN = 0.5, 1000, (0, 1, 100, 1000)


def gate(weights: Any, inputs: Any) -> Any:
    """The perceptron of the document's equation (9), for all four rows."""
    return step_ste(dense(inputs, weights["weights"][:, None], weights["bias"].reshape(1)))


def predict(weights: Any, inputs: Any) -> Any:
    return sigmoid(dense(inputs, weights["w"][:, None], weights["b"].reshape(1)))


def network(weights: Any, inputs: Any, targets: Any) -> Any:
    return half_square(predict(weights, inputs), targets)


@jax.jit
def train(weights: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """The weights after all updates, and the loss after 0, 1, 2, … of them."""

    def update(weights: Any, _: Any) -> Any:
        loss, gradient = jax.value_and_grad(network)(weights, inputs, targets)
        return descend(weights, gradient, RATE), loss

    weights, losses = jax.lax.scan(update, weights, None, length=STEPS)
    return weights, jnp.append(losses, network(weights, inputs, targets))


def walk(language: str) -> Walk:
    t = Telling("and-gate", language)
    given = arrays(SYSTEM)
    inputs, weights = given["inputs"], {name: given[name] for name in ("weights", "bias")}
    stepped = explain(gate, weights, inputs, cotangent=jnp.ones((4, 1)))
    pre, out = stepped.steps[0].outputs["y"], stepped.steps[1].outputs["y"]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "An activation function was in use before anyone named it: the step of a perceptron. The gate AND is one neuron with a "
        "step. Backpropagation must differentiate every part, and then the step gives way to the sigmoid.",
        "활성화 함수는 이름을 알기 전부터 쓰이고 있었다. 퍼셉트론의 계단 함수이다. AND 게이트는 계단 함수를 쓴 뉴런 하나이다. "
        "그런데 역전파는 모든 부분을 미분해야 하므로 계단 함수 대신 시그모이드를 쓴다.",
    )
    t.section("The gate by a step", "계단 함수로 만든 게이트")
    t.formula(
        "y = step(x₁w₁ + x₂w₂ + b),  step(x) = 0 (x ≤ 0), 1 (x > 0)",
        r"y = \mathrm{step}(x_1 w_1 + x_2 w_2 + b),\quad \mathrm{step}(x) = 0\ (x \le 0),\ 1\ (x > 0)",
    )
    t.text("One row for each case; the weights are an instance of ours.", "한 행이 한 경우이며, 가중치 값은 여기서 정했다.")
    t.number("step/weights", weights["weights"], name="w")
    t.number("step/bias", weights["bias"], name="b")
    t.number("step/inputs", inputs, name="x")
    t.number("step/pre", pre[:, 0], "x₁w₁ + x₂w₂ + b")
    t.number("step/out", out[:, 0], "step(pre)")
    t.text(
        "Only the last row is positive: the output is 1 where both inputs are 1. At 0 itself the step is 0.",
        "마지막 행만 양수이다. 두 입력이 모두 1일 때만 1이 나온다. 0에서 계단 함수의 값은 0이다.",
    )
    t.number("step/at_zero", step_ste(jnp.zeros(())), "step(0)", "step(0)")
    t.section("Why a step cannot learn", "계단 함수로는 배울 수 없는 까닭")
    t.text(
        "The step is flat on both sides: its derivative is 0 wherever it has one, and so is every gradient behind it.",
        "계단 함수는 양쪽이 평평하다. 미분할 수 있는 곳에서는 미분이 모두 0이므로 그 앞의 기울기도 모두 0이 된다.",
    )
    truth = jax.grad(lambda w: without_rules(gate)(w, inputs).sum())(weights)
    t.number("step/gradient_w", truth["weights"], t.say("the derivative of the definition", "정의의 미분"), "dw")
    t.text(
        "The library's `step_ste` says by its name what its backward does instead: straight through, as if the step were the "
        "identity. That is useful, but it is not the gradient:",
        "이 라이브러리의 `step_ste`는 이름대로, 역전파 때 계단 함수가 항등 함수인 것처럼 받은 값을 그대로 "
        "흘려보낸다(straight-through). 쓸모는 있지만 기울기는 아니다.",
    )
    t.number(
        "step/straight_through_w",
        stepped.gradients[0]["weights"],
        "Σ x",
        t.say("dw, straight through", "dw (그대로 흘린 값)"),
    )

    _learned(t, inputs, out)
    return t.finished(t.say("The gate AND (seed 001)", "AND 게이트 (문서 001)"))


def _learned(t: Telling, inputs: Any, targets: Any) -> None:
    weights = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    record = explain(network, weights, inputs, targets)
    sum_, activation, loss = record.steps
    gradient = record.gradients[0]

    t.section("Forward with a sigmoid", "시그모이드로 하는 순전파")
    t.text(
        "Now the weights are learned, from zeros. Before anything is learned every sum is 0 and the sigmoid says ½ to all "
        "rows.",
        "이제 0에서 시작해 가중치를 배운다. 아직 배운 것이 없으므로 합은 모두 0이고 시그모이드는 모든 행에 ½을 낸다.",
    )
    t.formula("a = x₁w₁ + x₂w₂ + b,  y = σ(a)", r"a = x_1 w_1 + x_2 w_2 + b,\quad y = \sigma(a)")
    t.number("sigmoid_training/first/a", sum_.outputs["y"][:, 0], "x₁w₁ + x₂w₂ + b")
    t.number("sigmoid_training/first/y", activation.outputs["y"][:, 0], "σ(a)")
    t.kept(record)
    t.section("Loss", "손실")
    t.formula("E = Σ ½ (y − t)²", r"E = \sum_{\text{rows}} \tfrac12 (y - t)^2")
    t.number("sigmoid_training/first/E", loss.outputs["y"], "4 · ½ · ½²")
    t.section("Backward", "역전파")
    t.text("The error of each row, positive where the output is too large:", "각 행의 오차. 출력이 너무 크면 양수이다.")
    t.number("sigmoid_training/first/dy", activation.upstream["y"][:, 0], "dy = y − t")
    t.text(
        "times the slope of the sigmoid, which is ¼ where it is steepest:",
        "여기에 시그모이드의 기울기를 곱한다. 가장 가파른 곳에서 ¼이다.",
    )
    t.number("sigmoid_training/first/slope", local(sigmoid, sum_.outputs["y"])[:, 0], "σ′(a) = y (1 − y)", "σ′(a)")
    t.number("sigmoid_training/first/da", sum_.upstream["y"][:, 0], "da = dy · σ′(a)")
    t.text(
        "times the input of the weight, added over the rows: each row votes, with its input as the weight of its vote. Rows "
        "whose input is 0 have no say. The bias hears all rows.",
        "여기에 가중치의 입력을 곱해 행마다 더한다. 행마다 한 표씩 던지되 입력값만큼의 무게를 갖는 셈이다. 입력이 0인 행은 "
        "발언권이 없고, 편향은 모든 행의 말을 듣는다.",
    )
    t.number("sigmoid_training/first/dw", gradient["w"], "dw = Σ da · x")
    t.number("sigmoid_training/first/db", gradient["b"], "db = Σ da")
    t.agreement(record)

    final, losses = train(weights, inputs, targets)
    rate = t.say("the learning rate", "학습률")
    t.section("Update, a thousand times", "업데이트 천 번")
    t.formula("w := w − α ∂E/∂w", r"w := w - \alpha \frac{\partial E}{\partial w}")
    t.number("sigmoid_training/learning_rate", RATE, rate, "α")
    updated = descend(weights, gradient, RATE)
    t.number("sigmoid_training/first/updated_w", updated["w"], "w − α dw", t.say("w after one update", "한 번 업데이트한 w"))
    t.number("sigmoid_training/first/updated_b", updated["b"], "b − α db", t.say("b after one update", "한 번 업데이트한 b"))
    for step in SHOWN:
        t.number(f"sigmoid_training/loss_at_step/{step}", losses[step], "E", t.say(f"E at step {step}", f"{step}단계의 E"))
    t.picture(
        lines({"E": losses}, t.say("updates", "업데이트 횟수"), "E", logarithmic=True),
        t.say(f"The loss over {STEPS} updates, on a logarithmic scale: it falls all the way.",
              f"업데이트 {STEPS}번 동안의 손실 (로그 눈금). 끝까지 줄어든다."),
    )  # fmt: skip
    t.number(
        "sigmoid_training/final",
        jnp.append(final["w"], final["b"]),
        "w₁, w₂, b",
        t.say("w₁, w₂, b at the end", "마지막 w₁, w₂, b"),
    )
    t.number("sigmoid_training/final_outputs", predict(final, inputs)[:, 0], "σ(a)", t.say("y at the end", "마지막 y"))
    t.text(
        "Only the last row is above ½: the gate is learned. The problem does not tell its two inputs apart, and neither do the "
        "weights. As in the gate set by hand, one weight alone does not outweigh the bias, and two together do.",
        "마지막 행만 ½보다 크다. 게이트를 배운 것이다. 이 문제에서는 두 입력이 서로 다를 것이 없으므로 두 가중치도 같아졌다. "
        "손으로 정한 게이트처럼 가중치 하나만으로는 편향을 넘지 못하고 둘을 합하면 넘는다.",
    )
