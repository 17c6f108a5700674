"""Seed 004: three layers with ReLU; the document's forward pass leaves out a bias, and its step kills two units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.chained import chain_of
from fbackprop.explaining.walks.drawing import lines
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend, local
from fbackprop.ops import dense, half_square, relu

SYSTEM = {
    "x": [1.0, 2.0],
    "y_true": 3.0,
    "learning_rate": 0.01,
    "W1": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    "b1": [0.1, 0.2, 0.3],
    "W2": [[0.7, 0.8, 0.9], [1.0, 1.1, 1.2]],
    "b2": [0.4, 0.5],
    "W3": [[1.3, 1.4]],
    "b3": [0.6],
}
SMALL_RATE, UPDATES = 0.002, 11

# What the document prints.
FORWARD = {"h1": [0.5, 1.1, 1.7], "h2": [2.98, 4.34], "y": 10.446, "J": 27.72}
GRADIENTS = {
    "W3": [[22.189, 32.316]],
    "b3": [7.446],
    "W2": [[4.840, 10.648, 16.456], [5.212, 11.466, 17.721]],
    "b2": [9.680, 10.424],
    "W1": [[17.200, 34.400], [19.242, 38.484], [21.285, 42.570]],
    "b1": [17.200, 19.242, 21.285],
}
UPDATED = {
    "W3": [[1.078, 1.077]],
    "b3": [0.526],
    "W2": [[0.652, 0.693, 0.735], [0.948, 0.985, 1.023]],
    "b2": [0.303, 0.396],
    "W1": [[-0.072, -0.144], [0.108, 0.015], [0.287, 0.174]],
    "b1": [-0.072, 0.008, 0.087],
}


def network(weights: Any, x: Any, y_true: Any) -> Any:
    """W is (out, in) as in the document, W x; the ops have (in, out), x Wᵀ."""
    h1 = relu(dense(x, weights["W1"].T, weights["b1"]))
    h2 = relu(dense(h1, weights["W2"].T, weights["b2"]))
    return half_square(dense(h2, weights["W3"].T, weights["b3"]), y_true.reshape(1))


def forward(record: Any) -> dict[str, Any]:
    """The document's names for what the steps put out."""
    return dict(zip(("a1", "h1", "a2", "h2", "y", "J"), (step.outputs["y"] for step in record.steps)))


@jax.jit
def losses(weights: Any, x: Any, y_true: Any, rate: Any) -> Any:
    """The loss before each of so many updates, and after the last."""

    def update(weights: Any, _: Any) -> Any:
        loss, gradient = jax.value_and_grad(network)(weights, x, y_true)
        return descend(weights, gradient, rate), loss

    return jax.lax.scan(update, weights, None, length=UPDATES + 1)[1]


def walk(language: str) -> Walk:
    t = Telling("three-layer", language)
    given = arrays(SYSTEM)
    x, y_true, rate = given["x"], given["y_true"], SYSTEM["learning_rate"]
    weights = {name: given[name] for name in ("W1", "b1", "W2", "b2", "W3", "b3")}
    record = explain(network, weights, x, y_true)
    values, gradient = forward(record), record.gradients[0]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "Forward, backward and update in numbers, for a network of three layers. Each layer's backward pass computes two "
        "things: the gradient of its own parameters, and the gradient of its input, which the layer before goes on from.",
        "3층 신경망의 순전파, 역전파, 업데이트를 숫자로 보여 준다. 각 층은 역전파에서 두 가지, 곧 자기 파라미터의 기울기와 "
        "자기 입력의 기울기를 구하고, 앞 층은 그 입력의 기울기에서 이어 간다.",
    )
    t.section("The network", "신경망")
    t.formula(
        "h₁ = relu(W₁x + b₁),  h₂ = relu(W₂h₁ + b₂),  y = W₃h₂ + b₃",
        r"h_1 = \mathrm{relu}(W_1 x + b_1),\quad h_2 = \mathrm{relu}(W_2 h_1 + b_2),\quad y = W_3 h_2 + b_3",
    )
    t.given(given)
    t.section("Forward", "순전파")
    for name, how in (("a1", "W1 x + b1"), ("h1", "relu(a1)"), ("a2", "W2 h1 + b2"), ("h2", "relu(a2)"), ("y", "W3 h2 + b3")):
        t.number(f"forward/{name}", values[name], f"{name} = {how}")
    t.text(
        "The forward pass comes first: the gradient of each W is made of the h before it, and relu must know where it let "
        "through.",
        "순전파가 먼저이다. W의 기울기는 그 앞의 h로 만들어지고, relu는 어디를 통과시켰는지 알고 있어야 한다.",
    )
    t.kept(record)
    t.section("Loss", "손실")
    t.formula("J = ½ (y_true − y)²", r"J = \tfrac12 (y_{true} - y_{pred})^2")
    t.number("forward/J", values["J"], "J = ½ (y_true − y)²")
    _wrong_forward(t, weights, x, values)
    _backward(t, record)
    _update(t, weights, x, y_true, rate, gradient)
    return t.finished(t.say("Three layers, step by step (seed 004)", "3층 신경망 단계별 계산 (문서 004)"))


