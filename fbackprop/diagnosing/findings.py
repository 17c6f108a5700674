"""What is wrong with a step, told from looks at it alone, with the cause that the numbers give.

The limits, once for all:

    vanishing, exploding    less than 1/1000, or more than 1000 times, of the cotangent of the last layer's output reaches that
                            of the first (its norm; in a chain of layers this is the product of the gains)
    dead                    a quarter of a layer's units, or more, have slope zero for the whole batch, in at least 16 places
                            each; or the next step makes a tenth of them so
    saturated               half of an activation's elements have less than a twentieth of its largest slope
    overshoot               the next step makes the loss on the same batch larger

Sources: Glorot & Bengio 2010 (gradients and saturation over depth); He et al. 2015, arXiv:1502.01852 (what scale keeps relu's
gradient); Lu et al. 2019, arXiv:1903.06733 (dying relu).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from fbackprop.diagnosing.calls import Call, Layout
from fbackprop.diagnosing.looks import FLAT, Look
from fbackprop.diagnosing.trials import Trial, layer_ends, reach
from fbackprop.diagnosing.variants import ACTIVATIONS, SQUASHING

__all__ = ["KINDS", "Finding", "gain_of_call", "gains", "judge"]

KINDS = ("non-finite forward", "non-finite backward", "vanishing", "exploding", "dead", "killed", "saturated", "overshoot",
         "unreached")  # fmt: skip

SHRUNK, GROWN = 1e-3, 1e3
DEAD, KILLED, PLACES = 0.25, 0.1, 16
SATURATED = 0.5


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong: what, where, why, and which changes were tried. The proposal is the change that helped most,
    None where none did (or none was tried)."""

    kind: str  # one of KINDS
    layer: str
    message: str
    cause: str
    trials: tuple[Trial, ...] = ()
    proposal: Trial | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.message}", f"  cause: {self.cause}"]
        lines += [
            f"  tried {trial}{self._measure(trial)}: {'helps' if trial.helped else 'does not help'}" for trial in self.trials
        ]
        if self.trials:
            lines.append(f"  proposed: {self.proposal.change if self.proposal else 'none of these'}")
        return "\n".join(lines)

    def _measure(self, trial: Trial) -> str:
        """What tells whether this finding is gone."""
        if self.kind in ("vanishing", "exploding"):
            return f", gradient at the first layer {trial.reach:.2g} times that at the last"
        if self.kind in ("dead", "killed"):
            return f", dead after a step {trial.dead:.0%}"
        return f", saturated {trial.saturated:.0%}" if self.kind == "saturated" else ""


def judge(now: Look, after: Look | None = None) -> list[Finding]:
    """The findings of a look, and of one at the same batch after the step."""
    bad = list(_not_finite(now))
    if bad:
        return bad
    found = [*_depth(now), *_dead(now), *_unreached(now)]
    if not any(f.kind == "vanishing" for f in found):
        found += _saturated(now)
    return found + (list(_killed(now, after)) + list(_overshoot(now, after)) if after is not None else [])


# Gains.


def gain_of_call(seen: Look, call: int) -> float:
    """The norm of the cotangents of a call's inputs that are no parameters, over that of its outputs' cotangent. NaN where
    it has no such input, or gets no cotangent."""
    own = [i for i, (c, given) in enumerate(seen.layout.inputs) if c == call and given.place is None]
    out = float(seen["dout"][call])
    return float(np.linalg.norm(seen["din"][own])) / out if own and out else math.nan


def gains(seen: Look) -> list[float]:
    """Of each layer: the norm of the cotangents of what it reads, over that of the cotangent of what it gives; NaN for a
    loss, and for a layer that has no input to be differentiated."""
    found = []
    for i, layer in enumerate(seen.layout.layers):
        own = seen.layout.of_layer(i)
        if not own or layer.is_loss:
            found.append(math.nan)
            continue
        last = float(seen["dout"][own[-1]])
        found.append(gain_of_call(seen, own[0]) * float(seen["dout"][own[0]]) / last if last else math.nan)
    return found


