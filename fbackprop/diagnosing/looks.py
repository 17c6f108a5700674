"""One look at a training step: a few numbers for each op call, each argument and each layer, forward and backward.

The loss and its gradient are computed as ever, by the rules' own backwards, but each argument and each output of a call
goes through an identity. Its backward hands the cotangent on unchanged and gives a *slot*, an array of zeros that the loss
was given beside the parameters, the numbers that were measured there as its cotangent:

    forward    y = tap(y, measured, slot)                       measured: of y alone, a few numbers
    backward   dy, _, dslot = dy, 0, {measured, ‖dy‖², …}        so the gradient by the slots is the record

Nothing leaves the function but gradients, so it is pure: it may be jitted, and the calls may stand inside
``jax.checkpoint`` and ``jax.vmap``. Cotangents add up: what is measured are sums (squares, counts), and what a call that
is mapped over examples measures is the sum over the examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.diagnosing.calls import Call, Layer, Layout, Place, is_float, under
from fbackprop.diagnosing.variants import AS_IT_IS, DYING, SQUASHING, Variant, run_rule
from fbackprop.rules import Rule, Static

__all__ = ["FLAT", "Look", "look"]

FLAT = 0.05
"""A unit is saturated where its activation's slope is below this share of the largest slope that the activation has:
|tanh| > 0.975, sigmoid below 0.013 or above 0.987."""

_OF_CALL = ("out", "dout", "bad_out", "bad_dout", "dead", "saturated")
_OF_INPUT = ("din", "bad_in", "bad_din", "peak_in")
_OF_LAYER = ("weight", "gradient", "update", "kernel")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("loss", "calls", "inputs", "layers"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Look:
    """What was measured, in four arrays; the layout, which names their columns, is static. A pytree.

    Norms are Euclidean. ``look["dout"]`` is a row by name:

    of each call: ``out`` and ``dout``, the norms of its outputs and of their cotangent; ``dead``, the share of units (entries
    of the last axis) whose slope is zero for the whole batch; ``saturated``, the share of elements whose slope is below
    ``FLAT`` of the largest (NaN where it is no such activation); ``bad_out``, ``bad_dout``, how many of its outputs and of
    their cotangents are not finite;
    of each input: ``din``, the norm of its cotangent; ``bad_in``, ``bad_din``; ``peak_in``, the largest finite magnitude;
    of each layer: ``weight``, ``gradient``, ``update``, the norms of its parameters; ``kernel``, that of its kernel alone.

    A quick look has no ``din`` of parameters, no peaks, and 1 for any number of bad values.
    """

    loss: Any
    calls: Any  # [6, calls]
    inputs: Any  # [4, inputs]
    layers: Any  # [4, layers]
    layout: Layout

    def __getitem__(self, name: str) -> np.ndarray:
        for names, rows in ((_OF_CALL, self.calls), (_OF_INPUT, self.inputs), (_OF_LAYER, self.layers)):
            if name in names:
                return np.asarray(rows)[names.index(name)]
        raise KeyError(f"Look: there is no row {name!r}; there are {', '.join((*_OF_CALL, *_OF_INPUT, *_OF_LAYER))}.")


Update = Callable[[Any, Any], Any]


def look(
    loss: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    layout: Layout,
    update: Update,
    variant: Variant = AS_IT_IS,
    thorough: bool = False,
) -> Look:
    """Measures ``loss(params, *args)``, which returns a scalar and anything else.

    Args:
      layout: what ``discover`` found for it. update: ``(grads, value) -> updates``, the optimizer's. thorough: whether
        parameters have taps too, and bad values are counted: five times the reductions, for when there are some.
    """

    def tapped(params: Any, slots: Any) -> Any:
        return under(_Taps(slots), loss, variant)(params, *args)

    slots = [_slots(call, thorough) for call in layout.calls]
    (value, _), (grads, measured) = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)(params, slots)
    calls = [_row_of_call(own["out"]) for own in measured]
    inputs = [_row_of_input(one) for own in measured for one in own["in"]]
    trees = [[jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (params, grads, update(grads, value))]
    squares = [_squares(tree, layout) for tree in trees]
    layers = [_row_of_layer(layer, squares) for layer in layout.layers]
    rows = _columns(calls, len(_OF_CALL)), _columns(inputs, len(_OF_INPUT)), _columns(layers, len(_OF_LAYER))
    return Look(value, *rows, layout)


def _columns(columns: list[Any], rows: int) -> jax.Array:
    return jnp.stack(columns, 1).astype(jnp.float32) if columns else jnp.zeros((rows, 0), jnp.float32)


def _row_of_call(m: dict[str, Any]) -> jax.Array:
    missing = jnp.full((), jnp.nan)
    dead = (m["active"] == 0).mean() if "active" in m else missing
    saturated = m["flat"] / jnp.maximum(m["count"], 1) if "flat" in m else missing
    bad = m.get("bad", ~jnp.isfinite(m["y2"])), m.get("bad_d", ~jnp.isfinite(m["d2"]))
    return jnp.stack([jnp.sqrt(m["y2"]), jnp.sqrt(m["d2"]), *bad, dead, saturated])


def _row_of_input(m: dict[str, Any]) -> jax.Array:
    zero = jnp.zeros(())
    if not m:  # a parameter, in a quick look
        return jnp.stack([zero, zero, zero, zero])
    return jnp.stack([jnp.sqrt(m["d2"]), m.get("bad", zero), m.get("bad_d", ~jnp.isfinite(m["d2"])), m.get("peak", zero)])


def _row_of_layer(layer: Layer, squares: list[dict[Place, jax.Array]]) -> jax.Array:
    zero = jnp.zeros(())
    sums = [sum((own[place] for place in layer.places), zero) for own in squares]
    kernel = zero if layer.kernel is None else squares[0].get(layer.kernel, zero)
    return jnp.sqrt(jnp.stack([*sums, kernel]))


def _squares(leaves: list[Any], layout: Layout) -> dict[Place, jax.Array]:
    """The sum of squares of each parameter, of each place of a stack."""
    found: dict[Place, jax.Array] = {}
    for number, (leaf, parameter) in enumerate(zip(leaves, layout.parameters)):
        square = jnp.square(_wide(leaf))
        if not parameter.stacked:
            found[number, None] = square.sum()
            continue
        rows = square.sum(tuple(range(1, square.ndim)))
        found.update(((number, i), rows[i]) for i in range(parameter.shape[0]))
    return found


# The taps.


def _slots(call: Call, thorough: bool) -> dict[str, Any]:
    """What is measured of a call: the names of the slots say it."""
    zero = jnp.zeros((), jnp.float32)
    out: dict[str, Any] = {name: zero for name in ("y2", "d2", *(["bad", "bad_d"] if thorough else []))}
    if call.op in DYING:
        out["active"] = jnp.zeros(call.units, jnp.float32)
    if call.op in SQUASHING:
        out |= {"flat": zero, "count": zero}
    names = ("d2", "bad", "bad_d", "peak") if thorough else ("d2",)
    return {"out": out, "in": [{n: zero for n in names} if thorough or i.place is None else {} for i in call.inputs]}


class _Taps:
    """The recorder: each call in its turn takes its slots."""

    def __init__(self, slots: list[dict[str, Any]]):
        self._slots = iter(slots)

    def __call__(self, rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
        slots = next(self._slots)
        leaves, tree = jax.tree.flatten(dynamic)
        own = iter(slots["in"])
        leaves = [_tapped([leaf], next(own))[0] if is_float(leaf) else leaf for leaf in leaves]
        with jax.disable_jit(False):
            dynamic = tree.unflatten(leaves)
            results, structure = jax.tree.flatten(run_rule(rule, dynamic, static))
            floats = [i for i, leaf in enumerate(results) if is_float(leaf)]
            slopes = _slopes(rule, dynamic, static) if {"active", "flat"} & set(slots["out"]) else {}
            tapped = _tapped([results[i] for i in floats], slots["out"], slopes)
        for i, leaf in zip(floats, tapped):
            results[i] = leaf
        return structure.unflatten(results)


def _tapped(values: list[Any], slot: dict[str, Any], measured: dict[str, Any] | None = None) -> list[Any]:
    """The values, with what the slot has names for measured; ``measured`` already in the forward."""
    if not slot:
        return values
    wide = [_wide(jax.lax.stop_gradient(v)) for v in values]
    measured = dict(measured or {})
    if "y2" in slot:
        measured["y2"] = _sum(jnp.square(v) for v in wide)
    if "bad" in slot:
        measured["bad"] = _sum(~jnp.isfinite(v) for v in wide)
    if "peak" in slot:
        peaks = [jnp.max(jnp.where(jnp.isfinite(v), jnp.abs(v), 0), initial=0.0) for v in wide]
        measured["peak"] = functools.reduce(jnp.maximum, peaks).astype(jnp.float32)
    return _tap(values, measured, slot)


@jax.custom_vjp
def _tap(values: list[Any], measured: dict[str, Any], slot: dict[str, Any]) -> list[Any]:
    return values


def _tap_forward(values: list[Any], measured: dict[str, Any], slot: dict[str, Any]) -> Any:
    return values, (measured, Static(tuple(slot)))


def _tap_backward(kept: tuple[dict[str, Any], Static], cotangents: list[Any]) -> Any:
    measured, names = kept[0], kept[1].value
    found = dict(measured)
    if "d2" in names:
        found["d2"] = _sum(jnp.square(_wide(d)) for d in cotangents)
    if "bad_d" in names:
        found["bad_d"] = _sum(~jnp.isfinite(d) for d in cotangents)
    return cotangents, jax.tree.map(jnp.zeros_like, measured), found


_tap.defvjp(_tap_forward, _tap_backward)


def _slopes(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> dict[str, Any]:
    """Of an activation: from the slopes that its own backward gives, with ones as the cotangent of y."""
    x = jax.lax.stop_gradient(dynamic[0])
    y, pullback = jax.vjp(lambda x: run_rule(rule, (x, *dynamic[1:]), static), x)
    slope = jnp.abs(_wide(pullback(jnp.ones_like(y))[0]))
    if rule.name in DYING:
        axes = tuple(range(max(slope.ndim - 1, 0)))
        return {"active": jnp.sum(jnp.atleast_1d(slope != 0), axes, dtype=jnp.float32)}
    flat = slope < FLAT * SQUASHING[rule.name]
    # Not a constant: under vmap it must add up over the examples, as the others do.
    return {"flat": jnp.sum(flat, dtype=jnp.float32), "count": jnp.sum(flat | ~flat, dtype=jnp.float32)}


def _sum(arrays: Any) -> jax.Array:
    return sum((jnp.sum(a, dtype=jnp.float32) for a in arrays), jnp.zeros((), jnp.float32))


def _wide(array: Any) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
