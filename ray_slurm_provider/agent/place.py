"""What a node takes on its host until it ends: a directory for Ray, and ports."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_slurm_provider.agent import ports, ray_command
from ray_slurm_provider.agent.temp_dirs import leave_temp_dir, make_temp_dir, sweep_temp_dirs

if TYPE_CHECKING:
    from pathlib import Path

    from ray_slurm_provider.agent.spec import AgentSpec

logger = logging.getLogger(__name__)


class Place:
    """A node's place on its host, from `take` to `give_back`; it may be taken again after that.

    Attributes:
        temp_dir: Ray's temporary directory; None while the place is not taken.
    """

    def __init__(self, spec: AgentSpec) -> None:
        self.temp_dir: Path | None = None
        self._spec = spec
        self._reserved: ports.Reservation | None = None

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
        self.temp_dir = make_temp_dir(self._spec.temp_dir)
        names = ray_command.HEAD_PORTS if self._spec.is_head else ray_command.NODE_PORTS
        self._reserved = ports.reserve(names, self._spec.service_ports)

    def give_back(self) -> None:
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None
        if self.temp_dir is not None:
            leave_temp_dir(self.temp_dir)
            self.temp_dir = None
