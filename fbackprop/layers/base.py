"""What a layer is: pure functions over parameters and state, with the backward pass callable by hand.

    params, state = layer.init(key, x)                                       x: an array or a ShapeDtypeStruct
    y = layer(params, x)                                                     inference
    y, state = layer.apply(params, x, state=state, key=key, train=True)      under jax.grad, the rules' backward passes
    y, tape = layer.forward(params, x, state=state, key=key, train=True)     by hand; the new state is tape.state
    dparams, dx = layer.backward(tape, dy)

A layer is a frozen, hashable record of its options, so it can be closed over or be static in ``jax.jit``. Parameters are
a dict with Flax's leaf names and layouts. State is ``()`` where there is none. Models are layers: there is one protocol.

A layer that is one op says only which initializers and shapes its parameters have and how parameters, input, state, key
and ``train`` become the op's arguments. The rest is written once, in ``OpLayer``: its backward is the op's, followed by
the backward of the casts between the dtypes of parameters, input and computation.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fbackprop.ops._arithmetic import float_type as float_type
from fbackprop.refusing import bound, kind

__all__ = ["Initializer", "Layer", "OpLayer", "Params", "State", "Tape"]

Initializer = Callable[..., jax.Array]
"""``initializer(key, shape, dtype) -> array``, as in jax.nn.initializers."""

Params = dict[str, Any]
"""A dict of arrays by leaf name (or, in ``serial`` and ``residual``, of the parameters of their layers)."""

State = Any
"""A dict of arrays by leaf name, ``()`` where there is none."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("saved", "state"), meta_fields=("record",))
@dataclasses.dataclass(frozen=True)
class Tape:
    """What ``forward`` keeps for ``backward``, and the new state. A pytree: it may leave and enter jitted functions.

    ``saved`` is what the op saved, or the tapes of the layers inside; ``record`` holds types and is static.
    """

    saved: Any
    state: State
    record: Any = None


class _Options(type):
    """What a layer is called with: a sentence where its options are others."""

    if not TYPE_CHECKING:  # checkers of types read the options of each layer itself

        @property
        def __signature__(cls) -> inspect.Signature:
            _, *options = inspect.signature(cls.__init__).parameters.values()
            return inspect.Signature(options)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                bound(cls.__name__, cls.__signature__, args, kwargs)  # says it in a sentence where the options are others
                raise


class Layer(metaclass=_Options):
    """The protocol. A layer with ``init``, ``apply``, ``forward`` and ``backward`` works inside all others.

    Subclasses are frozen dataclasses: ``@dataclasses.dataclass(frozen=True, repr=False)``.
    """

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        """Makes the parameters and the state.

        Args:
          key: a random key. x: an input, or a ``jax.ShapeDtypeStruct`` of its shape.
        Returns:
          ``(params, state)``; ``{}`` and ``()`` where there are none.
        Raises:
          ValueError: where the shape does not suit the layer.
        """
        raise NotImplementedError

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        """The output and the new state, to be differentiated by ``jax.grad``.

        Args:
          params, state: as ``init`` made them. x: the input.
          key: a random key, for layers that draw numbers when training. train: a Python bool.
        Raises:
          ValueError: where the layer needs a key or a state that is missing, or where shapes do not fit.
        """
        raise NotImplementedError

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        """The same output, and a tape for ``backward``. Arguments and errors as for ``apply``."""
        raise NotImplementedError

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        """The backward pass by hand.

        Args:
          tape: from ``forward``. dy: the cotangent of y, of its shape.
        Returns:
          ``(dparams, dx)``: dparams has the structure and the dtypes of params; dx is None where x holds integers.
        """
        raise NotImplementedError

    def __call__(self, params: Params, x: ArrayLike, state: State = ()) -> jax.Array:
        """The output for inference; ``state`` is needed where ``init`` gave one (batch norm's running statistics)."""
        return self.apply(params, x, state)[0]

    def __repr__(self) -> str:
        # Only what differs from the defaults: Dense(features=10).
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = [(f.name, getattr(self, f.name)) for f in fields if f.default != getattr(self, f.name)]
        words = [f"{name}={getattr(value, '__name__', None) or repr(value)}" for name, value in given]
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    def name(self) -> str:
        """What messages call the layer."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class _Record:
    """The types that the backward of an op's layer needs. Static, no arrays."""

    name: str
    params: tuple[tuple[str, Any], ...]  # dtypes
    x: Any  # dtype
    y: jax.ShapeDtypeStruct
    results: tuple[jax.ShapeDtypeStruct, ...]  # of the op, before the cast of y


