"""One training step, compiled: loss, gradient, optimizer, and a guard against gradients that are not finite.

A loss function takes the parameters and a batch. It may also ask, by the names of its arguments, for the model's
state and for a random key, and it may return metrics beside the loss:

    def loss_fn(params, batch):                      ->  loss
    def loss_fn(params, batch, state, key):          ->  loss, {"state": new_state, "accuracy": …}

``state`` and ``key`` may each be left out. Whatever the dictionary holds beside ``"state"`` is a metric, a scalar.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

__all__ = ["LossFn", "TrainState", "init_train_state", "make_step", "value_and_gradient"]

LossFn = Callable[..., Any]
Objective = Callable[[Any, Any, Any, Any], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]

_OWN_METRICS = ("loss", "grad_norm", "skipped")


class TrainState(NamedTuple):
    """All that changes while training: a pytree. Every random choice follows from ``key`` and ``step``."""

    params: Any
    state: Any  # the model's: running statistics; () where there is none
    opt_state: Any
    key: jax.Array
    step: jax.Array  # int32: batches seen
    skipped: jax.Array  # int32: of these, the ones whose gradient was not finite


def init_train_state(
    params: Any, optimizer: optax.GradientTransformation, *, state: Any = (), key: jax.Array | int = 0
) -> TrainState:
    """The train state before the first step, in buffers of its own, so that a donating step leaves ``params`` alone.

    Args:
      params: a pytree of floating-point arrays.
      optimizer: any optax optimizer.
      state: the model's state.
      key: a random key, or a seed.
    """
    if not jax.tree.leaves(params):
        raise ValueError("init_train_state: params holds no arrays, so there is nothing to train.")
    key = jax.random.key(key) if isinstance(key, int) else key
    zero = jnp.zeros((), jnp.int32)
    return jax.tree.map(_own_copy, TrainState(params, state, optimizer.init(params), key, zero, zero))


def _own_copy(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return jnp.copy(leaf)
    # Named, the dtype is no longer weak: the first step has the types of all later ones, and is compiled once.
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dtype: DTypeLike | None = None,
    donate: bool = True,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Gives the jitted step ``(train_state, batch) -> (train_state, metrics)``.

    The metrics are ``loss``, ``grad_norm`` (the Euclidean norm of the whole gradient), ``skipped`` (1 where the gradient
    was not finite, else 0) and those of ``loss_fn``. A skipped step leaves parameters, optimizer state and model state
    as they were, bit for bit, and adds one to ``train_state.skipped``.

    Args:
      loss_fn: as described at the head of this module.
      optimizer: any optax optimizer; those that ask for it are given ``value``, ``grad`` and ``value_fn``.
      accumulate: into how many micro-batches a batch is split, one after the other, to save memory. Losses, gradients
        and metrics are averaged: for a loss that is a mean over the examples this equals the large batch. (Batch
        norm sees the micro-batches.)
      dtype: what the loss function computes in, "bfloat16" for instance: it receives the parameters and every
        floating-point array of the batch in this dtype. Parameters, gradients, optimizer state, model state and the
        average of the losses keep their own. None: no conversion.
      donate: the step consumes the train state that it is given: its buffers become those of the new one.
    Raises:
      ValueError: for options out of range; when the step is first called, for a batch that does not split, a loss
        that is no scalar, or a model state whose structure changes.
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"make_step: accumulate is {accumulate!r}; expected a whole number of micro-batches, 1 or more.")
    gradient, value = value_and_gradient(loss_fn, accumulate=accumulate, dtype=dtype)
    update = optax.with_extra_args_support(optimizer).update

    def step(train: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        params, state, opt_state, key, count, skipped = train
        key_now = jax.random.fold_in(key, count)
        (loss, (new_state, metrics)), grads = gradient(params, batch, state, key_now)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updates, new_opt_state = update(
            grads, opt_state, params, value=loss, grad=grads, value_fn=lambda p: value(p, batch, state, key_now)
        )
        new = (optax.apply_updates(params, updates), new_state, new_opt_state)
        old = (params, state, opt_state)
        params, state, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad = 1 - finite.astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "skipped": bad, **metrics}
        return TrainState(params, state, opt_state, key, count + 1, skipped + bad), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def value_and_gradient(
    loss_fn: LossFn, *, accumulate: int = 1, dtype: DTypeLike | None = None
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """The two functions that a step is made of, each of ``(params, batch, state, key)``.

    Returns:
      ``gradient``, which returns ``((loss, (new_state, metrics)), grads)``, and ``value``, which returns the loss.
    """
    objective = _objective(loss_fn, None if dtype is None else _floating(dtype))
    one = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        return one, lambda *args: objective(*args)[0]

    def gradient(params: Any, batch: Any, state: Any, key: jax.Array) -> Any:
        def body(carry: Any, micro: Any) -> Any:
            total, state = carry
            index, micro_batch = micro
            (loss, (state, metrics)), grads = one(params, micro_batch, state, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), state), (loss, metrics)

        micro = (jnp.arange(accumulate), _split(batch, accumulate))
        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, state), losses = jax.lax.scan(body, (zeros, state), micro)
        loss, metrics = jax.tree.map(lambda values: values.mean(0), losses)
        return (loss, (state, metrics)), jax.tree.map(lambda g: g / accumulate, total)

    def value(params: Any, batch: Any, state: Any, key: jax.Array) -> jax.Array:
        def body(state: Any, micro: Any) -> Any:
            index, micro_batch = micro
            loss, (state, _) = objective(params, micro_batch, state, jax.random.fold_in(key, index))
            return state, loss

        return jax.lax.scan(body, state, (jnp.arange(accumulate), _split(batch, accumulate)))[1].mean(0)

    return gradient, value


def _objective(loss_fn: LossFn, dtype: Any) -> Objective:
    """The loss function in one form, whatever it asks for and returns: -> loss, (state, metrics)."""
    wants = _wanted(loss_fn)

    def objective(params: Any, batch: Any, state: Any, key: jax.Array) -> Any:
        given = {name: value for name, value in (("state", state), ("key", key)) if name in wants}
        result: Any = loss_fn(_cast(params, dtype), _cast(batch, dtype), **given)
        both: tuple[Any, Any] = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        loss, aux = both
        kinds = [type(loss).__name__, type(aux).__name__]
        if hasattr(loss, "shape") or isinstance(loss, (int, float)):
            kinds[0] = f"shape {jnp.shape(loss)}"
        if kinds[0] != "shape ()" or not isinstance(aux, dict):
            got = kinds[0] if isinstance(aux, dict) else f"{kinds[1]} beside the loss"
            raise ValueError(f"make_step: the loss function returned {got}; expected a scalar, or (scalar, dict of metrics).")
        metrics = {name: value for name, value in aux.items() if name != "state"}
        for name, metric in metrics.items():
            if name in _OWN_METRICS or jnp.shape(metric) != ():
                raise ValueError(
                    f"make_step: the metric {name!r} has shape {jnp.shape(metric)}; expected scalars with names "
                    f"other than {', '.join(_OWN_METRICS)}."
                )
        return _wide(loss), (_like(aux.get("state", state), state), jax.tree.map(_wide, metrics))

    return objective


def _wanted(loss_fn: LossFn) -> set[str]:
    try:
        parameters = inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        return set()
    return {name for name in ("state", "key") if name in parameters}


def _wide(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _floating(dtype: DTypeLike) -> Any:
    try:
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"make_step: dtype is {dtype!r}; expected a floating-point type such as 'bfloat16', or None.")


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _like(new: Any, old: Any) -> Any:
    """The new model state with the dtypes of the old one."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"make_step: the loss function returned a state of structure {jax.tree.structure(new)}; "
            f"expected that of the state it was given, {jax.tree.structure(old)}."
        )
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old)):
        if jnp.shape(n) != jnp.shape(o):
            raise ValueError(
                f"make_step: the loss function returned a state leaf of shape {jnp.shape(n)}; expected {jnp.shape(o)}."
            )
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)


def _split(batch: Any, parts: int) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    for path, leaf in leaves:
        shape = jnp.shape(leaf)
        if not shape or shape[0] % parts or shape[0] != jnp.shape(leaves[0][1])[0]:
            name = jax.tree_util.keystr(path) or "batch"
            raise ValueError(
                f"make_step: accumulate={parts} splits the leading axis of every array of the batch into equal parts; "
                f"{name} has shape {shape}."
            )
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (parts, jnp.shape(leaf)[0] // parts, *jnp.shape(leaf)[1:])), batch)
