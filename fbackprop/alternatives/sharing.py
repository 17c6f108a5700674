"""Relevance: how much of an output is owed to each input, and whether the shares add up.

    R_in = x ⊙ c,   c the cotangent that arrives at x under an LRP rule        R_bias = bias ⊙ c_bias
    Σ R_out = Σ R_in + Σ R_bias + what is lost

Lost is what ε takes, and whatever a function computes that has no LRP rule, such as a product of two things that both depend
on x in plain JAX. Under LRP-0 of a network whose ops have such rules nothing is lost.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from fbackprop.alternatives.choosing import Choice, lrp, with_rules
from fbackprop.layers import Serial
from fbackprop.layers.combinators import entries

__all__ = ["Relevance", "relevance"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("output", "inputs", "biases"), meta_fields=("rules", "layers")
)
@dataclasses.dataclass(frozen=True)
class Relevance:
    """Where the relevance of an output went. A pytree: it may be made under ``jit`` and ``vmap``.

    rules: the rule of LRP. layers: what they are. output: the relevance that was shared out, of the shape of the model's
    output. inputs: the relevance that arrived at the input of each layer, of its shape. biases: for each layer what its biases
    took, by path.
    """

    rules: str
    layers: tuple[str, ...]
    output: jax.Array
    inputs: tuple[jax.Array, ...]
    biases: tuple[dict[str, jax.Array], ...]

    @property
    def input(self) -> jax.Array:
        """The relevance of each element of the model's input."""
        return self.inputs[0]

    @property
    def bias(self) -> Any:
        """What all biases took together."""
        return _total(*(taken for own in self.biases for taken in own.values()))

    @property
    def lost(self) -> Any:
        """What is found neither in the input nor in the biases; 0 where relevance is conserved."""
        return _total(self.output) - _total(self.input) - self.bias

    def __str__(self) -> str:
        """A table: for each layer what arrived at its output, what it handed on, what its biases took, what was lost."""
        arrived = [*self.inputs[1:], self.output]
        rows: list[tuple[str, ...]] = [("layer", "arrived", "handed on", "biases", "lost")]
        for name, above, below, own in zip(self.layers, arrived, self.inputs, self.biases):
            r_out, r_in, r_bias = (float(_total(*a)) for a in ([above], [below], own.values()))
            rows.append((name, *_numbers(r_out, r_in, r_bias, r_out - r_in - r_bias)))
        rows = [rows[0], *reversed(rows[1:])]
        totals = (float(_total(self.output)), float(_total(self.input)), float(self.bias), float(self.lost))
        rows.append(("in all", *_numbers(*totals)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:]))]).rstrip() for row in rows
        ]
        return "\n".join([f"relevance, {self.rules}", *lines])


def relevance(
    model: Callable[..., Any],
    params: Any,
    x: ArrayLike,
    target: ArrayLike | None = None,
    *,
    rules: str | Choice = "lrp-0",
    amount: ArrayLike | None = None,
    state: Any = (),
    biases: Collection[str] = ("bias", "mean"),
) -> Relevance:
    """Shares the output of a model out over its input, by layer-wise relevance propagation.

    x [..., features] -> relevance of x [..., features]; it adds up to the output, less what biases take. A ``serial`` model is
    told layer by layer.

    Args:
      model: a layer or model, or any function ``model(params, x)``, with ``state`` as a third argument where one is given.
      target: the output to share out, an integer or integers for each row [...]; by default the largest of each row.
      rules: "lrp-0", "lrp-epsilon", "lrp-gamma", "lrp-alpha-beta", or what ``alternatives.lrp`` gives.
      amount: what to share out for each row [...]; by default the output itself.
      biases: the names of those leaves of params and state that are constants added to what comes from x.
    Raises:
      ValueError: where the target is none of the outputs, where x holds integers, or where an op has no LRP rule.
    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140.
    """
    if not callable(model):
        raise TypeError(f"relevance: expected a model or a function, got {type(model).__name__}.")
    choice = lrp() if rules == "lrp-0" else rules
    if not str(getattr(choice, "method", choice)).startswith("lrp"):
        raise ValueError(
            f"relevance: rules is {choice!s}, expected a form of LRP, such as 'lrp-0' or alternatives.lrp(epsilon=…)."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"relevance: x is of {x.dtype}, which has no relevance; give floating-point numbers, or the embeddings of integers."
        )
    names, pulls, values = [], [], [x]
    for name, fn, own, old in _parts(model, params, state):
        y, pull = jax.vjp(with_rules(fn, rules), own, old, values[-1])
        names.append(name)
        pulls.append((pull, own, old))
        values.append(y)
    c = _cotangent(values[-1], target, amount)
    output = _share(values[-1], c)
    inputs, shares = [], []
    for (pull, own, old), value in zip(reversed(pulls), reversed(values[:-1])):
        d_own, d_old, c = pull(c)
        inputs.append(_share(value, c))
        shares.append({**_shares(own, d_own, biases), **_shares(old, d_old, biases)})
    label = str(choice) if isinstance(choice, Choice) else choice
    return Relevance(label, tuple(names), output, tuple(reversed(inputs)), tuple(reversed(shares)))


