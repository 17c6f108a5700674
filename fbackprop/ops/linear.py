"""Linear maps: a matrix, and the lookup that is a matrix times one-hot vectors.

dense                                     embed

    y = x W + b                               y_n = E[i_n]

    dx = dy Wᵀ                                dE[v] = Σ dy_n over all n with i_n = v
    dW = xᵀ dy      summed over all rows      i is an integer: no cotangent
    db = Σ dy       over all rows

dense keeps x and W, embed the indices alone. Matrix products accumulate in float32 or wider, and so do the sums over
rows: db, and the rows of dE that a token repeats.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide_type, with_bias
from fbackprop.ops._matrices import outer_sum, product, product_transposed, row_sum
from fbackprop.ops._order import in_turn, zeros
from fbackprop.rules import Static, rule
from fbackprop.samples import labels, normal, sample

__all__ = ["dense", "embed"]


class _DenseSaved(NamedTuple):
    x: jax.Array
    kernel: jax.Array


def _dense(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    precision: Any,
    preferred_element_type: DTypeLike | None,
) -> jax.Array:
    y = product(jnp.asarray(x), jnp.asarray(kernel), precision, preferred_element_type)
    return with_bias(y, bias)


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> tuple[jax.Array, _DenseSaved]:
    y = _dense(x, kernel, bias, precision, preferred_element_type)
    return y, _DenseSaved(jnp.asarray(x), jnp.asarray(kernel))


def _backward(saved: _DenseSaved, dy: jax.Array, *, precision: Any) -> tuple[Any, ...]:
    x, kernel = saved
    g = dy.astype(jnp.result_type(x, kernel))
    dkernel = outer_sum(x, g, precision)  # xᵀ dy
    dbias = row_sum(dy)  # Σ dy
    (dkernel, dbias), g = in_turn((dkernel, dbias), g)
    dx = product_transposed(g, kernel, precision)  # dy Wᵀ
    return dx, dkernel, dbias


@rule(
    forward=_forward,
    backward=_backward,
    static=["precision", "preferred_element_type"],
    samples=[
        sample(normal(5, 4), normal(4, 3), normal(3)),
        sample(normal(2, 3, 4), normal(4, 5)),
        sample(normal(4), normal(4, 3), normal(3)),
    ],
    workloads=[
        sample(normal(2048, 768), normal(768, 3072, scale=768**-0.5), normal(3072), dtype=d) for d in ("float32", "bfloat16")
    ],
    keeps="x, kernel",
    minimum=lambda x, kernel: nbytes(x, kernel),
)
def dense(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """A fully connected layer: y = x · kernel + bias.

    x [..., in], kernel [in, out], bias [out] -> y [..., out].

    Args:
      precision: as in ``jax.lax.dot_general``; used by the backward too.
      preferred_element_type: the dtype of y; by default that of x and kernel.
    Raises:
      ValueError: where the number of features does not fit. TypeError: where an array is not floating-point.
    """
    require_float("dense", x=x, kernel=kernel, bias=bias)
    if jnp.ndim(kernel) != 2 or jnp.ndim(x) < 1:
        raise ValueError(f"dense: expected x [..., in] and kernel [in, out], got {shapes(x=x, kernel=kernel)}.")
    if jnp.shape(x)[-1] != jnp.shape(kernel)[0]:
        raise ValueError(
            f"dense: x has {jnp.shape(x)[-1]} features, kernel expects {jnp.shape(kernel)[0]} ({shapes(x=x, kernel=kernel)})."
        )
    if bias is not None and jnp.shape(bias) != jnp.shape(kernel)[1:]:
        raise ValueError(
            f"dense: bias has shape {jnp.shape(bias)}, expected {jnp.shape(kernel)[1:]} ({shapes(kernel=kernel)})."
        )
    return _dense(x, kernel, bias, precision, preferred_element_type)


class _EmbedSaved(NamedTuple):
    indices: jax.Array
    table_shape: Static


def _lookup(embedding: jax.Array, indices: jax.Array) -> jax.Array:
    return embedding.at[indices].get(mode="fill", fill_value=jnp.nan)


def _embed_forward(embedding: ArrayLike, indices: ArrayLike) -> tuple[jax.Array, _EmbedSaved]:
    embedding, indices = jnp.asarray(embedding), jnp.asarray(indices)
    return _lookup(embedding, indices), _EmbedSaved(indices, Static(embedding.shape))


def _embed_backward(saved: _EmbedSaved, dy: jax.Array) -> tuple[Any, ...]:
    table = zeros(saved.table_shape.value, wide_type(dy), dy)
    # Each row of dy is added where its token stands; rows of tokens that are not in the table are dropped.
    return table.at[saved.indices].add(dy.astype(table.dtype), mode="drop"), None


@rule(
    forward=_embed_forward,
    backward=_embed_backward,
    samples=[
        sample(normal(6, 4), labels(7, classes=6)),
        sample(normal(3, 2), labels(2, 5, classes=3)),
        sample(normal(6, 4), labels(9, classes=8, low=-8), note="negative indices, and some outside"),
        sample(normal(3, 2), labels(2, 5, classes=4, low=-4)),
    ],
    workloads=[sample(normal(50257, 768), labels(8192, classes=50257))],
    keeps="indices",
    minimum=lambda indices: nbytes(indices),
)
def embed(embedding: ArrayLike, indices: ArrayLike) -> jax.Array:
    """Looks up rows of a table: y = embedding[indices].

    embedding [vocabulary, features], indices [...] integer -> y [..., features].

    As in Flax, a negative index counts from the end, and an index outside of the table gives a row of NaN, which no
    loss hides, and no gradient.

    Raises:
      TypeError: where indices are not integers. ValueError: where the table is not a matrix.
    """
    require_float("embed", embedding=embedding)
    if not jnp.issubdtype(jnp.result_type(indices), jnp.integer):
        raise TypeError(f"embed: indices must be integers, got {jnp.result_type(indices)}.")
    if jnp.ndim(embedding) != 2:
        raise ValueError(f"embed: expected embedding [vocabulary, features], got {shapes(embedding=embedding)}.")
    return _lookup(jnp.asarray(embedding), jnp.asarray(indices))
