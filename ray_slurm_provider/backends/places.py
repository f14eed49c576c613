"""All the places where nodes of one cluster run, as one backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_slurm_provider.backends.login_process import PREFIX, LoginProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_slurm_provider.backends.base import Launch, NodeBackend, Sighting
    from ray_slurm_provider.backends.slurm_jobs import SlurmJobs


class Places:
    """SLURM, and the login node for a head.

    Args:
        jobs: The cluster's jobs.
        login: The cluster's head on a login node.
    """

    def __init__(self, jobs: SlurmJobs, login: LoginProcess) -> None:
        self._jobs = jobs
        self._login = login

    def sightings(self) -> list[Sighting]:
        """Return the nodes of all places, or raise when one of them is silent."""
        return [*self._login.sightings(), *self._jobs.sightings()]

    def create(self, launch: Launch) -> str:
        """Create a node in the place that its configuration names."""
        place: NodeBackend = self._login if launch.config.placement == "login_node" else self._jobs
        return place.create(launch)

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End nodes, the jobs first: they shall not see their head go."""
        for place in (self._jobs, self._login):
            mine = [node_id for node_id in node_ids if self._place_of(node_id) is place]
            if mine:
                place.terminate(mine)

    def exists(self, node_id: str) -> bool:
        """Ask about one node where it was."""
        return self._place_of(node_id).exists(node_id)

    def how_ended(self, node_id: str) -> str:
        """Return how a node ended, as its place says."""
        return self._place_of(node_id).how_ended(node_id)

    def _place_of(self, node_id: str) -> NodeBackend:
        return self._login if node_id.startswith(PREFIX) else self._jobs
