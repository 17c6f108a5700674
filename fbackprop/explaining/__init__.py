"""Explaining: one record of a backward pass, the chain rule for one weight in numbers, and the bytes that are kept."""

from fbackprop.explaining.keeping import saved as saved
from fbackprop.explaining.record import Explanation as Explanation
from fbackprop.explaining.recording import explain as explain

__all__ = ["Explanation", "explain", "saved"]
