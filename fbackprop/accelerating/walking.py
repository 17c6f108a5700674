"""Walking over a program: back to what a value is computed from, and on to what is made of it."""

from collections.abc import Callable, Collection, Iterator, Sequence

import jax.numpy as jnp

from fbackprop.accelerating.evaluation import is_elementwise
from fbackprop.accelerating.program import Equation, Value

__all__ = [
    "REDUCING", "SHAPING", "backwards", "chain", "constant", "integer_constants", "integer_sources", "peeled", "sides",
    "source", "uniform",
]  # fmt: skip

SHAPING = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "pvary"))
REDUCING = frozenset(("reduce_sum", "reduce_max", "reduce_min"))


def constant(value: Value) -> bool:
    """Whether a value is made of nothing but constants."""
    pending, seen = [value], set()
    while pending:
        v = pending.pop()
        if v.known is not None or id(v) in seen:
            continue
        if v.maker is None or v.maker.name.startswith("random") or len(seen) > 64:
            return False
        seen.add(id(v))
        pending += v.maker.inputs
    return True


def uniform(value: Value) -> bool:
    """Whether a value is one number of the program, spread out or not."""
    while (maker := value.maker) is not None and maker.name in SHAPING:
        value = maker.inputs[0]
    return value.known is not None and value.size == 1


def backwards(
    value: Value, through: Callable[[Value, Equation], bool], most: int
) -> Iterator[tuple[Equation, Collection[Value]]]:
    """Step by step back from ``value``, the latest equation first, as far as ``through`` allows: each equation, and the values
    that are no constants and that ``value`` is computed from before it."""
    frontier = {id(value): value}
    for _ in range(most):
        open_ = [v for v in frontier.values() if v.maker is not None]
        if not open_:
            return
        latest = max(open_, key=lambda v: v.maker.order if v.maker else -1)
        maker = latest.maker
        assert maker is not None
        if not through(latest, maker):
            return
        del frontier[id(latest)]
        frontier.update((id(v), v) for v in maker.inputs if not constant(v))
        yield maker, frontier.values()


def source(value: Value, wanted: Callable[[Value], bool], most: int = 60) -> Iterator[Value]:
    """Single values that ``value`` is computed from, step by step back through elementwise equations, sums and changes of
    shape; the nearest first."""

    def through(_: Value, maker: Equation) -> bool:
        return maker.name in SHAPING or maker.name in REDUCING or maker.name == "concatenate" or is_elementwise(maker)

    for _, frontier in backwards(value, through, most):
        if len(frontier) == 1 and wanted(only := next(iter(frontier))):
            yield only


def peeled(value: Value) -> Value:
    """What was spread out to this value, without the axes that it was given."""
    while (maker := value.maker) is not None and maker.name in SHAPING and maker.inputs[0].is_float == value.is_float:
        inner = maker.inputs[0]
        if inner.number is not None or (maker.name == "convert_element_type" and inner.dtype != value.dtype):
            break
        value = inner
    return value


def integer_sources(values: list[Value], rows: int) -> list[Value]:
    """Arrays of integers, one for each row, that what enters is computed from; the deepest first."""
    found: dict[int, Value] = {}
    for v in values:
        deep = [s for s in source(v, lambda s: not s.is_float and s.size == rows)]
        for s in (*reversed(deep), v):
            if not s.is_float and s.dtype is not None and jnp.issubdtype(s.dtype, jnp.integer) and s.size == rows:
                inner = peeled(s)
                found.setdefault(id(inner), inner)
    return [v for v in found.values() if not constant(v)]


def integer_constants(values: list[Value], rows: int) -> list[Value]:
    """Arrays of integers made of constants, one for each row, that what enters is computed from; the deepest first."""
    found: dict[int, Value] = {}
    pending = [v for v in values if constant(v)]
    while pending:
        v = pending.pop(0)
        if id(v) not in found:
            found[id(v)] = v
            pending += v.maker.inputs if v.maker is not None else ()
    return [v for v in reversed(found.values()) if v.size == rows and v.shape and jnp.issubdtype(v.dtype, jnp.integer)]


def sides(out: Value, inputs: Sequence[Value], constants: bool = False) -> list[tuple[Value, Equation]] | None:
    """Values that enter between the inputs and ``out`` and depend on none of them, each with the equation it enters; None
    where ``out`` does not depend on the inputs. With ``constants`` also arrays made of constants, if not of one number."""
    stop, moving, order = set(map(id, inputs)), {}, []

    def visit(value: Value) -> bool:
        # Iterative, since programs are deep.
        stack: list[tuple[Value, bool]] = [(value, False)]
        while stack:
            v, done = stack.pop()
            if id(v) in moving:
                continue
            if id(v) in stop:
                moving[id(v)] = True
            elif v.maker is None:
                moving[id(v)] = False
            elif done:
                moving[id(v)] = any(moving[id(i)] for i in v.maker.inputs)
            elif len(moving) > 4000:
                return False
            else:
                stack.append((v, True))
                stack += [(i, False) for i in v.maker.inputs]
        return moving[id(value)]

    if not visit(out):
        return None
    pending, seen = [out], set()
    while pending:
        v = pending.pop()
        if id(v) in seen or id(v) in stop or v.maker is None:
            continue
        seen.add(id(v))
        for i in v.maker.inputs:
            if moving[id(i)]:
                pending.append(i)
            elif not constant(i) or (constants and not uniform(i)):
                order.append((i, v.maker))
    return order


def chain(value: Value, through: Callable[[Equation], bool], most: int = 12) -> list[Value]:
    """The values that are made of ``value`` one after the other, as long as each has one user."""
    found = []
    for _ in range(most):
        users = {id(u): u for u in value.users}
        if len(users) != 1:
            break
        (user,) = users.values()
        if len(user.outputs) != 1 or not through(user):
            break
        value = user.outputs[0]
        found.append(value)
    return found
