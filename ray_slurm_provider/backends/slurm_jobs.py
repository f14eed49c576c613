"""Ray nodes as SLURM batch jobs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.backends.base import Launch, Sighting
from ray_slurm_provider.batch_script import JobSpec, render
from ray_slurm_provider.birth_certificate import BirthCertificate, job_id_of, new_token, read_certificate
from ray_slurm_provider.config import ResolvedNode
from ray_slurm_provider.errors import ConfigError, SlurmError, SlurmUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_slurm_provider.slurm.client import SlurmClient
    from ray_slurm_provider.slurm.types import Job

logger = logging.getLogger(__name__)


class SlurmJobs:
    """The jobs of one cluster.

    Args:
        client: The way to SLURM.
        cluster: The cluster's name.
        home: Fingerprint of the cluster's directory.
    """

    def __init__(self, client: SlurmClient, cluster: str, home: str) -> None:
        self._client = client
        self._cluster = cluster
        self._home = home

    def sightings(self) -> list[Sighting]:
        """Return this cluster's jobs, by one squeue."""
        return [sighting for job in self._client.jobs() if (sighting := self._sighting(job)) is not None]

    def create(self, launch: Launch) -> str:
        """Submit a job.

        An sbatch that gave no answer may have submitted all the same: the job is then looked for by its
        token, so that none is lost and none is submitted twice.
        """
        certificate = BirthCertificate(
            launch.cluster,
            launch.home,
            new_token(),
            launch.head,
            {str(k): str(v) for k, v in launch.tags.items()},
        )
        script = render(job_spec(launch, certificate))
        try:
            job_id = self._client.submit(script, launch.environ)
        except SlurmUnavailable:
            job_id = self._find(certificate)
        node_id = certificate.node_id(job_id)
        logger.info("submitted job %s (%s) as node %s", job_id, launch.node_type, node_id)
        return node_id

    def terminate(self, node_ids: Sequence[str]) -> None:
        """Cancel jobs, each only if the job of that id still is ours: SLURM gives ids out again."""
        if not node_ids:
            return
        ours = {sighting.node_id for sighting in self.sightings() if sighting.alive}
        doomed = [node_id for node_id in node_ids if node_id in ours]
        self._client.cancel(job_id_of(node_id) for node_id in doomed)
        for node_id in doomed:
            logger.info("cancelled job %s", job_id_of(node_id))

    def exists(self, node_id: str) -> bool:
        """Tell whether the controller still knows this very job, and not another that got its id."""
        certificate = read_certificate(self._client.job_facts(job_id_of(node_id)).get("Comment", ""))
        return certificate is not None and certificate.node_id(job_id_of(node_id)) == node_id

    def how_ended(self, node_id: str) -> str:
        """Return SLURM's word on the end of a job."""
        try:
            end = self._client.job_end(job_id_of(node_id))
        except SlurmError as error:
            return f"its end is not known: {error}"
        return "SLURM does not know it any more" if end is None else str(end)

    def _find(self, certificate: BirthCertificate) -> str:
        """Return the job that sbatch submitted without saying so; raise the present error when there is none."""
        for job in self._client.jobs():
            found = read_certificate(job.comment)
            if found is not None and found.token == certificate.token and found.home == certificate.home:
                logger.warning("sbatch gave no answer, but job %s was submitted", job.job_id)
                return job.job_id
        raise SlurmUnavailable(["sbatch"], None, "", "no answer, and no job was submitted")

    def _sighting(self, job: Job) -> Sighting | None:
        certificate = read_certificate(job.comment)
        if certificate is None or (certificate.cluster, certificate.home) != (self._cluster, self._home):
            return None
        return Sighting(
            node_id=certificate.node_id(job.job_id),
            head=certificate.head,
            birth_tags=certificate.tags,
            alive=job.alive,
            queued=job.queued,
            state=job.state.label,
            reason=job.reason,
            place=job.nodes,
            start=job.start,
            time_left=job.time_left,
        )


def job_spec(launch: Launch, certificate: BirthCertificate) -> JobSpec:
    """Return what the batch script of this launch says.

    Raises:
        ConfigError: The names are too long for a job's comment.
    """
    settings, resolved = launch.settings, launch.config.resolved or ResolvedNode()
    try:
        comment = certificate.text()
    except ValueError as error:
        raise ConfigError(
            f"available_node_types.{launch.node_type}", str(error), "a shorter cluster or type name"
        ) from error
    python = settings.python or ("" if resolved.steps else settings.default_python or "")
    on_path = settings.python or settings.default_python
    agent = AgentSpec(
        cluster=launch.cluster,
        home=launch.home,
        cluster_dir=str(launch.cluster_dir),
        head=launch.head,
        gcs_address=launch.gcs_address,
        head_temp_dir=launch.head_temp_dir,
        resources=dict(resolved.resources),
        written=list(resolved.written),
        labels=dict(resolved.labels),
        ray_start_args=list(launch.config.ray_start_args),
        interface=settings.interface or "",
        temp_dir=settings.temp_dir,
        token_auth=settings.token_auth,
        update_interval_s=settings.update_interval_s,
        withdraw_after_s=settings.withdraw_after_s,
        drain_s=settings.drain_s,
        slurm_bin=settings.slurm_bin or "",
        command_timeout_s=settings.command_timeout_s,
    )
    return JobSpec(
        job_name=f"ray-{launch.cluster}-{launch.node_type}",
        comment=comment,
        token=certificate.token,
        node_type=launch.node_type,
        cluster_dir=launch.cluster_dir,
        options=launch.config.sbatch,
        steps=[(where, command) for where, command in resolved.steps],
        env=launch.config.env,
        python=str(Path(python).expanduser()) if python else "",
        path_prefix=str(Path(on_path).expanduser().parent) if on_path else "",
        wait_for_go=not launch.head,
        # A head that drains ends every workload: it works to the last second.
        drain_s=settings.drain_s if launch.head else 0,
        agent=agent.as_json(),
    )


def preview_script(launch: Launch) -> str:
    """Return the batch script that `SlurmJobs.create` would submit, with a token that nobody uses."""
    return render(job_spec(launch, BirthCertificate(launch.cluster, launch.home, "TOKEN", launch.head, launch.tags)))
