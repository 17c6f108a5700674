"""The checks of the full depth: other values, other shapes, other transformations of the same function.

Most of them are the quick checks again on arguments made from the given ones: rounded to half precision and scaled, with
edge values in them, with an axis of one element or of none. The others run the function under transformations, and
compare with what it gave under ``jax.jit`` alone.

Where a variant makes no sense for the reference either (it raises), it is left out.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fbackprop.checking.checks import allowed_between, elementwise, judge, relative_tolerances
from fbackprop.checking.measures import eps_of, largest, representable, smallest, worst_of
from fbackprop.checking.programs import Evidence, first_line, float64_on_cpu, gather
from fbackprop.checking.report import Finding
from fbackprop.checking.subject import Subject
from fbackprop.measuring import saved_bytes

__all__ = ["THOROUGH", "Examination"]

OTHER_VALUES = ("runs", "value", "types", "cotangents", "zero", "finite", "nonzero", "linear")
SCALES = (1.0, 32.0, 2.0**-8)  # of the arguments in half precision
JACOBIAN = 2**18  # elements of a Jacobian that is looked at as a whole
ROWS = 512  # of such a Jacobian
DEVICES = 8


@dataclasses.dataclass
class Examination:
    """What a thorough check starts from, and what it has to say besides findings."""

    subject: Subject
    evidence: Evidence
    seed: int
    notes: list[str] = dataclasses.field(default_factory=list)


Check = Callable[[Examination], Iterator[Finding]]

THOROUGH: dict[str, Check] = {}
"""Every check of the full depth by its name, in the order in which they run."""


def _named(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        THOROUGH[name] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------- the same, other arguments


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


@_named("low precision")
def _low_precision(examination: Examination) -> Iterator[Finding]:
    """In bfloat16 and float16, at the magnitude of the arguments, larger and smaller: sums, casts and overflow."""
    subject = examination.subject
    found: set[tuple[str, str]] = set()
    for dtype, scale in itertools.product((jnp.bfloat16, jnp.float16), SCALES):
        floats = [(leaf.astype(jnp.float32) * scale).astype(dtype) for leaf in subject.floats]
        # What is not differentiated but computed with takes part; masks and integers stay.
        arrays = [a.astype(dtype) if _is_floating(a) else a for a in subject.arrays]
        told = f"in {jnp.dtype(dtype).name}" + (f", arguments times {scale:g}" if scale != 1 else "")
        for finding in _variant(examination, "low precision", told, floats, arrays, (*OTHER_VALUES, "rms", "sums")):
            if (jnp.dtype(dtype).name, finding.where) not in found:
                found.add((jnp.dtype(dtype).name, finding.where))
                yield finding


@_named("edges")
def _edges(examination: Examination) -> Iterator[Finding]:
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
    for i, (name, leaf) in enumerate(zip(subject.names, subject.floats)):
        for told, value in _edge_values(rng, np.asarray(leaf, np.float64), leaf.dtype):
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


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


@_named("jacobian")
def _jacobian(examination: Examination) -> Iterator[Finding]:
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


# ------------------------------------------------------------------------------------------------------ transformations


def _vjp(flat: Callable[..., Any], floats: Any, arrays: Any, dy: Any) -> tuple[Any, Any]:
    y, pullback, _ = jax.vjp(lambda f: flat(f, arrays), list(floats), has_aux=True)
    return y, pullback(dy)[0]


def _other(leaf: Any) -> Any:
    """Another array of the same kind, with values of the same domain: the first one rolled, or halved where it has no axis."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, 1) if not leaf.ndim else leaf
    if leaf.size > 1:
        return jnp.roll(leaf.reshape(-1), 1).reshape(leaf.shape)
    return leaf * 0.75 if _is_floating(leaf) else leaf


