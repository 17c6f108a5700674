"""How another rule is made from the rule of an op: the same forward, and a backward that changes what arrives, lets it pass,
follows y / x in place of the slope, or tells positive from negative contributions. ``methods.py`` has the formulas.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbackprop.ops._arithmetic import sum_to, wide
from fbackprop.rules import Rule, Static

__all__ = ["Maker", "OtherRule", "affine_in_inference", "alpha_beta_shares", "arriving", "by_sign", "clip_norm", "each",
           "gamma_shares", "other_rule", "own", "passing", "secant", "stabilized"]  # fmt: skip

Maker = Callable[[Rule, Any], Rule]
"""``maker(rule, option)`` makes the other rule of an op, from its own one and the number that the method takes."""


@dataclasses.dataclass(frozen=True, eq=False)
class OtherRule(Rule):
    """A rule for the same forward as an op's own, with another backward."""

    method: str = ""  # the name of the alternative, with its number
    derivation: str = ""

    @property
    def formula(self) -> str:
        return self.derivation


def other_rule(
    rule: Rule, forward: Any, backward: Any, keeps: str | None = None, static: Sequence[str] | None = None
) -> OtherRule:
    """The op's record with other halves, which are called with names.

    keeps: what is kept for the backward, in words. static: the names of the static arguments that the backward asks for. By
    default both are those of the op's own.
    """
    asked = rule.backward_static if static is None else static

    def halves_backward(saved: Any, dy: Any, **options: Any) -> Any:
        return backward(saved, dy, **options)

    pair = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("saved", "dy")]
    options = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in asked]
    halves_backward.__signature__ = inspect.Signature([*pair, *options])  # type: ignore[attr-defined]
    known: dict[str, Any] = {f.name: getattr(rule, f.name) for f in dataclasses.fields(Rule)}
    known |= {"forward": forward, "backward": halves_backward, "exact": False, "minimum": None, "recomputes": ""}
    known["keeps"] = rule.keeps if keeps is None else keeps
    return OtherRule(**known)


def each(change: Callable[[jax.Array], jax.Array], dy: Any) -> Any:
    """A change of every floating-point array of a cotangent: an op may return several."""
    return jax.tree.map(lambda d: change(d) if jnp.issubdtype(d.dtype, jnp.inexact) else d, dy)


# Makers: what arrives is changed and then goes its way; it passes unchanged; it follows y / x; signs are told apart.


def own(rule: Rule, option: Any) -> Rule:
    return rule


def arriving(change: Callable[[Any, Any], Any]) -> Maker:
    """The op's own backward, after ``change(dy, option)``."""

    def make(rule: Rule, option: Any) -> Rule:
        def backward(saved: Any, dy: Any, **static: Any) -> Any:
            return rule.backward(saved, change(dy, option), **static)

        return other_rule(rule, rule.forward, backward)

    return make


def passing(change: Callable[[jax.Array], jax.Array]) -> Maker:
    """dx = change(dy), whatever the op is; other arguments get no cotangent."""

    def make(rule: Rule, option: Any) -> Rule:
        def forward(**given: Any) -> Any:
            x = jnp.asarray(given[rule.arguments[0]])
            return rule.forward(**given)[0], Static((x.shape, x.dtype))

        def backward(saved: Any, dy: Any) -> Any:
            shape, dtype = saved.value
            dx = sum_to(change(wide(dy)), shape) if jnp.issubdtype(dtype, jnp.inexact) else None
            return dx, *(None for _ in rule.arguments[1:])

        return other_rule(rule, forward, backward, keeps="nothing", static=())

    return make


class _Secant(NamedTuple):
    own: Any
    x: jax.Array
    y: jax.Array


def secant(rule: Rule, option: Any) -> Rule:
    """dx = dy · y / x, and at x = 0, where y / x tends to the derivative, the op's own. Other arguments get no cotangent."""

    def forward(**given: Any) -> Any:
        y, saved = rule.forward(**given)
        return y, _Secant(saved, jnp.asarray(given[rule.arguments[0]]), y)

    def backward(saved: _Secant, dy: Any, **static: Any) -> Any:
        own, x, y = saved
        gradient, *others = rule.backward(own, dy, **static)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return (None, *(None for _ in others))
        at_zero = x == 0
        slope = wide(y) / jnp.where(at_zero, 1, wide(x))
        return jnp.where(at_zero, gradient, sum_to(wide(dy) * slope, x.shape)), *(None for _ in others)

    return other_rule(rule, forward, backward, keeps="x, y")


class _WithOutput(NamedTuple):
    own: Any
    y: jax.Array


