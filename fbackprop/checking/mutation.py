"""Mutation testing of backward passes: is every wrong program found?

A backward is traced to a jaxpr with what its forward saved on one of the rule's samples. Calls in it are inlined, dead
equations dropped, and each equation that is left gets **variants**: its result negated, an operand exchanged, a constant
moved, another operator, another axis, a term left out, a result rounded to bfloat16; so do the cotangents themselves. A
**mutant** is the program with one equation replaced by one of its variants.

All mutants of one sample are one compiled program: each equation is a ``lax.switch`` over its variants, and which mutant
runs is one more integer argument of the op. ``check`` then judges the mutant like any op; a finding kills it.

    program = trace(RULES["tanh"], sample)          # program.mutants, each with a readable line and a stable key
    outcome = judge(program, program.mutants[0])    # outcome.killed_by, a name of a check or ""

What would change nothing is not made: variants of constants that give the same constant, an operand replaced by the same
value, other axes with the same elements, roundings of values that have the bits to spare. The variants are wrong with
respect to one sample, so a survivor that does change the cotangents on other inputs tells what the samples lack.
"""

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  (since 0.12 another name of Jaxpr)
    Literal,
    Var,
)

from fbackprop.checking import CHECKS, check
from fbackprop.checking.variants import (
    Read,
    Values,
    Variant,
    bind,
    equal,
    of_outputs,
    read_from,
    rounded_result,
    variants_of,
    wide_type,
)
from fbackprop.rules import Rule
from fbackprop.samples import Sample

__all__ = ["KINDS", "Mutant", "Outcome", "Program", "chosen", "judge", "judge_rule", "killer", "programs_of", "trace"]

KINDS = ("sign", "operand", "constant", "operator", "axis", "term", "cast", "output")

# The others cannot kill a mutant of the backward alone: the forward is the rule's own, and a mutant keeps nothing.
USED_CHECKS = tuple(n for n in CHECKS if n not in ("value", "integers", "alone", "repeat", "finite differences"))

# Of a rule whose backward is meant to differ from the gradient: a function whose gradient it is.
SURROGATES: dict[str, Callable[..., Any]] = {"sign_ste": lambda x: x, "step_ste": lambda x: x}

