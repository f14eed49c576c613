"""Locks on files that several hosts share, by flock(2).

Not by a library: where a host's mount has no flock, it would go on with another kind of lock, which breaks those of the
hosts that have it and survives a holder that is killed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.procfs import wait_until

_AGAIN_S = 0.05
ADVICE = "use another provider.slurm.state_dir, or a mount with locks (NFS without nolock, Lustre with flock)"


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock on a file, which is made when it is not there.

    Raises:
        StateError: Another process holds it for `timeout_s` seconds, or locks do not work there.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if not wait_until(lambda: _take(handle, path), timeout_s, poll_s=_AGAIN_S):
            raise StateError(f"{path} was not free for {timeout_s:g} s: another process holds it")
        yield
    finally:
        os.close(handle)


def _take(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # flock(2), and what some file systems say in its place
        return False
    except OSError as error:
        raise StateError(f"{path} cannot be locked: {error.strerror}\n  {ADVICE}") from error
    return True
