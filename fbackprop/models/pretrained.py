"""Weights of GPT-2 and Llama, under the names that Hugging Face gave them, as parameters of ``gpt``.

    ours                            GPT-2                       Llama (kernels transposed: they are stored (out, in))
    embed.embedding                 wte.weight                  embed_tokens.weight
    position.embedding              wpe.weight
    blocks.i.attention_norm         h.i.ln_1                    layers.i.input_layernorm
    blocks.i.qkv                    h.i.attn.c_attn             layers.i.self_attn.q_proj, k_proj, v_proj side by side
    blocks.i.out                    h.i.attn.c_proj             layers.i.self_attn.o_proj
    blocks.i.mlp_norm               h.i.ln_2                    layers.i.post_attention_layernorm
    blocks.i.gate                                               layers.i.mlp.gate_proj
    blocks.i.up                     h.i.mlp.c_fc                layers.i.mlp.up_proj
    blocks.i.down                   h.i.mlp.c_proj              layers.i.mlp.down_proj
    norm                            ln_f                        norm
    head.kernel, if not tied                                    lm_head.weight

A first part ``transformer.`` or ``model.`` of a name is left out. ``weight`` is our kernel, scale or embedding, ``bias`` our
bias. In Flax's trees of the same models ``kernel`` is the transposed ``weight``, ``scale`` and ``embedding`` are it itself.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.layers.base import Params
from fbackprop.models.gpt import GPT

__all__ = ["from_huggingface"]

# What the files hold besides parameters: masks, tables of angles.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

Entry = tuple[str, tuple[int, ...]]  # the name of a tensor and its shape
Read = Callable[[str], Any]


def from_huggingface(model: GPT, source: str | pathlib.Path | Mapping[str, Any]) -> Params:
    """The parameters of ``model``, out of weights of GPT-2 or Llama in Hugging Face's names and layouts.

    Args:
      model: of the form of GPT-2 or of Llama, of the same size as the weights.
      source: a ``*.safetensors`` file, or a folder of them; or a mapping from names to arrays, or Flax's nested dict of the
        same model. Files are read one tensor at a time.
    Returns:
      Parameters of the structure that ``model.init`` gives, in its ``param_dtype``.
    Raises:
      ValueError: where a tensor is missing, of another shape, or has no place in the model, where the file cannot be read, or
        the model is neither of GPT-2's form nor of Llama's. ImportError: where the package safetensors is missing.
    """
    with _opened(source) as (where, names, read):
        entries = _entries(model)
        if "lm_head.weight" in names and model.tied:
            names = [name for name in names if name != "lm_head.weight"]  # the table once more
        _require(where, model, names, [name for own in entries.values() for name, _ in own])
        found = {target: _gathered(where, read, own, model) for target, own in entries.items()}
    params: Params = {}
    for target, array in found.items():
        *path, leaf = target.split(".")
        place = params
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = array
    blocks = tuple(params["blocks"][str(i)] for i in range(model.layers))
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks) if model.scan else blocks
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, model.param_dtype), params)


def _entries(model: GPT) -> dict[str, list[Entry]]:
    """For each of our leaves, the tensors it is made of: the name, and the shape in the file."""
    width, hidden, head = model.width, model._hidden, model._head_width
    form = (model.positions, model.norm, model.mlp, model.use_bias)
    entries: dict[str, list[Entry]] = {}
    if form == ("learned", "layer", "gelu", True) and model.tied and model._key_heads == model.heads:
        names = {"attention_norm": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "mlp_norm": "ln_2", "up": "mlp.c_fc",
                 "down": "mlp.c_proj"}  # fmt: skip
        shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, hidden), "down": (hidden, width)}
        entries |= {"embed.embedding": [("wte.weight", (model.vocabulary, width))]}
        entries |= {"position.embedding": [("wpe.weight", (model.length, width))]}
        for i in range(model.layers):
            for ours, theirs in names.items():
                shape, leaf = shapes.get(ours, (width,)), "kernel" if ours in shapes else "scale"
                entries[f"blocks.{i}.{ours}.{leaf}"] = [(f"h.{i}.{theirs}.weight", shape)]
                entries[f"blocks.{i}.{ours}.bias"] = [(f"h.{i}.{theirs}.bias", shape[-1:])]
        entries |= {"norm.scale": [("ln_f.weight", (width,))], "norm.bias": [("ln_f.bias", (width,))]}
        return entries
    if form != ("rope", "rms", "swiglu", False):
        raise ValueError(
            f"from_huggingface: the model is neither of GPT-2's form, gpt(…), nor of Llama's, gpt(…, modern=True): {model!r}."
        )
    keys = model._key_heads * head
    dense = {
        "qkv": [("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (keys, width)), ("self_attn.v_proj", (keys, width))],
        "out": [("self_attn.o_proj", (width, width))],
        "gate": [("mlp.gate_proj", (hidden, width))],
        "up": [("mlp.up_proj", (hidden, width))],
        "down": [("mlp.down_proj", (width, hidden))],
    }
    entries |= {"embed.embedding": [("embed_tokens.weight", (model.vocabulary, width))]}
    for i in range(model.layers):
        for ours, parts in dense.items():
            entries[f"blocks.{i}.{ours}.kernel"] = [(f"layers.{i}.{name}.weight", shape) for name, shape in parts]
        for ours, theirs in {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
            entries[f"blocks.{i}.{ours}.scale"] = [(f"layers.{i}.{theirs}.weight", (width,))]
    entries |= {"norm.scale": [("norm.weight", (width,))]}
    return entries | ({} if model.tied else {"head.kernel": [("lm_head.weight", (model.vocabulary, width))]})


def _gathered(where: str, read: Read, entries: list[Entry], model: GPT) -> np.ndarray:
    parts = []
    for name, shape in entries:
        tensor = np.asarray(read(name))
        if tensor.shape != shape:
            raise ValueError(f"from_huggingface: {where}: {name} has shape {tensor.shape}, expected {shape} (model {model!r}).")
        outer = model.positions == "rope" and tensor.ndim == 2 and not name.startswith("embed")
        parts.append(tensor.T if outer else tensor)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


def _require(where: str, model: GPT, names: list[str], wanted: list[str]) -> None:
    given, expected = set(names), set(wanted)
    if missing := [name for name in wanted if name not in given]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"from_huggingface: {where} has no tensor {missing[0]}{more} (model {model!r}).")
    if extra := [name for name in names if name not in expected and not name.endswith(_BUFFERS)]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"from_huggingface: {where} has the tensor {extra[0]}{more}, for which {model!r} has no place.")


# Sources.


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[tuple[str, list[str], Read]]:
    """What it is called, the names of its tensors, and how one is read."""
    if isinstance(source, Mapping):
        tensors = _flattened(source)
        yield "the mapping", list(tensors), lambda name: tensors[name]()
        return
    path = pathlib.Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        what = "there is no *.safetensors file in this folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"from_huggingface: {path}: {what}.")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "from_huggingface: reading *.safetensors needs the package safetensors; pip install safetensors."
        ) from error
    with contextlib.ExitStack() as stack:
        readers: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"from_huggingface: {file}: this is not a safetensors file ({error}).") from None
            readers |= {_plain(name): (opened, name) for name in opened.keys()}  # noqa: SIM118
        yield str(path), list(readers), lambda name: readers[name][0].get_tensor(readers[name][1])


def _flattened(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> dict[str, Callable[[], Any]]:
    """Tensors by their names in Hugging Face's files; of a nested dict of Flax's, by the way there."""
    found: dict[str, Callable[[], Any]] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flattened(value, (*path, str(key)))
            continue
        *above, leaf = ".".join((*path, str(key))).split(".")
        name = ".".join([*above, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])
        found[_plain(name)] = lambda value=value, leaf=leaf: np.asarray(value).T if leaf == "kernel" else value
    return found


def _plain(name: str) -> str:
    return name.removeprefix("params.").removeprefix("transformer.").removeprefix("model.")
