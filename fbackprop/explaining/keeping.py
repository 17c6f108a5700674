"""``saved``: the bytes that a function keeps between forward and backward, by op and by name, and what would keep fewer.

Counted on types alone: ``jax.ShapeDtypeStruct`` will do for arguments, and nothing is run.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from fbackprop.context import without_rules
from fbackprop.explaining.calling import labels_of, name_of
from fbackprop.explaining.hints import Hint, hints
from fbackprop.explaining.program import Program, traced
from fbackprop.explaining.residuals import Residual, residuals
from fbackprop.explaining.words import said
from fbackprop.measuring.flops import matmul_flops
from fbackprop.ops._arithmetic import nbytes

__all__ = ["Keeping", "Rival", "Row", "saved"]

POLICIES = (None, "dots_saveable", "dots_with_no_batch_dims_saveable")


@dataclasses.dataclass(frozen=True)
class Row:
    """Arrays of one kind that are kept. ``origin`` tells what made them: "parameter" (of the arguments that are
    differentiated), "argument" (another one), "op" (one of our ops), "jax" (an operation of JAX). ``keepers`` are the ops whose
    rules keep them, with their name for it, where calls can be told apart; where there are none, JAX itself does."""

    op: str  # the op, the operation of JAX, or "" for an argument
    name: str  # the op's name for it, "output", or the label of an argument
    origin: str
    shape: tuple[int, ...]
    dtype: Any
    times: int  # arrays of this shape
    bytes: int  # of all of them
    keepers: tuple[str, ...] = ()  # "dense.x"


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another way to the same gradient: bytes kept, and matrix products of forward and backward (in FLOPs)."""

    way: str  # "rules" (these), "definitions" (their autodiff) or "checkpoint" (jax.checkpoint around the definitions)
    policy: str | None  # of jax.checkpoint
    bytes: int
    products: int

    @property
    def name(self) -> str:
        return self.said()

    def said(self, lang: str = "en") -> str:
        """What it is called in a language."""
        if self.way == "checkpoint":
            return f"jax.checkpoint, {self.policy or said('no_policy', lang)}"
        return said(f"way_{self.way}", lang)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a function keeps for its backward, every array once. ``print`` shows it as a table; ``plot`` draws it.

    ``rivals``: these rules, autodiff of the definitions, and that under ``jax.checkpoint`` around the function with three
    policies. ``hints`` say what to change, with the bytes it would save.
    """

    name: str
    rows: tuple[Row, ...]
    rivals: tuple[Rival, ...]
    advice: tuple[Hint, ...]

    @property
    def hints(self) -> tuple[str, ...]:
        """The advice in sentences."""
        return tuple(hint.said().replace("`", "") for hint in self.advice)

    @property
    def total(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Bytes of parameters among what is kept: they are there anyway."""
        return sum(row.bytes for row in self.rows if row.origin == "parameter")

    @property
    def arguments(self) -> int:
        """Bytes of other arguments among what is kept."""
        return sum(row.bytes for row in self.rows if row.origin == "argument")

    @property
    def activations(self) -> int:
        """Bytes that exist for the backward alone: all but arguments."""
        return self.total - self.parameters - self.arguments

    @property
    def by_op(self) -> dict[str, int]:
        """Bytes by the op that keeps them first, the most first; "parameters", "arguments" and "JAX" for the others."""
        words = {"parameter": "parameters", "argument": "arguments", "jax": "JAX", "op": "JAX"}
        found: dict[str, int] = {}
        for row in self.rows:
            own = row.op if row.origin == "op" and row.name != "output" else ""
            first = row.keepers[0].split(".")[0] if row.keepers and row.origin in ("op", "jax") else own
            key = first or words[row.origin]
            found[key] = found.get(key, 0) + row.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def plot(self, path: str | pathlib.Path) -> None:
        """Draws bytes by op and name, and beside the rivals: PNG or SVG, as the name ends.

        Raises:
          ValueError: where it ends otherwise.
        """
        from fbackprop.explaining.keeping_picture import draw

        draw(self, pathlib.Path(path))

    def text(self, lang: str = "en", *, width: int = 120) -> str:
        """All of it as text; ``print`` shows the same.

        Args:
          lang: "en" or "ko". width: of a line.
        Raises:
          ValueError: where there is no such language.
        """
        from fbackprop.explaining import terminal

        return terminal.text(self._blocks(lang), lang, width)

    def latex(self, lang: str = "en", *, file: str | os.PathLike[str] | None = None) -> str:
        """All of it as a LaTeX document; written to ``file`` too, where one is named. Otherwise as ``text``."""
        from fbackprop.explaining.latex import latex
        from fbackprop.explaining.rendering import written

        return written(latex(self._blocks(lang), lang), file)

    def html(self, lang: str = "en", *, file: str | os.PathLike[str] | None = None) -> str:
        """All of it as a page that needs no network; written to ``file`` too, where one is named. Otherwise as ``text``."""
        from fbackprop.explaining.page import page
        from fbackprop.explaining.rendering import written

        return written(page(self._blocks(lang), lang), file)

    def _blocks(self, lang: str) -> Any:
        from fbackprop.explaining.presenting_keeping import keeping_blocks

        return keeping_blocks(self, lang)

    def __rich__(self) -> Any:
        from fbackprop.explaining.terminal import renderable

        return renderable(self._blocks("en"))

    def __str__(self) -> str:
        return self.text().rstrip()


