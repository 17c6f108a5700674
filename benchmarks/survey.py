"""What ``fbackprop.check`` finds in functions that ship in JAX, Flax, optax and Equinox, and what each finding means.

    python benchmarks/survey.py [--quick] [--only PATTERN …] [--json FILE [--resume | --render]] [--markdown FILE]
    python benchmarks/survey.py --list | --examples

Each function of the table below is checked as it ships, with arguments in its domain: the checks of the quick depth, and those
of other precisions, edge values, single elements of y, transformations and second derivatives. There is no reference but the
function itself, so what can be found is: a NaN where the value is finite, a gradient that is not that of the values, a
derivative that breaks under a transformation or in a narrow dtype, a custom rule that differs from what it decorates.

Findings are grouped by (function, check, argument). survey_explained.json has for each of them a verdict, a sentence, an
example of one line that does without the checker, and the thread that tells of it. Verdicts: "weakness" (the function should do
better), "choice" (the library says that it does so, or the derivative is a convention), "edge of the domain" (the derivative
itself is infinite or undefined there). A finding without an explanation, and an explanation without a
finding, are printed; the former makes the exit code 1, and so does a function that cannot be checked.

The table has some of the functions of these libraries, not all. To add one, call ``add`` in the family of its module with its
public name, the function, arguments in its domain and options of ``check`` (of Flax and Equinox ``layer``, with the
module and its inputs); --json FILE --resume --markdown benchmarks/survey.md then checks what FILE has not, and what is
found is to be explained in survey_explained.json.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.experimental.ode
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fbackprop.checking import CHECKS, check
from fbackprop.files import write_atomically

FURTHER = ("low precision", "edges", "jacobian", "transformations", "second order")
VERDICTS = ("weakness", "choice", "edge of the domain")
EXPLAINED = pathlib.Path(__file__).with_name("survey_explained.json")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "equinox")


# ------------------------------------------------------------------------------------------------------- the functions


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function of the survey: its public name, the function, its arguments, and options of ``check``."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}


def add(name: str, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    assert name not in ENTRIES, name
    ENTRIES[name] = Entry(name, fn, args, options)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape, 1]).uniform(low, high, size=shape), jnp.float32)


def positive(*shape: int, seed: int = 0) -> jax.Array:
    return uniform(0.3, 3.0, *shape, seed=seed)


def unit(*shape: int, seed: int = 0) -> jax.Array:
    """Between zero and one."""
    return uniform(0.1, 0.9, *shape, seed=seed)


def simplex(*shape: int, seed: int = 0) -> jax.Array:
    return jax.nn.softmax(normal(*shape, seed=seed))


def spd(n: int, seed: int = 0) -> jax.Array:
    """Symmetric, positive definite."""
    a = normal(n, n, seed=seed)
    return a @ a.T + n * jnp.eye(n)


def real_parts(f: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function that returns complex numbers."""
    return lambda *args: jax.tree.map(lambda y: (jnp.real(y), jnp.imag(y)), f(*args))


def alike(prefix: str, module: Any, names: str, *args: Any, **options: Any) -> None:
    """Several functions of the same arguments."""
    for name in names.split():
        add(f"{prefix}.{name}", getattr(module, name), *args, **options)


def of_jax_nn() -> None:
    x = normal(3, 4)
    special = (
        "one_hot scaled_dot_general scaled_matmul get_scaled_dot_general_config dot_product_attention initializers log1mexp"
    )
    names = sorted(n for n in dir(jax.nn) if not n.startswith("_") and n not in special.split())
    for name in {getattr(jax.nn, n): n for n in reversed(names)}.values():  # an alias once
        add(f"jax.nn.{name}", getattr(jax.nn, name), x)
    add("jax.nn.log1mexp", jax.nn.log1mexp, positive(3, 4))
    add("jax.nn.gelu(approximate=False)", jax.nn.gelu, x, static={"approximate": False})
    q, k, v = (normal(1, 3, 2, 4, seed=s) for s in range(3))
    some = jnp.array([[[[True, False, True]] * 3] * 2])
    add("jax.nn.dot_product_attention", jax.nn.dot_product_attention, q, k, v)
    add("jax.nn.dot_product_attention(is_causal=True)", jax.nn.dot_product_attention, q, k, v, static={"is_causal": True})
    add("jax.nn.dot_product_attention(mask)", lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), q, k, v, some)
    add(
        "jax.nn.dot_product_attention(bias)",
        lambda q, k, v, bias: jax.nn.dot_product_attention(q, k, v, bias=bias),
        *(q, k, v, normal(1, 2, 3, 3)),
    )


