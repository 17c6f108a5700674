"""linear_cross_entropy: the projection to a vocabulary and the cross-entropy after it, without the logits of all tokens.

For each token, with x [d], W [d, V], a label t, and sums and means over the V classes:

    z = x W + bias,   z ← c tanh(z / c) under a soft cap c,   lse = log Σ exp z,   p = exp(z − lse)

    ℓ = (1 − α) (lse − z_t) + α (lse − mean z) + ζ lse²          α label smoothing, ζ z-loss
    L = Σ w ℓ / Σ w                                              over the tokens that are kept: mean; sum and none likewise
    log p_t = z_t − lse            H = −Σ p log p = lse − Σ p z   on request, for each token

With the cotangents g of ℓ (mean: w dL / Σ w, sum: w dL, none: w dL of the token), l of log p_t and h of H:

    dz = p (a − h (log p + H)) − b 1[v = t] − g α/V,   a = g (1 + 2 ζ lse) − l,   b = g (1 − α) − l
    dz ← dz (1 − (z/c)²)                                         the slope of the cap, z after it

    dx = dz Wᵀ      dW = Σ xᵀ dz over tokens      dbias = Σ dz      dw = dL (ℓ − L) / Σ w   (mean)

Derivation: ∂lse/∂z = p gives the terms with p, z_t gives 1[v = t], and ∂H/∂z_v = −p_v (log p_v + H).

The array [tokens, V] of the logits is what costs memory, so only blocks of it are formed, in one of two schedules.

In the forward     For a block of tokens and the whole vocabulary. dz needs of the later program dL alone, a factor of all: dx
                   and dW are formed at once for dL = 1, and the backward multiplies. Three matrix products, as autodiff.
                   Kept: dx, dW, dbias. dW is added up over the blocks in float32.
In the backward    For all tokens and a block of the vocabulary. The forward adds up the sums of each row from block to block;
                   the backward forms the logits again, a fourth product, and a block of dW is finished at once, in one
                   product over all tokens that adds up in float32. Kept: x, W, labels, max z and Σ exp(z − max z).

The first is taken for reductions mean and sum without outputs for each token, where dW in float32 is small enough to hold
twice; not in float16, where gradients for dL = 1 would be below what it tells from zero when the loss is scaled later.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.ops import _vocabulary as blocks
from fbackprop.ops._arithmetic import batched, nbytes, operand_type, require_float, shapes, varying_like, wide, wide_type
from fbackprop.ops._vocabulary import Columns, Factors, Head, Sums
from fbackprop.rules import rule
from fbackprop.samples import labels as integer_labels
from fbackprop.samples import normal, positive, sample

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("none", "mean", "sum")


class _Options(NamedTuple):
    """The static arguments that the arithmetic needs."""

    label_smoothing: float
    z_loss: float
    reduction: str
    log_probs: bool
    entropy: bool


class _Rows(NamedTuple):
    """What a call asks of its tokens, one value each, in one dimension."""

    x: jax.Array  # [tokens, features]; 0 where the token has no label, for what stands there may be anything
    labels: jax.Array  # of the tokens that are kept; 0 elsewhere
    keep: jax.Array  # whether the token has a label
    weights: jax.Array  # 0 where it has none; in float32 or wider


class _Values(NamedTuple):
    """Per token: the loss without its weight, the log-probability of the label and the entropy; 0 where ignored."""

    loss: jax.Array
    log_prob: jax.Array
    entropy: jax.Array | None


class _GradientSaved(NamedTuple):
    """Schedule one: the gradient for a cotangent of 1."""

    dx: jax.Array
    dkernel: jax.Array
    dbias: jax.Array | None
    dweights: jax.Array | None


class _RecomputeSaved(NamedTuple):
    """Schedule two: what the logits are made of, and what was summed over each row of them."""

    x: jax.Array
    kernel: jax.Array
    labels: jax.Array
    bias: jax.Array | None
    weights: jax.Array | None
    top: jax.Array
    total: jax.Array
    loss: jax.Array | None  # for the cotangent of the weights
    entropy: jax.Array | None


def _in_forward(x: Any, kernel: Any, options: _Options) -> bool:
    per_token = options.reduction == "none" or options.log_probs or options.entropy
    return not per_token and blocks.accumulates(kernel) and jnp.result_type(x, kernel) != jnp.float16


def _rows(x: jax.Array, labels: jax.Array, weights: Any, ignore_index: int | None, classes: int, dtype: Any) -> _Rows:
    labels = labels.reshape(-1)
    keep = (labels >= 0) & (labels < classes)
    keep = keep if ignore_index is None else keep & (labels != ignore_index)
    each = jnp.ones(labels.shape, dtype) if weights is None else jnp.asarray(weights, dtype).reshape(-1)
    x = batched(x, 1)
    return _Rows(jnp.where(keep[:, None], x, 0), jnp.where(keep, labels, 0).astype(jnp.int32), keep, jnp.where(keep, each, 0))


def _values(sums: Sums, keep: jax.Array, options: _Options) -> _Values:
    top, total = sums.normalizer()
    log_total, alpha = jnp.log(total), options.label_smoothing
    log_prob = (sums.label - top) - log_total
    loss = -log_prob
    if sums.mean is not None:
        loss = (1 - alpha) * loss + alpha * (log_total - (sums.mean - top))
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(top + log_total)
    entropy = None if sums.moment is None else jnp.where(keep, log_total - sums.moment / total, 0)
    return _Values(jnp.where(keep, loss, 0), jnp.where(keep, log_prob, 0), entropy)


def _factors(
    normalizer: Any,
    g: jax.Array,
    l: Any,
    h: Any,
    entropy: Any,
    classes: int,
    options: _Options,
) -> Factors:
    """From the cotangents of each token's loss, log-probability and entropy."""
    top, total = normalizer
    a = g * (1 + 2 * options.z_loss * (top + jnp.log(total))) if options.z_loss else g
    b = g * (1 - options.label_smoothing)
    c = g * (options.label_smoothing / classes) if options.label_smoothing else None
    return Factors(a if l is None else a - l, b if l is None else b - l, c, h, entropy)


