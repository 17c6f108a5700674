"""Weights of GPT-2 and Llama in Hugging Face's names: a forward in NumPy from the same tensors, files, trees, sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbackprop.models import from_huggingface, gpt

safetensors = pytest.importorskip("safetensors.numpy")

GPT2 = gpt(11, 2, 8, 2, 6)
LLAMA = gpt(11, 2, 8, 4, 6, modern=True, kv_heads=2, hidden=12)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def tensors(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(0.2, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def gpt2():
    shapes = {"wte.weight": (11, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    parts = {
        "attn.c_attn": (8, 24),
        "attn.c_proj": (8, 8),
        "mlp.c_fc": (8, 32),
        "mlp.c_proj": (32, 8),
        "ln_1": (8,),
        "ln_2": (8,),
    }
    for i in range(2):
        for part, shape in parts.items():
            shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[-1:]}
    return tensors(shapes)


def llama():
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    parts = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
             "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12), "input_layernorm": (8,),
             "post_attention_layernorm": (8,)}  # fmt: skip
    return tensors(shapes | {f"model.layers.{i}.{part}.weight": shape for i in range(2) for part, shape in parts.items()})


def attention(q, k, v):
    """[t, heads, features] each, causal."""
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        own = head // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            z = k[: i + 1, own] @ q[i, head] / np.sqrt(q.shape[-1])
            w = np.exp(z - z.max())
            out[i, head] = w / w.sum() @ v[: i + 1, own]
    return out.reshape(len(q), -1)


def numpy_gpt2(w, tokens):
    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(2):
        q, k, v = (part.reshape(-1, 2, 4) for part in np.split(dense(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x)), 3, -1))
        x = x + dense(f"h.{i}.attn.c_proj", attention(q, k, v))
        h = dense(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x))
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + dense(f"h.{i}.mlp.c_proj", h)
    return norm("ln_f", x) @ w["wte.weight"].T


def numpy_llama(w, tokens):
    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"model.{name}.weight"]

    def turned(x):  # one feature and another: here a head has two
        angle = np.arange(len(x))[:, None]
        a, b = x[..., 0], x[..., 1]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(2):
        y, own = norm(f"layers.{i}.input_layernorm", x), f"model.layers.{i}"
        q, k, v = ((y @ w[f"{own}.self_attn.{n}_proj.weight"].T).reshape(len(x), -1, 2) for n in "qkv")
        x = x + attention(turned(q), turned(k), v) @ w[f"{own}.self_attn.o_proj.weight"].T
        y = norm(f"layers.{i}.post_attention_layernorm", x)
        gate, up = (y @ w[f"{own}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{own}.mlp.down_proj.weight"].T
    return norm("norm", x) @ w["lm_head.weight"].T


CASES = {"gpt2": (GPT2, gpt2, numpy_gpt2), "llama": (LLAMA, llama, numpy_llama)}


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_logits_of_numpy(tmp_path, name):
    model, make, forward = CASES[name]
    weights = make()
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    params = from_huggingface(model, tmp_path / "model.safetensors")
    expected = np.stack([forward(weights, tokens) for tokens in TOKENS])
    np.testing.assert_allclose(jax.jit(model)(params, TOKENS), expected, rtol=1e-4, atol=1e-4)
    # In parts, in a folder; names with and without their first part; the model unrolled.
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    (tmp_path / "parts").mkdir()
    for i, half in enumerate(halves):
        prefix = "transformer." if name == "gpt2" else ""
        safetensors.save_file({prefix + key: value for key, value in half.items()}, tmp_path / f"parts/{i}.safetensors")
    again = from_huggingface(model, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_model_may_be_unrolled_tied_or_narrow(tmp_path):
    weights = llama()
    flat = gpt(11, 2, 8, 4, 6, modern=True, kv_heads=2, hidden=12, scan=False, tied=True, param_dtype=jnp.bfloat16)
    params = from_huggingface(flat, weights)  # lm_head is left aside
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(flat.init, jax.random.key(0), TOKENS)[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    narrow = {name: np.asarray(jnp.asarray(tensor, jnp.bfloat16)) for name, tensor in weights.items()}
    safetensors.save_file(narrow, tmp_path / "narrow.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, from_huggingface(flat, tmp_path / "narrow.safetensors"))


def nested(weights, kernels):
    """The same model as Flax's tree: kernels transposed."""
    tree: dict = {}
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        if leaf == "weight" and tensor.ndim == 2 and not path[-1].startswith(("wte", "wpe", "embed")):
            place["kernel"] = tensor.T
        elif leaf == "weight" and tensor.ndim == 2:
            place["embedding"] = tensor
        else:
            place["scale" if leaf == "weight" and kernels else leaf] = tensor
    return tree


@pytest.mark.parametrize("name", CASES)
def test_flax_s_tree_of_the_same_model(name):
    model, make, _ = CASES[name]
    weights = make()
    tree = nested(weights, name == "gpt2")
    tree = {"transformer": tree} if name == "gpt2" else tree
    for given in (tree, {"params": tree}):
        jax.tree.map(np.testing.assert_array_equal, from_huggingface(model, given), from_huggingface(model, weights))


def test_buffers_are_left_aside():
    weights = gpt2()
    more = {**weights, "h.0.attn.bias": np.ones((1, 1, 6, 6)), "h.1.attn.masked_bias": np.ones(())}
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(GPT2, more), from_huggingface(GPT2, weights))


def test_sentences(tmp_path):
    weights = gpt2()
    for changed, says in (
        ({k: v for k, v in weights.items() if "h.1" not in k}, "the mapping has no tensor h.1.ln_1.weight and 11 more"),
        ({**weights, "h.2.ln_1.weight": np.ones(8)}, "has the tensor h.2.ln_1.weight, for which GPT"),
        ({**weights, "wte.weight": np.ones((12, 8))}, r"wte.weight has shape \(12, 8\), expected \(11, 8\)"),
        (llama(), "has no tensor wte.weight"),
    ):
        with pytest.raises(ValueError, match=says):
            from_huggingface(GPT2, changed)
    with pytest.raises(ValueError, match=r"neither of GPT-2's form, .* nor of Llama's"):
        from_huggingface(gpt(11, 2, 8, 2, 6, norm="rms"), weights)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for path, says in (
        (tmp_path / "bad.safetensors", "this is not a safetensors file"),
        (tmp_path / "none.safetensors", "there is no such file"),
        (tmp_path.parent / "nowhere", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=says):
            from_huggingface(GPT2, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no .*safetensors file in this folder"):
        from_huggingface(GPT2, tmp_path / "empty")
