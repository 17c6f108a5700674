"""einsum_dense: a linear map over any axes, written as an einsum of x and a kernel.

    y[o] = Σ x[l] K[k] + b          the sum over the letters of l and k that are not in o

    dx[l] = Σ dy[o] K[k]            over the letters that are not in l
    dK[k] = Σ dy[o] x[l]            over the letters that are not in k
    db    = Σ dy                    over the letters of o that are not in k

Derivation: each product x[l] K[k] enters one y[o], so each factor's cotangent is dy times the other factor, summed over all
places where it was used: the einsum with o and that operand exchanged. (So no letter may be summed in one operand alone.)
Kept are x and the kernel.
"""

import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fbackprop.ops._arithmetic import nbytes, require_float, shapes, wide
from fbackprop.rules import rule
from fbackprop.samples import normal, sample

__all__ = ["einsum_dense"]


class Letters(NamedTuple):
    """The axes of each array, an ellipsis spelled out."""

    x: str
    kernel: str
    y: str

    @property
    def bias(self) -> str:
        """The axes of the kernel that are left, in the order of y."""
        return "".join(c for c in self.y if c in self.kernel)


def letters_of(who: str, einsum_str: str, x: Any, kernel: Any) -> Letters:
    """Raises ValueError where the equation does not describe such a map, or does not fit the shapes."""
    given = f"({einsum_str!r}, {shapes(x=x, kernel=kernel)})"
    if not isinstance(einsum_str, str):
        raise TypeError(f"einsum_dense: expected an equation such as 'abc,cd->abd' {given}.")
    text = einsum_str.replace(" ", "")
    inputs, arrow, y = text.partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "," in right:
        raise ValueError(f"{who}: expected an equation of two operands with an arrow, such as 'abc,cd->abd' {given}.")
    if "..." in right or ("..." in left) != ("..." in y):
        raise ValueError(f"{who}: an ellipsis stands for axes of x that y has, too, and not for axes of the kernel {given}.")
    free = iter(c for c in string.ascii_letters if c not in text)
    spelled = "".join(next(free) for _ in range(jnp.ndim(x) - len(left.replace("...", ""))))
    found = Letters(*(part.replace("...", spelled) for part in (left, right, y)))
    sizes: dict[str, int] = {}
    for name, part, array in (("x", found.x, x), ("kernel", found.kernel, kernel)):
        if not part.isalpha() or len(set(part)) != len(part) or len(part) != jnp.ndim(array):
            raise ValueError(f"{who}: expected one letter, each once, for every axis of {name} {given}.")
        for letter, size in zip(part, jnp.shape(array)):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{who}: axis {letter} has size {sizes[letter]} in x and {size} in the kernel {given}.")
    if len(set(found.y)) != len(found.y) or set(found.y) - set(sizes):
        raise ValueError(f"{who}: the result has letters twice, or letters that no operand has {given}.")
    if alone := (set(found.x) ^ set(found.kernel)) - set(found.y):
        raise ValueError(f"{who}: {', '.join(sorted(alone))} would be summed in one operand alone {given}.")
    return found


def _einsum(of: tuple[str, str, str], a: Any, b: Any, precision: Any, preferred: DTypeLike | None = None) -> jax.Array:
    dtype = jnp.result_type(a, b)
    first, second, result = of
    operands = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return jnp.einsum(f"{first},{second}->{result}", *operands, precision=precision, preferred_element_type=preferred)


def _einsum_dense(
    x: Any, kernel: Any, bias: Any, einsum_str: str, precision: Any, preferred_element_type: DTypeLike | None
) -> jax.Array:
    letters = letters_of("einsum_dense", einsum_str, x, kernel)
    y = _einsum((letters.x, letters.kernel, letters.y), x, kernel, precision, preferred_element_type)
    if bias is None:
        return y
    return y + jnp.reshape(bias, [n if c in letters.bias else 1 for c, n in zip(letters.y, y.shape)])


class _Saved(NamedTuple):
    x: jax.Array
    kernel: jax.Array


def _forward(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    einsum_str: str,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> tuple[jax.Array, _Saved]:
    y = _einsum_dense(x, kernel, bias, einsum_str, precision, preferred_element_type)
    return y, _Saved(jnp.asarray(x), jnp.asarray(kernel))


def _backward(saved: _Saved, dy: jax.Array, *, einsum_str: str, precision: Any) -> tuple[Any, ...]:
    x, kernel = saved
    letters = letters_of("", einsum_str, x, kernel)
    g = dy.astype(jnp.result_type(x, kernel))
    dx = _einsum((letters.y, letters.kernel, letters.x), g, kernel, precision)
    dkernel = _einsum((letters.x, letters.y, letters.kernel), x, g, precision)
    dbias = wide(dy).sum([i for i, c in enumerate(letters.y) if c not in letters.bias])
    return dx, dkernel, dbias


@rule(
    forward=_forward,
    backward=_backward,
    static=["einsum_str", "precision", "preferred_element_type"],
    samples=[
        sample(normal(2, 3, 4), normal(4, 2, 5), normal(2, 5), einsum_str="...c,cnh->...nh"),
        sample(normal(3, 2, 4), normal(4, 5, 3), normal(5, 3), einsum_str="nbh,hdn->bdn"),
    ],
    workloads=[sample(normal(8, 256, 768), normal(768, 12, 64), normal(12, 64), einsum_str="...c,cnh->...nh")],
    keeps="x, kernel",
    minimum=lambda x, kernel: nbytes(x, kernel),
)
def einsum_dense(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    einsum_str: str,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """A linear map over any axes: y = einsum(einsum_str, x, kernel) + bias.

    x, kernel, bias -> y, of the axes that the equation names; bias has the axes of the kernel that are left in y, in their
    order there, as in ``flax.linen.Einsum``.

    Args:
      einsum_str: such as "...c,cnh->...nh"; an ellipsis stands for axes of x that stay.
      precision: as in ``jax.lax.dot_general``; used by the backward too.
      preferred_element_type: the dtype of y; by default that of x and kernel.
    Raises:
      ValueError: where the equation is no such map or does not fit the shapes. TypeError: where an array is not
        floating-point.
    """
    require_float("einsum_dense", x=x, kernel=kernel, bias=bias)
    letters = letters_of("einsum_dense", einsum_str, x, kernel)
    sizes = dict(zip(letters.kernel, jnp.shape(kernel)))
    if bias is not None and jnp.shape(bias) != tuple(sizes[c] for c in letters.bias):
        expected = tuple(sizes[c] for c in letters.bias)
        raise ValueError(f"einsum_dense: bias has shape {jnp.shape(bias)}, expected {expected} ({einsum_str!r}).")
    return _einsum_dense(x, kernel, bias, einsum_str, precision, preferred_element_type)
