"""Health: each number against one computed otherwise, by numpy, by plain jax.numpy or from a document; each finding on a
network that was made to have it."""

import json
import pathlib
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbackprop as fb
from fbackprop import layers
from fbackprop.cli import main
from fbackprop.data import THREE_LAYER
from fbackprop.diagnosing.calls import discover
from fbackprop.diagnosing.trials import Bench, Change
from fbackprop.diagnosing.variants import Variant
from fbackprop.training import fit

WORKED = json.loads((pathlib.Path(__file__).parent / "worked_examples.json").read_text(encoding="utf-8"))


def kinds(found):
    return [finding.kind for finding in found.findings]


def parameters(rng, widths, scale=1.0, bias=0.0):
    """Of dense layers with something that has none between them: kernels of the standard deviation scale/√inputs."""
    dense = [
        {
            "kernel": rng.normal(size=(a, b)).astype(np.float32) * scale / np.float32(a**0.5),
            "bias": np.full(b, bias, np.float32),
        }
        for a, b in pairwise(widths)
    ]
    return {"layers": tuple(part for one in dense for part in (one, {}))[:-1]}


def stack(width, depth, activation, scale=1.0, bias=0.0):
    """A perceptron with hidden layers of one width: its loss, its parameters, and a batch of 32."""
    rng = np.random.default_rng(0)
    model = fb.models.mlp([width] * depth + [4], activation)
    params = parameters(rng, [width] * (depth + 1) + [4], scale, bias)
    x, labels = rng.normal(size=(32, width)).astype(np.float32), rng.integers(4, size=32)
    return (lambda p, x, labels: fb.softmax_cross_entropy_with_integer_labels(model(p, x), labels).mean()), params, x, labels


# The document's own step.


def three_layer():
    def dense(weights, bias):
        return {"kernel": jnp.array(weights).T, "bias": jnp.array(bias)}

    s, model = THREE_LAYER, fb.models.mlp((3, 2, 1))
    one, two, three = (dense(s[f"W{i}"], s[f"b{i}"]) for i in (1, 2, 3))
    x, y = jnp.array(s["x"]), jnp.array(s["y"])
    return (lambda p: fb.half_square(model(p, x), y)), {"layers": (one, {}, two, {}, three)}


DOCS = (pathlib.Path(__file__).parent.parent / "docs" / "health.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document():
    """What the example of the documentation finds."""
    scope: dict = {}
    with jax.enable_x64(True):
        exec(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0], scope)
    return scope["found"]


def test_the_documentation_prints_what_is_printed(document):
    assert re.findall(r"```text\n(.*?)```", DOCS, re.DOTALL)[0].rstrip() == str(document)


def test_the_documents_step_kills_two_of_three_units(document):
    (finding,) = document.findings
    assert (finding.kind, finding.layer) == ("killed", "layers/0")
    assert "kills 2 of 3 units of relu in layers/0" in finding.message
    first = document.layers[0]
    assert first.dead == 0
    assert first.dead_after == pytest.approx(2 / 3)
    # As the document's numbers have it, and numpy from its updated weights.
    assert (np.array(WORKED["004_mlp"]["after_update"]["h1"]) == 0).sum() == 2
    assert document.layers[1].dead_after == 0


def numpy_dead(rate):
    g, inputs = WORKED["004_mlp"]["gradients"], WORKED["004_mlp"]["inputs"]
    w, b = (np.array(inputs[n]) - rate * np.array(g[n]) for n in ("W1", "b1"))
    return float((w @ np.array(inputs["x"]) + b <= 0).mean())


def test_a_rate_of_0_002_keeps_all_units_and_was_tried(document):
    tried = {trial.change: trial for trial in document.findings[0].trials}
    assert tried["rate 0.002"].dead == numpy_dead(0.002) == 0
    assert tried["rate 0.002"].helped
    assert tried["rate 0.005"].dead == pytest.approx(numpy_dead(0.005))
    assert not tried["rate 0.005"].helped
    assert document.findings[0].proposal in document.findings[0].trials
    assert document.findings[0].proposal.helped
    assert "tried rate 0.002: loss 42.87" in str(document)
    assert "dead after a step 0%: helps" in str(document)


