"""Local derivatives of a recorded program, node by node, in float64.

An op's come from its own backward, on what its forward saved in the recorded call: a cotangent that is 1 in one element of the
output and 0 elsewhere gives one row, and the transpose of the backward, which is linear in its cotangent, one column. Those of
JAX's operations between the ops come from ``jax.vjp`` and ``jax.jvp``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fbackprop.explaining.marking import flat_cotangents
from fbackprop.explaining.program import Node, is_float
from fbackprop.explaining.record import Explanation
from fbackprop.rules import Saved, _run_backward

__all__ = ["Jacobians", "Local"]

Local = dict[tuple[int, int], np.ndarray]
"""Of a node: for places (output, input) the entries [elements of the output, elements of the input]."""

_DRAWS = (lambda rng, shape: rng.uniform(0.5, 1.5, shape), lambda rng, shape: rng.normal(size=shape))


class Jacobians:
    """The recorded program with the values of all its nodes."""

    def __init__(self, explanation: Explanation):
        structure = explanation.structure
        self.program = structure.program
        self.steps = {at.node: index for index, at in enumerate(structure.steps)}
        self.saved: dict[int, Saved] = {}
        self.values: dict[int, Any] = dict(self.program.literals)
        known = [*(leaf.value for leaf in structure.leaves), *structure.constants]
        for number, place in zip((*self.program.arguments, *self.program.constants), known):
            self.values[number] = explanation.values[place]
        if any(isinstance(v, Tracer) for v in explanation.values):
            raise ValueError(
                "chain: the explanation is traced; return it from the jitted function and ask for the chain outside."
            )
        for number, node in enumerate(self.program.nodes):
            if node.call is None:
                results = node.run(*(self.values[v] for v in node.inputs))  # type: ignore[misc]
            else:
                at = structure.steps[self.steps[number]]
                results = [explanation.values[place] for _, place in at.outputs]
                self.saved[number] = jax.tree.unflatten(at.saved, [explanation.values[p] for p in at.saved_values])
            self.values.update(zip(node.outputs, results))
        self._full: dict[int, tuple[Local, Local]] = {}
        ends = [v for v, d in zip(self.program.outputs, structure.cotangent) if d is not None]
        self.live = _reaching(self.program.nodes, ends)

    def size(self, value: int) -> int:
        return int(np.prod(self.program.types[value].shape, dtype=np.int64))

    def places(self, node: Node) -> tuple[list[int], list[int]]:
        """The outputs that count towards the explained output, and the inputs that are differentiated."""
        outputs = [i for i, v in enumerate(node.outputs) if v in self.live and is_float(self.program.types[v])]
        return outputs, [i for i, v in enumerate(node.inputs) if v in self.program.moving]

    def entries(self, number: int) -> int:
        """How many entries the local derivatives of a node have."""
        node = self.program.nodes[number]
        outputs, inputs = self.places(node)
        return sum(self.size(node.outputs[o]) for o in outputs) * sum(self.size(node.inputs[i]) for i in inputs)

    def full(self, number: int) -> tuple[Local, Local]:
        """All local derivatives of a node, and where they can differ from zero: at these numbers or at others."""
        if number not in self._full:
            node = self.program.nodes[number]
            values: Local = {}
            support: Local = {}
            for o in self.places(node)[0]:
                rows = self.rows(number, o, np.arange(self.size(node.outputs[o])))
                others = self._elsewhere(number, o)
                for i, entries in rows.items():
                    values[o, i] = entries
                    found = entries != 0
                    for other in others:
                        found = found | (np.isfinite(other[i]) & (other[i] != 0))
                    if _is_diagonal(found) and node.inputs[i] != node.outputs[o]:
                        found = np.eye(len(found), dtype=bool)  # a function of single elements, though here some slopes are 0
                    support[o, i] = found
            self._full[number] = values, support
        return self._full[number]

    def _elsewhere(self, number: int, output: int) -> list[dict[int, np.ndarray]]:
        """The rows of an op with other numbers in place of the floating-point ones that it saved."""
        if number not in self.saved:
            return []
        node, rng, found = self.program.nodes[number], np.random.default_rng(0), []
        for draw in _DRAWS:
            saved = jax.tree.map(
                lambda v, d=draw: np.asarray(d(rng, v.shape), v.dtype) if is_float(v) else v, self.saved[number]
            )
            found.append(self._rows_of(node, saved, output, np.arange(self.size(node.outputs[output]))))
        return found

    def rows(self, number: int, output: int, elements: np.ndarray) -> dict[int, np.ndarray]:
        """For some elements of an output their derivatives with respect to each input, [elements, size of the input]."""
        node = self.program.nodes[number]
        if node.call is not None:
            return self._rows_of(node, self.saved[number], output, elements)
        types = [self.program.types[v] for v in node.outputs]
        given = [self.values[v] for v in node.inputs]

        def pulled(one: Any) -> list[Any]:
            cotangents = [None if not is_float(t) else jnp.zeros(t.shape, t.dtype) for t in types]
            cotangents[output] = one
            return [d for d in node.pull(given, cotangents) if d is not None]

        found = jax.vmap(pulled)(_one_hot(elements, types[output]))
        moved = [i for i, v in enumerate(node.inputs) if is_float(self.program.types[v])]
        return self._flat(node, dict(zip(moved, found)), len(elements))

    def _rows_of(self, node: Node, saved: Saved, output: int, elements: np.ndarray) -> dict[int, np.ndarray]:
        call = node.call
        assert call is not None
        kinds = tuple((t.shape, t.dtype) for t in call.types)
        found = _op_rows(saved, _one_hot(elements, call.types[output]), kinds=kinds, tree=call.out_tree, output=output)
        return self._flat(node, dict(enumerate(flat_cotangents(found, call.tree))), len(elements))

    def _flat(self, node: Node, found: dict[int, Any], rows: int) -> dict[int, np.ndarray]:
        inputs = [i for i in self.places(node)[1] if found.get(i) is not None]
        return {i: np.asarray(found[i], np.float64).reshape(rows, -1) for i in inputs}

    def pushed(self, number: int, tangents: dict[int, Any], upstream: Sequence[Any]) -> dict[int, Any]:
        """The tangents of the outputs, by place, from those of some inputs: the transpose of the node's backward."""
        node = self.program.nodes[number]
        outputs = self.places(node)[0]
        if node.call is None:
            given = [self.values[v] for v in node.inputs]
            moved, of = node.of_floats(given, outputs)
            dots = [tangents.get(i, jnp.zeros_like(given[i])) for i in moved]
            return dict(zip(outputs, jax.jvp(of, [given[i] for i in moved], dots)[1]))
        call = node.call
        kinds = tuple((t.shape, t.dtype) for t in call.types)
        dys = [upstream[o] for o in outputs]
        found = _op_transposed(
            self.saved[number], dys, [tangents[i] for i in sorted(tangents)], kinds=kinds, tree=call.out_tree,
            given=call.tree, outputs=tuple(outputs), inputs=tuple(sorted(tangents)),
        )  # fmt: skip
        return dict(zip(outputs, found))