SEEDS = tuple(range(8))  # of the values of a sample; a survivor has survived all of them
DRAWS = 12  # of anything that might have been saved, to see whether a survivor changes anything


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong program. ``choices`` are pairs of the number of an equation and that of its variant, from 1."""

    rule: str
    sample: str
    dtype: str
    kind: str
    site: str  # the primitive and its number among those of that primitive
    what: str
    before: str  # the equation
    choices: tuple[tuple[int, int], ...]
    number: int

    @property
    def key(self) -> str:
        return " | ".join((self.rule, self.sample, self.dtype, self.site, self.what))

    @property
    def everywhere(self) -> str:
        """The key of this mutant on all samples."""
        return " | ".join((self.rule, "*", self.dtype, self.site, self.what))

    def __str__(self) -> str:
        return f"{self.rule}({self.sample}) {self.dtype}: {self.before}  →  {self.what} [{self.kind}]"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """killed_by: the check that found it first, "" for a survivor, whose verdict is then "same": it changes no bit of any
    cotangent, whatever was saved; "exact enough": in bfloat16 it rounds once more, and stays within the tolerance;
    or "survived", with whether it changes anything on the sample itself."""

    mutant: Mutant
    killed_by: str
    verdict: str = "killed"
    changes_sample: bool = True


@dataclasses.dataclass(eq=False)
class Program:
    """The backward of a rule on one sample, with the variants of its equations and the mutants made of them."""

    rule: Rule
    sample: Sample
    dtype: str
    closed: ClosedJaxpr
    equations: list[Any]  # those of its equations that an output depends on
    tree: Any  # of the cotangents
    variants: list[list[Variant]]  # for each equation, and last for the outputs
    mutants: list[Mutant]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """[mutant + 1, equation]: the variant that runs; the last row is the program itself."""
        table = np.zeros((len(self.mutants) + 1, len(self.variants)), np.int32)
        for mutant in self.mutants:
            for equation, variant in mutant.choices:
                table[mutant.number, equation] = variant
        return table

    def run(self, saved: Any, dy: Any, mutant: Any) -> Any:
        """The cotangents by the mutant of this number (it may be traced); by the program itself for −1."""
        choice = jnp.asarray(self.table)[mutant]
        env = dict(zip(self.closed.jaxpr.constvars, self.closed.consts))
        env |= zip(self.closed.jaxpr.invars, jax.tree.leaves((saved, dy)))
        read = functools.partial(read_from, env)
        for i, (equation, variants) in enumerate(zip(self.equations, self.variants)):
            operands = [read(a) for a in equation.invars]
            env |= zip(equation.outvars, _switch(choice[i], functools.partial(bind, equation), variants, operands, read))
        outs = [read(v) for v in self.closed.jaxpr.outvars]
        return self.tree.unflatten(_switch(choice[-1], list, self.variants[-1], outs, read))

    @functools.cached_property
    def op(self) -> Any:
        """The op of the rule with one more argument, ``mutant``, and the backward of that mutant."""
        rule = self.rule

        def reference(mutant: Any, **arguments: Any) -> Any:
            return SURROGATES.get(rule.name, rule.reference)(**arguments)

        def forward(mutant: Any, **arguments: Any) -> tuple[Any, Any]:
            y, saved = rule.forward(**arguments)
            return y, (saved, mutant)

        def backward(saved: Any, dy: Any, **_: Any) -> tuple[Any, ...]:
            return (*self.run(saved[0], dy, saved[1]), None)

        extra = inspect.Parameter("mutant", inspect.Parameter.KEYWORD_ONLY)
        signature = inspect.Signature([*rule.signature.parameters.values(), extra])
        reference.__name__ = rule.name
        reference.__signature__ = forward.__signature__ = signature  # type: ignore[attr-defined]
        backward.__signature__ = inspect.signature(rule.backward)  # type: ignore[attr-defined]
        exact = rule.exact or rule.name in SURROGATES
        return dataclasses.replace(
            rule, reference=reference, forward=forward, backward=backward, primal=None, exact=exact
        ).op  # fmt: skip

    def changes(self, mutant: int, seed: int, anything: bool = False) -> bool:
        """Whether a mutant changes a bit of a cotangent on the sample, or for anything that might have been saved: numbers of
        all sizes and signs, small integers, among which many are equal, and infinities."""
        leaves = _leaves(self.rule, self.sample, self.dtype, seed)
        rng = np.random.default_rng(seed)

        def drawn(leaf: Any) -> Any:
            if leaf.dtype == jnp.bool_:
                return jnp.asarray(rng.random(leaf.shape) < 0.5)
            if jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.size:
                top = min(int(jnp.abs(leaf).max()), 2**20) + 2
                return jnp.asarray(rng.integers(-top, top + 1, leaf.shape), leaf.dtype)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            values = rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-3, 4, leaf.shape)
            values = np.round(rng.normal(size=leaf.shape) * 2) if seed % 3 == 1 else values
            infinite = (rng.random(leaf.shape) < 0.2) & (seed % 3 == 2)
            return jnp.asarray(np.where(infinite, rng.choice([-np.inf, np.inf], leaf.shape), values), leaf.dtype)

        leaves = list(map(drawn, leaves)) if anything else leaves
        right, wrong = ([np.asarray(d) for d in self._compiled(leaves, m)] for m in (-1, mutant))
        return any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(right, wrong))

    @functools.cached_property
    def seeds(self) -> tuple[int, ...]:
        """Those at which the check finds no fault with the program itself. Equation by equation it is rounded otherwise than
        the compiled rule, and where much cancels it may exceed the tolerance."""
        return tuple(seed for seed in SEEDS if not killer(self, -1, [seed]))

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(lambda leaves, mutant: jax.tree.leaves(self.run(leaves, (), mutant)))


# --------------------------------------------------------------------------------------------------------- judging


def killer(program: Program, number: int, seeds: Sequence[int] = SEEDS) -> str:
    """The first check that finds fault with the mutant of this number, −1 for the program itself, with the values of each
    seed in turn; "" if none does."""
    for seed in seeds:
        dynamic, static = program.rule.split(*_made(program.sample, program.dtype, seed))
        keywords = {**dict(zip(program.rule.arguments, dynamic)), "mutant": jnp.asarray(number)}
        options = dict(zip(program.rule.static, static))
        report = check(program.op, keywords=keywords, static=options, checks=USED_CHECKS, seed=seed)
        if report.findings:
            return report.findings[0].check
    return ""


def judge(program: Program, mutant: Mutant) -> Outcome:
    """Runs ``check`` on a mutant."""
    number = mutant.number
    if killed_by := killer(program, number, program.seeds):
        return Outcome(mutant, killed_by)
    on_sample = any(program.changes(number, seed) for seed in SEEDS)
    if not on_sample and not any(program.changes(number, seed, anything=True) for seed in range(DRAWS)):
        return Outcome(mutant, "", "same", False)
    tolerated = mutant.kind == "cast" and program.dtype == "bfloat16"
    return Outcome(mutant, "", "exact enough" if tolerated else "survived", on_sample)


def programs_of(rule: Rule) -> list[Program]:
    """The rule on each sample in float32, and in bfloat16: there on the first sample only, and only with roundings, unless the
    rule goes another way in it."""
    wide, narrow = ([trace(rule, sample, dtype) for sample in rule.samples] for dtype in ("float32", "bfloat16"))
    if [*map(_way, wide)] == [*map(_way, narrow)]:
        narrow = [_only(narrow[0], lambda m: m.kind == "cast")]
    return [*wide, *narrow]


def judge_rule(rule: Rule, limit: int | None = None) -> list[Outcome]:
    """All mutants of a rule, or as many as ``chosen`` leaves. A mutant that survives on one sample counts as killed if the same
    change of the same program is killed on another.

    Raises: RuntimeError where the check finds fault with a program that is no mutant.
    """
    outcomes: dict[Mutant, Outcome] = {}
    killers: dict[tuple[Any, ...], str] = {}
    kind: dict[Mutant, tuple[Any, ...]] = {}
    for program in chosen(programs_of(rule), limit):
        if program.mutants and 2 * len(program.seeds) <= len(SEEDS):
            found = killer(program, -1)
            raise RuntimeError(f"{rule.name}({program.sample}) {program.dtype}: {found} finds fault without a mutation.")
        for mutant in program.mutants:
            kind[mutant] = (mutant.everywhere, mutant.before, _way(program))
            outcomes[mutant] = judge(program, mutant)
            if killed_by := outcomes[mutant].killed_by:
                killers.setdefault(kind[mutant], killed_by)
    for mutant, outcome in outcomes.items():
        if not outcome.killed_by and kind[mutant] in killers:
            outcomes[mutant] = Outcome(mutant, killers[kind[mutant]], "killed on another sample", outcome.changes_sample)
    return list(outcomes.values())


def chosen(programs: Sequence[Program], limit: int | None) -> list[Program]:
    """At most ``limit`` mutants over all programs, each on all samples, by a hash of their keys: the same in each run."""
    keys = sorted({m.everywhere for p in programs for m in p.mutants}, key=lambda key: zlib.crc32(key.encode()))
    while limit is not None and sum(m.everywhere in keys for p in programs for m in p.mutants) > limit:
        keys = keys[: len(keys) * 9 // 10]
    return [_only(program, lambda m: m.everywhere in keys) for program in programs]


def _only(program: Program, wanted: Callable[[Mutant], bool]) -> Program:
    kept = [m for m in program.mutants if wanted(m)]
    return dataclasses.replace(program, mutants=[dataclasses.replace(m, number=i) for i, m in enumerate(kept)])


def _way(program: Program) -> tuple[str, ...]:
    return tuple(e.primitive.name for e in program.equations if e.primitive.name != "convert_element_type")


# --------------------------------------------------------------------------------------------------------- tracing


def trace(rule: Rule, sample: Sample, dtype: str = "float32") -> Program:
    """The backward of a rule on a sample, with all its mutants."""
    dynamic, static = rule.split(*_made(sample, dtype, 0))
    y, saved = rule.call(rule.forward, dynamic, static)
    options = {n: v for n, v in zip(rule.static, static) if n in rule.backward_static}
    structure, leaves = jax.tree.structure((saved, y)), _leaves(rule, sample, dtype, 0)

    def backward(leaves: Values) -> Any:
        saved, dy = structure.unflatten(leaves)
        cotangents = rule.backward(saved, dy, **options)
        return tuple(d if isinstance(v, jax.Array) else None for d, v in zip(cotangents, dynamic))  # others are not looked at

    closed, shapes = jax.make_jaxpr(backward, return_shape=True)(leaves)
    names = [f"saved {i}" for i in range(len(jax.tree.leaves(saved)))]
    names += [f"dy {i}" for i in range(len(leaves) - len(names))]
    closed = jax.make_jaxpr(functools.partial(_inlined, closed.jaxpr, closed.consts))(*leaves)
    primals = [jnp.result_type(leaf) for d, v in zip(shapes, dynamic) if d is not None for leaf in jax.tree.leaves(v)]
    return _mutated(Program(rule, sample, dtype, closed, _live(closed), jax.tree.structure(shapes), [], []), names, primals)


@functools.lru_cache(maxsize=64)
def _made(sample: Sample, dtype: str, seed: int) -> tuple[Any, Any]:
    return sample.make(seed, dtype)


@functools.lru_cache(maxsize=64)
def _leaves(rule: Rule, sample: Sample, dtype: str, seed: int) -> list[jax.Array]:
    """What the forward saves on a sample, and a random cotangent of y."""
    dynamic, static = rule.split(*_made(sample, dtype, seed))
    y, saved = rule.call(rule.forward, dynamic, static)
    rng = np.random.default_rng(seed)
    dy = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(y)]
    return [*map(jnp.asarray, jax.tree.leaves(saved)), *dy]


_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat",
          "checkpoint", "remat2")  # fmt: skip


def _inlined(jaxpr: Any, consts: Values, *args: Any) -> Values:
    """Evaluates a program. Traced again it is one without calls in it."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    for equation in jaxpr.eqns:
        operands = [read_from(env, a) for a in equation.invars]
        inner = next((equation.params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in equation.params), None)
        if equation.primitive.name in _CALLS and inner is not None:
            results = _inlined(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *operands)
        else:
            results = bind(equation, operands)
        env |= zip(equation.outvars, results)
    return [read_from(env, v) for v in jaxpr.outvars]


