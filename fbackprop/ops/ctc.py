"""Connectionist temporal classification: −log of the probability that a sequence of frames spells the labels.

A path takes one class a frame; it spells what is left when repetitions are merged and blanks removed. With log-probabilities
l_t(k) = log softmax(z_t) and labels y_1 … y_N, two states for each number n of labels spelt: φ_t(n), after a blank or before
anything, and e_t(n), at label n. In logarithms, with ⊕ = logaddexp and r_n = [y_n = y_{n+1}], one frame forward is

    φ'(n)     = φ_{t−1}(n) ⊕ (e_{t−1}(n) + ε r_n)                     the next label needs no blank, unless it is the same
    e_t(n)    = (φ'(n−1) ⊕ e_{t−1}(n)) + l_t(y_n)
    φ_t(n)    = (φ'(n) ⊕ (e_{t−1}(n) + ε (1 − r_n))) + l_t(blank)

with ε = log_epsilon for log 0; frames of padding leave the states as they are. At the end L = −(φ_T(N) ⊕ e_T(N)).

Backward. For c = a ⊕ b the slopes are σ(a − b) and σ(b − a), and sum to one. So the cotangent of a state is −dL times the
probability γ that a path which spells the labels passes through it: the posterior, which the forward-backward algorithm has as
α β / p. Here it flows back from the end through these slopes, each the share of one predecessor, which nothing overflows and
which needs no second recursion over β. The cotangents of the returned states join it on their way. Each frame then gets

    dl_t(k) = Σ_n γ_t(n) [y_n = k] + γ_t(blank) [k = blank]            dz_t = dl_t − softmax(z_t) Σ_k dl_t

so that for the loss alone dz = (softmax(z) − posterior) dL.

Kept are the logits, their normalizers, and the states of all frames; the log-probabilities of all classes are never formed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, varying_like, wide, wide_type
from fbackprop.ops.probabilities import Normalizer, log_normalizer
from fbackprop.rules import rule
from fbackprop.samples import labels as integer_labels
from fbackprop.samples import mask, normal, sample

__all__ = ["ctc_loss_with_forward_probs"]

# φ(n) and e(n) after n labels, n = 0 … N, both [..., batch, N + 1]: with e(0), which is never, they move alike.
States = tuple[jax.Array, jax.Array]


class _Sum(NamedTuple):
    """a ⊕ b and its slopes: a half each where both are equal, nothing where both are −∞."""

    value: jax.Array
    first: jax.Array
    second: jax.Array


def _plus(a: jax.Array, b: jax.Array) -> _Sum:
    # Autodiff of the value gives the same slopes; that of jnp.logaddexp is one each for equal numbers so large that log 2 is
    # lost in them.
    larger, smaller = jnp.where(a >= b, a, b), jnp.where(a >= b, b, a)
    none = larger == -jnp.inf
    top = jnp.where(none, 0, larger)
    e = jnp.exp(jnp.where(none, 0, smaller) - top)
    most = 1 / (1 + e)
    of_larger, of_smaller = jnp.where(none, 0, most), jnp.where(none, 0, e * most)
    value = jnp.where(none, -jnp.inf, top + jnp.log1p(e))
    return _Sum(value, jnp.where(a >= b, of_larger, of_smaller), jnp.where(a >= b, of_smaller, of_larger))


def _next(states: jax.Array, fill: float) -> jax.Array:
    """What stands at n − 1, at n."""
    return jnp.pad(states[..., :-1], [(0, 0)] * (states.ndim - 1) + [(1, 0)], constant_values=fill)


def _previous(states: jax.Array) -> jax.Array:
    """What stands at n + 1, at n."""
    return jnp.pad(states[..., 1:], [(0, 0)] * (states.ndim - 1) + [(0, 1)])


class _Lattice(NamedTuple):
    """What the labels and paddings say of the way through the states."""

    labels: jax.Array  # [batch, N], within the classes
    known: jax.Array  # [batch, N], which of them were
    merges: jax.Array  # [batch, N + 1], ε where the next label is the same, else 0
    parts: jax.Array  # ε where it is not
    lengths: jax.Array  # [batch]
    padded: jax.Array  # [frames, batch, 1]
    spoilt: jax.Array  # [batch], a label that counts is none of the classes

    @classmethod
    def of(
        cls, logits: jax.Array, logit_paddings: ArrayLike, labels: ArrayLike, label_paddings: ArrayLike, log_epsilon: float
    ) -> "_Lattice":
        label, padding = jnp.asarray(labels), jnp.asarray(label_paddings) != 0
        classes, dtype = logits.shape[-1], wide_type(logits)
        known = (label >= 0) & (label < classes)
        same = jnp.pad(label[:, :-1] == label[:, 1:], [(0, 0), (1, min(label.shape[1], 1))]).astype(dtype)
        lengths = label.shape[1] - jnp.sum(padding, 1, dtype=jnp.int32)
        counts = jnp.arange(label.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        padded = (jnp.asarray(logit_paddings) != 0).T[..., None]
        epsilon = jnp.asarray(log_epsilon, dtype)
        spoilt = jnp.any(counts & ~known, 1)
        return cls(jnp.where(known, label, 0), known, epsilon * same, epsilon * (1 - same), lengths, padded, spoilt)

    def start(self, dtype: Any, log_epsilon: float) -> States:
        batch, most = self.labels.shape
        nowhere = [(0, 0), (1, 0)]
        later = jnp.full((batch, most), log_epsilon, dtype)
        return jnp.pad(later, nowhere), jnp.pad(later, nowhere, constant_values=-jnp.inf)


def _log_probabilities(logits: jax.Array, lattice: _Lattice, normalizer: Normalizer, blank: int) -> States:
    """Of the blank [frames, batch, 1] and of each label [frames, batch, N + 1]; 0 for what is none of the classes."""
    frames = logits.shape[1]
    places = jnp.broadcast_to(lattice.labels[:, None], (logits.shape[0], frames, lattice.labels.shape[1]))
    emit = normalizer.log_probability(wide(jnp.take_along_axis(logits, places, -1)))
    emit = jnp.pad(jnp.where(lattice.known[:, None], emit, 0), [(0, 0), (0, 0), (1, 0)])
    at_blank = normalizer.log_probability(wide(logits[..., blank : blank + 1]))
    return at_blank.swapaxes(0, 1), emit.swapaxes(0, 1)


def _states(at_blank: jax.Array, emit: jax.Array, lattice: _Lattice, start: States) -> States:
    """The states after each frame, [frames, batch, …]."""

    def frame(states: States, given: Any) -> tuple[States, States]:
        (phi, emitted), (l_blank, l_emit, padded) = states, given
        moved = _plus(phi, emitted + lattice.merges).value
        new_emitted = _plus(_next(moved, -jnp.inf), emitted).value + l_emit
        new_phi = _plus(moved, emitted + lattice.parts).value + l_blank
        new = jnp.where(padded, phi, new_phi), jnp.where(padded, emitted, new_emitted)
        return new, new

    return jax.lax.scan(frame, varying_like(start, at_blank, emit, lattice), (at_blank, emit, lattice.padded))[1]


class _Saved(NamedTuple):
    logits: jax.Array
    normalizer: Normalizer
    lattice: _Lattice
    states: States  # after each frame


def _ctc(
    logits: ArrayLike, logit_paddings: ArrayLike, labels: ArrayLike, label_paddings: ArrayLike, blank: int, log_epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Saved]:
    z = jnp.asarray(logits)
    lattice = _Lattice.of(z, logit_paddings, labels, label_paddings, log_epsilon)
    normalizer = log_normalizer(z, -1)
    at_blank, emit = _log_probabilities(z, lattice, normalizer, blank)
    phi, emitted = _states(at_blank, emit, lattice, lattice.start(at_blank.dtype, log_epsilon))
    last = _plus(phi[-1], emitted[-1]).value
    loss = -jnp.take_along_axis(last, lattice.lengths[:, None], 1)[:, 0]
    loss = jnp.where(lattice.spoilt, jnp.nan, loss)
    # Under vmap over label_paddings alone, each output has to depend on them: JAX would count its cotangent several times.
    nothing = (lattice.lengths * 0).astype(phi.dtype)[None, :, None]
    return (loss, phi.at[-1].set(last) + nothing, emitted[..., 1:] + nothing), _Saved(z, normalizer, lattice, (phi, emitted))


def _forward(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Saved]:
    return _ctc(logits, logit_paddings, labels, label_paddings, blank_id, log_epsilon)


def _backward(saved: _Saved, dy: Any, *, blank_id: int, log_epsilon: float) -> tuple[Any, ...]:
    logits, normalizer, lattice, (phi, emitted) = saved
    dloss, dphi, demitted = (wide(d) for d in dy)

    # the end: L = −(φ ⊕ e) at the length of each sequence, and the last states that are returned
    dloss = jnp.where(lattice.spoilt, 0, dloss)
    at_end = jnp.arange(phi.shape[-1], dtype=jnp.int32)[None] == lattice.lengths[:, None]
    last = _plus(phi[-1], emitted[-1])
    dlast = dphi[-1] - jnp.where(at_end, dloss[:, None], 0)
    dphi, demitted = dphi.at[-1].set(0), jnp.pad(demitted, [(0, 0), (0, 0), (1, 0)])

    def frame(g: States, given: Any) -> tuple[States, States]:
        (phi, emitted), own, padded = given
        g_phi, g_emitted = g[0] + own[0], g[1] + own[1]
        moved = _plus(phi, emitted + lattice.merges)
        to_phi = _plus(moved.value, emitted + lattice.parts)
        to_emitted = _plus(_next(moved.value, -jnp.inf), emitted)
        g_moved = to_phi.first * g_phi + _previous(to_emitted.first * g_emitted)
        g_before = to_phi.second * g_phi + to_emitted.second * g_emitted + moved.second * g_moved
        before = jnp.where(padded, g_phi, moved.first * g_moved), jnp.where(padded, g_emitted, g_before)
        l_blank = jnp.where(padded, 0, jnp.sum(g_phi, -1, keepdims=True))
        return before, (l_blank, jnp.where(padded, 0, g_emitted))

    start = varying_like(lattice.start(phi.dtype, log_epsilon), phi, emitted)
    previous = tuple(jnp.concatenate([first[None], states[:-1]]) for first, states in zip(start, (phi, emitted)))
    given = (previous, (dphi, demitted), lattice.padded)
    end = last.first * dlast, last.second * dlast
    dblank, demit = jax.lax.scan(frame, varying_like(end, given, lattice), given, reverse=True)[1]

    # each frame: dz = dl − softmax(z) Σ dl, with dl gathered by class
    demit = jnp.where(lattice.known[None], demit[..., 1:], 0)
    total = dblank + jnp.sum(demit, -1, keepdims=True)  # [frames, batch, 1]
    classes = jnp.zeros((logits.shape[0], logits.shape[2], logits.shape[1]), demit.dtype)
    by_class = jax.vmap(lambda d, labels, g: d.at[labels].add(g))(classes, lattice.labels, jnp.transpose(demit, (1, 2, 0)))
    by_class = by_class.at[:, blank_id].add(dblank[..., 0].T)
    dlogits = by_class.swapaxes(1, 2) - normalizer.probability(wide(logits)) * total.swapaxes(0, 1)
    return dlogits, None, None, None


def _bytes(logits: Any, labels: Any) -> int:
    """Logits, labels, two normalizers and a padding each frame, the states, and what the labels say of the way."""
    (batch, frames, _), most, size = logits.shape, labels.shape[1], wide_type(logits).itemsize
    states = frames * batch * 2 * (most + 1) * size
    return nbytes(logits, labels) + states + batch * frames * (2 * size + 1) + batch * (2 * (most + 1) * size + most + 4 + 1)


@rule(
    forward=_forward,
    backward=_backward,
    static=["blank_id", "log_epsilon"],
    samples=[
        sample(
            normal(2, 6, 4), mask(2, 6, keep=0.2), integer_labels(2, 3, classes=3), mask(2, 3, keep=0.3),
            blank_id=3, log_epsilon=-50.0,
        )
    ],
    workloads=[
        sample(normal(16, 400, 64), mask(16, 400, keep=0.0), integer_labels(16, 80, classes=64, low=1), mask(16, 80, keep=0.0))
    ],
    keeps="logits, two numbers a frame, the states of all frames",
    minimum=_bytes,
)  # fmt: skip
def ctc_loss_with_forward_probs(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The CTC loss, and the logarithms of the probabilities of all beginnings.

    logits [batch, frames, classes], logit_paddings [batch, frames], labels [batch, N] integer, label_paddings [batch, N]
    -> loss [batch], and [frames, batch, N + 1] and [frames, batch, N]: of having spelt n labels up to a frame and standing
    after a blank, or at label n; in float32 or wider. Paddings are 1 where there is nothing; labels are padded at their end.
    A sequence that has no path, and frames that cannot be, give losses of the size of −log_epsilon, with a finite gradient.
    A label outside of the classes gives NaN, unless it is padding. Source: Graves et al. 2006.

    Args:
      blank_id: the class of the blank.
      log_epsilon: stands for the logarithm of 0.
    Raises:
      TypeError: where logits are not floating-point or labels not integers. ValueError: where shapes or blank_id do not fit.
    """
    who = "ctc_loss"
    require_float(who, logits=logits)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {jnp.result_type(labels)}.")
    got = shapes(logits=logits, logit_paddings=logit_paddings, labels=labels, label_paddings=label_paddings)
    frames, label_shape = jnp.shape(logits)[:-1], jnp.shape(labels)
    if len(frames) != 2 or jnp.shape(logit_paddings) != frames or not frames[1]:
        expected = "logits [batch, frames, classes] of at least one frame and logit_paddings [batch, frames]"
        raise ValueError(f"{who}: expected {expected}, got {got}.")
    if len(label_shape) != 2 or label_shape[0] != frames[0] or jnp.shape(label_paddings) != label_shape:
        raise ValueError(f"{who}: expected labels and label_paddings [batch, N], of the batch of the logits, got {got}.")
    if not 0 <= blank_id < jnp.shape(logits)[-1]:
        raise ValueError(f"{who}: blank_id must be one of the {jnp.shape(logits)[-1]} classes, got {blank_id}.")
    return _ctc(logits, logit_paddings, labels, label_paddings, blank_id, log_epsilon)[0]
