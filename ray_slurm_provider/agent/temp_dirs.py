"""Ray's temporary directory: short, private, and removed at the end.

Ray opens its directory to everybody (ray/_private/utils.py, try_to_create_directory), so it lies in one of
ours, which stays closed. Since Ray 2.55 every node has one of its own. Before, all nodes of a cluster use the
head's path, each on its own host; nodes that share a host share the directory, and the last one removes it. So
beside each directory there is a note of every node that uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_slurm_provider import procfs
from ray_slurm_provider.files import random_name, read_json_object, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "rsp-"
_RANDOM_LETTERS = 8
_NOTES = "users"
_RAYS = "r"
# Unix sockets hold 107 bytes (unix(7)), and Ray puts below its temp dir:
# /session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12
MAX_LENGTH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12")
DEFAULT_BASE = "/tmp"  # noqa: S108 each directory below it is made private, with a name nobody can foresee


def make_temp_dir(base: str, node_id: str) -> Path:
    """Make a directory for this node's Ray, in one that only this user may enter.

    Args:
        base: Where; variables like ``$SLURM_TMPDIR`` are expanded.
        node_id: The Ray node that it is for.

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
    path = own / _RAYS
    join_temp_dir(path, node_id)
    return path


def excess_length(parent: str) -> int:
    """Return how many bytes a place is too long for Unix sockets below it; 0 or less when it is not."""
    return len(f"{parent}/{_PREFIX}/{_RAYS}".encode()) + _RANDOM_LETTERS - MAX_LENGTH


def join_temp_dir(path: Path, node_id: str) -> None:
    """Use the directory of the cluster's head on this host; it is made when this node is the first one here.

    Raises:
        OSError: It cannot be used, or belongs to somebody else.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path.parent} is not ours alone")
    path.mkdir(mode=0o700, exist_ok=True)
    _write_note(path.parent, node_id)


def leave_temp_dir(path: Path, node_id: str) -> None:
    """Stop using a directory, and remove it when no other node on this host uses it."""
    (path.parent / _NOTES / f"{node_id}.json").unlink(missing_ok=True)
    if not any(map(_lives, _notes(path.parent))):
        shutil.rmtree(path.parent, ignore_errors=True)


def sweep_temp_dirs(base: str) -> list[Path]:
    """Remove what killed jobs of this user left on this host; return what was removed."""
    return _removed(dead_temp_dirs(base))


def dead_temp_dirs(base: str) -> list[Path]:
    """Return what killed jobs of this user left on this host."""
    return _where(_expanded(base), lambda note: not _lives(note))


def remove_temp_dirs(slurm_conf: str) -> list[Path]:
    """Remove the directories of all jobs of one SLURM; for the end of a sandbox."""
    return _removed(_where(DEFAULT_BASE, lambda note: note.get("slurm_conf") == slurm_conf))


class StartLock:
    """Lets one node of a shared directory start at a time: raylets that start together take the same sockets.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def acquired(self) -> bool:
        """Try to take the lock; tell whether it is ours now."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let the next one start."""
        with contextlib.suppress(OSError):
            os.close(self._handle)


def _expanded(base: str) -> str:
    """Return the place with its variables replaced; on the login node those of a job are unset, and /tmp stands in."""
    path = os.path.expanduser(os.path.expandvars(base or DEFAULT_BASE))  # noqa: PTH111 a variable may hold "~"
    unset = re.search(r"\$\{?\w+", path)
    if unset is None:
        return path
    if "SLURM_JOB_ID" not in os.environ:
        return DEFAULT_BASE
    raise ValueError(f"temp_dir {base!r}: the job has no variable {unset.group()}")


def _write_note(path: Path, node_id: str) -> None:
    (path / _NOTES).mkdir(mode=0o700, exist_ok=True)
    note = {
        "pid": os.getpid(),
        "start": _start_time(os.getpid()),
        "host": socket.gethostname(),
        "boot": procfs.boot_id(),
        "slurm_conf": os.environ.get("SLURM_CONF", ""),
    }
    write_json(path / _NOTES / f"{node_id}.json", note)


def _notes(path: Path) -> list[dict[str, Any]]:
    return [note for file in (path / _NOTES).glob("*.json") if (note := read_json_object(file)) is not None]


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
        notes = _notes(path) if ours else []
        if notes and all(map(condition, notes)):
            found.append(path)
    return found


def _lives(note: dict[str, Any]) -> bool:
    if note.get("host") != socket.gethostname():
        # On a shared file system: what it says of processes cannot be judged here.
        return True
    if note.get("boot") != procfs.boot_id():
        return False
    return bool(note.get("start")) and _start_time(int(note.get("pid", 0))) == note.get("start")


def _start_time(pid: int) -> str:
    process = procfs.find(pid)
    return process.start if process else ""
