"""Writing files so that a crash leaves the old one. Imports the standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file by new text, or leave it as it was.

    Args:
        path: The file; its directory must exist.
        text: The new content.
        mode: Its permission bits.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON value, as `write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None when the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
