"""Text from a model: one token after the other, drawn from what the model expects next."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["generate"]


def generate(
    model: Any,
    params: Any,
    prompt: Sequence[int],
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[int]:
    """Yields tokens that follow the prompt, each as soon as it is drawn.

    A GPT keeps keys and values of what it has seen, an LSTM its carry, so that a token costs the same wherever it stands. Where
    a GPT's ``length`` is reached, it reads the last half of it afresh and goes on from there.

    Args:
      model: one with ``start`` and ``extend``: ``gpt``, ``lstm_lm``. params: its parameters.
      prompt: tokens, at least one. count: how many to draw.
      temperature: the logits are divided by it; 0 always takes the likeliest token. top_k: only the k likeliest are drawn from.
      seed: the draws follow from it and their number.
    Raises:
      ValueError: where the prompt is empty or holds something that is no token, or a number is out of range.
    """
    prompt = list(prompt)
    if not prompt:
        raise ValueError("generate: the prompt is empty, expected at least one token.")
    if odd := [t for t in prompt if not 0 <= t < model.vocabulary]:
        raise ValueError(f"generate: the prompt holds {odd[0]}, expected tokens from 0 to {model.vocabulary - 1}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"generate: temperature is {temperature}, expected a number from 0.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, expected a whole number from 1, or None.")
    return _tokens(model, params, prompt, count, jax.random.key(seed), float(temperature), top_k)


def _tokens(
    model: Any, params: Any, prompt: list[int], count: int, key: Any, temperature: float, top_k: int | None
) -> Iterator[int]:
    step = functools.partial(_step(model, temperature > 0, top_k and min(top_k, model.vocabulary)), params)
    room = getattr(model, "length", None)
    seen = list(prompt) if room is None else list(prompt[-room:])
    carry, new, used = model.start(1), seen, len(seen)
    for i in range(count):
        if room is not None and used > room:
            new = seen[-max(1, room // 2) :]
            carry, used = model.start(1), len(new)
        token, carry = step(jnp.array([new], jnp.int32), carry, jax.random.fold_in(key, i), max(temperature, 1e-6))
        new = [int(np.asarray(token))]
        seen, used = [*seen[-(room or 1) :], *new], used + 1
        yield new[0]


@functools.lru_cache(maxsize=16)
def _step(model: Any, draws: bool, top_k: int | None) -> Any:
    @jax.jit
    def step(params: Any, tokens: jax.Array, carry: Any, key: Any, temperature: Any) -> tuple[jax.Array, Any]:
        logits, carry = model.extend(params, tokens, carry)
        logits = logits[0]
        if not draws:
            return jnp.argmax(logits), carry
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature), carry

    return step
