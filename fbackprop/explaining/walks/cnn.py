"""Seed 004's stack of two convolutions and two dense layers under softmax and cross-entropy, with an image of 4×4."""

from typing import Any

import jax.numpy as jnp

from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.chained import chain_of
from fbackprop.explaining.walks.drawing import images
from fbackprop.explaining.walks.frame import Telling, Walk, arrays, descend
from fbackprop.ops import conv, dense, softmax, softmax_cross_entropy_with_integer_labels

SYSTEM = {
    "X": [[0.0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [0.8, 0.9, 1.0, 1.1], [1.2, 1.3, 1.4, 1.5]],
    "K1": [[0.1, 0.2], [0.3, 0.4]],
    "c1": 0.1,
    "K2": [[0.5, -0.4], [0.3, -0.2]],
    "c2": 0.05,
    "W4": [[0.1, -0.2, 0.3, 0.4], [0.5, 0.1, -0.3, 0.2], [-0.1, 0.2, 0.4, -0.5]],
    "b4": [0.01, 0.02, 0.03],
    "W5": [[0.3, -0.6, 0.9], [-0.2, 0.5, 0.7]],
    "b5": [0.1, -0.1],
}
RATE, LABEL = 0.1, 0


def network(weights: Any, X: Any) -> Any:
    """One channel, no padding, no activations; W is (out, in)."""
    image = X[..., None]
    for kernel, bias in (("K1", "c1"), ("K2", "c2")):
        image = conv(image, weights[kernel][..., None, None], weights[bias].reshape(1), padding="VALID")
    features = dense(image.reshape(-1), weights["W4"].T, weights["b4"])
    logits = dense(features, weights["W5"].T, weights["b5"])
    return softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABEL))


