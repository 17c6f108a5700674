"""Weights from Flax: linen variables and nnx states, matched to the layers of a model.

A Flax tree says what each module is called and which arrays it holds, not in which order the modules are used. Linen's
``Dense_0``, ``Dense_1`` count their construction; nnx has the names of attributes. So a module goes to a layer

- of its class, where linen's automatic name tells it (``Dense_0``),
- with the same leaves, of the shapes that the layer's options and the features handed on by the layers before ask for,
- and, inside an ``nn.Sequential`` (``layers_0``) or a list of nnx (``0``), in the order of its number.

Where that leaves more than one way, ``from_flax`` raises and asks for ``names``: with a wrong guess the shapes would fit
and the outputs would be wrong.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fbackprop.layers import (
    Conv,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Einsum,
    Embed,
    Flatten,
    Layer,
    PReLU,
    Residual,
    Serial,
)
from fbackprop.layers.base import OpLayer, Params, State

__all__ = ["from_flax"]


def from_flax(model: Layer, variables: Any, names: Sequence[str] | None = None) -> tuple[Params, State]:
    """The parameters and the state of ``model``, out of the variables of a Flax model with the same layers.

    Args:
      model: a layer or model of this library. Layers of several ops are not matched; the parameters of MultiHeadAttention
        are those of Flax's module as they are.
      variables: linen's ``{"params": …, "batch_stats": …}``, an ``nnx.State``, or such a state as a plain dict; arrays are
        taken as they are.
      names: the paths of Flax's modules, such as ``("Conv_0", "encoder/Dense_1")``, one for each layer of the model that
        has parameters or state, in the order of their use. Needed only where names and shapes leave more than one way.
    Returns:
      ``(params, state)``, of the structure that ``model.init`` gives.
    Raises:
      ValueError: where no module fits a layer, modules are left over, leaves are missing or of another shape, or more
        than one assignment fits. TypeError: where ``model`` is no layer, or ``variables`` no mapping.
    """
    modules = _modules(variables)
    if not isinstance(model, Layer):
        raise TypeError(f"from_flax: expected a layer or model of fbackprop, got {getattr(model, '__name__', repr(model))}.")
    if names is not None:
        modules = _in_order(modules, [names] if isinstance(names, str) else list(names), len(list(_slots(model))))
    search = _Search(named=names is not None)
    complete = search.run(model, _Partial((), tuple(modules), None))
    found = next((f for f in complete if not f.free), None)
    if found is None:
        raise ValueError(f"from_flax: {search.complaint}")
    other = next((f for f in complete if not f.free), None)
    swaps = {m.path for f in (found, other) if f is not None for m in f.alike}
    if other is not None:
        swaps |= {m.path for pair in zip(found.used, other.used) if pair[0] is not pair[1] for m in pair}
    if swaps:
        raise ValueError(
            f"from_flax: {', '.join(sorted(swaps, key=_natural))} fit more than one layer by kind and shape, and the names do "
            "not tell the order of use. Pass names: the modules' paths, one for each layer with parameters, in the order of "
            f"use; where that is the order of the numbers, names={tuple(m.path for m in found.used)!r}."
        )
    return _build(model, iter(found.used))


@dataclasses.dataclass(frozen=True, eq=False)
class _Module:
    """A Flax module that holds arrays: its path, its arrays by leaf name, and where it stands in lists."""

    path: str
    leaves: dict[str, Any]
    place: tuple[int | str, ...]  # the path, with integers where a number tells the order of use

    @property
    def automatic(self) -> str | None:
        """The class, where linen named the module after it."""
        match = re.fullmatch(r"([A-Z]\w*)_\d+", self.path.rpartition("/")[2])
        return match[1] if match else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: jnp.shape(leaf) for name, leaf in sorted(self.leaves.items())}

    def before(self, other: "_Module") -> bool:
        """Whether this one is known to be used before the other: their paths part at a number."""
        for own, its in zip(self.place, other.place):
            if own != its:
                return isinstance(own, int) and isinstance(its, int) and own < its
        return False

    def alike(self, other: "_Module") -> bool:
        """Whether nothing tells which of the two comes first, and both fit where one does."""
        unordered = not any(isinstance(part, int) for part in self.place + other.place)
        return unordered and self.automatic == other.automatic and self.shapes == other.shapes

    def __str__(self) -> str:
        return f"{self.path or 'the module'} ({_words(self.shapes)})"


def _words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


# Reading Flax's trees.


def _modules(variables: Any) -> list[_Module]:
    """Every module that holds arrays, parameters and statistics together."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"from_flax: variables is a {type(variables).__name__}, expected linen's {{'params': …, 'batch_stats': …}} or "
            "the state of an nnx model, nnx.state(model)."
        )
    trees: list[Any] = [variables]
    if isinstance(variables.get("params"), Mapping) or isinstance(variables.get("batch_stats"), Mapping):
        if other := sorted(set(variables) - {"params", "batch_stats"}):
            raise ValueError(f"from_flax: variables has the collections {other}; expected 'params' and 'batch_stats' alone.")
        trees = list(variables.values())
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tree in trees:
        _collect(tree, (), found)
    modules = [_Module("/".join(map(str, path)), leaves, tuple(map(_place, path))) for path, leaves in found.items()]
    # Leaves "count" and "key" alone are the random streams of nnx.Dropout.
    return sorted((m for m in modules if not set(m.leaves) <= {"count", "key"}), key=lambda m: _natural(m.path))


