"""Finds feed-forward blocks around an activation that was found: the projections before it and the one behind it.

    gelu_mlp      φ(x U + b) D              swiglu_mlp, geglu_mlp      (φ(x G) · (x U)) D

The activation alone keeps its input, and the product behind it what it multiplies: two hidden arrays, or four where there is a
gate. The block keeps what the first products gave, one or two.
"""

from typing import Any

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.sites import Site, misfit

__all__ = ["fed"]


def fed(program: Program, site: Site, taken: set[int]) -> Site | None:
    """The block around an activation; None where there is none, or where anything in it is used elsewhere."""
    if site.op not in ("gelu", "silu"):
        return None
    (h,), (a,) = site.inputs, site.outputs
    own, middle = [*site.equations], _only_user(program, a)
    linear = None
    if middle is not None and middle.name == "mul" and len({id(v) for v in middle.inputs}) == 2:
        (linear,) = (v for v in middle.inputs if v is not a)
        own.append(middle)
        a, middle = middle.outputs[0], _only_user(program, middle.outputs[0])
    if middle is None or not _projects(middle) or middle.inputs[0] is not a:
        return None
    own.append(middle)
    if linear is not None:
        found = _gated(site, h, linear, middle, own)
    else:
        found = _plain(site, h, middle, own)
    inside = set(map(id, own))
    if found is None or taken & inside or any(_leaks(program, e, inside) for e in own if e is not middle):
        return None
    return None if misfit(found) else found


def _plain(site: Site, h: Value, down: Equation, own: list[Equation]) -> Site | None:
    if site.op != "gelu":
        return None
    (approximate,), bias, up = site.options, None, h.maker
    if up is not None and up.name in ("add", "add_any"):
        own.append(up)
        rows = [_row(v, h.shape[-1]) for v in up.inputs]
        which = 1 if rows[1] is not None else 0
        bias, up = rows[which], up.inputs[1 - which].maker
        if bias is None or bias.dtype != h.dtype:
            return None
    if up is None or not _projects(up) or _precision(up) != _precision(down):
        return None
    own.append(up)

    def call(x: Any, kernel: Any, last: Any, *more: Any) -> tuple[Any]:
        given = more[0].reshape(-1) if more else None
        kernel, last = _kernel(up, kernel), _kernel(down, last)
        return (ops.gelu_mlp(x, kernel, last, given, approximate=approximate, precision=_precision(up)),)

    inputs = [*up.inputs, down.inputs[1], *(() if bias is None else (bias,))]
    return Site("gelu_mlp", inputs, down.outputs, call, (), site.anchor, equations=own)


def _gated(site: Site, h: Value, linear: Value, down: Equation, own: list[Equation]) -> Site | None:
    gate, up = h.maker, linear.maker
    if gate is None or up is None or not (_projects(gate) and _projects(up)) or gate.inputs[0] is not up.inputs[0]:
        return None
    if gate is up or not _precision(gate) == _precision(up) == _precision(down):
        return None
    own += [gate, up]
    gelu = site.op == "gelu"
    options = {"approximate": site.options[0]} if gelu else {}

    def call(x: Any, one: Any, other: Any, last: Any) -> tuple[Any]:
        kernels = _kernel(gate, one), _kernel(up, other), _kernel(down, last)
        return ((ops.geglu_mlp if gelu else ops.swiglu_mlp)(x, *kernels, precision=_precision(up), **options),)

    inputs = [*gate.inputs, up.inputs[1], down.inputs[1]]
    return Site("geglu_mlp" if gelu else "swiglu_mlp", inputs, down.outputs, call, (), site.anchor, equations=own)


def _projects(equation: Equation) -> bool:
    """Whether it is a product of x [..., in] with a kernel [in, out] or [out, in], all of one dtype."""
    if equation.name != "dot_general":
        return False
    (x, kernel), (out,) = equation.inputs, equation.outputs
    contracted, batch = equation.params["dimension_numbers"]
    last = tuple(contracted[0]) == (len(x.shape) - 1,) and len(x.shape) > 1
    placed = equation.params.get("out_sharding") is not None
    return last and len(kernel.shape) == 2 and not any(map(len, batch)) and x.dtype == kernel.dtype == out.dtype and not placed


def _kernel(equation: Equation, array: Any) -> Any:
    return array.T if equation.params["dimension_numbers"][0][1][0] == 1 else array


def _precision(equation: Equation) -> Any:
    return equation.params["precision"]


def _row(bias: Value, features: int) -> Value | None:
    """The row of features, of one number each, that a value is, spread over all else."""
    while bias.size > features and (maker := bias.maker) is not None and maker.name == "broadcast_in_dim":
        (inner,), places = maker.inputs, maker.params["broadcast_dimensions"]
        if inner.shape[-1:] != (features,) or int(places[-1]) != len(bias.shape) - 1:
            return None
        bias = inner
    return bias if bias.size == features and bias.shape[-1:] == (features,) else None


def _only_user(program: Program, value: Value) -> Equation | None:
    users = {id(u): u for u in value.users}
    return next(iter(users.values())) if len(users) == 1 and all(v is not value for v in program.outputs) else None


def _leaks(program: Program, equation: Equation, inside: set[int]) -> bool:
    return any(
        any(id(u) not in inside for u in v.users) or any(v is o for o in program.outputs) for v in equation.outputs
    )  # fmt: skip