def test_at_a_rate_of_0_002_nothing_is_found():
    with jax.enable_x64(True):
        loss, params = three_layer()
        found = fb.health(loss, params, rate=0.002, try_fixes=False)
    assert found.ok
    assert found.layers[0].dead_after == 0
    assert "nothing wrong was found" in str(found)


def test_its_losses_gradients_and_cotangents_are_the_documents(document):
    worked = WORKED["004_mlp"]
    assert document.as_it_is.losses == pytest.approx(worked["loss_by_step"], rel=1e-9)
    g, inputs = worked["gradients"], worked["inputs"]
    for i, layer in enumerate(document.layers, 1):
        pair = [g[f"W{i}"], g[f"b{i}"]], [inputs[f"W{i}"], inputs[f"b{i}"]]
        gradient, weight = (np.sqrt(sum(np.square(a).sum() for a in arrays)) for arrays in pair)
        assert layer.gradient == pytest.approx(gradient, rel=1e-6)
        assert layer.weight == pytest.approx(weight, rel=1e-6)
        assert layer.ratio == pytest.approx(0.01 * gradient / weight, rel=1e-6)
    # No unit is dead before the step, so the bias gradients are the cotangents of the layers' outputs.
    cotangents = [np.linalg.norm(g[n]) for n in ("x", "b1", "b2", "b3")]
    expected = [cotangents[i] / cotangents[i + 1] for i in range(3)]
    assert [layer.gain for layer in document.layers] == pytest.approx(expected, rel=1e-6)
    assert document.reach == pytest.approx(cotangents[1] / cotangents[3], rel=1e-6)


# Gains.


@pytest.mark.parametrize(("w", "n"), [(1, 10), pytest.param(8, 10, marks=pytest.mark.slow)])
def test_a_chain_of_sigmoids_has_the_gains_of_the_closed_form(w, n):
    """y ← sigmoid(w y − w/2) from 0.5: each gain is w/4 and all of them (w/4)ⁿ."""
    model = fb.models.mlp([1] * n, fb.sigmoid, output_activation=fb.sigmoid)
    params = {"layers": tuple({"kernel": jnp.full((1, 1), float(w)), "bias": jnp.full(1, -w / 2)} if i % 2 == 0 else {}
                              for i in range(2 * n))}  # fmt: skip
    found = fb.health(lambda p, x: model(p, x).sum(), params, jnp.full((1, 1), 0.5), try_fixes=False)
    assert [layer.gain for layer in found.layers] == pytest.approx([w / 4] * n, rel=1e-5)
    assert np.prod([layer.gain for layer in found.layers]) == pytest.approx(
        WORKED["vanishing_fixture"]["values"][f"w={w},n={n}"]
    )
    assert found.reach == pytest.approx((w / 4) ** (n - 1), rel=1e-4)
    assert kinds(found) == (["vanishing"] if w == 1 else [])
    for finding in found.findings:
        assert "depth times slope: sigmoid, whose slope is 0.25 at most" in finding.cause
        assert f"activations account for 10^{(n - 1) * np.log10(0.25):.1f}, all other ops for 10^" in finding.cause


