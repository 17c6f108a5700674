"""Accelerating other people's models: what their traced programs compute, and ops of this library in place of it."""

from fbackprop.accelerating.calling import Accelerated as Accelerated
from fbackprop.accelerating.calling import accelerate as accelerate
from fbackprop.accelerating.report import Report as Report
from fbackprop.accelerating.rewriting import Found as Found

__all__ = ["Accelerated", "Found", "Report", "accelerate"]