def _wrong_forward(t: Telling, weights: Any, x: Any, values: Any) -> None:
    """Both forward passes side by side, and from which step on the document's cannot be right."""
    t.section("What the document gets wrong", "문서에서 바로잡을 점")
    printed = arrays(FORWARD)
    without_bias = dense(x, weights["W1"].T)
    own_h2 = dense(printed["h1"], weights["W2"].T, weights["b2"])
    own_y = dense(printed["h2"], weights["W3"].T, weights["b3"])
    why = {
        "h1": t.say("b1 is left out: this is W1 x", "b1을 더하지 않았다: W1 x의 값이다"),
        "h2": t.say("wrong even from its own h1", "문서의 h1로 계산해도 다르다"),
        "y": t.say("wrong even from its own h2", "문서의 h2로 계산해도 다르다"),
        "J": t.say("follows from its y", "문서의 y에서 나온 값이다"),
    }
    for name, value in printed.items():
        t.number(f"document_says/{name}", value, why[name], t.say(f"{name} in the document", f"문서의 {name}"))
        t.show(t.say(f"{name}, right", f"올바른 {name}"), values[name])
    t.table(t.say("number|what is wrong", "숫자|틀린 점").split("|"), tuple(why.items()))
    t.text(
        "Recomputed from the document's own lines: W1 x without b1 is its h1, bias forgotten. From that h1 its second line "
        "would give another h2, and from its h2 its third line another y:",
        "문서의 식을 그대로 다시 계산해 보면, b1 없이 W1 x만 구한 값이 문서의 h1이다(편향을 빠뜨렸다). 그 h1로 둘째 식을 "
        "계산하면 h2가, 문서의 h2로 셋째 식을 계산하면 y가 문서와 다르다.",
    )
    t.number("recomputed/h1_without_b1", without_bias, "W1 x", t.say("W1 x without b1", "b1 없는 W1 x"))
    t.number("recomputed/h2_from_its_h1", own_h2, "W2 h1 + b2", t.say("h2 from the document's h1", "문서의 h1에서 구한 h2"))
    t.number("recomputed/y_from_its_h2", own_y, "W3 h2 + b3", t.say("y from the document's h2", "문서의 h2에서 구한 y"))
    t.note(
        "Every later number of the document, its gradients and its updated weights, inherits these errors; they stand beside "
        "the right ones below.",
        "그래서 그 뒤에 나오는 문서의 숫자, 곧 기울기와 업데이트된 가중치도 모두 틀렸다. 아래에서 올바른 값 옆에 놓아 둔다.",
    )


