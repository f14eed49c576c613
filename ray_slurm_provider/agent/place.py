"""What a node takes on its host until it ends: a directory for Ray, and ports."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider.agent import ports, ray_command
from ray_slurm_provider.agent.temp_dirs import StartLock, join_temp_dir, leave_temp_dir, make_temp_dir, sweep_temp_dirs

if TYPE_CHECKING:
    from collections.abc import Collection

    from ray_slurm_provider.agent.spec import AgentSpec

logger = logging.getLogger(__name__)

_TURN_POLL_S = 0.1


class Place:
    """A node's place on its host, from `take` to `give_back`; it may be taken again after that.

    Args:
        spec: What the node shall be.
        node_id: Its id.

    Attributes:
        temp_dir: Ray's temporary directory; None while the place is not taken.
    """

    def __init__(self, spec: AgentSpec, node_id: str) -> None:
        self.temp_dir: Path | None = None
        self._spec = spec
        self._node_id = node_id
        self._reserved: ports.Reservation | None = None
        self._start_lock: StartLock | None = None

    @property
    def ports(self) -> dict[str, int]:
        """Ray's ports by name; none while the place is not taken."""
        return dict(self._reserved.ports) if self._reserved is not None else {}

    def take(self) -> None:
        """Take what the node needs; what was taken before an error is still to be given back.

        Raises:
            OSError: The directory cannot be made, or there are not enough free ports.
            ValueError: The directory's path is too long for sockets, or names an unknown variable.
        """
        for path in sweep_temp_dirs(self._spec.temp_dir):
            logger.info("removed %s, left behind by a job that was killed", path)
        self.temp_dir = self._take_temp_dir()
        names = ray_command.HEAD_PORTS if self._spec.is_head else ray_command.NODE_PORTS
        self._reserved = ports.reserve(names, self._spec.service_ports)

    def give_back(self) -> None:
        """Give back what was taken."""
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None
        if self.temp_dir is not None:
            leave_temp_dir(self.temp_dir, self._node_id)
            self.temp_dir = None

    def wait_for_turn(self, signals: Collection[int]) -> None:
        """Wait until no other node that shares the directory is starting, or a signal has come."""
        while self._start_lock is not None and not self._start_lock.acquired() and not signals:
            time.sleep(_TURN_POLL_S)

    def end_turn(self) -> None:
        """Let the next node start that shares the directory."""
        if self._start_lock is not None:
            self._start_lock.release()
            self._start_lock = None

    def _take_temp_dir(self) -> Path:
        if self._spec.is_head or ray_command.has_own_temp_dir():
            return make_temp_dir(self._spec.temp_dir, self._node_id)
        shared = Path(self._spec.head_temp_dir)
        join_temp_dir(shared, self._node_id)
        self._start_lock = StartLock(shared)
        return shared
