"""Checkpoints of a run: the whole train state and the history so far, together, by orbax. Written whole or not at all."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from fbackprop.refusing import first_line
from fbackprop.training.step import TrainState

__all__ = ["Checkpoints", "RunError"]


class RunError(ValueError):
    """A run that cannot be started or continued as asked. The message is one sentence, and nothing was written."""


class Checkpoints:
    """The checkpoints in one folder, by step; the newest few are kept."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        self.directory = directory.absolute()
        # Synchronous: when save returns, the checkpoint is there.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, enable_async_checkpointing=False)
        self._options = options
        self._manager: Any = None

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        if not self.directory.is_dir():
            return None
        return self._open().latest_step()

    def save(self, train: TrainState, record: dict[str, Any]) -> None:
        """Saves the train state with a record that JSON can hold, under the state's step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        args = self._ocp.args
        record = {**record, "arrays": _arrays(train)}
        state = args.StandardSave(_plain(train)._asdict())
        self._open().save(int(train.step), args=args.Composite(state=state, record=args.JsonSave(record)))

    def record(self) -> dict[str, Any]:
        """The record beside the newest checkpoint.

        Raises:
          RunError: where there is no checkpoint, or one that cannot be read.
        """
        args = self._ocp.args
        return self._restore(args.Composite(record=args.JsonRestore())).record

    def restore(self, like: TrainState) -> TrainState:
        """The train state of the newest checkpoint, with the types and the devices of ``like``.

        Raises:
          RunError: where there is no checkpoint, one that cannot be read, or one of another model or optimizer.
        """
        saved, expected = self.record().get("arrays"), _arrays(like)
        if saved != expected:
            raise RunError(
                f"{self.directory}: the checkpoint is of another model or optimizer: {_difference(saved or [], expected)}."
            )
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, _plain(like)._asdict())
        restored = self._restore(self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))).state
        return _with_keys(TrainState(**restored), like)

    def params(self, like: Any) -> Any:
        """The parameters of the newest checkpoint, in the structure of ``like``, whatever they were trained with.

        Raises:
          RunError: where there is no checkpoint, one that cannot be read, or one of another model.
        """
        restored = self._restore(self._ocp.args.Composite(state=self._ocp.args.StandardRestore())).state["params"]
        found, wanted = _by_name(restored), _by_name(like)
        shapes = [[[name, str(list(leaf.shape))] for name, leaf in tree.items()] for tree in (found, wanted)]
        if sorted(shapes[0]) != sorted(shapes[1]):
            raise RunError(f"{self.directory}: the checkpoint is of another model: {_difference(*shapes)}.")
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(found[name]) for name in wanted])

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> Any:
        if self._manager is None:
            with _quiet():
                self._manager = self._ocp.CheckpointManager(self.directory, options=self._options)
        return self._manager

    def _restore(self, what: Any) -> Any:
        step = self.latest()
        if step is None:
            raise RunError(f"{self.directory}: there is no checkpoint.")
        try:
            with _quiet():
                return self._open().restore(step, args=what)
        except Exception as error:  # damage shows itself in many ways
            step_dir = self.directory / str(step)
            raise RunError(f"{step_dir}: the checkpoint cannot be read ({first_line(error)}).") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, orbax logs nothing: what goes wrong is said once, by the error."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(train: TrainState) -> TrainState:
    """Random keys as the integers they are made of."""
    return cast(TrainState, jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, train))


def _with_keys(train: TrainState, like: TrainState) -> TrainState:
    def key(leaf: Any, old: Any) -> Any:
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old)) if _is_key(old) else leaf

    return jax.tree.map(key, train, like)


def _arrays(train: TrainState) -> list[list[str]]:
    """What the train state is made of: [name, type] for each array."""
    return [[name, f"{leaf.dtype}{list(leaf.shape)}"] for name, leaf in _by_name(train).items()]


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _difference(saved: list[list[str]], expected: list[list[str]]) -> str:
    have, want = {name: kind for name, kind in saved}, {name: kind for name, kind in expected}
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            return f"{name} is {have.get(name, 'not there')}, expected {want.get(name, 'no such array')}"
    return "its arrays stand in another order"