def _backward(t: Telling, record: Any) -> None:
    first, first_relu, second, second_relu, third, _ = record.steps
    gradient = record.gradients[0]
    t.section("Backward, layer by layer", "역전파: 층을 하나씩")
    t.text("The loss factor is the error of the output.", "손실의 인수는 출력의 오차이다.")
    t.number("backward/dy", third.upstream["y"], "dy = y − y_true")
    t.text(
        "Output layer. Its weights are multiplied by h2, so their gradient is the error times h2; its bias is added, so it "
        "receives the error itself; and the error goes on to h2 through the weights.",
        "출력층. 가중치에는 h2가 곱해지므로 기울기는 오차 곱하기 h2이고, 편향은 더해질 뿐이므로 오차를 그대로 받으며, 오차는 "
        "가중치를 지나 h2로 넘어간다.",
    )
    _both(t, gradient, ("W3", "dy h2ᵀ"), ("b3", "dy"))
    t.number("backward/dh2", second_relu.upstream["y"], "dh2 = W3ᵀ dy")
    t.text(
        "Hidden layer 2. relu lets the gradient through where its input was positive (slope 1) and stops it elsewhere (slope "
        "0).",
        "은닉층 2. relu는 입력이 양수였던 곳에서는 기울기를 그대로(기울기 1) 보내고, 나머지에서는 막는다(기울기 0).",
    )
    t.number("backward/slope2", local(relu, second.outputs["y"]), "relu′(a2)", "relu′(a2)")
    t.number("backward/da2", second.upstream["y"], "da2 = dh2 ⊙ relu′(a2)")
    t.note(
        "The document leaves the factor relu′ out of its formulas. Here it is 1 everywhere, so nothing changes. After the "
        "update below it would: there two of the three slopes of the first layer are 0.",
        "문서의 식에는 인수 relu′이 빠져 있다. 여기서는 모두 1이라 결과가 같지만, 아래의 업데이트 뒤에는 첫 층의 기울기 셋 중 "
        "둘이 0이므로 결과가 달라진다.",
    )
    _both(t, gradient, ("W2", "da2 h1ᵀ"), ("b2", "da2"))
    t.number("backward/dh1", first_relu.upstream["y"], "dh1 = W2ᵀ da2")
    t.text("Hidden layer 1, in the same way.", "은닉층 1도 마찬가지이다.")
    t.number("backward/slope1", local(relu, first.outputs["y"]), "relu′(a1)", "relu′(a1)")
    t.number("backward/da1", first.upstream["y"], "da1 = dh1 ⊙ relu′(a1)")
    _both(t, gradient, ("W1", "da1 xᵀ"), ("b1", "da1"))
    t.number("recomputed/dh1_from_its_dh2", dense(arrays(GRADIENTS)["b2"], record.arguments[0][0]["W2"]), "W2ᵀ dh2",
             t.say("dh1 from the document's dh2", "문서의 dh2에서 구한 dh1"))  # fmt: skip
    t.note(
        "The document's second and third number of dh1 (its db1) are wrong even from its own dh2.",
        "문서의 dh1(= db1) 둘째와 셋째 숫자는 문서의 dh2로 계산해도 다르다.",
    )
    t.number("gradients/x", record.gradients[1], "dx = W1ᵀ da1", "dx")
    t.agreement(record)
    t.section("The chain of one weight: W1[0, 0]", "가중치 하나의 연쇄: W1[0, 0]")
    chain_of(t, record, "W1[0, 0]", ("a1", "h1", "a2", "h2", "y", "J"))


def _both(t: Telling, gradient: Any, *named: tuple[str, str]) -> None:
    """Gradients beside what the document prints."""
    for name, how in named:
        t.number(f"gradients/{name}", gradient[name], f"d{name} = {how}", f"d{name}")
        t.number(f"document_gradients/{name}", GRADIENTS[name], t.say("from its wrong forward pass", "틀린 순전파에서 나온 값"),
                 t.say(f"d{name} in the document", f"문서의 d{name}"))  # fmt: skip


