"""One op call of a record, and where its arrays come from."""

import dataclasses
import functools
import inspect
from typing import Any

import jax

from fbackprop.rules import Rule

__all__ = ["Kept", "Leaf", "Source", "Step"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an array comes from: arguments and op calls that it depends on, and the JAX operations in between.

    ``through`` is empty where it is the very argument, or the very output of a step. Where it is a constant, ``leaves`` and
    ``steps`` are empty too.
    """

    leaves: tuple[str, ...] = ()  # labels of arguments: "layers/0/kernel", "x"
    steps: tuple[tuple[int, str], ...] = ()  # (index of the step, name of its output)
    through: tuple[str, ...] = ()  # names of JAX operations: "reshape", "add", "[2]" for an entry along the first axis

    @property
    def is_direct(self) -> bool:
        """Whether it is one argument or output itself, or an entry of it."""
        return len(self.leaves) + len(self.steps) == 1 and all(name.startswith("[") for name in self.through)

    @property
    def text(self) -> str:
        """Such as "layers/0/kernel", "step 3", "step 3 by reshape", "step 1 and x by add"."""
        whence = [*(f"step {i}" if name == "y" else f"{name} of step {i}" for i, name in self.steps), *self.leaves]
        if not whence:
            return "a constant"
        entries = "".join(name for name in self.through if name.startswith("["))
        others = [name for name in self.through if not name.startswith("[")]
        if len(whence) == 1:
            whence[0] += entries
        return " and ".join(whence) + (f" by {', '.join(others)}" if others else "")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array among the arguments. ``label`` is its name in sources and in ``chain``: the path alone for the first
    argument, "x" or "batch/x" with the name of the argument for another."""

    label: str
    argument: int | str  # its place, or its name where it was given by name
    path: str
    type: jax.ShapeDtypeStruct
    value: int  # its place among the values of the explanation
    gradient: int | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value",),
    meta_fields=("name", "shape", "dtype", "bytes", "origin", "source", "again"),
)
@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that an op call keeps for its backward.

    ``origin`` tells what it is: "parameter" (of the first argument), "argument" (another one), "output" (of an op call, its own
    or one before), "computed" (an input that other JAX operations made), or "own" (made for the backward alone).
    ``again`` tells that a step before keeps the same array: its bytes count once.
    """

    name: str
    value: jax.Array
    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    origin: str
    source: Source | None
    again: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "outputs", "kept", "upstream", "cotangents"),
    meta_fields=("index", "rule", "options", "sources", "layer", "reached"),
)
@dataclasses.dataclass(frozen=True)
class Step:
    """One op call, forward and backward. Arrays by name: "x", "kernel"; "carry/0" inside of an argument that is a tree; the
    output "y", or "y/0", "y/1", … where there are several.

    ``upstream`` are the cotangents of the outputs as the real backward received them, ``cotangents`` what it returned for the
    inputs; None for integers, masks and keys, and for inputs that no floating-point argument reaches. ``reached`` tells whether
    the explained output depends on this call at all; where it does not, no backward ran.
    """

    index: int
    rule: Rule
    options: tuple[tuple[str, Any], ...]
    inputs: dict[str, jax.Array]
    sources: tuple[tuple[str, Source], ...]
    outputs: dict[str, jax.Array]
    kept: tuple[Kept, ...]
    upstream: dict[str, Any]
    cotangents: dict[str, Any]
    layer: str  # the common path of the parameters that go in: "layers/0", "blocks[2]", or ""
    reached: bool

    @property
    def op(self) -> str:
        return self.rule.name

    @property
    def source(self) -> dict[str, Source]:
        """Where each input comes from, by its name."""
        return dict(self.sources)

    @property
    def summary(self) -> str:
        """What the op is, in a sentence."""
        return (inspect.getdoc(self.rule.reference) or "").split("\n")[0]

    @property
    def formula(self) -> str:
        """The derivation: the docstring of the op's module."""
        return self.rule.formula

    @property
    def kept_bytes(self) -> int:
        """Bytes that this call adds to what is kept."""
        return sum(k.bytes for k in self.kept if not k.again)
