"""All the places where nodes of one cluster run, as one backend."""

from collections.abc import Iterable, Sequence

from ray_slurm_provider.backends.base import Launch, NodeBackend, Sighting
from ray_slurm_provider.backends.login_process import PREFIX, LoginProcess
from ray_slurm_provider.backends.slurm_jobs import SlurmJobs


class Places:
    """SLURM, and the login node for a head."""

    def __init__(self, jobs: SlurmJobs, login: LoginProcess) -> None:
        self._jobs = jobs
        self._login = login

    def sightings(self) -> list[Sighting]:
        """Return the nodes of all places, or raise when one of them is silent."""
        return [*self._login.sightings(), *self._jobs.sightings()]

    def batch_size(self, launch: Launch) -> int:
        return self._place_for(launch).batch_size(launch)

    def create(self, launch: Launch, count: int = 1) -> list[str]:
        return self._place_for(launch).create(launch, count)

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End nodes, the jobs first: they shall not see their head go."""
        for place in (self._jobs, self._login):
            mine = [node_id for node_id in node_ids if self._place_of(node_id) is place]
            if mine:
                place.terminate(mine)

    def still_there(self, node_ids: Iterable[str]) -> str:
        ids = list(node_ids)
        login = [node_id for node_id in ids if self._place_of(node_id) is self._login]
        return self._login.still_there(login) or self._jobs.still_there(set(ids) - set(login))

    def how_ended(self, node_id: str) -> str:
        return self._place_of(node_id).how_ended(node_id)

    def _place_for(self, launch: Launch) -> NodeBackend:
        return self._login if launch.config.placement == "login_node" else self._jobs

    def _place_of(self, node_id: str) -> NodeBackend:
        return self._login if node_id.startswith(PREFIX) else self._jobs
