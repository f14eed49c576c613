"""The processes of a sandbox: found by what they carry, ended one by one by their id."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ray_slurm_provider.sandbox.layout import SandboxPaths

_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
_POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A living process: its id, its short name, and when it started (so that a reused id is noticed)."""

    pid: int
    name: str
    start: str


def processes_of(paths: SandboxPaths) -> list[Process]:
    """Return every living process of this sandbox: its daemons, and whatever its jobs left behind."""
    return [process for process in _own_processes() if _belongs(process, paths)]


def daemons_of(paths: SandboxPaths) -> dict[str, list[int]]:
    """Return the ids of the living daemons by name."""
    found: dict[str, list[int]] = {name: [] for name in _DAEMONS}
    for process in processes_of(paths):
        if process.name in found:
            found[process.name].append(process.pid)
    return found


def end(processes: Iterable[Process], grace_s: float) -> None:
    """Send SIGTERM, wait, and send SIGKILL to those that stay."""
    for signal_number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        left = [process for process in processes if alive(process)]
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal_number)
        if wait_until(lambda left=left: not any(map(alive, left)), patience_s):  # type: ignore[misc]
            return


def alive(process: Process) -> bool:
    """Tell whether this very process still runs; a zombie does not."""
    stat = _stat(process.pid)
    return stat is not None and stat[0] != "Z" and stat[1] == process.start


def wait_until(condition: Callable[[], bool], timeout_s: float, poll_s: float = _POLL_S) -> bool:
    """Ask until the condition holds; tell whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


def _own_processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        stat = _stat(int(entry.name))
        if stat is not None and stat[0] != "Z":
            yield Process(int(entry.name), _read(entry / "comm").decode(errors="replace").strip(), stat[1])


def _belongs(process: Process, paths: SandboxPaths) -> bool:
    proc = Path("/proc") / str(process.pid)
    if process.name == "munged":
        return f"--socket={paths.munge_socket}".encode() in _read(proc / "cmdline").split(b"\0")
    variables = _read(proc / "environ").split(b"\0")
    if f"SLURM_CONF={paths.slurm_conf}".encode() not in variables:
        return False
    return process.name in _DAEMONS or any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)


def _stat(pid: int) -> tuple[str, str] | None:
    text = _read(Path("/proc") / str(pid) / "stat").decode(errors="replace")
    fields = text.rpartition(")")[2].split()
    # proc(5): field 3 is the state, field 22 the start time.
    return (fields[0], fields[19]) if len(fields) > 19 else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