@_named("transformations")
def _transformations(examination: Examination) -> Iterator[Finding]:
    """Eager, ``jax.checkpoint``, ``scan``, ``cond`` and ``jax.vmap`` over each argument give what ``jax.jit`` gives."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure:
        return
    dy = [jnp.asarray(v) for v in evidence.dys[0]]
    for told, of in _transformed(subject, dy).items():
        try:
            flat = subject.call.bind(subject.fn)
            ours = of(flat) if told == "eager" else jax.jit(functools.partial(of, flat))()
        except Exception as error:
            try:
                jax.eval_shape(functools.partial(of, evidence.definition.opened))
            except Exception:
                examination.notes.append(f"{told}: neither it nor its reference runs ({first_line(error)}).")
                continue
            yield Finding("transformations", subject.name, f"{told} it fails: {first_line(error)}")
            continue
        yield from _compared(examination, "transformations", told, ours)


def _compared(examination: Examination, check: str, told: str, members: Sequence[Any]) -> Iterator[Finding]:
    """``members`` are (what it gave, what one call gave), each (values, cotangents)."""
    subject = examination.subject
    for (y, cotangents), (expected_y, expected) in members:
        for i, (ours, one) in enumerate(zip(y, expected_y)):
            ours, one = np.asarray(ours, np.float64), np.asarray(one, np.float64)
            error, index = worst_of(ours, one, examination.evidence.value_types[i].dtype)
            if error > allowed_between(examination.evidence, None, i, one) and index is not None:
                message = f"{told} the value is {ours[index]:.7g} at {list(index)}, alone {one[index]:.7g}."
                yield Finding(check, f"output {i}", message, index, {"error": error})
                return
        for i, (ours, one) in enumerate(zip(cotangents, expected)):
            ours, one = np.asarray(ours, np.float64), np.asarray(one, np.float64)
            error, index = worst_of(ours, one, subject.floats[i].dtype)
            strange = np.isfinite(one) & ~np.isfinite(ours)
            if strange.any():
                index = tuple(map(int, np.argwhere(strange)[0]))
            if (error > allowed_between(examination.evidence, i, None, one) or strange.any()) and index is not None:
                message = f"{told} the cotangent is {ours[index]:.7g} at {list(index)}, alone {one[index]:.7g}."
                yield Finding(check, subject.names[i], message, index, {"error": error})
                return


def _transformed(subject: Subject, dy: Any) -> dict[str, Callable[..., Any]]:
    """By name, functions of ``flat`` that return pairs of (under the transformation, without it)."""
    floats, arrays = list(subject.floats), list(subject.arrays)
    others, other_arrays = ([_other(leaf) for leaf in part] for part in (floats, arrays))
    dys = [jnp.stack([d, _other(d)]) for d in dy]

    def eager(flat: Any) -> Any:
        return [(_vjp(flat, floats, arrays, dy), jax.jit(functools.partial(_vjp, flat))(floats, arrays, dy))]

    def remat(flat: Any) -> Any:
        return [(_vjp(jax.checkpoint(flat), floats, arrays, dy), _vjp(flat, floats, arrays, dy))]

    def scan(flat: Any) -> Any:
        stacked = [jnp.stack(pair) for pair in zip(floats, others)]

        def steps(stacked: Any, arrays: Any) -> Any:
            return jax.lax.scan(lambda c, own: (c, flat(list(own), arrays)), 0.0, stacked)[1]

        y, cotangents = _vjp(steps, stacked, arrays, dys)
        expected = [_vjp(flat, own, arrays, [d[k] for d in dys]) for k, own in enumerate((floats, others))]
        return [(([v[k] for v in y], [d[k] for d in cotangents]), expected[k]) for k in range(2)]

    def cond(flat: Any) -> Any:
        def either(floats: Any, arrays: Any) -> Any:
            other = functools.partial(jax.tree.map, jnp.zeros_like)
            return jax.lax.cond(jnp.isfinite(dys[0]).any(), flat, lambda f, a: other(flat(f, a)), floats, arrays)

        return [(_vjp(either, floats, arrays, dy), _vjp(flat, floats, arrays, dy))]

    def vmap(flat: Any, chosen: Sequence[bool], axis: int = 0) -> Any:
        """Over the chosen leaves of (floats, arrays); cotangents of what all members share are summed."""
        pairs = list(zip((*floats, *arrays), (*others, *other_arrays), chosen))
        axes = [(axis if a.ndim else 0) if m else None for a, _, m in pairs]
        batch = [jnp.stack([a, b], i) if m else a for (a, b, m), i in zip(pairs, axes)]
        n = len(floats)

        def run(floats: Any, arrays: Any) -> Any:
            return jax.vmap(flat, in_axes=(axes[:n], axes[n:]))(floats, arrays)

        y, cotangents = _vjp(run, batch[:n], batch[n:], dys)
        members = [[b if m and k else a for a, b, m in pairs] for k in range(2)]
        expected = [_vjp(flat, own[:n], own[n:], [d[k] for d in dys]) for k, own in enumerate(members)]
        (y0, first), (y1, second) = expected
        own = [
            [first[i] if a is None else jnp.take(cotangents[i], 0, a) for i, a in enumerate(axes[:n])],
            [second[i] if a is None else jnp.take(cotangents[i], 1, a) for i, a in enumerate(axes[:n])],
        ]
        summed = [cotangents[i] if a is None else first[i] for i, a in enumerate(axes[:n])]
        shared = [first[i] + second[i] if a is None else first[i] for i, a in enumerate(axes[:n])]
        results = [(([v[0] for v in y], own[0]), (y0, first)), (([v[1] for v in y], own[1]), (y1, second))]
        return [*results, ((y0, summed), (y0, shared))]

    table: dict[str, Callable[..., Any]] = {
        "eager": eager, "under jax.checkpoint": remat, "under jax.lax.scan": scan, "under jax.lax.cond": cond,
    }  # fmt: skip
    no_arrays = [False] * len(arrays)
    for group in subject.arguments:
        label = ", ".join(n for n, g in zip(subject.names, subject.groups) if g == group)
        chosen = [*(g == group for g in subject.groups), *no_arrays]
        table[f"under jax.vmap over {label}"] = functools.partial(vmap, chosen=chosen)
    for i, name in enumerate(subject.array_names):
        chosen = [*(False for _ in floats), *(j == i for j in range(len(arrays)))]
        table[f"under jax.vmap over {name}"] = functools.partial(vmap, chosen=chosen)
    everything = [True] * (len(floats) + len(arrays))
    table["under jax.vmap over all, the last axis"] = functools.partial(vmap, chosen=everything, axis=-1)
    return table


@_named("second order")
def _second_order(examination: Examination) -> Iterator[Finding]:
    """The gradient of the gradient, with respect to the arguments and to the cotangent of y, is that of the definition."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure or not subject.exact or evidence.undifferentiable:
        return
    rng = np.random.default_rng(examination.seed + 1)
    weights = [rng.normal(size=leaf.shape) for leaf in subject.floats]
    dy = list(evidence.dys[0])

    def second(flat: Any, floats: Any, arrays: Any, dy: Any, weights: Any) -> Any:
        def inner(floats: Any, dy: Any) -> Any:
            cotangents = _vjp(flat, floats, arrays, dy)[1]
            return sum((w * d).sum() for w, d in zip(weights, cotangents))

        return jax.grad(inner, (0, 1))(list(floats), list(dy))

    definition = evidence.definition
    try:
        with float64_on_cpu():
            wide = [np.asarray(v).astype(np.float64) for v in (*subject.floats, *dy)]
            cpu = [jax.device_put(a, jax.devices("cpu")[0]) for a in subject.arrays]
            own, own_dy = wide[: len(weights)], wide[len(weights) :]
            truth = jax.jit(functools.partial(second, definition.widened))(own, cpu, own_dy, weights)
        narrow = [jnp.asarray(w, leaf.dtype) for w, leaf in zip(weights, subject.floats)]
        theirs = jax.jit(functools.partial(second, definition.opened))(subject.floats, subject.arrays, dy, narrow)
    except Exception as error:
        examination.notes.append(f"second order: the reference cannot be differentiated twice ({first_line(error)}).")
        return
    flat = subject.call.bind(subject.fn)
    try:
        ours = jax.jit(functools.partial(second, flat))(subject.floats, subject.arrays, dy, narrow)
    except Exception as error:
        examination.notes.append(f"second order: it cannot be differentiated twice ({first_line(error)}).")
        return
    names = [*subject.names, *(f"the cotangent of output {i}" for i in range(len(dy)))]
    types = [*(leaf.dtype for leaf in subject.floats), *(o.dtype for o in evidence.value_types)]
    for name, dtype, *three in zip(names, types, *(jax.tree.leaves(part) for part in (ours, theirs, truth))):
        mine, autodiff, true = (np.asarray(v, np.float64) for v in three)
        with np.errstate(all="ignore"):
            reference = largest(autodiff - true)
        # A derivative of a derivative: what the first one was rounded by is amplified in both.
        allowed = max(8 * reference, 64 * eps_of(dtype) * largest(true), smallest(dtype))
        error, index = worst_of(mine, true, dtype)
        strange = ~np.isfinite(mine) & representable(true, dtype) & np.isfinite(autodiff)
        if strange.any():
            index = tuple(map(int, np.argwhere(strange)[0]))
        if (error > allowed or strange.any()) and index is not None:
            message = (
                f"the gradient of the gradient is {mine[index]:.7g} at {list(index)} where the truth is {true[index]:.7g}: the "
                "backward cannot be differentiated itself (a stop_gradient, or a constant of the forward, in it)."
            )
            yield Finding("second order", name, message, index, {"error": error, "tolerance": allowed})