def _reduced(loss: jax.Array, rows_weights: jax.Array, shape: Any, reduction: str) -> jax.Array:
    weighted = loss * rows_weights
    if reduction == "none":
        return weighted.reshape(shape)
    total = jnp.sum(weighted)
    return total if reduction == "sum" else total * _one_over(jnp.sum(rows_weights))


def _one_over(weight: jax.Array) -> jax.Array:
    """1 / Σ w; 0 where no weight is kept: then the mean is 0, and so is its gradient."""
    return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))


def _value_by_classes(rows: _Rows, head: Head, options: _Options) -> Sums:
    """The sums of all rows, from block to block of the vocabulary."""
    number, length = blocks.class_blocks(rows.x.shape[0], head.classes)
    smooth = bool(options.label_smoothing)

    def one(i: Any) -> Sums:
        columns = Columns.of(i, length, head.classes)
        z = blocks.logits(rows.x, head.block(columns.start, length))
        return blocks.sums(z, rows.labels, columns, head.classes, smooth, options.entropy)

    if number == 1:
        return one(0)
    start = blocks.no_sums(rows.x.shape[0], wide_type(rows.x, head.kernel), smooth, options.entropy)
    start = varying_like(start, rows, head.kernel, head.bias)
    return jax.lax.fori_loop(0, number, lambda i, sums: blocks.merged(sums, one(i)), start)


