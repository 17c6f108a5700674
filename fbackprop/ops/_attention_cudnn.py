"""cuDNN's attention, through JAX, for the attention rule: when it can be used, and its two halves.

cuDNN is used where its result is the one that the definition gives. What it does otherwise, or not at all, is refused with a
sentence if it was asked for, and left to the rule's own blocks if not: a mask and a bias are one array to it (a row that is
masked out whole is then the mean of the values, and a bias gets no gradient where it was broadcast over heads), and its lse
passes no gradient on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops._attention import Options

__all__ = ["CudnnSaved", "attention", "backward", "forward", "present", "refusal"]


def present(device: Any) -> bool:
    """Whether a device is a GPU that JAX runs cuDNN's attention on."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and major.isdigit() and int(major) >= 8  # AMD's are called gfx…


def refusal(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    segment_ids: Any,
    *,
    options: Options,
    return_residual: bool,
) -> str:
    """Why cuDNN cannot take a call, in words that follow "cuDNN's attention"; empty where it can."""
    dtype, queries, features = jnp.result_type(query), jnp.shape(query)[-3], jnp.shape(query)[-1]
    lengths = query_seq_lengths is not None or key_value_seq_lengths is not None
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 and float16, not in {dtype}"
    if features % 8 or features > 128:
        return f"takes a multiple of 8 features, at most 128, not {features}"
    others = {"bias": bias, "mask": mask, "segment_ids": segment_ids, "soft_cap": options.soft_cap}
    if given := [name for name, value in others.items() if value is not None]:
        return f"is not used with {given[0]}"
    if options.rate:
        return "is not used with dropout_rate"
    if return_residual:
        return "is not used with return_residual, whose cotangent it would drop"
    windowed = options.left is not None or options.right not in (None, 0)
    if windowed and options.right != 0:
        return "takes a window that ends at the query itself: is_causal=True, or (left, 0)"
    if windowed and lengths:
        return "is not used with a window and sequence lengths together"
    if options.right is not None and queries != jnp.shape(key)[-3]:
        return f"takes as many keys as queries where it is causal, not {queries} queries and {jnp.shape(key)[-3]} keys"
    return ""


IMPLEMENTATION: Any = "cudnn"  # of jax.nn


class CudnnSaved(NamedTuple):
    pullback: Any  # jax.vjp's, a pytree: query, key, value, out, lse
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None


def _seen(lengths: jax.Array | None, other: jax.Array | None, array: Any) -> Any:
    """Zeros in an array [..., t, n, h] beyond each sequence's end, and where there is nothing to attend to. What cuDNN leaves
    in such rows is not for us to rely on."""
    if lengths is None and other is None:
        return array
    position = jnp.arange(array.shape[-3])[None, :, None, None]
    some = position >= 0 if lengths is None else position < jnp.expand_dims(lengths, (1, 2, 3))
    if other is not None:
        some &= jnp.expand_dims(other > 0, (1, 2, 3))
    return jnp.where(some if array.ndim == 4 else some[0], array, 0)


def _attention(query: Any, key: Any, value: Any, options: Options, lengths: Sequence[jax.Array | None]) -> jax.Array:
    try:
        return jax.nn.dot_product_attention(
            query, key, value, scale=options.scale, is_causal=options.right == 0, query_seq_lengths=lengths[0],
            key_value_seq_lengths=lengths[1], implementation=IMPLEMENTATION,
            local_window_size=None if options.left is None else (options.left, 0),
        )  # fmt: skip
    except RuntimeError as error:
        raise RuntimeError(
            f"dot_product_attention: implementation='cudnn' needs an NVIDIA GPU and cuDNN ({error}) Leave implementation out."
        ) from error


def _whole(queries: Any, keys: Any) -> tuple[jax.Array | None, jax.Array | None]:
    return tuple(None if n is None else jnp.asarray(n, jnp.int32) for n in (queries, keys))  # type: ignore[return-value]


def attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, options: Options, query_seq_lengths: Any, key_value_seq_lengths: Any
) -> jax.Array:
    """cuDNN's attention with the gradient that JAX gives it."""
    lengths = _whole(query_seq_lengths, key_value_seq_lengths)
    return _seen(*lengths, _attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), options, lengths))


def forward(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, options: Options, query_seq_lengths: Any, key_value_seq_lengths: Any
) -> tuple[jax.Array, CudnnSaved]:
    lengths = _whole(query_seq_lengths, key_value_seq_lengths)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return _attention(query, key, value, options, lengths)

    out, pullback = jax.vjp(run, jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    return _seen(*lengths, out), CudnnSaved(pullback, *lengths)


def backward(saved: CudnnSaved, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    pullback, queries, keys = saved
    dq, dk, dv = pullback(_seen(queries, keys, dout))
    return _seen(queries, keys, dq), _seen(keys, queries, dk), _seen(keys, queries, dv)