def _live(closed: ClosedJaxpr) -> list[Any]:
    """The equations that an output depends on."""
    live, kept = {v for v in closed.jaxpr.outvars if isinstance(v, Var)}, []
    for equation in reversed(closed.jaxpr.eqns):
        if live.intersection(equation.outvars):
            live.update(v for v in equation.invars if isinstance(v, Var))
            kept.append(equation)
    return kept[::-1]


def _switch(choice: Any, right: Any, variants: Sequence[Variant], operands: list[Any], read: Read) -> Values:
    if not variants:
        return right(operands)
    like = jax.eval_shape(lambda: right(operands))

    def branch(run: Callable[[], Values]) -> Callable[[], Values]:
        return lambda: [lax.convert_element_type(r, t.dtype) for r, t in zip(run(), like)]

    return lax.switch(choice, [branch(lambda: right(operands)), *(branch(lambda v=v: v.run(operands, read)) for v in variants)])


# --------------------------------------------------------------------------------------------------------- mutants


def _mutated(program: Program, names: Sequence[str], primals: Values) -> Program:
    """The program with its variants and its mutants."""
    jaxpr, equations, factor = program.closed.jaxpr, program.equations, 1.01 if program.dtype == "float32" else 1.25
    name: dict[Var, str] = dict(zip(jaxpr.invars, names))
    name |= {v: f"constant {i}" for i, v in enumerate(jaxpr.constvars)}
    known: dict[Var, Any] = dict(zip(jaxpr.constvars, program.closed.consts))  # values that depend on no input
    same: dict[Var, Any] = {}  # what is computed alike has the same entry
    spare = {
        v for v in [*jaxpr.invars, *jaxpr.constvars] if not wide_type(v.aval)
    }  # values with no more bits than bfloat16 has
    counts: dict[str, int] = {}

    def rounded(v: Var) -> bool:
        """Whether all that follows is a cast to bfloat16; cotangents are cast to the dtype of their argument."""
        casts = all(e.primitive.name == "convert_element_type" and e.params["new_dtype"] in (jnp.bfloat16, jnp.bool_)
                    for e in equations if v in e.invars)  # fmt: skip
        return casts and all(dtype == jnp.bfloat16 for o, dtype in zip(jaxpr.outvars, primals) if o is v)

    def add(i: int, site: str, before: str, variants: list[Variant]) -> None:
        program.variants.append(variants)
        for k, v in enumerate(variants, 1):
            record(v.kind, site, v.what, before, ((i, k),))

    def record(kind: str, site: str, what: str, before: str, choices: tuple[tuple[int, int], ...]) -> None:
        program.mutants.append(Mutant(program.rule.name, str(program.sample), program.dtype, kind, site, what, before, choices,
                                      len(program.mutants)))  # fmt: skip

    for i, equation in enumerate(equations):
        primitive = equation.primitive.name
        number = counts[primitive] = counts.get(primitive, -1) + 1
        site = f"{primitive} {number}"
        told = [str(np.asarray(a.val)) if isinstance(a, Literal) else name[a] for a in equation.invars]
        variants = variants_of(equation, name, lambda v, same=same: same.get(v, v), factor)
        out = equation.outvars[0]
        if _exact(equation, spare):
            spare.update(equation.outvars)
        elif wide_type(out.aval) and not rounded(out) and len(equation.outvars) == 1:
            variants.append(Variant("cast", "rounded to bfloat16", lambda o, _, e=equation: [rounded_result(bind(e, o)[0])]))
        read = functools.partial(read_from, known)
        if all(isinstance(a, Literal) or a in known for a in equation.invars) and not equation.effects:
            operands = [read(a) for a in equation.invars]
            results = bind(equation, operands)
            known |= zip(equation.outvars, results)
            variants = [
                v for v in variants if any(r not in known for r in v.reads) or not equal(v.run(operands, read), results)
            ]
        add(i, site, f"{site} = {primitive}({', '.join(told)})", variants)
        same |= {v: (*_value(equation, same), k) for k, v in enumerate(equation.outvars)}
        name |= {v: site if len(equation.outvars) == 1 else f"{site}.{k}" for k, v in enumerate(equation.outvars)}
    outputs = [str(v.val) if isinstance(v, Literal) else name[v] for v in jaxpr.outvars]
    add(len(equations), "outputs", f"({', '.join(outputs)})", [*of_outputs(jaxpr.outvars, factor)])
    for i, equation in enumerate(equations):  # from each cast to float32 on: what follows computed in bfloat16
        out, choices = equation.outvars[0], _tainted(program, i)
        if equation.primitive.name == "convert_element_type" and wide_type(out.aval) and out in spare and len(choices) > 1:
            source = name[equation.invars[0]] if isinstance(equation.invars[0], Var) else "a constant"
            told = f"{name[out]} = {source} in float32"
            record("cast", name[out], "cast left out, bfloat16 from here on", told, choices)
    return program