class OpLayer(Layer):
    """A layer that is one op. A subclass names the op, its parameters and the arguments; see ``Dense``."""

    op: Any  # the op; ``op = staticmethod(ops.name)`` in a subclass
    input = "x"  # the name of the argument of the op that the layer's input becomes
    min_ndim = 0  # of the input
    param_dtype: Any = jnp.float32

    # What a subclass says.

    def initializers(self) -> dict[str, Initializer]:
        """The parameters' names and initializers."""
        return {}

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes, for inputs whose last axis has ``width`` elements."""
        return {}

    def shapes_for(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The same for inputs of this shape, where more than the last axis counts."""
        return self.shapes(shape[-1] if shape else 0)

    def initial_state(self, width: int) -> State:
        return ()

    def arguments(
        self, params: Params, x: jax.Array, state: State, key: Any, train: bool
    ) -> tuple[dict[str, Any], DTypeLike | None]:
        """The op's arguments by name, and the dtype of y (None: whatever the op gives)."""
        return {self.input: x}, None

    def new_state(self, state: State, results: tuple[jax.Array, ...]) -> State:
        """The state after a call, from what the op returned besides y."""
        return state

    # What follows from it.

    def init(self, key: Any, x: Any) -> tuple[Params, State]:
        require_options(self)
        if self.initializers():
            require_key(f"{self.name}.init", key)
        shape = shape_of(self.name, x)
        self._require_rank(shape)
        width = shape[-1] if shape else 0
        shapes = self.shapes_for(shape)
        if shapes and not width and self.min_ndim:
            raise ValueError(f"{self.name}.init: the last axis of x has no elements (x {shape}, layer {self!r}).")
        params = {
            leaf: initializer(jax.random.fold_in(key, i), shapes[leaf], self.param_dtype)
            for i, (leaf, initializer) in enumerate(self.initializers().items())
        }
        return params, self.initial_state(width)

    def apply(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        arguments, dtype = self._checked_arguments(params, x, state, key, train)
        y, *others = _as_tuple(self.op(**arguments))
        return y if dtype is None else y.astype(dtype), self.new_state(state, tuple(others))

    def forward(
        self, params: Params, x: ArrayLike, state: State = (), key: Any = None, train: bool = False
    ) -> tuple[jax.Array, Tape]:
        arguments, dtype = self._checked_arguments(params, x, state, key, train)
        result, saved = self.op.forward(**arguments)
        results = _as_tuple(result)
        y = results[0] if dtype is None else results[0].astype(dtype)
        types = tuple(map(_type, results))
        dtypes = tuple((name, jnp.result_type(p)) for name, p in params.items())
        record = _Record(self.name, dtypes, jnp.result_type(x), _type(y), types)
        return y, Tape(saved, self.new_state(state, results[1:]), record)

    def backward(self, tape: Tape, dy: Any) -> tuple[Params, Any]:
        record = self._checked_record(tape, dy)
        first, *others = record.results
        cotangent = jnp.asarray(dy).astype(first.dtype)
        if others:  # the new state is not differentiated
            cotangent = (cotangent, *(jnp.zeros(t.shape, t.dtype) for t in others))
        found = dict(zip(self.op.rule.arguments, self.op.backward(tape.saved, cotangent)))
        dparams = {name: found[name].astype(dtype) for name, dtype in record.params}
        dx = found[self.input]
        if dx is not None:
            dx = dx.astype(record.x) if jnp.issubdtype(record.x, jnp.inexact) else None
        return dparams, dx

    # Checks.

    def _require_rank(self, shape: tuple[int, ...]) -> None:
        if len(shape) < self.min_ndim:
            raise ValueError(
                f"{self.name}: x has {len(shape)} dimensions, expected at least {self.min_ndim} (x {shape}, layer {self!r})."
            )

    def _checked_arguments(self, params: Params, x: Any, state: State, key: Any, train: bool) -> tuple[dict[str, Any], Any]:
        require_params(self, params, self.initializers())
        x = array_of(self.name, x)
        self._require_rank(x.shape)
        shapes = self.shapes_for(x.shape)
        for leaf, value in params.items():
            if jnp.shape(value) != shapes[leaf]:
                raise ValueError(
                    f"{self.name}: {leaf} has shape {jnp.shape(value)}, expected {shapes[leaf]} (x {x.shape}, layer {self!r})."
                )
        return self.arguments(params, x, state, key, train)

    def _checked_record(self, tape: Tape, dy: Any) -> _Record:
        record = getattr(tape, "record", None)
        if not isinstance(record, _Record) or record.name != self.name:
            what = f"one of {record.name}" if isinstance(record, _Record) else f"a {type(tape).__name__}"
            raise TypeError(f"{self.name}.backward: expected the tape of {self.name}.forward, got {what}.")
        if jnp.shape(dy) != record.y.shape:
            raise ValueError(f"{self.name}.backward: dy has shape {jnp.shape(dy)}, y had {record.y.shape}.")
        return record


def require_options(layer: Layer) -> None:
    """Refuses initializers that are no functions, and dtypes that are none."""
    for field in dataclasses.fields(layer):  # type: ignore[arg-type]
        value = getattr(layer, field.name)
        if field.type is Initializer and not callable(value):
            expected = "a function of (key, shape, dtype), such as jax.nn.initializers.lecun_normal()"
            raise TypeError(f"{layer.name}: {field.name} is {value!r}, expected {expected}.")
        if field.name in ("dtype", "param_dtype") and value is not None:
            try:
                jnp.dtype(getattr(layer, field.name))
            except (TypeError, ValueError):
                raise TypeError(f"{layer.name}: {field.name} is {value!r}, expected a dtype, such as 'float32'.") from None


def require_params(layer: Layer, params: Any, expected: Collection[str]) -> None:
    """Refuses parameters that are no dict of these names."""
    if not isinstance(params, dict) or set(params) != set(expected):
        got = f"has the leaves {sorted(map(str, params))}" if isinstance(params, dict) else f"is a {type(params).__name__}"
        pair = isinstance(params, tuple) and len(params) == 2
        hint = "; init gives two things, params and state" if pair else ""
        raise ValueError(f"{layer.name}: params {got}, expected {sorted(expected)}, as init gave{hint} (layer {layer!r}).")


def require_key(who: str, key: Any) -> None:
    """Refuses what is no random key: nothing, a number, an input in its place."""
    dtype = getattr(key, "dtype", np.dtype(bool))
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == np.uint32 and np.ndim(key) == 1):
        return
    got = f"{dtype}{list(key.shape)}" if hasattr(key, "shape") else repr(key)
    raise (ValueError if key is None else TypeError)(f"{who}: key is {got}, expected a random key, such as jax.random.key(0).")


