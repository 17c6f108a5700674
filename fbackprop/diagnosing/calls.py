"""Which ops a loss calls, in order, and from which parameters: found by tracing it once, without computing anything.

The loss runs under a recorder (context.py) with ``jax.disable_jit()``: inner jitted functions are inlined and each step of
a ``scan`` is a call of its own, so the layers of a stacked model are told apart. In the trace each call is one equation
with a name. A walk over the equations follows every parameter through what only changes its view (casts, reshapes, slices
of a stack) to the calls that read it.

A *layer* begins with a call that reads parameters, and holds the calls after it that read none (activation, pooling,
dropout). It bears the path of the largest of these parameters: ``layers/0``; ``blocks/qkv[2]`` in a stack. What a loss op
and the ops after it do belongs to no layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbackprop import context
from fbackprop.diagnosing.variants import AS_IT_IS, Variant, run_rule
from fbackprop.rules import Rule

__all__ = ["KERNELS", "Call", "Input", "Layer", "Layout", "Parameter", "discover", "is_float", "under"]

MOST_CALLS = 4096
KERNELS = ("kernel", "recurrent_kernel", "up", "gate", "down")
"""What the ops call the matrices that an initialiser with fans is for."""

_NAME = "fbackprop_call_"
_VIEWS = ("convert_element_type", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "copy", "copy_p",
          "optimization_barrier", "slice", "dynamic_slice", "stop_gradient")  # fmt: skip
_LOSSES = tuple(
    f"fbackprop.ops.{name}"
    for name in ("losses", "vocabulary", "classification", "contrastive", "ctc", "divergences", "margins", "regression",
                 "segmentation")
)  # fmt: skip

Place = tuple[int, int | None]
"""A parameter, as its number among the leaves, and its place in a stack (None: all of it)."""


class Input(NamedTuple):
    """An argument of a call that holds floating-point numbers."""

    name: str
    place: Place | None  # the parameter it is, or None


class Call(NamedTuple):
    """One call of an op."""

    op: str
    layer: int | None  # its number among the layers
    inputs: tuple[Input, ...]
    dtype: str
    units: int  # entries of the output's last axis
    elements: int  # of the output
    is_loss: bool


class Layer(NamedTuple):
    """A layer, in the order of the calls. Its kernel, where it has one, and how many inputs and outputs that has."""

    name: str
    places: tuple[Place, ...]  # of its parameters
    kernel: Place | None
    fans: tuple[int, int] | None
    is_loss: bool


class Parameter(NamedTuple):
    """An array of the parameters."""

    name: str
    shape: tuple[int, ...]
    stacked: bool  # along the first axis lie the parameters of so many layers


@dataclasses.dataclass(frozen=True)
class Layout:
    """The calls, layers and parameters of a loss. Hashable: it is the static part of a ``Look``."""

    calls: tuple[Call, ...]
    layers: tuple[Layer, ...]
    parameters: tuple[Parameter, ...]

    @functools.cached_property
    def inputs(self) -> tuple[tuple[int, Input], ...]:
        """Every input with the number of its call."""
        return tuple((i, given) for i, call in enumerate(self.calls) for given in call.inputs)

    def of_layer(self, layer: int) -> list[int]:
        """The numbers of the calls of a layer."""
        return [i for i, call in enumerate(self.calls) if call.layer == layer]

    def name(self, place: Place) -> str:
        """A parameter's path, with its place in the stack."""
        number, index = place
        return self.parameters[number].name + ("" if index is None else f"[{index}]")