def walk(language: str) -> Walk:
    t = Telling("cnn", language)
    given = arrays(SYSTEM)
    weights, X = {name: value for name, value in given.items() if name != "X"}, given["X"]
    record = explain(network, weights, X)
    first, second, fourth, fifth, loss = record.steps
    gradient = record.gradients[0]

    t.section("What the document wants to show", "문서가 보여 주려는 것")
    t.text(
        "A typical convolutional network: convolutions extract features, dense layers classify, softmax and cross-entropy "
        "judge. The gradient flows back through all of them by the same rule: each layer turns the gradient of its output into "
        "the gradient of its parameters and of its input.",
        "전형적인 합성곱 신경망이다. 합성곱이 특징을 뽑고, Dense 층이 분류하고, 소프트맥스와 교차 엔트로피가 채점한다. "
        "기울기는 어느 층에서나 같은 방식으로 거슬러 흐른다. 각 층은 출력의 기울기를 받아 자기 파라미터의 기울기와 입력의 "
        "기울기로 바꾼다.",
    )
    t.formula(
        "X → Conv2D → Conv2D → Flatten → Dense → Dense → Softmax → CE → J",
        r"X \to \mathrm{Conv2D} \to \mathrm{Conv2D} \to \mathrm{Flatten} \to \mathrm{Dense} \to \mathrm{Dense}"
        r" \to \mathrm{Softmax} \to \mathrm{CE} \to J",
    )
    t.text(
        "The document draws the stack without numbers; this instance is ours: an image of 4×4 with one channel, kernels of "
        "2×2, no activations, as drawn. The right class is 0.",
        "문서는 구조만 그리고 숫자는 주지 않았으므로 값은 여기서 정했다. 채널이 하나인 4×4 이미지, 2×2 커널, 그림대로 활성화 "
        "함수는 없고, 정답은 클래스 0이다.",
    )
    t.given(given)

    t.section("Forward", "순전파")
    conv1, conv2 = first.outputs["y"], second.outputs["y"]
    logits = fifth.outputs["y"]
    t.text(
        "A convolution lays the kernel over each place of the image, multiplies and adds, and adds the bias. (Strictly it is a "
        "cross-correlation: the kernel is not flipped.)",
        "합성곱은 커널을 이미지의 모든 자리에 차례로 얹어 곱해 더하고 편향을 더한다. (엄밀히는 커널을 뒤집지 않으므로 "
        "상호상관이다.)",
    )
    t.number("forward/conv1", conv1[..., 0], "conv1 = X ⋆ K1 + c1")
    t.number("forward/conv2", conv2[..., 0], "conv2 = conv1 ⋆ K2 + c2")
    t.number("forward/dense4", fourth.outputs["y"], "dense4 = W4 flatten(conv2) + b4")
    t.number("forward/logits", logits, "logits = W5 dense4 + b5")
    t.number("forward/softmax", softmax(logits), "exp(z) / Σ exp(z)")
    t.text(
        "The forward pass comes first: the gradient of a kernel needs the image that it was laid over, the gradient of a W the "
        "vector that it was multiplied with, and the loss the probabilities.",
        "순전파가 먼저이다. 커널의 기울기에는 커널을 얹었던 이미지가, W의 기울기에는 곱해진 벡터가, 손실의 기울기에는 확률이 "
        "필요하다.",
    )
    t.kept(record)
    t.section("Loss", "손실")
    t.formula("J = −log p(right class)", r"J = -\log p_{\text{label}}")
    t.number("forward/J", loss.outputs["y"], "J = −log softmax(logits)[0]")

    t.section("Backward, layer by layer", "역전파: 층을 하나씩")
    t.text(
        "Softmax and cross-entropy together have the simplest derivative there is: the probabilities, less 1 at the right "
        "class. What is too large is pushed down, the right class is pushed up.",
        "소프트맥스와 교차 엔트로피를 합치면 미분이 아주 간단해진다. 확률에서 정답 자리만 1을 뺀 것이다. 정답은 끌어올리고 "
        "나머지는 끌어내린다.",
    )
    t.number("backward/dlogits", fifth.upstream["y"], "dlogits = softmax(logits) − onehot(0)")
    t.text(
        "Dense layers: dW is the gradient of the output times the input (outer product), db the gradient of the output itself, "
        "and W transposed takes it to the layer before.",
        "Dense 층: dW는 출력의 기울기와 입력의 외적, db는 출력의 기울기 그대로이며, W의 전치를 곱하면 앞 층으로 넘어간다.",
    )
    t.number("gradients/W5", gradient["W5"], "dW5 = dlogits dense4ᵀ", "dW5")
    t.number("gradients/b5", gradient["b5"], "db5 = dlogits", "db5")
    t.number("backward/ddense4", fourth.upstream["y"], "ddense4 = W5ᵀ dlogits")
    t.number("gradients/W4", gradient["W4"], "dW4 = ddense4 flatten(conv2)ᵀ", "dW4")
    t.number("gradients/b4", gradient["b4"], "db4 = ddense4", "db4")
    t.text(
        "Flatten only rearranges, so its backward pass arranges back.",
        "Flatten은 모양만 바꾸므로 역전파도 모양을 되돌릴 뿐이다.",
    )
    t.number("backward/dconv2", second.upstream["y"][..., 0], "dconv2 = W4ᵀ ddense4, 2×2")
    t.text(
        "Convolutions: a kernel weight is used at every place, so its gradient is the sum over all places of (gradient there) "
        "× (image value under the weight). That is again a correlation, of the input with the gradient. The bias is added at "
        "every place, so its gradient is the sum.",
        "합성곱: 커널의 가중치 하나는 모든 자리에서 쓰인다. 그래서 그 기울기는 (그 자리의 기울기) × (가중치 아래에 놓였던 "
        "값)을 모든 자리에서 더한 것이다. 이것도 입력과 기울기의 상호상관이다. 편향은 모든 자리에 더해지므로 기울기도 모두 "
        "더한다.",
    )
    t.number("gradients/K2", gradient["K2"], "dK2 = conv1 ⋆ dconv2", "dK2")
    t.number("gradients/c2", gradient["c2"], "dc2 = Σ dconv2", "dc2")
    t.text(
        "And the gradient of the image: each pixel collects from all places that it took part in, through the kernel weight it "
        "met there. That is a correlation with the kernel turned by 180°, over a border of zeros.",
        "이미지의 기울기: 각 픽셀은 자기가 참여했던 모든 자리에서, 거기서 만난 커널 가중치를 거쳐 기울기를 모은다. 0으로 "
        "둘러싼 기울기와 180° 돌린 커널의 상호상관이다.",
    )
    t.number("backward/dconv1", first.upstream["y"][..., 0], "dconv1 = pad(dconv2) ⋆ rot180(K2)")
    t.number("gradients/K1", gradient["K1"], "dK1 = X ⋆ dconv1", "dK1")
    t.number("gradients/c1", gradient["c1"], "dc1 = Σ dconv1", "dc1")
    t.number("gradients/X", record.gradients[1], "dX = pad(dconv1) ⋆ rot180(K1)", "dX")
    names = {t.say("image X", "이미지 X"): X, t.say("gradient dX", "기울기 dX"): record.gradients[1]}
    t.picture(
        images(names, signed=list(names)[1:]),
        t.say("The image and its gradient: red where a brighter pixel would raise the loss, blue where it would lower it.",
              "이미지와 그 기울기. 빨간 곳은 밝아지면 손실이 커지고 파란 곳은 작아진다."),
    )  # fmt: skip
    t.agreement(record)
    t.section("The chain of one weight: K1[0, 0]", "가중치 하나의 연쇄: K1[0, 0]")
    t.text(
        "The first weight of the first kernel is used at nine places, each of which reaches both logits by several ways.",
        "첫 커널의 첫 가중치는 아홉 자리에서 쓰이고, 각 자리는 여러 길로 두 로짓에 이른다.",
    )
    chain_of(t, record, "K1[0, 0]", ("conv1", "conv2", "dense4", "logits", "J"))

    t.section("Update", "업데이트")
    t.formula("K := K − α ∂J/∂K", r"K := K - \alpha \frac{\partial J}{\partial K}")
    t.number("learning_rate", RATE, "α")
    updated = descend(weights, gradient, RATE)
    for name, value in updated.items():
        t.number(f"updated/{name}", value, f"{name} − {RATE} d{name}")
    t.number(
        "J_after_update", network(updated, X), t.say("J with the updated weights: smaller", "업데이트한 가중치의 J: 더 작다")
    )
    return t.finished(t.say("A convolutional network (seed 004)", "합성곱 신경망 (문서 004)"))
