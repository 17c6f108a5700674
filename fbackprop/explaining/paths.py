"""The chain rule for one weight, in numbers: the factors of every path from the loss back to it, and their sum.

    ∂L/∂w = Σ over paths of Π over the nodes of a path of (local derivative)

An element of an argument reaches the loss through elements of values in between. A path takes one of them at each node; its
factors are the local derivatives on the way, from the loss back. How many paths there are is counted before they are walked.
Where they are too many, the sum is taken without them, node by node:

    tⱼ = ∂(value j)/∂w  going forward         Σ over elements of (upstream · t) is ∂L/∂w at every node that all paths cross

and a search that keeps the most promising elements at each value finds some of the largest paths.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.explaining.chains import Chain, Factor, Path, Vector
from fbackprop.explaining.jacobians import Jacobians
from fbackprop.explaining.program import Node, is_float
from fbackprop.explaining.record import Explanation, Leaf
from fbackprop.rules import Rule

__all__ = ["chain"]

MOST_NUMBERS = 2**22
"""Of local derivatives that a search looks at in one go."""


def chain(explanation: Explanation, place: str, argument: int | str | None, paths: int, largest: int, entries: int) -> Chain:
    """See ``Explanation.chain``."""
    wide = any(t.dtype in (jnp.float64, jnp.int64) for t in explanation.structure.program.types)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        return _chain(explanation, place, argument, paths, largest, entries)


def _chain(explanation: Explanation, place: str, argument: int | str | None, paths: int, largest: int, entries: int) -> Chain:
    leaf, index = _element(explanation, place, argument)
    graph = explanation._jacobians
    number = graph.program.arguments[explanation.leaves.index(leaf)]
    element = int(np.ravel_multi_index(index, leaf.type.shape)) if index else 0
    assert leaf.gradient is not None
    gradient = float(np.asarray(explanation.values[leaf.gradient], np.float64)[index])
    walk = _Walk(explanation, graph, number, element, entries)
    count = walk.count()
    if count is not None and count <= paths:
        found = sorted(walk.paths(), key=lambda path: -abs(path.product))
        total = math.fsum(path.product for path in found)
    else:
        found = walk.search(largest)
        total = walk.total()
    label = leaf.label + (f"[{', '.join(map(str, index))}]" if index else "")
    eps = float(np.finfo(np.float64).eps) if leaf.type.dtype == np.float64 else _eps(explanation)
    complete = count is not None and count <= paths
    return Chain(label, gradient, tuple(found), count, complete, total, tuple(walk.vectors()), eps)


def _eps(explanation: Explanation) -> float:
    return max(float(jnp.finfo(t.dtype).eps) for t in explanation.structure.program.types if is_float(t))


def _element(explanation: Explanation, place: str, argument: int | str | None) -> tuple[Leaf, tuple[int, ...]]:
    """The array and the index that ``place`` names."""
    match = re.fullmatch(r"(.*?)(?:\[([-\d,\s]*)\])?", place)
    label, inner = (match[1], match[2]) if match else (place, None)
    if argument is None:
        leaf = explanation.leaf(label)
    else:
        own = [leaf for leaf in explanation.leaves if argument in (leaf.argument, leaf.label.split("/")[0])]
        named = [leaf for leaf in own if label in (leaf.path, leaf.label)]
        if not named:
            known = ", ".join(leaf.path or leaf.label for leaf in own[:8]) or "no array"
            raise ValueError(f"chain: argument {argument!r} has nothing at {label!r}; it has {known}.")
        leaf = named[0]
    if leaf.gradient is None:
        raise ValueError(f"chain: {leaf.label} is {leaf.type.dtype}, which has no gradient.")
    index = tuple(int(part) for part in (inner or "").split(",") if part.strip())
    shape = leaf.type.shape
    if len(index) != len(shape) or any(not -n <= i < n for i, n in zip(index, shape)):
        raise ValueError(f"chain: {place!r} names no element of {leaf.label}, whose shape is {shape}; give {_example(leaf)!r}.")
    return leaf, tuple(i % n for i, n in zip(index, shape))


def _example(leaf: Leaf) -> str:
    return leaf.label + (f"[{', '.join('0' for _ in leaf.type.shape)}]" if leaf.type.shape else "")


class _Walk:
    """All that lies between one element of an argument and the explained output."""

    def __init__(self, explanation: Explanation, graph: Jacobians, number: int, element: int, entries: int):
        self.explanation, self.graph, self.start = explanation, graph, (number, element)
        program = graph.program
        self.between = program.depending([number]) & graph.live
        self.nodes = [
            i for i, node in enumerate(program.nodes)
            if not self.between.isdisjoint(node.inputs) and not self.between.isdisjoint(node.outputs)
        ]  # fmt: skip
        self.maker = {v: (i, o) for i in self.nodes for o, v in enumerate(program.nodes[i].outputs)}
        self.ends = [
            (v, explanation.values[d])
            for v, d in zip(program.outputs, explanation.structure.cotangent)
            if d is not None and v in self.between
        ]
        self.small = sum(map(graph.entries, self.nodes)) <= entries
        self._tangents: dict[int, Any] | None = None

    def _inputs(self, node: Node) -> list[int]:
        return [i for i, v in enumerate(node.inputs) if v in self.between]

    def _ahead(self, structural: bool) -> dict[int, np.ndarray]:
        """Going forward from the element: the number of paths to each element of each value, or its derivative."""
        number, element = self.start
        found = {number: np.zeros(self.graph.size(number))}
        found[number][element] = 1
        for i in self.nodes:
            node, (values, support) = self.graph.program.nodes[i], self.graph.full(i)
            entries = support if structural else values
            for o in self.graph.places(node)[0]:
                parts = [entries[o, j] @ found[node.inputs[j]] for j in self._inputs(node) if (o, j) in entries]
                found[node.outputs[o]] = np.sum(parts, 0) if parts else np.zeros(self.graph.size(node.outputs[o]))
        return found

    def count(self) -> int | None:
        """How many paths there are, or None where the local derivatives are too many to look at."""
        if not self.small:
            return None
        self.reached = self._ahead(structural=True)
        return int(sum(self.reached[v].sum() for v, _ in self.ends))

    def paths(self) -> Iterator[Path]:
        """Every path, from the output back."""
        for value, cotangent in self.ends:
            for element in np.flatnonzero(self.reached[value]):
                first = self._first(value, int(element), cotangent)
                yield from self._back(value, int(element), first)

    def _first(self, value: int, element: int, cotangent: Any) -> tuple[Factor, ...]:
        given = float(np.asarray(cotangent, np.float64).reshape(-1)[element])
        shape = self.graph.program.types[value].shape
        if not shape and given == 1:
            return ()
        at = _index(element, shape)
        return (Factor("cotangent", "cotangent", None, "y", at, "y", at, given),)

    def _back(self, value: int, element: int, factors: tuple[Factor, ...]) -> Iterator[Path]:
        if (value, element) == self.start:
            yield Path(_without_moves(factors), math.prod(f.value for f in factors))
        if value not in self.maker:
            return
        number, o = self.maker[value]
        node, (values, support) = self.graph.program.nodes[number], self.graph.full(number)
        for j in self._inputs(node):
            if (o, j) not in values:
                continue
            reached = self.reached[node.inputs[j]]
            for inner in np.flatnonzero(support[o, j][element] & (reached > 0)):
                factor = self._factor(number, o, element, j, int(inner), float(values[o, j][element, inner]))
                yield from self._back(node.inputs[j], int(inner), (*factors, factor))

    def _factor(self, number: int, o: int, element: int, j: int, inner: int, value: float) -> Factor:
        node, types = self.graph.program.nodes[number], self.graph.program.types
        at, into = _index(element, types[node.outputs[o]].shape), _index(inner, types[node.inputs[j]].shape)
        if node.call is None:
            return Factor("jax", node.name, None, f"{o}", at, f"{j}", into, value)
        name = node.call.inputs[j]
        kind = _kind(node.call.rule, name)
        return Factor(kind, node.name, self.graph.steps[number], node.call.outputs[o], at, name, into, value)

    # Where paths are too many.

    def _forward(self) -> dict[int, Any]:
        """The derivative of each value with respect to the element."""
        if self._tangents is None:
            program, (number, element) = self.graph.program, self.start
            if self.small:
                self._tangents = self._ahead(structural=False)
                return self._tangents
            one = np.zeros(self.graph.size(number))
            one[element] = 1
            kind = program.types[number]
            found: dict[int, Any] = {number: np.asarray(one, kind.dtype).reshape(kind.shape)}
            for i in self.nodes:
                node = program.nodes[i]
                dots = {j: found[node.inputs[j]] for j in self._inputs(node) if node.inputs[j] in found}
                upstream: list[Any] = []
                if node.call is not None:
                    at = self.explanation.structure.steps[self.graph.steps[i]]
                    upstream = [None if place is None else self.explanation.values[place] for _, place in at.upstream]
                found.update((node.outputs[o], d) for o, d in self.graph.pushed(i, dots, upstream).items())
            self._tangents = {v: np.asarray(d, np.float64).reshape(-1) for v, d in found.items()}
        return self._tangents

    def total(self) -> float:
        """The sum over all paths: cotangent times derivative, over the elements of the output."""
        ahead = self._forward()
        return math.fsum(x for v, d in self.ends for x in np.asarray(d, np.float64).reshape(-1) * ahead[v])

    def vectors(self) -> Iterator[Vector]:
        """What passes each op call, from the loss back."""
        ahead, explanation = self._forward(), self.explanation
        for number in reversed(self.nodes):
            node = self.graph.program.nodes[number]
            if node.call is None:
                continue
            step = self.graph.steps[number]
            for (name, place), v in zip(explanation.structure.steps[step].upstream, node.outputs):
                if place is None or v not in ahead or v not in self.graph.live:
                    continue
                upstream = np.asarray(explanation.values[place], np.float64).reshape(-1)
                parts = (upstream * ahead[v]).reshape(self.graph.program.types[v].shape)
                norms = float(np.linalg.norm(upstream)), float(np.linalg.norm(ahead[v]))
                yield Vector(step, node.name, name, parts, math.fsum(parts.reshape(-1)), *norms)

    def search(self, largest: int) -> list[Path]:
        """Some of the largest paths: at each value the elements are kept through which most of the sum seems to pass."""
        ahead, beam = self._forward(), max(4 * largest, 32)
        waiting: dict[int, list[tuple[float, float, int, tuple[Factor, ...]]]] = {}

        def add(value: int, element: int, product: float, factors: tuple[Factor, ...]) -> None:
            promise = abs(product * ahead[value][element])
            if promise > 0:
                waiting.setdefault(value, []).append((promise, product, element, factors))

        for value, cotangent in self.ends:
            flat = np.asarray(cotangent, np.float64).reshape(-1)
            best = np.argsort(-np.abs(flat * ahead[value]))[:beam]
            for element in map(int, best):
                add(value, element, float(flat[element]), self._first(value, element, cotangent))
        for number in reversed(self.nodes):
            node = self.graph.program.nodes[number]
            for o, value in enumerate(node.outputs):
                widest = max(self.graph.size(node.inputs[j]) for j in self._inputs(node))
                few = max(4, min(beam, MOST_NUMBERS // widest))
                kept = sorted(waiting.pop(value, []), key=lambda entry: -entry[0])[:few]
                if not kept:
                    continue
                rows = self.graph.rows(number, o, np.array([element for _, _, element, _ in kept]))
                for j in self._inputs(node):
                    if j not in rows:
                        continue
                    inner_value = node.inputs[j]
                    for row, (_, product, element, factors) in zip(rows[j], kept):
                        promise = np.abs(row * ahead[inner_value])
                        for inner in map(int, np.argsort(-promise)[:beam]):
                            if promise[inner] > 0:
                                factor = self._factor(number, o, element, j, inner, float(row[inner]))
                                add(inner_value, inner, product * float(row[inner]), (*factors, factor))
        number, element = self.start
        found = [Path(_without_moves(f), p) for _, p, e, f in waiting.get(number, []) if e == element]
        return sorted(found, key=lambda path: -abs(path.product))[:largest]


def _index(element: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(element, shape)) if shape else ()


def _without_moves(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """Without JAX operations that hand an element on as it is (reshape, sum, add): their factor is 1."""
    return tuple(f for f in factors if f.kind != "jax" or f.value != 1)


_LOSSES = {
    "losses", "regression", "classification", "margins", "divergences", "ctc", "contrastive", "segmentation", "vocabulary",
}  # fmt: skip
_ACTIVATIONS = {"activations", "piecewise", "straight_through", "probabilities", "gated", "gating"}
_LINEAR = {"linear", "convolution", "transposed", "adapters", "contraction"}
_OTHERS = {
    "normalization": "norm", "batch_normalization": "norm", "group_normalization": "norm", "standardizing": "norm",
    "pooling": "pool", "adaptive": "pool", "stochastic": "mask",
}  # fmt: skip
_WEIGHTS = {"kernel", "embedding", "a", "b", "lhs"}


def _kind(rule: Rule, name: str) -> str:
    """What a local derivative of an op with respect to an input is called."""
    module = rule.reference.__module__.rsplit(".", 1)[-1]
    if name.split("/")[0].endswith("bias"):
        return "bias"
    if module in _LINEAR:
        return "input" if name in _WEIGHTS else "weight"
    if module in _LOSSES:
        return "loss"
    elementwise = getattr(rule.forward, "__module__", "") == "fbackprop.one_line"
    return "activation" if module in _ACTIVATIONS or elementwise else _OTHERS.get(module, "op")
