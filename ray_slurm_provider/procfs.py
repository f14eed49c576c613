"""Processes of this host as /proc shows them (proc(5)). Imports the standard library only."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.05
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Process(NamedTuple):
    """A living process; its start time tells it from another that gets the same id later."""

    pid: int
    parent: int
    name: str
    start: str

    def read(self, file: str) -> bytes:
        """Return a file of its /proc directory, empty when it is gone or not ours to read."""
        return _read(self.pid, file)


def find(pid: int) -> Process | None:
    """Return the process with this id; None for a dead one and for a zombie."""
    return _parse_stat(pid, _read(pid, "stat"))


def _parse_stat(pid: int, stat: bytes) -> Process | None:
    before, _, after = stat.decode(errors="replace").rpartition(")")
    fields = after.split()
    # The name may hold anything; after its closing bracket come the state, the parent, and as 22nd field the start.
    if len(fields) < 20 or fields[0] in "ZX":
        return None
    return Process(pid, int(fields[1]), before.partition("(")[2], fields[19])


def boot_id() -> str:
    """Return what tells this boot of this host from every other; "" where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def processes() -> Iterator[Process]:
    """Yield every living process but this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            process = find(int(entry.name))
            if process is not None:
                yield process


def descendants(root: int) -> list[Process]:
    """Return the living processes below one, nearest first."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [root]
    while parents:
        level = [child for parent in parents for child in children.get(parent, ())]
        found.extend(level)
        parents = [child.pid for child in level]
    return found


def alive(process: Process) -> bool:
    """Tell whether this very process still runs; as long as /proc cannot be read, for want of files, it counts so."""
    try:
        now = _parse_stat(process.pid, Path(f"/proc/{process.pid}/stat").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    return now is not None and now.start == process.start


def send(processes_: Iterable[Process], number: signal.Signals) -> None:
    for process in processes_:
        if alive(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def end(processes_: Iterable[Process], grace_s: float) -> None:
    """Send SIGTERM, wait, and send SIGKILL to those that stay."""
    left = list(processes_)
    for number in (signal.SIGTERM, signal.SIGKILL):
        send(left, number)
        if wait_until(lambda: not any(map(alive, left)), grace_s):
            return


def wait_until(condition: Callable[[], bool], timeout_s: float, poll_s: float = _POLL_S) -> bool:
    """Ask until the condition holds; tell whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""
