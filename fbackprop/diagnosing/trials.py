"""Trials: a few training steps on copies, with one thing changed.

All trials take the batch that was given, again and again, so they are the same each time they are run, and they cost a
bounded number of steps. What can be a number of the program is one (the rate as a factor of the optimizer's updates, the
limit of the gradient's norm, the parameters to begin with): one compiled program serves them all. Another activation or a
norm before it are another program.

The rate is changed by scaling the updates, which is the same thing for every optimizer whose update is the rate times
something that does not depend on it, as that of all of optax's usual ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.diagnosing.calls import KERNELS, Layout, discover
from fbackprop.diagnosing.looks import Look, look
from fbackprop.diagnosing.variants import AS_IT_IS, Variant, changed

if TYPE_CHECKING:
    import optax

__all__ = ["Bench", "Change", "Trial", "reach"]

_INITIALIZERS = {
    "He": jax.nn.initializers.he_normal,
    "LeCun": jax.nn.initializers.lecun_normal,
    "Glorot": jax.nn.initializers.glorot_normal,
}


@dataclasses.dataclass(frozen=True)
class Change:
    """What a trial changes."""

    factor: float = 1.0  # of the rate
    limit: float = math.inf  # of the gradient's norm
    initializer: str | None = None  # "He", "LeCun" or "Glorot": kernels drawn anew, biases zero
    variant: Variant = AS_IT_IS
    float32: bool = False  # parameters and batch in float32

    def words(self, rate: float | None) -> str:
        """What a person would do."""
        parts = []
        if self.variant.norm:
            parts.append("a layer norm before each activation")
        if self.variant.activation:
            parts.append(f"{self.variant.activation} for each activation")
        if self.initializer:
            parts.append(f"kernels by {self.initializer}'s initialiser")
        if self.factor != 1:
            parts.append(f"rate {rate * self.factor:.3g}" if rate is not None else f"the rate times {self.factor:g}")
        if math.isfinite(self.limit):
            parts.append(f"the gradient clipped to a norm of {self.limit:.3g}")
        if self.float32:
            parts.append("computing in float32")
        return " and ".join(parts) or "as it is"


class Trial(NamedTuple):
    """What came of a change, in numbers: of the network with it before its first step, and after ``steps`` of them."""

    change: str
    steps: int
    losses: tuple[float, ...]  # before each step, and after the last
    reach: float  # of the gradient, before the first step (see ``reach``)
    dead_before: float  # the largest share of dead units of an activation, before the first step
    dead: float  # and after it
    saturated: float  # the largest share of saturated elements of an activation, before the first step
    finite: bool  # loss, gradient and every number in between, before and after the first step
    helped: bool | None = None  # None: nobody asked

    @property
    def loss(self) -> float:
        """After the last step."""
        return self.losses[-1]

    def __str__(self) -> str:
        return f"{self.change}: loss {self.losses[0]:.4g} → {self.loss:.4g} in {self.steps} steps"


class Bench:
    """Where trials are made: copies of the parameters and of the optimizer's state, and the programs that were compiled."""

    def __init__(
        self,
        loss: Callable[..., Any],
        params: Any,
        args: tuple[Any, ...],
        optimizer: "optax.GradientTransformation",
        opt_state: Any,
        rate: float | None,
        steps: int,
        seed: int,
    ):
        import optax

        self.loss, self.params, self.args = _scalar(loss), params, args
        self.opt_state = optimizer.init(params) if opt_state is None else opt_state
        self.rate, self.steps, self.seed = rate, steps, seed
        self._update = optax.with_extra_args_support(optimizer).update
        self._programs: dict[Any, tuple[Layout, Any, Any]] = {}
        self._trials: dict[Change, Trial] = {}
        self.layout = self.program(AS_IT_IS)[0]

    def program(self, variant: Variant, float32: bool = False) -> tuple[Layout, Any, Any]:
        """The layout of the model so changed, its look and its descent."""
        import optax

        if (variant, float32) not in self._programs:
            loss = self.loss
            params, args = self._given(float32)
            layout = discover(loss, params, args, variant)
            varied = changed(loss, variant)
            value: Any = jax.eval_shape(varied, params, *args)[0]
            dtype = jnp.promote_types(value.dtype, jnp.float32)

            def updates(grads: Any, value: Any, params: Any, opt_state: Any, args: Any) -> tuple[Any, Any]:
                extra = {"value": value, "grad": grads, "value_fn": lambda p: varied(p, *args)[0]}
                return self._update(grads, opt_state, params, **extra)

            @functools.partial(jax.jit, static_argnames="thorough")
            def measure(params: Any, opt_state: Any, args: Any, thorough: bool = False) -> tuple[Look, Any, Any]:
                taken: list[Any] = []

                def update(grads: Any, value: Any) -> Any:
                    change, state = updates(grads, value, params, opt_state, args)
                    taken.extend((optax.apply_updates(params, change), state))
                    return change

                return look(loss, params, args, layout, update, variant, thorough), *taken

            @jax.jit
            def descend(params: Any, opt_state: Any, args: Any, factor: Any, limit: Any, steps: Any) -> Any:
                def step(i: Any, carry: Any) -> Any:
                    params, opt_state, losses = carry
                    (value, _), grads = jax.value_and_grad(varied, has_aux=True)(params, *args)
                    norm = optax.tree.norm(grads)
                    grads = jax.tree.map(lambda g: g * jnp.minimum(limit / norm, 1.0).astype(g.dtype), grads)
                    change, opt_state = updates(grads, value, params, opt_state, args)
                    change = jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), change)
                    return optax.apply_updates(params, change), opt_state, losses.at[i].set(value.astype(dtype))

                losses = jnp.zeros(self.steps + 1, dtype)
                params, opt_state, losses = jax.lax.fori_loop(0, steps, step, (params, opt_state, losses))
                return params, opt_state, losses.at[steps].set(varied(params, *args)[0].astype(dtype))

            self._programs[variant, float32] = layout, measure, descend
        return self._programs[variant, float32]

    def look(self, params: Any, opt_state: Any) -> tuple[Look, Any, Any]:
        """A look at the model as it is, a thorough one where something is not finite; parameters and state after the step."""
        measure = self.program(AS_IT_IS)[1]
        seen, *after = measure(params, opt_state, self.args)
        seen = jax.device_get(seen)
        if not is_finite(seen):
            seen = jax.device_get(measure(params, opt_state, self.args, thorough=True)[0])
        return seen, *after

    def trial(self, change: Change) -> Trial:
        """Tries a change, once."""
        if change in self._trials:
            return self._trials[change]
        _, measure, descend = self.program(change.variant, change.float32)
        params, args = self._given(change.float32)
        opt_state = self.opt_state
        if change.initializer is not None:
            params = redrawn(params, self.layout, change.initializer, self.seed)
        if change.float32:
            opt_state = _widened(opt_state)
        first = jax.device_get(measure(params, opt_state, args)[0])
        after, state, _ = descend(params, opt_state, args, change.factor, change.limit, 1)
        second = jax.device_get(measure(after, state, args)[0])
        *_, losses = descend(params, opt_state, args, change.factor, change.limit, self.steps)
        self._trials[change] = Trial(
            change.words(self.rate), self.steps, tuple(map(float, losses)), reach(first), _largest(first["dead"]),
            _largest(second["dead"]), _largest(first["saturated"]), is_finite(first) and is_finite(second),
        )  # fmt: skip
        return self._trials[change]

    def sweep(self, factors: Sequence[float]) -> list[tuple[float, float]]:
        """For each factor of the rate: the factor, and the loss after the steps."""
        descend = self.program(AS_IT_IS)[2]
        return [(f, float(descend(self.params, self.opt_state, self.args, f, math.inf, self.steps)[2][-1])) for f in factors]

    def _given(self, float32: bool) -> tuple[Any, Any]:
        return (_widened(self.params), _widened(self.args)) if float32 else (self.params, self.args)