def discover(loss: Callable[..., Any], params: Any, args: tuple[Any, ...], variant: Variant = AS_IT_IS) -> Layout:
    """The layout of ``loss(params, *args)``, from shapes alone.

    Raises:
      ValueError: where it calls more ops than can be looked at.
    """
    found: list[_Found] = []

    def recorder(rule: Rule, dynamic: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
        leaves, tree = jax.tree.flatten(dynamic)
        if len(found) >= MOST_CALLS:
            raise ValueError(
                f"health: the loss calls more than {MOST_CALLS} ops, each step of a scan counted; give a shorter one."
            )

        def call(*leaves: Any) -> Any:
            return run_rule(rule, tree.unflatten(leaves), static)

        call.__name__ = call.__qualname__ = f"{_NAME}{len(found)}"
        found.append(_Found(rule, _argument_names(rule, dynamic), [], []))
        here = found[-1]
        with jax.disable_jit(False):
            y = jax.jit(call)(*leaves)
        here.outputs.extend(leaf for leaf in jax.tree.leaves(y) if is_float(leaf))
        here.inexact.extend(map(is_float, leaves))
        return y

    program = jax.make_jaxpr(under(recorder, loss, variant))(params, *args).jaxpr
    count = len(jax.tree.leaves(params))
    places: dict[int, list[Place | None]] = {}
    _follow(program, [(i, None) if i < count else None for i in range(len(program.invars))], places)
    return _layout(params, found, places)


def under(recorder: Any, loss: Callable[..., Any], variant: Variant = AS_IT_IS) -> Callable[..., Any]:
    """The loss with each call of an op, as the variant has it, done by ``recorder(rule, dynamic, static) -> y``."""

    def run(*args: Any) -> Any:
        def record(rule: Rule, dynamic: Any, static: Any) -> Any:
            return variant(rule, dynamic, static, recorder)

        with jax.disable_jit(), context.switched(recorder=record):
            return loss(*args)

    return run


class _Found(NamedTuple):
    rule: Rule
    names: tuple[str, ...]  # of the argument that each leaf belongs to
    outputs: list[Any]
    inexact: list[bool]


def _argument_names(rule: Rule, dynamic: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(name for name, value in zip(rule.arguments, dynamic) for _ in jax.tree.leaves(value))


def is_float(leaf: Any) -> bool:
    """Whether it is an array of floating-point numbers (a Python number is an option)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


# Which parameter each value is.


def _follow(program: Any, given: list[Place | None], places: dict[int, list[Place | None]]) -> None:
    known = {var: place for var, place in zip(program.invars, given) if place is not None}

    def place(var: Any) -> Place | None:
        return None if hasattr(var, "val") else known.get(var)

    for equation in program.eqns:
        inputs = [place(var) for var in equation.invars]
        name = str(equation.params.get("name", ""))
        if name.startswith(_NAME):
            places[int(name.removeprefix(_NAME))] = inputs
            continue
        for inner, own in _inner(equation, inputs):
            _follow(inner, own, places)
        if equation.primitive.name in _VIEWS:
            known.update((out, p) for out, p in zip(equation.outvars, _view(equation, inputs)) if p is not None)


def _inner(equation: Any, inputs: list[Place | None]) -> Iterator[tuple[Any, list[Place | None]]]:
    """The programs inside an equation, each with the places of its inputs."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            missing = len(inner.invars) - len(inputs)
            yield inner, inputs[-missing:] if missing < 0 else [*inputs, *[None] * missing]


def _view(equation: Any, inputs: list[Place | None]) -> list[Place | None]:
    if equation.primitive.name not in ("slice", "dynamic_slice"):
        return inputs
    first, before = inputs[0], equation.invars[0].aval.shape
    after = equation.outvars[0].aval.shape
    if first is None or after == before:
        return inputs[:1]
    if equation.primitive.name == "slice":
        start: Any = equation.params["start_indices"][0]
    else:
        start = getattr(equation.invars[1], "val", None)
    if first[1] is None and start is not None and after[0] == 1 and after[1:] == before[1:]:
        return [(first[0], int(start))]
    return [None]


# Layers.


def _layout(params: Any, found: list[_Found], places: dict[int, list[Place | None]]) -> Layout:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") or "params" for path, _ in leaves]
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    used = [p for own in places.values() for p in own if p is not None]
    stacked = [any(number == i and index is not None for number, index in used) for i in range(len(leaves))]

    def all_of(place: Place) -> list[Place]:
        """Where a stack is used layer by layer, all of it means each of them."""
        number, index = place
        return [(number, i) for i in range(shapes[number][0])] if stacked[number] and index is None else [place]

    def size(place: Place) -> int:
        return math.prod(shapes[place[0]][1 if stacked[place[0]] else 0 :])

    def named(place: Place) -> str:
        parent = paths[place[0]].rpartition("/")[0] or paths[place[0]]
        return parent + ("" if place[1] is None else f"[{place[1]}]")

    layers: list[Layer] = []
    calls: list[Call] = []
    taken: set[Place] = set()
    current: int | None = None
    for i, call in enumerate(found):
        own = places.get(i, [None] * len(call.names))
        inputs = tuple(Input(n, p) for n, p, inexact in zip(call.names, own, call.inexact) if inexact)
        read = [p for p in own if p is not None]
        is_loss = call.rule.reference.__module__ in _LOSSES
        if read:
            largest = max(read, key=size)
            mine = tuple(dict.fromkeys(q for p in read for q in all_of(p) if q not in taken))
            taken.update(mine)
            kernels = [given.place for given in inputs if given.place is not None and given.name in KERNELS]
            kernel = max(kernels, key=size, default=None)
            fans = None if kernel is None else _fans(shapes[kernel[0]][1 if stacked[kernel[0]] else 0 :])
            name = _another(named(largest), layers)
            layers.append(Layer(name, mine, kernel, fans, is_loss))
            current = len(layers) - 1
        elif is_loss:
            current = None
        shape = jnp.shape(call.outputs[0]) if call.outputs else ()
        dtype = str(call.outputs[0].dtype) if call.outputs else ""
        units = shape[-1] if shape else 1
        calls.append(Call(call.rule.name, current, inputs, dtype, units, math.prod(shape), is_loss))
        if is_loss:
            current = None
    others: dict[str, list[Place]] = {}
    for i in range(len(leaves)):
        for place in all_of((i, None)):
            if place not in taken:
                others.setdefault(named(place), []).append(place)
    layers += [Layer(_another(name, layers), tuple(own), None, None, False) for name, own in others.items()]
    parameters = tuple(Parameter(path, shape, s) for path, shape, s in zip(paths, shapes, stacked))
    return Layout(tuple(calls), tuple(layers), parameters)


def _fans(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How many inputs each output of a kernel [..., in, out] sums, and how many outputs each input goes to."""
    field = math.prod(shape[:-2])
    return (field * shape[-2], field * shape[-1]) if len(shape) >= 2 else None


def _another(name: str, layers: list[Layer]) -> str:
    """The name, with a number where a layer of this name was called before."""
    before = sum(layer.name == name or layer.name.startswith(f"{name} (") for layer in layers)
    return f"{name} ({before + 1})" if before else name
