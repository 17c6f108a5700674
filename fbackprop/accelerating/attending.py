"""Finds attention: two batched matrix products, and between them a softmax over the keys, with a cap, a bias and a mask or
without.

A mask or bias of constants is proved as if it were an argument, for which a few queries do. Where it turns out to be causal or
a window of keys, the op is told that in its place.

Which axis is what follows from the products and from the classes of axes in between. The scale is measured: with twice the
logits, differences of log p change by as much as the scaled logits do.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fbackprop import ops
from fbackprop.accelerating.axes import Axes
from fbackprop.accelerating.banding import Band, band_of
from fbackprop.accelerating.evaluation import Unknown, evaluate, is_elementwise
from fbackprop.accelerating.program import Equation, Program, Region, Value, region
from fbackprop.accelerating.sites import MOST, Near, Site, first
from fbackprop.accelerating.walking import REDUCING, SHAPING, chain, peeled, sides

__all__ = ["attentions"]


def attentions(program: Program, taken: set[int]) -> Iterator[Site | Near]:
    for anchor in program.equations:
        if anchor.name != "dot_general" or id(anchor) in taken:
            continue
        for side in (0, 1):
            scores = _scores(anchor.inputs[side])
            if scores is None or scores is anchor or scores.outputs[0].size < anchor.inputs[side].size:
                continue
            weights = anchor.inputs[side]
            between = region([scores.outputs[0], *_others(weights, scores.outputs[0])], [weights])
            if between is None or not any(e.name == "exp" for e in between.equations):
                continue
            site, why = first(program, _guesses(anchor, side, scores), _strange(between.inputs[1:]))
            yield site if site is not None else Near("dot_product_attention", why, anchor)
            break


def _strange(others: list[Value], most: int = 200) -> str:
    """What a report says where nothing could even be tried."""
    pending, seen = list(others), set()
    while pending and len(seen) < most:
        maker = pending.pop().maker
        if maker is not None and maker.name.startswith("random"):
            return "its weights pass through dropout"
        if maker is not None and id(maker) not in seen:
            seen.add(id(maker))
            pending += maker.inputs
    return "more than a mask, a bias and a cap stands between its products, or too many positions"


def _scores(weights: Value, most: int = 60) -> Equation | None:
    """The product that the weights are made of, by elementwise equations, reductions and changes of shape."""
    pending, seen, found = [weights], set(), {}
    while pending:
        maker = pending.pop().maker
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if len(seen) > most:
            return None
        if maker.name == "dot_general":
            found[id(maker)] = maker
        elif maker.name in SHAPING | REDUCING | {"transpose", "iota"} or is_elementwise(maker):
            pending += maker.inputs
    return next(iter(found.values())) if len(found) == 1 else None


def _others(weights: Value, z: Value, constants: bool = False) -> list[Value]:
    """Masks, then biases."""
    found = {}
    for v, _ in sides(weights, [z], constants) or ():
        inner = peeled(v)
        found[id(inner)] = inner
    return sorted(found.values(), key=lambda v: v.is_float)


def _guesses(anchor: Equation, side: int, scores: Equation) -> Iterator[Site]:
    """With constants as masks and biases like others, which does with few queries; and with constants as they are."""
    z, weights = scores.outputs[0], anchor.inputs[side]
    if not (_is_usual(anchor) and _is_usual(scores)):
        return
    given, every = _others(weights, z), _others(weights, z, constants=True)
    for others in (every, given) if len(every) > len(given) else (given,):
        if sum(v.is_float for v in others) <= 1 and all(v.is_float or v.dtype == np.bool_ for v in others) and len(others) <= 3:
            yield from _with(anchor, side, scores, others)


def _is_usual(product: Equation) -> bool:
    """Whether a product asks for no precision, or for what 16 bits get anyhow: sums in float32."""
    usual = {"BF16_BF16_F32": jnp.bfloat16, "F16_F16_F32": jnp.float16}
    precision = product.params.get("precision")
    return precision is None or all(v.dtype == usual.get(getattr(precision, "name", "")) for v in product.inputs)


def _with(anchor: Equation, side: int, scores: Equation, others: list[Value]) -> Iterator[Site]:
    z, weights, value = scores.outputs[0], anchor.inputs[side], anchor.inputs[1 - side]
    found = region([z, *others], [weights])
    cap = None if found is None else _cap(found)
    if found is None or cap == 0:
        return
    try:
        axes = next((a for a in (Axes(found), Axes(found, short=(1,))) if math.prod(a.shape(z)) <= MOST), None)
    except Unknown:
        return
    if axes is None:
        return
    lower, upper = anchor.params["dimension_numbers"]
    contracted, rows = lower[side], upper[side]
    value_contracted, value_batch = lower[1 - side], upper[1 - side]
    if len(contracted) != 1 or len(value.shape) - len(value_batch) != 2:
        return
    keys = [a for a in range(len(z.shape)) if axes.together(z, a, weights, contracted[0])]
    if len(keys) != 1:
        return
    for order in (0, 1):
        # Which operand of the first product holds the keys: the one with the axis of keys free.
        plan = _plan(scores, order, keys[0])
        if plan is None:
            continue
        layout = _layout(plan, axes, z, weights, value, contracted[0], rows, value_contracted[0], value_batch, side)
        if layout is None:
            continue
        size = 0.5 if cap is None else 1e-5  # where the cap is a line
        query, key = scores.inputs[order], scores.inputs[1 - order]
        kinds = ("causal", "plain") if z.shape[keys[0]] > 1 else ("plain",)
        if any(not v.is_float for v in others):
            kinds = "mask", "mask or mean", "mask or nan"
        # What a mask says of a key that is seen, and the sign of a bias.
        for told in itertools.product(*((1, -1) if v.is_float else (True, False) for v in others)):
            scale = _scale(found, axes, z, weights, keys[0], size, told)
            if scale is None:
                continue
            # A query that sees nothing must get what the program gives it.
            for kind in kinds:
                yield _site(anchor, query, key, value, others, scale, cap, kind, told, plan, layout, axes, z)


def _cap(found: Region) -> float | None:
    """c where the logits become c · tanh(logits / c); None where no tanh is on their way, 0 where it is another one."""
    squashed = [e for e in found.equations if e.name == "tanh" and id(e.outputs[0]) in found.moving]
    if not squashed:
        return None
    scaled = chain(squashed[0].outputs[0], lambda e: e.name == "mul" or e.name in SHAPING, most=3)
    numbers = [v.number for s in scaled if s.maker is not None and s.maker.name == "mul" for v in s.maker.inputs]
    return next((n for n in numbers if n is not None and n > 0), 0.0) if len(squashed) == 1 else 0.0


class _Plan:
    """The axes of the first product: of the query batch, queries (and groups), features; of the key batch, keys, features."""

    def __init__(self, q: list[int], k: list[int], in_z: dict[str, list[int]]):
        self.q, self.k, self.in_z = q, k, in_z


def _plan(scores: Equation, order: int, key_axis: int) -> _Plan | None:
    contract, batch = scores.params["dimension_numbers"]
    query, key = scores.inputs[order], scores.inputs[1 - order]
    qc, kc, qb, kb = contract[order], contract[1 - order], batch[order], batch[1 - order]
    if len(qc) != 1 or len(qb) not in (1, 2):
        return None
    q_free = [a for a in range(len(query.shape)) if a not in (*qc, *qb)]
    k_free = [a for a in range(len(key.shape)) if a not in (*kc, *kb)]
    if len(k_free) != 1 or len(q_free) not in (1, 2):
        return None
    frees = (q_free, k_free) if order == 0 else (k_free, q_free)
    places = {}
    for which, free, start in ((0, frees[0], len(qb)), (1, frees[1], len(qb) + len(frees[0]))):
        places[which] = list(range(start, start + len(free)))
    z_query, z_key = places[order], places[1 - order]
    if z_key != [key_axis]:
        return None
    return _Plan([*qb, *q_free, *qc], [*kb, *k_free, *kc], {"batch": list(range(len(qb))), "query": z_query, "key": z_key})


def _layout(
    plan: _Plan, axes: Axes, z: Value, weights: Value, value: Value, contracted: int, rows: Any, value_contracted: int,
    value_batch: Any, side: int,
) -> tuple[list[int], list[int]] | None:  # fmt: skip
    """The order of the value's axes (batch as in z, keys, features), and where the axes of the result come from:
    0 … for those of the batch, then queries, then features."""
    places: list[int] = []  # in the batch of the second product, of each axis of the batch of z
    for a in plan.in_z["batch"]:
        own = [n for n, w in enumerate(rows) if n not in places and _same(axes, z, a, weights, w)]
        if not own:
            return None
        places.append(own[0])
    if len(value_batch) != len(places):
        return None
    features = [a for a in range(len(value.shape)) if a not in (*value_batch, value_contracted)]
    free = [w for w in range(len(weights.shape)) if w != contracted and w not in rows]
    first = len(places)
    of_rows = [_name(axes, z, plan.in_z["query"], weights, w, first) for w in free]
    last = first + len(plan.in_z["query"])
    order = [*(places.index(n) for n in range(first)), *((*of_rows, last) if side == 0 else (last, *of_rows))]
    return [*(value_batch[n] for n in places), value_contracted, *features], order


def _same(axes: Axes, a: Value, i: int, b: Value, j: int) -> bool:
    return a.shape[i] == b.shape[j] and (a.shape[i] == 1 or axes.together(a, i, b, j))


def _name(axes: Axes, z: Value, queries: list[int], weights: Value, w: int, first: int) -> int:
    """Which axis of the queries an axis of the weights is; −1 where it has length 1 and was put in between."""
    return next((n for n, a in enumerate(queries, first) if z.shape[a] != 1 and _same(axes, z, a, weights, w)), -1)


def _scale(
    found: Any, axes: Axes, z: Value, weights: Value, keys: int, size: float, told: tuple[int, ...]
) -> float | None:  # fmt: skip
    """The factor of the logits inside of the softmax, measured with logits of a size where all keys are seen."""
    shape = axes.shape(z)
    rng = np.random.default_rng(2)
    near = rng.normal(size=shape) * size
    given = [np.full(axes.shape(v), 0 if v.is_float else seen, v.dtype) for v, seen in zip(found.inputs[1:], told)]
    try:
        one, two = (evaluate(found, axes, [near * n, *given])[0] for n in (1.0, 2.0))
    except Unknown:
        return None
    if weights.shape[-1] < 2 and z.shape[keys] < 2:
        return None
    # Bring the weights into the layout of z by their classes.
    order: list[int] = []
    for a in range(len(z.shape)):
        own = [w for w in range(len(weights.shape)) if w not in order and _same(axes, z, a, weights, w)]
        if not own:
            return None
        order.append(own[0])
    rest = [w for w in range(len(weights.shape)) if w not in order]
    if any(weights.shape[w] != 1 for w in rest):
        return None
    with np.errstate(all="ignore"):
        wide = [np.log(p.transpose([*rest, *order]).reshape(shape)) for p in (one, two)]
        change = np.moveaxis(wide[1] - wide[0], keys, -1)
    logits = np.moveaxis(near, keys, -1)
    finite = np.isfinite(change)
    row = np.unravel_index(int(finite.sum(-1).argmax()), finite.shape[:-1])
    where = finite[row]
    if where.sum() < 2:
        return None
    a, b = logits[row][where], change[row][where]
    factor = float(((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum())
    if abs(factor) < 1e-9:
        return None
    narrow = float(np.float32(factor))
    return narrow if abs(narrow - factor) < 1e-6 * abs(factor) else factor


def _site(
    anchor: Equation, query: Value, key: Value, value: Value, others: list[Value], scale: float, cap: float | None, kind: str,
    told: tuple[int, ...], plan: _Plan, layout: tuple[list[int], list[int]], axes: Axes, z: Value,
) -> Site:  # fmt: skip
    to_value, of_out = layout
    batches = len(plan.in_z["batch"])
    groups = len(plan.in_z["query"]) == 2
    dtype = anchor.outputs[0].dtype
    order = [*plan.in_z["batch"], *plan.in_z["query"], *plan.in_z["key"]]
    along = [_axes_along(v, z, order, axes) for v in others]

    def call(q: Any, k: Any, v: Any, *more: Any, bands: Sequence[Band | None] = (None,) * len(others)) -> tuple[Any]:
        q, k, v = jnp.transpose(q, plan.q), jnp.transpose(k, plan.k), jnp.transpose(v, to_value)
        if batches == 1:
            q, k, v = (a[:, None] for a in (q, k, v))
        # q [b, n, t, h] or [b, k, t, g, h]; k, v [b, k, s, h]
        b, heads, t = q.shape[:3]
        if groups:
            q = jnp.swapaxes(q, 2, 3).reshape(b, heads * q.shape[3], t, q.shape[-1])
        q, k, v = (jnp.swapaxes(a, 1, 2).astype(dtype) for a in (q, k, v))
        given: dict[str, Any] = {"scale": scale, "is_causal": kind == "causal", "soft_cap": cap}
        for other, array, own, sign, band in zip(others, more, along, told, bands):
            if band is not None:
                given |= band
                continue
            array = _as_logits(array, own, batches, heads, q.shape[2])
            if other.is_float:
                given["bias"] = array if sign == 1 else -array
            else:
                array = array if sign else ~array
                given["mask"] = array & given["mask"] if "mask" in given else array
        out = ops.dot_product_attention(q, k, v, **given)  # [b, t, n, h]
        some = jnp.swapaxes(jnp.any(given["mask"], -1, keepdims=True), 1, 2) if "mask" in given else None
        if kind == "mask or nan" and some is not None:
            out = jnp.where(some, out, jnp.nan)
        if kind == "mask or mean" and some is not None:
            # The softmax of a row that sees nothing is even, and passes no gradient to its logits.
            mean = jnp.mean(v.astype(jnp.promote_types(dtype, jnp.float32)), 1, keepdims=True).astype(dtype)
            share = out.shape[2] // mean.shape[2]
            mean = jnp.repeat(mean, share, 2) if share > 1 else mean
            out = jnp.where(some, out, mean)
        out = jnp.swapaxes(out, 1, 2)  # [b, n, t, h]
        if groups:
            g = out.shape[1] // heads
            out = jnp.swapaxes(out.reshape(b, heads, g, t, -1), 2, 3)
        if batches == 1:
            out = out[:, 0]
        spare = [n for n in range(out.ndim) if n not in of_out]
        if any(out.shape[n] != 1 for n in spare):
            raise ValueError("an axis of the result is lost")
        out = jnp.transpose(out, [*spare, *(n for n in of_out if n >= 0)])
        out = out.reshape(out.shape[len(spare) :])
        return (jnp.expand_dims(out, [i for i, n in enumerate(of_out) if n < 0]),)

    options = (kind, scale, cap, tuple(plan.q), tuple(plan.k), tuple(to_value), tuple(of_out), told, tuple(along))
    made = Site(
        "dot_product_attention", [query, key, value, *others], anchor.outputs, call, options, anchor,
        whole=[(value, to_value[-1])],  # a key and a value have as many features
    )  # fmt: skip

    def settled() -> Callable[..., tuple[Any, ...]]:
        bands = [band_of(v, own[batches], own[-1], sign) for v, own, sign in zip(others, along, told)]
        explicit = any(band is None and not v.is_float for v, band in zip(others, bands))
        return call if explicit or len(others) - bands.count(None) != 1 else functools.partial(call, bands=bands)

    made.settled = settled
    return made


def _axes_along(mask: Value, z: Value, order: list[int], axes: Axes) -> tuple[int | None, ...]:
    """For the axes of z in an order (batch, [heads], queries, [groups], keys) those of a mask or bias that go along them."""
    return tuple(
        next((m for m in range(len(mask.shape)) if mask.shape[m] != 1 and axes.together(z, a, mask, m)), None) for a in order
    )


def _as_logits(mask: Any, along: tuple[int | None, ...], batches: int, keys: int, heads: int) -> Any:
    """[B, N, T, S], with axes of length 1 where the mask does not depend on them; of ``keys`` heads, or groups of heads."""
    used = [a for a in along if a is not None]
    rest = [m for m in range(mask.ndim) if m not in used]
    mask = jnp.transpose(mask, [*rest, *used])
    if any(n != 1 for n in mask.shape[: len(rest)]):
        raise ValueError("an axis of the mask is not one of the logits")
    lengths = iter(mask.shape[len(rest) :])
    mask = mask.reshape([next(lengths) if a is not None else 1 for a in along])
    mask = mask if batches == 2 else mask[:, None]
    if mask.ndim == 5:  # [B, K, T, G, S]
        b, k, t, g, s = mask.shape
        if (k == 1) != (g == 1):  # the same for all heads of a group, or for all groups
            mask = jnp.broadcast_to(mask, (b, keys, t, heads // keys, s))
        mask = jnp.swapaxes(mask, 2, 3).reshape(b, -1, t, s)
    return mask
