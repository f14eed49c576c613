"""Copies files as rsync does, by rsync, on the file systems that this host sees."""

import glob
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_slurm_provider.errors import StateError

# File systems that only their own host sees (mount(8)); what is not one of these is taken for shared.
_LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "vfat"})


@dataclass(frozen=True)
class SyncOptions:
    """What Ray's YAML says about copying."""

    exclude: Sequence[str] = ()  # patterns of rsync to leave out
    filters: Sequence[str] = ()  # names of files with such patterns in each directory, such as ``.gitignore``

    def arguments(self) -> list[str]:
        """Return them for rsync, as Ray does (ray/autoscaler/_private/command_runner.py)."""
        return [
            *(word for pattern in self.exclude for word in ("--exclude", pattern)),
            *(word for name in self.filters for word in ("--filter", f"dir-merge,- {name}")),
        ]


def copy(source: str, target: str, options: SyncOptions) -> None:
    """Copy on file systems that this host sees.

    Args:
        source: What; one that ends with ``/`` stands for the content of the directory.
        target: Where to; directories on the way are made.
        options: What to leave out.

    Raises:
        StateError: It cannot be copied; nothing of the source is changed.
    """
    origins, goal = _matching(source), _expanded(target)
    try:
        _parent(goal).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"{_parent(goal)} cannot be made: {error.strerror or error}") from error
    different = [origin for origin in origins if not _same(origin, goal)]
    if different:
        _rsync([*options.arguments(), *different, goal])


def is_shared(path: str, shared: Path) -> bool:
    """Tell whether other hosts see a path too."""
    place = _existing(Path(_expanded(path)))
    return place.stat().st_dev == _existing(shared).stat().st_dev or not on_local_disk(place)


def on_local_disk(path: Path) -> bool:
    """Tell whether a path, or the place where it would be, is on a file system that only its host sees."""
    return _type_of(_existing(path)) in _LOCAL_TYPES


def _type_of(place: Path) -> str:
    """Return the type of the file system that a path is on (proc(5), mountinfo)."""
    best, found = "", ""
    real = str(place.resolve())
    for mount, kind in _mounts():
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, found = mount, kind
    return found


def _mounts() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        yield before.split(" ")[4].replace("\\040", " "), after.split(" ")[0]


def _existing(path: Path) -> Path:
    # Unlike `Path.exists` it does not raise below a directory that is closed to us.
    return next(place for place in (path, *path.parents) if os.path.exists(place))  # noqa: PTH110


def _rsync(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            ["rsync", "--archive", "--no-owner", "--no-group", *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise StateError("rsync is not on PATH here; Ray's file sync needs it") from error
    if done.returncode:
        raise StateError(f"rsync ended with exit code {done.returncode}: {done.stderr.strip()}")
    sys.stderr.write(done.stderr)


def _matching(source: str) -> list[str]:
    """Return the source, or what its wildcards match."""
    origin = _expanded(source)
    found = [origin] if Path(origin).exists() else sorted(glob.glob(origin))  # noqa: PTH207 the slash at the end stays
    if not found:
        raise StateError(f"{source} does not exist")
    return found


def _same(origin: str, goal: str) -> bool:
    """Tell whether both are one file: on a shared file system what is to go up is often there already."""
    one, other = Path(origin), Path(goal)
    if one.is_file() and other.is_dir():
        other = other / one.name
    return one.exists() and other.exists() and one.samefile(other)


def _expanded(path: str) -> str:
    """Expand ``~``; a slash at the end stays, for rsync it has a meaning."""
    return os.path.expanduser(path)  # noqa: PTH111 pathlib would cut that slash


def _parent(path: str) -> Path:
    """Return the directory that must be there for a path to be written."""
    return Path(path) if path.endswith("/") else Path(path).parent