def _reaching(nodes: Sequence[Node], ends: Sequence[int]) -> set[int]:
    """The values that these depend on."""
    live = set(ends)
    for node in reversed(nodes):
        if not live.isdisjoint(node.outputs):
            live.update(node.inputs)
    return live


def _is_diagonal(found: np.ndarray) -> bool:
    return found.shape[0] == found.shape[1] > 1 and not (found & ~np.eye(len(found), dtype=bool)).any()


def _one_hot(elements: np.ndarray, kind: Any) -> np.ndarray:
    size = int(np.prod(kind.shape, dtype=np.int64))
    return (elements[:, None] == np.arange(size)[None, :]).astype(kind.dtype).reshape(-1, *kind.shape)


def _zero(shape: Any, dtype: Any) -> Any:
    return jnp.zeros(shape, dtype) if jnp.issubdtype(dtype, jnp.inexact) else np.zeros(shape, jax.dtypes.float0)


@functools.partial(jax.jit, static_argnames=("kinds", "tree", "output"))
def _op_rows(saved: Saved, ones: Any, *, kinds: Any, tree: Any, output: int) -> Any:
    def backward(one: Any) -> Any:
        dys = [_zero(*kind) for kind in kinds]
        dys[output] = one
        return _run_backward(saved, jax.tree.unflatten(tree, dys))

    return jax.vmap(backward)(ones)


@functools.partial(jax.jit, static_argnames=("kinds", "tree", "given", "outputs", "inputs"))
def _op_transposed(saved: Saved, dys: Any, dots: Any, *, kinds: Any, tree: Any, given: Any, outputs: Any, inputs: Any) -> Any:
    def backward(dys: list[Any]) -> list[Any]:
        every = [_zero(*kind) for kind in kinds]
        for o, d in zip(outputs, dys):
            every[o] = d
        found = flat_cotangents(_run_backward(saved, jax.tree.unflatten(tree, every)), given)
        return [found[i] for i in inputs]

    return jax.vjp(backward, dys)[1](dots)[0]