def _backward_by_classes(
    rows: _Rows, head: Head, normalizer: Any, factors: Factors, scale: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """dx, dkernel, dbias of all rows, block by block of the vocabulary; each block of dkernel is final."""
    number, length = blocks.class_blocks(rows.x.shape[0], head.classes)
    axis = 0 if head.transposed else 1

    def one(i: Any) -> tuple[jax.Array, jax.Array, jax.Array | None, Columns]:
        columns = Columns.of(i, length, head.classes)
        part = head.block(columns.start, length)
        z = blocks.logits(rows.x, part)
        d = blocks.dlogits(z, normalizer, rows.labels, factors, columns, head.soft_cap)
        dx, dkernel, dbias = blocks.sent_back(rows.x, part, d)
        return dx, (dkernel * scale).astype(head.kernel.dtype), dbias, columns

    def body(i: Any, carry: Any) -> Any:
        dx, dkernel, dbias = carry
        more, block, dbias_block, columns = one(i)

        def put(into: jax.Array, block: jax.Array, axis: int) -> jax.Array:
            if columns.fresh is not None:  # what an earlier block held stays
                old = jax.lax.dynamic_slice_in_dim(into, columns.start, length, axis)
                block = old + block
            return jax.lax.dynamic_update_slice_in_dim(into, block, columns.start, axis)

        dbias = None if dbias is None or dbias_block is None else put(dbias, dbias_block, 0)
        return dx + more, put(dkernel, block, axis), dbias

    if number == 1:
        dx, dkernel, dbias, _ = one(0)
    else:
        dtype = wide_type(rows.x, head.kernel)
        start = (
            jnp.zeros(rows.x.shape, dtype),
            jnp.zeros(head.kernel.shape, head.kernel.dtype),
            None if head.bias is None else jnp.zeros(head.bias.shape, dtype),
        )
        start = varying_like(start, rows, head.kernel, head.bias, factors, scale)
        dx, dkernel, dbias = jax.lax.fori_loop(0, number, body, start)
    return dx * scale, dkernel, None if dbias is None else dbias * scale


def _by_tokens(rows: _Rows, head: Head, options: _Options, scale: jax.Array | None) -> Any:
    """Block by block of the tokens: each token's loss and, with ``scale``, the gradient of scale · Σ w ℓ."""
    tokens, smooth = rows.x.shape[0], bool(options.label_smoothing)
    operands = operand_type(rows.x, head.kernel)
    number, length = blocks.token_blocks(tokens, head.features, operands)
    columns = Columns.of(0, head.classes, head.classes)
    inner, outer = _inside(scale, operands)

    def body(carry: Any, block: _Rows) -> Any:
        z = blocks.logits(block.x, head)
        sums = blocks.sums(z, block.labels, columns, head.classes, smooth, False)
        loss = _values(sums, block.keep, options).loss
        if scale is None:
            return carry, (loss, None)
        normalizer = sums.normalizer()
        factors = _factors(normalizer, block.weights * inner, None, None, None, head.classes, options)
        d = blocks.dlogits(z, normalizer, block.labels, factors, columns, head.soft_cap)
        dx, dkernel, dbias = blocks.sent_back(block.x, head, d)
        kernel, bias = carry
        return (kernel + dkernel, None if bias is None else bias + dbias), (loss, (dx * outer).astype(rows.x.dtype))

    dtype, start = wide_type(rows.x, head.kernel), None
    if scale is not None:
        start = jnp.zeros(head.kernel.shape, dtype), None if head.bias is None else jnp.zeros(head.bias.shape, dtype)
        start = varying_like(start, rows, head.kernel, head.bias)
    stacked = _Rows(*blocks.by_blocks(rows, number, length))
    gradient, (loss, dx) = jax.lax.scan(body, start, stacked)
    loss = blocks.from_blocks(loss, tokens)
    if gradient is None:
        return loss, None
    dkernel, dbias = gradient
    dkernel, dbias = (dkernel * outer).astype(head.kernel.dtype), None if dbias is None else dbias * outer
    return loss, (blocks.from_blocks(dx, tokens), dkernel, dbias)


def _inside(scale: Any, operands: Any) -> tuple[Any, Any]:
    """Where a factor of the whole gradient goes: into dz, which costs nothing; below float32 to the results, because p − 1
    times it, of one sign for all tokens, would not be rounded at random."""
    return (1, scale) if jnp.finfo(operands).bits < 32 else (scale, 1)


def _parts(
    x: ArrayLike, kernel: ArrayLike, labels: ArrayLike, bias: Any, weights: Any, ignore_index: Any, soft_cap: Any,
    transposed: bool,
) -> tuple[_Rows, Head]:  # fmt: skip
    head = Head(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias), transposed, soft_cap)
    dtype = wide_type(x, kernel)
    return _rows(jnp.asarray(x), jnp.asarray(labels), weights, ignore_index, head.classes, dtype), head


