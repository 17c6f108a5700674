"""Seed 000: two inputs, three hidden nodes, two outputs; the chain rule through every path from one weight to the loss."""

from typing import Any

from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.chained import chain_of
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend, local
from fbackprop.ops import dense, sigmoid, sum_of_squares

SYSTEM = {
    "x": [1.0, 0.5],
    "y": [1.0, 0.0],
    "W1": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    "W2": [[0.7, 0.8, 0.9], [1.0, 1.1, 1.2]],
}
RATE = 0.5


def network(weights: Any, x: Any, y: Any) -> Any:
    """W is (out, in) as in the document, W x; the ops have (in, out), x Wᵀ."""
    n1 = sigmoid(dense(x, weights["W1"].T))
    y_hat = sigmoid(dense(n1, weights["W2"].T))
    return sum_of_squares(y_hat, y)


def walk(language: str) -> Walk:
    t = Telling("two-three-two", language)
    given = arrays(SYSTEM)
    weights, x, y = {name: given[name] for name in ("W1", "W2")}, given["x"], given["y"]
    record = explain(network, weights, x, y)
    first, first_sigmoid, second, second_sigmoid, loss = record.steps
    d1, n1, d2, y_hat = (step.outputs["y"] for step in (first, first_sigmoid, second, second_sigmoid))

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "A deep network has many weights, and working out each partial derivative from scratch would take too long. "
        "Backpropagation reuses work: the derivative of each layer is a factor, and the factors of later layers are shared by "
        "all weights before them. Read from the loss to the weight, the factors follow a pattern that the document calls "
        "액 웨 … 액 앤: activation, weight, …, activation, node value.",
        "신경망이 깊어지면 가중치가 많아져서 편미분을 하나하나 따로 구하기에는 시간이 너무 많이 든다. 역전파는 계산을 다시 "
        "쓴다. 층마다 미분이 인수 하나가 되고, 뒤쪽 층의 인수는 그 앞에 있는 모든 가중치가 함께 쓴다. 손실에서 가중치 쪽으로 "
        "읽으면 인수는 문서가 말하는 대로 ‘액 웨 … 액 앤’, 곧 활성화 함수의 미분, 가중치, …, 활성화 함수의 미분, 노드 값의 "
        "순서로 나온다.",
    )
    t.section("The network", "신경망")
    t.text(
        "Two inputs, three hidden nodes, two outputs, a sigmoid after each layer, no biases. The document has symbols only; "
        "the numbers are an instance of ours. A row of W holds the weights into one node.",
        "입력 노드 2개, 은닉 노드 3개, 출력 노드 2개이고, 층마다 시그모이드를 거치며 편향은 없다. 문서에는 기호만 있으므로 "
        "숫자는 여기서 정한 것이다. W의 한 행은 한 노드로 들어오는 가중치이다.",
    )
    t.formula(
        "d₁ = W₁ x,  n₁ = σ(d₁),  d₂ = W₂ n₁,  ŷ = σ(d₂)",
        r"d_1 = W_1 x,\quad n_1 = \sigma(d_1),\quad d_2 = W_2 n_1,\quad \hat y = \sigma(d_2)",
    )
    t.given(given)

    t.section("Forward", "순전파")
    t.number("forward/d1", d1, "d1 = W1 x")
    t.number("forward/n1", n1, "n1 = σ(d1)")
    t.number("forward/d2", d2, "d2 = W2 n1")
    t.number("forward/y_hat", y_hat, "y_hat = σ(d2)")
    t.text(
        "Why the forward pass comes first: the factors of the chain are values that it computes. σ′(d) = σ(d)(1 − σ(d)) needs "
        "what the sigmoid put out, the last factor is the value of the node before, the first one the error at the output. So "
        "the forward pass remembers them, and nothing is computed twice.",
        "순전파가 먼저인 까닭: 연쇄 법칙의 인수는 순전파에서 나온 값이다. σ′(d) = σ(d)(1 − σ(d))에는 시그모이드의 출력이, "
        "마지막 인수에는 앞 노드의 값이, 첫 인수에는 출력의 오차가 필요하다. 그래서 순전파 때 이 값들을 기억해 두면 아무것도 "
        "두 번 계산하지 않는다.",
    )
    t.kept(record)

    t.section("Loss", "손실")
    t.formula("L = Σᵢ (ŷᵢ − yᵢ)²", r"L = \sum_i (\hat y_i - y_i)^2")
    t.number("forward/loss", loss.outputs["y"], "loss = Σ (y_hat − y)²")
    t.note(
        "The document prints L = Σ (ŷᵢ − yᵢ), without the square. Its derivative would be 1 whatever the error is; the factor "
        "2(ŷ − y) that it goes on with belongs to the square. (It is the sum of squares; for the MSE it names, divide by 2.)",
        "문서에는 L = Σ (ŷᵢ − yᵢ)로 제곱이 빠져 있다. 그대로라면 오차가 얼마든 미분이 1이다. 문서가 이어서 쓰는 인수 2(ŷ − "
        "y)는 제곱이 있어야 나온다. (이것은 제곱합이다. 문서가 말하는 MSE라면 2로 나눈다.)",
    )

    t.section("Backward, layer by layer", "역전파: 층을 하나씩")
    t.text(
        "From the loss towards the input, each layer receives how the loss changes with its output and hands back how it "
        "changes with its input.",
        "손실에서 입력 쪽으로, 각 층은 ‘내 출력이 바뀌면 손실이 얼마나 바뀌는가’를 받아 ‘내 입력이 바뀌면 얼마나 바뀌는가’로 "
        "바꾸어 앞 층에 넘긴다.",
    )
    t.text("The loss factor: twice the error of each output.", "손실의 인수: 각 출력이 낸 오차의 두 배.")
    t.number("backward/dy_hat", second_sigmoid.upstream["y"], "dy_hat = 2 (y_hat − y)")
    t.text(
        "액, the activation: the slope of the sigmoid where each node stands. It multiplies element by element.",
        "액(활성화 함수): 각 노드가 놓인 자리에서 시그모이드의 기울기. 원소마다 곱한다.",
    )
    t.number("backward/slope2", local(sigmoid, d2), "σ′(d2) = y_hat (1 − y_hat)", "σ′(d2)")
    t.number("backward/dd2", second.upstream["y"], "dd2 = dy_hat ⊙ σ′(d2)")
    t.text(
        "앤, the node value: a weight is multiplied by the node before it, so its derivative is that node's value. Here the "
        "chain of a weight of W2 ends.",
        "앤(노드 값): 가중치는 앞 노드의 값과 곱해지므로 가중치로 미분하면 그 노드 값이 남는다. W2의 가중치라면 연쇄가 여기서 "
        "끝난다.",
    )
    t.formula("∂L/∂W₂ = 2(ŷ − y) σ′(d₂) n₁", r"\frac{\partial L}{\partial W_2} = 2(\hat y - y)\,\sigma'(d_2)\,n_1")
    t.number("gradients/W2", record.gradients[0]["W2"], "dW2 = dd2 n1ᵀ", "dW2")
    t.text(
        "웨, the weight: to go on to the hidden nodes, multiply by the weight on the way. A hidden node feeds both outputs, so "
        "what comes back from both is added: that is the matrix product with W2 transposed.",
        "웨(가중치): 은닉 노드로 더 거슬러 가려면 지나온 가중치를 곱한다. 은닉 노드는 두 출력에 모두 이어져 있으므로 양쪽에서 "
        "돌아온 것을 더한다. 이것이 W2의 전치와의 행렬 곱이다.",
    )
    t.number("backward/dn1", first_sigmoid.upstream["y"], "dn1 = W2ᵀ dd2")
    t.text("Then 액 and 앤 again, one layer further down.", "그다음 한 층 아래에서 다시 액과 앤이다.")
    t.number("backward/slope1", local(sigmoid, d1), "σ′(d1) = n1 (1 − n1)", "σ′(d1)")
    t.number("backward/dd1", first.upstream["y"], "dd1 = dn1 ⊙ σ′(d1)")
    t.number("gradients/W1", record.gradients[0]["W1"], "dW1 = dd1 xᵀ", "dW1")
    t.number("gradients/x", record.gradients[1], "dx = W1ᵀ dd1", "dx")
    t.agreement(record)

    t.section("The chain of one weight: W1[0, 0]", "가중치 하나의 연쇄: W1[0, 0]")
    paths = chain_of(t, record, "W1[0, 0]", ("d1", "n1", "d2", "y_hat", "loss"))
    through = {f"through_output_{path.factors[0].into[0]}": path.product for path in paths}
    for name in sorted(through):
        t.number(f"paths_of_W1_0_0/{name}", through[name], t.say("loss · 액 · 웨 · 액 · 앤", "손실 · 액 · 웨 · 액 · 앤"))
    t.number("paths_of_W1_0_0/sum", sum(through.values()), t.say("the sum over the paths = dW1[0, 0]", "경로의 합 = dW1[0, 0]"))
    t.note(
        "The document's first result is one path alone, through the first output, and it says itself that this is wrong: the "
        "hidden node reaches the second output too. Here the first path alone even has the wrong sign, so a step along it "
        "would raise the loss.",
        "문서의 첫 결과는 첫 번째 출력을 지나는 경로 하나뿐이며, 문서도 잘못된 값이라고 밝힌다. 은닉 노드는 두 번째 출력으로도 "
        "이어지기 때문이다. 이 예에서 첫 경로만 보면 부호부터 반대여서, 그 방향으로 움직이면 손실이 오히려 커진다.",
    )
    t.note(
        "The document's formula for ∂L/∂W1 has the factor W1 where W2 belongs: ∂d₂/∂n₁ is the weight between n₁ and d₂.",
        "문서의 ∂L/∂W1 식에는 W2가 있어야 할 자리에 W1이 적혀 있다. ∂d₂/∂n₁은 n₁과 d₂ 사이의 가중치이다.",
    )

    t.section("Update", "업데이트")
    t.text(
        f"Gradient descent subtracts the gradient times a learning rate. The document names none; with {RATE} the loss falls.",
        f"경사 하강법은 기울기에 학습률을 곱해 뺀다. 문서에는 학습률이 없으므로 {RATE}로 해 보면 손실이 줄어든다.",
    )
    t.formula("W := W − α ∂L/∂W", r"W := W - \alpha \frac{\partial L}{\partial W}")
    t.keep("learning_rate", RATE)
    updated = descend(weights, record.gradients[0], RATE)
    for name, value in updated.items():
        t.number(f"updated/{name}", value, f"{name} − {RATE} d{name}")
    t.number("after_update/loss", network(updated, x, y), t.say("the loss after the update", "업데이트한 뒤의 손실"))
    return t.finished(
        t.say("Two inputs, three hidden nodes, two outputs (seed 000)", "입력 2, 은닉 3, 출력 2의 신경망 (문서 000)")
    )
