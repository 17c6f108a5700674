"""The same function under transformations, compared with what it gives under ``jax.jit`` alone: eager, checkpoint, scan, cond,
vmap, differentiated twice, and on several devices.

What the reference cannot do either is no finding.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fbackprop.checking.checks import allowed_between
from fbackprop.checking.examination import Examination, other, vjp
from fbackprop.checking.measures import eps_of, largest, representable, smallest, worst_of
from fbackprop.checking.programs import float64_on_cpu
from fbackprop.checking.report import Finding
from fbackprop.checking.subject import Subject
from fbackprop.refusing import sentence

__all__ = ["devices", "second_order", "transformations"]

DEVICES = 8


def transformations(examination: Examination) -> Iterator[Finding]:
    """Eager, ``jax.checkpoint``, ``scan``, ``cond`` and ``jax.vmap`` over each argument give what ``jax.jit`` gives."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure:
        return
    dy = [jnp.asarray(v) for v in evidence.dys[0]]
    flat = subject.call.bind(subject.fn)

    def run(told: str, flat: Any, floats: Any, arrays: Any, dy: Any) -> Any:
        # The leaves are arguments of the program: XLA would compute with constants while it compiles, not always rightly.
        return _transformed(dataclasses.replace(subject, floats=tuple(floats), arrays=tuple(arrays)), dy)[told](flat)

    for told in _transformed(subject, dy):
        leaves = list(subject.floats), list(subject.arrays), dy
        of = functools.partial(run, told)
        try:
            ours = of(flat, *leaves) if told == "eager" else jax.jit(functools.partial(of, flat))(*leaves)
        except Exception as error:
            try:
                jax.eval_shape(functools.partial(of, evidence.definition.opened), *leaves)
            except Exception:
                examination.notes.append(f"{told}: neither it nor its reference runs ({sentence(error)}).")
                continue
            yield Finding("transformations", subject.name, f"{told} it fails: {sentence(error)}")
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
    others, other_arrays = ([other(leaf) for leaf in part] for part in (floats, arrays))
    dys = [jnp.stack([d, other(d)]) for d in dy]

    def eager(flat: Any) -> Any:
        return [(vjp(flat, floats, arrays, dy), jax.jit(functools.partial(vjp, flat))(floats, arrays, dy))]

    def remat(flat: Any) -> Any:
        return [(vjp(jax.checkpoint(flat), floats, arrays, dy), vjp(flat, floats, arrays, dy))]

    def scan(flat: Any) -> Any:
        stacked = [jnp.stack(pair) for pair in zip(floats, others)]

        def steps(stacked: Any, arrays: Any) -> Any:
            return jax.lax.scan(lambda c, own: (c, flat(list(own), arrays)), 0.0, stacked)[1]

        y, cotangents = vjp(steps, stacked, arrays, dys)
        expected = [vjp(flat, own, arrays, [d[k] for d in dys]) for k, own in enumerate((floats, others))]
        return [(([v[k] for v in y], [d[k] for d in cotangents]), expected[k]) for k in range(2)]

    def cond(flat: Any) -> Any:
        def either(floats: Any, arrays: Any) -> Any:
            zeros = functools.partial(jax.tree.map, jnp.zeros_like)
            return jax.lax.cond(jnp.isfinite(dys[0]).any(), flat, lambda f, a: zeros(flat(f, a)), floats, arrays)

        return [(vjp(either, floats, arrays, dy), vjp(flat, floats, arrays, dy))]

    def vmap(flat: Any, chosen: Sequence[bool], axis: int = 0) -> Any:
        """Over the chosen leaves of (floats, arrays); cotangents of what all members share are summed."""
        pairs = list(zip((*floats, *arrays), (*others, *other_arrays), chosen))
        axes = [(axis if a.ndim else 0) if m else None for a, _, m in pairs]
        batch = [a if i is None else jnp.stack([a, b], i) for (a, b, _), i in zip(pairs, axes)]
        n = len(floats)

        def run(floats: Any, arrays: Any) -> Any:
            return jax.vmap(flat, in_axes=(axes[:n], axes[n:]))(floats, arrays)

        y, cotangents = vjp(run, batch[:n], batch[n:], dys)
        members = [[b if m and k else a for a, b, m in pairs] for k in range(2)]
        expected = [vjp(flat, own[:n], own[n:], [d[k] for d in dys]) for k, own in enumerate(members)]
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
        chosen = [*(g == group for g in subject.groups), *no_arrays]
        table[f"under jax.vmap over {subject.argument_name(group)}"] = functools.partial(vmap, chosen=chosen)
    for i, name in enumerate(subject.array_names):
        chosen = [*(False for _ in floats), *(j == i for j in range(len(arrays)))]
        table[f"under jax.vmap over {name}"] = functools.partial(vmap, chosen=chosen)
    everything = [True] * (len(floats) + len(arrays))
    table["under jax.vmap over all, the last axis"] = functools.partial(vmap, chosen=everything, axis=-1)
    return table


