"""linear_recurrence: h_t = a_t · h_{t−1} + b_t by element, over the first axis.

    forward     h_t = a_t · h_{t−1} + b_t              t = 1 … T
    backward    g_t = dh_t + a_{t+1} · g_{t+1}         t = T … 1: the same recurrence, run the other way

    db_t = g_t          da_t = g_t · h_{t−1}          dh_0 = a_1 · g_1

g_t is all that reaches h_t: its own cotangent, and what h_{t+1} passes on through a_{t+1}. Kept are a and h (h_T is not
needed; where h_0 is given it takes its place). With ``parallel`` both recurrences are associative scans over the maps
h ↦ a h + b, of which two make one: (a, b) and then (a′, b′) is (a′ a, a′ b + b′). That is about log T steps one after the
other, of twice the arithmetic in all.

The state is carried in float32 or wider; for float16 it is kept so, too, as its range is small.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, varying_like, wide, wide_type
from fbackprop.rules import rule
from fbackprop.samples import normal, sample, uniform

__all__ = ["linear_recurrence"]


class _Saved(NamedTuple):
    a: jax.Array
    h: jax.Array | None  # where the recurrence starts from zero: it is y
    before: jax.Array | None  # otherwise h one step before, h0 the first of them


def _compose(first: Any, second: Any) -> Any:
    (a, b), (a_after, b_after) = first, second
    return a_after * a, a_after * b + b_after


def _before(h: jax.Array, h0: jax.Array | None, reverse: bool) -> jax.Array:
    """h one step before."""
    first = (jnp.zeros_like(h[0]) if h0 is None else h0.astype(h.dtype))[None]
    return jnp.concatenate([h[1:], first] if reverse else [first, h[:-1]])


def _forward(
    a: ArrayLike, b: ArrayLike, h0: ArrayLike | None = None, *, reverse: bool = False, parallel: bool = False
) -> tuple[jax.Array, _Saved]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    dtype, first = jnp.result_type(a, b), None if h0 is None else jnp.asarray(h0)
    # In float16 a state may be too large for y and its gradient not for float16.
    stored = dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp else wide_type(a, b)
    if parallel:
        b_wide, at = b.astype(wide_type(a, b)), -1 if reverse else 0
        if first is not None:  # the first map, applied to the state before it, is a constant
            b_wide = b_wide.at[at].add(wide(a[at]) * wide(first))
        h = jax.lax.associative_scan(_compose, (wide(a), b_wide), reverse=reverse)[1].astype(stored)
    else:

        def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a, b = inputs
            h = wide(a) * h + wide(b)
            return h, h.astype(stored)

        h = jax.lax.scan(step, _start(a, b, first), (a, b), reverse=reverse)[1]
    saved = _Saved(a, h, None) if first is None else _Saved(a, None, _before(h, first, reverse))
    return h.astype(dtype), saved


def _start(a: jax.Array, b: jax.Array, h0: ArrayLike | None) -> jax.Array:
    """The state before the first step; zeros of the type that h has, on a mesh with explicit axes too."""
    like = (a[0] * b[0]).astype(wide_type(a, b))
    return varying_like(jnp.zeros_like(like) if h0 is None else jnp.asarray(h0, like.dtype), a, b)


def _backward(saved: _Saved, dy: jax.Array, *, reverse: bool, parallel: bool) -> tuple[Any, ...]:
    a, h, before = saved
    if h is not None:
        before = _before(h, None, reverse)
    assert before is not None
    dh = wide(dy)
    if parallel:
        after = _before(wide(a), None, not reverse)  # a_{t+1}
        g = jax.lax.associative_scan(_compose, (after, dh), reverse=not reverse)[1]
    else:

        def step(passed: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a, dh = inputs
            g = dh + passed
            return wide(a) * g, g

        g = jax.lax.scan(step, varying_like(jnp.zeros_like(dh[0]), a, dh), (a, dh), reverse=not reverse)[1]
    at = -1 if reverse else 0
    return g * wide(before), g, wide(a[at]) * g[at]


@rule(
    forward=_forward,
    backward=_backward,
    static=["reverse", "parallel"],
    samples=[
        sample(uniform(7, 3, 4, low=-1.0), normal(7, 3, 4), normal(3, 4)),
        sample(uniform(6, 5), normal(6, 5), reverse=True),
        sample(uniform(5, 4, low=-1.0), normal(5, 4), normal(4), parallel=True),
    ],
    workloads=[sample(uniform(1024, 8, 512), normal(1024, 8, 512))],
    keeps="a, h",
    minimum=lambda a, y: nbytes(a, y),
)
def linear_recurrence(
    a: ArrayLike, b: ArrayLike, h0: ArrayLike | None = None, *, reverse: bool = False, parallel: bool = False
) -> jax.Array:
    """A linear recurrence over the first axis, by element: h_t = a_t · h_{t−1} + b_t.

    a [T, ...], b [T, ...], h0 [...] -> h [T, ...]. The state is carried in float32 or wider.

    Args:
      h0: the state before the first step; zero by default.
      reverse: run from the last step to the first: h_t = a_t · h_{t+1} + b_t, with h0 behind the last.
      parallel: an associative scan instead of a loop, forward and backward: fewer steps one after the other and more
        memory and arithmetic, for devices with many cores.
    Raises:
      ValueError: where shapes differ or there are no steps. TypeError: where an array is not floating-point.
    Source: Blelloch 1990 (the parallel form); Martin & Cundy 2018, arXiv:1709.04057.
    """
    require_float("linear_recurrence", a=a, b=b, h0=h0)
    a, b, given = jnp.asarray(a), jnp.asarray(b), shapes(a=a, b=b, h0=h0)
    if a.ndim < 1 or a.shape != b.shape:
        raise ValueError(f"linear_recurrence: expected a and b of one shape [T, ...], got {given}.")
    if a.shape[0] == 0:
        raise ValueError(f"linear_recurrence: there are no steps ({given}).")
    if h0 is not None and jnp.shape(h0) != a.shape[1:]:
        raise ValueError(f"linear_recurrence: h0 has shape {jnp.shape(h0)}, expected {a.shape[1:]} ({given}).")

    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = wide(inputs[0]) * h + wide(inputs[1])
        return h, h

    return jax.lax.scan(step, _start(a, b, h0), (a, b), reverse=reverse)[1].astype(jnp.result_type(a, b))