def _depth(seen: Look) -> Iterator[Finding]:
    share, layout = reach(seen), seen.layout
    ends = layer_ends(layout)
    if not (0 < share < SHRUNK or share > GROWN):
        return  # where it is exactly zero, the layer is unreached
    first, last = (layout.layers[_layer(layout, i)].name for i in (ends[0], ends[-1]))
    steps = len(ends) - 1
    mean = share ** (1 / steps)
    if share < SHRUNK:
        message = (
            f"of the gradient at the output of {last} (norm {seen['dout'][ends[-1]]:.2g}) {share:.1e} is left at that of "
            f"{first} ({seen['dout'][ends[0]]:.2g}): a gain of {mean:.2g} a layer, {steps} times."
        )
        yield Finding("vanishing", first, message, _cause_of_depth(seen, ends, shrinks=True))
    else:
        message = (
            f"the gradient grows from {seen['dout'][ends[-1]]:.2g} at the output of {last} to {seen['dout'][ends[0]]:.2g} at "
            f"that of {first}, {share:.1e} times: a gain of {mean:.2g} a layer, {steps} times."
        )
        yield Finding("exploding", first, message, _cause_of_depth(seen, ends, shrinks=False))


def _cause_of_depth(seen: Look, ends: list[int], shrinks: bool) -> str:
    """Which ops the factor comes from, and why."""
    layout = seen.layout
    between = range(ends[0] + 1, ends[-1] + 1)
    logs = {i: math.log10(g) for i in between if (g := gain_of_call(seen, i)) > 0}
    acts = [i for i in logs if layout.calls[i].op in ACTIVATIONS]
    others = [i for i in logs if i not in acts]
    by_acts, by_others = sum(logs[i] for i in acts), sum(logs[i] for i in others)
    shares = f"activations account for 10^{by_acts:.1f}, all other ops for 10^{by_others:.1f}"
    scale = _scale(seen)
    kernels = "" if scale is None else (
        f" The kernels have {scale:.2g} times the standard deviation 1/√(number of inputs) that keeps the variance of a "
        "linear layer (He's, for relu, has 1.41 times it)."
    )  # fmt: skip
    if acts and abs(by_acts) >= abs(by_others) and (by_acts < 0) == shrinks:
        op = Counter(layout.calls[i].op for i in acts).most_common(1)[0][0]
        mean = 10 ** (by_acts / len(acts))
        flat = [s for i in acts if np.isfinite(s := seen["saturated"][i])]
        if flat and float(np.mean(flat)) > SATURATED:
            return (
                f"saturation: {np.mean(flat):.0%} of {op}'s outputs lie where its slope is below {FLAT:.0%} of the largest; "
                f"{shares}.{kernels}"
            )
        most = f", whose slope is {SQUASHING[op]:.3g} at most" if op in SQUASHING else ""
        return f"depth times slope: {op}{most}, hands on {mean:.2g} of the cotangent, {len(acts)} times in a row; {shares}."
    word = "small" if shrinks else "large"
    return f"initialisation scale times depth: the kernels are too {word} for this depth; {shares}.{kernels}"


def _scale(seen: Look) -> float | None:
    """The geometric mean, over the kernels, of their standard deviation times √fan_in (a Frobenius norm / √fan_out)."""
    found = [
        math.log(norm / math.sqrt(layer.fans[1]))
        for layer, norm in zip(seen.layout.layers, seen["kernel"])
        if layer.fans is not None and norm > 0 and not layer.is_loss
    ]
    return math.exp(sum(found) / len(found)) if found else None


# Units.


def _dead(seen: Look) -> Iterator[Finding]:
    for i, call in enumerate(seen.layout.calls):
        places = call.elements // max(call.units, 1)
        if seen["dead"][i] >= DEAD and places >= PLACES:
            count, layer = round(call.units * float(seen["dead"][i])), _name(seen.layout, i)
            message = (
                f"{count} of {call.units} units of {call.op} in {layer} have slope zero in all {places} places of the batch."
            )
            cause = (
                "their inputs are never positive, so no gradient comes back through them and they stay as they are: a bias or "
                f"a step that was too large, or inputs of one sign{_size_of_input(seen, i)}."
            )
            yield Finding("dead", layer, message, cause)


