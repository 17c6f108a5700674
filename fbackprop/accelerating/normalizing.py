"""Finds normalizations: behind a reciprocal square root, the array whose variance it is of; before it, scale and bias."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program, Value, region
from fbackprop.accelerating.sites import Near, Site, first
from fbackprop.accelerating.walking import SHAPING, chain, peeled, sides, source

__all__ = ["normalizations"]

_ONWARD = SHAPING | {"mul", "add", "sub", "div"}


def normalizations(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    for anchor in program.equations:
        if anchor.name not in ("rsqrt", "sqrt") or id(anchor) in taken or not anchor.outputs[0].is_float:
            continue
        epsilon = _epsilon(anchor.inputs[0])
        summed = functools.partial(_is_summed, anchor)
        sources = list(itertools.islice(source(anchor.inputs[0], summed, most=40), 6))
        if epsilon is None or not sources:
            continue
        site, why = first(program, _guesses(program, anchor, sources, epsilon))
        yield site if site is not None else Near("norm", why, anchor)


def _is_summed(anchor: Equation, value: Value) -> bool:
    return value.is_float and len(value.shape) > 1 and bool(_sums(anchor, [value]))


def _epsilon(value: Value) -> float | None:
    """What is added to the variance."""
    for _ in range(4):
        maker = value.maker
        if maker is None:
            return None
        if maker.name == "add":
            for v in maker.inputs:
                inner = peeled(v)
                while inner.maker is not None and inner.maker.name in SHAPING:
                    inner = inner.maker.inputs[0]
                if inner.number is not None:
                    return inner.number
            return None
        if maker.name not in SHAPING:
            return None
        value = maker.inputs[0]
    return None


def _sums(anchor: Equation, sources: list[Value]) -> list[Equation]:
    """The sums over elements that the anchor depends on, behind the last source."""
    found = region([sources[-1]], [anchor.outputs[0]])
    return [] if found is None else [e for e in found.equations if e.name == "reduce_sum" and id(e.outputs[0]) in found.moving]


def _guesses(program: Program, anchor: Equation, sources: list[Value], epsilon: float) -> Iterator[Site]:
    ends = [v for v in chain(anchor.outputs[0], lambda e: e.name in _ONWARD) if v.is_float]
    for x in sources:
        summed = _sums(anchor, [x])
        if not summed:
            continue
        for out in reversed([v for v in ends if v.shape == x.shape]):
            entering, with_constants = sides(out, [x]), sides(out, [x], constants=True)
            for own in (entering, *([with_constants] if with_constants != entering else [])):
                if own is None or len(own) > 2:
                    continue
                scale = next((v for v, e in own if e.name in ("mul", "div")), None)
                bias = next((v for v, e in own if e.name in ("add", "sub") and v is not scale), None)
                if len(own) == (scale is not None) + (bias is not None):
                    yield from _of(program, anchor, x, out, scale, bias, summed[0], epsilon)


def _of(
    program: Program, anchor: Equation, x: Value, out: Value, scale: Value | None, bias: Value | None, summed: Equation,
    epsilon: float,
) -> Iterator[Site]:  # fmt: skip
    parameters = [peeled(v) for v in (scale, bias) if v is not None]
    has_scale, has_bias = scale is not None, bias is not None
    common = (has_scale, has_bias, epsilon)
    wider = np.dtype(out.dtype).itemsize > np.dtype(x.dtype).itemsize  # the op gives what it is given

    def site(op: str, call: Callable[..., Any], *options: Any) -> Site:
        def widened(values: Any, *p: Any) -> tuple[Any, ...]:
            return call(values.astype(out.dtype) if wider else values, *p)

        whole = [(x, len(x.shape) - 1), *((p, a) for p in parameters for a in range(len(p.shape)))]
        return Site(op, [x, *parameters], [out], widened, (*common, *options), anchor, whole=whole)

    axes = tuple(sorted(int(a) for a in summed.params["axes"]))
    rank = len(x.shape)
    same = summed.inputs[0].shape == x.shape
    if same and axes == tuple(range(rank - len(axes), rank)):

        def layer(x: Any, *p: Any) -> tuple[Any, ...]:
            given = _named(p, has_scale, has_bias, x.shape[axes[0] :])
            return (ops.layer_norm(x, **given, epsilon=epsilon, axis=axes),)

        def rms(x: Any, *p: Any) -> tuple[Any, ...]:
            given = _named(p, has_scale, False, x.shape[axes[0] :])
            return (ops.rms_norm(x, **given, epsilon=epsilon, axis=axes),)

        yield site("layer_norm", layer, axes)
        if not has_bias:
            yield site("rms_norm", rms, axes)
    if same and len(axes) == rank - 1 and axes[0] == 0:
        (features,) = set(range(rank)) - set(axes)
        yield from _batch(program, site, x, out, has_scale, has_bias, epsilon, features)
    if rank > 2 and x.shape[0] and summed.outputs[0].size % x.shape[0] == 0:
        groups = summed.outputs[0].size // x.shape[0]

        def group(x: Any, *p: Any) -> tuple[Any, ...]:
            given = _named(p, has_scale, has_bias, x.shape[-1:])
            return (ops.group_norm(x, **given, num_groups=groups, epsilon=epsilon),)

        if groups and x.shape[-1] % groups == 0:
            yield site("group_norm", group, groups)


def _batch(
    program: Program, site: Callable[..., Site], x: Value, out: Value, has_scale: bool, has_bias: bool, epsilon: float, at: int
) -> Iterator[Site]:
    """Batch norm in training, of features along any axis; mean and variance may be used elsewhere, for running averages."""
    plain = site("batch_norm", lambda: ())
    found = region(plain.inputs, [out])
    leaks = [] if found is None else found.leaks(program)
    features = x.shape[at]
    if len(leaks) > 2 or any(v.size != features for v in leaks):
        return
    shapes = [(tuple(n == features and n != 1 for n in v.shape), v.dtype) for v in leaks]
    for kinds in itertools.product((0, 1), repeat=len(leaks)):

        def batch(x: Any, *p: Any, kinds: tuple[int, ...] = kinds) -> tuple[Any, ...]:
            given = _named(p, has_scale, has_bias, x.shape[at : at + 1])
            y, *statistics = ops.batch_norm(jnp.moveaxis(x, at, -1), **given, train=True, epsilon=epsilon)
            spread = [[x.shape[at] if full else 1 for full in own] for own, _ in shapes]
            leaked = (statistics[k].reshape(s).astype(d) for k, s, (_, d) in zip(kinds, spread, shapes))
            return (jnp.moveaxis(y, -1, at), *leaked)

        made = site("batch_norm", batch, at, kinds, tuple(s for s, _ in shapes))
        made.outputs = [out, *leaks]
        yield made


def _named(p: tuple[Any, ...], has_scale: bool, has_bias: bool, shape: tuple[int, ...]) -> dict[str, Any]:
    """Scale and bias by name, in the shape of the normalized axes."""
    names = ["scale"] * has_scale + ["bias"] * has_bias
    if any(int(np.prod(a.shape)) != int(np.prod(shape)) for a in p):
        raise ValueError("scale or bias is not of the normalized axes")
    return {n: jnp.reshape(a, shape) for n, a in zip(names, p)}