# -------------------------------------------------------------------------------------------------------------- devices


@_named("devices")
def _devices(examination: Examination) -> Iterator[Finding]:
    """Over up to 8 devices: jit with sharded arguments, meshes of explicit axes, and shard_map that checks varying axes."""
    subject, evidence = examination.subject, examination.evidence
    devices = jax.devices()[:DEVICES]
    if evidence.failure:
        return
    if len(devices) < 2:
        examination.notes.append(
            "devices: there is only one. XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU."
        )
        return
    dy = [jnp.asarray(v) for v in evidence.dys[0]]
    for told, of in {
        "with sharded arguments": functools.partial(_sharded, subject, dy, devices, AxisType.Auto),
        "on a mesh of explicit axes": functools.partial(_sharded, subject, dy, devices, AxisType.Explicit),
        "in shard_map": functools.partial(_mapped, subject, dy, devices, None),
        "in shard_map over the first argument": functools.partial(_mapped, subject, dy, devices, subject.groups[0]),
    }.items():
        try:
            ours = of(subject.call.bind(subject.fn))
        except Exception as error:
            try:
                of(evidence.definition.flat)
            except Exception:
                continue  # the reference does not run so either
            yield Finding("devices", subject.name, f"{told} it fails: {first_line(error)}")
            continue
        yield from _compared(examination, "devices", told, ours)


