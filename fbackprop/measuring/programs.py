"""Compiled programs of a gradient, in two settings, with what can be read from them without a clock.

    fused      one program: (y, gradients) from the arguments and the cotangent
    stored     two: (y, pullback) from the arguments, then the gradients from the pullback and the cotangent; what is kept
               for the backward goes through memory, as under ``lax.scan`` over layers

Both return the outputs too: a program that did not would be free to leave the forward out.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax

from fbackprop.measuring.bytes import saved_bytes
from fbackprop.measuring.flops import matmul_flops
from fbackprop.measuring.problems import Call, Problem

__all__ = ["SETTINGS", "Compiler", "Program", "Traced"]

SETTINGS = ("fused", "stored")


@dataclasses.dataclass(frozen=True)
class Program:
    """A gradient that can be run. Programs of the same identity are the same instructions."""

    run: Callable[[], Any]  # (outputs, gradients)
    identity: str


@dataclasses.dataclass(frozen=True)
class Traced:
    """What is known of a contender without running it."""

    residual_bytes: int
    temp_bytes: int | None
    matmul_flops: int | None


class Compiler:
    """Compiles the programs of one problem, each text once."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._compiled: dict[str, Any] = {}

    def _compile(self, traced: Any) -> Any:
        lowered = traced.lower()
        text = lowered.as_text()
        if text not in self._compiled:
            self._compiled[text] = lowered.compile()
        return self._compiled[text]

    def _vjp(self, call: Call, moved: Any, rest: Any) -> Any:
        return jax.vjp(lambda *m: self.problem.outputs(call, m, rest), *moved)

    def _fused(self, call: Call) -> Any:
        def gradient(dy: Any, moved: Any, rest: Any) -> Any:
            y, pullback = self._vjp(call, moved, rest)
            return y, pullback(dy)

        return jax.jit(gradient).trace(self.problem.dy, self.problem.moved, self.problem.rest)

    def look(self, call: Call) -> Traced:
        """Bytes and FLOPs: kept for the backward; the compiler's temporaries and the matmuls of the fused program."""
        given, traced = self.problem, self._fused(call)
        memory = self._compile(traced).memory_analysis()
        return Traced(
            saved_bytes(lambda *moved: given.outputs(call, moved, given.rest), *given.moved),
            getattr(memory, "temp_size_in_bytes", None),
            matmul_flops(traced.jaxpr),
        )

    def program(self, call: Call, setting: str) -> Program:
        """The gradient in one of the settings."""
        dy, moved, rest = self.problem.dy, self.problem.moved, self.problem.rest
        if setting == "fused":
            fused = self._compile(self._fused(call))
            return Program(lambda: fused(dy, moved, rest), _identity(fused))
        first = self._compile(jax.jit(lambda moved, rest: self._vjp(call, moved, rest)).trace(moved, rest))
        pullback = first(moved, rest)[1]
        second = self._compile(jax.jit(lambda pullback, dy: pullback(dy)).trace(pullback, dy))

        def run() -> Any:
            y, pullback = first(moved, rest)
            return y, second(pullback, dy)

        return Program(run, _identity(first) + _identity(second))


def _identity(compiled: Any) -> str:
    """A hash of the optimized program without what says where it comes from."""
    text = re.sub(r",? ?metadata=\{[^}]*\}", "", compiled.as_text())
    text = re.sub(r"(?m)^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)
    return hashlib.sha256(re.sub(r"(?m)^HloModule [^,\n]*", "", text).encode()).hexdigest()
