"""A process that cleans up when the agent itself is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD_NAME = "rsp-guard"


def start_guard(clean_up: Callable[[], None]) -> Callable[[], None]:
    """Fork a process that cleans up when this one is killed; return what releases it.

    Where SLURM tracks processes by cgroup it dies with the job, and the workers notice by themselves.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)

        def release() -> None:
            with contextlib.suppress(OSError):
                os.write(write_end, b"x")
                os.close(write_end)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

        return release
    os.close(write_end)
    with contextlib.suppress(BaseException):
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        Path("/proc/self/comm").write_text(GUARD_NAME)
        if not os.read(read_end, 1):
            clean_up()
    os._exit(0)
