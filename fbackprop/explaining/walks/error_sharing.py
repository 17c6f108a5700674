"""Seed 002: an error of 0.6 shared out over contributions of 3 and 2, and why that is not the gradient."""

from typing import Any

import jax.numpy as jnp

from fbackprop.alternatives import relevance
from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.frame import Telling, Walk, arrays
from fbackprop.ops import dense

SYSTEM = {"contributions": [3.0, 2.0], "error": 0.6}


def node(weights: Any, contributions: Any) -> Any:
    """The sum of what arrives."""
    return dense(contributions, weights["kernel"])


def walk(language: str) -> Walk:
    t = Telling("error-sharing", language)
    given = arrays(SYSTEM)
    contributions, error = given["contributions"], given["error"]
    weights = {"kernel": jnp.ones((2, 1))}
    shared = relevance(node, weights, contributions, amount=error)
    record = explain(node, weights, contributions, cotangent=error[None])
    total = record.steps[0].outputs["y"]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "An output with an error of 0.6 received 3 from one node and 2 from another. The document hands the error back in "
        "proportion: who contributed more to the output, receives more of the error.",
        "오차가 0.6인 출력 노드가 앞의 두 노드에서 3과 2를 받았다. 문서는 이 오차를 비율대로 돌려준다. 결과에 더 많이 영향을 "
        "준 노드가 오차도 더 많이 받는다.",
    )
    t.section("Forward", "순전파")
    t.number("contributions", contributions, t.say("what each node passes on", "각 노드가 보낸 값"))
    t.number("total", total[0], "3 + 2")
    t.text(
        "The contributions must be known before anything can be shared out in proportion to them: the forward pass comes "
        "first.",
        "비율대로 나누려면 먼저 각각이 얼마를 보냈는지 알아야 한다. 그래서 순전파가 먼저이다.",
    )
    t.section("The error", "오차")
    t.number("error", error, t.say("of the output, given in the document", "문서에 주어진 출력의 오차"))
    t.section("Backward: sharing in proportion", "역전파: 비율대로 나누기")
    t.formula("Rᵢ = zᵢ / Σⱼ zⱼ · R", r"R_i = \frac{z_i}{\sum_j z_j}\, R")
    t.text(
        "This rule has a name: layer-wise relevance propagation, LRP-0. Three fifths of 0.6 and two fifths of 0.6. Here it is "
        "`fbackprop.relevance`, which puts the rule in the place of the gradient of `dense`:",
        "이 규칙에는 이름이 있다. 층별 관련도 전파(layer-wise relevance propagation)의 LRP-0이다. 0.6의 5분의 3과 5분의 2이다. "
        "여기서는 `dense`의 기울기 자리에 이 규칙을 넣는 `fbackprop.relevance`로 계산한다.",
    )
    t.number("shares", shared.input, "3 / 5 · 0.6, 2 / 5 · 0.6")
    t.text(
        "Nothing is lost on the way: the shares add up to the error.",
        "나누는 동안 사라지는 것이 없다. 몫을 더하면 오차와 같다.",
    )
    t.number("sum_of_shares", jnp.sum(shared.input), "Σ Rᵢ")
    t.number("lost", shared.lost, "R − Σ Rᵢ")
    t.section("Why this is not the gradient", "이것이 기울기가 아닌 까닭")
    t.text(
        "The gradient asks another question: not how much came from this node, but how much the output would change if this "
        "node changed a little. The sum changes by 1 with either, so both receive the whole error, whatever they contributed:",
        "기울기는 다른 것을 묻는다. ‘이 노드에서 얼마가 왔는가’가 아니라 ‘이 노드를 조금 바꾸면 출력이 얼마나 바뀌는가’이다. "
        "합은 어느 쪽을 바꿔도 1만큼씩 바뀌므로, 보낸 양과 관계없이 둘 다 오차를 통째로 받는다.",
    )
    t.number("gradient", record.gradients[1], "1 · 0.6")
    t.note(
        "Sharing explains a prediction; it does not train. Weights are updated by the gradient. The gradient is multiplied by "
        "the weight on its way (seed 000's 웨) and does not conserve a total: here 1.2 arrive from 0.6.",
        "나누기는 예측을 설명해 줄 뿐 학습시키지는 않는다. 가중치는 기울기로 업데이트한다. 기울기는 지나온 가중치가 "
        "곱해지며(문서 000의 ‘웨’) 합이 보존되지 않는다. 여기서는 0.6에서 1.2가 나왔다.",
    )
    t.section("Update", "업데이트")
    t.note(
        "The document says that the forward pass updates the weights a first time. It does not: a forward pass changes no "
        "weight. And an epoch is one pass over all examples, not one pass forward and back.",
        "문서에는 순전파 때 가중치가 한 번 업데이트된다는 말이 있는데, 순전파는 가중치를 바꾸지 않는다. 또 1 epoch는 순전파와 "
        "역전파 한 번이 아니라 모든 예제를 한 번 다 보는 것이다.",
    )
    t.text(
        "So there is nothing to update here: the picture has no weights, and shares are no derivative.",
        "따라서 여기서는 업데이트할 것이 없다. 그림에 가중치가 없고, 몫은 미분이 아니다.",
    )
    return t.finished(t.say("Sharing an error out (seed 002)", "오차를 나누어 돌려주기 (문서 002)"))
