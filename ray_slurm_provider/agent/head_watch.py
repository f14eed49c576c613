"""How a worker knows that there is no point in going on without its head; that ends its own job only.

A refused connection says little: a firewall may reject, the address may belong to another host as well. So it counts
after a while only, and it takes the word of SLURM or of the head itself to cancel other jobs, see `siblings`.
"""

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
# A head that restarts its network card refuses nothing; one that refuses for this long is of no use to this worker.
_REFUSED_S = 15.0
# How long a head that cannot be reached at all may keep a worker from starting.
_UNREACHABLE_S = 20.0
# How often SLURM is asked about the job of a head that cannot be reached.
_ASK_S = 15.0


class HeadWatch:
    """Looks after the head of one worker; `head_ended` tells whether it positively has."""

    def __init__(self, spec: AgentSpec, head_ended: Callable[[], bool]) -> None:
        self._spec = spec
        self._head_ended = head_ended
        self._questions = Pace(_ASK_S)
        self._name = f"the head {spec.head} at {spec.gcs_address}"
        self._paths = ReportPaths(spec.directory)
        self._checks = Pace(_CHECK_S)
        self._readings = Pace(_READ_S)
        self._line: network.Line | None = None
        self._refused_since: float | None = None

    def why_not_start(self, signals: Sequence[int]) -> str:
        """Return why there is no point in starting, "" when the head can be reached."""
        deadline = time.monotonic() + _UNREACHABLE_S
        while not (gone := self._try()):
            if self._connected():
                return ""
            if signals:
                return "the job was cancelled while it waited for the head"
            if time.monotonic() > deadline:
                return (
                    f"{self._name} cannot be reached from here: no route, or a firewall;"
                    " see provider.slurm.interface and provider.slurm.ports"
                )
            time.sleep(1.0)
        return gone

    def why_gone(self) -> str:
        """Return why this worker has no head any more, "" while it has one or nobody can tell; tries every 5 s."""
        if self._connected():
            return f"{self._name} has ended" if self._readings.due() and self._replaced() else ""
        return self._try() if self._checks.due() else ""

    def _try(self) -> str:
        """Try to reach the head; return why it is gone, "" when it is not or nobody can tell yet."""
        if self._replaced():
            return f"{self._name} has ended"
        state = self._connection()
        if state != "refused":
            self._refused_since = None
            # When the host of a head was lost, SLURM knows.
            return f"{self._name} has ended" if state != "open" and self._ended() else ""
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since < _REFUSED_S:
            return ""
        return f"{self._name} has refused connections for {_REFUSED_S:g} s: it is gone, or a firewall rejects them"

    def _ended(self) -> bool:
        return self._questions.due() and self._head_ended()

    def _connected(self) -> bool:
        return self._line is not None and self._line.holds()

    def _connection(self) -> str:
        if self._line is None:
            self._line = network.Line(*network.split_address(self._spec.gcs_address))
        return self._line.open(_CHECK_S)

    def _replaced(self) -> bool:
        """Tell whether the head says that it ended, or another took its place since; a missing file says nothing."""
        head = read_report(self._paths.head)
        if head is None or head.node_id == self._spec.head:
            return head is not None and head.phase == ENDED
        # A head whose disk was full when it started has left the report of the one before it in place.
        ours = read_report(self._paths.report(self._spec.head))
        return ours is not None and (ours.phase == ENDED or head.time > ours.time)
