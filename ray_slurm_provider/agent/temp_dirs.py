"""Ray's temporary directory: short, private, and removed at the end.

Ray opens its directory to everybody (ray/_private/utils.py, try_to_create_directory), so it lies in one of
ours, which stays closed. Beside it is a note of the process that uses it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_slurm_provider import procfs
from ray_slurm_provider.files import random_name, read_json_object, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "rsp-"
_RANDOM_LETTERS = 8
_NOTE = "user.json"
_RAYS = "r"
# Unix sockets hold 107 bytes (unix(7)), and Ray puts below its temp dir:
# /session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12
MAX_LENGTH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12")
DEFAULT_BASE = "/tmp"  # noqa: S108 each directory below it is made private, with a name nobody can foresee


def make_temp_dir(base: str) -> Path:
    """Make a directory for this node's Ray, in one that only this user may enter.

    Args:
        base: Where; variables like ``$SLURM_TMPDIR`` are expanded.

    Raises:
        OSError: It cannot be made there.
        ValueError: The path would be too long for Ray's sockets.
    """
    parent = _expanded(base)
    excess = excess_length(parent)
    if excess > 0:
        raise ValueError(f"temp_dir {parent!r} is {excess} bytes too long: Unix sockets below it would pass 107 bytes")
    own = Path(parent) / f"{_PREFIX}{random_name(_RANDOM_LETTERS)}"
    own.mkdir(mode=0o700)
    (own / _RAYS).mkdir(mode=0o700)
    _write_note(own)
    return own / _RAYS


def excess_length(parent: str) -> int:
    """Return how many bytes a place is too long for Unix sockets below it; 0 or less when it is not."""
    return len(f"{parent}/{_PREFIX}/{_RAYS}".encode()) + _RANDOM_LETTERS - MAX_LENGTH


def leave_temp_dir(path: Path) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)


def sweep_temp_dirs(base: str) -> list[Path]:
    """Remove what killed jobs of this user left on this host; return what was removed."""
    return _removed(dead_temp_dirs(base))


def dead_temp_dirs(base: str) -> list[Path]:
    return _where(_expanded(base), lambda note: not _lives(note))


def remove_temp_dirs(slurm_conf: str) -> list[Path]:
    """Remove the directories of all jobs of one SLURM; for the end of a sandbox."""
    return _removed(_where(DEFAULT_BASE, lambda note: note.get("slurm_conf") == slurm_conf))


def _expanded(base: str) -> str:
    """Return the place with its variables replaced; on the login node those of a job are unset, and /tmp stands in."""
    path = os.path.expanduser(os.path.expandvars(base or DEFAULT_BASE))  # noqa: PTH111 a variable may hold "~"
    unset = re.search(r"\$\{?\w+", path)
    if unset is None:
        return path
    if "SLURM_JOB_ID" not in os.environ:
        return DEFAULT_BASE
    raise ValueError(f"temp_dir {base!r}: the job has no variable {unset.group()}")


def _write_note(path: Path) -> None:
    note = {
        "pid": os.getpid(),
        "start": _start_time(os.getpid()),
        "host": socket.gethostname(),
        "boot": procfs.boot_id(),
        "slurm_conf": os.environ.get("SLURM_CONF", ""),
    }
    write_json(path / _NOTE, note)


def _removed(paths: list[Path]) -> list[Path]:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return paths


def _where(parent: str, condition: Callable[[dict[str, Any]], bool]) -> list[Path]:
    found = []
    for path in Path(parent).glob(f"{_PREFIX}*"):
        try:
            ours = path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
        except OSError:
            continue
        note = read_json_object(path / _NOTE) if ours else None
        if note is not None and condition(note):
            found.append(path)
    return found


def _lives(note: dict[str, Any]) -> bool:
    if note.get("host") != socket.gethostname():
        # On a shared file system: what it says of processes cannot be judged here.
        return True
    if note.get("boot") != procfs.boot_id():
        return False
    pid = note.get("pid")
    return isinstance(pid, int) and bool(note.get("start")) and _start_time(pid) == note.get("start")


def _start_time(pid: int) -> str:
    process = procfs.find(pid)
    return process.start if process else ""
