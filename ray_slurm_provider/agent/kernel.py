"""What the agent asks of the kernel: signals, children, and who inherits orphans (prctl(2))."""

import contextlib
import ctypes
import os
import signal
import socket
import time

from ray_slurm_provider import procfs

_POLL_S = 0.02
_QUIET_READINGS = 3
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def become_subreaper() -> None:
    """Inherit the orphans among all descendants, so that none can escape."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def watch_signals(received: list[int]) -> socket.socket:
    """Collect SIGTERM, SIGUSR1 and SIGINT; return a socket that becomes readable when one comes."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: received.append(signal.SIGTERM))
    signal.signal(signal.SIGUSR1, lambda *_: received.append(signal.SIGUSR1))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return reader


def drain_wakeup(reader: socket.socket) -> bool:
    """Empty the socket that signals make readable; more may always come."""
    with contextlib.suppress(BlockingIOError):
        reader.recv(4096)
    return True


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Run in a child: it gets this signal from the kernel when its parent ends; Ray ends its own children so too."""
    _prctl(_PR_SET_PDEATHSIG, number)


def give_memory_back() -> None:
    """Give the kernel back what was only needed to start (malloc_trim(3)); not every C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_descendants(timeout_s: float) -> None:
    """Kill everything below this process, also what it inherited as subreaper, and what that starts meanwhile."""
    deadline = time.monotonic() + timeout_s
    # Who is being handed from a dying parent to us while /proc is read may be missing in one reading.
    quiet = 0
    while quiet < _QUIET_READINGS and time.monotonic() < deadline:
        left = procfs.descendants(os.getpid())
        quiet = 0 if left else quiet + 1
        procfs.send(left, signal.SIGKILL)
        reap()
        time.sleep(_POLL_S)
