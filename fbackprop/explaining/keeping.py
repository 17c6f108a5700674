"""``saved``: the bytes that a function keeps between forward and backward, by op and by name, and what would keep fewer.

Counted on types alone: ``jax.ShapeDtypeStruct`` will do for arguments, and nothing is run.
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.context import without_rules
from fbackprop.explaining.calling import labels_of, name_of
from fbackprop.explaining.hints import hints, size
from fbackprop.explaining.program import Program, traced
from fbackprop.explaining.residuals import Residual, residuals
from fbackprop.measuring.flops import matmul_flops

__all__ = ["Keeping", "Rival", "Row", "saved"]

ARGUMENTS = 8
"""Rows of arguments in a printed table."""

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

    name: str
    bytes: int
    products: int


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a function keeps for its backward, every array once. ``print`` shows it as a table; ``plot`` draws it.

    ``rivals``: these rules, autodiff of the definitions, and that under ``jax.checkpoint`` around the function with three
    policies. ``hints`` say what to change, with the bytes it would save.
    """

    name: str
    rows: tuple[Row, ...]
    rivals: tuple[Rival, ...]
    hints: tuple[str, ...]

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
        """Draws bytes by op and name, and beside the rivals: PNG, or SVG where the name ends so."""
        from fbackprop.explaining.keeping_picture import draw

        draw(self, pathlib.Path(path))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"kept for the backward of {self.name}: {size(self.total)}", title_justify="left")
        for column, justify in (
            ("made by", "left"),
            ("name", "left"),
            ("kept by", "left"),
            ("array", "left"),
            ("bytes", "right"),
        ):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        shown, more = _shown(self.rows)
        for row in shown:
            maker = row.op if row.origin == "op" else f"JAX: {row.op}" if row.origin == "jax" else row.origin
            times = f" ×{row.times}" if row.times > 1 else ""
            table.add_row(maker, row.name, _grouped(row.keepers), f"{row.dtype}{list(row.shape)}{times}", size(row.bytes))
        if more:
            table.add_row("arguments", f"{len(more)} more", "", "", size(sum(row.bytes for row in more)))
        table.add_section()
        for name, value in (
            ("parameters", self.parameters), ("other arguments", self.arguments), ("for the backward alone", self.activations),
        ):  # fmt: skip
            table.add_row(Text(name, "bold"), "", "", "", size(value))
        beside = Table(title="the same gradient in other ways", title_justify="left")
        for column in ("", "kept", "matrix products"):
            beside.add_column(column, justify="right" if column else "left")
        least = min((r.products for r in self.rivals), default=0) or 1
        for rival in self.rivals:
            beside.add_row(rival.name, size(rival.bytes), f"{rival.products / least:.2f} ×" if rival.products else "")
        hints = [Text(f"• {hint}") for hint in self.hints]
        return Group(table, beside, *([Text("what to change", "bold"), *hints] if hints else []))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


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
    return dataclasses.replace(keeping, hints=tuple(hints(keeping, program, call, fn)))


def _grouped(keepers: Sequence[str]) -> str:
    """ "dense.x", "attention.key" and "attention.value" as "dense: x; attention: key, value"."""
    found: dict[str, list[str]] = {}
    for keeper in keepers:
        op, name = keeper.split(".", 1)
        found.setdefault(op, []).append(name)
    return "; ".join(f"{op}: {', '.join(names)}" for op, names in found.items())


def _shown(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a table, and those of arguments that are too many to show."""
    arguments = [row for row in rows if row.origin in ("parameter", "argument")]
    return [row for row in rows if row not in arguments[ARGUMENTS:]], arguments[ARGUMENTS:]


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

        leaves = jax.tree.leaves(jax.eval_shape(pullback, self.arrays, self.others))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def products(self, way: Callable[..., Any]) -> int:
        """The FLOPs of its matrix products, forward and backward."""

        def gradient(moved: Any, others: Any) -> Any:
            y, pullback = jax.vjp(lambda moved: way(moved, others), moved)
            return y, pullback(y)  # y has the type of its cotangent

        return matmul_flops(jax.make_jaxpr(gradient)(self.arrays, self.others))


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
    ways = [("these rules", call.flat(fn)), ("autodiff of the definitions", definition)]
    for policy in POLICIES:
        chosen = None if policy is None else getattr(jax.checkpoint_policies, policy)
        ways.append((f"jax.checkpoint, {policy or 'no policy'}", jax.checkpoint(definition, policy=chosen)))
    for name, way in ways:
        yield Rival(name, call.kept(way), call.products(way))
