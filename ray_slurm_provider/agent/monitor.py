"""Ray's autoscaler, which Ray calls the monitor: started by the agent, and started again when it is killed.

``ray start`` would end the whole head with it, and every workload. Everything that it knows lives in SLURM, so another
one goes on where it was. Its configuration, which it reads in each round, is a copy: without one it would do nothing
any more when the cluster's directory is deleted, not even end idle nodes.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from typing import TYPE_CHECKING

from ray_slurm_provider.agent import kernel
from ray_slurm_provider.files import read_text, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 60.0
# One that lived for so long was healthy.
_HEALTHY_S = 60.0


class Monitor:
    """The autoscaler of one head; it reads a copy of the configuration that `ray up` has written."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], written: Path, copy: Path) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._written = written
        self._copy = copy
        self._copied = 0, 0
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._delay_s = 0.0
        self._next_start = 0.0
        self._starts = 0

    def tend(self) -> str:
        """Start it, or start it again when it has ended; return why it never will work, "" when it may."""
        now = time.monotonic()
        self._update_copy()
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return ""
            self._child = None
            if self._starts == 1 and code > 0 and now - self._started < _HEALTHY_S:
                return f"Ray's autoscaler ended at once with exit code {code}; see monitor.err and monitor.log"
            self._wait(now, _how(code))
        if now >= self._next_start:
            try:
                self._start(now)
            except OSError as error:
                self._wait(now, f"it cannot be started now: {error}")
        return ""

    def _start(self, now: float) -> None:
        self._started = now
        # Without its configuration Ray's would end at once, and the head with it.
        self._copy.stat()
        self._child = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            preexec_fn=kernel.die_with_parent,  # noqa: PLW1509 this process has no threads
        )
        self._starts += 1

    def _wait(self, now: float, why: str) -> None:
        self._delay_s = _FIRST_DELAY_S if now - self._started > _HEALTHY_S else self._delay_s * 2 or _FIRST_DELAY_S
        self._next_start = now + min(self._delay_s, _LONGEST_DELAY_S)
        logger.warning("Ray's autoscaler does not run (%s); another one is started", why)

    def _update_copy(self) -> None:
        """Copy what is new; what cannot be read now is tried again at the next look."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = self._written.stat()
            if (found.st_ino, found.st_mtime_ns) != self._copied:
                write_atomically(self._copy, read_text(self._written))
                self._copied = found.st_ino, found.st_mtime_ns

    def end(self) -> None:
        """End it: from here on nothing is submitted. By force: Ray's has nothing to do at its end."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