def _collect(tree: Mapping[Any, Any], path: tuple[Any, ...], found: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _collect(value, (*path, key), found)
            continue
        for unwrap in ("unbox", "get_value"):  # linen's partitioned parameters, nnx's variables
            value = getattr(value, unwrap)() if hasattr(value, unwrap) else value
        if hasattr(value, "shape"):
            found.setdefault(path, {})[str(key)] = value


def _place(part: Any) -> int | str:
    number = re.fullmatch(r"(?:layers_)?(\d+)", str(part))
    return int(number[1]) if number else str(part)


def _natural(path: str) -> list[Any]:
    """Sorts Dense_2 before Dense_10: text and numbers alternate."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _in_order(modules: list[_Module], names: list[str], slots: int) -> list[_Module]:
    """The modules as ``names`` lists them."""
    by_path = {m.path: m for m in modules}
    if missing := [name for name in names if name not in by_path]:
        raise ValueError(f"from_flax: names has {missing[0]!r}, variables has {', '.join(by_path)}.")
    if len(names) != slots or len(set(names)) != len(names):
        raise ValueError(f"from_flax: names is {names}, expected {slots} different paths, one for each layer with parameters.")
    if left := [str(m) for m in modules if m.path not in names]:
        raise ValueError(f"from_flax: names leaves out {', '.join(left)}.")
    return [by_path[name] for name in names]


# Matching.


@dataclasses.dataclass(frozen=True, eq=False)
class _Partial:
    """Modules given to the layers so far."""

    used: tuple[_Module, ...]  # in the order of the layers
    free: tuple[_Module, ...]
    width: int | None  # the features handed on, None where the weights do not tell
    alike: tuple[_Module, ...] = ()  # modules that might as well have changed places


class _Search:
    """All ways to give modules to the layers of a model, one after the other, and why there is none.

    Of modules that are alike only the first is tried, and the choice noted: the others would do as well.
    """

    def __init__(self, named: bool):
        self.named = named  # the modules stand in their order
        self._reached = -1
        self._reason = ""

    @property
    def complaint(self) -> str:
        return self._reason or "the model has no layer with parameters, variables has some."

    def run(self, layer: Layer, so_far: _Partial) -> Iterator[_Partial]:
        for done in self._run(layer, so_far):
            if done.free:
                self._failed(
                    len(done.used) + 1, f"the model has no layer left for {', '.join(map(str, done.free))}; it is {layer!r}."
                )
            yield done

    def _run(self, layer: Layer, so_far: _Partial) -> Iterator[_Partial]:
        if isinstance(layer, Serial):
            yield from self._chain(layer.layers, so_far)
        elif isinstance(layer, Residual):
            for body in self._run(layer.body, so_far):
                again = dataclasses.replace(body, width=so_far.width)
                for both in [again] if layer.shortcut is None else self._run(layer.shortcut, again):
                    if body.width is None or both.width is None or body.width == both.width:
                        yield dataclasses.replace(both, width=body.width if both.width is None else both.width)
        elif _leaf_names(layer):
            yield from self._slot(layer, so_far)
        else:
            known = isinstance(layer, OpLayer) and not isinstance(layer, Flatten)
            yield so_far if known else dataclasses.replace(so_far, width=None)

    def _chain(self, layers: Sequence[Layer], so_far: _Partial) -> Iterator[_Partial]:
        if not layers:
            yield so_far
        else:
            for first in self._run(layers[0], so_far):
                yield from self._chain(layers[1:], first)

    def _slot(self, layer: Any, so_far: _Partial) -> Iterator[_Partial]:
        tried: list[_Module] = []
        reasons = []
        for module in so_far.free[:1] if self.named else so_far.free:
            if reason := self._misfit(layer, module, so_far):
                reasons.append(reason)
            elif not any(module.alike(other) for other in tried):
                tried.append(module)
        if not tried:
            features = "" if so_far.width is None else f" after {so_far.width} features"
            self._failed(
                len(so_far.used),
                f"no module fits {layer!r}{features}, layer {len(so_far.used)} of those with parameters: "
                f"{'; '.join(reasons) or 'there is none left'}.",
            )
        for module in tried:
            free = tuple(other for other in so_far.free if other is not module)
            same = () if self.named else tuple(other for other in free if module.alike(other))
            alike = so_far.alike + ((module, *same) if same else ())
            yield _Partial((*so_far.used, module), free, _features(layer, module, so_far.width), alike)

    def _misfit(self, layer: Any, module: _Module, so_far: _Partial) -> str:
        """Why a module does not suit a layer; empty where it does."""
        if not self.named and module.automatic not in (None, layer.name):
            return f"{module.path} is a {module.automatic}"
        if set(module.leaves) != _leaf_names(layer):
            return f"{module.path} has the leaves {sorted(module.leaves)}, expected {sorted(_leaf_names(layer))}"
        width = _width(layer, module) if so_far.width is None else so_far.width
        try:
            expected = {**layer.shapes(width), **{n: a.shape for n, a in dict(layer.initial_state(width)).items()}}
        except ValueError as error:
            return f"{module.path}: {error}"
        if wrong := {name: shape for name, shape in module.shapes.items() if shape != expected[name]}:
            return f"{module.path} has {_words(wrong)}, expected {_words({n: expected[n] for n in wrong})}"
        if not self.named and (first := [m.path for m in so_far.free if m.before(module)]):
            return f"{module.path} comes after {first[0]}"
        return ""

    def _failed(self, reached: int, reason: str) -> None:
        if reached > self._reached:
            self._reached, self._reason = reached, reason


def _leaf_names(layer: Layer) -> set[str]:
    """The names of parameters and state; none for layers that are not one op."""
    return {*layer.initializers(), *dict(layer.initial_state(1))} if isinstance(layer, OpLayer) else set()


def _width(layer: Layer, module: _Module) -> int:
    """The number of features that go in, by the shapes of a module that is to fit."""
    shape = next(iter(module.shapes.values())) or (0,)
    if isinstance(layer, DenseGeneral):
        return shape[0] if "kernel" not in module.shapes else module.shapes["kernel"][0]
    if isinstance(layer, (Dense, Conv, ConvTranspose)):
        kernel = module.shapes["kernel"]
        groups = layer.feature_group_count if isinstance(layer, Conv) else 1
        place = -1 if isinstance(layer, ConvTranspose) and layer.transpose_kernel else -2
        return kernel[place] * groups if len(kernel) > 1 else 0
    return 0 if isinstance(layer, Embed) else shape[-1]


def _features(layer: Layer, module: _Module, width: int | None) -> int | None:
    """The number of features that come out, where the weights tell."""
    if isinstance(layer, PReLU):
        return width
    if isinstance(layer, Einsum):
        return None
    features = getattr(layer, "features", _width(layer, module))
    return features[-1] if isinstance(features, tuple) else features


# Putting together.


def _slots(layer: Layer) -> Iterator[Layer]:
    """The layers that have parameters or state, in the order of use."""
    if isinstance(layer, (Serial, Residual)):
        for inner in layer.layers if isinstance(layer, Serial) else layer.branches.values():
            yield from _slots(inner)
    elif _leaf_names(layer):
        yield layer


def _build(layer: Layer, given: Iterator[_Module]) -> tuple[Params, State]:
    """Parameters and state in the structure of ``layer``, each slot taking the next module."""
    if isinstance(layer, Serial):
        entries = [_build(inner, given) for inner in layer.layers]
        states = tuple(state for _, state in entries)
        return {"layers": tuple(params for params, _ in entries)}, {"layers": states} if any(s != () for s in states) else ()
    if isinstance(layer, Residual):
        branches = {name: _build(inner, given) for name, inner in layer.branches.items()}
        state = {name: state for name, (_, state) in branches.items()}
        return {name: params for name, (params, _) in branches.items()}, state if any(s != () for s in state.values()) else ()
    if not isinstance(layer, OpLayer) or not _leaf_names(layer):
        return {}, ()
    leaves = {name: jnp.asarray(leaf) for name, leaf in next(given).leaves.items()}
    params = {name: leaves[name] for name in layer.initializers()}
    return params, {name: leaves[name] for name in dict(layer.initial_state(1))} or ()