def of_jax_numpy() -> None:
    x, y, p, q, u = normal(3, 4), normal(3, 4, seed=1), positive(3, 4), positive(3, 4, seed=1), unit(3, 4)
    real = """abs arctan arcsinh cbrt ceil cos cosh deg2rad exp exp2 expm1 fabs floor i0 nan_to_num negative round sign sin sinc
    sinh square tan tanh trunc unwrap modf"""
    alike("jax.numpy", jnp, real, x)
    alike("jax.numpy", jnp, "log log10 log2 log1p sqrt reciprocal", p)
    alike("jax.numpy", jnp, "arccos arcsin arctanh", u)
    add("jax.numpy.arccosh", jnp.arccosh, p + 1)
    both = "arctan2 copysign fmax fmin fmod heaviside hypot logaddexp logaddexp2 maximum minimum multiply remainder"
    alike("jax.numpy", jnp, both, x, y)
    alike("jax.numpy", jnp, "divide divmod", x, q)
    alike("jax.numpy", jnp, "power float_power", p, y)
    add("jax.numpy.power(x, 2)", lambda x: jnp.power(x, 2), x)
    add("jax.numpy.power(x, 2.0)", lambda x: jnp.power(x, 2.0), x)
    add("jax.numpy.power(x, 0.5)", lambda x: jnp.power(x, 0.5), p)
    reductions = "prod std nanmax nanmean nanmedian nanprod nanstd nanvar nancumprod"
    for name in reductions.split():
        add(f"jax.numpy.{name}", getattr(jnp, name), x, static={"axis": -1})
    add("jax.numpy.std(ddof=1)", lambda x: jnp.std(x, axis=-1, ddof=1), x)
    mask = jnp.array([[True, False, True, True], [False, True, True, False], [True, True, True, True]])
    for name in ("prod", "std"):
        add(f"jax.numpy.{name}(where=mask)", getattr(jnp, name), x, static={"axis": -1}, keywords={"where": mask})
    a = normal(5)
    add("jax.numpy.interp", jnp.interp, uniform(0.1, 3.9, 5), jnp.arange(5.0), a)
    alike("jax.numpy", jnp, "geomspace", jnp.float32(0.5), jnp.float32(2.0), static={"num": 5})


def of_linalg() -> None:
    x, square, s = normal(3, 4), normal(3, 3), spd(3)
    la = jnp.linalg
    for order in (None, 1, 3, jnp.inf):
        add(f"jax.numpy.linalg.norm(vectors, ord={order})", lambda x, o=order: la.norm(x, ord=o, axis=-1), x)
    for order in ("fro",):
        add(f"jax.numpy.linalg.norm(matrix, ord={order!r})", lambda x, o=order: la.norm(x, ord=o), x)
    add("jax.numpy.linalg.svd(full_matrices=False)", lambda x: la.svd(x, full_matrices=False), x)
    add("jax.numpy.linalg.eigh", la.eigh, s)
    sl = jsp.linalg
    add("jax.scipy.linalg.expm", sl.expm, square)
    add("jax.scipy.linalg.sqrtm", real_parts(sl.sqrtm), s)


def of_special() -> None:
    sp = jsp.special
    x, p, q, u = normal(3, 4), positive(3, 4), positive(3, 4, seed=1), unit(3, 4)
    alike("jax.scipy.special", sp, "expit erf erfc erfcx ndtr log_ndtr i0 i0e i1 i1e dawsn fresnel sici", x)
    alike("jax.scipy.special", sp, "gamma gammaln loggamma digamma entr spence factorial", p)
    alike("jax.scipy.special", sp, "logit erfinv ndtri", u)
    alike("jax.scipy.special", sp, "softmax log_softmax", x)
    add("jax.scipy.special.logsumexp(b)", lambda x, b: sp.logsumexp(x, axis=-1, b=b), x, p)
    alike("jax.scipy.special", sp, "beta betaln gammainc gammaincc kl_div rel_entr poch", p, q)
    alike("jax.scipy.special", sp, "xlogy xlog1py owens_t", x, p)
    alike("jax.scipy.special", sp, "boxcox boxcox1p", p, x)
    add("jax.scipy.special.comb", sp.comb, p + 3, q)
    add("jax.scipy.special.betainc", sp.betainc, p, q, u, argnums=2)
    add("jax.scipy.special.zeta", sp.zeta, p + 1.5, q, argnums=1)
    add("jax.scipy.special.polygamma", lambda x: sp.polygamma(2, x), p)
    add("jax.scipy.special.multigammaln", lambda a: sp.multigammaln(a, 2), p + 1)
    add("jax.scipy.special.bessel_jn", lambda z: sp.bessel_jn(z, v=2, n_iter=50), p)


