"""The rule engine: an op's definition, its forward and its backward, registered in one place.

A **rule** is a reference (the body of the public function: the definition, in plain JAX), a ``forward`` that
also returns what the backward needs, a ``backward``, and samples. ``@rule`` puts it into ``RULES`` and gives
an **op**: an ordinary function with the same signature, whose halves are public.

    y = op(*args, **options)                    under jax.grad, the backward written by hand
    y, saved = op.forward(*args, **options)     the same two halves, called by hand
    cotangents = op.backward(saved, dy)         one for each argument that is not static, None where there is none

This module is the only user of ``jax.custom_vjp``. Once, for all rules, it sees to it that

- one ``custom_vjp`` exists for each op and static arguments (a new one at each call would retrace), and each op is
  jitted, so that an eager call costs what a call of a jax.nn function costs;
- shapes, arity and integer arguments of a backward are checked, and its cotangents cast to their primal's dtype;
- the backward runs under the forward's matmul precision and mesh, and its cotangents vary over the same mesh axes
  as their primals (``shard_map`` with ``check_vma=True``, explicit shardings);
- arguments that are not differentiated cost nothing: what only their cotangents need is not kept;
- with complex arguments an op is its definition: the derivations are for real numbers.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var

from fbackprop import context
from fbackprop.refusing import bound, named, refuse_kinds
from fbackprop.samples import Sample

__all__ = ["RULES", "Op", "Rule", "Saved", "Static", "rule"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """All that is known of one op. ``forward(*args, **static)`` returns ``(y, saved)``; ``backward(saved, dy, **static)``
    a tuple with one cotangent for each argument that is not static, in their order."""

    name: str
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    static: tuple[str, ...] = ()
    primal: Callable[..., Any] | None = None  # runs when nothing is differentiated; by default the forward's y
    exact: bool = True  # False: meant to differ from the gradient (straight-through)
    samples: tuple[Sample, ...] = ()
    workloads: tuple[Sample, ...] = ()
    keeps: str = ""  # what is kept for the backward, in words, for the table of rules
    minimum: Callable[..., int] | None = None  # the bytes a backward has to keep; a formula in arguments and y, by name
    recomputes: str = ""  # what the backward computes again by design, in words

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments that are not static: those that get a cotangent (or None)."""
        return tuple(n for n in self.signature.parameters if n not in self.static)

    @functools.cached_property
    def backward_static(self) -> tuple[str, ...]:
        """The static arguments that the backward asks for."""
        return tuple(n for n in inspect.signature(self.backward).parameters if n in self.static)

    @functools.cached_property
    def op(self) -> "Op[..., Any]":
        return _make_op(self)

    def minimum_bytes(self, y: Any, dynamic: Sequence[Any], static: Sequence[Any]) -> int | None:
        """The least that any backward has to keep for a call with this output, arguments included; None if nobody has told."""
        if self.minimum is None:
            return None
        known = {"y": y, **dict(zip(self.arguments, dynamic)), **dict(zip(self.static, static))}
        return int(self.minimum(**{n: known[n] for n in inspect.signature(self.minimum).parameters}))

    @property
    def formula(self) -> str:
        """The derivation: the docstring of the module that the op stands in."""
        return inspect.getdoc(inspect.getmodule(self.reference)) or ""

    def split(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of a call as (arrays in the order of the signature, values of the static ones)."""
        given = bound(self.name, self.signature, args, kwargs)
        given.apply_defaults()
        for name in self.static:
            try:
                hash(given.arguments[name])
            except TypeError:
                kind = "a traced value" if isinstance(given.arguments[name], Tracer) else "not hashable"
                raise TypeError(
                    f"{self.name}: {name} is static, so it must be a hashable Python value such as a number, a string or "
                    f"a tuple; got {given.arguments[name]!r}, which is {kind}."
                ) from None
        refuse_kinds(self.name, self.signature.parameters, given.arguments)
        return tuple(given.arguments[n] for n in self.arguments), tuple(given.arguments[n] for n in self.static)

    def __deepcopy__(self, memo: Any) -> "Rule":
        return self  # there is one of each, by identity

    def call(self, fn: Callable[..., Any], dynamic: Sequence[Any], static: Sequence[Any]) -> Any:
        """Calls the reference, primal or forward with arguments as ``split`` gives them."""
        return fn(**dict(zip(self.arguments, dynamic)), **dict(zip(self.static, static)))


RULES: dict[str, Rule] = {}
"""Every rule by the name of its op, in the order of import."""


class Op(Protocol, Generic[P, R_co]):
    """An ordinary function that has a rule. ``backward`` returns one cotangent for each argument that is not static,
    in the order of the signature, ``None`` for integers, masks, keys and absent arguments."""

    __name__: str
    rule: Rule

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> "tuple[R_co, Saved]": ...

    def backward(self, saved: "Saved", dy: Any) -> tuple[Any, ...]: ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value that a forward keeps for its backward, such as a shape: static in a pytree, no bytes."""

    value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Record:
    """What a backward must know that is not an array. Static in a pytree: no leaves, no bytes."""

    rule: Rule
    static: tuple[Any, ...]
    kinds: tuple[type, ...]  # of the static values: 1 == 1.0 == True
    types: tuple[Any, ...]  # a pytree of jax.typeof for each argument, as (leaves, structure)
    ranks: tuple[int, ...]  # of the saved leaves
    outputs: tuple[Any, ...]  # the shapes of y, and its structure
    precision: str | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("structure", "record"))
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the forward keeps for the backward: a pytree, with the static arguments inside its structure.
    ``saved.named()`` is the rule's own record, with its names.

    A leaf that no wanted cotangent needs is kept as an array of no elements, with a leading axis of length 0 before
    its own. (Leaving it out would change the structure with the arguments that are differentiated. JAX keeps one
    structure for each traced call and reads a stale one when the call is differentiated in two ways.)
    """

    values: list[Any]
    structure: Any
    record: Record

    def named(self) -> Any:
        """The record that the rule's forward made, zeros where a leaf was not needed."""
        leaves = [
            jnp.zeros(v.shape[1:], v.dtype) if v.ndim == rank + 1 and v.shape[0] == 0 else v
            for v, rank in zip(map(jnp.asarray, self.values), self.record.ranks)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def rule(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    static: Sequence[str] = (),
    primal: Callable[..., Any] | None = None,
    exact: bool = True,
    samples: Sequence[Sample] = (),
    workloads: Sequence[Sample] = (),
    keeps: str = "",
    minimum: Callable[..., int] | None = None,
    recomputes: str = "",
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Registers the decorated function, whose body is the definition, with the backward written by hand.

    Args:
      forward: ``forward(<the same arguments>) -> (y, saved)``; ``saved`` is any pytree, best a NamedTuple.
      backward: ``backward(saved, dy, *, <static arguments it needs>) -> (d<argument>, …)``.
      static: names of the arguments that are hashable Python values; every other argument may be traced.
      primal: ``primal(<the same arguments>) -> y`` for calls that are not differentiated, where the forward computes what
        the compiler cannot drop; it must compute y as the forward does.
      exact: False for a rule that is meant to differ from the gradient of the definition.
      samples: inputs that the tests use. workloads: inputs that the benchmarks use.
      keeps: what is kept for the backward, in words.
      minimum: the bytes that any backward has to keep, arguments included, as a function of any of the arguments (arrays or
        ``jax.ShapeDtypeStruct``) and of the output ``y``, by name.
      recomputes: what the backward computes again by design, in words; benchmarks then compare with ``jax.checkpoint``.
    Raises:
      TypeError: at import, where the signatures of the functions do not fit each other.
    """

    def register(reference: Callable[P, R]) -> Op[P, R]:
        record = Rule(
            reference.__name__, reference, forward, backward, tuple(static), primal, exact, tuple(samples),
            tuple(workloads), keeps, minimum, recomputes,
        )  # fmt: skip
        _check_signatures(record)
        RULES[record.name] = record
        return cast(Op[P, R], record.op)

    return register


def _check_signatures(rule: Rule) -> None:
    """Refuses at import what would otherwise be a puzzling error, or a wrong gradient, at the first call."""
    who, parameters = f"rule {rule.name}", rule.signature.parameters
    if rule.name in RULES and inspect.getmodule(RULES[rule.name].reference) is not inspect.getmodule(rule.reference):
        raise TypeError(f"{who}: there is a rule of this name in {RULES[rule.name].reference.__module__}.")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind in variadic for p in parameters.values()):
        raise TypeError(f"{who}: *args and **kwargs cannot be bound by name; the signature is {rule.signature}.")
    if unknown := [n for n in rule.static if n not in parameters]:
        raise TypeError(f"{who}: static names {unknown}, which the signature {rule.signature} does not have.")
    for what, fn in (("forward", rule.forward), ("primal", rule.primal)):
        if fn is not None and set(inspect.signature(fn).parameters) != set(parameters):
            raise TypeError(
                f"{who}: its {what} takes {inspect.signature(fn)}; expected the arguments of the definition, {rule.signature}."
            )
    first = list(inspect.signature(rule.backward).parameters.values())
    extra = [p.name for p in first[2:] if p.name not in rule.static]
    if len(first) < 2 or extra or any(p.kind is p.KEYWORD_ONLY for p in first[:2]):
        raise TypeError(
            f"{who}: its backward takes {inspect.signature(rule.backward)}; expected (saved, dy) and then static arguments "
            f"out of {rule.static}."
        )


def _make_op(rule: Rule) -> Op[..., Any]:
    def check(dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> None:
        """The definition's checks of bad input, on types alone."""
        jax.eval_shape(lambda *d: rule.call(rule.reference, d, static), *dynamic)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        dynamic, static = rule.split(args, kwargs)
        mode = context.mode()
        other = mode.other(rule.name)
        if mode.references and other is None:
            return rule.call(rule.reference, dynamic, static)
        check(dynamic, static)
        if _complex(dynamic):  # the derivations are for real numbers
            return rule.call(rule.reference, dynamic, static)
        if mode.recorder is not None:
            return mode.recorder(other or rule, dynamic, static)
        return _differentiable(other or rule, *static)(*dynamic)

    def halves_forward(*args: Any, **kwargs: Any) -> tuple[Any, Saved]:
        dynamic, static = rule.split(args, kwargs)
        check(dynamic, static)
        if _complex(dynamic):
            raise TypeError(f"{rule.name}: its backward by hand is for real numbers, got complex ones; jax.grad takes them.")
        return _run_forward(rule, dynamic, static, wanted=None)

    def jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
        # jit, as on the functions of jax.nn: it makes eager calls cheap, and the user context is part of its key.
        fn.__name__ = fn.__qualname__ = rule.name
        fn.__signature__ = rule.signature  # type: ignore[attr-defined]
        compiled = jax.jit(fn, static_argnames=rule.static)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except (TypeError, ValueError) as error:
                rule.split(args, kwargs)  # says it in a sentence where the arguments are not what the signature says
                sentence = named(rule.name, error, rule.signature.bind(*args, **kwargs).arguments)
                if sentence is error:
                    raise
                raise sentence from error

        return call

    op = functools.wraps(rule.reference)(jitted(dispatch))
    forward = jitted(halves_forward)
    jitted_backward = jax.jit(_run_backward)

    def backward(saved: Saved, dy: Any) -> tuple[Any, ...]:
        if not isinstance(saved, Saved) or saved.record.rule is not rule:
            what = f"{saved.record.rule.name}.forward" if isinstance(saved, Saved) else f"a {type(saved).__name__}"
            raise TypeError(f"{rule.name}.backward: expected what {rule.name}.forward saved, got {what}.")
        shapes, tree = saved.record.outputs
        try:
            given = tree.flatten_up_to(dy)
        except (TypeError, ValueError):
            got = jax.tree.structure(dy)
            raise TypeError(f"{rule.name}.backward: dy is {got}, expected the structure of y, {tree}.") from None
        if bad := [(jnp.shape(d), s) for d, s in zip(given, shapes) if d is not None and jnp.shape(d) != s]:
            raise ValueError(f"{rule.name}.backward: dy has shape {bad[0][0]}, y had {bad[0][1]}.")
        return jitted_backward(saved, dy)

    forward.__name__ = forward.__qualname__ = f"{rule.name}.forward"
    backward.__name__ = backward.__qualname__ = f"{rule.name}.backward"
    forward.__doc__ = f"The forward half of {rule.name}: (y, saved), from the arguments of {rule.name}."
    forward.__signature__ = rule.signature  # type: ignore[attr-defined]
    backward.__doc__ = (
        f"The backward half of {rule.name}: cotangents of ({', '.join(rule.arguments)}) from what the forward saved and "
        "the cotangent of y; None for integers, masks, keys and absent arguments."
    )
    for name, value in (("rule", rule), ("forward", forward), ("backward", backward)):
        setattr(op, name, value)
    return cast(Op[..., Any], op)


@functools.lru_cache(maxsize=4096, typed=True)
def _differentiable(rule: Rule, *static: Any) -> Callable[..., Any]:
    """The custom_vjp of an op with these static arguments; ``typed`` because 1 == 1.0 == True."""

    # Not the reference: under vmap JAX takes the batch dimensions of the outputs from one of primal and forward for both,
    # and gives transposed outputs, without an error, where they differ.
    def primal(*dynamic: Any) -> Any:
        return rule.call(rule.primal, dynamic, static) if rule.primal else _halves(rule, dynamic, static)[0]

    def forward(*dynamic: Any) -> tuple[Any, Saved]:
        # With symbolic_zeros every leaf arrives with a flag that tells whether it is differentiated.
        values = jax.tree.map(lambda leaf: leaf.value, dynamic)
        wanted = tuple(any(leaf.perturbed for leaf in jax.tree.leaves(argument)) for argument in dynamic)
        return _run_forward(rule, values, static, wanted)

    def backward(saved: Saved, dy: Any) -> tuple[Any, ...]:
        return _run_backward(saved, jax.tree.map(_instantiate, dy, is_leaf=lambda d: isinstance(d, SymbolicZero)))

    primal.__name__ = primal.__qualname__ = rule.name
    differentiable = jax.custom_vjp(primal)
    differentiable.defvjp(forward, backward, symbolic_zeros=True)
    return differentiable


def _instantiate(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    kind: Any = cotangent.aval
    return np.zeros(kind.shape, kind.dtype) if kind.dtype == jax.dtypes.float0 else jnp.zeros(kind.shape, kind.dtype)


def _halves(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> tuple[Any, Any]:
    result = rule.call(rule.forward, dynamic, static)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{rule.name}: its forward must return (y, saved), got {type(result).__name__}.")
    return result


def _run_forward(
    rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...], wanted: tuple[bool, ...] | None
) -> tuple[Any, Saved]:
    y, saved = _halves(rule, dynamic, static)
    values, structure = jax.tree.flatten(saved)
    values = [jnp.asarray(v) for v in values]
    types = tuple((tuple(map(jax.typeof, leaves)), tree) for leaves, tree in map(jax.tree.flatten, dynamic))
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    ys, out_tree = jax.tree.flatten(y)
    outputs = (tuple(map(jnp.shape, ys)), out_tree)
    record = Record(rule, static, tuple(map(type, static)), types, tuple(v.ndim for v in values), outputs, precision)
    if wanted is not None and not all(w or not any(map(_inexact, leaves)) for w, (leaves, _) in zip(wanted, types)):
        needed = _needed(Saved(values, structure, record), y, wanted)
        # Keys have no zeros, and few bytes.
        keep = [n or jnp.issubdtype(v.dtype, jax.dtypes.extended) for n, v in zip(needed, values)]
        values = [v if k else jnp.zeros((0, *v.shape), v.dtype) for k, v in zip(keep, values)]
    return y, Saved(values, structure, record)


def _needed(saved: Saved, y: Any, wanted: Sequence[bool]) -> list[bool]:
    """For each saved leaf, whether a wanted cotangent depends on it: a sweep back over the backward's program."""

    def cotangents(values: list[Any], dy: Any) -> list[Any]:
        return [d for d, w in zip(_run_backward(dataclasses.replace(saved, values=values), dy), wanted) if w]

    # y stands in for dy: it has its type.
    jaxpr = jax.make_jaxpr(cotangents)(saved.values, y).jaxpr
    return _read(jaxpr, [True] * len(jaxpr.outvars))[: len(saved.values)]


def _read(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of a program its wanted outputs depend on."""
    live = {v for v, w in zip(jaxpr.outvars, wanted) if w and isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs):
            continue
        reads = [True] * len(equation.invars)
        if equation.primitive.name == "optimization_barrier":
            reads = outputs  # which it passes on, one to one
        elif equation.primitive.name == "cond":
            branches = [_read(branch.jaxpr, outputs) for branch in equation.params["branches"]]
            reads = [True, *map(any, zip(*branches))]
        live.update(v for v, r in zip(equation.invars, reads) if r and isinstance(v, Var))
    return [v in live for v in jaxpr.invars]


def _run_backward(saved: Saved, dy: Any) -> tuple[Any, ...]:
    record, rule = saved.record, saved.record.rule
    options = {n: v for n, v in zip(rule.static, record.static) if n in rule.backward_static}
    leaves = [t for types, _ in record.types for t in types]

    def cotangents(values: list[Any], dy: Any) -> list[Any]:
        with jax.default_matmul_precision(record.precision):
            result = rule.backward(dataclasses.replace(saved, values=values).named(), dy, **options)
        return _checked(rule, record.types, result)

    dy = _shared_out(dy, saved.values)
    meshes = [t.sharding.mesh for t in leaves if _inexact(t) and t.sharding.mesh.explicit_axes]
    if not meshes:
        flat = cotangents(saved.values, dy)
    else:
        # On a mesh with explicit axes every operation would have to tell the sharding of its output. Inside auto_axes
        # the compiler chooses, and each cotangent leaves with the sharding of its primal.
        def given(values: list[Any], dy: Any) -> list[Any]:
            pairs = zip(cotangents(values, dy), leaves)
            return [jnp.zeros(t.shape, t.dtype) if d is None else d for d, t in pairs if _inexact(t)]

        specs = [t.sharding.spec for t in leaves if _inexact(t)]
        with jax.sharding.use_abstract_mesh(meshes[0]):
            run: Any = jax.sharding.auto_axes(given, axes=meshes[0].explicit_axes, out_sharding=specs)
            found = iter(run(saved.values, dy))
        flat = [next(found) if _inexact(t) else None for t in leaves]
    remaining = iter([None if d is None else _match_manual_axes(d, t) for d, t in zip(flat, leaves)])
    result = [(tree, [next(remaining) for _ in types]) for types, tree in record.types]
    return tuple(None if all(d is None for d in own) else tree.unflatten(own) for tree, own in result)


def _complex(dynamic: Any) -> bool:
    return any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(dynamic) if hasattr(leaf, "dtype"))


def _inexact(array_type: Any) -> bool:
    return jnp.issubdtype(array_type.dtype, jnp.inexact)


def _checked(rule: Rule, types: Sequence[Any], result: Any) -> list[Any]:
    """The cotangents of a backward as a flat list, one for each leaf of the arguments, right in shape and dtype."""
    who = f"{rule.name}: its backward"
    if not isinstance(result, tuple) or len(result) != len(types):
        got = f"{len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise TypeError(f"{who} must return a tuple of {len(types)} cotangents, for {', '.join(rule.arguments)}; got {got}.")
    flat: list[Any] = []
    for name, (leaves, tree), cotangent in zip(rule.arguments, types, result):
        if cotangent is None or not leaves:  # an argument that was not given has no use for its cotangent
            flat += [None] * len(leaves)
            continue
        try:
            own = tree.flatten_up_to(cotangent)
        except (ValueError, TypeError) as error:
            raise TypeError(f"{who} returned a cotangent for {name} whose structure is not that of {name}: {error}") from None
        for primal, d in zip(leaves, own):
            if d is not None and not hasattr(d, "shape") and not isinstance(d, (int, float, complex)):
                raise TypeError(f"{who} returned a {type(d).__name__} for {name}, where an array or None is expected.")
            if d is not None and not _inexact(primal):
                raise TypeError(f"{who} returned a cotangent for {name}, which is {primal.str_short()}; expected None.")
            if d is not None and jnp.shape(d) != primal.shape:
                raise TypeError(f"{who} returned shape {jnp.shape(d)} for {name}, whose shape is {primal.shape}.")
            flat.append(None if d is None else jnp.asarray(d, primal.dtype))
    return flat


def _shared_out(dy: Any, values: list[Any]) -> Any:
    """Inside shard_map an output may be the same on all devices where others vary. Its cotangent is one for all; the
    backward, whose cotangents are summed over the devices, gets an equal share of it on each."""
    axes: set[Any] = set().union(*(jax.typeof(v).mat.varying for v in (*jax.tree.leaves(dy), *values)))

    def share(d: Any) -> Any:
        missing = tuple(sorted(axes - jax.typeof(d).mat.varying)) if jnp.issubdtype(d.dtype, jnp.inexact) else ()
        return jax.lax.pcast(d / jax.lax.axis_size(missing), missing, to="varying") if missing else d

    return jax.tree.map(share, dy) if axes else dy


def _match_manual_axes(cotangent: Any, primal: Any) -> Any:
    """Inside shard_map a cotangent must vary over the same mesh axes as its primal. A primal that is the same on all
    devices gets the sum of what each device sends back."""
    have, want = jax.typeof(cotangent).mat.varying, primal.mat.varying
    if surplus := tuple(sorted(have - want)):
        cotangent = jax.lax.psum(cotangent, surplus)
    if missing := tuple(sorted(want - have)):
        cotangent = jax.lax.pcast(cotangent, missing, to="varying")
    return cotangent