def _killed(now: Look, after: Look) -> Iterator[Finding]:
    for i, call in enumerate(now.layout.calls):
        before, then = float(now["dead"][i]), float(after["dead"][i])
        if then - before >= KILLED:
            layer, lost = _name(now.layout, i), round(call.units * (then - before))
            number = call.layer
            ratio = now["update"][number] / now["weight"][number] if number is not None and now["weight"][number] else math.nan
            message = (
                f"the next step kills {lost} of {call.units} units of {call.op} in {layer}: they are zero for the whole batch "
                f"after it (dead before: {round(call.units * before)})."
            )
            cause = (
                f"the rate is too large: the update of {layer} is {ratio:.2g} of its weights (norms), where about 0.001 is "
                f"usual; the gradient of the layer has the norm {now['gradient'][number or 0]:.3g}."
            )
            yield Finding("killed", layer, message, cause)


def _saturated(seen: Look) -> Iterator[Finding]:
    for i, call in enumerate(seen.layout.calls):
        if seen["saturated"][i] >= SATURATED:
            layer = _name(seen.layout, i)
            share = f"{seen['saturated'][i]:.0%} of the outputs of {call.op} in {layer}"
            message = f"{share} lie where its slope is below {FLAT:.0%} of the largest."
            cause = f"its inputs are too large{_size_of_input(seen, i)}."
            yield Finding("saturated", layer, message, cause)


def _overshoot(now: Look, after: Look) -> Iterator[Finding]:
    before, then = float(now.loss), float(after.loss)
    if then > before or not math.isfinite(then):
        weights = now["weight"] > 0
        ratios = np.where(weights, now["update"] / np.where(weights, now["weight"], 1), 0)
        worst = int(np.argmax(ratios)) if len(ratios) else 0
        layer = now.layout.layers[worst].name
        message = f"the next step takes the loss on the same batch from {before:.4g} to {then:.4g}."
        cause = f"the rate is too large: the update of {layer} is {ratios[worst]:.2g} of its weights (norms)."
        yield Finding("overshoot", layer, message, cause)


def _unreached(seen: Look) -> Iterator[Finding]:
    layers = seen.layout.layers
    names = [layer.name for i, layer in enumerate(layers) if layer.places and not seen["gradient"][i] and not _opens(seen, i)]
    if names:
        few = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        called = [i for i, layer in enumerate(layers) if layer.name in names and seen.layout.of_layer(i)]
        cause = (
            "no cotangent comes back to them: what lies behind is dead, saturated, stopped or too small for its dtype."
            if called
            else "the loss does not use them."
        )
        yield Finding("unreached", names[0], f"the gradient of {few} is exactly zero.", cause)


def _opens(seen: Look, layer: int) -> bool:
    """Whether the next layer that has a gradient is zero itself: a residual branch that begins so, and opens with a step."""
    for i in range(layer + 1, len(seen.layout.layers)):
        if seen["gradient"][i]:
            return not seen["weight"][i] or (seen.layout.layers[i].kernel is not None and not seen["kernel"][i])
    return False


# Numbers that are not finite.