def reach(seen: Look) -> float:
    """How much of the gradient reaches the first layer: the norm of the cotangent of the first layer's output over that of
    the last layer's. NaN where there are not two layers."""
    ends = layer_ends(seen.layout)
    if len(ends) < 2:
        return math.nan
    first, last = float(seen["dout"][ends[0]]), float(seen["dout"][ends[-1]])
    return first / last if last else math.nan


def layer_ends(layout: Layout) -> list[int]:
    """The last call of each layer that has calls and is no loss, in order."""
    found = []
    for i, layer in enumerate(layout.layers):
        own = layout.of_layer(i)
        if own and not layer.is_loss:
            found.append(own[-1])
    return found


def is_finite(seen: Look) -> bool:
    """Whether loss, gradients and every number that was looked at are finite."""
    bad = [seen[name].sum() for name in ("bad_out", "bad_dout", "bad_in", "bad_din")]
    return bool(np.isfinite(seen.loss) and np.isfinite(seen["gradient"]).all() and not sum(bad))


def redrawn(params: Any, layout: Layout, initializer: str, seed: int) -> Any:
    """The parameters with each kernel drawn anew and the biases of the same calls zero; the others as they are."""
    roles = {given.place[0]: given.name for _, given in layout.inputs if given.place is not None}
    leaves, tree = jax.tree.flatten(params)
    for number, name in roles.items():
        leaf, parameter = leaves[number], layout.parameters[number]
        if name in KERNELS and len(parameter.shape) - parameter.stacked >= 2:
            draw = _INITIALIZERS[initializer](batch_axis=(0,) if parameter.stacked else ())
            key = jax.random.fold_in(jax.random.key(seed), number)
            leaves[number] = draw(key, parameter.shape, jnp.result_type(leaf))
        elif name.endswith("bias"):
            leaves[number] = jnp.zeros_like(leaf)
    return tree.unflatten(leaves)


def _largest(shares: np.ndarray) -> float:
    known = shares[np.isfinite(shares)]
    return float(known.max()) if known.size else 0.0


def _scalar(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as ``(scalar, None)``, whatever it returns beside the scalar."""

    def run(*args: Any) -> Any:
        result: Any = loss(*args)
        value: Any = result[0] if isinstance(result, tuple) and len(result) == 2 else result
        if not hasattr(value, "shape") or jnp.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"shape {jnp.shape(value)}, {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
            raise ValueError(f"health: the loss returned {got}; expected a floating-point scalar, or (scalar, anything).")
        return value, None

    return run


def _widened(tree: Any) -> Any:
    def widen(leaf: Any) -> Any:
        narrow = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)) if narrow else leaf

    return jax.tree.map(widen, tree)