def _result(values: _Values, rows: _Rows, shape: Any, options: _Options) -> Any:
    loss = _reduced(values.loss, rows.weights, shape, options.reduction)
    if not (options.log_probs or options.entropy):
        return loss
    more = [values.log_prob] if options.log_probs else []
    if options.entropy and values.entropy is not None:
        more.append(values.entropy)
    # Under vmap every output has to depend on all that the backward reads, the weights too, or jax 0.10 mixes the members up.
    return (loss, *(jnp.where(rows.weights == 0, v, v).reshape(shape) for v in more))


def _primal(
    x: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    transposed: bool = False,
    return_log_probs: bool = False,
    return_entropy: bool = False,
) -> Any:
    options = _Options(label_smoothing, z_loss, reduction, return_log_probs, return_entropy)
    rows, head = _parts(x, kernel, labels, bias, weights, ignore_index, soft_cap, transposed)
    if _in_forward(x, kernel, options):
        return _reduced(_by_tokens(rows, head, options, None)[0], rows.weights, (), reduction)
    return _result(_values(_value_by_classes(rows, head, options), rows.keep, options), rows, jnp.shape(labels), options)


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    transposed: bool = False,
    return_log_probs: bool = False,
    return_entropy: bool = False,
) -> Any:
    options = _Options(label_smoothing, z_loss, reduction, return_log_probs, return_entropy)
    rows, head = _parts(x, kernel, labels, bias, weights, ignore_index, soft_cap, transposed)
    if _in_forward(x, kernel, options):
        scale = _one_over(jnp.sum(rows.weights)) if reduction == "mean" else jnp.ones((), rows.weights.dtype)
        loss, (dx, dkernel, dbias) = _by_tokens(rows, head, options, scale)
        y = _reduced(loss, rows.weights, (), reduction)
        dweights = _dweights(loss, rows, scale, options).reshape(jnp.shape(labels))
        dweights = dweights.astype(jnp.result_type(weights)) if _differentiable(weights) else None
        dbias = None if head.bias is None or dbias is None else dbias.astype(head.bias.dtype)
        return y, _GradientSaved(dx.reshape(jnp.shape(x)), dkernel, dbias, dweights)
    sums = _value_by_classes(rows, head, options)
    values = _values(sums, rows.keep, options)
    y = _result(values, rows, jnp.shape(labels), options)
    saved = _RecomputeSaved(
        jnp.asarray(x), head.kernel, jnp.asarray(labels), head.bias, None if weights is None else jnp.asarray(weights),
        *sums.normalizer(), values.loss if _differentiable(weights) else None, values.entropy,
    )  # fmt: skip
    return y, saved


def _differentiable(weights: Any) -> bool:
    """A mask in place of weights has no gradient."""
    return weights is not None and jnp.issubdtype(jnp.result_type(weights), jnp.inexact)


def _dweights(loss: jax.Array, rows: _Rows, scale: jax.Array, options: _Options) -> jax.Array:
    """The cotangent of the weights for a cotangent of 1, or of ``scale`` in place of it: ℓ, or for the mean (ℓ − L) / Σ w."""
    if options.reduction == "mean":
        loss = loss - jnp.sum(loss * rows.weights) * _one_over(jnp.sum(rows.weights))
    return jnp.where(rows.keep, loss * scale, 0)


