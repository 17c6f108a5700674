"""What would keep fewer bytes for the backward: each hint is computed from what a function keeps."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.explaining.digits import size
from fbackprop.explaining.program import Call, Node, Program
from fbackprop.explaining.words import said
from fbackprop.ops._arithmetic import nbytes

__all__ = ["Hint", "hints"]

SHARE = 0.1
"""Of all bytes that a hint has to be about."""


@dataclasses.dataclass(frozen=True)
class Hint:
    """A sentence, by its key among the words, and the values in its places."""

    key: str
    values: tuple[tuple[str, Any], ...]

    def said(self, lang: str = "en") -> str:
        values = {name: said("no_policy", lang) if value is None else value for name, value in self.values}
        return said(f"hint_{self.key}", lang, **values)


def _hint(key: str, **values: Any) -> Hint:
    return Hint(key, tuple(values.items()))


def hints(keeping: Any, program: Program | None, call: Any, fn: Callable[..., Any]) -> Iterator[Hint]:
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


def _kept_by(call: Call) -> int:
    """Bytes of what a call saves, an array once."""
    own = {alias or number: kind for number, (_, alias, kind) in enumerate(call.kept)}
    return nbytes(*own.values())


def _above_minimum(program: Program, total: int) -> Iterator[Hint]:
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
            several = {"calls": calls} if calls > 1 else {}
            yield _hint("least_of_calls" if several else "least", op=name, kept=size(kept), least=size(minimum), **several)


def _logits(program: Program, least: float) -> Iterator[Hint]:
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
        own = nbytes(*(kind for _, alias, kind in node.call.kept if alias is None))
        kernel = nbytes(program.types[maker.inputs[1]])  # linear_cross_entropy keeps a gradient of its size
        if own - kernel > least:
            shape = tuple(program.types[node.inputs[0]].shape)
            yield _hint("logits", loss=node.name, shape=shape, less=size(own - kernel))


def _masks(keeping: Any, least: float) -> Iterator[Hint]:
    for row in keeping.rows:
        if row.dtype == jnp.bool_ and row.origin in ("op", "jax") and row.bytes > least:
            key = "mask" if row.origin == "op" else "mask_of_jax"
            yield _hint(key, op=row.op, kept=size(row.bytes), bits=size(-(-row.bytes // 8)))


def _plain(keeping: Any, least: float) -> Iterator[Hint]:
    rows = [row for row in keeping.rows if row.origin == "jax" and not row.keepers]
    total = sum(row.bytes for row in rows)
    if total > least:
        largest = max(rows, key=lambda row: row.bytes)
        yield _hint("plain", kept=size(total), op=largest.op, array=f"{largest.dtype}{list(largest.shape)}")


def _narrower(keeping: Any, least: float) -> Iterator[Hint]:
    for dtype, narrow in ((jnp.float64, "float32"), (jnp.float32, "bfloat16")):
        wide = sum(row.bytes for row in keeping.rows if row.origin in ("op", "jax") and row.dtype == dtype)
        if wide > least:
            less = wide - wide // jnp.dtype(dtype).itemsize * jnp.dtype(narrow).itemsize
            yield _hint("narrower", kept=size(wide), dtype=jnp.dtype(dtype).name, narrow=narrow, less=size(less))


def _transformer(keeping: Any, call: Any, fn: Any) -> Iterator[Hint]:
    """What the option ``checkpoint`` of our own transformers would do, where the function is a method of one."""
    method = fn
    while isinstance(method, functools.partial):
        method = method.func
    model: Any = getattr(method, "__self__", None)
    if method is not fn or not hasattr(model, "checkpoint") or model.checkpoint is not None:
        return
    less = call.kept(call.flat(getattr(dataclasses.replace(model, checkpoint="full"), method.__name__)))
    if less < keeping.total:
        yield _hint("blocks", kept=size(less))


def _checkpoint(keeping: Any) -> Iterator[Hint]:
    ours, _, *policies = keeping.rivals
    best = min(policies, key=lambda rival: rival.bytes)
    if best.bytes < (1 - SHARE) * ours.bytes:
        more = {"times": f"{best.products / ours.products:.2f}"} if ours.products else {}
        yield _hint("checkpoint_products" if more else "checkpoint", policy=best.policy, kept=size(best.bytes), **more)
