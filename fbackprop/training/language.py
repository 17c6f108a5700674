"""Language models to train: the standard library's source, and the user's files of text and tokens."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbackprop import data, models
from fbackprop.training.checkpoints import RunError
from fbackprop.training.fit import Fit
from fbackprop.training.tasks import Preset, Task

__all__ = ["LANGUAGE_PRESETS", "SIZE", "from_recipe", "is_language_file", "language_preset", "text_of", "tokens_of"]

SIZE = ("model", "layers", "width", "heads", "length")
"""What a model's size is told by: the name of one of ``models.SIZES``, numbers, or numbers in place of that one's."""

_LENGTH, _LONGEST = 128, 1024  # of a window: by default, and that of a model with a name
_GPT: dict[str, Any] = {"layers": 2, "width": 256, "heads": 4, "length": _LENGTH, "modern": True, "init_std": 1 / 16}
_LSTM: dict[str, Any] = {"width": 384, "layers": 1}
_HELD_OUT = 128  # windows that the held-out loss is measured on
_PROMPTS, _SAMPLE = ("def ", "class ", "import "), 400  # what samples begin with, and the bytes after it


def from_recipe(recipe: Any) -> Any:
    """The model that a recipe, such as a run's config.json holds it, describes: ``{"model": "gpt", "options": {…}}``.

    Raises:
      ValueError: where it describes none.
    """
    if (
        not isinstance(recipe, dict)
        or recipe.get("model") not in ("gpt", "lstm_lm")
        or not isinstance(recipe.get("options"), dict)
    ):
        raise ValueError("there is no recipe of a language model")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe["options"].items()}
    return getattr(models, recipe["model"])(**options)


def tokens_of(text: str) -> list[int]:
    """A text as bytes."""
    return list(text.encode("utf-8", "surrogateescape"))


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def _task(source: data.TokenData, kind: str, options: dict[str, Any], seed: int) -> Task:
    """The mean cross-entropy of the next token, and that of windows that are held out."""
    known = options.get("vocabulary", source.vocabulary)  # of a model with a name
    if source.vocabulary > known:
        raise RunError(f"the tokens go up to {source.vocabulary - 1}; the model has a vocabulary of {known}.")
    recipe = _recipe(kind, {**options, "vocabulary": source.vocabulary if source.text else known}, source.text)
    model = from_recipe(recipe)
    params, state = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))

    def loss_fn(params: Any, batch: Any) -> Any:
        return model.loss(params, batch["tokens"][:, :-1], batch["tokens"][:, 1:])

    held_out = source.test[np.unique(np.linspace(0, len(source.test) - 1, min(_HELD_OUT, len(source.test))).astype(int))]
    loss = jax.jit(loss_fn)

    def evaluate(params: Any, state: Any) -> dict[str, float]:
        parts = [held_out[i : i + 32] for i in range(0, len(held_out), 32)]
        return {"test_loss": float(np.average([loss(params, {"tokens": p}) for p in parts], weights=[len(p) for p in parts]))}

    def files(result: Fit) -> dict[str, str]:
        if not source.text:
            return {}
        texts = [_sample(model, result.params, prompt, seed + i) for i, prompt in enumerate(_PROMPTS)]
        return {"samples.txt": "\n\n--------\n\n".join(texts) + "\n"}

    def after(result: Fit) -> list[str]:
        bits = result.metrics["test_loss"] / np.log(2)
        unit = "byte" if source.text else "token"
        return [f"loss       {result.metrics['test_loss']:.4f} nats a {unit} ({bits:.3f} bits), held out"]

    return Task(
        model, params, state, {"tokens": source.train}, loss_fn, evaluate, source.fingerprint, after=after, files=files,
        recipe=recipe, unit=("tokens", source.train.length), evaluate_every=50, check_on=2,
    )  # fmt: skip


def _sample(model: Any, params: Any, prompt: str, seed: int) -> str:
    """The prompt, and what the model continues it with."""
    start = tokens_of(prompt)
    return text_of([*start, *models.generate(model, params, start, _SAMPLE, seed=seed, temperature=0.6, top_k=40)])


def _rate(lr: float, per_epoch: int) -> Callable[[Any], Any]:
    """Up within 20 steps, and after 1,000 down with the root of the step."""
    return lambda step: lr * jnp.minimum((step + 1) / 20, 1.0) * jnp.sqrt(1000 / jnp.maximum(step, 1000))


def _recipe(kind: str, options: Mapping[str, Any], text: bool) -> dict[str, Any]:
    """As JSON has it."""
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {"model": kind, "options": told, "text": text}


def _options(kind: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model of a size.

    Raises:
      RunError: with one sentence, where there is no such model.
    """
    own = {name: value for name, value in size.items() if name != "model"}
    if kind == "lstm_lm":
        if given := [name for name in ("model", "heads") if name in size]:
            raise RunError(f"--{given[0]} is for a GPT; this preset trains an LSTM.")
        return {**_LSTM, **{name: value for name, value in own.items() if name != "length"}}
    options = {**_GPT, "init_std": own.get("width", _GPT["width"]) ** -0.5, **own}
    if "model" in size:
        known = {name: form for name, (make, form) in models.SIZES.items() if make is models.gpt}
        if size["model"] not in known:
            raise RunError(f"there is no language model {size['model']!r}; known are {', '.join(known)}.")
        form = known[size["model"]]
        options = {**form, "length": min(form["length"], _LONGEST), **own}
    try:
        from_recipe(_recipe(kind, {"vocabulary": 256, **options}, text=True))
    except ValueError as error:
        raise RunError(f"there is no model of this size: {error}") from None
    return options


def _preset(
    name: str, summary: str, read: Callable[[int], data.TokenData], kind: str, lr: float, size: Mapping[str, Any] | None = None
) -> Preset:
    """``lr`` suits the width of the preset; where a model is wider it is as much smaller."""
    plain, options = _options(kind, {}), _options(kind, size or {})
    length = (size or {}).get("length") or options.get("length", _LENGTH)
    lr *= min(1.0, plain["width"] / options["width"])

    def task(seed: int) -> Task:
        return _task(read(length), kind, options, seed)

    sized = None if size else functools.partial(_preset, name, summary, read, kind, lr)
    return Preset(name, summary, task, "adamw", lr, 32, steps=300, schedule=_rate, sized=sized)


def language_preset(path: str) -> Preset:
    """A preset for the user's own file of text or tokens."""
    read = functools.partial(data.load_tokens, path)
    return _preset(pathlib.Path(path).stem, f"the file {path}", read, "gpt", 4e-3)


def is_language_file(path: pathlib.Path) -> bool:
    return path.suffix.lower() in data.TEXT + data.TOKENS


LANGUAGE_PRESETS = (
    _preset("stdlib-gpt", "a GPT (RoPE, RMS norm, SwiGLU) on the bytes of the standard library's own source; writes code",
            data.standard_library, "gpt", 4e-3),
    _preset("stdlib-lstm", "an LSTM on the same bytes", data.standard_library, "lstm_lm", 5e-3),
)  # fmt: skip