def _backward(
    saved: _GradientSaved | _RecomputeSaved,
    dy: Any,
    *,
    ignore_index: int | None,
    label_smoothing: float,
    soft_cap: float | None,
    z_loss: float,
    reduction: str,
    transposed: bool,
    return_log_probs: bool,
    return_entropy: bool,
) -> tuple[Any, ...]:
    if isinstance(saved, _GradientSaved):
        dx, dkernel, dbias, dweights = (None if d is None else wide(d) * dy for d in saved)
        return dx, dkernel, None, dbias, dweights
    options = _Options(label_smoothing, z_loss, reduction, return_log_probs, return_entropy)
    rows, head = _parts(saved.x, saved.kernel, saved.labels, saved.bias, saved.weights, ignore_index, soft_cap, transposed)
    dloss, *more = dy if isinstance(dy, tuple) else (dy,)
    l = jnp.where(rows.keep, more.pop(0).reshape(-1), 0) if return_log_probs else None
    h = jnp.where(rows.keep, more.pop(0).reshape(-1), 0) if return_entropy else None
    scale = dloss.reshape(-1) if reduction == "none" else dloss
    if reduction == "mean":
        scale = scale * _one_over(jnp.sum(rows.weights))
    dweights = None
    if saved.loss is not None:
        dweights = _dweights(saved.loss, rows, scale, options).reshape(saved.labels.shape)
    per_token = reduction == "none" or return_log_probs or return_entropy
    inner, outer = (scale, 1) if per_token else _inside(scale, operand_type(saved.x, saved.kernel))
    normalizer = saved.top, saved.total
    factors = _factors(normalizer, rows.weights * inner, l, h, saved.entropy, head.classes, options)
    dx, dkernel, dbias = _backward_by_classes(rows, head, normalizer, factors, outer)
    return dx.reshape(saved.x.shape), dkernel, None, dbias, dweights


def _minimum(
    x: Any, kernel: Any, labels: Any, bias: Any, weights: Any, reduction: str, return_log_probs: bool, return_entropy: bool
) -> int:
    if _in_forward(x, kernel, _Options(0.0, 0.0, reduction, return_log_probs, return_entropy)):
        return nbytes(x, kernel, bias, weights if _differentiable(weights) else None)
    numbers = 2 + _differentiable(weights) + return_entropy  # of each token: max z, Σ exp(z − max z), ℓ, H
    return nbytes(x, kernel, labels, bias, weights) + numbers * jnp.size(labels) * wide_type(x, kernel).itemsize


def _check(
    x: ArrayLike, kernel: ArrayLike, labels: ArrayLike, bias: Any, weights: Any, label_smoothing: float, soft_cap: Any,
    reduction: str, transposed: bool,
) -> None:  # fmt: skip
    who, layout = "linear_cross_entropy", "[classes, features]" if transposed else "[features, classes]"
    require_float(who, x=x, kernel=kernel, bias=bias)
    if jnp.ndim(kernel) != 2 or jnp.ndim(x) < 1:
        raise ValueError(f"{who}: expected x [..., features] and kernel {layout}, got {shapes(x=x, kernel=kernel)}.")
    features, classes = jnp.shape(kernel)[:: -1 if transposed else 1]
    if jnp.shape(x)[-1] != features:
        raise ValueError(
            f"{who}: x has {jnp.shape(x)[-1]} features, kernel expects {features} ({shapes(x=x, kernel=kernel)}, "
            f"kernel {layout}; transposed={not transposed} takes the other layout)."
        )
    if classes == 0:
        raise ValueError(f"{who}: kernel has no classes ({shapes(kernel=kernel)}, {layout}).")
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{who}: labels must be integers, got {jnp.result_type(labels)}.")
    for name, array in {"labels": labels, "weights": weights}.items():
        if array is not None and jnp.shape(array) != jnp.shape(x)[:-1]:
            raise ValueError(
                f"{who}: {name} must have the shape of x without the features, got {shapes(x=x, **{name: array})}."
            )
    if bias is not None and jnp.shape(bias) != (classes,):
        raise ValueError(f"{who}: bias has shape {jnp.shape(bias)}, expected ({classes},) ({shapes(kernel=kernel)}).")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{who}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{who}: label_smoothing must lie in [0, 1], got {label_smoothing}.")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{who}: soft_cap must be positive, or None for no cap; got {soft_cap}.")