def _tainted(program: Program, start: int) -> tuple[tuple[int, int], ...]:
    """The roundings of all results that depend on that of an equation."""
    reached, choices = {*program.equations[start].outvars}, []
    for i, equation in enumerate(program.equations):
        if reached.intersection(v for v in equation.invars if isinstance(v, Var)):
            reached.update(equation.outvars)
            choices += [(i, k) for k, v in enumerate(program.variants[i], 1) if v.kind == "cast"]
    return tuple(choices)


def _value(equation: Any, same: dict[Var, Any]) -> tuple[Any, ...]:
    operands = [str(a) if isinstance(a, Literal) else same.get(a, a) for a in equation.invars]
    return equation.primitive.name, tuple(operands), str(sorted(equation.params.items(), key=lambda p: p[0]))


_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "pad", "rev", "concatenate", "select_n", "neg", "abs",
          "max", "min", "copy", "gather", "dynamic_slice", "expand_dims")  # fmt: skip


def _exact(equation: Any, spare: set[Var]) -> bool:
    """Whether a result needs no more bits than bfloat16 has, because it is a choice among such values."""
    if equation.primitive.name == "convert_element_type":
        source = equation.invars[0]
        return source in spare or source.aval.dtype in (jnp.bfloat16, jnp.bool_)
    fine = [_fits(a.val) if isinstance(a, Literal) else a in spare or not wide_type(a.aval) for a in equation.invars]
    return equation.primitive.name in _MOVES and all(fine)


def _fits(value: Any) -> bool:
    value = np.asarray(value)
    return np.array_equal(value, value.astype(jnp.bfloat16).astype(value.dtype), equal_nan=value.dtype.kind == "f")