def of_lax() -> None:
    x = normal(3, 4)
    for name in ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"):
        add(f"jax.lax.{name}", getattr(lax, name), x, static={"axis": 1})
    add("jax.lax.cumlogsumexp(reverse=True)", lambda x: lax.cumlogsumexp(x, axis=1, reverse=True), x)
    for name, start in (("max", -jnp.inf), ("min", jnp.inf), ("add", 0.0)):
        for padding in ("VALID", "SAME"):
            options = {"init_value": start, "computation": getattr(lax, name), "window_dimensions": (2, 2)}
            options |= {"window_strides": (1, 2), "padding": padding}
            add(f"jax.lax.reduce_window({name}, {padding})", lax.reduce_window, x, static=options)
    add("jax.lax.reduce_window(mul)", lambda x: lax.reduce_window(x, 1.0, lax.mul, (1, 2), (1, 1), "VALID"), x)
    add(
        "jax.lax.reduce_window(max, window_dilation=2)",
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID", window_dilation=(1, 2)),
        x,
    )
    add("jax.lax.reduce_precision", lambda x: lax.reduce_precision(x, 8, 7), x)
    add("jax.lax.reduce(logaddexp)", lambda x: lax.reduce(x, np.float32(-np.inf), jnp.logaddexp, (1,)), x)


def of_jax_others() -> None:

    key = jax.random.key(0)
    add("jax.random.gamma", lambda k, a: jax.random.gamma(k, a), key, positive(3, 4))
    add("jax.random.loggamma", lambda k, a: jax.random.loggamma(k, a), key, positive(3, 4))


