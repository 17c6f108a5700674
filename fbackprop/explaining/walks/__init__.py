"""Walks through the documents' examples, step by step, each number from the library's own rules."""

import importlib

import jax

from fbackprop.explaining.walks.frame import Section as Section
from fbackprop.explaining.walks.frame import Walk as Walk

__all__ = ["MODELS", "WALKS", "Section", "Walk", "walk"]

WALKS = ("and-gate", "neuron", "two-three-two", "error-sharing", "sigmoid-neuron", "three-layer", "cnn", "vanishing")
"""Their names; each is a module beside this one."""

MODELS = ("digits-mlp", "digits-cnn", "digits-resnet")
"""The presets that ``walks.trained`` explains on a digit."""


def walk(name: str, language: str = "en") -> Walk:
    """Runs an example in float64 and tells it.

    Args:
      name: one of ``WALKS``. language: "en" or "ko".
    Raises:
      ValueError: where there is no such walk or language.
    """
    if name not in WALKS:
        raise ValueError(f"walk: there is no example {name!r}; known are {', '.join(WALKS)}.")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    with jax.enable_x64(True):
        return module.walk(language)
