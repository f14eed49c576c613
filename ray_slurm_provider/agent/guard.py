"""The parent of the agent: a process that does nothing but outlive it.

It is the job's batch process. When the agent itself is killed, its orphans come to the guard, which ends
them; when the guard is killed, the kernel sends the agent SIGTERM, and the agent ends everything.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider.agent import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD_NAME = "rsp-guard"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LEFTOVERS_S = 5.0


def run_guarded(agent: Callable[[], int], clean_up: Callable[[], None]) -> int:
    """Run the agent in a child of this process and return the job's exit code, 128 + N after signal N.

    Args:
        agent: Runs the node to its end and returns the exit code.
        clean_up: Does what the agent would have done at the end; called here when the agent was killed.
    """
    kernel.become_subreaper()
    # No signal may fall between the fork and the handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGTERM)
        os._exit(agent())
    Path("/proc/self/comm").write_text(GUARD_NAME)
    kernel.give_memory_back()
    for number in _FORWARDED:
        signal.signal(number, lambda received, _: kernel.send(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    status = _wait_for(child)
    kernel.end_descendants(_LEFTOVERS_S)
    if os.WIFSIGNALED(status):
        clean_up()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _wait_for(child: int) -> int:
    """Wait for the agent, and let dead orphans go meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return status