def of_optax() -> None:
    lo = optax.losses
    x, y, labels = normal(3, 4), normal(3, 4, seed=1), jnp.array([0, 3, 1])
    alike("optax.losses", lo, "cosine_distance cosine_similarity huber_loss l2_loss log_cosh squared_error", x, y)
    add("optax.losses.cosine_similarity(epsilon=1e-6)", lo.cosine_similarity, x, y, static={"epsilon": 1e-6})
    signs = jnp.sign(y)
    alike("optax.losses", lo, "hinge_loss perceptron_loss", x, signs, argnums=0)
    binary = (y > 0).astype(jnp.float32)
    alike("optax.losses", lo, "sigmoid_binary_cross_entropy sigmoid_focal_loss sparsemax_loss", x, binary, argnums=0)
    alike("optax.losses", lo, "binary_dice_loss dice_loss multiclass_generalized_dice_loss", x, binary)
    integers = (
        "multiclass_hinge_loss multiclass_perceptron_loss multiclass_sparsemax_loss softmax_cross_entropy_with_integer_labels"
    )
    alike("optax.losses", lo, integers, x, labels)
    alike("optax.losses", lo, "softmax_cross_entropy safe_softmax_cross_entropy poly_loss_cross_entropy", x, simplex(3, 4))
    alike("optax.losses", lo, "kl_divergence", jax.nn.log_softmax(x), simplex(3, 4, seed=1))
    logs = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    add("optax.losses.kl_divergence_with_log_targets", lo.kl_divergence_with_log_targets, *logs)
    add("optax.losses.convex_kl_divergence", lo.convex_kl_divergence, logs[0], simplex(3, 4, seed=1))
    add("optax.losses.generalized_kl_divergence", lo.generalized_kl_divergence, logs[0], simplex(3, 4, seed=1))
    add("optax.losses.ntxent", lo.ntxent, normal(4, 3), jnp.array([0, 0, 1, 1]))
    add("optax.losses.ranking_softmax_loss", lo.ranking_softmax_loss, x, positive(3, 4))
    add(
        "optax.losses.ranking_softmax_loss(where)",
        lambda x, y, m: lo.ranking_softmax_loss(x, y, where=m),
        x,
        positive(3, 4),
        y > -0.5,
    )
    add("optax.losses.make_fenchel_young_loss", lo.make_fenchel_young_loss(jax.nn.logsumexp), normal(4), simplex(4))
    add(
        "optax.losses.softmax_cross_entropy_with_integer_labels(where)",
        lambda x, i, m: lo.softmax_cross_entropy_with_integer_labels(x, i, where=m),
        x,
        labels,
        y > -1.5,
    )
    pr, v = optax.projections, normal(5) * 2
    add("optax.projections.projection_box", lambda x, a, b: pr.projection_box(x, a, b), v, -positive(5), positive(5, seed=1))
    add("optax.projections.projection_hypercube", lambda x: pr.projection_hypercube(x), v)
    add("optax.projections.projection_non_negative", pr.projection_non_negative, v)
    for name in ("simplex", "l1_ball", "l1_sphere", "l2_ball", "l2_sphere", "linf_ball"):
        add(f"optax.projections.projection_{name}", getattr(pr, f"projection_{name}"), v, jnp.float32(0.8))
    for name in ("halfspace", "hyperplane"):
        add(f"optax.projections.projection_{name}", getattr(pr, f"projection_{name}"), v, normal(5, seed=1), jnp.float32(-3.0))
    add("optax.projections.projection_vector", pr.projection_vector, v, normal(5, seed=1))
    add("optax.safe_norm", lambda x: optax.safe_norm(x, 1e-3, axis=-1), x)
    add("optax.safe_norm(ord=1)", lambda x: optax.safe_norm(x, 1e-3, ord=1, axis=-1), x)
    add("optax.global_norm", lambda x, y: optax.global_norm({"x": x, "y": y}), x, y)


def of_flax() -> None:
    x, image = normal(3, 4), normal(1, 4, 4, 2)
    for name, f in {"avg_pool": nn.avg_pool, "max_pool": nn.max_pool, "min_pool": nn.pooling.min_pool}.items():
        for padding in ("VALID", "SAME"):
            add(f"flax.linen.{name}({padding})", lambda x, f=f, p=padding: f(x, (2, 3), (2, 1), p), image)
    add(
        "flax.linen.avg_pool(count_include_pad=False)",
        lambda x: nn.avg_pool(x, (2, 2), padding="SAME", count_include_pad=False),
        image,
    )
    add("flax.linen.dot_product_attention", nn.dot_product_attention, *(normal(1, 3, 2, 4, seed=s) for s in range(3)))

    def layer(name: str, module: Any, *inputs: Any, rngs: Any = None, mutable: Any = False, **keywords: Any) -> None:
        variables = module.init(jax.random.key(0), *inputs, **keywords)
        noise = iter(range(1, 1000))
        variables = jax.tree.map(lambda v: v + 0.1 * normal(*v.shape, seed=next(noise)), variables)
        state = {k: v for k, v in variables.items() if k != "params"}

        def apply(params: Any, *inputs: Any) -> Any:
            y = module.apply({"params": params, **state}, *inputs, mutable=mutable, **keywords)
            return y[0] if mutable else y

        add(f"flax.linen.{name}", apply, variables.get("params", {}), *inputs)

    layer("Dense", nn.Dense(3), x)
    layer("LayerNorm", nn.LayerNorm(), x)
    layer("LayerNorm(mask)", nn.LayerNorm(), x, mask=normal(3, 4, seed=1) > -0.5)
    layer("RMSNorm", nn.RMSNorm(), x)
    layer("GroupNorm", nn.GroupNorm(num_groups=2), normal(2, 3, 4))
    layer("BatchNorm(train)", nn.BatchNorm(use_running_average=False), x, mutable=["batch_stats"])
    layer("BatchNorm(inference)", nn.BatchNorm(use_running_average=True), x)
    layer("WeightNorm", nn.WeightNorm(nn.Dense(3)), x)
    layer("SpectralNorm", nn.SpectralNorm(nn.Dense(3)), x, mutable=["batch_stats"], update_stats=False)


