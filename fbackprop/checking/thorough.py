"""The checks of the full depth, by name."""

from fbackprop.checking.arguments import edges, jacobian, low_precision
from fbackprop.checking.costs import retraces, saved_bytes
from fbackprop.checking.examination import Check, Examination
from fbackprop.checking.transformations import devices, second_order, transformations

__all__ = ["THOROUGH", "Examination"]

THOROUGH: dict[str, Check] = {
    "low precision": low_precision, "edges": edges, "jacobian": jacobian, "transformations": transformations,
    "second order": second_order, "devices": devices, "retraces": retraces, "saved bytes": saved_bytes,
}  # fmt: skip
"""In the order in which they run, after the quick ones."""
