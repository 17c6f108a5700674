"""Which checker of backward passes catches what: the bank of wrong and right functions against four of them.

    python benchmarks/checkers.py [--only NAME …] [--seeds N] [--right N] [--json FILE] [--markdown FILE]

A row for each way to be wrong (tests/bank.py), a column for each checker:

    fbackprop   fbackprop.check, at the depth that the entry asks for
    check_grads jax.test_util.check_grads(fn, args, order=1, modes=("rev",)), its own step and tolerances
    chex        chex.assert_numerical_grads(fn, args, order=1, modes=("rev",)), its own tolerances
    gradcheck   torch.autograd.gradcheck of a twin, an autograd.Function in float64 with the same mistake

A cell is "caught" or "missed"; "both" where the checker objects just as much to the definition under autodiff at the same
arguments, so that nothing can be told from it; or "-" where it cannot be asked: the mistake is one of dtypes, transformations,
devices or memory, of which it has no notion, or there is no twin. A checker that raises anything has caught it. Then the right
functions, where whatever a checker finds is a false alarm. Integers, keys and options are closed over for those checkers that
take only arrays of floating-point numbers.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import bank  # type: ignore[import-not-found]

from fbackprop.checking import check
from fbackprop.files import write_atomically

CAUGHT, MISSED, BOTH, UNTOLD = "caught", "missed", "both", "-"
CHECKERS = ("fbackprop", "check_grads", "chex", "gradcheck")

# What checkers that compare with finite differences are never asked: they see the gradient of one function of floats.
NOT_ASKED = {
    "low precision": "other dtypes",
    "transformations": "vmap",
    "devices": "devices",
    "retraces": "time",
    "saved bytes": "memory",
}


# ------------------------------------------------------------------------------------------------ the checkers of JAX


def floats_only(fn: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function of the differentiable leaves alone, with differentiable outputs alone."""
    leaves, tree = jax.tree.flatten(tuple(args))

    def floating(leaf: Any) -> bool:
        return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating)

    moving = [i for i, leaf in enumerate(leaves) if floating(leaf)]

    def of_floats(*moved: Any) -> Any:
        values = list(leaves)
        for i, value in zip(moving, moved):
            values[i] = value
        y = fn(*jax.tree.unflatten(tree, values), **options.get("static", {}))
        return tuple(leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating))

    return of_floats, [leaves[i] for i in moving]


def ask_fbackprop(entry: Any, made: Any, seed: int) -> str:
    fn, args, options = made
    depth = {"depth": entry.depth, "checks": None} if getattr(entry, "depth", "quick") != "quick" else {}
    report = check(fn, *args, seed=seed, **depth, **options)
    return MISSED if report.ok else CAUGHT


def objects(checker: Callable[..., Any], fn: Callable[..., Any], args: Any) -> bool:
    try:
        checker(fn, args)
    except Exception:
        return True
    return False


def ask_with(checker: Callable[..., Any]) -> Callable[[Any, Any, int], str]:
    def ask(entry: Any, made: Any, _: int) -> str:
        if getattr(entry, "check", "") in NOT_ASKED:
            return UNTOLD
        fn, _, options = made
        definition = options.get("reference") or getattr(fn, "fun", None)
        if not objects(checker, *floats_only(*made)):
            return MISSED
        if definition and objects(checker, *floats_only(definition, *made[1:])):
            return BOTH
        return CAUGHT

    return ask


def check_grads(fn: Callable[..., Any], args: Sequence[Any]) -> None:
    jax.test_util.check_grads(fn, args, order=1, modes=("rev",))


def assert_numerical_grads(fn: Callable[..., Any], args: Sequence[Any]) -> None:
    # Of its default, forward and reverse mode, the former refuses every custom_vjp, right or wrong.
    chex.assert_numerical_grads(fn, args, order=1, modes=("rev",))


# ------------------------------------------------------------------------------------------------------------ PyTorch


