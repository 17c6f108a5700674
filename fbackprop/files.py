"""Files that are either the old or the new one, never half of one: written beside it, then renamed."""

import json
import math
import os
import pathlib
import tempfile
from typing import Any

__all__ = ["read_json", "write_atomically", "write_json"]


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces the file at ``path`` in one move; a reader, or a crash, sees the old content or the new.

    Raises:
      OSError: where it cannot be written, or its folder is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: this is a folder; expected a file.")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: pathlib.Path, content: Any) -> None:
    """The same for JSON. Numbers that JSON does not have, NaN and the infinities, become null."""
    write_atomically(path, (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where the file is not there or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
