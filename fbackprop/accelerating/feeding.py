"""Finds feed-forward blocks around an activation that was found: the projections before it and the one behind it.

    gelu_mlp      φ(x U + b) D              swiglu_mlp, geglu_mlp      (φ(x G) · (x U)) D

The activation alone keeps its input, and the product behind it what it multiplies: two hidden arrays, or four where there is a
gate. The block keeps what the first products gave, one or two, and computes the activation once more: that pays where these
arrays are large. (A small transformer for images trains 10 % slower with it on a CPU, to save 16 MiB.)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from fbackprop import ops
from fbackprop.accelerating.program import Equation, Program, Value
from fbackprop.accelerating.sites import Site, misfit

__all__ = ["fed"]

HIDDEN = 2**22  # numbers in a hidden array; blocks with fewer are left to the activation's own rule


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A product of x [..., in] with a kernel [in, out] or [out, in]; ``side`` is the operand that is x. Where that is the
    second, the features of the product stand first, and ``equations`` may bring them back. ``first``: x is [in, ...]."""

    dot: Equation
    side: int
    first: bool
    equations: tuple[Equation, ...]

    @property
    def x(self) -> Value:
        return self.dot.inputs[self.side]

    @property
    def kernel(self) -> Value:
        return self.dot.inputs[1 - self.side]

    @property
    def precision(self) -> Any:
        return self.dot.params["precision"]

    def laid(self, kernel: Any) -> Any:
        """The kernel as [in, out]."""
        return kernel.T if self.dot.params["dimension_numbers"][0][1 - self.side][0] == 1 else kernel


def fed(program: Program, site: Site, taken: set[int]) -> Site | None:
    """The block around an activation; None where there is none, or where anything in it is used elsewhere."""
    if site.op not in ("gelu", "silu"):
        return None
    (h,), (a,) = site.inputs, site.outputs
    if h.size < HIDDEN:
        return None
    own, user, linear = [*site.equations], _only_user(program, a), None
    if user is not None and user.name == "mul" and len({id(v) for v in user.inputs}) == 2:
        (linear,) = (v for v in user.inputs if v is not a)
        own.append(user)
        a, user = user.outputs[0], _only_user(program, user.outputs[0])
    side = 0 if user is not None and user.inputs[0] is a else 1
    down = None if user is None else _projection(user, side) or _projection(user, side, at=0)
    if down is None or down.x is not a or down.kernel is a:
        return None
    found = _plain(site, h, down, own) if linear is None else _gated(site, h, linear, down, own)
    if found is None:
        return None
    inside = set(map(id, found.equations))
    if taken & inside or any(_leaks(program, e, inside) for e in found.equations if e is not down.dot):
        return None
    return None if misfit(found) else found


def _plain(site: Site, h: Value, down: _Projection, own: list[Equation]) -> Site | None:
    if site.op != "gelu":
        return None
    (approximate,), bias, before = site.options, None, h
    if h.maker is not None and h.maker.name in ("add", "add_any"):
        own.append(h.maker)
        rows = [_row(v, h.shape[-1]) for v in h.maker.inputs]
        which = 1 if rows[1] is not None else 0
        bias, before = rows[which], h.maker.inputs[1 - which]
        if bias is None or bias.dtype != h.dtype:
            return None
    up = _made(before, down.first)
    if up is None or (bias is not None and down.first) or up.precision != down.precision:
        return None

    def call(x: Any, kernel: Any, last: Any, *more: Any) -> tuple[Any]:
        given = more[0].reshape(-1) if more else None
        kernels = up.laid(kernel), down.laid(last)
        return (_out(down, ops.gelu_mlp(x, *kernels, given, approximate=approximate, precision=up.precision)),)

    inputs = [up.x, up.kernel, down.kernel, *(() if bias is None else (bias,))]
    equations = [*own, *up.equations, down.dot]
    return Site("gelu_mlp", inputs, down.dot.outputs, call, (), site.anchor, equations=equations)


def _gated(site: Site, h: Value, linear: Value, down: _Projection, own: list[Equation]) -> Site | None:
    gate, up = _made(h, down.first), _made(linear, down.first)
    if gate is None or up is None or gate.x is not up.x or gate.dot is up.dot:
        return None
    if not gate.precision == up.precision == down.precision:
        return None
    gelu = site.op == "gelu"
    options = {"approximate": site.options[0]} if gelu else {}

    def call(x: Any, one: Any, other: Any, last: Any) -> tuple[Any]:
        kernels = gate.laid(one), up.laid(other), down.laid(last)
        return (_out(down, (ops.geglu_mlp if gelu else ops.swiglu_mlp)(x, *kernels, precision=up.precision, **options)),)

    equations = [*own, *gate.equations, *up.equations, down.dot]
    inputs = [gate.x, gate.kernel, up.kernel, down.kernel]
    name = "geglu_mlp" if gelu else "swiglu_mlp"
    return Site(name, inputs, down.dot.outputs, call, (), site.anchor, equations=equations)


def _out(down: _Projection, y: Any) -> Any:
    return y if down.side == 0 else jnp.moveaxis(y, -1, 0)


def _made(value: Value, first: bool) -> _Projection | None:
    """The projection that a value [..., out] comes from; with ``first`` [out, ...]."""
    maker = value.maker
    if maker is None or first:
        return None if maker is None else _projection(maker, 1)
    if maker.name != "transpose":
        return _projection(maker, 0)
    dot, rank = maker.inputs[0].maker, len(value.shape)
    last = tuple(int(a) for a in maker.params["permutation"]) == (*range(1, rank), 0)
    return _projection(dot, 1, maker) if last and dot is not None else None


def _projection(equation: Equation, side: int, *more: Equation, at: int = -1) -> _Projection | None:
    """An equation as a projection of its operand at ``side``, whose features lie along the axis ``at``, 0 or −1."""
    if equation.name != "dot_general" or equation.params.get("out_sharding") is not None:
        return None
    contracted, batch = equation.params["dimension_numbers"]
    x, kernel = equation.inputs[side], equation.inputs[1 - side]
    rank, (out,) = len(x.shape), equation.outputs
    if rank < 2 or len(kernel.shape) != 2 or any(map(len, batch)) or tuple(contracted[side]) != (at % rank,):
        return None
    same = x.dtype == kernel.dtype == out.dtype
    return _Projection(equation, side, at == 0, (*more, equation)) if same else None


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
    """Whether anything that an equation gives is used outside."""
    results = set(map(id, program.outputs))
    return any(id(v) in results or any(id(u) not in inside for u in v.users) for v in equation.outputs)