def _parts(model: Any, params: Any, state: Any) -> list[tuple[str, Callable[..., Any], Any, Any]]:
    """(name, function of (params, state, x), params, state) of each layer of a chain, or of the whole."""

    def part(layer: Any) -> Callable[..., Any]:
        return lambda own, old, x: layer(own, x) if isinstance(old, tuple) and not old else layer(own, x, old)

    if not isinstance(model, Serial):
        name = repr(model) if hasattr(model, "init") else getattr(model, "__name__", type(model).__name__)
        return [(name, part(model), params, state)]
    return [(repr(layer), part(layer), own, old) for layer, own, old in entries(model.name, model.layers, params, state)]


def _cotangent(y: Any, target: Any, amount: Any) -> jax.Array:
    """The relevance to begin with, for a unit of the output."""
    if not isinstance(y, jax.Array) or y.ndim < 1 or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"relevance: the model's output must be an array [..., outputs], got {jax.tree.map(jnp.shape, y)}.")
    rows, n = y.shape[:-1], y.shape[-1]
    if target is None:
        target = jnp.argmax(y, -1)
    else:
        target = jnp.asarray(target)
        if not jnp.issubdtype(target.dtype, jnp.integer) or target.shape not in ((), rows):
            raise ValueError(f"relevance: target is {target.dtype} {target.shape}, expected an integer or integers {rows}.")
        if not isinstance(target, Tracer) and np.any((np.asarray(target) < 0) | (np.asarray(target) >= n)):
            raise ValueError(f"relevance: target is {target}, expected one of the {n} outputs, 0 to {n - 1}.")
    chosen = jax.nn.one_hot(jnp.broadcast_to(target, rows), n, dtype=y.dtype)
    if amount is None:
        return chosen
    amount = jnp.asarray(amount, y.dtype)
    if amount.shape not in ((), rows):
        raise ValueError(f"relevance: amount has shape {amount.shape}, expected () or {rows}, a number for each row.")
    given = jnp.broadcast_to(amount, rows)[..., None]
    return jnp.where(y == 0, 0, chosen * given / jnp.where(y == 0, 1, y))


def _share(value: jax.Array, c: Any) -> jax.Array:
    return jnp.asarray(value) * c


def _shares(tree: Any, cotangents: Any, names: Collection[str]) -> dict[str, jax.Array]:
    """What the leaves of these names took, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _share(leaf, c)
        for (path, leaf), c in zip(leaves, jax.tree.leaves(cotangents))
        if path and getattr(path[-1], "key", None) in names
    }


def _total(*arrays: Any) -> Any:
    """The sum of all elements, 0 of nothing: in float64, or inside of a trace in float32 or wider. Shares of both signs cancel:
    in float32 the rounding of a sum would look like a loss."""
    if any(isinstance(a, Tracer) for a in arrays):
        return sum(jnp.sum(a, dtype=jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)
    return sum((np.sum(np.asarray(a), dtype=np.float64) for a in arrays), start=np.float64(0))


def _numbers(*values: float) -> list[str]:
    return [f"{v:.6g}" for v in values[:-1]] + [f"{values[-1]:.1e}"]
