"""Measuring: times as paired ratios of interleaved runs, and bytes kept for the backward."""

from fbackprop.measuring.bytes import saved_bytes as saved_bytes
from fbackprop.measuring.times import Ratio as Ratio
from fbackprop.measuring.times import interleave as interleave
from fbackprop.measuring.times import ratio as ratio

__all__ = ["Ratio", "interleave", "ratio", "saved_bytes"]