def of_equinox() -> None:
    x, image, key = normal(4), normal(2, 4, 4), jax.random.key(0)

    def layer(name: str, module: Any, *inputs: Any, **keywords: Any) -> None:
        params, static = eqx.partition(module, eqx.is_inexact_array)
        add(f"equinox.nn.{name}", lambda params, *inputs: eqx.combine(params, static)(*inputs, **keywords), params, *inputs)

    en = eqx.nn
    layer("Linear", en.Linear(4, 3, key=key), x)
    layer("LayerNorm", en.LayerNorm(4), x)
    layer("GRUCell", en.GRUCell(3, 4, key=key), normal(3), x)
    layer("WeightNorm", en.WeightNorm(en.Linear(4, 3, key=key)), x)
    for name in ("MaxPool2d",):
        layer(name, getattr(en, name)(2, 2), image)
        layer(f"{name}(padding)", getattr(en, name)(2, 2, padding=1), image)
    layer("AdaptiveAvgPool2d", en.AdaptiveAvgPool2d(2), image)
    layer("AdaptiveMaxPool2d", en.AdaptiveMaxPool2d(3), image)

    def stateful(made: Any) -> tuple[Any, Callable[..., Any]]:
        """The parameters, and a function of them that begins with the first state at each call: a state is used once."""
        module, state = made
        params, static = eqx.partition(module, eqx.is_inexact_array)
        leaves, tree = jax.tree.flatten(state)
        return params, lambda params, *inputs: eqx.combine(params, static)(*inputs, jax.tree.unflatten(tree, leaves))[0]

    params, apply = stateful(en.make_with_state(en.SpectralNorm)(en.Linear(4, 3, key=key), "weight", key=key))
    add("equinox.nn.SpectralNorm", apply, params, x)
    params, norm = stateful(en.make_with_state(en.BatchNorm)(3, "batch", mode="batch"))
    add(
        "equinox.nn.BatchNorm(batch)",
        lambda params, x: jax.vmap(lambda row: norm(params, row), axis_name="batch")(x),
        params,
        normal(4, 3),
    )


FAMILIES = (of_jax_nn, of_jax_numpy, of_linalg, of_special, of_lax, of_jax_others, of_optax, of_flax, of_equinox)


# ------------------------------------------------------------------------------------------------------------ running