def torch_twins(torch: Any) -> dict[str, tuple[Any, Callable[[Any], tuple[Any, ...]]]]:
    """For entries of the bank: a function with the same mistake, and what makes its arguments from a generator."""
    F = torch.nn.functional

    def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        """From forward(*args) and backward(saved arguments, dy)."""

        class Twin(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                ctx.save_for_backward(*args)
                return forward(*args)

            @staticmethod
            def backward(ctx: Any, *dy: Any) -> Any:
                return backward(ctx.saved_tensors, *dy)

        return with_definition(Twin.apply, forward)

    def with_definition(twin: Any, definition: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return twin(*args)

        call.fun = definition  # type: ignore[attr-defined]
        return call

    def normals(*shapes: tuple[int, ...]) -> Callable[[Any], tuple[Any, ...]]:
        return lambda g: tuple(torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)

    def moved(make: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
        """One argument, from normals by make(x)."""
        return lambda g: (make(torch.randn(6, 5, generator=g, dtype=torch.float64)).requires_grad_(True),)

    x65, xw, xwb = normals((6, 5)), normals((6, 5), (5, 4)), normals((6, 5), (5, 4), (4,))

    def tanh(backward: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        return function(torch.tanh, lambda s, dy: backward(torch.tanh(s[0]), dy))

    def dense(backward: Callable[..., Any]) -> Callable[..., Any]:
        return function(lambda x, w: x @ w, lambda s, dy: backward(*s, dy))

    def one_element(y: Any, dy: Any, index: tuple[int, int], factor: float) -> Any:
        d = dy * (1 - y * y)
        d[index] *= factor
        return d

    def layer_norm(without: str) -> Callable[..., Any]:
        def parts(x: Any) -> tuple[Any, Any]:
            r = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
            return (x - x.mean(-1, keepdim=True)) * r, r

        def backward(s: Any, dy: Any) -> Any:
            n, r = parts(s[0])
            d = dy * s[1]
            mean = 0 if without in ("mean", "both") else d.mean(-1, keepdim=True)
            along = 0 if without in ("variance", "both") else n * (d * n).mean(-1, keepdim=True)
            gain = (dy * n).mean(0) if without == "sum" else (dy * n).sum(0)
            return r * (d - mean - along), gain, dy.sum(0)

        return function(lambda x, g, b: parts(x)[0] * g + b, backward)

    labels = torch.arange(6) % 11

    def cross_entropy(backward: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        return function(
            lambda x: F.cross_entropy(x, labels, reduction="none"),
            lambda s, dy: backward(torch.softmax(s[0], -1) - F.one_hot(labels, 11), dy),
        )

    def max_backward(s: Any, dy: Any) -> Any:
        return torch.where(s[0] == s[0].amax(-1, keepdim=True), dy[:, None], torch.zeros_like(s[0]))

    ids = torch.tensor([0, 4, 2, 3, 3, 3])

    def scatter(s: Any, dy: Any) -> Any:
        out = torch.zeros_like(s[0])
        out[ids] = dy
        return out

    def in_place(s: Any, dy: Any) -> Any:
        y = workspace["y"]
        y.copy_(1 - y * y)
        return dy * y

    workspace: dict[str, Any] = {}

    def remember(x: Any) -> Any:
        workspace["y"] = torch.tanh(x).detach().clone()
        return torch.tanh(x)

    class BiasAlone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any, b: Any) -> Any:
            ctx.save_for_backward(x, w)
            return x @ w + b

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, w = ctx.saved_tensors
            lonely = not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
            return dy @ w.T, x.T @ dy, dy.sum(0) * (0 if lonely else 1)

    def reduced(x: Any) -> Any:
        return x.to(torch.bfloat16).to(torch.float64)

    norm = normals((6, 16), (16,), (16,))
    return {
        "one part in a thousand": (dense(lambda x, w, dy: (1.001 * dy @ w.T, x.T @ dy)), xw),
        "factor two forgotten": (function(lambda x: x * x, lambda s, dy: dy * s[0]), x65),
        "one element of thirty": (tanh(lambda y, dy: one_element(y, dy, (2, 3), 1.5)), x65),
        "one element of 4096 half wrong": (tanh(lambda y, dy: one_element(y, dy, (7, 9), 0.5)), normals((16, 16))),
        "sign of one argument": (dense(lambda x, w, dy: (dy @ w.T, -(x.T @ dy))), xw),
        "transposed": (dense(lambda x, w, dy: (dy @ w, x.T @ dy)), normals((5, 5), (5, 5))),
        "layer norm without the term of the mean": (layer_norm("mean"), norm),
        "layer norm without the term of the variance": (layer_norm("variance"), norm),
        "statistics as constants": (layer_norm("both"), norm),
        "mean where a sum belongs": (layer_norm("sum"), norm),
        "bias: first row instead of the sum": (
            function(lambda x, w, b: x @ w + b, lambda s, dy: (dy @ s[1].T, s[0].T @ dy, dy[0])), xwb,
        ),
        "bias not summed": (function(lambda x, w, b: x @ w + b, lambda s, dy: (dy @ s[1].T, s[0].T @ dy, dy)), xwb),
        "one cotangent too few": (function(lambda x, w, b: x @ w + b, lambda s, dy: (dy @ s[1].T, s[0].T @ dy)), xwb),
        "Liger PR 1298: rows multiplied by grad_output[0]": (cross_entropy(lambda d, dy: d * dy[0]), normals((6, 11))),
        "right for ones only": (tanh(lambda y, dy: dy.mean() * (1 - y * y)), x65),
        "cotangent of y left out": (tanh(lambda y, dy: 1 - y * y), x65),
        "lost where it stands alone": (tanh(lambda y, dy: dy * (1 - y * y) * (0 if (dy != 0).sum() == 1 else 1)), x65),
        "clipped inside": (tanh(lambda y, dy: (dy * (1 - y * y)).clamp(-1, 1)), x65),
        "its sign only": (tanh(lambda y, dy: dy.sign() * (1 - y * y)), x65),
        "a constant added": (tanh(lambda y, dy: dy * (1 - y * y) + 1e-3), x65),
        "weight decay inside": (dense(lambda x, w, dy: (dy @ w.T, x.T @ dy + 1e-4 * w)), xw),
        "Unsloth 5230: zero": (dense(lambda x, w, dy: (dy @ w.T, torch.zeros_like(w))), xw),
        "NaN": (tanh(lambda y, dy: torch.where(y > 0.5, torch.nan, dy * (1 - y * y))), x65),
        "relu'(0) = 1": (
            function(torch.relu, lambda s, dy: torch.where(s[0] >= 0, dy, 0.0)), moved(lambda x: torch.where(x > 0.5, x, 0.0)),
        ),
        "relu'(0) = 1, at ordinary arguments": (function(torch.relu, lambda s, dy: torch.where(s[0] >= 0, dy, 0.0)), x65),
        "every tie gets the whole gradient": (function(lambda x: x.amax(-1), max_backward), moved(torch.round)),
        "ties, at ordinary arguments": (function(lambda x: x.amax(-1), max_backward), x65),
        "last row of the batch": (tanh(lambda y, dy: dy * (1 - y * y) * (torch.arange(6)[:, None] < 5)), x65),
        "duplicate indices: set instead of add": (function(lambda t: t[ids], scatter), normals((7, 4))),
        "running sum not reversed": (function(lambda x: x.cumsum(-1), lambda s, dy: dy.cumsum(-1)), x65),
        "rounded to bfloat16": (tanh(lambda y, dy: reduced(dy * (1 - y * y))), normals((12, 16))),
        "Liger 272, 254: saved tensor overwritten in place": (function(remember, in_place), x65),
        "cut-cross-entropy 52: bias wrong on its own": (BiasAlone.apply, xwb),
        "straight-through, not declared": (function(lambda x: torch.round(x * 4) / 4, lambda s, dy: dy), x65),
        "stop_gradient in the backward": (function(torch.tanh, lambda s, dy: dy * (1 - torch.tanh(s[0]) ** 2).detach()), x65),
        "stop_gradient in the definition": (lambda x: x * x.detach(), x65),
        "another result each time": (tanh(lambda y, dy: dy * (1 - y * y) * (1 + 1e-3 * torch.randn(()))), x65),
    }  # fmt: skip


def ask_gradcheck(torch: Any, twins: dict[str, Any]) -> Callable[[Any, Any, int], str]:
    def ask(entry: Any, _: Any, seed: int) -> str:
        if entry.name not in twins:
            return UNTOLD
        fn, make = twins[entry.name]
        args = make(torch.Generator().manual_seed(seed))
        if not objects(torch.autograd.gradcheck, fn, args):
            return MISSED
        definition = getattr(fn, "fun", None)
        return BOTH if definition and objects(torch.autograd.gradcheck, definition, args) else CAUGHT

    return ask


# ----------------------------------------------------------------------------------------------------------- the table


def ask_all(entry: Any, made: Any, seed: int, askers: dict[str, Any]) -> dict[str, str]:
    """What each checker says of one entry. Whatever a checker raises itself is told, not hidden."""
    cells = {}
    for name, ask in askers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cells[name] = ask(entry, made, seed)
        except Exception as error:
            cells[name] = f"failed: {type(error).__name__}"
    return cells


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch_told, askers = "", {
        "fbackprop": ask_fbackprop, "check_grads": ask_with(check_grads), "chex": ask_with(assert_numerical_grads),
    }  # fmt: skip
    try:
        import torch

        askers["gradcheck"] = ask_gradcheck(torch, torch_twins(torch))
    except ImportError:
        torch_told = "PyTorch is not installed, so its column is left out: pip install torch."
    wrong = [e for e in bank.WRONG if not options.only or any(o in e.name for o in options.only)]
    right = [e for e in bank.RIGHT if not options.only or any(o in e.name for o in options.only)][: options.right]
    started, rows, alarms = time.monotonic(), [], []
    for entry in track(wrong, "wrong functions", console=console):
        said: dict[str, list[str]] = {name: [] for name in askers}
        for seed in range(options.seeds):
            with jax.enable_x64(entry.x64):
                for name, cell in ask_all(entry, entry.make(seed), seed, askers).items():
                    said[name].append(cell)
        cells = {
            name: cell[0] if len(set(cell)) == 1 else f"{cell.count(CAUGHT)} of {len(cell)}" for name, cell in said.items()
        }
        rows.append({"name": entry.name, "check": entry.check, "where": entry.where, "source": entry.source, **cells})
    ours = {name: ask for name, ask in askers.items() if name != "gradcheck"}
    for entry in track(right, "right functions", console=console):
        with jax.enable_x64(entry.x64):
            # A backward that is declared inexact is nothing that the others can be told.
            made = entry.make(0, entry.shapes[0])
            chosen = ours if made[2].get("exact", True) else {"fbackprop": ask_fbackprop}
            cells = ask_all(entry, made, 0, chosen)
        alarms.append({"name": entry.name, **{name: cells.get(name, UNTOLD) for name in ours}})
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {name: _version(name) for name in ("jax", "chex", "torch", "numpy", "fbackprop")}
        | {"python": platform.python_version()},
        "seeds": options.seeds, "seconds": round(time.monotonic() - started), "note": torch_told,
        "wrong": rows, "right": alarms, "totals": totals(rows, alarms, list(askers)),
    }  # fmt: skip


def totals(rows: Sequence[dict[str, Any]], alarms: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Caught, missed and not asked of the wrong; false alarms and runs of the right. Caught by some seeds only is missed."""
    told = {}
    for name in names:
        cells = [row[name] for row in rows]
        others = [row[name] for row in alarms if row.get(name, UNTOLD) != UNTOLD]
        told[name] = {
            "caught": cells.count(CAUGHT), "cannot be told": cells.count(UNTOLD), "both": cells.count(BOTH),
            "missed": len(cells) - sum(map(cells.count, (CAUGHT, UNTOLD, BOTH))),
            "false alarms": len(others) - others.count(MISSED), "right functions": len(others),
        }  # fmt: skip
    return told


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def title(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['date']}; {result['machine']}; {versions}; seeds {result['seeds']}; {result['seconds']} s"


def lines_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, and its totals, as text."""
    names = list(result["totals"])
    lines = [(row["name"], row["check"], *(row[name] for name in names)) for row in result["wrong"]]
    for key in ("caught", "missed", "both", "cannot be told", "false alarms", "right functions"):
        of_torch = key in ("false alarms", "right functions")
        cells = ("-" if of_torch and name == "gradcheck" else str(result["totals"][name][key]) for name in names)
        lines.append((f"TOTAL {key}", "", *cells))
    return lines


def markdown(result: dict[str, Any]) -> str:
    head = ("way to be wrong", "check of fbackprop", *result["totals"])
    rows = [head, tuple("---" for _ in head), *lines_of(result)]
    alarms = [
        f"- {row['name']}: {', '.join(n for n in result['totals'] if row.get(n, UNTOLD) not in (MISSED, UNTOLD))}"
        for row in result["right"] if any(row.get(n, UNTOLD) not in (MISSED, UNTOLD) for n in result["totals"])
    ]  # fmt: skip
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    told = ["False alarms on right functions:\n\n" + "\n".join(alarms)] if alarms else []
    return "\n\n".join([title(result), *([result["note"]] if result["note"] else []), table, *told]) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries with one of these in their name; by default all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of arguments and cotangents (default: 1)")
    parser.add_argument("--right", type=int, metavar="N", help="the first N right functions only; by default all")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or (options.right is not None and options.right < 0):
        parser.error("--seeds takes a number from 1 on, --right one from 0 on")
    if options.only and not any(o in e.name for o in options.only for e in (*bank.WRONG, *bank.RIGHT)):
        parser.error(f"nothing in the bank is named like {', '.join(options.only)}")
    result = measure(options, Console(stderr=True))
    table = Table(title=title(result))
    for column in ("way to be wrong", "check of fbackprop", *result["totals"]):
        table.add_column(column)
    for line in lines_of(result):
        table.add_row(*line, style="bold" if line[0].startswith("TOTAL") else None)
    console = Console()
    console.print(table)
    for row in result["right"]:
        if alarmed := [n for n in result["totals"] if row.get(n, UNTOLD) not in (MISSED, UNTOLD)]:
            console.print(f"false alarm on {row['name']}: {', '.join(alarmed)}", highlight=False)
    if result["note"]:
        console.print(result["note"])
    if options.json:
        write_atomically(pathlib.Path(options.json), (json.dumps(result, indent=1) + "\n").encode())
    if options.markdown:
        write_atomically(pathlib.Path(options.markdown), markdown(result).encode())
    return result


if __name__ == "__main__":
    main()
