"""What an op binds while its function is recorded: a primitive of ours in place of its rule.

Where the primitive meets a transformation under which a call is not one record, it says so in a sentence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fbackprop import context
from fbackprop.rules import Rule, Saved, _run_forward

__all__ = ["PRIMITIVE", "Call", "flat_cotangents", "mark", "paths_of", "refuse"]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What is known of an op call without its arrays. ``kept`` tells for each array that the forward saves its name,
    what it is, ("input", i) or ("output", i) or None where it is made for the backward, and its type."""

    rule: Rule
    static: tuple[Any, ...]
    tree: Any  # of the arguments that are not static
    out_tree: Any
    types: tuple[Any, ...]  # of the outputs
    precision: Any
    kept: tuple[tuple[str, tuple[str, int] | None, Any], ...]

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """A name for each array among the arguments: "x", or "carry/0" inside of one that is a tree."""
        index = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        named = [(name, path) for name, part in zip(self.rule.arguments, index) for path in paths_of(part)]
        return tuple(f"{name}/{path}" if path else name for name, path in named)

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """A name for each output: "y", or "y/0" and so on."""
        index = jax.tree.unflatten(self.out_tree, range(self.out_tree.num_leaves))
        return tuple(f"y/{path}" if path else "y" for path in paths_of(index))

    @property
    def options(self) -> dict[str, Any]:
        return dict(zip(self.rule.static, self.static))


def flat_cotangents(found: Sequence[Any], tree: Any) -> list[Any]:
    """What a backward returned, as one cotangent or None for each array among the arguments."""
    flat: list[Any] = []
    for own, part in zip(found, tree.children()):
        flat += [None] * part.num_leaves if own is None else part.flatten_up_to(own)
    return flat


def paths_of(tree: Any) -> list[str]:
    """The path of each leaf, such as "layers/0/kernel"; "" for a tree that is a leaf."""
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


PRIMITIVE = Primitive("fbackprop_op")
PRIMITIVE.multiple_results = True


@PRIMITIVE.def_abstract_eval
def _(*given: Any, call: Call) -> Any:
    return list(call.types)


def refuse(name: str, where: str, instead: str) -> NoReturn:
    raise ValueError(f"explain: {name} is called {where}, where a call cannot be recorded; {instead}.")


def _refused(where: str, instead: str) -> Callable[..., NoReturn]:
    return lambda *given, call, **more: refuse(call.rule.name, where, instead)


_ELSEWHERE = ("inside of what JAX runs as a whole", "call it outside of that")

PRIMITIVE.def_impl(
    _refused("while JAX computes at once (ensure_compile_time_eval)", "compute that part before and pass it as an argument")
)
mlir.register_lowering(PRIMITIVE, lambda context, *given, call: refuse(call.rule.name, *_ELSEWHERE))
ad.primitive_jvps[PRIMITIVE] = lambda primals, tangents, call: refuse(
    call.rule.name, "inside of a function that is itself differentiated (jax.grad, jax.vjp or jax.jvp)", "explain that function"
)
batching.primitive_batchers[PRIMITIVE] = lambda given, dims, call: refuse(
    call.rule.name, "under jax.vmap", "explain the function of one example, or give the op the batch as an axis of its own"
)


def mark(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """The recorder: binds the primitive in place of the op's rule."""
    leaves, tree = jax.tree.flatten(dynamic)
    leaves = [jnp.asarray(leaf) for leaf in leaves]

    def halves(*leaves: Any) -> tuple[Any, Saved]:
        return _run_forward(rule, jax.tree.unflatten(tree, leaves), static, None)

    with context.switched(recorder=None):
        closed, (y, saved) = jax.make_jaxpr(halves, return_shape=True)(*leaves)
    jaxpr = closed.jaxpr
    _, out_tree = jax.tree.flatten(y)
    outputs, kept = jaxpr.outvars[: out_tree.num_leaves], jaxpr.outvars[out_tree.num_leaves :]
    places = [[("input", i) for i, v in enumerate(jaxpr.invars)], [("output", i) for i, v in enumerate(outputs)]]
    known = {id(v): place for part, found in zip((outputs, jaxpr.invars), places[::-1]) for v, place in zip(part, found)}
    names = _names(jax.tree.unflatten(saved.structure, range(len(kept))))
    call = Call(
        rule, static, tree, out_tree, tuple(v.aval for v in outputs),
        jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        tuple((name, known.get(id(v)), v.aval) for name, v in zip(names, kept)),
    )  # fmt: skip
    return jax.tree.unflatten(out_tree, PRIMITIVE.bind(*leaves, call=call))


def _names(saved: Any) -> list[str]:
    """What the rule calls the arrays that it keeps: the last name on the way to each, or the number in a plain tuple."""
    names = []
    for path in paths_of(saved):
        parts = path.split("/")
        while len(parts) > 1 and parts[0].isdigit():
            parts.pop(0)
        names.append("/".join(parts) or "saved")
    return names
