"""How a worker knows that its head is gone: only on positive evidence."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray_slurm_provider.agent import network
from ray_slurm_provider.agent.pace import Pace
from ray_slurm_provider.reports import ENDED, ReportPaths, read_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_slurm_provider.agent.spec import AgentSpec

_CHECK_S = 5.0
# How often a head that can be reached is asked whether it is still the one; a thousand workers read that file.
_READ_S = 60.0
# A head that restarts its network card refuses nothing; refused connections for this long mean that it is gone.
_REFUSED_S = 15.0
# How long a head that cannot be reached at all may keep a worker from starting.
_UNREACHABLE_S = 20.0
# How often SLURM is asked about the job of a head that cannot be reached.
_ASK_S = 15.0


class HeadWatch:
    """Looks after the head of one worker; `head_ended` asks SLURM whether its job has ended."""

    def __init__(self, spec: AgentSpec, head_ended: Callable[[], bool]) -> None:
        self.known_gone = False  # positively
        self._spec = spec
        self._head_ended = head_ended
        self._questions = Pace(_ASK_S)
        self._head_report = ReportPaths(spec.directory).head
        self._checks = Pace(_CHECK_S)
        self._readings = Pace(_READ_S)
        self._line: network.Line | None = None
        self._refused_since: float | None = None

    def why_not_start(self, signals: Sequence[int]) -> str:
        """Return why there is no point in starting, "" when the head can be reached."""
        head = f"the head {self._spec.head} at {self._spec.gcs_address}"
        deadline = time.monotonic() + _UNREACHABLE_S
        while True:
            state = "refused" if self._replaced() else self._connection()
            if state == "open":
                return ""
            if state == "refused" or self._ended():
                self.known_gone = True
                return f"{head} is gone"
            if signals:
                return "the job was cancelled while it waited for the head"
            if time.monotonic() > deadline:
                return (
                    f"{head} cannot be reached from here: no route, or a firewall;"
                    " see provider.slurm.interface and provider.slurm.ports"
                )
            time.sleep(1.0)

    def is_gone(self) -> bool:
        """Tell whether the head is gone for good; tries at most every five seconds to reach one that was lost."""
        if self._line is not None and self._line.holds():
            return self._readings.due() and self._replaced()
        if not self._checks.due():
            return False
        if self._replaced():
            return True
        state = self._connection()
        if state != "refused":
            self._refused_since = None
            return state != "open" and self._ended()
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        return now - self._refused_since >= _REFUSED_S

    def _ended(self) -> bool:
        """Ask SLURM about a head that cannot be reached: its host may be lost."""
        return self._questions.due() and self._head_ended()

    def _connection(self) -> str:
        if self._line is None:
            self._line = network.Line(*network.split_address(self._spec.gcs_address))
        return self._line.open(_CHECK_S)

    def _replaced(self) -> bool:
        """Tell whether the head says that it ended, or another one took its place; a missing file says nothing."""
        head = read_report(self._head_report)
        return head is not None and (head.node_id != self._spec.head or head.phase == ENDED)
