"""The record of the chain rule for one weight: the factors of paths, their sum, and what passes each op call."""

import dataclasses
import math

import numpy as np

__all__ = ["Chain", "Factor", "Path", "Vector"]


@dataclasses.dataclass(frozen=True)
class Factor:
    """One local derivative: of an element of an output with respect to an element of an input.

    ``kind``: "loss", "activation", "weight" (a linear map, towards its data), "input" (a linear map, towards its weights),
    "bias", "norm", "pool", "mask" (dropout), "op" (another op), "jax" (JAX's own operation), "cotangent" (what came in for an
    output that is not a loss). ``step`` is None for what is not an op call.
    """

    kind: str
    op: str
    step: int | None
    output: str
    at: tuple[int, ...]  # the element of the output
    input: str
    into: tuple[int, ...]  # the element of the input
    value: float


@dataclasses.dataclass(frozen=True)
class Path:
    """Factors from the loss back to the weight, and their product."""

    factors: tuple[Factor, ...]
    product: float


@dataclasses.dataclass(frozen=True)
class Vector:
    """What passes an op call, over all paths: for each element of its output upstream × (derivative of the element with respect
    to the weight). ``total`` is the sum of these, which is the gradient wherever all paths cross."""

    step: int
    op: str
    output: str
    parts: np.ndarray
    total: float
    upstream_norm: float
    local_norm: float  # of the derivatives of the output's elements with respect to the weight


@dataclasses.dataclass(frozen=True)
class Chain:
    """The gradient of one weight as a sum over paths.

    Where ``complete``, ``paths`` are all paths, by size, and ``total`` is their sum. Else they are some of the largest, as a
    search found them, and ``total`` is the sum over all paths in vector form.
    """

    place: str
    gradient: float  # as the recorded backward pass gave it
    paths: tuple[Path, ...]
    count: int | None  # of all paths; None where they were too many to count
    complete: bool
    total: float
    vectors: tuple[Vector, ...]
    eps: float  # of the dtype of the weight

    @property
    def difference(self) -> float:
        """By how much the sum differs from the recorded gradient."""
        return abs(self.total - self.gradient)

    @property
    def listed(self) -> float:
        """The sum of the paths that are listed."""
        return math.fsum(path.product for path in self.paths)

    @property
    def agrees(self) -> bool:
        """Whether the sum is the gradient but for rounding: 4,096 units in the last place of the largest term."""
        terms = [abs(path.product) for path in self.paths]
        terms += [float(np.abs(v.parts).max(initial=0)) for v in self.vectors]
        return self.difference <= 4096 * self.eps * max([abs(self.gradient), *terms])

    def __str__(self) -> str:
        def text(value: float) -> str:
            return f"{value:.6g}"

        if self.complete:
            head = f"{len(self.paths)} path{'s' if len(self.paths) != 1 else ''}"
        else:
            number = f"{self.count:,}" if self.count is not None else "too many to count"
            head = f"paths: {number}; the {len(self.paths)} below are the largest that a search found, not all"
        lines = [f"gradient of {self.place}: {text(self.gradient)}   ({head})"]
        for path in self.paths:
            factors = " · ".join(f"{text(f.value)} ({f.kind if f.kind != 'jax' else f.op})" for f in path.factors)
            lines.append(f"  {factors} = {text(path.product)}")
        lines.append(
            f"  {'sum' if self.complete else 'sum over all paths'} {self.total:.12g}, differs by {self.difference:.1e}"
        )
        return "\n".join(lines)
