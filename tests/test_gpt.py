"""GPT: values of plain jax.nn code with the same weights, gradients of the definitions, scan, cache, memory, sentences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop.measuring import saved_bytes
from fbackprop.models import gpt, named, stack_blocks, unstack_blocks
from fbackprop.models.gpt import _rates

# These programs run once: what counts is how fast they compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SIZE = {"vocabulary": 13, "layers": 2, "width": 8, "heads": 4, "length": 9}
FORMS = {"gpt2": {}, "llama": {"modern": True, "kv_heads": 2}}
ONE_FORM = ["llama", pytest.param("gpt2", marks=pytest.mark.slow)]
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 12, 0]])
TARGETS = jnp.roll(TOKENS, -1, 1).at[:, -1].set(-100)


def make(form, **options):
    """A model, and parameters none of which is zero or one."""
    model = gpt(**SIZE, **{**FORMS[form], **options})
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(0.3, 0.3, s.shape), s.dtype), shapes)


def plain(params, tokens, llama):
    """The same model from jax.nn and jnp alone, one block after the other."""
    x = params["embed"]["embedding"][tokens]
    t = tokens.shape[1]
    if not llama:
        x = x + params["position"]["embedding"][None, :t]

    def norm(p, x):
        if not llama:
            return jax.nn.standardize(x, epsilon=1e-5) * p["scale"][None, None] + p["bias"][None, None]
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["scale"][None, None]

    def dense(p, x):
        return x @ p["kernel"] if llama else x @ p["kernel"] + p["bias"][None, None]

    def turn(x):  # features i and i + 1 of a head of 2 are a complex number; of H, i and i + H/2
        half = x.shape[-1] // 2
        angle = jnp.arange(t)[:, None] * 10000.0 ** (-jnp.arange(half) / half)[None]
        z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)[None, :, None]
        return jnp.concatenate([z.real, z.imag], -1)

    for i in range(2):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        heads = dense(p["qkv"], norm(p["attention_norm"], x)).reshape(*x.shape[:2], -1, 2)
        q, k, v = jnp.split(heads, [4, 6] if llama else 3, -2)
        if llama:
            q, k = turn(q), turn(k)
        x = x + dense(p["out"], jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        y = norm(p["mlp_norm"], x)
        hidden = jax.nn.silu(dense(p["gate"], y)) * dense(p["up"], y) if llama else jax.nn.gelu(dense(p["up"], y))
        x = x + dense(p["down"], hidden)
    x = norm(params["norm"], x)
    return x @ params["head"]["kernel"] if llama else x @ params["embed"]["embedding"].T


def cross_entropy(logits):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(TARGETS, 0))
    return jnp.sum(losses * (TARGETS >= 0)) / jnp.sum(TARGETS >= 0)


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradient_are_those_of_plain_code(form):
    with jax.enable_x64(True):
        model, params = make(form, param_dtype=jnp.float64)
        llama = form == "llama"
        # Angles are in float32.
        expected = jit(plain, static_argnums=2)(params, TOKENS, llama)
        np.testing.assert_allclose(jit(model)(params, TOKENS), expected, rtol=1e-5, atol=1e-5)
        ours = jit(jax.value_and_grad(model.loss))(params, TOKENS, TARGETS)
        np.testing.assert_allclose(ours[0], cross_entropy(expected), rtol=1e-5)
        twin = jit(jax.value_and_grad(fb.without_rules(model.loss)))(params, TOKENS, TARGETS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), ours, twin)


@pytest.mark.parametrize("form", ONE_FORM)
def test_scanned_unrolled_and_checkpointed_are_one_function(form):
    model, params = make(form)
    other = gpt(**SIZE, **FORMS[form], scan=False, checkpoint="full")
    flat = unstack_blocks(params)
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(flat), params)
    ours = jit(jax.value_and_grad(model.loss))(params, TOKENS, TARGETS)
    loss, gradient = jit(jax.value_and_grad(other.loss))(flat, TOKENS, TARGETS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, (loss, stack_blocks(gradient)))


@pytest.mark.slow
def test_scanned_and_unrolled_begin_alike():
    fresh = [jit(make("llama", scan=scan)[0].init)(jax.random.key(3), TOKENS) for scan in (True, False)]
    assert fresh[0][1] == ()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fresh[0][0], stack_blocks(fresh[1][0]))
    assert np.std(fresh[0][0]["blocks"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("form", ONE_FORM)
def test_token_by_token_with_a_cache_is_the_whole_sequence_at_once(form):
    model, params = make(form, scan=form == "gpt2")
    logits = jit(model)(params, TOKENS)
    extend = jit(model.extend)
    found, cache = extend(params, TOKENS[:, :4], model.start(2))
    np.testing.assert_allclose(found, logits[:, 3], rtol=1e-5, atol=1e-5)
    for i in range(4, 7):
        found, cache = extend(params, TOKENS[:, i : i + 1], cache)
        np.testing.assert_allclose(found, logits[:, i], rtol=1e-5, atol=1e-5)
    assert int(cache["tokens"]) == 7


def test_later_tokens_change_nothing_before():
    model, params = make("llama")
    run = jit(model)
    a, b = run(params, TOKENS), run(params, TOKENS.at[:, 4].add(1))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert (np.asarray(a[:, 4:]) != np.asarray(b[:, 4:])).any(-1).all()


def test_by_hand():
    model, params = make("gpt2")
    y, tape = jit(model.forward)(params, TOKENS)
    dparams, dx = jit(model.backward)(tape, jnp.cos(y))
    assert dx is None
    wanted = jit(jax.grad(lambda p: jnp.sum(jnp.sin(model(p, TOKENS)))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), dparams, wanted)
    with pytest.raises(ValueError, match=r"GPT.backward: dy has shape \(2, 7\), y had \(2, 7, 13\)"):
        model.backward(tape, y[..., 0])
    with pytest.raises(TypeError, match=r"expected the tape of GPT\.forward, got a tuple"):
        model.backward((), y)


@pytest.mark.parametrize("form", ONE_FORM)
def test_bfloat16_computes_narrow_and_keeps_wide(form):
    model, params = make(form, dtype="bfloat16")
    loss, gradient = jit(jax.value_and_grad(model.loss))(params, TOKENS, TARGETS)
    exact = jit(make(form)[0].loss)(params, TOKENS, TARGETS)
    assert loss.dtype == jnp.float32
    assert loss != exact
    np.testing.assert_allclose(loss, exact, rtol=5e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model, params, TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_block_keeps_each_array_once(form):
    """In bfloat16: x, q, k, v, what attention gave and the projection after it, the pre-activations; in float32 two numbers for
    each query and head, and one for each row and norm. Counted is what one block more keeps."""
    tokens = jnp.zeros((4, 64), jnp.int32)
    kept = []
    for layers in (2, 3):
        size = {"vocabulary": 100, "layers": layers, "width": 128, "heads": 4, "length": 64}
        model = gpt(**size, **FORMS[form], hidden=512, dtype="bfloat16", attention="xla")
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)[0]
        weights = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
        loss = functools.partial(model.loss, tokens=tokens, targets=tokens)
        leaves, tree = jax.tree.flatten(params)
        kept.append(saved_bytes(lambda *leaves: loss(tree.unflatten(leaves)), *leaves) - weights)
    keys = 2 if form == "llama" else 4
    features = 2 * 128 + (128 + 2 * keys * 32) + 128 + (2 if form == "llama" else 1) * 512
    assert kept[1] - kept[0] <= 4 * 64 * (2 * features + 4 * (2 * 4 + 2))


def test_named_sizes():
    for name, count in (("gpt2-124m", 124_439_808), ("llama-1b", 1_235_814_400), ("gpt2-1558m", 1_557_611_200)):
        params, _ = jax.eval_shape(named(name).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert named("gpt2-124m", layers=3, scan=False).layers == 3
    with pytest.raises(ValueError, match="named: there is no model 'gpt3'; known are gpt2-124m"):
        named("gpt3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 0}, "GPT: layers is 0, expected a positive integer"),
        ({"heads": 3}, "GPT: width 8 does not divide into 3 heads"),
        ({"kv_heads": 3}, "4 heads cannot share 3 heads of keys evenly"),
        ({"norm": "batch"}, "norm is 'batch', expected 'layer' or 'rms'"),
        ({"mlp": "relu"}, "mlp is 'relu', expected 'gelu', 'gelu_exact' or 'swiglu'"),
        ({"positions": "sine"}, "positions is 'sine', expected 'learned' or 'rope'"),
        ({"positions": "rope", "heads": 8}, "rope turns pairs of features, but a head has 1"),
        ({"checkpoint": "dots"}, "checkpoint is 'dots', expected None, 'full', "),
        ({"attention": "flash"}, "attention is 'flash', expected None, 'xla' or 'cudnn'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        gpt(**{**SIZE, **options})


def test_bad_input():
    model, params = make("gpt2")
    with pytest.raises(TypeError, match="gpt: there is no option 'head'; known are layers, "):
        gpt(**SIZE, head=3)
    with pytest.raises(TypeError, match="GPT: tokens are of float32, expected integers"):
        model(params, TOKENS.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 10\), expected \[batch, 1 to 9 tokens\]"):
        model(params, jnp.zeros((2, 10), jnp.int32))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must have the shape"):
        model.loss(params, TOKENS, TARGETS[:, 1:])
    with pytest.raises(ValueError, match=r"GPT: the parameter blocks.attention_norm.bias is not there, expected \(2, 8\)"):
        model(unstack_blocks(params), TOKENS)
    with pytest.raises(ValueError, match=r"the parameter embed.embedding is \(12, 8\), expected \(13, 8\)"):
        model({**params, "embed": {"embedding": params["embed"]["embedding"][1:]}}, TOKENS)


def test_llama_3_slows_the_slow_turns():
    """As in Llama 3.1: wavelengths beyond original / low are stretched by the factor, those below original / high are not."""
    rates = np.array(_rates(64, 500000.0, None), np.float64)
    np.testing.assert_allclose(rates, 500000.0 ** (-np.arange(32) / 32), rtol=1e-5)
    wavelengths = 2 * np.pi / rates
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    expected = np.where(wavelengths > 8192 / 1.0, rates / 32, np.where(wavelengths < 8192 / 4.0, rates, 0))
    between = (1 - smooth) * rates / 32 + smooth * rates
    expected = np.where(expected == 0, between, expected)
    np.testing.assert_allclose(_rates(64, 500000.0, (32.0, 1.0, 4.0, 8192)), expected, rtol=1e-4)
    assert 0 < np.sum(expected == between) < 10