def second_order(examination: Examination) -> Iterator[Finding]:
    """The gradient of the gradient, with respect to the arguments and to the cotangent of y, is that of the definition."""
    subject, evidence = examination.subject, examination.evidence
    if evidence.failure or not subject.exact or evidence.undifferentiable:
        return
    rng = np.random.default_rng(examination.seed + 1)
    weights = [rng.normal(size=leaf.shape) for leaf in subject.floats]
    dy = list(evidence.dys[0])

    def second(flat: Any, floats: Any, arrays: Any, dy: Any, weights: Any) -> Any:
        def inner(floats: Any, dy: Any) -> Any:
            cotangents = vjp(flat, floats, arrays, dy)[1]
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
        examination.notes.append(f"second order: the reference cannot be differentiated twice ({sentence(error)}).")
        return
    flat = subject.call.bind(subject.fn)
    try:
        ours = jax.jit(functools.partial(second, flat))(subject.floats, subject.arrays, dy, narrow)
    except Exception as error:
        examination.notes.append(f"second order: it cannot be differentiated twice ({sentence(error)}).")
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


def devices(examination: Examination) -> Iterator[Finding]:
    """Over up to 8 devices: jit with sharded arguments, meshes of explicit axes, and shard_map that checks varying axes, over
    all arguments, over the first alone and over the last alone."""
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
    runs = {
        "with sharded arguments": functools.partial(_sharded, subject, dy, devices, AxisType.Auto),
        "on a mesh of explicit axes": functools.partial(_sharded, subject, dy, devices, AxisType.Explicit),
        "in shard_map": functools.partial(_mapped, subject, dy, devices, None),
    }
    several = len(set(subject.groups)) > 1
    for group in dict.fromkeys((subject.groups[0], subject.groups[-1])) if several else ():
        own = [name for name, g in zip(subject.names, subject.groups) if g == group]
        told = f"in shard_map over {own[0]}{', …' * (len(own) > 1)} alone"
        runs[told] = functools.partial(_mapped, subject, dy, devices, group)
    for told, of in runs.items():
        try:
            ours = of(subject.call.bind(subject.fn))
        except Exception as error:
            try:
                of(evidence.definition.flat)
            except Exception:
                continue  # the reference does not run so either
            yield Finding("devices", subject.name, f"{told} it fails: {sentence(error)}")
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

    expected = jax.jit(functools.partial(vjp, flat))(list(subject.floats), list(subject.arrays), dy)
    with jax.set_mesh(mesh):
        return [(jax.jit(run)(floats, arrays, dy), expected)]


def _mapped(subject: Subject, dy: Any, devices: Sequence[Any], group: int | None, flat: Any) -> Any:
    """One member of a batch on each device; what is not mapped is shared, and its cotangent the sum over devices."""
    count = len(devices)
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    mapped = [group is None or g == group for g in subject.groups]
    members = [list(subject.floats)]
    for _ in range(count - 1):
        members.append([other(leaf) if m else leaf for leaf, m in zip(members[-1], mapped)])
    batch = [jnp.stack([m[i] for m in members]) if own else leaf for i, (leaf, own) in enumerate(zip(subject.floats, mapped))]
    cotangents = [dy]
    for _ in range(count - 1):
        cotangents.append([other(d) for d in cotangents[-1]])
    dys = [jnp.stack(d) for d in zip(*cotangents)]
    split, whole = PartitionSpec("devices"), PartitionSpec()

    def one(batch: Any, arrays: Any) -> Any:
        y, others = flat([leaf[0] if own else leaf for leaf, own in zip(batch, mapped)], arrays)
        return [v[None] for v in y], others

    def run(batch: Any, arrays: Any) -> Any:
        specs = ([split if own else whole for own in mapped], whole)
        return jax.shard_map(lambda b, a: one(b, a)[0], mesh=mesh, in_specs=specs, out_specs=split)(batch, arrays), ()

    y, result = jax.jit(functools.partial(vjp, run))(batch, list(subject.arrays), dys)
    single = jax.jit(functools.partial(vjp, flat))
    expected = [single(m, list(subject.arrays), c) for m, c in zip(members, cotangents)]
    y, result = jax.device_get((y, result))
    pairs = []
    for k in range(count):
        own = [np.asarray(result[i])[k] if m else expected[k][1][i] for i, m in enumerate(mapped)]
        pairs.append((([v[k] for v in y], own), expected[k]))
    if not all(mapped):
        with np.errstate(all="ignore"):  # ∞ − ∞ is NaN here as it is there
            total = [sum(np.asarray(e[1][i], np.float64) for e in expected) for i in range(len(mapped))]
        shared = [total[i] if m else result[i] for i, m in enumerate(mapped)]
        pairs.append(((expected[0][0], shared), (expected[0][0], total)))
    return pairs
