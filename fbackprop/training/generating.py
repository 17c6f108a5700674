"""What ``fbackprop generate`` does: the model of a run, its newest checkpoint, a prompt, and tokens one after the other."""

import codecs
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.files import read_json
from fbackprop.models import generate
from fbackprop.training.checkpoints import Checkpoints, RunError
from fbackprop.training.language import from_recipe, tokens_of

__all__ = ["GenerateOptions", "generate_from_run"]


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The options of the command."""

    run_dir: str
    prompt: str | None = None
    tokens: int = 400
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0


def generate_from_run(options: GenerateOptions) -> int:
    """Prints the prompt and what the model continues it with, as it is drawn.

    Raises:
      RunError: with one sentence, where the folder holds no run of a language model or the prompt does not suit it.
    """
    directory = pathlib.Path(options.run_dir)
    recipe = _recipe(directory)
    try:
        model = from_recipe(recipe)
    except (TypeError, ValueError) as error:
        raise RunError(f"{directory / 'config.json'}: the recipe of the model cannot be followed ({error}).") from None
    text = recipe.get("text") is True
    prompt = _prompt(options.prompt, text, model.vocabulary)
    like, _ = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        params = checkpoints.params(like)
    finally:
        checkpoints.close()
    drawn = generate(
        model, params, prompt, options.tokens, seed=options.seed, temperature=options.temperature, top_k=options.top_k
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = sys.stdout
    out.write(decoder.decode(bytes(prompt)) if text else " ".join(map(str, prompt)))
    for token in drawn:
        out.write(decoder.decode(bytes([token])) if text else f" {token}")
        out.flush()
    out.write((decoder.decode(b"", final=True) if text else "") + "\n")
    return 0


def _recipe(directory: pathlib.Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise RunError(f"{directory}: there is no such folder; expected the folder of a run.")
    config = read_json(directory / "config.json")
    if config is None:
        raise RunError(f"{directory} holds no run (there is no config.json that can be read).")
    if not isinstance(config.get("recipe"), dict):
        raise RunError(f"{directory} holds a run of {config.get('preset')}, which is no language model.")
    return config["recipe"]


def _prompt(given: str | None, text: bool, vocabulary: int) -> list[int]:
    """The prompt as tokens; a new line, or token 0, where none is given."""
    if text:
        return tokens_of(given or "\n")
    words = (given or "0").replace(",", " ").split()
    if odd := [w for w in words if not (w.isascii() and w.isdigit() and int(w) < vocabulary)]:
        raise RunError(f"--prompt holds {odd[0]!r}; expected tokens from 0 to {vocabulary - 1}, with spaces between.")
    return [int(w) for w in words] or [0]
