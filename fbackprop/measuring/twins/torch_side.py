"""The models in PyTorch: its functions, images channels_last, weights in its layouts; eager or under ``torch.compile``."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fbackprop.measuring.rivals import Absent
from fbackprop.measuring.twins import Model, layers_of
from fbackprop.refusing import first_line

__all__ = ["TorchSide", "torch_side"]


class TorchSide(NamedTuple):
    """``step()`` trains once on the batch and returns the loss before it."""

    step: Callable[[], Any]
    name: str


def torch_side(model: Model, params: Any, batch: Any, rate: float, compiled: bool) -> TorchSide:
    """The model with these weights under plain SGD. Raises Absent where PyTorch is missing or does not compile here."""
    try:
        torch: Any = importlib.import_module("torch")
        F = importlib.import_module("torch.nn.functional")
    except Exception as error:
        raise Absent(f"torch does not import here ({type(error).__name__})") from None
    leaves = {
        key: _tensor(torch, value).requires_grad_(True) for key, value in _WEIGHTS[model.name](params, model.size).items()
    }
    x, y = (torch.from_numpy(np.array(a)) for a in batch)
    x = x.long() if model.tokens else x.permute(0, 3, 1, 2)  # images stay channels_last in memory
    y = y.long().reshape(-1)
    forward = _FORWARD[model.name]

    def loss() -> Any:
        logits = forward(torch, F, leaves, x, model.size)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y)

    run = torch.compile(loss) if compiled else loss
    values = list(leaves.values())

    def step() -> Any:
        value = run()
        gradients = torch.autograd.grad(value, values)
        with torch.no_grad():
            for p, g in zip(values, gradients):
                p.sub_(g, alpha=rate)
        return value.detach()

    if compiled:
        try:
            run()
        except Exception as error:
            raise Absent(f"torch.compile: {first_line(error)}") from None
    return TorchSide(step, f"torch {torch.__version__}")


def _tensor(torch: Any, value: Any) -> Any:
    made = torch.from_numpy(np.array(value, order="C"))  # a copy, which PyTorch may write to
    return made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made


def _image(kernel: Any) -> np.ndarray:
    return np.transpose(np.asarray(kernel), (3, 2, 0, 1))


def _matrix(kernel: Any) -> np.ndarray:
    return np.asarray(kernel).T


def _cnn_weights(params: Any, size: dict[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(layers_of(params)):
        found[f"w{i}"] = (_image if i < 2 else _matrix)(layer["kernel"])
        found[f"b{i}"] = np.asarray(layer["bias"])
    return found


def _cnn(torch: Any, F: Any, p: Any, x: Any, size: dict[str, Any]) -> Any:
    for i in range(2):
        x = F.max_pool2d(F.relu(F.conv2d(x, p[f"w{i}"], p[f"b{i}"], padding=1)), 2)
    x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
    return F.linear(F.relu(F.linear(x, p["w2"], p["b2"])), p["w3"], p["b3"])


def _gpt_weights(params: Any, size: dict[str, Any]) -> dict[str, np.ndarray]:
    found = {"embed": np.asarray(params["embed"]["embedding"]), "position": np.asarray(params["position"]["embedding"])}
    trees = {"norm": params["norm"]}
    for i, block in enumerate(params["blocks"]):
        trees |= {f"{i}.{name}": leaf for name, leaf in block.items()}
    for name, tree in trees.items():
        for leaf, value in tree.items():
            found[f"{name}.{leaf}"] = _matrix(value) if leaf == "kernel" else np.asarray(value)
    return found


def _gpt(torch: Any, F: Any, p: Any, x: Any, size: dict[str, Any]) -> Any:
    width, heads = size["width"], size["heads"]

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (width,), p[f"{name}.scale"], p[f"{name}.bias"], 1e-5)

    def dense(x: Any, name: str) -> Any:
        return F.linear(x, p[f"{name}.kernel"], p[f"{name}.bias"])

    b, t = x.shape
    x = F.embedding(x, p["embed"]) + p["position"][:t]
    for i in range(size["layers"]):
        q, k, v = (
            a.reshape(b, t, heads, -1).transpose(1, 2) for a in dense(norm(x, f"{i}.attention_norm"), f"{i}.qkv").chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + dense(attended, f"{i}.out")
        x = x + dense(F.gelu(dense(norm(x, f"{i}.mlp_norm"), f"{i}.up"), approximate="tanh"), f"{i}.down")
    return F.linear(norm(x, "norm"), p["embed"])


def _lstm_weights(params: Any, size: dict[str, Any]) -> dict[str, np.ndarray]:
    (layer,) = params["layers"]
    return {
        "embed": np.asarray(params["embed"]["embedding"]),
        "kernel": _matrix(layer["kernel"]),
        "recurrent_kernel": _matrix(layer["recurrent_kernel"]),
        "bias": np.asarray(layer["bias"]),
        "head": _matrix(params["head"]["kernel"]),
        "head_bias": np.asarray(params["head"]["bias"]),
    }


def _lstm(torch: Any, F: Any, p: Any, x: Any, size: dict[str, Any]) -> Any:
    x = F.embedding(x, p["embed"])
    zero = torch.zeros(1, x.shape[0], size["width"])
    weights = [p["kernel"], p["recurrent_kernel"], p["bias"], torch.zeros_like(p["bias"])]
    h = torch.lstm(x, (zero, zero), weights, True, 1, 0.0, True, False, True)[0]
    return F.linear(h, p["head"], p["head_bias"])


def _resnet_weights(params: Any, size: dict[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(layers_of(params)):
        for leaf, value in layer.items():
            made = np.asarray(value)
            found[f"{i}.{leaf}"] = _image(made) if made.ndim == 4 else _matrix(made) if made.ndim == 2 else made
    return found


def _resnet(torch: Any, F: Any, p: Any, x: Any, size: dict[str, Any]) -> Any:
    at = 0  # the layers are taken in order

    def conv_norm(x: Any, stride: int = 1) -> Any:
        nonlocal at
        kernel, scale, bias = p[f"{at}.kernel"], p[f"{at + 1}.scale"], p[f"{at + 1}.bias"]
        at += 2
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)
        mean, var = torch.zeros_like(scale), torch.ones_like(scale)  # updated beside the gradient, as elsewhere
        return F.batch_norm(x, mean.detach(), var.detach(), scale, bias, True, 0.1, 1e-5)

    x = F.relu(conv_norm(x))
    for stage, depth in enumerate(size["depths"]):
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            y = conv_norm(F.relu(conv_norm(x, stride)))
            x = F.relu(y + (conv_norm(x, stride) if x.shape != y.shape else x))
    return F.linear(x.mean((2, 3)), p[f"{at}.kernel"], p[f"{at}.bias"])


_WEIGHTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, np.ndarray]]] = {
    "cnn": _cnn_weights, "gpt": _gpt_weights, "lstm": _lstm_weights, "resnet": _resnet_weights,
}  # fmt: skip
_FORWARD: dict[str, Callable[..., Any]] = {"cnn": _cnn, "gpt": _gpt, "lstm": _lstm, "resnet": _resnet}
