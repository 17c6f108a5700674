"""Looks over the steps of a run: what is kept of each, and what they say together.

A row is what is kept of a look, in plain numbers and names, so that it can lie in a JSON file: ``metrics.json`` and the
checkpoints of a run hold rows.
"""

import math
from collections.abc import Sequence
from typing import Any

from fbackprop.diagnosing.findings import KILLED, PLACES, judge
from fbackprop.diagnosing.looks import Look
from fbackprop.diagnosing.record import LayerHealth, layer_rows
from fbackprop.diagnosing.trials import reach

__all__ = ["diagnosis", "row", "summary", "told"]

_COLUMNS = ("gradient", "ratio", "gain", "dead", "saturated")


def row(step: int, seen: Look, before: dict[str, Any] | None = None, always_the_same: bool = False) -> dict[str, Any]:
    """What is kept of the look at a step (the first is step 1): a list of numbers for each column, a number a layer.

    ``before`` is the row of the look before it; units that died since are told where the batch is large, or always the same.
    """
    layers = layer_rows(seen)
    found = [{name: getattr(f, name) for name in ("kind", "layer", "message", "cause")} for f in judge(seen)]
    found += _died(seen, layers, before, always_the_same) if before is not None else []
    return {
        "step": step,
        "layers": [layer.name for layer in layers],
        **{name: [getattr(layer, name) for layer in layers] for name in _COLUMNS},
        "reach": reach(seen),
        "findings": found,
    }


def _died(seen: Look, layers: Sequence[LayerHealth], before: dict[str, Any], always_the_same: bool) -> list[dict[str, Any]]:
    shares = dict(zip(before["layers"], before["dead"]))
    many = {seen.layout.layers[call.layer].name for call in seen.layout.calls
            if call.layer is not None and call.elements >= PLACES * call.units}  # fmt: skip
    found = []
    for layer in layers:
        was = shares.get(layer.name)
        if was is None or not layer.dead - was >= KILLED or not (always_the_same or layer.name in many):
            continue
        share = f"{layer.dead:.0%} of the units of {layer.name}"
        message = f"{share} are zero for the whole batch; {was:.0%} were at step {before['step']}."
        cause = (
            "the rate is too large, where one step did it: fb.health(loss, params, batch, optimizer=…) looks a step ahead and "
            f"tries smaller ones (the update of the layer is now {layer.ratio:.2g} of its weights)."
        )
        found.append({"kind": "killed", "layer": layer.name, "message": message, "cause": cause})
    return found


def told(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each thing that was found, once: the finding of its last look, with the first and the last step that it was seen at and
    the number of looks."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in rows:
        for finding in one["findings"]:
            key = finding["kind"], finding["layer"]
            before = found.get(key, {"first": one["step"], "looks": 0})
            found[key] = {**finding, "first": before["first"], "last": one["step"], "looks": before["looks"] + 1}
    return list(found.values())


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For metrics.json: how many looks, what they found, and the rows themselves."""
    return {"looks": len(rows), "findings": told(rows), "rows": list(rows)}


def diagnosis(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A few lines for a person, at the end of a run."""
    if not rows:
        return ["health     no look was taken"]
    looks = f"{len(rows)} look{'s' * (len(rows) != 1)}, from step {rows[0]['step']} to {rows[-1]['step']}"
    found = told(rows)
    if not found:
        last = rows[-1]
        ratios = sorted(r for r in last["ratio"] if r is not None and math.isfinite(r))
        words = f"; updates are {ratios[0]:.1e} to {ratios[-1]:.1e} of the weights at the end" if ratios else ""
        share = last["reach"]
        reached = (
            f"; the gradient at the first layer is {share:.2g} times that at the last"
            if share is not None and math.isfinite(share)
            else ""
        )
        return [f"health     nothing wrong in {looks}{words}{reached}"]
    lines = [f"health     {len(found)} finding{'s' * (len(found) != 1)} in {looks}"]
    for one in found:
        when = f"step {one['first']}" if one["looks"] == 1 else f"{one['looks']} looks, steps {one['first']} to {one['last']}"
        lines += [f"    {one['kind']} ({when}): {one['message']}", f"        cause: {one['cause']}"]
    return lines
