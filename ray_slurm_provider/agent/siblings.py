"""The other jobs of the same cluster, as a node's own job sees them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_slurm_provider.birth_certificate import job_id_of, read_certificate
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.errors import SlurmError

if TYPE_CHECKING:
    from ray_slurm_provider.agent.spec import AgentSpec
    from ray_slurm_provider.birth_certificate import BirthCertificate
    from ray_slurm_provider.slurm.client import SlurmClient
    from ray_slurm_provider.slurm.types import Job

logger = logging.getLogger(__name__)


class Siblings:
    """The jobs that work for one head."""

    def __init__(self, spec: AgentSpec, node_id: str, slurm: SlurmClient) -> None:
        self._spec = spec
        self._node_id = node_id
        self._head = spec.head or node_id
        self._slurm = slurm
        self._births = BirthRecords(spec.directory / "births")

    def cancel(self) -> None:
        """Cancel every other job of this head, queued ones too; only a warning when SLURM does not answer."""
        try:
            doomed = [job.job_id for job in self._slurm.jobs() if self._works_for_the_head(job)]
            if doomed:
                logger.info("cancelling the cluster's jobs %s", " ".join(doomed))
                self._slurm.cancel(doomed)
        except SlurmError as error:
            logger.warning("the cluster's other jobs could not be cancelled: %s", error)

    def head_ended(self) -> bool:
        """Tell whether the head's job has positively ended; a controller that has lost its list says nothing."""
        if self._spec.login_node or self._head.startswith("login-"):
            return False
        try:
            jobs = {job.job_id: job for job in self._slurm.jobs()}
        except SlurmError:
            return False
        head = jobs.get(job_id_of(self._head))
        if head is not None:
            certificate = self._certificate(head)
            if certificate is not None and certificate.node_id(head.job_id) == self._head:
                return not head.alive
        # It knows us, and so its list is whole.
        return job_id_of(self._node_id) in jobs

    def _works_for_the_head(self, job: Job) -> bool:
        if not job.alive or job.job_id == job_id_of(self._node_id):
            return False
        found = self._certificate(job)
        ours = (self._spec.cluster, self._spec.home, self._head)
        return found is not None and (found.cluster, found.home, found.head) == ours

    def _certificate(self, job: Job) -> BirthCertificate | None:
        return read_certificate(job.comment) or self._births.of_job(job.name)
