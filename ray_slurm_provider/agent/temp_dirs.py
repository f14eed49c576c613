"""Ray's temporary directory: one per job, short, private, and removed at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ray_slurm_provider import procfs
from ray_slurm_provider.files import read_json_object, write_json

_PREFIX = "rsp-"
_OWNER = "owner.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Unix sockets hold 107 bytes (unix(7)), and Ray puts below its temp dir:
# /session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12
MAX_LENGTH = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.12")
DEFAULT_BASE = "/tmp"  # noqa: S108 each directory below it is made private, with a name nobody can foresee


def make_temp_dir(base: str, node_id: str) -> Path:
    """Make the directory for this job, 0700, with a note saying whose it is.

    Args:
        base: Where; variables like ``$SLURM_TMPDIR`` are expanded.
        node_id: The Ray node that it is for.

    Raises:
        OSError: It cannot be made there.
        ValueError: The path would be too long for Ray's sockets.
    """
    parent = os.path.expanduser(os.path.expandvars(base or DEFAULT_BASE))  # noqa: PTH111 a variable may hold "~"
    example = f"{parent}/{_PREFIX}12345678"
    if len(example.encode()) > MAX_LENGTH:
        raise ValueError(
            f"temp_dir {parent!r} is {len(example.encode()) - MAX_LENGTH} bytes too long: Unix sockets below it"
            " would pass 107 bytes"
        )
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    owner = {"node_id": node_id, "pid": os.getpid(), "start": _start_time(os.getpid()), "boot": boot_id()}
    write_json(path / _OWNER, {**owner, "slurm_conf": os.environ.get("SLURM_CONF", "")})
    return path


def sweep_temp_dirs(base: str) -> list[Path]:
    """Remove what killed jobs of this user left on this host; return what was removed."""
    parent = os.path.expanduser(os.path.expandvars(base or DEFAULT_BASE))  # noqa: PTH111
    return _remove_where(parent, lambda owner: not _owner_lives(owner))


def remove_temp_dirs(slurm_conf: str) -> list[Path]:
    """Remove the directories of all jobs of one SLURM; for the end of a sandbox."""
    return _remove_where(DEFAULT_BASE, lambda owner: owner.get("slurm_conf") == slurm_conf)


def boot_id() -> str:
    """Return what changes when the host reboots."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _remove_where(parent: str, condition: Any) -> list[Path]:
    removed = []
    for path in Path(parent).glob(f"{_PREFIX}*"):
        try:
            ours = path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
        except OSError:
            continue
        owner = read_json_object(path / _OWNER) if ours else None
        if owner is not None and condition(owner):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _owner_lives(owner: dict[str, Any]) -> bool:
    if owner.get("boot") != boot_id():
        # Another host's note on a shared file system cannot be judged here, and one of an
        # earlier boot of this host is dead; they look alike, so it stays.
        return True
    return bool(owner.get("start")) and _start_time(int(owner.get("pid", 0))) == owner.get("start")


def _start_time(pid: int) -> str:
    process = procfs.find(pid)
    return process.start if process else ""
