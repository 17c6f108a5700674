"""The arguments of attention: what does not fit in sentences, and what does in one form for all layouts and options."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import shapes

WHO = "dot_product_attention"

Window = int | tuple[int, int] | None


class Options(NamedTuple):
    """The static arguments of a call, in one form."""

    scale: float
    soft_cap: float | None
    left: int | None  # how many keys before its own position a query sees; None for all
    right: int | None  # and after it: 0 where attention is causal
    groups: int  # query heads to a key head
    rate: float  # of dropout


class Inputs(NamedTuple):
    """The arrays of a call, in one form: heads as key heads k × query heads g that share one. An axis of bias and mask may
    be 1 where they were broadcast."""

    query: jax.Array  # [b, t, k, g, h]
    key: jax.Array  # [b, s, k, h]
    value: jax.Array  # [b, s, k, h]
    bias: jax.Array | None  # [b, k, t, g, s]
    mask: jax.Array | None  # [b, k, t, g, s]
    query_lengths: jax.Array | None  # [b]
    key_lengths: jax.Array | None  # [b]
    query_ids: jax.Array | None  # [b, t]
    key_ids: jax.Array | None  # [b, s]
    rows: jax.Array | None = None  # [2, b, k, t, g], the words of dropout; an axis is 1 where they are shared


# The axes: batch, query, head of keys, group of query heads that share it, key (source), feature. Logits are [b, k, t, g, s]
# in this order because a block of queries with one head of keys, [t, g, h], then is a matrix as it lies in memory.
QUERIES, KEYS, LOGITS, ROWS, WORDS = "btkgh", "bskh", "bktgs", "bktg", "2bktg"
INPUTS = (QUERIES, KEYS, KEYS, LOGITS, LOGITS, "b", "b", "bt", "bs", WORDS)

# ------------------------------------------------------------------------------------------------------------ bad input


def check_arguments(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    scale: Any,
    is_causal: Any,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: Any,
    implementation: Any,
    segment_ids: Any,
    soft_cap: Any,
) -> None:
    """Refuses what does not fit, with a sentence that tells what came and what was expected."""
    given = shapes(query=query, key=key, value=value)
    named = {"query": query, "key": key, "value": value}
    dtypes = {name: jnp.result_type(a) for name, a in named.items()}
    if len(set(dtypes.values())) > 1 or not jnp.issubdtype(dtypes["query"], jnp.floating):
        told = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{WHO}: query, key and value must be of one floating-point dtype, got {told}.")
    if jnp.ndim(query) not in (3, 4) or not jnp.ndim(query) == jnp.ndim(key) == jnp.ndim(value):
        raise ValueError(f"{WHO}: query, key and value are [B, T, N, H], or [T, N, H] without a batch; got {given}.")
    if jnp.shape(key) != jnp.shape(value):
        raise ValueError(f"{WHO}: key and value must have one shape, got {given}.")
    if 0 in (*jnp.shape(query), *jnp.shape(key)):
        raise ValueError(f"{WHO}: no axis may have length 0, got {given}.")
    (b, t, n, h), (kb, s, kn, kh) = (shape if len(shape) == 4 else (1, *shape) for shape in (jnp.shape(query), jnp.shape(key)))
    if b != kb:
        raise ValueError(f"{WHO}: query is a batch of {b}, key and value of {kb} ({given}).")
    if h != kh:
        raise ValueError(f"{WHO}: a query has {h} features, a key {kh} ({given}).")
    if n % kn:
        raise ValueError(f"{WHO}: {n} query heads do not divide over {kn} heads of keys and values ({given}).")
    full = (b, n, t, s)
    for name, array in (("bias", bias), ("mask", mask)):
        own = jnp.shape(array) if array is not None else ()
        if len(own) > 4 or any(a not in (1, f) for a, f in zip(reversed(own), reversed(full))):
            raise ValueError(f"{WHO}: {name} must broadcast to [B, N, T, S] = {full}, got {own}.")
    if bias is not None and not jnp.issubdtype(jnp.result_type(bias), jnp.floating):
        raise TypeError(f"{WHO}: bias must be of a floating-point dtype, got {jnp.result_type(bias)}; booleans go to mask.")
    if mask is not None and jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"{WHO}: mask must be boolean, True where a query may see a key; got {jnp.result_type(mask)}.")
    for name, array in (("query_seq_lengths", query_seq_lengths), ("key_value_seq_lengths", key_value_seq_lengths)):
        _check_integers(name, array, (b,), "[B]")
    ids = _pair(segment_ids)
    if ids[1] is ids[0] and ids[0] is not None and t != s:
        raise ValueError(f"{WHO}: with {t} queries and {s} keys segment_ids is a pair, (those of queries, those of keys).")
    batch = jnp.shape(query)[:-3]
    for name, array, length in (("queries", ids[0], t), ("keys", ids[1], s)):
        _check_integers(f"segment_ids of {name}", array, (*batch, length), "[B, T]" if batch else "[T]")
    _check_options(scale, is_causal, local_window_size, implementation, soft_cap)


def _check_integers(name: str, array: ArrayLike | None, expected: tuple[int, ...], axes: str) -> None:
    if array is None:
        return
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise TypeError(f"{WHO}: {name} must be integers, got {jnp.result_type(array)}.")
    if jnp.shape(array) != expected:
        raise ValueError(f"{WHO}: {name} must be {axes}, here {expected}; got {jnp.shape(array)}.")


def _check_options(scale: Any, is_causal: Any, local_window_size: Any, implementation: Any, soft_cap: Any) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{WHO}: scale must be a finite number, got {scale}.")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"{WHO}: soft_cap must be a positive number or None, got {soft_cap}.")
    if not isinstance(is_causal, bool):
        raise TypeError(f"{WHO}: is_causal must be True or False, got {is_causal!r}.")
    sides = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in sides)
    if local_window_size is not None and not (whole and len(sides) == 2):
        raise ValueError(f"{WHO}: local_window_size is a number of keys or (left, right), got {local_window_size}.")
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"{WHO}: implementation must be None, 'xla' or 'cudnn', got {implementation!r}.")


# ---------------------------------------------------------------------------------------------------------- in one form


def _pair(segment_ids: Any) -> tuple[Any, Any]:
    if not isinstance(segment_ids, (tuple, list)):
        return segment_ids, segment_ids
    if len(segment_ids) != 2:
        raise ValueError(f"{WHO}: segment_ids is an array, or a pair for queries and keys; got {len(segment_ids)}.")
    return segment_ids[0], segment_ids[1]


def options_of(
    query: ArrayLike, key: ArrayLike, scale: Any, is_causal: bool, window: Window, soft_cap: Any, rate: float = 0.0
) -> Options:
    left, right = window if isinstance(window, tuple) else (window, window)
    groups = jnp.shape(query)[-2] // jnp.shape(key)[-2]
    chosen = jnp.shape(query)[-1] ** -0.5 if scale is None else float(scale)
    cap = None if soft_cap is None else float(soft_cap)
    return Options(chosen, cap, left, 0 if is_causal else right, groups, float(rate))


def inputs_of(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    segment_ids: Any,
) -> Inputs:
    query, key, value = (a if a.ndim == 4 else a[None] for a in map(jnp.asarray, (query, key, value)))
    heads = key.shape[2]

    def logits(array: ArrayLike | None) -> jax.Array | None:
        if array is None:
            return None
        b, n, t, s = (1,) * (4 - jnp.ndim(array)) + jnp.shape(array)
        return jnp.reshape(array, (b, *((1, 1) if n == 1 else (heads, n // heads)), t, s)).transpose(0, 1, 3, 2, 4)

    def ids(array: ArrayLike | None) -> jax.Array | None:
        return None if array is None else jnp.reshape(array, (query.shape[0], -1))

    lengths = (None if n is None else jnp.asarray(n) for n in (query_seq_lengths, key_value_seq_lengths))
    grouped = query.reshape(*query.shape[:2], heads, query.shape[2] // heads, query.shape[3])
    return Inputs(grouped, key, value, logits(bias), logits(mask), *lengths, *map(ids, _pair(segment_ids)))
