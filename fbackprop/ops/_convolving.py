"""The three bilinear maps of a convolution, shared by convolution and its transpose.

One spatial dimension, one group; o counts outputs, t kernel taps, s the stride, d the kernel's dilation, a the padding in
front, X the padded x:

    y[o, f]     = Σ_t Σ_c X[o s + t d, c] K[t, c, f]          convolve
    dX[P, c]    = Σ_f Σ_{o s + t d = P} dy[o, f] K[t, c, f]   input_cotangent
    dK[t, c, f] = Σ_n Σ_o X[o s + t d, c] dy[o, f]            kernel_cotangent

Which form suits which shape:

one group     one convolution of the compiler's for each map. dX: dy with s − 1 zeros between neighbours, convolved with the
              kernel turned around, c and f exchanged. dK: x convolved with dy as a kernel dilated by s, moved in strides of
              d; the batch is what is summed over.
groups        elsewhere than on a CPU the compiler's ``feature_group_count`` and ``batch_group_count``. On a CPU
depthwise     (one feature in and out a group) there is nothing to multiply matrices for: each map is a sum over taps of
              shifted products. y reads every s-th element of X; dK sums each tap's product over n and o, all taps in one
              pass over x and dy. dX gathers: write P = q s + r, 0 ≤ r < s. Tap t reaches the places of one r only,
              r = t d mod s, from the output o = q − m, m = ⌊t d / s⌋, so

                  dX[q s + r] = Σ_{t: t d mod s = r} dy[q − ⌊t d / s⌋] K[t]

              is a sum for each r, and the s results are interleaved: no zeros between the neighbours of dy.
others        on a CPU, where the compiler's own forms run one group after another, feature by feature: the features are cut
              into parts of one or more groups, each a convolution of one group (a part of several groups has a kernel of
              blocks, with zeros between them, and the blocks of its dK are cut out).
thin x        on a CPU, where x has one feature, as in the first layer of a network on grey images, and there are no more taps
              than features out: dK is the product of a matrix, for each tap a row of elements of X, with dy as it lies.

Half precision is summed in float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.ops._arithmetic import wide
from fbackprop.ops._windows import Pads

_MOST_TAPS = 64  # of a depthwise kernel that is summed tap by tap: each is a few operations in the program
_NARROW = 16  # features that make a convolution worth its overhead
_MOST_PARTS = 32


class Geometry(NamedTuple):
    """One number for each spatial dimension; ``pads`` may be negative, which cuts."""

    strides: tuple[int, ...]
    pads: Pads
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int
    precision: Any


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """x [n, *spatial, in], kernel [*taps, in / groups, out] -> y [n, *spatial', out]."""
    if geometry.groups == 1:
        return _convolve(x, kernel, geometry)
    cpu = _convolve_depthwise if _is_depthwise(kernel, geometry) else _convolve_parts
    return _by_platform(cpu, _convolve, x, kernel, geometry)


def _convolve_depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    padded, taps = _padded(wide(x), geometry), wide(kernel)
    return _sum([v * _weights(taps, t) for t, v in _shifted(padded, kernel.shape[:-2], geometry)]).astype(x.dtype)


def _convolve_parts(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    parts, g = _parts(kernel, geometry), geometry._replace(groups=1)
    kernels = _blocks(kernel, geometry.groups, parts)
    return jnp.concatenate([_convolve(a, k, g) for a, k in zip(jnp.split(x, parts, -1), kernels)], -1)


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.pads,
        geometry.input_dilation,
        geometry.kernel_dilation,
        numbers("NSC", "SIO", "NSC", len(geometry.strides)),
        geometry.groups,
        precision=geometry.precision,
    )


def input_cotangent(dy: jax.Array, kernel: jax.Array, sizes: Sequence[int], geometry: Geometry) -> jax.Array:
    """dy [n, *spatial', out], kernel [*taps, in / groups, out] -> dx [n, *sizes, in]."""
    if geometry.groups == 1:
        return _input_cotangent(dy, kernel, sizes, geometry)
    cpu = _input_cotangent_depthwise if _is_depthwise(kernel, geometry) else _input_cotangent_parts
    return _by_platform(cpu, _input_cotangent, dy, kernel, tuple(sizes), geometry)


def _input_cotangent_parts(dy: jax.Array, kernel: jax.Array, sizes: Sequence[int], geometry: Geometry) -> jax.Array:
    parts, g = _parts(kernel, geometry), geometry._replace(groups=1)
    kernels = _blocks(kernel, geometry.groups, parts)
    return jnp.concatenate([_input_cotangent(a, k, sizes, g) for a, k in zip(jnp.split(dy, parts, -1), kernels)], -1)


def _input_cotangent(dy: jax.Array, kernel: jax.Array, sizes: Sequence[int], geometry: Geometry) -> jax.Array:
    # A position of X is met by all windows that reach it, so dy gets reach − 1 − a zeros in front. What the windows never
    # reach behind makes the output up to the size of X.
    spread, covered, reach = _extents(sizes, dy.shape[1:-1], kernel.shape[:-2], geometry)
    front = [r - 1 - a for r, (a, _) in zip(reach, geometry.pads)]
    behind = [n + r - 1 - c - f for n, r, c, f in zip(spread, reach, covered, front)]
    # With c and f exchanged by name alone compilers see the backward of a convolution, for which cuDNN has an algorithm.
    turned = jax.lax.rev(kernel, range(kernel.ndim - 2))
    return jax.lax.conv_general_dilated(
        dy,
        turned if geometry.groups == 1 else _exchanged(turned, geometry.groups),
        geometry.input_dilation,
        list(zip(front, behind)),
        geometry.strides,
        geometry.kernel_dilation,
        numbers("NSC", "SOI" if geometry.groups == 1 else "SIO", "NSC", len(sizes)),
        geometry.groups,
        precision=geometry.precision,
    )


def kernel_cotangent(x: jax.Array, dy: jax.Array, shape: Sequence[int], geometry: Geometry) -> jax.Array:
    """x [n, *spatial, in], dy [n, *spatial', out] -> dkernel of ``shape``, [*taps, in / groups, out]."""
    if geometry.groups == 1:
        if not _is_thin(shape, geometry):
            return _kernel_cotangent(x, dy, shape, geometry)
        return _by_platform(_kernel_cotangent_thin, _kernel_cotangent, x, dy, tuple(shape), geometry)
    depthwise = _is_depthwise(jax.ShapeDtypeStruct(tuple(shape), x.dtype), geometry)
    cpu = _kernel_cotangent_depthwise if depthwise else _kernel_cotangent_parts
    return _by_platform(cpu, _kernel_cotangent, x, dy, tuple(shape), geometry)


def _kernel_cotangent_depthwise(x: jax.Array, dy: jax.Array, shape: Sequence[int], geometry: Geometry) -> jax.Array:
    padded, cotangent = _padded(wide(x), geometry), wide(dy)
    products = tuple(v * cotangent for _, v in _shifted(padded, shape[:-2], geometry))
    # One reduction of several operands: the compiler reads x and dy once for all taps.
    zeros = (np.zeros((), products[0].dtype),) * len(products)
    within = jax.lax.reduce(products, zeros, lambda a, b: tuple(map(jax.lax.add, a, b)), tuple(range(1, dy.ndim - 1)))
    return jnp.stack(within).sum(1).reshape(shape).astype(x.dtype)


def _kernel_cotangent_thin(x: jax.Array, dy: jax.Array, shape: Sequence[int], geometry: Geometry) -> jax.Array:
    rows = math.prod(dy.shape[:-1])
    met = jnp.stack([v.reshape(rows) for _, v in _shifted(_padded(x, geometry), shape[:-2], geometry)])
    matrix, dtype = dy.reshape(rows, dy.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(met, matrix, precision=geometry.precision, preferred_element_type=dtype).reshape(shape).astype(x.dtype)


def _kernel_cotangent_parts(x: jax.Array, dy: jax.Array, shape: Sequence[int], geometry: Geometry) -> jax.Array:
    parts = _parts(jax.ShapeDtypeStruct(tuple(shape), x.dtype), geometry)
    g, each = geometry._replace(groups=1), geometry.groups // parts
    whole = (*shape[:-2], shape[-2] * each, shape[-1] // parts)
    dense = [_kernel_cotangent(a, b, whole, g) for a, b in zip(jnp.split(x, parts, -1), jnp.split(dy, parts, -1))]
    return jnp.concatenate([block for part in dense for block in _diagonal(part, each)], -1)


def _kernel_cotangent(x: jax.Array, dy: jax.Array, shape: Sequence[int], geometry: Geometry) -> jax.Array:
    spread, covered, _ = _extents(x.shape[1:-1], dy.shape[1:-1], shape[:-2], geometry)
    # Tap t reads X from t d on. The padding behind is what lets the last tap end with the last window.
    ends = [(k - 1) * d + c for k, d, c in zip(shape[:-2], geometry.kernel_dilation, covered)]
    dkernel = jax.lax.conv_general_dilated(
        x,
        dy,
        geometry.kernel_dilation,
        [(a, e - n - a) for (a, _), e, n in zip(geometry.pads, ends, spread)],
        geometry.input_dilation,
        geometry.strides,
        numbers("CSN", "ISO", "NSC", len(spread)),
        batch_group_count=geometry.groups,
        precision=geometry.precision,
    )
    return jnp.moveaxis(dkernel, 0, -2)  # [in, *taps, out] -> [*taps, in, out]


def numbers(lhs: str, rhs: str, out: str, dims: int) -> Any:
    """Dimension numbers from 'N', 'S' (all spatial dimensions), 'C' and so on, as in ``NSC``, ``SIO``, ``NSC``."""
    spatial = "DHW"[3 - dims :]
    return tuple(spec.replace("S", spatial) for spec in (lhs, rhs, out))


def _extents(sizes: Sequence[int], out: Sequence[int], taps: Sequence[int], geometry: Geometry) -> tuple[list[int], ...]:
    """Along each spatial dimension: x with its zeros, dy with its zeros, how far the kernel reaches."""
    spread = [(n - 1) * l + 1 for n, l in zip(sizes, geometry.input_dilation)]
    covered = [(n - 1) * s + 1 for n, s in zip(out, geometry.strides)]
    return spread, covered, [(k - 1) * d + 1 for k, d in zip(taps, geometry.kernel_dilation)]


def _exchanged(kernel: jax.Array, groups: int) -> jax.Array:
    """Input and output features exchanged within each group."""
    *taps, cin, cout = kernel.shape
    grouped = kernel.reshape(*taps, cin, groups, cout // groups)
    return jnp.swapaxes(grouped, -1, -3).reshape(*taps, cout // groups, groups * cin)


def _is_depthwise(kernel: Any, geometry: Geometry) -> bool:
    *taps, cin, cout = kernel.shape
    small = math.prod(taps) <= _MOST_TAPS and max(geometry.input_dilation) == 1
    return small and cin == 1 and 1 < cout == geometry.groups


def _is_thin(kernel: Sequence[int], geometry: Geometry) -> bool:
    """Whether x has one feature and, once for each tap, takes no more memory than y."""
    return kernel[-2] == 1 and math.prod(kernel[:-2]) <= kernel[-1] and max(geometry.input_dilation) == 1


def _padded(x: jax.Array, geometry: Geometry) -> jax.Array:
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((a, b, 0) for a, b in geometry.pads), (0, 0, 0)])


def _shifted(x: jax.Array, taps: Sequence[int], geometry: Geometry) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """For each tap the elements of the padded x that it meets, one for each output."""
    strides = geometry.strides
    out = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[1:-1], taps, geometry.kernel_dilation, strides)]
    for t in np.ndindex(*taps):
        start = [k * d for k, d in zip(t, geometry.kernel_dilation)]
        stop = [i + (o - 1) * s + 1 for i, o, s in zip(start, out, strides)]
        yield t, jax.lax.slice(x, [0, *start, 0], [x.shape[0], *stop, x.shape[-1]], [1, *strides, 1])


def _weights(kernel: jax.Array, tap: Sequence[int]) -> jax.Array:
    """One tap of a depthwise kernel, a number for each feature, ready to multiply with images."""
    return jax.lax.expand_dims(kernel[(*tap, 0)], range(kernel.ndim - 1))


def _sum(arrays: Sequence[jax.Array]) -> jax.Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _input_cotangent_depthwise(dy: jax.Array, kernel: jax.Array, sizes: Sequence[int], geometry: Geometry) -> jax.Array:
    """dX[q s + r] = Σ dy[q − ⌊t d / s⌋] K[t] over the taps with t d mod s = r; then the padding is cut off."""
    dtype, dy, kernel = dy.dtype, wide(dy), wide(kernel)
    taps, strides = kernel.shape[:-2], geometry.strides
    # Tiles of s places that hold all of x; dy is padded so that q − m is always there.
    tiles = [-(-(a + n) // s) for (a, _), n, s in zip(geometry.pads, sizes, strides)]
    most = [(k - 1) * d // s for k, d, s in zip(taps, geometry.kernel_dilation, strides)]
    config = [(m, t - o, 0) for m, t, o in zip(most, tiles, dy.shape[1:-1])]
    padded = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    terms: dict[tuple[int, ...], list[jax.Array]] = {r: [] for r in np.ndindex(*strides)}
    for t in np.ndindex(*taps):
        m, r = zip(*(divmod(k * d, s) for k, d, s in zip(t, geometry.kernel_dilation, strides)))
        start = [a - b for a, b in zip(most, m)]
        stop = [i + n for i, n in zip(start, tiles)]
        there = jax.lax.slice(padded, [0, *start, 0], [dy.shape[0], *stop, dy.shape[-1]])
        terms[r].append(there * _weights(kernel, t))
    nothing = jnp.zeros((dy.shape[0], *tiles, dy.shape[-1]), dy.dtype)
    parts = [_sum(own) if own else nothing for own in terms.values()]
    for axis in reversed(range(1, 1 + len(tiles))):  # the last dimension's results lie next to each other in the list
        s = strides[axis - 1]
        groups = [parts[i : i + s] for i in range(0, len(parts), s)]
        shape = [*parts[0].shape[:axis], parts[0].shape[axis] * s, *parts[0].shape[axis + 1 :]]
        parts = [own[0] if s == 1 else jnp.stack(own, axis + 1).reshape(shape) for own in groups]
    start = [a for a, _ in geometry.pads]
    stop = [a + n for a, n in zip(start, sizes)]
    return jax.lax.slice(parts[0], [0, *start, 0], [dy.shape[0], *stop, dy.shape[-1]]).astype(dtype)


def _by_platform(cpu: Callable[..., jax.Array], default: Callable[..., jax.Array], a: Any, b: Any, *static: Any) -> jax.Array:
    def form(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda a, b: fn(a, b, *static)

    return jax.lax.platform_dependent(a, b, cpu=form(cpu), default=form(default))


def _parts(kernel: Any, geometry: Geometry) -> int:
    """Into how many convolutions of one group a grouped one is cut."""
    groups, (cin, cout) = geometry.groups, kernel.shape[-2:]
    narrow = min(cin, cout // groups)
    return next(
        p
        for p in range(groups, 0, -1)
        if groups % p == 0 and (p == 1 or (p <= _MOST_PARTS and narrow * groups // p >= _NARROW))
    )


def _blocks(kernel: jax.Array, groups: int, parts: int) -> list[jax.Array]:
    """A kernel of one group for each part: blocks along the diagonal, zeros between the groups."""
    *taps, cin, cout = kernel.shape
    each, width = groups // parts, cout // groups
    kernels = jnp.split(kernel, parts, -1)
    if each == 1:
        return kernels
    own = np.eye(each, dtype=bool).reshape(*(1,) * len(taps), each, 1, each, 1)
    spread = (jnp.where(own, k.reshape(*taps, 1, cin, each, width), 0) for k in kernels)
    return [k.reshape(*taps, each * cin, each * width) for k in spread]


def _diagonal(kernel: jax.Array, groups: int) -> list[jax.Array]:
    """The blocks of a kernel that ``_blocks`` could have made."""
    cin, cout = (n // groups for n in kernel.shape[-2:])
    return [kernel[..., i * cin : (i + 1) * cin, i * cout : (i + 1) * cout] for i in range(groups)]
