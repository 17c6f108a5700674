"""A function of one number and its derivative, as the backward by hand gives it: in the terminal, or as a picture."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.text import Text

from fbackprop.rules import Rule

__all__ = ["curves", "draw", "drawn"]

LOW, HIGH, POINTS = -4.0, 4.0, 481


def curves(rule: Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """x, f(x) and f'(x) of an op that is a function of single elements; None of others."""
    needed = [p.name for p in rule.signature.parameters.values() if p.default is p.empty]
    if len(needed) != 1 or needed[0] in rule.static:
        return None
    x = jnp.linspace(LOW, HIGH, POINTS, dtype=jnp.float32)
    try:
        if jax.eval_shape(rule.op, x).shape != x.shape:
            return None
        y, saved = rule.op.forward(x)
        slope = rule.op.backward(saved, jnp.ones_like(y))[0]
        alone = np.asarray(jax.vmap(rule.op)(x), np.float64)
    except (TypeError, ValueError, AttributeError):
        return None  # it wants rows, or integers
    if slope is None or not np.array_equal(alone, np.asarray(y, np.float64), equal_nan=True):
        return None  # an element depends on the others
    finite = np.isfinite(y) & np.isfinite(slope)
    return np.asarray(x)[finite], np.asarray(y)[finite], np.asarray(slope)[finite]


def drawn(rule: Rule, width: int = 60, height: int = 16) -> Text | None:
    """The two curves in dots of Braille, two by four to a letter: the function blue, its derivative orange."""
    found = curves(rule)
    if found is None:
        return None
    x, *ys = found
    low, high = min(float(y.min()) for y in ys), max(float(y.max()) for y in ys)
    low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    dots = np.zeros((2, height * 4, width * 2), bool)
    for layer, y in zip(dots, ys):
        columns = np.round((x - LOW) / (HIGH - LOW) * (width * 2 - 1)).astype(int)
        rows = np.round((high - y) / span * (height * 4 - 1)).astype(int)
        layer[rows, columns] = True
        for a, b, column in zip(rows, rows[1:], columns[1:]):  # steep parts without gaps; jumps stay open
            if abs(b - a) < height:
                layer[min(a, b) : max(a, b) + 1, column] = True
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    zero = round(high / span * (height * 4 - 1)) // 4
    text = Text()
    for row in range(height):
        text.append(f"{_label(row, height, zero, low, high):>8} ")
        for column in range(width):
            cells = dots[:, row * 4 : row * 4 + 4, column * 2 : column * 2 + 2]
            code = int((cells.any(0) * bits).sum())
            axis = "─" if row == zero else " "
            style = "blue" if cells[0].any() else "dark_orange"
            text.append(chr(0x2800 + code) if code else axis, style if code else "bright_black")
        text.append("\n")
    text.append(f"{'':9}{LOW:<{width // 2}g}{HIGH:>{width - width // 2}g}\n")
    text.append(f"{'':9}── f", "blue").append("   ")
    return text.append("── df/dx, by the backward written by hand", "dark_orange")


def _label(row: int, height: int, zero: int, low: float, high: float) -> str:
    if row == 0:
        return f"{high:.3g}"
    if row == zero:
        return "0"
    return f"{low:.3g}" if row == height - 1 else ""


def draw(rule: Rule, path: pathlib.Path) -> bool:
    """The same as a picture, .png or .svg; False where the op is not of single elements."""
    from fbackprop.drawing import BLUE, FAINT, ORANGE, picture, plain

    found: Any = curves(rule)
    if found is None:
        return False
    x, y, slope = found
    with picture(path, 6.4, 4.0, rule.name) as figure:
        axis = figure.subplots()
        plain(axis, "")
        axis.axhline(0, color=FAINT, linewidth=0.8)
        axis.plot(x, y, color=BLUE, linewidth=1.8, label="f(x)")
        axis.plot(x, slope, color=ORANGE, linewidth=1.8, label="f′(x), by the backward written by hand")
        axis.set_xlabel("x")
        axis.legend(frameon=False)
    return True
