"""A real model on a handwritten digit that it has not seen: its prediction, its backward pass op by op, what the pixels did."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.alternatives import relevance
from fbackprop.explaining.blocks import Details, Heading, Picture
from fbackprop.explaining.presenting import explanation_blocks, kept_table
from fbackprop.explaining.presenting_chains import chain_blocks
from fbackprop.explaining.record import Explanation
from fbackprop.explaining.recording import explain
from fbackprop.explaining.walks.drawing import images
from fbackprop.explaining.walks.frame import Telling, Walk, descend
from fbackprop.files import read_json
from fbackprop.loading import Refusal
from fbackprop.ops import softmax, softmax_cross_entropy_with_integer_labels

__all__ = ["EPOCHS", "walk_model"]

EPOCHS = 2  # of the training where no run is given
RATE = 0.01  # of the update that is shown
_LARGEST = 8  # paths that are listed


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A model with its parameters, and where they come from, in both languages."""

    model: Any
    params: Any
    state: Any
    whence: tuple[str, str]


def walk_model(name: str, checkpoint: str | None, example: int, language: str) -> Walk:
    """Explains a preset on a digit that was held out.

    Args:
      name: a preset on digits. checkpoint: the folder of a run of it, None for a short training. example: which digit.
    Raises:
      Refusal, RunError: where there is no such digit, or no run of this preset that can be read.
    """
    from fbackprop.data import digits

    source = digits(images=name != "digits-mlp")
    if example >= len(source.test_y):
        raise Refusal(f"explain: --example {example} is too large; {len(source.test_y)} digits are held out, from 0.")
    trained = _trained(name, checkpoint)
    x, label = jnp.asarray(source.test_x[example : example + 1]), int(source.test_y[example])
    return _walk(name, trained, x, label, example, language)


