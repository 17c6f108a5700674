"""PyTorch on the CPU as a rival: forward and backward of the same function, eager, with the same inputs.

Each array is brought into PyTorch's layout before the clock starts, and its gradient brought back for the comparison: images
are seen as NCHW with the features last in memory, kernels as (out, in, …), attention as (batch, heads, length, features).
"""

import importlib
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.measuring.problems import Problem
from fbackprop.measuring.rivals import Absent
from fbackprop.refusing import first_line

__all__ = ["PORTS", "Torch", "torch_of"]


class Torch(NamedTuple):
    """PyTorch's side of a problem."""

    run: Callable[[], Any]  # (outputs, gradients), of tensors
    gradients: Callable[[Any], list[np.ndarray]]  # of what run returned, in our layout
    residual_bytes: int
    name: str
    comparable: bool  # whether the same numbers are to be expected: not where a mask is drawn


class _Port(NamedTuple):
    """How an op is said in PyTorch: a function of torch, torch.nn.functional and our arguments by name."""

    call: Callable[..., Any]
    layout: Mapping[str, Callable[[int], tuple[int, ...]]] = {}  # the axes of an argument, or of y, in PyTorch's order
    comparable: bool = True


def torch_of(given: Problem) -> Torch:
    """The problem in PyTorch. Raises Absent where PyTorch or a port is missing, or the call is one that it does not know."""
    if given.rule.name not in PORTS:
        raise Absent("")
    try:
        torch: Any = importlib.import_module("torch")
        functional = importlib.import_module("torch.nn.functional")
    except Exception as error:
        raise Absent(f"torch does not import here ({type(error).__name__})") from None
    port = PORTS[given.rule.name]
    names = given.named()
    if len(set(names)) < len(names):
        raise Absent("torch has no port for arguments that are trees")

    def tensor(name: str, value: Any) -> Any:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return None
        value = np.array(value)  # a copy: PyTorch wants to own what it reads
        made = torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16) if value.dtype == "bfloat16" else None
        made = torch.from_numpy(value) if made is None else made
        made = made.long() if made.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8) else made
        if name not in port.layout:
            return made
        made = made.permute(port.layout[name](made.ndim))
        # Images stay as they lie in memory, which is PyTorch's channels_last; other arrays lie as PyTorch would lay them.
        return made if name in ("x", "inputs", "y") else made.contiguous()

    values = given.arguments(given.moved, given.rest)
    tensors: dict[str, Any] = {n: tensor(n, v) if isinstance(v, jax.Array) else v for n, v in values.items()}
    moving = [tensors[n].detach().requires_grad_(True) for n in names]
    arguments = SimpleNamespace(**{**tensors, **dict(zip(names, moving))})
    cotangent = tensor("y", given.dy[0])  # of the first output; those of further ones are zeros

    def run() -> Any:
        y = port.call(torch, functional, arguments)
        return y, torch.autograd.grad(y, moving, cotangent.to(y.dtype), allow_unused=True)

    kept: dict[int, int] = {}

    def pack(saved: Any) -> Any:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    def gradients(result: Any) -> list[np.ndarray]:
        back = []
        for name, argument, gradient in zip(names, moving, result[1]):
            gradient = torch.zeros_like(argument) if gradient is None else gradient
            axes = port.layout[name](gradient.ndim) if name in port.layout else range(gradient.ndim)
            back.append(np.transpose(gradient.float().numpy(), np.argsort(axes)))
        return back

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = port.call(torch, functional, arguments)
        if tuple(y.shape) != tuple(cotangent.shape):
            raise Absent(f"torch gives an array of another shape, {list(y.shape)}")
        run()
    except Absent:
        raise
    except Exception as error:
        raise Absent(f"torch: {first_line(error)}") from None
    return Torch(run, gradients, sum(kept.values()), f"torch {torch.__version__}", port.comparable)


# ---------------------------------------------------------------------------------------------------------------- ports


def _first(ndim: int) -> tuple[int, ...]:
    """[N, *space, C] -> [N, C, *space]."""
    return (0, ndim - 1, *range(1, ndim - 1))