def survey(entry: Entry, checks: Sequence[str]) -> dict[str, Any]:
    """What check finds in a function, as data: its findings, its notes, or what it raised."""
    started = time.monotonic()
    result: dict[str, Any] = {"findings": [], "notes": [], "raised": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = check(entry.fn, *entry.args, checks=checks, **entry.options)
        result["findings"] = [{"check": f.check, "where": f.where, "message": f.message} for f in report.findings]
        result["notes"] = list(report.notes)
    except Exception as error:  # the checker itself broke, or says that the function cannot be checked
        result["raised"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        jax.clear_caches()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def chosen(only: Sequence[str] | None) -> list[Entry]:
    for family in FAMILIES:
        family()
    return [e for e in ENTRIES.values() if not only or any(fnmatch.fnmatch(e.name, o) or o in e.name for o in only)]


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = jax.devices()[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return {
        "date": datetime.date.today().isoformat(), "versions": versions, "python": platform.python_version(),
        "machine": f"{platform.machine().replace('_', '-')}, {os.cpu_count()} cores, {kind}",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- explanations


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Of all findings of one cause. covers: pairs of (function, check), patterns, and optionally a third, the argument."""

    title: str
    verdict: str
    sentence: str
    example: str
    thread: str
    covers: tuple[tuple[str, ...], ...]

    def matches(self, function: str, found: dict[str, str]) -> bool:
        return any(c[0] == function and c[1] == found["check"] and c[2:] in ((), (found["where"],)) for c in self.covers)


def explanations() -> list[Explanation]:
    """In the order of the file; the first that covers a finding explains it."""
    if not EXPLAINED.exists():
        return []
    told = [Explanation(**{**e, "covers": tuple(map(tuple, e["covers"]))}) for e in json.loads(EXPLAINED.read_text())]
    if wrong := [e.title for e in told if e.verdict not in VERDICTS]:
        raise SystemExit(f"{EXPLAINED.name}: the verdict of {wrong[0]!r} is none of {', '.join(VERDICTS)}")
    return told


def outcome_of(example: str) -> str:
    """What the line of code gives."""
    names = {"jax": jax, "jnp": jnp, "jsp": jsp, "np": np, "lax": lax, "nn": nn, "eqx": eqx, "optax": optax}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = eval(example, names)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    with np.printoptions(precision=7, suppress=False, threshold=30):
        leaves = [np.array2string(np.asarray(leaf), separator=", ") for leaf in jax.tree.leaves(value)]
    return " ".join(", ".join(leaves).split())


Explained = list[tuple[Explanation, list[tuple[str, dict[str, str]]]]]


def explained(results: dict[str, Any], told: Sequence[Explanation]) -> tuple[Explained, list[tuple[str, dict[str, str]]]]:
    """Each explanation with its findings, and the findings without one."""
    groups: dict[int, list[tuple[str, dict[str, str]]]] = {i: [] for i in range(len(told))}
    unexplained = []
    for function, result in results.items():
        for found in result["findings"]:
            number = next((i for i, e in enumerate(told) if e.matches(function, found)), None)
            (unexplained if number is None else groups[number]).append((function, found))
    return [(e, groups[i]) for i, e in enumerate(told)], unexplained


# -------------------------------------------------------------------------------------------------------------- telling


def markdown(data: dict[str, Any], told: Sequence[Explanation]) -> str:
    results = data["functions"]
    groups, unexplained = explained(results, told)
    groups = [(e, found) for e, found in groups if found]
    verdict_of = {(f, x["check"], x["where"]): e.verdict for e, found in groups for f, x in found}
    clean = [f for f, r in results.items() if not r["findings"] and not r["raised"]]
    raised = {f: r["raised"] for f, r in results.items() if r["raised"]}
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    findings = sum(len(r["findings"]) for r in results.values())
    lines = [
        "# What the checker finds in functions that ship",
        "",
        f"`python benchmarks/survey.py`, {data['date']}: {versions}, Python {data['python']}; {data['machine']}.",
        f"Checks: {', '.join(data['checks'])}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| functions | {len(results)} |",
        f"| clean | {len(clean)} |",
        f"| functions with findings | {len(results) - len(clean) - len(raised)} |",
        f"| findings (function, check, argument) | {findings} |",
    ]
    for verdict in VERDICTS:
        causes = [found for e, found in groups if e.verdict == verdict]
        lines.append(f"| of them: {verdict} | {sum(map(len, causes))}, of {len(causes)} causes |")
    lines += [f"| unexplained | {len(unexplained)} |", f"| could not be checked | {len(raised)} |", ""]
    lines += [
        "A finding of *edges* names the first edge that tells; a function may have others of the same cause. An example does",
        "without the checker; it needs `jax`, `jnp = jax.numpy`, `jsp = jax.scipy`, `lax = jax.lax`, `np`, `nn = flax.linen`,",
        "`optax` and `eqx = equinox`, and its outcome is of this run. No infinities are among the edges of a program with a",
        "loop or a singular value decomposition: LAPACK never returns from infinite values there",
        "([lapack issue 1409](https://github.com/Reference-LAPACK/lapack/issues/1409)).",
        "",
    ]
    for verdict in VERDICTS:
        of_verdict = [(e, found) for e, found in groups if e.verdict == verdict]
        if not of_verdict:
            continue
        lines += [f"## {verdict.capitalize()}", ""]
        for e, found in of_verdict:
            lines += [f"### {e.title}", "", e.sentence, "", f"```python\n{e.example}\n# {outcome_of(e.example)}\n```", ""]
            lines += [f"Told in: {e.thread}.", "", "| function | check | argument | finding |", "| --- | --- | --- | --- |"]
            lines += [f"| `{f}` | {x['check']} | `{x['where']}` | {short(x['message'])} |" for f, x in found]
            lines.append("")
    if unexplained:
        lines += ["## Unexplained", "", "| function | check | argument | finding |", "| --- | --- | --- | --- |"]
        lines += [f"| `{f}` | {x['check']} | `{x['where']}` | {short(x['message'])} |" for f, x in unexplained] + [""]
    if raised:
        lines += ["## Could not be checked", ""] + [f"- `{f}`: {cell(why)}" for f, why in raised.items()] + [""]
    lines += ["## All functions", "", "| function | findings | of which |", "| --- | --- | --- |"]
    for function, result in results.items():
        kinds = [verdict_of.get((function, x["check"], x["where"]), "unexplained") for x in result["findings"]]
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        lines.append(
            f"| `{function}` | {len(kinds) or ''} | {'could not be checked' if result['raised'] else counts or 'clean'} |"
        )
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def short(message: str) -> str:
    """Without the advice that every finding of the check has."""
    return cell(message.split(" Usually a branch")[0])


def run(entries: Sequence[Entry], checks: Sequence[str], data: dict[str, Any], path: str | None) -> Iterator[str]:
    """Surveys what is not in the data yet, and keeps them on disk after each function."""
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(entries))
        for entry in entries:
            progress.update(task, description=entry.name)
            if entry.name not in data["functions"]:
                data["functions"][entry.name] = result = survey(entry, checks)
                if path:
                    write_atomically(pathlib.Path(path), json.dumps(data, indent=1).encode())
                if not console.is_terminal:
                    print(
                        f"{entry.name}: {result['seconds']} s, {len(result['findings'])} findings", file=sys.stderr, flush=True
                    )
                for found in result["findings"]:
                    yield f"{entry.name}: [{found['check']}] {found['where']}: {found['message']}"
                if result["raised"]:
                    yield f"{entry.name}: could not be checked: {result['raised']}"
            progress.advance(task)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="functions that match, or have this in their name; by default all"
    )
    parser.add_argument("--quick", action="store_true", help=f"without the checks {', '.join(FURTHER)}")
    parser.add_argument("--json", metavar="FILE", help="write the findings there, after each function")
    parser.add_argument("--resume", action="store_true", help="keep what --json has already, and check the rest")
    parser.add_argument("--render", action="store_true", help="check nothing: explain and report what --json has already")
    parser.add_argument("--markdown", metavar="FILE", help="write the report there")
    parser.add_argument("--list", action="store_true", help="print the functions and stop")
    parser.add_argument(
        "--examples", action="store_true", help="print the examples of the explanations with their outcome, and stop"
    )
    options = parser.parse_args(arguments)
    told = explanations()
    if options.examples:
        for e in told:
            print(f"{e.title} ({e.verdict}; {e.thread})\n  {e.example}\n  {outcome_of(e.example)}")
        return 0
    entries = chosen(options.only)
    if not entries:
        parser.error(f"no function matches {', '.join(options.only)}; --list prints them")
    if options.list:
        print("\n".join(e.name for e in entries))
        return 0
    if (options.resume or options.render) and not options.json:
        parser.error("--resume and --render need --json")
    checks = (*CHECKS, *(() if options.quick else FURTHER))
    data: dict[str, Any] = {**machine(), "checks": list(checks), "functions": {}}
    if options.render:
        data = json.loads(pathlib.Path(options.json).read_text())
        data["functions"] = {e.name: data["functions"][e.name] for e in entries if e.name in data["functions"]}
        entries = []
    elif options.resume and pathlib.Path(options.json).exists():
        before = json.loads(pathlib.Path(options.json).read_text())
        if before["checks"] != data["checks"] or before["versions"] != data["versions"]:
            parser.error(f"{options.json} is of other checks or versions; remove it, or leave out --resume")
        data["functions"] = {e.name: before["functions"][e.name] for e in entries if e.name in before["functions"]}
    for line in run(entries, checks, data, options.json):
        print(line, flush=True)
    groups, unexplained = explained(data["functions"], told)
    for function, found in unexplained:
        print(f"unexplained: {function}: [{found['check']}] {found['where']}: {found['message']}")
    for e, found in groups:
        if not found and not options.only and not options.quick:
            print(f"an explanation without a finding: {e.title}")
    if options.markdown:
        write_atomically(pathlib.Path(options.markdown), markdown(data, told).encode())
    results = data["functions"].values()
    raised = sum(r["raised"] is not None for r in results)
    clean, findings = sum(not r["findings"] and not r["raised"] for r in results), sum(len(r["findings"]) for r in results)
    print(f"{len(results)} functions: {clean} clean; {findings} findings, {len(unexplained)} unexplained; {raised} not checked")
    return 1 if unexplained or raised else 0


if __name__ == "__main__":
    sys.exit(main())
