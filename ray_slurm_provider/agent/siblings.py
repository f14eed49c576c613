"""The other jobs of the same cluster, as a node's own job sees them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_slurm_provider.birth_certificate import job_id_of, read_certificate
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.errors import SlurmError, StateError
from ray_slurm_provider.reports import ENDED, ReportPaths, read_report

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

    def cancel(self) -> bool:
        """Cancel every other job of this head, queued ones too; return whether SLURM took it, with a warning if not."""
        try:
            doomed = [job.job_id for job in self._slurm.jobs() if self._works_for_the_head(job)]
            if doomed:
                logger.info("cancelling the cluster's jobs %s", " ".join(doomed))
                self._slurm.cancel(doomed)
        except SlurmError as error:
            logger.warning("the cluster's other jobs could not be cancelled: %s", error)
            return False
        return True

    def cancel_orphans(self) -> None:
        """Cancel them for a head that has ended; that it cannot be reached from here proves nothing."""
        if self.head_ended():
            self.cancel()
        else:
            logger.info("the cluster's other jobs are left alone: nobody says that the head has ended")

    def head_ended(self) -> bool:
        """Tell whether the head has positively ended, by its own word or by SLURM's about its job."""
        said = read_report(ReportPaths(self._spec.directory).report(self._head))
        return (said is not None and said.phase == ENDED) or self._job_ended()

    def _job_ended(self) -> bool:
        if self._spec.login_node or self._head.startswith("login-"):
            return False
        try:
            jobs = {job.job_id: job for job in self._slurm.jobs()}
        except SlurmError:
            return False
        head = jobs.get(job_id_of(self._head))
        if head is None:
            # A controller that has lost its list says nothing; this one knows us, and so its list is whole.
            return job_id_of(self._node_id) in jobs
        certificate = self._certificate(head)
        # A job whose record cannot be read now may be the head's.
        another = certificate is not None and certificate.node_id(head.job_id) != self._head
        return another or not head.alive

    def _works_for_the_head(self, job: Job) -> bool:
        if not job.alive or job.job_id == job_id_of(self._node_id):
            return False
        found = self._certificate(job)
        ours = (self._spec.cluster, self._spec.home, self._head)
        return found is not None and (found.cluster, found.home, found.head) == ours

    def _certificate(self, job: Job) -> BirthCertificate | None:
        try:
            return read_certificate(job.comment) or self._births.of_job(job.name)
        except StateError:
            return None
