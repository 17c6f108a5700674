"""Attention in blocks: which queries meet which keys, in loops that add up what each block gives."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbackprop.ops._arithmetic import varying_like, wide
from fbackprop.ops._attention import LOGITS, Inputs, Options

Block = dict[str, tuple[Any, int]]
"""A part of the problem: for an axis its start (a number, or traced) and its length. An axis that is not named is whole."""


class Group(NamedTuple):
    """Blocks of one size: where they start, (query, key)."""

    starts: tuple[tuple[int, int], ...]
    queries: int
    keys: int


class Plan(NamedTuple):
    part: tuple[int, int]  # of the batch and of the key heads: so many at a time
    groups: tuple[Group, ...]


# Logits of a head in one block: on a CPU about what its cache holds, elsewhere, where all heads run at once, those of all.
_LOGITS = {True: 2**17, False: 2**24}
_LEVELS = 8  # of the number of keys that queries see, from none to all


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to ``most``."""
    return next(d for d in range(max(min(n, most), 1), 0, -1) if n % d == 0)


def plan(query: Sequence[int], keys: int, options: Options, cpu: bool) -> Plan:
    """Cuts a problem with queries [b, t, k, g, h] into blocks of queries, each with the keys that it may see and no others.

    A block meets all its keys at once, so no maximum is ever mended. What bounds the memory is the number of logits of a
    block. On a CPU heads take turns, so that what one of them needs stays in the cache; elsewhere they run all at once.
    """
    b, t, k, g, _ = query
    budget = _LOGITS[cpu] // keys // (1 if cpu else b * k * g)
    rows = max(budget, 128 if cpu else 16)  # a matrix product wants rows
    if options.right is not None:
        # Elsewhere several blocks a loop: of one alone the compiler would find that the forward has computed the same weights,
        # and keep them, for all blocks.
        rows = min(rows, max(-(-t // (_LEVELS if cpu else 4 * _LEVELS)), 64))
        if options.left is not None:
            rows = min(rows, max(options.left + options.right, 64))
    rows = min(rows, t)
    part = b, k
    if cpu:
        heads = _divisor(k, budget // (g * rows))
        part = _divisor(b, budget // (k * g * rows)) if heads == k else 1, heads
    spans = []
    for r in range(0, t, rows):
        low = 0 if options.left is None else max(r - options.left, 0)
        high = keys if options.right is None else min(min(r + rows, t) + options.right, keys)
        spans.append((r, min(rows, t - r), min(low, high), high))
    # Blocks with about as many keys run as one loop: each then meets as many keys as the one of them with most.
    levels = _LEVELS if keys <= 4096 else 2 * _LEVELS
    groups = []
    for _, found in itertools.groupby(spans, lambda s: (s[1], -(-(s[3] - s[2]) * levels // keys))):
        members = list(found)
        width = max(high - low for _, _, low, high in members)
        if width > 0:
            starts = tuple((r, max(min(low, keys - width), 0)) for r, _, low, _ in members)
            groups.append(Group(starts, members[0][1], width))
    return Plan(part, tuple(groups))


def run(fn: Callable[..., Any], options: Options, inputs: Inputs, *arrays: Any) -> Any:
    """``fn(plan, options, inputs, *arrays)``, with the plan for the platform that the program is lowered for."""
    given = inputs.query.shape, inputs.key.shape[1], options
    cpu, other = (functools.partial(fn, plan(*given, on_cpu), options) for on_cpu in (True, False))
    if cpu.args == other.args:
        return cpu(inputs, *arrays)
    return jax.lax.platform_dependent(inputs, *arrays, cpu=cpu, default=other)


def over_blocks(plan: Plan, step: Callable[[Any, Block], Any], state: Any) -> Any:
    """``step(state, block)`` for every block of queries, those of one size in a loop."""
    for group in plan.groups:

        def run(state: Any, start: Any, group: Group = group) -> Any:
            return step(state, {"t": (start[0], group.queries), "s": (start[1], group.keys)})

        if len(group.starts) == 1:
            state = run(state, group.starts[0])
        else:
            starts = jnp.asarray(group.starts, jnp.int32)
            state, _ = jax.lax.scan(lambda state, start, run=run: (run(state, start), None), state, starts)
    return state


def over_heads(
    plan: Plan,
    fn: Callable[..., Any],
    arrays: Sequence[Any],
    axes: Sequence[str],
    like: Sequence[Any],
    out: Sequence[str],
) -> Any:
    """``fn(*arrays)``, in turns over parts of batch and key heads where the plan says so. ``like`` are shapes and dtypes of the
    results; results with the axes of logits are those of an argument that heads may share, and are summed."""
    b, k = arrays[0].shape[0], arrays[0].shape[2]
    if plan.part == (b, k):
        return tuple(None if a is None else result.astype(a.dtype) for a, result in zip(like, fn(*arrays)))

    def step(state: Any, start: Any) -> Any:
        block = {"b": (start[0], plan.part[0]), "k": (start[1], plan.part[1])}
        own = fn(*(None if a is None else _widened(cut(a, names, block)) for a, names in zip(arrays, axes)))
        return tuple(
            None if total is None else (add if names == LOGITS else put)(total, names, block, result)
            for total, result, names in zip(state, own, out)
        ), None

    state = tuple(None if a is None else zeros(a.shape, a.dtype, *arrays) for a in like)
    starts = list(itertools.product(range(0, b, plan.part[0]), range(0, k, plan.part[1])))
    return jax.lax.scan(step, state, jnp.asarray(starts, jnp.int32))[0]


def _widened(array: jax.Array) -> jax.Array:
    return wide(array) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _where(array: jax.Array, axes: str, block: Block) -> tuple[list[Any], tuple[int, ...]]:
    """Starts and sizes of a block's part of an array; an axis of length 1 is there for all."""
    at = [block.get(axis, (0, n)) if n != 1 else (0, 1) for axis, n in zip(axes, array.shape, strict=True)]
    return [jnp.asarray(start, jnp.int32) for start, _ in at], tuple(size for _, size in at)


def cut(array: jax.Array, axes: str, block: Block) -> jax.Array:
    """A block's part of an array."""
    starts, sizes = _where(array, axes, block)
    return array if sizes == array.shape else jax.lax.dynamic_slice(array, starts, sizes)


def put(total: jax.Array, axes: str, block: Block, part: jax.Array) -> jax.Array:
    """Writes a block's part into the whole."""
    starts, sizes = _where(total, axes, block)
    part = part.astype(total.dtype)
    return part if sizes == total.shape else jax.lax.dynamic_update_slice(total, part, starts)


def add(total: jax.Array, axes: str, block: Block, part: jax.Array) -> jax.Array:
    """Adds a block's part to the whole."""
    return put(total, axes, block, cut(total, axes, block) + part)


def zeros(shape: Sequence[int], dtype: Any, *of: Any) -> jax.Array:
    """Zeros, to start a loop from whose results are computed from the arrays ``of``."""
    return varying_like(jnp.zeros(shape, dtype), of)


def allowed(inputs: Inputs, options: Options, block: Block) -> jax.Array | None:
    """Which keys each query of a block may see, of a shape that broadcasts with its logits; None for all."""
    (r, rows), (c, keys) = block["t"], block["s"]
    shape = (1, 1, rows, 1, keys)
    i = r + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    j = c + jax.lax.broadcasted_iota(jnp.int32, shape, 4)
    conditions = []
    if options.right is not None:
        conditions.append(j <= i + options.right)
    if options.left is not None:
        conditions.append(j >= i - options.left)
    for position, lengths in ((i, inputs.query_lengths), (j, inputs.key_lengths)):
        if lengths is not None:
            conditions.append(position < cut(lengths, "b", block).reshape(-1, 1, 1, 1, 1))
    if inputs.query_ids is not None and inputs.key_ids is not None:
        own, other = cut(inputs.query_ids, "bt", block), cut(inputs.key_ids, "bs", block)
        conditions.append(own[:, None, :, None, None] == other[:, None, None, None, :])
    if inputs.mask is not None:
        conditions.append(cut(inputs.mask, LOGITS, block))
    result = None
    for condition in conditions:
        result = condition if result is None else result & condition
    return result
