"""What would keep fewer bytes for the backward: each hint is computed from what a function keeps."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.explaining.program import Call, Node, Program

__all__ = ["hints", "size"]

SHARE = 0.1
"""Of all bytes that a hint has to be about."""


def size(number: int) -> str:
    """Bytes for people: "12.0 KiB"."""
    if number < 1024:
        return f"{number} B"
    return f"{number / 1024:.1f} KiB" if number < 2**20 else f"{number / 2**20:.1f} MiB"


def hints(keeping: Any, program: Program | None, call: Any, fn: Callable[..., Any]) -> Iterator[str]:
    """Sentences for a ``Keeping`` of a ``Differentiated`` call; ``program`` is None where calls cannot be told apart."""
    least = SHARE * keeping.total
    if program is not None:
        yield from _above_minimum(program, keeping.total)
        yield from _logits(program, least)
    yield from _masks(keeping, least)
    yield from _plain(keeping, least)
    yield from _narrower(keeping, least)
    yield from _transformer(keeping, call, fn)
    yield from _checkpoint(keeping)


def _bytes(kind: Any) -> int:
    return kind.size * kind.dtype.itemsize


def _kept_by(call: Call) -> int:
    """Bytes of what a call saves, an array once."""
    own = {alias or number: kind for number, (_, alias, kind) in enumerate(call.kept)}
    return sum(map(_bytes, own.values()))


def _above_minimum(program: Program, total: int) -> Iterator[str]:
    """Rules that keep more than the least that any backward of theirs has to."""
    found: dict[str, list[int]] = {}
    for node in program.nodes:
        if node.call is None:
            continue
        call = node.call
        y = jax.tree.unflatten(call.out_tree, call.types)
        dynamic = jax.tree.unflatten(call.tree, [program.types[v] for v in node.inputs])
        minimum = call.rule.minimum_bytes(y, dynamic, call.static)
        kept = _kept_by(call)
        if minimum is not None and kept > minimum:
            sums = found.setdefault(node.name, [0, 0, 0])
            found[node.name] = [sums[0] + 1, sums[1] + kept, sums[2] + minimum]
    for name, (calls, kept, minimum) in sorted(found.items(), key=lambda item: item[1][2] - item[1][1]):
        if kept - minimum > 0.05 * total:
            times = f" in {calls} calls" if calls > 1 else ""
            yield f"{name} keeps {size(kept)}{times}, arguments included, where {size(minimum)} is the least for any rule."


def _logits(program: Program, least: float) -> Iterator[str]:
    """Logits that are formed for a loss which could take the features instead."""
    makers: dict[int, Node] = {v: node for node in program.nodes for v in node.outputs}
    for node in program.nodes:
        if node.call is None or not node.name.startswith("softmax_cross_entropy"):
            continue
        maker = makers.get(node.inputs[0])
        while maker is not None and maker.call is None and len(maker.inputs) == 1:
            maker = makers.get(maker.inputs[0])
        if maker is None or maker.call is None or maker.name != "dense":
            continue
        own = sum(_bytes(kind) for _, alias, kind in node.call.kept if alias is None)
        kernel = _bytes(program.types[maker.inputs[1]])  # linear_cross_entropy keeps a gradient of its size
        if own - kernel > least:
            shape = tuple(program.types[node.inputs[0]].shape)
            yield (
                f"linear_cross_entropy(x, kernel, labels) in place of dense and {node.name} never forms the logits {shape}: "
                f"it keeps {size(own - kernel)} less."
            )


def _masks(keeping: Any, least: float) -> Iterator[str]:
    for row in keeping.rows:
        if row.dtype == jnp.bool_ and row.origin in ("op", "jax") and row.bytes > least:
            who = row.op if row.origin == "op" else f"JAX, for its {row.op},"
            bits = size(-(-row.bytes // 8))
            yield f"{who} keeps a mask with a byte for each element, {size(row.bytes)}; in bits it would be {bits}."


def _plain(keeping: Any, least: float) -> Iterator[str]:
    rows = [row for row in keeping.rows if row.origin == "jax" and not row.keepers]
    total = sum(row.bytes for row in rows)
    if total > least:
        largest = max(rows, key=lambda row: row.bytes)
        yield (
            f"{size(total)} are kept by JAX for its own operations, most of it the output of {largest.op} "
            f"{largest.dtype}{list(largest.shape)}: an op in their place may keep less (fb.accelerate looks for some)."
        )


def _narrower(keeping: Any, least: float) -> Iterator[str]:
    for dtype, narrow in ((jnp.float64, "float32"), (jnp.float32, "bfloat16")):
        wide = sum(row.bytes for row in keeping.rows if row.origin in ("op", "jax") and row.dtype == dtype)
        if wide > least:
            name = jnp.dtype(dtype).name
            less = size(wide - wide // jnp.dtype(dtype).itemsize * jnp.dtype(narrow).itemsize)
            yield f"{size(wide)} of activations are {name}; in {narrow} they would be {less} less (dtype= of the layers)."


def _transformer(keeping: Any, call: Any, fn: Any) -> Iterator[str]:
    """What the option ``checkpoint`` of our own transformers would do, where the function is a method of one."""
    method = fn
    while isinstance(method, functools.partial):
        method = method.func
    model: Any = getattr(method, "__self__", None)
    if method is not fn or not hasattr(model, "checkpoint") or model.checkpoint is not None:
        return
    less = call.kept(call.flat(getattr(dataclasses.replace(model, checkpoint="full"), method.__name__)))
    if less < keeping.total:
        yield f'checkpoint="full" of the model keeps {size(less)} in all, and runs each block twice.'


def _checkpoint(keeping: Any) -> Iterator[str]:
    ours, _, *policies = keeping.rivals
    best = min(policies, key=lambda rival: rival.bytes)
    if best.bytes < (1 - SHARE) * ours.bytes:
        more = f", with {best.products / ours.products:.2f} times the matrix products" if ours.products else ""
        yield f"{best.name}, around the definitions keeps {size(best.bytes)} in all{more}."
