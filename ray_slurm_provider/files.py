"""Writing files so that a crash leaves the old one, and reading what anybody may have put there.

Imports the standard library only.
"""

import contextlib
import errno
import json
import os
import random
import stat
import string
from pathlib import Path
from typing import Any, BinaryIO

_LETTERS = string.ascii_lowercase + string.digits
_LARGEST_BYTES = 64 * 1024 * 1024


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file by new text, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.{random_name(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # What came from the system as bytes that are no UTF-8 goes back as it came.
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def random_name(length: int) -> str:
    """Return letters and digits that nobody can foresee."""
    # As ``secrets`` does it; that module loads OpenSSL, 0.4 MB of each node and 14 ms of its start (measured, 3.11).
    return "".join(random.SystemRandom().choices(_LETTERS, k=length))


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def is_gone(path: Path) -> bool:
    """Tell whether there positively is nothing at a path."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; what is none is an OSError: a named pipe would keep us waiting for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file.

    Raises:
        OSError: It cannot be read, is no file, or is far too large.
        UnicodeDecodeError: It is not UTF-8.
    """
    with open_file(path) as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data.decode("utf-8", errors)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None when the file is missing or holds something else."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