def _trained(name: str, checkpoint: str | None) -> _Trained:
    from fbackprop.training import fit, init_train_state, make_optimizer
    from fbackprop.training.checkpoints import Checkpoints
    from fbackprop.training.presets import PRESETS

    preset = PRESETS[name]
    if checkpoint is None:
        task = preset.task(0)
        result = fit(
            task.loss_fn, make_optimizer(preset.optimizer, preset.rate(preset.lr, task.count // preset.batch)), task.params,
            task.examples, state=task.state, epochs=EPOCHS, batch_size=preset.batch, seed=0, progress=False,
        )  # fmt: skip
        right = task.evaluate(result.params, result.state)["test_accuracy"]
        return _Trained(task.model, result.params, result.state, (
            f"No run was given (--checkpoint DIR), so the model was trained just now, briefly: {EPOCHS} epochs, seed 0. It "
            f"gets {right:.1%} of the digits right that are held out.",
            f"학습 결과(--checkpoint DIR)를 주지 않았으므로 방금 짧게, {EPOCHS} 에포크만 학습시킨 모델이다(시드 0). 학습에 "
            f"쓰지 않은 숫자의 {right:.1%}를 맞힌다.",
        ))  # fmt: skip
    directory = pathlib.Path(checkpoint)
    config = read_json(directory / "config.json")
    if config is None or not {"preset", "optimizer", "lr", "seed", "dtype"} <= set(config):
        raise Refusal(f"explain: {directory} holds no run (there is no config.json of one that can be read).")
    if config["preset"] != name:
        raise Refusal(f"explain: {directory} holds a run of {config['preset']}, not of {name}.")
    with jax.enable_x64(config["dtype"] == "float64"):
        task = preset.task(config["seed"])
        wide = np.float64 if config["dtype"] == "float64" else np.float32
        params, state = jax.tree.map(lambda leaf: np.asarray(leaf, wide), (task.params, task.state))
        like = init_train_state(params, make_optimizer(config["optimizer"], preset.rate(config["lr"], 1)), state=state)
        checkpoints = Checkpoints(directory / "checkpoints")
        try:
            found = checkpoints.restore(like)
        finally:
            checkpoints.close()
        params, state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (found.params, found.state))
    right = task.evaluate(params, state)["test_accuracy"]
    return _Trained(task.model, params, state, (
        f"The parameters are those of {directory}, after {int(found.step)} steps. It gets {right:.1%} of the digits right that "
        "are held out.",
        f"파라미터는 {directory}에서 {int(found.step)}단계까지 학습한 것이다. 학습에 쓰지 않은 숫자의 {right:.1%}를 맞힌다.",
    ))  # fmt: skip


def _walk(name: str, trained: _Trained, x: jax.Array, label: int, example: int, language: str) -> Walk:
    t = Telling(name, language)
    model, params, state = trained.model, trained.params, trained.state

    def loss_of_digit(params: Any, x: Any) -> Any:
        logits = model(params, x, state)
        return softmax_cross_entropy_with_integer_labels(logits, jnp.full(1, label)).mean()

    record = explain(loss_of_digit, params, x)
    logits = record.steps[-1].inputs["logits"][0]
    probabilities = softmax(logits)
    guess = int(jnp.argmax(logits))
    picture = _image(x)
    told = explanation_blocks(record, language)
    folds = {d.anchor: d for d in told if isinstance(d, Details)}

    t.section("The model and the digit", "모델과 숫자")
    t.text(*trained.whence)
    right = guess == label
    t.text(
        f"Held-out digit number {example}; it is the digit {label}. The model says {guess}, with probability "
        f"{float(probabilities[guess]):.3g}"
        + (": right." if right else f"; it gives the {label} a probability of {float(probabilities[label]):.3g}: wrong."),
        f"학습에 쓰지 않은 {example}번째 숫자이며 정답은 {label}이다. 모델의 답은 {guess}, 확률은 "
        f"{float(probabilities[guess]):.3g}"
        + ("로 맞았다." if right else f"이고, 정답 {label}에는 확률 {float(probabilities[label]):.3g}을 주었다. 틀렸다."),
    )  # fmt: skip
    t.picture(images({t.say("the digit", "숫자"): picture}, signed=()), t.say(f"The digit {label}.", f"숫자 {label}."))
    columns = t.say("class|logit|probability", "클래스|로짓|확률").split("|")
    t.table(columns, [(i, float(z), float(p)) for i, (z, p) in enumerate(zip(logits, probabilities))])
    for key, value in (("example", example), ("label", label), ("prediction", guess), ("logits", logits)):
        t.keep(key, value)
    t.keep("probabilities", probabilities)

    t.section("Forward, op by op", "순전파: 연산을 하나씩")
    t.text(
        "The forward pass comes first: the derivatives are made of its values, which are kept until the backward pass has used "
        "them.",
        "순전파가 먼저이다. 미분은 순전파의 값으로 이루어지며, 그 값은 역전파가 쓸 때까지 남겨 둔다.",
    )
    t.add(*(d for anchor, d in folds.items() if anchor.startswith("forward")))
    t.add(kept_table(record, language), *(block for block in told if isinstance(block, Picture)))

    t.section("Loss", "손실")
    t.formula("L = −log p(right class)", r"L = -\log p_{\text{label}}")
    t.number("loss", record.output, f"L = −log {float(probabilities[label]):.6g}")

    t.section("Backward, op by op", "역전파: 연산을 하나씩")
    t.text(
        "What arrives at each op, what it hands on to the op before, and the gradients of its parameters, as norms. The gain "
        "is handed on over arriving: below 1 the gradient shrinks, above 1 it grows.",
        "각 연산에 도착한 기울기, 앞 연산에 넘겨준 기울기, 파라미터의 기울기를 크기(노름)로 보인다. 이득은 넘겨준 것을 도착한 "
        "것으로 나눈 값으로, 1보다 작으면 기울기가 줄고 크면 커진다.",
    )
    _gains(t, record)
    t.add(*(d for anchor, d in folds.items() if anchor.startswith("backward")))
    t.agreement(record)
    _chain(t, record)
    _attributions(t, record, trained, x, picture, guess)
    _update(t, record, loss_of_digit, params, x)
    return t.finished(t.say(f"{name} on a handwritten {label}", f"손글씨 숫자 {label}: {name}"))


def _image(x: Any) -> np.ndarray:
    """The pixels of one digit, 8×8."""
    return np.asarray(x, np.float32).reshape(8, 8)


def _norm(*arrays: Any) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(np.asarray(a, np.float64)))) for a in arrays)))


def _gains(t: Telling, record: Explanation) -> None:
    """A row for each op, from the loss back."""
    rows, parameters = [], {leaf.label for leaf in record.leaves if leaf.argument == 0}
    for step in reversed(record.steps):
        arriving = _norm(*(d for d in step.upstream.values() if d is not None))
        owns = {name for name, source in step.sources if not source.steps and parameters.issuperset(source.leaves)}
        data = [d for name, d in step.cotangents.items() if d is not None and name not in owns]
        own = [d for name, d in step.cotangents.items() if d is not None and name in owns]
        handed = _norm(*data)
        rows.append((f"{step.index}. {step.op}", step.layer, arriving, handed, handed / arriving if arriving else 0.0,
                     _norm(*own) if own else ""))  # fmt: skip
    names = t.say("op|layer|arrives|handed on|gain|gradient of parameters", "연산|층|도착|넘겨줌|이득|파라미터의 기울기")
    t.table(names.split("|"), rows)
    t.keep("gain", [row[4] for row in rows])


