"""Windows that slide over an image, shared by convolution and pooling: options, padding, and its adjoint."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.ops._arithmetic import shapes

Pads = tuple[tuple[int, int], ...]
Padding = str | int | Sequence[int | tuple[int, int]]


def spatial_dimensions(who: str, x: ArrayLike, kernel: ArrayLike) -> int:
    """How many dimensions are spatial, as the kernel [*window, in, out] tells; a sentence where x or it have others."""
    dims = jnp.ndim(kernel) - 2
    if not 1 <= dims <= 3:
        raise ValueError(
            f"{who}: kernel must be [*window, in, out] with 1 to 3 spatial dimensions, got {shapes(kernel=kernel)}."
        )
    if jnp.ndim(x) < dims + 1:
        raise ValueError(
            f"{who}: x must be [..., *spatial, features] with {dims} spatial dimensions, got {shapes(x=x, kernel=kernel)}."
        )
    return dims


def per_dimension(who: str, name: str, value: int | Sequence[int] | None, dims: int) -> tuple[int, ...]:
    """An option for each spatial dimension: a single positive integer stands for all, None for 1."""
    values = (1,) * dims if value is None else (value,) * dims if isinstance(value, (int, np.integer)) else tuple(value)
    if len(values) != dims or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < 1 for v in values):
        raise ValueError(f"{who}: {name} must be a positive integer or {dims} of them, got {value!r}.")
    return tuple(int(v) for v in values)


def pads(
    who: str,
    padding: Padding,
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    *,
    names: Sequence[str] = ("SAME", "VALID"),
) -> Pads:
    """How many elements stand before and behind each spatial dimension; ``window`` is that of the dilated kernel."""
    dims = len(sizes)
    if isinstance(padding, str):
        match padding if padding in names else "":
            case "VALID":
                return ((0, 0),) * dims
            case "SAME":  # an output of size ⌈n / stride⌉, what is missing shared out, the odd one behind
                total = [max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(sizes, window, strides)]
                return tuple((t // 2, t - t // 2) for t in total)
            case "CIRCULAR" | "REFLECT":
                return tuple(((w - 1) // 2, w // 2) for w in window)
            case "CAUSAL":
                if dims != 1:
                    raise ValueError(f"{who}: CAUSAL padding is for one spatial dimension, there are {dims}.")
                return ((window[0] - 1, 0),)
            case _:
                raise ValueError(f"{who}: padding must be one of {', '.join(names)}, or integers; got {padding!r}.")
    each = (padding,) * dims if isinstance(padding, (int, np.integer)) else tuple(padding)
    pairs = tuple((p, p) if isinstance(p, (int, np.integer)) else tuple(p) for p in each)
    if len(pairs) != dims or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(f"{who}: padding must give (before, behind) ≥ 0 for {dims} spatial dimensions, got {padding!r}.")
    return tuple((int(a), int(b)) for a, b in pairs)


def check_fits(who: str, sizes: Sequence[int], window: Sequence[int], padding: Pads) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{who}: an image of {tuple(sizes)} has an empty spatial dimension, over which no window slides.")
    for n, w, (before, behind) in zip(sizes, window, padding):
        if n + before + behind < w:
            raise ValueError(
                f"{who}: a window of {tuple(window)} does not fit into an image of {tuple(sizes)} padded by {padding}."
            )


def pad_by_copying(x: jax.Array, padding: Pads, mode: str) -> jax.Array:
    """Pads the spatial dimensions of x [n, *spatial, features] with its own elements (``wrap`` or ``reflect``)."""
    return jnp.pad(x, ((0, 0), *padding, (0, 0)), mode=mode)  # type: ignore[call-overload]


def unpad_by_adding(dx: jax.Array, padding: Pads, mode: str) -> jax.Array:
    """The adjoint of ``pad_by_copying``: what was copied out comes back as a sum.

    Along each dimension the copied positions form runs that count upwards, or downwards where a reflection mirrors;
    each run is cut out, turned around if need be, and added where it came from.
    """
    for axis, (before, behind) in enumerate(padding, start=1):
        n = dx.shape[axis] - before - behind
        source = np.pad(np.arange(n), (before, behind), mode=mode)  # type: ignore[call-overload]
        steps = np.diff(source)
        total, start = None, 0
        while start < len(source):
            end = start + 1
            while end < len(source) and abs(steps[end - 1]) == 1 and steps[end - 1] == steps[start]:
                end += 1
            run = jax.lax.slice_in_dim(dx, start, end, axis=axis)
            if source[end - 1] < source[start]:
                run = jnp.flip(run, axis)
            low = int(min(source[start], source[end - 1]))
            config = [(0, 0, 0)] * dx.ndim
            config[axis] = (low, n - low - (end - start), 0)
            run = jax.lax.pad(run, jnp.zeros((), run.dtype), config)
            total = run if total is None else total + run
            start = end
        assert total is not None
        dx = total
    return dx