def stabilized(rule: Rule, epsilon: float) -> Rule:
    """The backward of a linear op on c · z / (z + ε sign z)."""

    def forward(**given: Any) -> Any:
        y, saved = rule.forward(**given)
        return y, _WithOutput(saved, y)

    def backward(saved: _WithOutput, dy: Any, **static: Any) -> Any:
        z = wide(saved.y)
        c = wide(dy) * (z / (z + jnp.where(z < 0, -epsilon, epsilon)))
        return rule.backward(saved.own, c.astype(dy.dtype), **static)

    return other_rule(rule, forward, backward, keeps=rule.keeps + ", y" if rule.keeps != "nothing" else "y")


class _Factors(NamedTuple):
    x: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    y: jax.Array


Shares = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array, jax.Array]]


def by_sign(shares: Shares) -> Maker:
    """An op with x, kernel and bias, whose positive and negative contributions x_i w_ij get weights of their own.

    ``shares(c, z, P, N, option)``, with P and N the sums of the positive and of the negative contributions, gives what each
    contribution gets for a unit of it: all of them, the positive ones, the negative ones.
    """

    def make(rule: Rule, option: Any) -> Rule:
        def forward(**given: Any) -> Any:
            bias = None if given["bias"] is None else jnp.asarray(given["bias"])
            y, _ = rule.forward(**given)
            return y, _Factors(jnp.asarray(given["x"]), jnp.asarray(given["kernel"]), bias, y)

        def backward(saved: _Factors, dy: Any, **static: Any) -> Any:
            x, kernel, bias, y = saved
            own = {n: v for n, v in static.items() if n in rule.backward_static}

            def run(x: Any, kernel: Any, bias: Any) -> Any:
                return rule.forward(x=x, kernel=kernel, bias=bias, **static)

            def part(a: jax.Array, sign: int) -> jax.Array:
                return jnp.where(a * sign > 0, a, jnp.zeros_like(a))

            # A positive contribution has two positive factors or two negative ones; the bias is a factor of 1.
            kinds = [(sign, sign_x, sign * sign_x) for sign in (1, -1) for sign_x in (1, -1)]
            sums, pulls = {1: jnp.zeros((), wide(y).dtype), -1: jnp.zeros((), wide(y).dtype)}, []
            for sign, sign_x, sign_w in kinds:
                constant = part(bias, sign) if bias is not None and sign_x == 1 else None
                z, kept = run(part(x, sign_x), part(kernel, sign_w), constant)
                sums[sign] = sums[sign] + wide(z)
                pulls.append(kept)
            every, positive, negative = shares(wide(dy), wide(y), sums[1], sums[-1], option)
            each = {1: positive.astype(dy.dtype), -1: negative.astype(dy.dtype)}
            dx, dkernel, dbias = rule.backward(run(x, kernel, bias)[1], every.astype(dy.dtype), **own)
            for (sign, sign_x, sign_w), kept in zip(kinds, pulls):
                more_x, more_kernel, more_bias = rule.backward(kept, each[sign], **own)
                dx = dx + jnp.where(x * sign_x > 0, more_x, 0)
                dkernel = dkernel + jnp.where(kernel * sign_w > 0, more_kernel, 0)
                if bias is not None and sign_x == 1:
                    dbias = dbias + jnp.where(bias * sign > 0, more_bias, 0)
            return dx, dkernel, dbias

        return other_rule(rule, forward, backward, keeps="x, kernel, bias, y", static=rule.static)

    return make


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where nothing was contributed."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def gamma_shares(c: Any, z: Any, positive: Any, negative: Any, gamma: float) -> Any:
    g = _ratio(c * z, z + gamma * jnp.where(z < 0, negative, positive))
    return g, jnp.where(z < 0, 0, gamma * g), jnp.where(z < 0, gamma * g, 0)


def alpha_beta_shares(c: Any, z: Any, positive: Any, negative: Any, alpha: float) -> Any:
    return jnp.zeros_like(z), alpha * _ratio(c * z, positive), (1 - alpha) * _ratio(c * z, negative)


def clip_norm(dy: Any, bound: float) -> Any:
    floating = [wide(d) for d in jax.tree.leaves(dy) if jnp.issubdtype(d.dtype, jnp.inexact)]
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(d)) for d in floating))
    scale = jnp.where(norm > bound, bound / jnp.where(norm > bound, norm, 1), 1)
    return each(lambda d: jnp.asarray(wide(d) * scale, d.dtype), dy)


def affine_in_inference(rule: Rule, option: Any) -> Rule:
    """batch_norm: with running statistics it is linear; scale and statistics stand for a kernel, bias and mean for a bias."""

    def forward(**given: Any) -> Any:
        if given["train"]:
            raise ValueError("batch_norm has no LRP rule in training, where all of the batch is tied; use train=False.")
        return rule.forward(**given)

    return other_rule(rule, forward, rule.backward)