def _sharded(subject: Subject, dy: Any, devices: Sequence[Any], kind: Any, flat: Any) -> Any:
    """Each array split over devices along its first axis that can be split evenly."""
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(kind,))

    def placed(leaf: Any) -> Any:
        at = next((i for i, n in enumerate(leaf.shape) if n and n % len(devices) == 0), None)
        spec = [None if i != at else "devices" for i in range(leaf.ndim)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    floats, arrays = ([placed(leaf) for leaf in part] for part in (subject.floats, subject.arrays))

    def run(floats: Any, arrays: Any, dy: Any) -> Any:
        y, pullback, _ = jax.vjp(lambda f: flat(f, arrays), list(floats), has_aux=True)
        # The cotangent lies where y lies.
        dy = [jax.sharding.reshard(d, jax.typeof(v).sharding) for d, v in zip(dy, y)] if kind == AxisType.Explicit else dy
        return y, pullback(dy)[0]

    expected = jax.jit(functools.partial(_vjp, flat))(list(subject.floats), list(subject.arrays), dy)
    with jax.set_mesh(mesh):
        return [(jax.jit(run)(floats, arrays, dy), expected)]


def _mapped(subject: Subject, dy: Any, devices: Sequence[Any], group: int | None, flat: Any) -> Any:
    """One member of a batch on each device; what is not mapped is shared, and its cotangent the sum over devices."""
    count = len(devices)
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    mapped = [group is None or g == group for g in subject.groups]
    members = [list(subject.floats)]
    for _ in range(count - 1):
        members.append([_other(leaf) if m else leaf for leaf, m in zip(members[-1], mapped)])
    batch = [jnp.stack([m[i] for m in members]) if own else leaf for i, (leaf, own) in enumerate(zip(subject.floats, mapped))]
    cotangents = [dy]
    for _ in range(count - 1):
        cotangents.append([_other(d) for d in cotangents[-1]])
    dys = [jnp.stack(d) for d in zip(*cotangents)]
    split, whole = PartitionSpec("devices"), PartitionSpec()

    def one(batch: Any, arrays: Any) -> Any:
        y, others = flat([leaf[0] if own else leaf for leaf, own in zip(batch, mapped)], arrays)
        return [v[None] for v in y], others

    def run(batch: Any, arrays: Any) -> Any:
        specs = ([split if own else whole for own in mapped], whole)
        return jax.shard_map(lambda b, a: one(b, a)[0], mesh=mesh, in_specs=specs, out_specs=split)(batch, arrays), ()

    y, result = jax.jit(functools.partial(_vjp, run))(batch, list(subject.arrays), dys)
    single = jax.jit(functools.partial(_vjp, flat))
    expected = [single(m, list(subject.arrays), c) for m, c in zip(members, cotangents)]
    y, result = jax.device_get((y, result))
    pairs = []
    for k in range(count):
        own = [np.asarray(result[i])[k] if m else expected[k][1][i] for i, m in enumerate(mapped)]
        pairs.append((([v[k] for v in y], own), expected[k]))
    if not all(mapped):
        total = [sum(np.asarray(e[1][i], np.float64) for e in expected) for i in range(len(mapped))]
        shared = [total[i] if m else result[i] for i, m in enumerate(mapped)]
        pairs.append(((expected[0][0], shared), (expected[0][0], total)))
    return pairs


# ------------------------------------------------------------------------------------------------------------- its costs


@_named("retraces")
def _retraces(examination: Examination) -> Iterator[Finding]:
    """A second eager call with other values compiles nothing that the first one has compiled."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure:
        return
    dy = [jnp.asarray(v) for v in evidence.dys[0]]
    others = [_other(leaf) for leaf in subject.floats]
    jax.block_until_ready(others)

    def compiled_by(flat: Any) -> int:
        for _ in range(2):
            _vjp(flat, list(subject.floats), list(subject.arrays), dy)
        with _compilations() as events:
            _vjp(flat, others, list(subject.arrays), dy)
        return len(events)

    try:
        theirs = compiled_by(evidence.definition.walked)
        ours = compiled_by(subject.call.bind(subject.fn))
    except Exception:  # told by "transformations"
        return
    if ours > theirs:
        message = (
            f"a further eager call compiles {ours} programs anew, its definition {theirs}: a jitted function is made at each "
            "call; make it once, outside."
        )
        yield Finding("retraces", subject.name, message, None, {"compiled": ours, "reference": theirs})


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """The programs that JAX compiles meanwhile."""
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@_named("saved bytes")
def _saved_bytes(examination: Examination) -> Iterator[Finding]:
    """No more is kept for the backward than ``jax.grad`` of the definition keeps, arguments included.

    Where y is much smaller than the arguments, as the losses of rows are, one number more for each of its elements is nothing.
    """
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure or (subject.custom is None and not hasattr(subject.fn, "rule")):
        return
    try:
        ours, theirs = (
            saved_bytes(lambda *f, flat=flat: flat(list(f), list(subject.arrays))[0], *subject.floats)
            for flat in (subject.call.bind(subject.fn), evidence.definition.opened)
        )
    except Exception as error:
        examination.notes.append(f"saved bytes: could not be counted ({first_line(error)}).")
        return
    rows = sum(int(np.prod(o.shape)) * o.dtype.itemsize for o in evidence.value_types)
    spare = rows if 4 * rows <= max(leaf.size * leaf.dtype.itemsize for leaf in subject.floats) else 0
    if ours > theirs + spare:
        message = f"it keeps {ours:,} bytes for the backward, jax.grad of the reference {theirs:,}: save less, or recompute."
        yield Finding("saved bytes", subject.name, message, None, {"bytes": ours, "reference_bytes": theirs})