def split_key(who: str, key: Any, count: int = 2) -> Any:
    """So many keys of one."""
    require_key(who, key)
    return jax.random.split(key, count)


def fold_key(who: str, key: Any, number: int) -> Any:
    """The key of a layer among others; None where there is none."""
    if key is None:
        return None
    require_key(who, key)
    return jax.random.fold_in(key, number)


def array_of(who: str, x: Any) -> jax.Array:
    """An input as an array; refuses what is none, such as text, None or parameters."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: x is {kind(x)}, expected an array.") from None


def shape_of(who: str, x: Any) -> tuple[int, ...]:
    """The shape of an input, or of a ``jax.ShapeDtypeStruct``; refuses what has none."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return tuple(x.shape)
    return array_of(who, x).shape


def promoted(dtype: DTypeLike | None, x: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Input and parameters in the dtype to compute in: ``dtype``, or by default what they promote to."""
    dtype = float_type(x, *params.values()) if dtype is None else dtype
    return x.astype(dtype), {name: jnp.asarray(p, dtype) for name, p in params.items()}


def tuples(value: Any) -> Any:
    """Lists as tuples, at every depth: options must be hashable."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def set_option(layer: Layer, name: str, value: Any) -> None:
    """Sets a field while a frozen layer is being made."""
    object.__setattr__(layer, name, value)


def _as_tuple(result: Any) -> tuple[jax.Array, ...]:
    return result if isinstance(result, tuple) else (result,)


def _type(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