def _not_finite(seen: Look) -> Iterator[Finding]:
    layout, sick = seen.layout, False
    for i, call in enumerate(layout.calls):
        given = [j for j, (c, _) in enumerate(layout.inputs) if c == i]
        bad = [j for j in given if seen["bad_in"][j]]
        if not bad and not seen["bad_out"][i]:
            continue
        sick = True
        where = f"{call.op} in {_name(layout, i)} (call {i + 1} of {len(layout.calls)})"
        if bad:
            name, place = layout.inputs[bad[0]][1]
            what = f"its {name}" + ("" if place is None else f", the parameter {layout.name(place)},")
            message = f"the first numbers that are not finite come into {where}: {seen['bad_in'][bad[0]]:.0f} in {what}."
            cause = (
                "the parameter itself is not finite" if place is not None
                else "they are in the batch" if i == 0
                else "they are in the batch, or arise between the ops, in code that is not of this library"
            ) + "; all calls before are finite."  # fmt: skip
        else:
            fine = ", ".join(f"{layout.inputs[j][1].name} up to {seen['peak_in'][j]:.3g}" for j in given)
            message = f"the first numbers that are not finite come out of {where}: {seen['bad_out'][i]:.0f} of {call.elements}."
            cause = f"its inputs are finite ({fine}); {_why(seen, i, call, given)}"
        yield Finding("non-finite forward", _name(layout, i), message, cause)
        break
    if not sick and not np.isfinite(seen.loss):
        last = layout.calls[-1].op if layout.calls else "no op"
        cause = (
            f"every call of an op is finite; it arises after the last of them ({last}), in code that is not of this library."
        )
        yield Finding("non-finite forward", "loss", f"the loss is {float(seen.loss)}.", cause)
    yield from _not_finite_backward(seen)


def _not_finite_backward(seen: Look) -> Iterator[Finding]:
    layout = seen.layout
    for i in reversed(range(len(layout.calls))):
        call, where = layout.calls[i], f"{layout.calls[i].op} in {_name(layout, i)} (call {i + 1} of {len(layout.calls)})"
        given = [j for j, (c, _) in enumerate(layout.inputs) if c == i]
        bad = [j for j in given if seen["bad_din"][j]]
        if seen["bad_dout"][i]:
            message = f"the first cotangents that are not finite come back into {where}: {seen['bad_dout'][i]:.0f}."
            cause = "they come from the loss, or arise between the ops; all calls behind it are finite."
        elif bad:
            names = ", ".join(layout.inputs[j][1].name for j in bad)
            message = f"the first cotangents that are not finite come out of the backward of {where}, for {names}."
            forward = [j for j in given if seen["bad_in"][j]]
            reason = "its inputs are not, in the forward" if forward else _why(seen, i, call, given, float(seen["dout"][i]))
            cause = f"the cotangent of its output is finite (norm {seen['dout'][i]:.3g}); {reason}"
        else:
            continue
        yield Finding("non-finite backward", _name(layout, i), message, cause)
        return
    if not np.isfinite(seen["gradient"]).all():
        layer = layout.layers[int(np.argmin(np.isfinite(seen["gradient"])))].name
        cause = "the cotangents of all calls are finite; it arises between the ops, or is a square beyond float32."
        yield Finding("non-finite backward", layer, f"the gradient of {layer} is not finite.", cause)


def _why(seen: Look, i: int, call: Call, given: list[int], cotangent: float = 1.0) -> str:
    """Whether numbers of this size, multiplied and summed, can overflow the dtype."""
    limit = float(jnp.finfo(call.dtype).max) if call.dtype else math.inf
    sizes = [cotangent, *(float(seen["peak_in"][j]) for j in given)]
    if math.prod(max(size, 1.0) for size in sizes) * max(call.elements, 1) > limit:
        return f"the result overflows {call.dtype}, whose largest number is {limit:.3g}."
    if call.is_loss:
        return "the loss of at least one example is infinite: its label has probability 0, or is none of the classes."
    return f"{call.op} is not finite at these inputs."


# Words.


def _layer(layout: Layout, call: int) -> int:
    number = layout.calls[call].layer
    assert number is not None
    return number


def _name(layout: Layout, call: int) -> str:
    """The layer that a call belongs to."""
    number = layout.calls[call].layer
    return layout.layers[number].name if number is not None else "the loss" if layout.calls[call].is_loss else "no layer"


def _size_of_input(seen: Look, call: int) -> str:
    """The size of what an activation reads, where the call before it gave it."""
    if not call or not seen.layout.calls[call - 1].elements:
        return ""
    root = float(seen["out"][call - 1]) / math.sqrt(seen.layout.calls[call - 1].elements)
    return f" (root mean square {root:.2g})"