def _update(t: Telling, weights: Any, x: Any, y_true: Any, rate: float, gradient: Any) -> None:
    t.section("Update", "업데이트")
    t.formula("W := W − α ∂J/∂W,  α = 0.01", r"W := W - \alpha \frac{\partial J}{\partial W},\quad \alpha = 0.01")
    updated = descend(weights, gradient, rate)
    for name in ("W3", "b3", "W2", "b2", "W1", "b1"):
        t.number(f"updated/{name}", updated[name], f"{name} − {rate} d{name}")
        t.number(f"document_updated/{name}", UPDATED[name], t.say("from its wrong gradient", "틀린 기울기에서 나온 값"),
                 t.say(f"{name} in the document", f"문서의 {name}"))  # fmt: skip
    t.note(
        "The document says that `backward()` of a framework also updates the parameters. It computes gradients alone; the "
        "update is the optimizer's, a step of its own.",
        "문서는 프레임워크의 `backward()`가 파라미터 업데이트까지 한다고 말한다. `backward()`는 기울기만 구하고, 업데이트는 "
        "옵티마이저가 따로 한다.",
    )
    t.section("After the update: two dead units", "업데이트 뒤: 죽은 유닛 두 개")
    after = explain(network, updated, x, y_true)
    for name, value in forward(after).items():
        t.number(f"after_update/{name}", value)
    dead = np.flatnonzero(np.asarray(after.steps[0].outputs["y"]) < 0)
    t.text(
        f"The loss falls from {float(network(weights, x, y_true)):.4g} to {float(after.output):.4g}, but {len(dead)} of three "
        "units of the first layer now have a negative input. relu puts out 0 there and its slope is 0: no gradient reaches "
        "their weights any more, and with this one example they never come back.",
        f"손실은 {float(network(weights, x, y_true)):.4g}에서 {float(after.output):.4g}로 줄었지만, 첫 층의 유닛 셋 가운데 "
        f"{len(dead)}개는 이제 입력이 음수이다. relu는 거기서 0을 내고 기울기도 0이므로 그 가중치에는 더 이상 기울기가 오지 "
        "않는다. 예제가 이것 하나뿐이라면 다시 살아나지 않는다.",
    )
    t.number(
        "after_update/dW1",
        after.gradients[0]["W1"],
        t.say("dW1 after the update: rows of zeros", "업데이트한 뒤의 dW1: 0인 행"),
        "dW1",
    )
    t.text(
        f"The loss after 0, 1, 2, … {UPDATES} updates, row by row:",
        f"업데이트를 0, 1, 2, … {UPDATES}번 한 뒤의 손실 (한 줄씩 차례로):",
    )
    by_step = np.asarray(losses(weights, x, y_true, rate))
    t.keep("loss_by_step", by_step)
    t.show("J (0.01)", by_step.reshape(3, 4), t.say("J after 0, 1, 2, … updates", "업데이트를 0, 1, 2, … 번 한 뒤의 J"))
    gentle = descend(weights, gradient, SMALL_RATE)
    small = explain(network, gentle, x, y_true)
    t.text(
        f"A smaller step keeps them all alive. With a rate of {SMALL_RATE}, a fifth of it:",
        f"더 작은 학습률이면 모두 살아 있다. 5분의 1인 {SMALL_RATE}로 하면 다음과 같다.",
    )
    t.keep("small_rate/learning_rate", SMALL_RATE)
    t.number("small_rate/a1", small.steps[0].outputs["y"], "W1 x + b1", "a1 (0.002)")
    t.number("small_rate/h1", small.steps[1].outputs["y"], "relu(a1)", "h1 (0.002)")
    small_by_step = np.asarray(losses(weights, x, y_true, SMALL_RATE))
    t.keep("small_rate/loss_by_step", small_by_step)
    t.show("J (0.002)", small_by_step.reshape(3, 4), t.say("J after 0, 1, 2, … updates", "업데이트를 0, 1, 2, … 번 한 뒤의 J"))
    words = t.say(
        "The loss after each update, on a logarithmic scale, with learning rates 0.01 and 0.002.",
        "학습률 0.01과 0.002에서 업데이트마다의 손실 (로그 눈금).",
    )
    curves = {"α = 0.01": by_step, "α = 0.002": small_by_step}
    t.picture(lines(curves, t.say("updates", "업데이트 횟수"), "J", logarithmic=True), words)
    alive = int(jnp.sum(small.steps[1].outputs["y"] > 0))
    t.text(
        f"{alive} of three units are alive. Which rate gives the smaller loss after {UPDATES} updates is another matter: one "
        "example is fitted by a crippled network as well.",
        f"유닛 셋 가운데 {alive}개가 살아 있다. {UPDATES}번 업데이트한 뒤 어느 쪽의 손실이 더 작은지는 다른 문제이다. 예제 "
        "하나쯤은 유닛이 죽은 신경망도 맞출 수 있다.",
    )