def _kernel(ndim: int) -> tuple[int, ...]:
    """[*window, in, out] -> [out, in, *window]."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _kernel_transposed(ndim: int) -> tuple[int, ...]:
    """[*window, in, out] -> [in, out, *window]."""
    return (ndim - 2, ndim - 1, *range(ndim - 2))


def _heads(ndim: int) -> tuple[int, ...]:
    """[batch, length, heads, features] -> [batch, heads, length, features]."""
    return (0, 2, 1, 3)


def _only(options: SimpleNamespace, **expected: Any) -> None:
    """Refuses a call with options that a port does not know."""
    for name, value in expected.items():
        if getattr(options, name, value) not in (value, None, (value,)):
            raise Absent(f"torch has no port for {name}={getattr(options, name)!r}")


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _padded(functional: Any, x: Any, window: Any, strides: Any, padding: Any, value: float) -> Any:
    """x with the padding that JAX means by a word, where PyTorch would pad otherwise."""
    if padding == "VALID":
        return x
    space = tuple(x.shape[2:])
    if padding == "CAUSAL":
        pads = [(window[0] - 1, 0)]
    elif padding == "SAME":
        pads = [tuple(p) for p in jax.lax.padtype_to_pads(space, window, strides, padding)]
    else:
        raise Absent(f"torch has no port for padding={padding!r}")
    return functional.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def _conv(torch: Any, F: Any, a: Any) -> Any:
    dims = a.x.ndim - 2
    _only(a, input_dilation=1, kernel_dilation=1)
    strides, window = _each(a.strides, dims), tuple(a.kernel.shape[2:])
    x, inside = a.x, 0
    if a.padding == "SAME" and all(s == 1 for s in strides) and all(k % 2 for k in window):
        inside = tuple(k // 2 for k in window)
    else:
        x = _padded(F, x, window, strides, a.padding, 0.0)
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return function(x, a.kernel, a.bias, strides, inside, 1, a.feature_group_count)


def _conv_transpose(torch: Any, F: Any, a: Any) -> Any:
    dims = a.x.ndim - 2
    _only(a, kernel_dilation=1, transpose_kernel=False)
    strides, window = _each(a.strides, dims), tuple(a.kernel.shape[2:])
    surplus = [max(k - s, 0) if a.padding == "SAME" else 0 for k, s in zip(window, strides)]
    if a.padding not in ("SAME", "VALID") or any(n % 2 for n in surplus) or any(k < s for k, s in zip(window, strides)):
        raise Absent(f"torch has no port for padding={a.padding!r} of this window")
    kernel = torch.flip(a.kernel, tuple(range(2, 2 + dims)))
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    return function(a.x, kernel, getattr(a, "bias", None), strides, [n // 2 for n in surplus])


def _max_pool(torch: Any, F: Any, a: Any) -> Any:
    _only(a, window_dilation=1)
    window, strides = tuple(a.window_shape), tuple(a.strides or (1,) * len(a.window_shape))
    x = _padded(F, a.inputs, window, strides, a.padding, -math.inf)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1](x, window, strides)


def _avg_pool(torch: Any, F: Any, a: Any) -> Any:
    window, strides = tuple(a.window_shape), tuple(a.strides or (1,) * len(a.window_shape))
    if a.padding != "VALID":
        raise Absent(f"torch has no port for padding={a.padding!r}")
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1](a.inputs, window, strides)


def _attention(torch: Any, F: Any, a: Any) -> Any:
    _only(a, bias=None, mask=None, segment_ids=None, soft_cap=None, query_seq_lengths=None, local_window_size=None)
    grouped = a.query.shape[1] != a.key.shape[1]
    return F.scaled_dot_product_attention(
        a.query, a.key, a.value, is_causal=a.is_causal, scale=a.scale, enable_gqa=grouped
    )  # fmt: skip


def _batch_norm(torch: Any, F: Any, a: Any) -> Any:
    mean, var = (None if v is None else v.detach().clone() for v in (a.mean, a.var))
    return F.batch_norm(a.x, mean, var, a.scale, a.bias, a.train, 1 - a.momentum, a.epsilon)


def _layer_norm(torch: Any, F: Any, a: Any) -> Any:
    _only(a, axis=-1)
    return F.layer_norm(a.x, a.x.shape[-1:], a.scale, a.bias, a.epsilon)


def _rms_norm(torch: Any, F: Any, a: Any) -> Any:
    _only(a, axis=-1)
    return F.rms_norm(a.x, a.x.shape[-1:], a.scale, a.epsilon)


def _group_norm(torch: Any, F: Any, a: Any) -> Any:
    return F.group_norm(a.x, a.num_groups, a.scale, a.bias, a.epsilon)


def _norm_dense(torch: Any, F: Any, a: Any) -> Any:
    norm = (F.layer_norm, F.rms_norm)[a.norm == "rms"]
    extra = () if a.norm == "rms" else (a.norm_bias,)
    return F.linear(norm(a.x, a.x.shape[-1:], a.scale, *extra, eps=a.epsilon), a.kernel, a.bias)


def _integer_cross_entropy(torch: Any, F: Any, a: Any) -> Any:
    _only(a, axis=-1, where=None)
    return F.cross_entropy(a.logits, a.labels, reduction="none")


def _linear_cross_entropy(torch: Any, F: Any, a: Any) -> Any:
    _only(a, weights=None, soft_cap=None, z_loss=0.0, return_log_probs=False, return_entropy=False, transposed=False)
    logits = F.linear(a.x, a.kernel, a.bias)
    return F.cross_entropy(
        logits, a.labels, ignore_index=a.ignore_index, reduction=a.reduction, label_smoothing=a.label_smoothing
    )  # fmt: skip


def _lstm(torch: Any, F: Any, a: Any) -> Any:
    _only(a, lengths=None, reverse=False, segments=None)
    start = torch.zeros(2, a.x.shape[1], a.recurrent_kernel.shape[1], dtype=a.x.dtype) if a.carry is None else a.carry
    weights = [a.kernel, a.recurrent_kernel, a.bias, torch.zeros_like(a.bias)]
    return torch.lstm(a.x, (start[1:], start[:1]), weights, True, 1, 0.0, False, False, False)[0]  # (h, c) there


def _gru(torch: Any, F: Any, a: Any) -> Any:
    _only(a, lengths=None, reverse=False, segments=None)
    start = torch.zeros(a.x.shape[1], a.recurrent_kernel.shape[1], dtype=a.x.dtype) if a.carry is None else a.carry
    other = torch.zeros_like(a.bias)
    if a.recurrent_bias is not None:
        other = torch.cat([other[: 2 * len(a.recurrent_bias)], a.recurrent_bias])
    return torch.gru(a.x, start[None], [a.kernel, a.recurrent_kernel, a.bias, other], True, 1, 0.0, False, False, False)[0]


def _gelu(torch: Any, F: Any, a: Any) -> Any:
    return F.gelu(a.x, approximate="tanh" if a.approximate else "none")


def _gelu_mlp(torch: Any, F: Any, a: Any) -> Any:
    hidden = F.gelu(F.linear(a.x, a.up, a.up_bias), approximate="tanh" if a.approximate else "none")
    return F.linear(hidden, a.down, a.down_bias)


def _swiglu_mlp(torch: Any, F: Any, a: Any) -> Any:
    return F.linear(F.silu(F.linear(a.x, a.gate)) * F.linear(a.x, a.up), a.down)


def _soft_cross_entropy(torch: Any, F: Any, a: Any) -> Any:
    _only(a, axis=-1, where=None)
    return F.cross_entropy(a.logits, a.labels, reduction="none")


def _unary(name: str) -> _Port:
    return _Port(lambda torch, F, a: getattr(F, name)(a.x))


def _along(name: str) -> _Port:
    def call(torch: Any, F: Any, a: Any) -> Any:
        _only(a, where=None, b=None, return_sign=False)
        more = {"keepdim": a.keepdims} if hasattr(a, "keepdims") else {}
        return getattr(torch, name)(a.x if hasattr(a, "x") else a.a, dim=a.axis if a.axis is not None else (), **more)

    return _Port(call)


_MATRIX = {n: _kernel for n in ("kernel", "gate", "up", "down")}
_IMAGE = {"x": _first, "inputs": _first, "y": _first, "kernel": _kernel}

PORTS: dict[str, _Port] = {
    **{name: _unary(name) for name in ("relu", "relu6", "silu", "mish", "softplus", "sigmoid", "tanh", "selu", "hardswish")},
    "hard_tanh": _unary("hardtanh"),
    "soft_sign": _unary("softsign"),
    "log_sigmoid": _unary("logsigmoid"),
    "leaky_relu": _Port(lambda torch, F, a: F.leaky_relu(a.x, a.negative_slope)),
    "elu": _Port(lambda torch, F, a: F.elu(a.x, a.alpha)),
    "celu": _Port(lambda torch, F, a: F.celu(a.x, a.alpha)),
    "gelu": _Port(_gelu),
    "softmax": _along("softmax"),
    "log_softmax": _along("log_softmax"),
    "logsumexp": _along("logsumexp"),
    "dense": _Port(lambda torch, F, a: F.linear(a.x, a.kernel, a.bias), _MATRIX),
    "gelu_mlp": _Port(_gelu_mlp, _MATRIX),
    "swiglu_mlp": _Port(_swiglu_mlp, _MATRIX),
    "norm_dense": _Port(_norm_dense, _MATRIX),
    "lora_dense": _Port(lambda torch, F, a: F.linear(a.x, a.kernel, a.bias) + a.scale * (a.x @ a.a) @ a.b, _MATRIX),
    "embed": _Port(lambda torch, F, a: F.embedding(a.indices, a.embedding)),
    "dropout": _Port(lambda torch, F, a: F.dropout(a.x, a.rate, not a.deterministic), comparable=False),
    "layer_norm": _Port(_layer_norm),
    "rms_norm": _Port(_rms_norm),
    "group_norm": _Port(_group_norm, _IMAGE),
    "batch_norm": _Port(_batch_norm, _IMAGE),
    "max_pool": _Port(_max_pool, _IMAGE),
    "avg_pool": _Port(_avg_pool, _IMAGE),
    "conv": _Port(_conv, _IMAGE),
    "conv_transpose": _Port(_conv_transpose, {**_IMAGE, "kernel": _kernel_transposed}),
    "softmax_cross_entropy_with_integer_labels": _Port(_integer_cross_entropy),
    "softmax_cross_entropy": _Port(_soft_cross_entropy),
    "sigmoid_binary_cross_entropy": _Port(
        lambda torch, F, a: F.binary_cross_entropy_with_logits(a.logits, a.labels, reduction="none")
    ),
    "linear_cross_entropy": _Port(_linear_cross_entropy, _MATRIX),
    "dot_product_attention": _Port(_attention, dict.fromkeys(("query", "key", "value", "y"), _heads)),
    "lstm": _Port(_lstm, {"kernel": _kernel, "recurrent_kernel": _kernel}),
    "gru": _Port(_gru, {"kernel": _kernel, "recurrent_kernel": _kernel}),
}
