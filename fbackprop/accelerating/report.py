"""What was replaced, what was not and why, and what it changes."""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop.accelerating.rewriting import Found
from fbackprop.checking.definition import definition_of
from fbackprop.checking.measures import eps_of, largest, smallest, worst_of
from fbackprop.measuring import Ratio, interleave, ratio, saved_bytes

__all__ = ["Agreement", "Report", "report"]


DRAWS = 2**18  # numbers that are drawn for a comparison in all; at least 3 and at most 16 times the arguments
AGAIN = 4  # times as many where they do not agree: the largest error of a few numbers is a matter of luck


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one array: the largest errors against a float64 truth, of the function as it was and accelerated."""

    name: str
    before: float
    after: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.after <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``accelerate`` does to a call. ``print`` shows it as a table."""

    found: tuple[Found, ...]
    agreement: tuple[Agreement, ...]
    kept_before: int
    kept_after: int
    temporaries_before: int | None
    temporaries_after: int | None
    speed: Ratio | None = None  # time before over time after
    calls: tuple[Callable[[], Any], ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def replaced(self) -> tuple[Found, ...]:
        return tuple(f for f in self.found if f.replaced)

    @property
    def nearly(self) -> tuple[Found, ...]:
        return tuple(f for f in self.found if not f.replaced)

    @property
    def agrees(self) -> bool:
        return all(a.agrees for a in self.agreement)

    def timed(self, rounds: int = 12, seconds: float = 0.05, budget: float | None = 30.0) -> "Report":
        """The same with the ratio of the times of value and gradient, before over after, taken in turns."""
        before, after = interleave(self.calls, rounds, seconds, budget, settled=True)
        return dataclasses.replace(self, speed=ratio(before, after))

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="accelerate", caption=self._caption(), caption_justify="left", title_justify="left")
        for column in ("", "op", "where", "why not"):
            table.add_column(column, overflow="fold")
        for (op, where, why), times in Counter((f.op, f.where, f.why) for f in self.found).items():
            mark = "replaced" if not why else "left"
            table.add_row(Text(mark, "green" if not why else "dim"), f"{op} ×{times}" if times > 1 else op, Text(where), why)
        return table

    def _caption(self) -> str:
        lines = [f"kept for the backward {_mib(self.kept_before)} → {_mib(self.kept_after)}"]
        if self.temporaries_before is not None and self.temporaries_after is not None:
            lines[0] += f", temporaries {_mib(self.temporaries_before)} → {_mib(self.temporaries_after)}"
        if self.speed is not None:
            lines.append(f"time before / after {self.speed}")
        wrong = [a for a in self.agreement if not a.agrees]
        if wrong:
            lines += [f"{a.name} errs by {a.after:.1e}, more than {a.tolerance:.1e}" for a in wrong]
        elif self.agreement:
            lines.append(f"{len(self.agreement)} outputs and gradients agree")
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def report(fn: Callable[..., Any], accelerated: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Report:
    """See ``Accelerated.report``."""
    found = tuple(accelerated.traced(*args, **kwargs)[0].program.found)
    leaves, structure = jax.tree.flatten((tuple(args), kwargs))
    moving = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and i not in moving]

    def flat(of: Callable[..., Any]) -> Callable[[Any, Any], tuple[list[Any], list[Any]]]:
        def run(floats: Sequence[Any], others: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            given = list(leaves)
            for i, value in (*zip(moving, floats), *zip(arrays, others)):
                given[i] = value
            own_args, own_kwargs = jax.tree.unflatten(structure, given)
            outputs = [o for o in jax.tree.leaves(of(*own_args, **own_kwargs)) if hasattr(o, "dtype")]
            return [o for o in outputs if _is_float(o)], [o for o in outputs if not _is_float(o)]

        return run

    floats, others = [leaves[i] for i in moving], [leaves[i] for i in arrays]
    before, after = flat(fn), flat(accelerated)
    kept = [saved_bytes(lambda *m, f=f: f(m, others)[0], *floats) if floats else 0 for f in (before, after)]
    programs = [_gradient(f) for f in (before, after)]
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    outputs = jax.eval_shape(before, floats, others)[0]
    rng = np.random.default_rng(0)
    dys = [jnp.asarray(rng.normal(size=o.shape), o.dtype) if not abstract else o for o in outputs]
    compiled = [jax.jit(p).lower(dys, floats, others).compile() for p in programs]
    memory = [getattr(c.memory_analysis(), "temp_size_in_bytes", None) for c in compiled]
    agreement = () if abstract else _agreement(before, compiled, dys, floats, others, _names((args, kwargs), moving))
    calls = tuple((lambda c=c: c(dys, floats, others)) for c in compiled)
    return Report(found, agreement, kept[0], kept[1], memory[0], memory[1], None, calls)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _names(tree: Any, moving: list[int]) -> list[str]:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [paths[i] for i in moving]


def _gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(dys: Any, floats: Any, others: Any) -> Any:
        y, pullback = jax.vjp(lambda m: fn(m, others)[0], floats)
        return y, pullback(dys)[0]

    return run


def _agreement(
    before: Any, compiled: Sequence[Any], dys: Any, floats: Any, others: Any, names: list[str]
) -> tuple[Agreement, ...]:
    """Outputs and gradients, before and after, beside the function as it was in float64: at the arguments, and at some that
    differ from them in the last place, so that what a small leaf errs by does not depend on luck."""
    definition = definition_of(before, floats, others)
    rng, wide_gradient = np.random.default_rng(1), jax.jit(_gradient(definition.widened))
    labels = [f"output {i}" for i in range(len(dys))] + [f"gradient of {n}" for n in names]
    errors: list[list[tuple[float, float, float]]] = [[] for _ in labels]
    draws = int(np.clip(DRAWS // max(sum(f.size for f in floats), 1), 3, 16))
    rows: list[Agreement] = []
    for turn in range(AGAIN * draws):
        moved = [f if not turn else _nudged(rng, f) for f in floats]
        results = [jax.tree.leaves(c(dys, moved, others)) for c in compiled]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            wide = [np.asarray(leaf, np.float64) for leaf in moved]
            truth = wide_gradient([np.asarray(d, np.float64) for d in dys], wide, others)
        dtypes = [r.dtype for r in results[0]]
        for own, *three in zip(errors, *results, jax.tree.leaves(truth), strict=True):
            old, new, true = (np.asarray(x).astype(np.float64) for x in three)
            same = bool((np.isfinite(old) == np.isfinite(new)).all())
            dtype = three[0].dtype
            worst = worst_of(new, true, dtype)[0] if same else float("inf")
            own.append((worst_of(old, true, dtype)[0], worst, largest(true)))
        if turn + 1 >= draws:
            rows = [_compared(*row) for row in zip(labels, errors, dtypes)]
            if all(row.agrees for row in rows):
                break
    return tuple(rows)


def _compared(label: str, errors: Sequence[tuple[float, float, float]], dtype: Any) -> Agreement:
    old, new, scale = (max(column) for column in zip(*errors))
    # A gradient that is zero but for rounding, such as that of a bias before a norm, has no digits to compare.
    bound = max(2 * old, 4 * eps_of(dtype) * scale, smallest(dtype)) if scale > 8 * old else max(8 * old, smallest(dtype))
    return Agreement(label, old, new, bound)


def _nudged(rng: np.random.Generator, leaf: Any) -> Any:
    """Each element up or down by a unit in the last place, or not."""
    value = np.asarray(leaf).astype(np.float64)
    return jnp.asarray(value * (1 + eps_of(leaf.dtype) * rng.integers(-1, 2, size=value.shape)), leaf.dtype)