def saved(
    fn: Callable[..., Any], *args: Any, argnums: int | Sequence[int] = 0, has_aux: bool = False, **kwargs: Any
) -> Keeping:
    """Counts what ``jax.grad`` of a function keeps between forward and backward: each array once, by op and by name.

    Args:
      fn: a function of arrays and pytrees of arrays, with our ops or without.
      args, kwargs: arrays or ``jax.ShapeDtypeStruct``: nothing is run.
      argnums: which of args are differentiated, as for ``jax.grad``. What only other cotangents need is not kept.
      has_aux: whether ``fn`` returns (output, what is not differentiated).
    Returns:
      A ``Keeping``: rows by op and name, autodiff and ``jax.checkpoint`` beside it, and hints.
    Raises:
      TypeError: where ``fn`` is not a function. ValueError: where ``argnums`` names no argument or nothing there is
        floating-point.
    """
    if not callable(fn):
        raise TypeError(f"saved: expected a function, got {type(fn).__name__}.")
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    name = name_of(fn)
    if bad := [n for n in numbers if not -len(args) <= n < len(args)]:
        raise ValueError(
            f"saved: argnums is {argnums}, but {name} was given {len(args)} arguments (there is no argument {bad[0]})."
        )
    numbers = tuple(n % len(args) for n in numbers)
    call = Differentiated(fn, args, kwargs, numbers, has_aux)
    if not call.places:
        raise ValueError(f"saved: no floating-point array in the argument of {name} that argnums={argnums} names.")
    program = call.program(fn)
    rows = _rows(residuals(call.flat(fn), call.arrays, call.others), call.labels, {} if program is None else _keepers(program))
    keeping = Keeping(name, rows, tuple(_rivals(call, fn)), ())
    return dataclasses.replace(keeping, advice=tuple(hints(keeping, program, call, fn)))