def _chain(t: Telling, record: Explanation) -> None:
    """The chain of the weight of the first kernel that has the largest gradient."""
    leaf = next(leaf for leaf in record.leaves if leaf.argument == 0 and leaf.path.endswith("kernel"))
    assert leaf.gradient is not None
    gradient = np.asarray(record.values[leaf.gradient])
    index = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
    place = f"{leaf.label}[{', '.join(map(str, map(int, index)))}]"
    chain = record.chain(place, largest=_LARGEST)
    t.section(f"The chain of one weight: {place}", f"가중치 하나의 연쇄: {place}")
    t.text("The weight of the first layer with the largest gradient.", "첫 층에서 기울기가 가장 큰 가중치이다.")
    t.number("chain/gradient", np.float32(chain.gradient), f"∂L/∂{place}", t.say("its gradient", "기울기"))
    t.number("chain/total", np.float32(chain.total), "Σ", t.say("sum over all paths", "모든 경로의 합"))
    t.add(*(block for block in chain_blocks(chain, t.language) if not isinstance(block, Heading)))
    for key, value in (("place", index), ("paths", [path.product for path in chain.paths])):
        t.keep(f"chain/{key}", value)


def _attributions(t: Telling, record: Explanation, trained: _Trained, x: Any, picture: np.ndarray, guess: int) -> None:
    t.section("What the pixels did", "픽셀이 한 일")
    gradient = _image(record.gradients[1])
    shared = relevance(trained.model, trained.params, x, guess, state=trained.state)
    pictures = {
        t.say("the digit", "숫자"): picture,
        t.say("gradient dL/dx", "기울기 dL/dx"): gradient,
        t.say("gradient × pixel", "기울기 × 픽셀"): gradient * picture,
        "LRP-0": _image(shared.input),
    }
    names = list(pictures)
    t.text(
        "The gradient says where a change of a pixel would change the loss: red raises it, blue lowers it. It is large also "
        "where a pixel is empty. Times the pixel it tells what the present ink does, to first order. LRP-0 answers another "
        f"question: how much of the score of class {guess} each pixel contributed. It is no gradient, and what is shared out "
        "adds up.",
        "기울기는 픽셀을 바꾸면 손실이 어떻게 바뀌는지를 말한다. 빨강은 커지고 파랑은 작아진다. 빈 픽셀에서도 클 수 있다. "
        f"여기에 픽셀 값을 곱하면 지금 있는 획의 몫을 일차로 나타낸다. LRP-0은 다른 물음, 곧 클래스 {guess}의 점수 가운데 각 "
        "픽셀의 몫이 얼마인가에 답한다. 기울기가 아니며, 나눈 몫을 다시 더하면 원래 값이 된다.",
    )
    t.picture(
        images(pictures, signed=names[1:]),
        t.say("The digit; the gradient of the loss; gradient times pixel; relevance by LRP-0. Red above zero, blue below.",
              "숫자, 손실의 기울기, 기울기 × 픽셀, LRP-0의 관련도. 양수는 빨강, 음수는 파랑."),
    )  # fmt: skip
    t.number("attribution/gradient", gradient, "dL/dx", t.say("gradient", "기울기"))
    t.number("attribution/relevance", _image(shared.input), "LRP-0", t.say("relevance", "관련도"))
    output, pixels, bias, lost = (float(jnp.sum(v)) for v in (shared.output, shared.input, shared.bias, shared.lost))
    rows = [(t.say("score of the class", "클래스의 점수"), output), (t.say("pixels", "픽셀"), pixels),
            (t.say("biases and means", "편향과 평균"), bias), (t.say("lost", "사라진 것"), lost)]  # fmt: skip
    t.table(t.say("relevance|sum", "관련도|합").split("|"), rows)
    for key, value in (("score", output), ("pixels", pixels), ("biases", bias), ("lost", lost)):
        t.keep(f"attribution/{key}", value)


def _update(t: Telling, record: Explanation, loss: Any, params: Any, x: Any) -> None:
    t.section("Update", "업데이트")
    t.formula("w := w − α ∂L/∂w", r"w := w - \alpha \frac{\partial L}{\partial w}")
    t.text(
        f"One step of gradient descent on this digit alone, with a rate of {RATE}; nothing is written back.",
        f"이 숫자 하나로, 학습률 {RATE}로 경사 하강법을 한 번 해 본다. 저장된 파라미터는 바뀌지 않는다.",
    )
    after = loss(descend(params, record.gradients[0], RATE), x)
    name = t.say("loss after the step", "업데이트 뒤의 손실")
    t.number("after_update/loss", after, t.say("L with the new parameters", "새 파라미터의 L"), name)
