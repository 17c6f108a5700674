"""Inputs as data: what a rule is tested and measured with, described and not yet made.

``sample(normal(4, 8), labels(4, classes=8), axis=-1)`` is a frozen record. ``make(key, dtype)`` turns it
into arrays: floating-point arrays take the dtype asked for, integers, masks and keys keep theirs.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = ["Sample", "Spec", "arrays", "constant", "impossible", "key", "labels", "mask", "normal", "positive",
           "probabilities", "sample", "uniform"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spec:
    """One array: how it is drawn (``kind``), its shape, and the numbers that the kind needs."""

    kind: str
    shape: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 1.0

    @property
    def floating(self) -> bool:
        return self.kind not in ("labels", "mask", "key")

    def make(self, rng: np.random.Generator, dtype: DTypeLike = jnp.float32) -> jax.Array:
        # Drawn by NumPy, for which no program is compiled; in 32 bits and then cast, so that precisions agree.
        match self.kind:
            case "normal":
                value = self.low + self.high * rng.standard_normal(self.shape, np.float32)
            case "uniform":
                value = self.low + (self.high - self.low) * rng.random(self.shape, np.float32)
            case "probabilities":
                value = np.exp(rng.standard_normal(self.shape, np.float32))
                value /= value.sum(-1, keepdims=True)
            case "impossible":
                third = np.arange(math.prod(self.shape)).reshape(self.shape) % 3 == 2
                value = np.where(third, self.high, rng.random(self.shape, np.float32))
            case "constant":
                value = np.full(self.shape, self.low, np.float32)
            case "labels":
                return jnp.asarray(rng.integers(int(self.low), int(self.high), self.shape, np.int32))
            case "mask":
                return jnp.asarray(rng.random(self.shape, np.float32) < self.high)
            case "key":
                return jax.random.key(int(self.low))
            case _:
                raise ValueError(f"samples: unknown kind of array {self.kind!r}.")
        return jnp.asarray(np.asarray(value, np.float32).astype(jnp.dtype(dtype)))

    def shaped(self, dtype: DTypeLike = jnp.float32) -> jax.Array | jax.ShapeDtypeStruct:
        """The array without its elements where it is a floating-point one: for asking what is kept of a large one."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(dtype)) if self.floating else self.make(np.random.default_rng(0))


def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Spec:
    """Normal values, ``[*shape]``."""
    return Spec("normal", shape, mean, scale)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Spec:
    """Uniform values in [low, high), ``[*shape]``."""
    return Spec("uniform", shape, low, high)


def positive(*shape: int) -> Spec:
    """Uniform values in [0.5, 1.5), ``[*shape]``: variances, scales."""
    return Spec("uniform", shape, 0.5, 1.5)


def probabilities(*shape: int) -> Spec:
    """Rows over the last axis that are positive and sum to one, ``[*shape]``: soft labels."""
    return Spec("probabilities", shape)


def constant(value: float, *shape: int) -> Spec:
    """The same value everywhere, ``[*shape]``."""
    return Spec("constant", shape, value)


def impossible(value: float, *shape: int) -> Spec:
    """Numbers in [0, 1), every third one replaced by ``value``, ``[*shape]``: logits of −inf, and labels of 0 beside them."""
    return Spec("impossible", shape, high=value)


def labels(*shape: int, classes: int, low: int = 0) -> Spec:
    """Integers in [low, classes), ``[*shape]``."""
    return Spec("labels", shape, low, classes)


def mask(*shape: int, keep: float = 0.7) -> Spec:
    """Booleans that are true with probability ``keep``, ``[*shape]``."""
    return Spec("mask", shape, high=keep)


def key(seed: int = 0) -> Spec:
    """A random key."""
    return Spec("key", (), seed)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The arguments of one call: specs where arrays stand, plain values where static options stand."""

    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    dtype: str = "float32"  # what a workload is measured in; tests ask for the dtypes they want

    def make(self, seed: int = 0, dtype: DTypeLike | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arrays for every spec; the same seed gives the same values in every dtype, up to rounding."""
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)

        def made(where: int | str, value: Any) -> Any:
            if not isinstance(value, Spec):
                return value
            return value.make(np.random.default_rng([seed, zlib.crc32(str(where).encode())]), dtype)

        args = tuple(made(i, v) for i, v in enumerate(self.args))
        return args, {name: made(name, v) for name, v in self.options}

    @property
    def elements(self) -> int:
        values = (*self.args, *(v for _, v in self.options))
        return sum(math.prod(v.shape) for v in values if isinstance(v, Spec))

    def __str__(self) -> str:
        def one(value: Any) -> str:
            if isinstance(value, Spec):
                return "×".join(map(str, value.shape)) or value.kind
            return getattr(value, "__name__", repr(value))

        parts = [one(v) for v in self.args] + [f"{n}={one(v)}" for n, v in self.options]
        return ", ".join(parts)


def sample(*args: Any, note: str = "", dtype: str = "float32", **options: Any) -> Sample:
    """``sample(normal(4, 8), axis=-1)``: the arguments of one call, as data."""
    return Sample(args, tuple(options.items()), note, dtype)


def arrays(specs: Sequence[tuple[Spec, DTypeLike | None]], dtype: DTypeLike, seed: int) -> tuple[jax.Array, ...]:
    """An array for each spec, of the dtype that stands beside it, or else of ``dtype``."""

    def made(i: int, spec: Spec, own: DTypeLike | None) -> jax.Array:
        if spec.kind == "key":
            return jax.random.fold_in(jax.random.key(seed), i)
        return spec.make(np.random.default_rng([seed, i]), own or dtype).astype(own or dtype)

    return tuple(made(i, spec, own) for i, (spec, own) in enumerate(specs))