_STATIC = (
    "ignore_index", "label_smoothing", "soft_cap", "z_loss", "reduction", "transposed", "return_log_probs", "return_entropy",
)  # fmt: skip


@rule(
    forward=_forward,
    backward=_backward,
    primal=_primal,
    static=_STATIC,
    samples=[
        sample(
            normal(2, 3, 4), normal(7, 4), integer_labels(2, 3, classes=2, low=-1), normal(7), weights=positive(2, 3),
            label_smoothing=0.1, soft_cap=2.0, z_loss=0.1, transposed=True,
        ),
        sample(
            normal(2, 3, 4), normal(4, 7), integer_labels(2, 3, classes=8, low=-1), normal(7), weights=positive(2, 3),
            label_smoothing=0.2, z_loss=0.1, reduction="none", return_log_probs=True, return_entropy=True,
        ),
        sample(normal(6, 4), normal(4, 5), integer_labels(6, classes=5), ignore_index=2, reduction="sum"),
    ],
    workloads=[
        sample(
            normal(2048, 256), normal(256, 50257, scale=256**-0.5), integer_labels(2048, classes=50257), note="reduction mean",
            dtype=d,
        )
        for d in ("float32", "bfloat16")
    ],
    keeps="dx, dkernel, dbias; or x, kernel, labels, two numbers a token",
    minimum=_minimum,
)  # fmt: skip
def linear_cross_entropy(
    x: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    transposed: bool = False,
    return_log_probs: bool = False,
    return_entropy: bool = False,
) -> Any:
    """Cross-entropy of softmax(x · kernel + bias) against one class for each token; the logits are never formed as a whole.

    x [..., d], kernel [d, V], labels [...] integer -> the loss, a scalar or [...], in float32 or wider.

    A label that is ``ignore_index``, or that is no class (negative, or V and more), leaves its token out, whatever x is there:
    it costs nothing, has no gradient, and its weight does not count in the mean. A mean over no weight at all is 0.

    Args:
      bias: [V]. weights: a factor of the loss of each token, [...]; it has a gradient, unless it is a mask or integers.
      ignore_index: the label of tokens to leave out; None if there is none.
      label_smoothing: the share of the label that is spread evenly over all V classes.
      soft_cap: c replaces the logits by c · tanh(logits / c).
      z_loss: the factor of (log Σ exp logits)², which keeps the logits near zero.
      reduction: "mean" (Σ weights · loss / Σ weights, over the tokens that are kept), "sum" or "none".
      transposed: kernel is [V, d], as the table of an embedding.
      return_log_probs, return_entropy: also return, for each token, the log-probability of its label and the entropy of its
        distribution, [...], after the loss and in this order; without weights and smoothing, 0 for tokens that are left out.
    Raises:
      TypeError: where x, kernel or bias are not floating-point or labels not integers. ValueError: where the shapes do not
        fit, or an option is not one of those above.
    Source: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989; Szegedy et al. 2015, arXiv:1512.00567.
    """
    _check(x, kernel, labels, bias, weights, label_smoothing, soft_cap, reduction, transposed)
    options = _Options(label_smoothing, z_loss, reduction, return_log_probs, return_entropy)
    rows, head = _parts(x, kernel, labels, bias, weights, ignore_index, soft_cap, transposed)
    z = blocks.logits(rows.x, head)
    log_p = jax.nn.log_softmax(z)
    log_prob = jnp.take_along_axis(log_p, rows.labels[:, None], axis=-1)[:, 0]
    loss = -log_prob
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * jnp.mean(log_p, -1)
    if z_loss:
        loss = loss + z_loss * jnp.square(jax.nn.logsumexp(z, -1))
    possible = log_p > -jnp.inf
    entropy = -jnp.sum(jnp.exp(log_p) * jnp.where(possible, log_p, 0), -1) if return_entropy else None
    entropy = None if entropy is None else jnp.where(rows.keep, entropy, 0)
    values = _Values(jnp.where(rows.keep, loss, 0), jnp.where(rows.keep, log_prob, 0), entropy)
    return _result(values, rows, jnp.shape(labels), options)
