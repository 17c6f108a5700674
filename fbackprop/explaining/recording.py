"""``explain``: runs a function's program once forward and once backward, and writes down what happens.

Forward, each op runs the forward of its rule; backward, each op runs the backward of its rule on what that forward saved and on
the cotangents that reached it, and JAX's own operations between the ops hand theirs on. Nothing is computed a second time in
another way: a rule that is wrong is recorded wrong.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.explaining.calling import Arguments, labels_of, name_of
from fbackprop.explaining.marking import flat_cotangents
from fbackprop.explaining.program import Call, Node, Program, is_float, traced
from fbackprop.explaining.record import Explanation, KeptAt, Leaf, StepAt, Structure
from fbackprop.explaining.sources import layer_of, sources_of
from fbackprop.rules import Rule, Saved, _run_backward, _run_forward

__all__ = ["explain"]


def explain(fn: Callable[..., Any], *args: Any, cotangent: Any = None, has_aux: bool = False, **kwargs: Any) -> Explanation:
    """Records the backward pass of a function that is built of ops: values, saved arrays and cotangents of every op call.

    Args:
      fn: a function of arrays and pytrees of arrays that calls ops of this library; a loss, or with ``cotangent`` any.
      args, kwargs: what to call it with. All floating-point arrays among them are differentiated.
      cotangent: of the output, of its structure (None or zeros for integers); by default the output has to be a scalar, and
        it is 1.
      has_aux: whether ``fn`` returns (output, what is not differentiated).
    Returns:
      An ``Explanation``. Under ``jax.jit`` it is computed and returned like any pytree.
    Raises:
      ValueError: where the output is not a scalar and there is no cotangent, where no op is called, or where an op is called
        where a call cannot be recorded (``vmap``, ``while``, ``cond``, somebody's ``custom_vjp``); it says what to do.
      TypeError: where ``fn`` is not a function.
    """
    if not callable(fn):
        raise TypeError(f"explain: expected a function, got {type(fn).__name__}.")
    name = name_of(fn)
    leaves, tree = jax.tree.flatten((args, kwargs))
    labels = labels_of(fn, args, kwargs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, float) or hasattr(leaf, "dtype")]
    arrays = [_array(name, leaves[i], labels[i][0]) for i in places]
    outputs_of: list[Any] = []

    def flat(*given: Any) -> list[Any]:
        every = list(leaves)  # what is no array (True, 3, "mean") stays as it was given
        for i, value in zip(places, given):
            every[i] = value
        own_args, own_kwargs = jax.tree.unflatten(tree, every)
        out, out_tree = jax.tree.flatten(fn(*own_args, **own_kwargs))
        outputs_of[:] = [out_tree]
        return [jnp.asarray(o) for o in out]

    program, constants = traced(flat, arrays)
    if not any(node.call for node in program.nodes):
        raise ValueError(f"explain: {name} called no op of fbackprop, so there is no backward pass of ours to record.")
    cotangents = _cotangents(name, program, outputs_of[0], cotangent, has_aux)
    record = _Writing(program, arrays, constants)
    record.forward()
    gradients = record.backward(cotangents)
    differences = _differences(flat, arrays, cotangents, gradients)
    others = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    given = Arguments(tree, others, tuple(places), tuple(labels[i] for i in places))
    return record.explanation(name, given, outputs_of[0], cotangents, gradients, differences, has_aux)


def _array(name: str, leaf: Any, label: str) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"explain: {label} of {name} is a ShapeDtypeStruct; a record has values, so give an array.")
    return jnp.asarray(leaf)


def _cotangents(name: str, program: Program, tree: Any, given: Any, has_aux: bool) -> list[Any]:
    """A cotangent for each output, None for integers and what is besides."""
    types = [program.types[v] for v in program.outputs]
    differentiated = len(types)
    if has_aux:
        children = tree.children()
        if len(children) != 2:
            raise ValueError(f"explain: with has_aux, {name} must return a pair (output, aux), got {tree}.")
        differentiated, tree = children[0].num_leaves, children[0]
    own, rest = types[:differentiated], [None] * (len(types) - differentiated)
    text = ", ".join(t.str_short() for t in own)
    if given is None:
        if len(own) != 1 or own[0].shape or not is_float(own[0]):
            raise ValueError(
                f"explain: {name} returns {text}, not a floating-point scalar; give cotangent=, an array for each output, or "
                "explain a function that returns a loss."
            )
        return [jnp.ones((), own[0].dtype), *rest]
    flat, structure = jax.tree.flatten(given, is_leaf=lambda leaf: leaf is None)
    if structure.num_leaves != tree.num_leaves or [jnp.shape(d) for d, t in zip(flat, own) if d is not None] != [
        t.shape for d, t in zip(flat, own) if d is not None
    ]:
        got = ", ".join("None" if d is None else str(jnp.shape(d)) for d in flat)
        raise ValueError(f"explain: {name} returns {text}, but the cotangent has {got}; expected the same shapes.")
    return [jnp.asarray(d, t.dtype) if is_float(t) and d is not None else None for d, t in zip(flat, own)] + rest


def _differences(flat: Any, arrays: Sequence[Any], cotangents: Sequence[Any], gradients: Sequence[Any]) -> list[Any]:
    """By how much each gradient differs from what ``jax.grad`` gives by the rules as they run outside of a record."""
    moved = [i for i, a in enumerate(arrays) if is_float(a)]
    wanted = [i for i, d in enumerate(cotangents) if d is not None]

    @jax.jit
    def compared(arrays: list[Any], dys: list[Any], gradients: list[Any]) -> list[Any]:
        def of(*floats: Any) -> list[Any]:
            given = list(arrays)
            for i, value in zip(moved, floats):
                given[i] = value
            results = flat(*given)
            return [results[i] for i in wanted]

        expected = jax.vjp(of, *(arrays[i] for i in moved))[1](dys)
        return [jnp.max(jnp.abs(d - e), initial=0) for d, e in zip(gradients, expected)]

    return compared(list(arrays), [cotangents[i] for i in wanted], [gradients[i] for i in moved])


# One op call, compiled once for all calls that are alike, also where nothing else is compiled.


@functools.partial(jax.jit, static_argnames=("rule", "static", "kinds", "tree", "wanted", "precision"))
def _op_forward(leaves: Any, *, rule: Rule, static: Any, kinds: Any, tree: Any, wanted: Any, precision: Any) -> Any:
    with jax.default_matmul_precision(precision):
        return _run_forward(rule, jax.tree.unflatten(tree, leaves), static, wanted)


_op_backward = jax.jit(_run_backward)


class _Writing:
    """The values of a program's run, and what becomes the record."""

    def __init__(self, program: Program, arrays: Sequence[Any], constants: Sequence[Any]):
        self.program = program
        self.known: dict[int, Any] = dict(program.literals)
        self.known.update(zip((*program.arguments, *program.constants), (*arrays, *constants)))
        self.saved: dict[int, Saved] = {}
        self.upstream: dict[int, list[Any]] = {}  # by the number of the node
        self.cotangents: dict[int, list[Any]] = {}

    def forward(self) -> None:
        moving = self.program.moving
        for number, node in enumerate(self.program.nodes):
            given = [self.known[v] for v in node.inputs]
            if node.call is None:
                results = node.run(*given)  # type: ignore[misc]
            else:
                call = node.call
                marks = iter(v in moving for v in node.inputs)
                wanted = tuple(any([next(marks) for _ in range(part.num_leaves)]) for part in call.tree.children())
                y, self.saved[number] = _op_forward(
                    given, rule=call.rule, static=call.static, kinds=tuple(map(type, call.static)), tree=call.tree,
                    wanted=wanted, precision=call.precision,
                )  # fmt: skip
                results = jax.tree.leaves(y)
            self.known.update(zip(node.outputs, results))

    def backward(self, cotangents: Sequence[Any]) -> list[Any]:
        """Hands cotangents back through the program; returns those of the arguments, None for integers."""
        moving, arriving = self.program.moving, {}

        def add(value: int, d: Any) -> None:
            if d is not None and value in moving:
                arriving[value] = arriving[value] + d if value in arriving else d

        for value, d in zip(self.program.outputs, cotangents):
            add(value, d)
        for number in reversed(range(len(self.program.nodes))):
            node = self.program.nodes[number]
            if not any(v in arriving for v in node.outputs):
                continue
            dys = [arriving.pop(v, None) for v in node.outputs]
            dys = [_zeros(self.program.types[v]) if d is None else d for v, d in zip(node.outputs, dys)]
            if node.call is None:
                floats = [d if is_float(self.program.types[v]) else None for v, d in zip(node.outputs, dys)]
                found = node.pull([self.known[v] for v in node.inputs], floats)
            else:
                found = self._op_cotangents(number, node, node.call, dys)
            for value, d in zip(node.inputs, found):
                add(value, d)
        return [
            arriving.get(v, _zeros(self.program.types[v])) if is_float(self.program.types[v]) else None
            for v in self.program.arguments
        ]

    def _op_cotangents(self, number: int, node: Node, call: Call, dys: list[Any]) -> list[Any]:
        saved = self.saved[number]
        found = _op_backward(saved, jax.tree.unflatten(call.out_tree, dys))
        flat = flat_cotangents(found, call.tree)
        # What no floating-point argument reaches was not kept for, and its cotangent is nobody's.
        flat = [d if v in self.program.moving else None for v, d in zip(node.inputs, flat)]
        self.upstream[number], self.cotangents[number] = dys, flat
        return flat

    # The record.

    def explanation(
        self, name: str, args: Arguments, output_tree: Any, cotangents: Any, gradients: Any, differences: Any, has_aux: bool
    ) -> Explanation:
        program, table = self.program, _Table()
        leaves = tuple(
            Leaf(label, argument, path, jax.ShapeDtypeStruct(a.shape, a.dtype), table.place(a), table.optional(d))
            for (label, argument, path), a, d in zip(args.labels, (self.known[v] for v in program.arguments), gradients)
        )
        sources = sources_of(program, [leaf.label for leaf in leaves])
        steps, seen = [], set()
        for number, node in enumerate(program.nodes):
            if node.call is not None:
                steps.append(self._step(number, node, node.call, sources, leaves, table, seen))
        constants = tuple(table.place(self.known[v]) for v in program.constants)
        structure = Structure(
            name, program, leaves, args.tree, args.others, args.places, constants, tuple(steps),
            tuple(table.place(self.known[v]) for v in program.outputs), tuple(sources[v] for v in program.outputs), output_tree,
            tuple(map(table.optional, cotangents)), has_aux,
        )  # fmt: skip
        labels = [leaf.label for leaf in leaves if leaf.gradient is not None]
        return Explanation(tuple(table.arrays), dict(zip(labels, differences)), structure)

    def _step(self, number: int, node: Node, call: Call, sources: Any, leaves: Any, table: "_Table", seen: set[int]) -> StepAt:
        known, saved = self.known, self.saved[number]
        values, kept = [], []
        parameters = {leaf.label for leaf in leaves if leaf.argument == 0}
        for (label, alias, _), value, rank in zip(call.kept, saved.values, saved.record.ranks):
            number_of = None if alias is None else (node.inputs if alias[0] == "input" else node.outputs)[alias[1]]
            if value.ndim == rank + 1 and value.shape[0] == 0:  # not needed, so not kept
                values.append(table.place(value))
                continue
            place = table.place(value if number_of is None else known[number_of])
            values.append(place)
            source = None if number_of is None else sources[number_of]
            origin = (
                "own" if source is None else "computed" if not source.is_direct else "output" if source.steps else "argument"
            )
            if origin == "argument" and source is not None and source.leaves[0] in parameters:
                origin = "parameter"
            kept.append(KeptAt(label, jax.ShapeDtypeStruct(value.shape, value.dtype), place, origin, source, place in seen))
            seen.add(place)
        none: list[Any] = [None] * len(node.outputs)
        dys = [d if is_float(self.program.types[v]) else None for v, d in zip(node.outputs, self.upstream.get(number, none))]
        found = self.cotangents.get(number, [None] * len(node.inputs))
        inputs = tuple((n, sources[v]) for n, v in zip(call.inputs, node.inputs))
        return StepAt(
            number,
            tuple((n, table.place(known[v])) for n, v in zip(call.inputs, node.inputs)),
            inputs,
            tuple((n, table.place(known[v])) for n, v in zip(call.outputs, node.outputs)),
            tuple(kept),
            tuple((n, table.optional(d)) for n, d in zip(call.outputs, dys)),
            tuple((n, table.optional(d)) for n, d in zip(call.inputs, found)),
            layer_of([source for _, source in inputs], parameters),
            number in self.upstream,
            jax.tree.structure(saved),
            tuple(values),
        )  # fmt: skip


class _Table:
    """Each array once."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self._places: dict[int, int] = {}

    def place(self, array: Any) -> int:
        if id(array) not in self._places:
            self._places[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return self._places[id(array)]

    def optional(self, array: Any) -> int | None:
        return None if array is None else self.place(array)


def _zeros(kind: Any) -> Any:
    return jnp.zeros(kind.shape, kind.dtype) if is_float(kind) else np.zeros(kind.shape, jax.dtypes.float0)
