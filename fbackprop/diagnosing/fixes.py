"""Which changes are tried for a finding, and what it means that one helped.

A change that is proposed was tried, on copies, on the same batch: the finding is gone with it, and the loss after the same
number of steps is finite and, unless it is the rate itself that was wrong, lower than without it.
"""

import dataclasses
import math

from fbackprop.diagnosing.calls import Layout
from fbackprop.diagnosing.findings import GROWN, SATURATED, SHRUNK, Finding
from fbackprop.diagnosing.looks import Look
from fbackprop.diagnosing.trials import Bench, Change, Trial
from fbackprop.diagnosing.variants import ACTIVATIONS, DYING, SQUASHING, Variant

__all__ = ["with_trials"]

_FACTORS = (0.5, 0.2, 0.1, 0.01)


def with_trials(finding: Finding, bench: Bench, now: Look, known_rate: bool) -> Finding:
    """The finding with the changes that were tried for it, and the one to propose."""
    changes = [c for c in _changes(finding, now, bench) if known_rate or (c.factor == 1 and math.isinf(c.limit))]
    trials: list[Trial] = []
    for change in changes:
        trial = bench.trial(change)
        trials.append(trial._replace(helped=_helped(finding, trial, bench.trial(Change()))))
        if change.factor != 1 and trials[-1].helped:
            break  # the largest of the smaller rates that helps; those below it are no better
    if math.isfinite(now["gradient"].max(initial=0.0)) and finding.kind in ("killed", "overshoot") and known_rate:
        limit = float((now["gradient"] ** 2).sum() ** 0.5) / 10
        trial = bench.trial(Change(limit=limit))
        trials.append(trial._replace(helped=_helped(finding, trial, bench.trial(Change()))))
    helpful = [trial for trial in trials if trial.helped]
    proposal = min(helpful, key=lambda trial: trial.loss, default=None)
    return dataclasses.replace(finding, trials=tuple(trials), proposal=proposal)


def _changes(finding: Finding, now: Look, bench: Bench) -> list[Change]:
    ops = {call.op for call in now.layout.calls}
    activations = ops & set(ACTIVATIONS)
    suited = "He" if ops & set(DYING) else "LeCun"
    norm = [Change(variant=Variant(norm=True))] if activations else []
    if finding.kind in ("killed", "overshoot"):
        return [Change(factor=f) for f in _FACTORS]
    if finding.kind in ("vanishing", "saturated"):
        relu = [Change(initializer="He", variant=Variant(activation="relu"))] if activations - set(DYING) else []
        tanh = (
            [Change(initializer="LeCun", variant=Variant(activation="tanh"))] if activations & set(SQUASHING) - {"tanh"} else []
        )
        return [*_redrawn(suited, now.layout), *relu, *tanh, *norm]
    if finding.kind == "exploding":
        return [*_redrawn(suited, now.layout), *norm]
    if finding.kind == "dead":
        leaky = [Change(variant=Variant(activation="leaky_relu"))]
        return [*_redrawn(suited, now.layout), *leaky, *norm]
    if finding.kind.startswith("non-finite"):
        narrow = any(call.dtype in ("float16", "bfloat16") for call in now.layout.calls)
        return [*([Change(float32=True)] if narrow else []), *_redrawn(suited, now.layout), *norm]
    return []


def _redrawn(initializer: str, layout: Layout) -> list[Change]:
    return [Change(initializer=initializer)] if any(layer.fans for layer in layout.layers) else []


def _helped(finding: Finding, trial: Trial, as_it_is: Trial) -> bool:
    if not trial.finite or not math.isfinite(trial.loss):
        return False
    better = trial.loss < as_it_is.loss or not math.isfinite(as_it_is.loss)
    learns = trial.loss < trial.losses[0]
    if finding.kind in ("vanishing", "exploding"):
        return SHRUNK <= trial.reach <= GROWN and better
    if finding.kind == "dead":
        return trial.dead < as_it_is.dead / 2 and better
    if finding.kind == "killed":
        return trial.dead <= trial.dead_before and learns
    if finding.kind == "saturated":
        return trial.saturated < SATURATED and better
    if finding.kind == "overshoot":
        return trial.losses[1] < trial.losses[0] and learns
    return True