class Differentiated:
    """A call with the arrays that are differentiated apart from the others."""

    def __init__(self, fn: Any, args: Any, kwargs: Any, argnums: Sequence[int], has_aux: bool):
        self.has_aux = has_aux
        self.leaves, self.tree = jax.tree.flatten((args, kwargs))
        named = labels_of(fn, args, kwargs)
        is_array = [hasattr(leaf, "dtype") for leaf in self.leaves]
        moving = [
            hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) and argument in argnums
            for leaf, (_, argument, _) in zip(self.leaves, named)
        ]
        self.places = [i for i, m in enumerate(moving) if m]
        self.rest = [i for i, (a, m) in enumerate(zip(is_array, moving)) if a and not m]
        self.arrays, self.others = ([self.leaves[i] for i in own] for own in (self.places, self.rest))
        self.labels = [(named[i][0], "parameter" if i in self.places else "argument") for i in (*self.places, *self.rest)]

    def flat(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of (arrays that are differentiated, the others) that returns the floating-point outputs."""

        def run(moved: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            every = list(self.leaves)
            for i, value in (*zip(self.places, moved), *zip(self.rest, others)):
                every[i] = value
            args, kwargs = jax.tree.unflatten(self.tree, every)
            out = fn(*args, **kwargs)
            leaves = jax.tree.leaves(out[0] if self.has_aux else out)
            return [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

        return run

    def program(self, fn: Callable[..., Any]) -> Program | None:
        """The ops of the function, where its calls can be told apart (see ``explain``)."""
        flat, number = self.flat(fn), len(self.arrays)
        try:
            return traced(lambda *leaves: flat(leaves[:number], leaves[number:]), [*self.arrays, *self.others])[0]
        except ValueError:
            return None

    def kept(self, way: Callable[..., Any]) -> int:
        """The bytes that a function, as ``flat`` gives it, keeps between forward and backward."""

        def pullback(moved: Any, others: Any) -> Any:
            return jax.vjp(lambda moved: way(moved, others), moved)[1]

        return nbytes(*jax.tree.leaves(jax.eval_shape(pullback, self.arrays, self.others)))

    def products(self, way: Callable[..., Any]) -> int:
        """The FLOPs of its matrix products, forward and backward, without those that no gradient asked for needs."""

        def gradient(moved: Any, others: Any) -> Any:
            y, pullback = jax.vjp(lambda moved: way(moved, others), moved)
            return y, pullback(y)  # y has the type of its cotangent

        jaxpr = jax.make_jaxpr(gradient)(self.arrays, self.others).jaxpr
        return matmul_flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _rows(found: Sequence[Residual], labels: Sequence[tuple[str, str]], keepers: dict[Any, list[str]]) -> tuple[Row, ...]:
    """Residuals that are alike as one row, the most bytes first; arguments last."""
    grouped: dict[Any, list[Residual]] = {}
    for r in found:
        if r.bytes:
            grouped.setdefault((r.kind, r.name, r.what, r.shape, r.dtype), []).append(r)
    rows = []
    for (kind, name, what, shape, dtype), own in grouped.items():
        op, label, origin = (name, what, kind) if kind != "argument" else ("", *labels[int(name)])
        # Under a scan an array of each step is kept, with an axis more.
        known = [k for s in (shape, shape[1:]) for k in keepers.get((kind, name, what if kind == "op" else "", s), ())]
        rows.append(Row(op, label, origin, shape, dtype, len(own), sum(r.bytes for r in own), tuple(dict.fromkeys(known))))
    return tuple(sorted(rows, key=lambda row: (row.origin in ("parameter", "argument"), -row.bytes)))


def _keepers(program: Program) -> dict[Any, list[str]]:
    """For what is kept as it came in or went out, by kind, name, what and shape as a ``Residual`` has them: who keeps it."""
    maker: dict[int, tuple[str, str, str]] = {v: ("argument", str(i), "") for i, v in enumerate(program.arguments)}
    found: dict[Any, list[str]] = {}
    for node in program.nodes:
        if node.call is None:
            same = node.name == "unstack"  # a scan keeps the whole that its steps read
            maker.update(
                (v, maker.get(node.inputs[0], ("jax", "", "")) if same else ("jax", node.name, "")) for v in node.outputs
            )
            continue
        maker.update((v, ("op", node.name, "output")) for v in node.outputs)
        for name, alias, kind in node.call.kept:
            if alias is not None:
                value = (node.inputs if alias[0] == "input" else node.outputs)[alias[1]]
                found.setdefault((*maker.get(value, ("jax", "constant", "")), tuple(kind.shape)), []).append(
                    f"{node.name}.{name}"
                )
    return found


def _rivals(call: Differentiated, fn: Callable[..., Any]) -> Iterator[Rival]:
    definition = call.flat(without_rules(fn))
    ways: list[tuple[str, str | None, Any]] = [("rules", None, call.flat(fn)), ("definitions", None, definition)]
    for policy in POLICIES:
        chosen = None if policy is None else getattr(jax.checkpoint_policies, policy)
        ways.append(("checkpoint", policy, jax.checkpoint(definition, policy=chosen)))
    for way, policy, run in ways:
        yield Rival(way, policy, call.kept(run), call.products(run))