def test_gains_dead_and_saturated_shares_equal_plain_jax_numpy():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(20, 6))
        model = layers.serial(layers.Dense(8), fb.relu, layers.Dense(7), fb.tanh, layers.Dense(5), fb.sigmoid, layers.Dense(2))
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), parameters(rng, [6, 8, 7, 5, 2], 4.0))
        params["layers"][0]["bias"][:3] = -50
        found = fb.health(lambda p, x: fb.half_square(model(p, x), np.ones((20, 2))), params, x, try_fixes=False)

        own = [params["layers"][i] for i in (0, 2, 4, 6)]
        functions = [lambda z: jnp.maximum(z, 0), jnp.tanh, lambda z: 1 / (1 + jnp.exp(-z)), lambda z: z]

        def loss(additions):
            y, outputs = x + additions[0], []
            for p, f, d in zip(own, functions, additions[1:]):
                y = f(y @ p["kernel"] + p["bias"][None]) + d
                outputs.append(y)
            return 0.5 * ((y - 1) ** 2).sum(), outputs

        zeros = [np.zeros((20, n)) for n in (6, 8, 7, 5, 2)]
        cotangents, outputs = jax.jit(jax.grad(loss, has_aux=True))(zeros)
    norms = [float(np.linalg.norm(c)) for c in cotangents]
    assert [layer.gain for layer in found.layers] == pytest.approx([norms[i] / norms[i + 1] for i in range(4)], rel=1e-5)
    h, t, s = (np.asarray(o) for o in outputs[:3])
    dead = (h == 0).all(0).mean()
    assert dead >= 3 / 8
    assert found.layers[0].dead == pytest.approx(dead)
    flat = [(1 - t**2 < 0.05).mean(), (s * (1 - s) < 0.05 / 4).mean()]
    assert [layer.saturated for layer in found.layers[1:3]] == pytest.approx(flat)
    assert min(flat) > 0
    assert np.isnan(found.layers[0].saturated)
    assert np.isnan(found.layers[1].dead)
    dying = [f for f in found.findings if f.kind == "dead"]
    assert [f.layer for f in dying] == ["layers/0"]
    assert f"{round(8 * dead)} of 8 units of relu in layers/0 have slope zero in all 20 places" in dying[0].message
    assert [f.layer for f in found.findings if f.kind == "saturated"] == [
        name for name, share in zip(("layers/2", "layers/4"), flat) if share > 0.5
    ]


def test_norms_are_those_of_the_explanation_of_the_same_backward_pass():
    loss, params, *batch = stack(4, 1, fb.tanh)
    found = fb.health(loss, params, *batch, try_fixes=False)
    steps = fb.explain(loss, params, *batch).steps
    assert [call.op for call in found.now.layout.calls] == [step.op for step in steps]
    upstream = [np.sqrt(sum(float((d**2).sum()) for d in step.upstream.values() if d is not None)) for step in steps]
    assert found.now["dout"].tolist() == pytest.approx(upstream, rel=1e-5)


def test_each_step_of_a_scan_is_a_layer():
    kernel = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    params = {"blocks": {"kernel": kernel, "bias": np.zeros((3, 4), np.float32)}}

    def loss(p, x):
        return fb.sum_of_squares(jax.lax.scan(lambda y, own: (fb.tanh(fb.dense(y, **own)), None), x, p["blocks"])[0], x)

    x = np.ones((2, 4), np.float32)
    found = fb.health(loss, params, x, try_fixes=False)
    gradient = jax.jit(jax.grad(loss))(params, x)["blocks"]
    assert [row.name for row in found.layers] == ["blocks[0]", "blocks[1]", "blocks[2]"]
    for i, row in enumerate(found.layers):
        both = np.hypot(*(np.linalg.norm(gradient[name][i]) for name in ("kernel", "bias")))
        assert row.gradient == pytest.approx(both, rel=1e-5)
        assert row.weight == pytest.approx(np.linalg.norm(kernel[i]), rel=1e-5)


