"""What is measured: an op, the arguments of one call, which of them are differentiated, and the cotangent."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.context import without_rules
from fbackprop.rules import Rule
from fbackprop.samples import Sample

__all__ = ["Call", "Problem", "errors_of", "problem", "problem_of", "truth_of"]

Call = Callable[[dict[str, Any]], Any]
"""What computes an op: a function of all arguments by name, static ones included."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One call of an op, ready to be measured. ``moved`` are the arrays that are differentiated, ``rest`` the others, as
    leaves of the arguments; a program gets both as its inputs, so that the compiler knows no values."""

    rule: Rule
    text: str  # dtype, shapes and note
    static: Mapping[str, Any]  # also arguments that may be traced but are plain numbers in this call
    names: tuple[str, ...]  # of the arguments that are arrays, or trees of them
    structure: Any
    places: tuple[int, ...]  # of what is moved, among the leaves
    moved: tuple[jax.Array, ...]
    rest: tuple[Any, ...]  # with None in the places of what is moved
    dy: tuple[jax.Array, ...]  # a cotangent for each floating-point output
    minimum: int | None

    def arguments(self, moved: Sequence[Any], rest: Sequence[Any]) -> dict[str, Any]:
        """All arguments by name."""
        leaves = list(rest)
        for place, value in zip(self.places, moved):
            leaves[place] = value
        return {**dict(zip(self.names, self.structure.unflatten(leaves))), **self.static}

    def outputs(self, call: Call, moved: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
        """The floating-point outputs of a call."""
        return _floating(call(self.arguments(moved, rest)))

    def named(self) -> list[str]:
        """The argument that each array of ``moved`` belongs to."""
        parts = self.structure.unflatten(range(self.structure.num_leaves))
        names = [name for name, part in zip(self.names, parts) for _ in jax.tree.leaves(part)]
        return [names[i] for i in self.places]


def problem_of(rule: Rule, workload: Sample) -> Problem:
    """A workload of a rule. Where its note says that an argument is frozen ("kernel frozen"), that one is constant."""
    args, options = workload.make()
    return problem(rule, args, options, workload.note)


def problem(rule: Rule, args: Sequence[Any], options: Mapping[str, Any], note: str = "") -> Problem:
    """A call of an op. All floating-point arguments are differentiated but those that the note calls frozen. The cotangent
    of the first output is 1 where it is a scalar, else standard normals; further outputs are state, and get zeros."""
    dynamic, values = rule.split(tuple(args), dict(options))
    arrays = {n: jax.tree.map(_array, v) for n, v in zip(rule.arguments, dynamic) if not isinstance(v, (int, float, complex))}
    static = {n: v for n, v in zip((*rule.arguments, *rule.static), (*dynamic, *values)) if n not in arrays}
    frozen = set(re.findall(r"(\w+) frozen", note))
    if unknown := frozen - set(arrays):
        raise ValueError(f"{rule.name}: {min(unknown)} is frozen, says the note {note!r}; the arrays are {', '.join(arrays)}.")
    leaves, structure = jax.tree.flatten(tuple(arrays.values()))
    names = [name for name, value in arrays.items() for _ in jax.tree.leaves(value)]
    places = tuple(i for i, (n, v) in enumerate(zip(names, leaves)) if _is_floating(v) and n not in frozen)
    moved = tuple(leaves[i] for i in places)
    rest = tuple(None if i in places else v for i, v in enumerate(leaves))
    y = jax.eval_shape(lambda given: rule.op(**given, **static), arrays)
    dy = tuple(_cotangent(i, leaf) for i, leaf in enumerate(_floating(y)))
    text, minimum = _text(rule, arrays, static, note), rule.minimum_bytes(y, dynamic, values)
    return Problem(rule, text, static, tuple(arrays), structure, places, moved, rest, dy, minimum)


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _is_floating(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _floating(y: Any) -> tuple[Any, ...]:
    return tuple(leaf for leaf in jax.tree.leaves(y) if _is_floating(leaf))


def _cotangent(index: int, leaf: Any) -> jax.Array:
    if index > 0:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if leaf.shape == ():
        return jnp.ones((), leaf.dtype)
    return jax.random.normal(jax.random.key(9), leaf.shape, jnp.float32).astype(leaf.dtype)


def _text(rule: Rule, arrays: Mapping[str, Any], static: Mapping[str, Any], note: str) -> str:
    leaves = [(name, leaf) for name, value in arrays.items() for leaf in jax.tree.leaves(value)]
    dtypes = dict.fromkeys(str(leaf.dtype) for _, leaf in leaves if _is_floating(leaf))
    shapes = [f"{n} {list(v.shape)}" for n, v in leaves if not jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]
    text = f"{' and '.join(dtypes)} {', '.join(shapes)}".strip()
    parameters = rule.signature.parameters
    other = [f"{n}={v!r}" for n, v in static.items() if not callable(v) and not _is_default(parameters[n], v)]
    return text + (f"; {note}" if note else f"; {', '.join(other)}" if other else "")


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    return type(value) is type(parameter.default) and value == parameter.default


def truth_of(given: Problem) -> tuple[jax.Array, ...] | None:
    """The gradient in float64: what ``jax.grad`` makes of the definition at the same inputs and cotangent, on the CPU. None
    for a rule that is meant to differ from the gradient."""
    if not given.rule.exact:
        return None
    definition = without_rules(lambda arguments: given.rule.reference(**arguments))

    def gradient(dy: Any, moved: Any, rest: Any) -> Any:
        return jax.vjp(lambda *m: given.outputs(definition, m, rest), *moved)[1](dy)

    with _double():
        return jax.jit(gradient)(*jax.tree.map(_doubled, (given.dy, given.moved, given.rest)))


def errors_of(gradients: Sequence[Any], truth: Sequence[jax.Array] | None) -> float | None:
    """The worst error: of each array the largest |gradient − truth| over the largest |truth|; the greatest of these."""
    if truth is None:
        return None
    with _double():
        cpu = jax.devices("cpu")[0]
        pairs = [(jax.device_put(got, cpu), want) for got, want in zip(gradients, truth, strict=True) if want.size]
        return float(np.max([_error(got, want) for got, want in pairs], initial=0.0))


@jax.jit
def _error(got: jax.Array, want: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.abs(want))
    return jnp.max(jnp.abs(got.astype(want.dtype) - want)) / jnp.where(scale > 0, scale, 1)


@contextlib.contextmanager
def _double() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _doubled(value: Any) -> Any:
    """The array on the CPU, in float64 if it is floating-point."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.device_put(value, jax.devices("cpu")[0])
    value = np.asarray(value)
    return jnp.asarray(value.astype(np.float64) if jnp.issubdtype(value.dtype, jnp.inexact) else value)
