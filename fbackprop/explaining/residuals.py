"""The arrays that ``jax.grad`` keeps between forward and backward, each with a name for where it is from. Nothing is run.

The residuals are the outputs of a traced program (``jax.make_jaxpr`` of ``jax.vjp``). While it is traced, every op runs its
rule with names on what its forward makes for the backward, and on its outputs (``jax.ad_checkpoint.checkpoint_name``, which
computes nothing). Each residual is then followed back through ``jit``, ``jax.checkpoint`` and ``scan`` to the name, the
argument or the operation of JAX that it comes from.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from fbackprop import context
from fbackprop.explaining.program import inside, scan_counts
from fbackprop.ops._arithmetic import nbytes
from fbackprop.rules import RULES, Rule, _differentiable, _halves

__all__ = ["Residual", "residuals"]

_PREFIX = "fbackprop:"


@dataclasses.dataclass(frozen=True)
class Residual:
    """An array that is kept. ``kind``: "argument" (``name`` is its place among the arguments, ``what`` empty), "op" (``name``
    is the op, ``what`` its name for the array, or "output"), "jax" (``name`` is the operation)."""

    kind: str
    name: str
    what: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        return nbytes(self)


def residuals(fn: Callable[..., Any], moved: Sequence[Any], others: Sequence[Any]) -> list[Residual]:
    """What the backward of ``fn(moved, others)`` keeps, every array once.

    Args:
      moved: the arrays, or ``jax.ShapeDtypeStruct``, that are differentiated. others: those that are not.
    """

    def kept(moved: Any, others: Any) -> Any:
        with context.switched(recorder=_named):
            return jax.tree.leaves(jax.vjp(lambda moved: fn(moved, others), moved)[1])

    jaxpr = jax.make_jaxpr(kept)(list(moved), list(others)).jaxpr
    found, seen = [], set()
    for v in jaxpr.outvars:
        literal = isinstance(v, Literal)
        if literal or v not in seen:
            origin = ("jax", "constant", "") if literal else _origin(jaxpr, v)
            kind: Any = v.aval
            found.append(Residual(*origin, tuple(kind.shape), kind.dtype))
        seen.update(() if literal else (v,))
    return found


def _named(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """Runs an op by its rule, with names on its arrays."""
    return _differentiable(_with_names(rule), *static)(*dynamic)


@functools.cache
def _with_names(rule: Rule) -> Rule:
    def forward(**arguments: Any) -> tuple[Any, Any]:
        dynamic, static = (tuple(arguments[n] for n in names) for names in (rule.arguments, rule.static))
        y, saved = _halves(rule, dynamic, static)
        inputs = {id(leaf) for leaf in jax.tree.leaves(dynamic)}
        outputs = {id(leaf): _tag(leaf, rule.name, "output") for leaf in jax.tree.leaves(y)}

        def tagged(path: Any, leaf: Any) -> Any:
            if id(leaf) in inputs:
                return leaf  # kept as it came in: it has the name of where it comes from
            name = [part for part in jax.tree_util.keystr(path, simple=True, separator="/").split("/") if not part.isdigit()]
            return outputs[id(leaf)] if id(leaf) in outputs else _tag(leaf, rule.name, "/".join(name) or "saved")

        saved = jax.tree_util.tree_map_with_path(tagged, saved)
        return jax.tree.map(lambda leaf: outputs[id(leaf)], y), saved

    return dataclasses.replace(rule, forward=forward)


def _tag(leaf: Any, op: str, what: str) -> Any:
    if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    return checkpoint_name(leaf, f"{_PREFIX}{op}/{what}")


def _origin(jaxpr: Any, v: Any) -> tuple[str, str, str]:
    """Kind, name and what, of an array of a program."""
    makers = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    while True:
        if v in jaxpr.invars:
            return "argument", str(jaxpr.invars.index(v)), ""
        if v not in makers:
            return "jax", "constant", ""
        equation = makers[v]
        name, params, place = equation.primitive.name, equation.params, equation.outvars.index(v)
        if name == "name" and params["name"].startswith(_PREFIX):
            return ("op", *params["name"].removeprefix(_PREFIX).split("/", 1))  # type: ignore[return-value]
        if name in ("optimization_barrier", "reduce_precision"):  # what jax.checkpoint puts around what it keeps
            v = equation.invars[place]
            continue
        programs = inside(params)
        if len(programs) != 1:
            return "jax", name, ""
        inner = getattr(programs[0], "jaxpr", programs[0])
        out = inner.outvars[place]
        if isinstance(out, Literal):
            return "jax", "constant", ""
        kind, number, what = _origin(inner, out)
        if kind == "jax" and params.get("name") in RULES:  # jax.checkpoint kept something out of the middle of an op
            return "op", params["name"], number
        if kind != "argument":
            return kind, number, what
        if name == "scan" and place < scan_counts(params)[1]:
            return "jax", "scan", ""  # a carry
        outer = equation.invars[int(number)]
        if isinstance(outer, Literal):
            return "jax", "constant", ""
        v = outer