@pytest.mark.slow
def test_layers_of_a_gpt_are_told_apart_and_their_gradients_are_the_rows():
    model = fb.models.gpt(11, 2, 8, 2, 6)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    params, _ = model.init(jax.random.key(1), tokens)
    found = fb.health(model.loss, params, tokens, tokens, try_fixes=False)
    rows = {row.name: row for row in found.layers}
    gradient = jax.jit(jax.grad(model.loss))(params, tokens, tokens)
    for i in range(2):
        parts = [gradient["blocks"][a][b][i] for a in ("qkv", "attention_norm") for b in gradient["blocks"][a]]
        assert rows[f"blocks/qkv[{i}]"].gradient == pytest.approx(float(optax.tree.norm(parts)), rel=1e-4)
    total = np.sqrt(sum(row.gradient**2 for row in found.layers))
    assert total == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert next(iter(rows)) == "embed"


@pytest.mark.parametrize("how", ["vmap", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_calls_that_are_mapped_or_recomputed_are_measured_as_one(how):
    """Under vmap and checkpoint a unit is dead if it is zero for all examples, as in a batch."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 4)).astype(np.float32)
    params = {"kernel": rng.normal(size=(4, 6)).astype(np.float32), "bias": np.array([-30, -30, 0, 0, 0, 0], np.float32)}

    def example(p, row):
        return fb.relu(fb.dense(row, p["kernel"], p["bias"]))

    batched = fb.health(lambda p: (example(p, x) ** 2).sum(), params, try_fixes=False)
    changed = {"vmap": lambda p, x: jax.vmap(lambda row: example(p, row))(x), "checkpoint": jax.checkpoint(example)}[how]
    other = fb.health(lambda p: (changed(p, x) ** 2).sum(), params, try_fixes=False)
    assert batched.layers[0].dead == pytest.approx(2 / 6)
    assert other.layers[0].dead == batched.layers[0].dead
    assert other.layers[0].gradient == pytest.approx(batched.layers[0].gradient, rel=1e-5)
    assert other.now["dout"] == pytest.approx(batched.now["dout"], rel=1e-5)
    assert other.now["out"] == pytest.approx(batched.now["out"], rel=1e-5)


def test_updates_are_the_optimizers_own():
    loss, params, *batch = stack(5, 1, fb.tanh)
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.03))
    _, state = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.ones_like, p), optimizer.init(p), p))(params)
    found = fb.health(loss, params, *batch, optimizer=optimizer, opt_state=state, try_fixes=False)

    @jax.jit
    def by_hand(params):
        updates, _ = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return [optax.tree.norm(u) for u in updates["layers"] if u], loss(optax.apply_updates(params, updates), *batch)

    norms, after = by_hand(params)
    assert [row.update for row in found.layers] == pytest.approx([float(n) for n in norms], rel=1e-4)
    assert float(found.after.loss) == pytest.approx(float(after), rel=1e-5)


# Findings with causes, and what was tried.


@pytest.mark.slow  # by default examples/health.py, which says the same by its exit code, stands for it
def test_a_deep_stack_of_sigmoids_vanishes_and_relu_with_he_helps():
    loss, params, *batch = stack(8, 6, fb.sigmoid)
    before = jax.tree.map(np.array, params)
    found = fb.health(loss, params, *batch, rate=0.3, steps=40)
    assert kinds(found) == ["vanishing"]
    (finding,) = found.findings
    assert finding.cause.startswith("depth times slope: sigmoid")
    tried = {trial.change: trial for trial in finding.trials}
    assert set(tried) == {"kernels by LeCun's initialiser", "relu for each activation and kernels by He's initialiser",
                          "tanh for each activation and kernels by LeCun's initialiser",
                          "a layer norm before each activation"}  # fmt: skip
    # Drawing the same kernels anew does not change what sigmoid does: tried, and not proposed.
    assert not tried["kernels by LeCun's initialiser"].helped
    assert finding.proposal is not None
    assert finding.proposal.helped
    assert finding.proposal.loss < found.as_it_is.loss
    assert finding.proposal.reach > 1e-3 > found.reach
    assert all(trial.loss >= finding.proposal.loss for trial in finding.trials if trial.helped)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params)))


@pytest.mark.parametrize(
    ("activation", "scale", "bias", "kind", "words"),
    [
        (
            fb.sigmoid,
            1.0,
            6.0,
            "vanishing",
            "% of sigmoid's outputs lie where its slope is below 5% of the largest; activations",
        ),
        pytest.param(
            fb.tanh,
            0.1,
            0.0,
            "vanishing",
            "initialisation scale times depth: the kernels are too small",
            marks=pytest.mark.slow,
        ),
        (fb.relu, 8.0, 0.0, "exploding", "initialisation scale times depth: the kernels are too large"),
    ],
    ids=["saturation", "small", "large"],
)
def test_the_cause_is_computed(activation, scale, bias, kind, words):
    loss, params, *batch = stack(8, 6, activation, scale, bias)
    found = fb.health(loss, params, *batch, try_fixes=False)
    assert kinds(found)[0] == kind
    assert words in found.findings[0].cause
    std = np.exp(np.mean([np.log(np.std(p["kernel"]) * np.sqrt(p["kernel"].shape[0])) for p in params["layers"] if p]))
    told = float(found.findings[0].cause.split("The kernels have ")[1].split(" times")[0])
    assert told == pytest.approx(std, rel=0.1)


@pytest.mark.slow
def test_a_rate_that_overshoots_is_told_and_the_smaller_one_is_what_gradient_descent_gives():
    loss, params, *batch = stack(6, 1, fb.tanh)
    found = fb.health(loss, params, *batch, rate=300.0, steps=5)
    assert "overshoot" in kinds(found)
    finding = found.findings[kinds(found).index("overshoot")]
    trial = finding.trials[-1]
    assert finding.trials[0].change == "rate 150"
    rate = next(t for t in finding.trials if t.helped and t.change.startswith("rate"))
    own, losses, step = params, [], jax.jit(jax.value_and_grad(loss))
    for _ in range(6):
        value, g = step(own, *batch)
        losses.append(float(value))
        own = jax.tree.map(lambda p, d: p - float(rate.change.split()[1]) * d, own, g)
    assert rate.losses == pytest.approx(losses, rel=1e-4)
    assert "clipped" in trial.change


@pytest.mark.slow
def test_variants_are_the_model_written_so():
    loss, params, x, labels = stack(6, 1, fb.sigmoid)
    bench = Bench(loss, params, (x, labels), optax.sgd(0.5), None, 0.5, 4, 0)
    trial = bench.trial(Change(variant=Variant(activation="tanh", norm=True)))

    def written(p):
        first, _, second = p["layers"]
        z = x @ first["kernel"] + first["bias"][None]
        y = jnp.tanh((z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-6))
        return optax.softmax_cross_entropy_with_integer_labels(y @ second["kernel"] + second["bias"][None], labels).mean()

    losses, step = [], jax.jit(jax.value_and_grad(written))
    for _ in range(5):
        value, g = step(params)
        losses.append(float(value))
        params = jax.tree.map(lambda p, d: p - 0.5 * d, params, g)
    assert trial.losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_the_same_question_has_the_same_answer():
    loss, params, *batch = stack(5, 4, fb.sigmoid, 0.1)
    assert str(fb.health(loss, params, *batch, rate=20.0, steps=3)) == str(fb.health(loss, params, *batch, rate=20.0, steps=3))


# What is not finite.


@pytest.mark.parametrize("try_fixes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_overflow_in_float16_is_told_with_its_op_and_float32_is_tried(try_fixes):
    params = {"a": {"kernel": jnp.full((8, 8), 200.0, jnp.float16)}, "b": {"kernel": jnp.full((8, 3), 200.0, jnp.float16)}}
    x = jnp.ones((4, 8), jnp.float16)

    def loss(p, x):
        return fb.dense(fb.dense(x, p["a"]["kernel"]), p["b"]["kernel"]).astype(jnp.float32).mean()

    forward, backward = fb.health(loss, params, x, try_fixes=try_fixes).findings
    assert (forward.kind, forward.layer) == ("non-finite forward", "b")
    assert "come out of dense in b (call 2 of 2): 12 of 12" in forward.message
    assert "its inputs are finite (x up to 1.6e+03, kernel up to 200)" in forward.cause
    assert "overflows float16, whose largest number is 6.55e+04" in forward.cause
    if try_fixes:
        assert forward.proposal is not None
        assert forward.proposal.change == "computing in float32"
    assert backward.kind == "non-finite backward"


@pytest.mark.parametrize(
    "where", ["backward", *(pytest.param(w, marks=pytest.mark.slow) for w in ("parameter", "batch", "label", "between"))]
)
def test_the_first_number_that_is_not_finite_is_found(where):
    params = {"a": {"kernel": jnp.full((3, 4), 0.5)}, "b": {"kernel": jnp.full((4, 2), 0.5)}}
    x, targets = jnp.ones((5, 3)), jnp.full((5, 2), 0.5)
    if where == "batch":
        x = x.at[2, 1].set(jnp.nan)
    if where == "parameter":
        params["b"]["kernel"] = params["b"]["kernel"].at[0, 0].set(jnp.inf)

    def loss(p, x):
        h = fb.dense(x, p["a"]["kernel"])
        if where == "backward":
            h = fb.relu(h - 100)
            return jnp.sqrt(fb.dense(h, p["b"]["kernel"])).sum()
        if where == "between":
            h = jnp.log(h - 1.5)
        z = fb.dense(h, p["b"]["kernel"])
        if where == "label":
            z = jnp.where(jnp.arange(2) == 0, -jnp.inf, z)
        return fb.softmax_cross_entropy(z, targets).mean()

    found = fb.health(loss, params, x, try_fixes=False).findings[0]
    expected = {
        "batch": ("non-finite forward", "dense in a (call 1 of 3): 1 in its x", "they are in the batch"),
        "parameter": ("non-finite forward", "1 in its kernel, the parameter b/kernel", "the parameter itself is not finite"),
        "backward": ("non-finite backward", "come back into dense in b (call 3 of 3)", "arise between the ops"),
        "label": ("non-finite forward", "softmax_cross_entropy in the loss (call 3 of 3): 5 in its logits", "between the ops"),
        "between": ("non-finite forward", "dense in b (call 2 of 3): 20 in its x", "between the ops"),
    }[where]
    assert found.kind == expected[0]
    assert expected[1] in found.message
    assert expected[2] in found.cause


def test_what_the_loss_does_not_use_is_told():
    params = {"used": {"kernel": jnp.ones((2, 2))}, "left": {"kernel": jnp.ones((2, 2))}}
    found = fb.health(lambda p: fb.dense(jnp.ones((3, 2)), p["used"]["kernel"]).sum(), params, try_fixes=False)
    (finding,) = found.findings
    assert (finding.kind, finding.layer) == ("unreached", "left")
    assert finding.cause == "the loss does not use them."


def test_a_residual_branch_that_begins_at_zero_is_nothing_wrong():
    params = {"a": {"kernel": np.ones((3, 3), np.float32)}, "b": {"kernel": np.zeros((3, 3), np.float32)}}
    x = np.ones((2, 3), np.float32)
    found = fb.health(lambda p: ((x + fb.dense(fb.dense(x, **p["a"]), **p["b"])) ** 2).sum(), params, try_fixes=False)
    assert found.now["gradient"].tolist()[0] == 0 < found.now["gradient"].tolist()[1]
    assert found.ok


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": -1.0}, "rate is -1.0, expected a number above 0"),
        ({"steps": 0}, "steps is 0, expected a whole number"),
        ({"optimizer": 3}, "optimizer is a int, expected one of optax's"),
        ({"opt_state": 3}, "without the optimizer"),
        ({"params": {}}, "params holds no arrays"),
        ({"params": {"w": jnp.arange(3)}}, "params holds int32 at w"),
        ({"loss": lambda p: p["w"]}, r"the loss returned shape \(2,\)"),
    ],
)
def test_refuses(options, words):
    given = {"loss": lambda p: p["w"].sum(), "params": {"w": jnp.ones(2)}, **options}
    with pytest.raises((ValueError, TypeError), match=words):
        fb.health(given.pop("loss"), given.pop("params"), **given)


def test_too_many_calls_are_refused(monkeypatch):
    monkeypatch.setattr("fbackprop.diagnosing.calls.MOST_CALLS", 3)
    with pytest.raises(ValueError, match="more than 3 ops"):
        discover(lambda p: jax.lax.scan(lambda c, _: (fb.tanh(c), None), p, length=4)[0].sum(), jnp.ones(2), ())


# Pictures and the monitor.


def test_plot(tmp_path, document):
    document.plot(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes()[:4] == b"\x89PNG"


def data(count=48):
    rng = np.random.default_rng(5)
    return {"x": rng.normal(size=(count, 6)).astype(np.float32), "y": rng.integers(3, size=count)}


def classifier():
    model = fb.models.mlp((8, 3))
    params = parameters(np.random.default_rng(7), [6, 8, 3])
    return (lambda p, b: fb.softmax_cross_entropy_with_integer_labels(model(p, b["x"]), b["y"]).mean()), params


def test_a_monitored_run_takes_the_same_steps_and_keeps_its_looks(tmp_path):
    loss_fn, params = classifier()
    options: dict = {"steps": 12, "batch_size": 16, "progress": False, "seed": 3}
    plain = fit(loss_fn, optax.adam(0.01), params, data(), **options)
    watched = fit(loss_fn, optax.adam(0.01), params, data(), **options, monitor=5, directory=tmp_path / "run")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(watched.params)))
    assert [row["step"] for row in watched.history.looks] == [1, 6, 11]
    for row in watched.history.looks:
        assert np.linalg.norm(row["gradient"]) == pytest.approx(plain.history.steps["grad_norm"][row["step"] - 1], rel=1e-5)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["health"]
    assert written["looks"] == 3
    assert written["rows"][0]["layers"] == ["layers/0", "layers/2"]
    assert (tmp_path / "run" / "health.png").exists()


@pytest.mark.slow
def test_a_run_that_is_continued_keeps_its_looks(tmp_path):
    loss_fn, params = classifier()
    for steps in (12, 17):
        run = fit(
            loss_fn, optax.adam(0.01), params, data(), steps=steps, batch_size=16, progress=False, monitor=5,
            directory=tmp_path / "run", resume=True,
        )  # fmt: skip
    assert [row["step"] for row in run.history.looks] == [1, 6, 11, 16]


def test_a_skipped_step_is_looked_at(capsys):
    loss_fn, params = classifier()
    examples = data()
    examples["x"][20, 3] = np.inf  # in the second batch of 16
    run = fit(loss_fn, optax.sgd(0.01), params, examples, steps=3, batch_size=16, shuffle=False, monitor=100)
    assert [row["step"] for row in run.history.looks] == [1, 2]
    first, *_ = run.history.looks[1]["findings"]
    assert first["kind"] == "non-finite forward"
    assert "dense in layers/0 (call 1 of 4): 1 in its x" in first["message"]
    assert "step 2: non-finite forward: the first numbers that are not finite come into dense" in capsys.readouterr().err
    found = run.metrics["health"]["findings"]
    assert next((one["kind"], one["first"], one["looks"]) for one in found) == ("non-finite forward", 2, 1)


@pytest.mark.slow
def test_train_with_health_tells_of_the_units_that_the_document_loses(tmp_path, capsys):
    assert main(["train", "three-layer", "--steps", "3", "--health", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "killed (step 2): 67% of the units of layers/0 are zero for the whole batch; 0% were at step 1." in printed
    assert "health.png" in printed
    assert (tmp_path / "run" / "health.png").exists()
