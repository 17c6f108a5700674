"""A stack of reversible layers: activations in constant memory, whatever the depth.

Each layer splits its input in halves and adds to each half a function of the other:

    y₁ = x₁ + f(x₂)                 x₂ = y₂ − g(y₁)
    y₂ = x₂ + g(y₁)                 x₁ = y₁ − f(x₂)

so that the input can be computed from the output, and only the output of the whole stack is kept. The backward walks from the
last layer to the first. In each, with the halves of the output and of its cotangent, the pullbacks of f and g are taken where
the forward had them:

    dz₁ = dy₁ + (∂g/∂y₁)ᵀ dy₂       dθg = (∂g/∂θ)ᵀ dy₂
    dx₂ = dy₂ + (∂f/∂x₂)ᵀ dz₁       dθf = (∂f/∂θ)ᵀ dz₁         dx₁ = dz₁

f and g are functions of the user. Their pullbacks come from ``jax.vjp``, in which ops have their own backward; it computes
f(x₂) and g(y₁) too, so that each is evaluated twice in all: once in the forward, once here.

What is subtracted again must be what was added, so the halves are added, and the output of the stack kept, in twice the
precision of x: in float32 where x is narrower, and else as the sum of two numbers, h and the rounding error l of h:

    s = h + v,   e = (h − (s − b)) + (v − b) with b = s − h,   so that s + e = h + v without error (Knuth);   l' = l + e

There remains what f or g themselves round differently when they are evaluated again: it matters where they return far more
than the half that they are added to.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide
from fbackprop.rules import Static, rule
from fbackprop.samples import normal, sample

__all__ = ["reversible"]

Block = Callable[[Any, jax.Array], jax.Array]
Halves = tuple[Any, Any]


class _Double(NamedTuple):
    """A number in twice the precision: the sum of two; the second is None where the first is twice as precise as x."""

    high: jax.Array
    low: jax.Array | None

    def plus(self, v: jax.Array) -> "_Double":
        v = v.astype(self.high.dtype)
        s = self.high + v
        if self.low is None:
            return _Double(s, None)
        b = s - self.high
        low = self.low + ((self.high - (s - b)) + (v - b))
        high = s + low
        return _Double(high, low - (high - s))


def _halves(x: Any) -> Halves:
    """The halves of the last axis of each array."""
    leaves, structure = jax.tree.flatten(x)
    pairs = [jnp.split(leaf, 2, axis=-1) for leaf in leaves]
    return structure.unflatten([p[0] for p in pairs]), structure.unflatten([p[1] for p in pairs])


def _joined(halves: Halves) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *halves)


class _Saved(NamedTuple):
    y: _Double
    params_f: Any
    params_g: Any
    dtype: Static


def _forward(f: Block, g: Block, params_f: Any, params_g: Any, x: ArrayLike) -> tuple[jax.Array, _Saved]:
    x = jnp.asarray(x)

    def layer(halves: Halves, params: tuple[Any, Any]) -> tuple[Halves, None]:
        x1, x2 = halves
        y1 = x1.plus(f(params[0], x2.high.astype(x.dtype)))
        y2 = x2.plus(g(params[1], y1.high.astype(x.dtype)))
        return (y1, y2), None

    # Zeros that vary over the same mesh axes as x.
    start = _Double(wide(x), jnp.where(jnp.isnan(x), x, 0) if wide(x).dtype == x.dtype else None)
    y = _joined(jax.lax.scan(layer, _halves(start), (params_f, params_g))[0])
    return y.high.astype(x.dtype), _Saved(y, params_f, params_g, Static(x.dtype))


def _pullback(block: Block, params: Any, x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """block(params, x), and its cotangents: for each leaf of params that is floating-point (None for others), and for x."""
    leaves, structure = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

    def of(moved: list[jax.Array], x: jax.Array) -> jax.Array:
        values = list(leaves)
        for i, value in zip(moving, moved):
            values[i] = value
        return block(structure.unflatten(values), x)

    y, pullback = jax.vjp(of, [leaves[i] for i in moving], x.astype(dtype))
    return y.astype(x.dtype), lambda dy: pullback(dy.astype(y.dtype))


def _backward(saved: _Saved, dy: jax.Array, *, f: Block, g: Block) -> tuple[Any, ...]:
    dtype = saved.dtype.value

    def layer(carry: tuple[Halves, Halves], params: tuple[Any, Any]) -> tuple[tuple[Halves, Halves], Any]:
        (y1, y2), (dy1, dy2) = carry
        own, pull = _pullback(g, params[1], y1.high, dtype)
        x2 = y2.plus(-own)
        dparams_g, through = pull(dy2)
        dz1 = dy1 + through.astype(dy1.dtype)
        own, pull = _pullback(f, params[0], x2.high, dtype)
        x1 = y1.plus(-own)
        dparams_f, through = pull(dz1)
        return ((x1, x2), (dz1, dy2 + through.astype(dy2.dtype))), (dparams_f, dparams_g)

    start = (_halves(saved.y), _halves(wide(dy)))
    (_, dx), (dparams_f, dparams_g) = jax.lax.scan(layer, start, (saved.params_f, saved.params_g), reverse=True)
    return _placed(saved.params_f, dparams_f), _placed(saved.params_g, dparams_g), _joined(dx)


def _placed(params: Any, cotangents: list[jax.Array]) -> Any:
    """The cotangents of the floating-point leaves in the structure of the parameters, None elsewhere."""
    leaves, structure = jax.tree.flatten(params)
    rest = iter(cotangents)
    return structure.unflatten([next(rest) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in leaves])


def _captured(fn: Any) -> list[Any]:
    """What a function has closed over, as far as that can be seen."""
    if isinstance(fn, functools.partial):
        return [*jax.tree.leaves((fn.args, fn.keywords)), *_captured(fn.func)]
    if inspect.ismethod(fn):
        return [*jax.tree.leaves(fn.__self__), *_captured(fn.__func__)]
    found: list[Any] = []
    for cell in getattr(fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            value = cell.cell_contents
            found += _captured(value) if callable(value) else jax.tree.leaves(value)
    return found


def _check(f: Block, g: Block, params_f: Any, params_g: Any, x: ArrayLike) -> None:
    require_float("reversible", x=x)
    if jnp.ndim(x) < 1 or jnp.shape(x)[-1] % 2:
        raise ValueError(f"reversible: the last axis of x is split in halves, so its length must be even; got {shapes(x=x)}.")
    depths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((params_f, params_g))}
    if len(depths) != 1 or () in depths:
        raise ValueError(
            "reversible: every array of params_f and params_g has a first axis of one length, the number of layers; got "
            f"shapes {sorted(jnp.shape(leaf) for leaf in jax.tree.leaves((params_f, params_g)))}."
        )
    half = jax.ShapeDtypeStruct((*jnp.shape(x)[:-1], jnp.shape(x)[-1] // 2), jnp.result_type(x))
    for name, block, params in (("f", f, params_f), ("g", g, params_g)):
        if any(isinstance(value, Tracer) for value in _captured(block)):
            raise ValueError(
                f"reversible: {name} closes over a traced value, which would receive no gradient; pass it in params_{name}, "
                "with a first axis for the layers."
            )
        one = jax.tree.map(lambda leaf: jax.eval_shape(lambda v: v[0], leaf), params) if () not in depths else params
        y = jax.eval_shape(block, one, half)
        if jnp.shape(y) != half.shape:
            raise ValueError(
                f"reversible: {name} must return one array of the shape that it is given, half of x: {half.shape}; it "
                f"returns {jax.tree.map(jnp.shape, y)}."
            )


def _sine_layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sin(x @ kernel)


def _shifted_layer(shift: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sin(x + shift)


@rule(
    forward=_forward,
    backward=_backward,
    static=["f", "g"],
    samples=[
        sample(_sine_layer, _sine_layer, normal(3, 4, 4, scale=0.5), normal(3, 4, 4, scale=0.5), normal(5, 8)),
        sample(_sine_layer, _shifted_layer, normal(2, 3, 3, scale=0.5), normal(2, 1, 1, 3), normal(2, 4, 6)),
    ],
    workloads=[
        sample(_sine_layer, _sine_layer, normal(8, 256, 256, scale=0.06), normal(8, 256, 256, scale=0.06), normal(2048, 512),
               note="8 layers"),
    ],
    keeps="params_f, params_g, y in twice the precision: no activation of any layer",
    # Of the output alone, rounded to the precision of x, the inputs of the layers cannot be had in that precision.
    minimum=lambda params_f, params_g, y: nbytes(*jax.tree.leaves((params_f, params_g)), y, y),
    recomputes="the input of each layer from its output: f and g",
)  # fmt: skip
def reversible(f: Block, g: Block, params_f: Any, params_g: Any, x: ArrayLike) -> jax.Array:
    """A stack of reversible layers, y1 = x1 + f(params_f, x2), y2 = x2 + g(params_g, y1), whose backward keeps no activations.

    x [..., 2d], params_f and params_g pytrees of arrays [layers, ...] -> y [..., 2d]; x1, x2 are halves of the last axis.

    The backward computes the input of each layer from its output, so the memory does not grow with the depth; f and g are
    evaluated once more. Their own backward is that of the ops that they use.

    Args:
      f, g: functions of (one layer's parameters, array [..., d]) that return an array of the same shape. They are static:
        pass functions that exist once, such as those of a module, as each new function object is compiled anew. All arrays
        that are learned, and random keys (a key for each layer), come in the parameters, not from a closure.
      params_f, params_g: the parameters of all layers, stacked along a first axis. Integers, masks and keys may be among them.
    Raises:
      ValueError: where x cannot be halved, the number of layers differs, f or g change the shape or close over a traced value.
      TypeError: where x is not floating-point.
    Source: Gomez et al. 2017, arXiv:1707.04585.
    """
    _check(f, g, params_f, params_g, x)
    x = jnp.asarray(x)

    def layer(halves: Halves, params: tuple[Any, Any]) -> tuple[Halves, None]:
        x1, x2 = halves
        y1 = x1 + f(params[0], x2.astype(x.dtype)).astype(x1.dtype)
        y2 = x2 + g(params[1], y1.astype(x.dtype)).astype(x2.dtype)
        return (y1, y2), None

    return _joined(jax.lax.scan(layer, _halves(wide(x)), (params_f, params_g))[0]).astype(x.dtype)
