"""The record of a backward pass: every op call with its values, and where each value comes from.

An ``Explanation`` holds each array once, in ``values``; everything else (names, places, the program) is static, so it is a
pytree that leaves and enters jitted functions. ``steps`` reads the record op call by op call.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.explaining.program import Program, is_float
from fbackprop.explaining.steps import Kept as Kept
from fbackprop.explaining.steps import Leaf as Leaf
from fbackprop.explaining.steps import Source as Source
from fbackprop.explaining.steps import Step as Step
from fbackprop.ops._arithmetic import nbytes

if TYPE_CHECKING:
    from fbackprop.explaining.chains import Chain
    from fbackprop.explaining.jacobians import Jacobians

__all__ = ["Explanation", "Kept", "Leaf", "Source", "Step", "Structure"]


@dataclasses.dataclass(frozen=True, eq=False)
class KeptAt:
    """A ``Kept`` with the place of its array."""

    name: str
    type: jax.ShapeDtypeStruct
    value: int
    origin: str
    source: Source | None
    again: bool


@dataclasses.dataclass(frozen=True, eq=False)
class StepAt:
    """A ``Step`` with the places of its arrays among the values."""

    node: int  # of the program
    inputs: tuple[tuple[str, int], ...]
    sources: tuple[tuple[str, Source], ...]
    outputs: tuple[tuple[str, int], ...]
    kept: tuple[KeptAt, ...]
    upstream: tuple[tuple[str, int | None], ...]
    cotangents: tuple[tuple[str, int | None], ...]
    layer: str
    reached: bool
    saved: Any  # the structure of what the forward saved
    saved_values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """All of an explanation that is no array."""

    name: str
    program: Program
    leaves: tuple[Leaf, ...]
    arguments: Any  # the structure of (args, kwargs)
    others: tuple[Any, ...]  # each leaf of the arguments that is no array, None in the place of one
    array_places: tuple[int, ...]  # of the arrays among the leaves
    constants: tuple[int, ...]
    steps: tuple[StepAt, ...]
    outputs: tuple[int, ...]
    sources: tuple[Source, ...]  # of the outputs
    output_tree: Any
    cotangent: tuple[int | None, ...]  # of each output
    has_aux: bool


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "differences"), meta_fields=("structure",))
@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """A backward pass, op call by op call, with the values of the real forward and the real backward. A pytree.

    ``gradients`` are held against ``jax.grad`` of the function with its rules: ``differences`` has the largest absolute
    difference for each differentiated array among the arguments, by its label.
    """

    values: tuple[Any, ...] = dataclasses.field(repr=False)
    differences: dict[str, Any] = dataclasses.field(repr=False)
    structure: Structure = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """Of the function."""
        return self.structure.name

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every op call, in the order of the forward pass."""
        return tuple(self._step(i) for i in range(len(self.structure.steps)))

    def _step(self, index: int) -> Step:
        at, value = self.structure.steps[index], self.values
        call = self.structure.program.nodes[at.node].call
        assert call is not None

        def named(places: Any) -> dict[str, Any]:
            return {name: None if place is None else value[place] for name, place in places}

        kept = tuple(
            Kept(k.name, value[k.value], k.type.shape, k.type.dtype, nbytes(k.type), k.origin, k.source, k.again)
            for k in at.kept
        )
        return Step(
            index, call.rule, tuple(call.options.items()), named(at.inputs), at.sources, named(at.outputs), kept,
            named(at.upstream), named(at.cotangents), at.layer, at.reached,
        )  # fmt: skip

    def _outputs(self) -> Any:
        return jax.tree.unflatten(self.structure.output_tree, [self.values[i] for i in self.structure.outputs])

    @property
    def output(self) -> Any:
        """What the function returned."""
        return self._outputs()[0] if self.structure.has_aux else self._outputs()

    @property
    def aux(self) -> Any:
        """What the function returned besides, where ``has_aux`` said so."""
        return self._outputs()[1] if self.structure.has_aux else None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where each array that the function returned comes from."""
        return self.structure.sources

    @property
    def cotangent(self) -> tuple[Any, ...]:
        """The cotangent of each array that the function returned, 1 for a loss; None for integers and what is besides."""
        return tuple(None if i is None else self.values[i] for i in self.structure.cotangent)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The arrays among the arguments, by label."""
        return self.structure.leaves

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call: (args, kwargs)."""
        return self._unflattened([leaf.value for leaf in self.leaves], self.structure.others)

    @property
    def _gradients(self) -> Any:
        return self._unflattened([leaf.gradient for leaf in self.leaves], (None,) * len(self.structure.others))

    def _unflattened(self, places: list[int | None], others: tuple[Any, ...]) -> Any:
        """The arguments' tree with these arrays in the place of its arrays."""
        every, arrays = list(others), iter(places)
        for i in self.structure.array_places:
            place = next(arrays)
            every[i] = None if place is None else self.values[place]
        return jax.tree.unflatten(self.structure.arguments, every)

    @property
    def gradients(self) -> tuple[Any, ...]:
        """The gradient for each argument, of its structure, with None in the place of integers, masks and keys."""
        return self._gradients[0]

    @property
    def keyword_gradients(self) -> dict[str, Any]:
        """The same for arguments that were given by name."""
        return self._gradients[1]

    def leaf(self, label: str) -> Leaf:
        """The array among the arguments that is called so."""
        for leaf in self.leaves:
            if leaf.label == label:
                return leaf
        import difflib

        labels = [leaf.label for leaf in self.leaves]
        near = difflib.get_close_matches(label, labels, 3) or labels[:8]
        raise ValueError(f"explain: no argument is called {label!r}; there is {', '.join(near)}.")

    @property
    def agrees(self) -> bool:
        """Whether the gradients are those of ``jax.grad`` of the function with its rules, but for rounding."""
        gradients = {g.label: np.asarray(self.values[g.gradient], np.float64) for g in self.leaves if g.gradient is not None}
        sizes = {label: float(np.abs(d).max(initial=0)) for label, d in gradients.items()}
        most = max(sizes.values(), default=0.0)
        # The narrowest dtype that anything is computed in decides what rounding is.
        eps = max(float(jnp.finfo(t.dtype).eps) for t in self.structure.program.types if is_float(t))
        return all(float(d) <= eps * (64 * sizes[label] + 4 * most) for label, d in self.differences.items())

    @property
    def kept_bytes(self) -> int:
        """Bytes that the op calls keep for the backward, each array once."""
        return sum(step.kept_bytes for step in self.steps)

    def chain(
        self, place: str, *, argument: int | str | None = None, paths: int = 4096, largest: int = 16, entries: int = 2**22
    ) -> "Chain":
        """The factors of the chain rule for one element of an argument, and the sum over all paths.

        Args:
          place: an element by the label of its array and its index: ``"layers/0/kernel[0, 0]"`` in the first argument,
            ``"x[1]"`` in the argument x; ``"bias"`` alone for a scalar.
          argument: the place or the name of the argument that ``place`` is a path in; by default labels are as in ``leaves``.
          paths: where there are more, the sum is shown in vector form and only some of the largest paths are listed.
          largest: how many paths to look for then.
          entries: local derivatives that may be computed to count the paths; where there are more, they are not counted.
        Returns:
          A ``Chain``.
        Raises:
          ValueError: where there is no such element, or where it is not of a floating-point dtype.
        """
        from fbackprop.explaining.paths import chain

        return chain(self, place, argument, paths, largest, entries)

    @functools.cached_property
    def _jacobians(self) -> "Jacobians":
        from fbackprop.explaining.jacobians import Jacobians

        return Jacobians(self)

    def text(self, lang: str = "en", *, chains: Sequence[str] = (), width: int = 100) -> str:
        """All of it as text; ``print(explanation)`` shows the same.

        Args:
          lang: "en" or "ko".
          chains: places such as "layers/0/kernel[0, 0]", whose chains of factors are shown too.
          width: of a line.
        Raises:
          ValueError: where there is no such language or place. TypeError: where the values are traced.
        """
        from fbackprop.explaining.rendering import text

        return text(self, lang, chains, width)

    def latex(self, lang: str = "en", *, chains: Sequence[str] = (), file: str | os.PathLike[str] | None = None) -> str:
        """All of it as a LaTeX document, for xelatex or pdflatex (Korean: kotex). Written to ``file`` too, where one is named.

        Arguments and errors as for ``text``.
        """
        from fbackprop.explaining.rendering import latex

        return latex(self, lang, chains, file)

    def html(self, lang: str = "en", *, chains: Sequence[str] = (), file: str | os.PathLike[str] | None = None) -> str:
        """All of it as a page that needs no network, with the picture. Written to ``file`` too, where one is named.

        Arguments and errors as for ``text``.
        """
        from fbackprop.explaining.rendering import html

        return html(self, lang, chains, file)

    def graph(self, file: str | os.PathLike[str], lang: str = "en") -> pathlib.Path:
        """Draws the flow of values and gradients into a file, .svg or .png, and returns its path.

        Raises:
          ValueError: where the file's name ends otherwise, or where there is no such language.
        """
        from fbackprop.explaining.graph import write_graph

        return write_graph(self, file, lang)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Explanation of {self.name}: {len(self.structure.steps)} steps, {len(self.leaves)} arrays among the arguments"
