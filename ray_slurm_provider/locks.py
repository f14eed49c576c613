"""Locks on files that several hosts share, by flock(2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from ray_slurm_provider.errors import StateError


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock on a file, which is made when it is not there.

    Raises:
        StateError: Another process holds it for `timeout_s` seconds, or locks do not work there.
    """
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        # Older releases of filelock also wait when locks do not work.
        why = f"was not free for {timeout_s:g} s: another process holds it, or locks do not work there"
        raise StateError(f"{path} {why}") from error
    except (OSError, NotImplementedError) as error:
        raise _do_not_work(path, error) from error
    try:
        if isinstance(lock, SoftFileLock):
            # Newer releases of filelock go on without flock, with a lock that survives a holder that is killed.
            raise _do_not_work(path, "no flock on this file system")
        yield
    finally:
        lock.release()


def _do_not_work(path: Path, why: object) -> StateError:
    advice = "use another provider.slurm.state_dir, or a mount with locks (NFS without nolock, Lustre with flock)"
    return StateError(f"{path} cannot be locked: {why}\n  {advice}")
