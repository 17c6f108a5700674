"""The quick checks again, on arguments made from the given ones: rounded to half precision and scaled, with edge values in
them, with an axis of one element or of none; and at every cotangent of y by itself.

Where a variant makes no sense for the reference either (it raises), it is left out.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fbackprop.checking.checks import elementwise, judge, relative_tolerances
from fbackprop.checking.definition import primitives_of
from fbackprop.checking.examination import Examination
from fbackprop.checking.programs import gather, is_floating
from fbackprop.checking.report import Finding

__all__ = ["edges", "jacobian", "low_precision"]

OTHER_VALUES = ("runs", "value", "types", "cotangents", "zero", "finite", "nonzero", "linear")
SCALES = (1.0, 32.0, 2.0**-8)  # of the arguments in half precision
JACOBIAN = 2**18  # elements of a Jacobian that is looked at as a whole
ROWS = 512  # of such a Jacobian


def _variant(
    examination: Examination, check: str, told: str, floats: Sequence[Any], arrays: Sequence[Any], names: Sequence[str]
) -> Iterator[Finding]:
    """The quick checks on other arguments, each finding told with how they were made. One finding for each argument."""
    # A function is held to infinite arguments where it gives numbers for them, or −inf, as the logarithm of a probability.
    infinite = any(not np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in floats)
    subject = dataclasses.replace(examination.subject, floats=tuple(floats), arrays=tuple(arrays))
    try:
        evidence = gather(subject, names, examination.seed)
    except Exception:  # the reference itself has nothing to say of such arguments
        return
    values = evidence.values["truth"][0]
    if evidence.undifferentiable or (infinite and any((np.isnan(v) | (v == np.inf)).any() for v in values)):
        return
    seen = set()
    for finding in judge(evidence, names).findings:
        if finding.where not in seen:
            seen.add(finding.where)
            yield dataclasses.replace(finding, check=check, message=f"{told}: [{finding.check}] {finding.message}")


def low_precision(examination: Examination) -> Iterator[Finding]:
    """In bfloat16 and float16, at the magnitude of the arguments, larger and smaller: sums, casts and overflow."""
    subject = examination.subject
    found: set[tuple[str, str]] = set()
    for dtype, scale in itertools.product((jnp.bfloat16, jnp.float16), SCALES):
        floats = [(leaf.astype(jnp.float32) * scale).astype(dtype) for leaf in subject.floats]
        # What is not differentiated but computed with takes part; masks and integers stay.
        arrays = [a.astype(dtype) if is_floating(a) else a for a in subject.arrays]
        told = f"in {jnp.dtype(dtype).name}" + (f", arguments times {scale:g}" if scale != 1 else "")
        for finding in _variant(examination, "low precision", told, floats, arrays, (*OTHER_VALUES, "rms", "sums")):
            if (jnp.dtype(dtype).name, finding.where) not in found:
                found.add((jnp.dtype(dtype).name, finding.where))
                yield finding


def edges(examination: Examination) -> Iterator[Finding]:
    """Zeros, subnormal, huge and infinite values, ties, masked rows, indices that repeat or lie outside, short axes."""
    found: set[str] = set()
    for told, floats, arrays in _edge_arguments(examination):
        for finding in _variant(examination, "edges", told, floats, arrays, OTHER_VALUES):
            if finding.where not in found:  # the first edge tells; the others usually say the same
                found.add(finding.where)
                yield finding


def _edge_arguments(examination: Examination) -> Iterator[tuple[str, list[Any], list[Any]]]:
    subject = examination.subject
    rng = np.random.default_rng(examination.seed)
    # A loop that waits for something finite, and LAPACK's singular values, may never end on what is infinite.
    endless = {"while", "svd"} & primitives_of(examination.evidence.definition.program.jaxpr)
    for i, (name, leaf) in enumerate(zip(subject.names, subject.floats)):
        for told, value in _edge_values(rng, np.asarray(leaf, np.float64), leaf.dtype):
            if endless and not np.isfinite(value).all():
                continue
            floats = list(subject.floats)
            floats[i] = jnp.asarray(value, leaf.dtype)
            yield f"with {told} in {name}", floats, list(subject.arrays)
    for i, (name, leaf) in enumerate(zip(subject.array_names, subject.arrays)):
        for told, value in _edge_integers(leaf):
            arrays = list(subject.arrays)
            arrays[i] = jnp.asarray(value, leaf.dtype)
            yield f"with {told} in {name}", list(subject.floats), arrays
    sizes = sorted({n for leaf in (*subject.floats, *subject.arrays) for n in leaf.shape if n > 1})
    for size, short in itertools.product(sizes, (1, 0)):

        def cut(leaf: Any, size: int = size, short: int = short) -> Any:
            return leaf[tuple(slice(short) if n == size else slice(None) for n in leaf.shape)]

        yield f"with axes of {size} cut to {short}", [cut(f) for f in subject.floats], [cut(a) for a in subject.arrays]


def _edge_values(rng: np.random.Generator, value: np.ndarray, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    info = jnp.finfo(dtype)
    some = rng.random(value.shape) < 0.3
    if value.size and not some.any():
        some.flat[rng.integers(value.size)] = True
    yield "zeros", np.zeros_like(value)
    yield "negative zeros", -np.zeros_like(value)
    yield "some zeros", np.where(some, 0.0, value)
    yield "ties", np.round(value)
    if value.ndim:
        yield "constant rows", np.broadcast_to(value.mean(-1, keepdims=True), value.shape)
    yield "values times 1000", np.clip(value * 1000, -float(info.max), float(info.max))
    yield "some subnormal values", np.where(some, float(info.smallest_subnormal) * 3, value)
    # Its square can still be told: beyond that, what overflows first is a matter of the order of the same factors.
    yield "some huge values", np.where(some, np.sign(value) * float(info.max) ** 0.5 / 16, value)
    yield "some of +inf", np.where(some, np.inf, value)
    yield "some of -inf", np.where(some, -np.inf, value)
    if value.ndim > 1:
        row = np.zeros(value.shape, bool)
        row[tuple(0 for _ in value.shape[:-1])] = True
        yield "a whole row of -inf", np.where(row, -np.inf, value)


def _edge_integers(leaf: Any) -> Iterator[tuple[str, Any]]:
    if leaf.dtype == jnp.bool_:
        yield "nothing but False", np.zeros(leaf.shape, bool)
        yield "nothing but True", np.ones(leaf.shape, bool)
        if leaf.ndim > 1:
            yield (
                "a row of nothing but False",
                np.asarray(leaf) & (np.arange(leaf.shape[0]) > 0).reshape(-1, *[1] * (leaf.ndim - 1)),
            )
    elif jnp.issubdtype(leaf.dtype, jnp.signedinteger) and leaf.size:
        value = np.asarray(leaf)
        yield "the same integer everywhere", np.full(value.shape, value.reshape(-1)[0])
        for told, outside in (("a negative integer", -1), ("an integer far outside", np.iinfo(value.dtype).max // 2)):
            changed = value.copy()
            changed.reshape(-1)[-1] = outside
            yield told, changed


def jacobian(examination: Examination) -> Iterator[Finding]:
    """Every element of y by itself, where the Jacobian is small."""
    subject, evidence = examination.subject, examination.evidence
    sizes = [int(np.prod(o.shape)) for o in evidence.value_types]
    rows = sum(sizes)
    if evidence.failure or not subject.exact:
        return
    if rows > ROWS or rows * sum(leaf.size for leaf in subject.floats) > JACOBIAN:
        examination.notes.append(f"the Jacobian was not looked at as a whole: it has {rows} rows.")
        return
    eye, first = np.eye(rows), np.cumsum([0, *sizes])
    dys = [eye[:, a:b].reshape(rows, *o.shape).astype(o.dtype) for a, b, o in zip(first, first[1:], evidence.value_types)]
    whole = gather(subject, ("jacobian",), examination.seed, (("one-hot",) * rows, dys))
    if not whole.failure:
        # In few elements jax.grad may be right by luck: it is trusted with what it errs by elsewhere, too.
        yield from elementwise(whole, "jacobian", ("one-hot",), relative_tolerances(evidence))
