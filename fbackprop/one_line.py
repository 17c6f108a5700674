"""The one-line form of a rule, for functions of single elements: only the derivative is written.

y = f(x)        dx = dy · f′(x)        and a smaller argument that was broadcast receives the sum
y = f(p − t)    dp = dy · f′(p − t)    dt = −dp, for which ``opposite`` stands: the product is not taken twice
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from fbackprop.rules import Op, Static, rule
from fbackprop.samples import Sample, normal, sample

__all__ = ["elementwise", "opposite"]

P = ParamSpec("P")
R = TypeVar("R")


def opposite() -> None:
    """Stands for the opposite of the derivative before it, as that of p − t with respect to t is of that to p."""


def elementwise(
    *derivatives: Callable[..., Any],
    narrow: Sequence[Callable[..., Any]] | None = None,
    between: Mapping[str, Callable[..., Any]] | None = None,
    static: Sequence[str] = (),
    exact: bool = True,
    samples: Sequence[Sample] | None = None,
    workloads: Sequence[Sample] | None = None,
    keeps: str = "",
    minimum: Callable[..., int] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """The one-line form of a rule: ``@elementwise(lambda y: y * (1 - y))`` over ``def sigmoid(x)``.

    Args:
      derivatives: one function for each argument that is not static, the derivative of the output with respect to it,
        as a function of any of the arguments and of the output ``y``, by name; or ``opposite``. What no derivative names is
        not kept. They compute in float32 or wider, and a smaller argument that was broadcast receives the sum.
      narrow: the derivatives to use where x is narrower than float32: a rounded y may say less than x does.
      between: more values that derivatives may name, such as one error in place of a prediction and a target: by name, as
        functions of any of the arguments, by name.
      static, exact, samples, workloads, keeps, minimum: as for ``rule``. By default arrays for a function of one argument.
    """

    def register(reference: Callable[P, R]) -> Op[P, R]:
        parameters = tuple(inspect.signature(reference).parameters)
        arguments = tuple(n for n in parameters if n not in static)
        forms = (derivatives, derivatives if narrow is None else tuple(narrow))
        inner = dict(between or {})
        for form in forms:
            if len(form) != len(arguments):
                raise TypeError(
                    f"rule {reference.__name__}: {len(form)} derivatives for {', '.join(arguments)}; expected one each."
                )
            if form[:1] == (opposite,):
                raise TypeError(f"rule {reference.__name__}: opposite stands behind a derivative, got it for {arguments[0]}.")
            if unknown := {n for d in form for n in inspect.signature(d).parameters} - {*parameters, *inner, "y"}:
                raise TypeError(
                    f"rule {reference.__name__}: a derivative names {sorted(unknown)}; known are {(*parameters, *inner)} and y."
                )

        def chosen(dtype: Any) -> tuple[Callable[..., Any], ...]:
            return forms[bool(jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32)]

        def forward(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            bound = {name: value for name, value in kwargs.items() if name not in static}
            y: Any = reference(*args, **kwargs)
            named = {n for d in chosen(y.dtype) for n in inspect.signature(d).parameters}
            absent = ((), bool)  # an optional argument that was not given: no cotangent
            shapes = tuple(absent if v is None else (jnp.shape(v), jnp.result_type(v)) for v in map(bound.get, arguments))
            known = {**bound, "y": y, **{n: _given(f, kwargs) for n, f in inner.items() if n in named}}
            kept = {n: v for n, v in known.items() if n in named}
            return y, (kept, Static(shapes))

        def backward(saved: Any, dy: Any, **options: Any) -> tuple[Any, ...]:
            kept, shapes = saved
            wide = jnp.promote_types(dy.dtype, jnp.float32)
            known = {**{n: _widen(v, wide) for n, v in kept.items()}, **options}

            @functools.cache
            def product(derivative: Callable[..., Any]) -> jax.Array:
                """The chain rule for a function of single elements: d<argument> = dy · slope. A slope of True and False
                selects: 0 · inf would be NaN."""
                slope = jnp.asarray(_given(derivative, known))
                return jnp.where(slope, dy, 0) if slope.dtype == bool else dy.astype(wide) * slope

            form, result = chosen(dy.dtype), []
            for i, (shape, dtype) in enumerate(shapes.value):
                if not jnp.issubdtype(dtype, jnp.inexact):
                    result.append(None)
                    continue
                d = -product(form[i - 1]) if form[i] is opposite else product(form[i])
                result.append(_sum_to(d, shape))
            return tuple(result)

        kinds = inspect.Parameter
        forward.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
        pair = [kinds("saved", kinds.POSITIONAL_ONLY), kinds("dy", kinds.POSITIONAL_ONLY)]
        backward.__signature__ = inspect.Signature([*pair, *(kinds(n, kinds.KEYWORD_ONLY) for n in static)])  # type: ignore[attr-defined]
        used, less = (
            ", ".join(sorted({n for d in form for n in inspect.signature(d).parameters if n not in static})) for form in forms
        )
        sizes = [sample(normal(4096, 3072), dtype=d) for d in ("float32", "bfloat16")]
        return rule(
            forward=forward,
            backward=backward,
            static=static,
            exact=exact,
            samples=[sample(normal(5, 7)), sample(normal(9, scale=4.0)), sample(normal())] if samples is None else samples,
            workloads=sizes if workloads is None else workloads,
            keeps=keeps or (used if used == less else f"{used} ({less} below float32)"),
            minimum=minimum,
        )(reference)

    return register


def _given(fn: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """Calls a function with those of the known values that it names."""
    return fn(**{n: known[n] for n in inspect.signature(fn).parameters})


def _widen(value: Any, dtype: Any) -> Any:
    return value.astype(dtype) if value is not None and jnp.issubdtype(value.dtype, jnp.inexact) else value


def _sum_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which an argument of ``shape`` was broadcast."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1)
    return array.sum(axes, keepdims=True) if axes else array
