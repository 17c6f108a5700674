"""A program with ops of this library in place of what they stand in for, run equation by equation.

What is not replaced is bound again as it was traced. An equation that holds programs itself (a scan, a branch, a checkpoint) is
built again only where something inside of it is replaced. Custom derivatives of other people are left alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.accelerating.activating import activations
from fbackprop.accelerating.attending import attentions
from fbackprop.accelerating.losing import cross_entropies
from fbackprop.accelerating.multiplying import products
from fbackprop.accelerating.normalizing import normalizations
from fbackprop.accelerating.program import Equation, Program, Value, inside, line_of, scan_counts
from fbackprop.accelerating.recurring import recurrences
from fbackprop.accelerating.sites import Near, Site
from fbackprop.accelerating.windowing import convolutions, pools

__all__ = ["Found", "Rewritten", "rewritten"]

Finder = Callable[[Program, set[int]], Iterator[Site | Near]]
_FINDERS: tuple[Finder, ...] = (
    recurrences, pools, convolutions, attentions, cross_entropies, normalizations, activations, products,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """One line of a report: what was found where, and why it was left if it was."""

    op: str
    where: str
    why: str = ""  # empty: replaced

    @property
    def replaced(self) -> bool:
        return not self.why


@dataclasses.dataclass(eq=False)
class Rewritten:
    """A program, the sites in it, and the rewritten programs inside of its equations."""

    program: Program
    sites: list[Site]
    inner: dict[int, list["Rewritten"]]  # by the id of the equation, in the order of ``inside``
    found: list[Found]

    def __post_init__(self) -> None:
        self._by_output = {id(v): site for site in self.sites for v in site.outputs}
        self._steps = list(self._ordered())

    @property
    def changes(self) -> bool:
        return bool(self.sites) or any(r.changes for rs in self.inner.values() for r in rs)

    def _ordered(self) -> Iterator[Site | Equation]:
        """What has to run, each after what it needs; equations with effects in their order."""
        done: set[int] = set()
        effects = [e for e in self.program.equations if e.again.effects]
        roots: list[Value | Equation] = [*effects, *self.program.outputs]
        for root in roots:
            stack: list[tuple[Any, bool]] = [(root, False)]
            while stack:
                item, ready = stack.pop()
                step = item if isinstance(item, (Site, Equation)) else self._by_output.get(id(item), item.maker)
                if step is None or id(step) in done:
                    continue
                if ready:
                    done.add(id(step))
                    yield step
                else:
                    stack.append((step, True))
                    stack += [(v, False) for v in reversed(step.inputs)]

    def run(self, args: Sequence[Any]) -> list[Any]:
        known: dict[int, Any] = dict(zip(map(id, self.program.inputs), args))

        def read(value: Value) -> Any:
            return known.get(id(value), value.constant)

        for step in self._steps:
            given = [read(v) for v in step.inputs]
            with _as_traced(step if isinstance(step, Equation) else step.anchor):
                results = step.call(*given) if isinstance(step, Site) else self._bound(step, given)
            known.update(zip(map(id, step.outputs), results))
        return [read(v) for v in self.program.outputs]

    def _bound(self, equation: Equation, args: list[Any]) -> list[Any]:
        inner = self.inner.get(id(equation), [])
        if any(r.changes for r in inner):
            return _REBUILT[equation.name](equation.params, inner, args)
        again = equation.again
        out = again.primitive.bind(*args, **again.primitive.get_bind_params(again.params))
        return list(out) if again.primitive.multiple_results else [out]


@contextlib.contextmanager
def _as_traced(equation: Equation | None) -> Iterator[None]:
    """The scopes and settings that an equation was traced under."""
    with contextlib.ExitStack() as stack:
        if equation is not None:
            if scope := str(equation.called.source_info.name_stack):
                stack.enter_context(jax.named_scope(scope))
            stack.enter_context(equation.again.ctx.manager)
        yield


def rewritten(program: Program, where: str = "") -> Rewritten:
    """Finds what can be replaced, here and in the programs inside."""
    taken: set[int] = set()
    sites, found, inner = [], [], {}
    for finder in _FINDERS:
        near: list[Near] = []
        for item in _examined(finder, program, taken):
            if isinstance(item, Near):
                near.append(item)
            elif not any(id(e) in taken for e in item.equations):
                taken.update(map(id, item.equations))
                sites.append(item)
        found += [Found(n.op, _place(where, n.anchor), n.why) for n in near if id(n.anchor) not in taken]
    found += [Found(s.op, _place(where, s.anchor)) for s in sites]
    for equation in program.equations:
        if equation.name in _REBUILT and id(equation) not in taken and not equation.params.get("differentiated", False):
            within = f"{where}{equation.name.rstrip('0123456789')} › "
            inner[id(equation)] = [rewritten(Program.of(p), within) for p in inside(equation)]
            found += [f for r in inner[id(equation)] for f in r.found]
    return Rewritten(program, sites, inner, found)


def _examined(finder: Finder, program: Program, taken: set[int]) -> Iterator[Site | Near]:
    """What a finder finds. A program that it stumbles over is left as it is from there on: a model must not fail for it."""
    try:
        yield from finder(program, taken)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, NotImplementedError, MemoryError) as error:
        told = f"it could not be examined ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if program.equations:
            yield Near(finder.__name__, told, program.equations[0])


def _place(where: str, anchor: Equation | None) -> str:
    return where + (line_of(anchor.called) if anchor is not None else "")


# ------------------------------------------------------------------------------------ equations that hold programs themselves


def _scan(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    fixed, carried = scan_counts(p)
    consts, init, xs = args[:fixed], args[fixed : fixed + carried], args[fixed + carried :]

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        out = inner[0].run([*consts, *carry, *x])
        return out[:carried], out[carried:]

    carry, ys = jax.lax.scan(step, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _while(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    programs = dict(zip((k for k in p if k in ("cond_jaxpr", "body_jaxpr")), inner))  # in the order that ``inside`` sees them
    of_condition, rest = args[: p["cond_nconsts"]], args[p["cond_nconsts"] :]
    of_body, init = rest[: p["body_nconsts"]], rest[p["body_nconsts"] :]

    def goes_on(state: Any) -> Any:
        return programs["cond_jaxpr"].run([*of_condition, *state])[0]

    def step(state: Any) -> Any:
        after, still = programs["body_jaxpr"].run([*of_body, *state]), goes_on(state)
        if not still.ndim:
            return after
        # Under vmap each member of a batch has a condition of its own, and those that have ended stay as they are.
        each = [still.reshape(still.shape + (1,) * (jnp.ndim(new) - still.ndim)) for new in after]
        return [jnp.where(on, new, old) for on, new, old in zip(each, after, state)]

    return list(jax.lax.while_loop(lambda state: goes_on(state).any(), step, init))


def _cond(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    index, *operands = args
    return list(jax.lax.switch(index.astype(jnp.int32), [lambda *xs, r=r: r.run(xs) for r in inner], *operands))


def _checkpoint(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    run = jax.checkpoint(lambda *xs: inner[0].run(xs), prevent_cse=p["prevent_cse"], policy=p["policy"])
    return list(run(*args))


def _jit(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    run = jax.jit(lambda *xs: inner[0].run(xs), in_shardings=p["in_shardings"], out_shardings=p["out_shardings"])
    return list(run(*args))


def _shard_map(p: dict[str, Any], inner: list[Rewritten], args: list[Any]) -> list[Any]:
    run = jax.shard_map(
        lambda *xs: tuple(inner[0].run(xs)), mesh=p["mesh"], in_specs=tuple(p["in_specs"]), out_specs=tuple(p["out_specs"]),
        axis_names=p["newly_manual_axes"], check_vma=p["check_vma"],
    )  # fmt: skip
    return list(run(*args))


_REBUILT: dict[str, Callable[[dict[str, Any], list[Rewritten], list[Any]], list[Any]]] = {
    "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map, "jit": _jit, "pjit": _jit,
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _checkpoint),
}  # fmt: skip
