"""What the commands share: functions in somebody's file, names that are not known, errors as sentences."""

import contextlib
import difflib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from fbackprop.refusing import sentence as sentence
from fbackprop.rules import RULES

__all__ = ["Refusal", "World", "find", "near", "ops", "sentence"]


MANY = 40
"""Names that are not told one by one."""


class Refusal(ValueError):
    """What a command refuses to do. The message is one sentence for the person who gave the command."""


def ops() -> tuple[str, ...]:
    """The names of the library's own ops."""
    return tuple(name for name, rule in RULES.items() if rule.reference.__module__.startswith("fbackprop."))


def near(name: str, known: Collection[str]) -> str:
    """What to say after a name that is not known."""
    lower = {other.lower(): other for other in known}
    close = [lower[other] for other in difflib.get_close_matches(name.lower(), lower, 3, cutoff=0.5)]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    if len(known) > MANY:  # only the ops are so many
        return f"{hint}; fbackprop ops lists all of them"
    return hint + (f"; known are {', '.join(known)}" if known else "")


class World:
    """What importing a stranger's file brings: its folder on ``sys.path``, its modules, its rules, its settings of JAX.
    In force inside ``entered`` alone, so that no file changes what is checked beside it."""

    def __init__(self) -> None:
        self.folder: pathlib.Path | None = None
        self.modules: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        path, settings, modules = list(sys.path), dict(jax.config.values), set(sys.modules)
        sys.path[:0] = [str(self.folder)] if self.folder else []
        sys.modules.update(self.modules)
        _configure(self.settings)
        try:
            yield
        finally:
            files = {name: str(getattr(sys.modules[name], "__file__", "")) for name in set(sys.modules) - modules}
            inside = [n for n, f in files.items() if f.startswith(f"{self.folder}{os.sep}") and "site-packages" not in f]
            self.modules = {n: sys.modules.pop(n) for n in inside if n.partition(".")[0] not in modules}
            self.settings = {name: value for name, value in jax.config.values.items() if value != settings.get(name)}
            _configure({name: settings[name] for name in self.settings})
            sys.path[:] = path
            for name in [name for name, rule in RULES.items() if rule.reference.__module__ in self.modules]:
                del RULES[name]

    def load(self, name: str) -> Any:
        """The module that is named, by its file or as in an import."""
        self.folder, parts, path = pathlib.Path.cwd(), name.split("."), None
        if name.endswith(".py") or os.sep in name:
            path = pathlib.Path(name).absolute()
            if not path.is_file() or path.suffix != ".py":
                why = "expected a file that ends in .py" if path.exists() else "there is no such file"
                raise Refusal(f"{name}: {why}.")
            self.folder, parts = path.parent, [path.stem]
            while (self.folder / "__init__.py").is_file():  # in a package imports may be relative
                self.folder, parts = self.folder.parent, [self.folder.name, *parts]
        try:
            with self.entered():
                if path is None or len(parts) > 1:
                    return importlib.import_module(".".join(parts))
                own = path.stem if path.stem not in sys.modules else f"checked_{path.stem}"  # it may be called jax.py
                spec: Any = importlib.util.spec_from_file_location(own, path)
                sys.modules[own] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
        except (Exception, SystemExit) as error:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if path and f.filename == str(path)]
            at = f" (line {lines[-1]})" if lines and not isinstance(error, SyntaxError) else ""  # which says it itself
            raise Refusal(f"{name} does not import: {sentence(error)}{at}.") from None


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        with contextlib.suppress(RuntimeError):  # one that nobody can change any more
            jax.config.update(name, value)


def find(module: Any, name: str, file: str) -> Callable[..., Any]:
    value = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            mine = {n for n, v in vars(value).items() if callable(v) and getattr(v, "__module__", None) == module.__name__}
            what = f"has no {name!r}" if part else "is a whole module: name a function in it"
            raise Refusal(f"{file} {what}{near(part, sorted(n for n in mine if not n.startswith('_')))}.") from None
    if not callable(value):
        raise Refusal(f"{file}::{name} is no function but of type {type(value).__name__}.")
    return value
