"""Ray nodes as SLURM batch jobs."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ray_slurm_provider.backends.base import Launch, Sighting
from ray_slurm_provider.backends.launch_script import job_spec, new_certificate
from ray_slurm_provider.batch_script import render
from ray_slurm_provider.birth_certificate import BirthCertificate, job_id_of, read_certificate
from ray_slurm_provider.birth_records import BirthRecords, token_in
from ray_slurm_provider.errors import SlurmError, StateError, SubmitUnanswered
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.reasons import ELSEWHERE, STARTED_ELSEWHERE
from ray_slurm_provider.slurm.types import Job, JobState, Meaning, element_ids

logger = logging.getLogger(__name__)


class SlurmJobs:
    """The jobs of one cluster."""

    def __init__(self, client: SlurmClient, cluster: str, home: str, births: BirthRecords) -> None:
        self._client = client
        self._cluster = cluster
        self._home = home
        self._births = births
        self._largest_array: int | None = None

    def sightings(self) -> list[Sighting]:
        """Return this cluster's jobs, by one squeue."""
        rows = self._client.jobs()
        found = [seen for row in rows for seen in self._of_row(row)]
        self._prune(rows)
        return found

    def batch_size(self, launch: Launch) -> int:
        if not launch.head or not launch.settings.job_arrays:
            return 1
        if self._largest_array is None:
            configured = self._client.configuration().get("MaxArraySize", "")
            self._largest_array = max(int(configured), 1) if configured.isdigit() else 1
        return self._largest_array

    def create(self, launch: Launch, count: int = 1) -> list[str]:
        """Submit a job, or several as an array.

        An sbatch that failed in any way but a known refusal may have submitted all the same: the jobs are then looked
        for by their token, so that none is lost and none is submitted twice.
        """
        certificate = new_certificate(launch)
        script = render(job_spec(launch, certificate, count))
        in_file = launch.settings.birth_record == "file"
        if in_file:
            self._births.save(certificate)
        try:
            job_id = self._client.submit(script, launch.environ)
        except SubmitUnanswered as error:
            job_id = self._find(certificate, error)
        except SlurmError:
            if in_file:
                self._births.forget(certificate.token)
            raise
        if not launch.head:
            # Whoever watches `ray up` is told; workers are submitted by the head, in the same way.
            self._refuse_unrecognised(certificate, job_id)
        job_ids = [job_id] if count == 1 else [f"{job_id}_{index}" for index in range(count)]
        logger.info("submitted job %s (%d nodes of type %s)", job_id, count, launch.node_type)
        return [certificate.node_id(job_id) for job_id in job_ids]

    def terminate(self, node_ids: Sequence[str]) -> None:
        """Cancel jobs, each only if the job of that id still is ours: SLURM gives ids out again."""
        if not node_ids:
            return
        ours = {seen.node_id for seen in self.sightings() if seen.alive or seen.state == ELSEWHERE}
        doomed = [node_id for node_id in node_ids if node_id in ours]
        self._client.cancel(job_id_of(node_id) for node_id in doomed)
        for node_id in doomed:
            logger.info("cancelled job %s", job_id_of(node_id))

    def still_there(self, node_ids: Iterable[str]) -> str:
        """Return a node whose very job the controller still knows, and not another that got its id.

        There is one question for each single job, and one for each array.
        """
        by_number: dict[str, set[str]] = {}
        for node_id in node_ids:
            by_number.setdefault(job_id_of(node_id).partition("_")[0], set()).add(node_id)
        for number, wanted in by_number.items():
            for facts in self._client.array_facts(number):
                name = facts.get("JobName", "")
                certificate = self._certificate(facts.get("Comment", ""), name)
                token = certificate.token if certificate is not None else token_in(name)
                known = {f"{job_id}-{token}" for job_id in element_ids(facts)} & wanted
                if known and certificate is not None:
                    return min(known)
                if known and JobState.of(facts.get("JobState", "")).meaning is not Meaning.ENDED:
                    raise StateError(
                        f"the record of job {min(known)} was deleted from the cluster's directory\n"
                        f"  `scancel {number}` ends it; then `ray down` and `ray up`"
                    )
        return ""

    def how_ended(self, node_id: str) -> str:
        try:
            end = self._client.job_end(job_id_of(node_id))
        except SlurmError as error:
            return f"its end is not known: {error}"
        if end is None:
            return "SLURM does not know it any more"
        if end.state != ELSEWHERE:
            return str(end)
        return f"{end}: {STARTED_ELSEWHERE}\n  `scancel {job_id_of(node_id)}` ends it there"

    def _certificate(self, comment: str, job_name: str) -> BirthCertificate | None:
        return read_certificate(comment) or self._births.of_job(job_name)

    def _prune(self, rows: Iterable[Job]) -> None:
        """Delete the records of jobs that are gone for long, when the controller itself says that it knows none."""
        for token, number in self._births.unneeded((row.name, row.job_id.partition("_")[0]) for row in rows):
            with suppress(SlurmError, OSError):
                if not self._client.array_facts(number):
                    self._births.forget(token)

    def _refuse_unrecognised(self, certificate: BirthCertificate, job_id: str) -> None:
        """Cancel a job by which the site has left nothing to know it by.

        Raises:
            StateError: Always then.
        """
        facts = self._client.job_facts(job_id)
        found = self._certificate(facts.get("Comment", ""), facts.get("JobName", ""))
        if not facts or (found is not None and found.token == certificate.token):
            return
        self._client.cancel([job_id])
        raise StateError(
            f"the site has changed the comment of job {job_id}, by which it would be found again; it was cancelled\n"
            "  set provider.slurm.birth_record: file"
        )

    def _find(self, certificate: BirthCertificate, error: SubmitUnanswered) -> str:
        """Return the job that sbatch submitted without saying so; raise its error when none is seen."""
        error.token = certificate.token
        try:
            jobs = [(job, self._certificate(job.comment, job.name)) for job in self._client.jobs()]
        except (SlurmError, StateError):
            raise error from None
        for job, found in jobs:
            if found is not None and found.token == certificate.token and found.home == certificate.home:
                number = job.job_id.partition("_")[0]
                logger.warning("sbatch gave no answer, but job %s was submitted: %s", number, error.complaint)
                return number
        raise error

    def _of_row(self, row: Job) -> list[Sighting]:
        certificate = self._certificate(row.comment, row.name)
        if certificate is None or certificate.cluster != self._cluster or certificate.home != self._home:
            return []
        alive, queued, state = row.alive, row.queued, row.state.label
        return [
            Sighting(
                certificate.node_id(job.job_id),
                certificate.head,
                certificate.tags,
                alive,
                queued,
                state,
                row.reason,
                row.nodes,
                row.start,
                row.time_limit,
                row.end,
            )
            for job in row.elements()
        ]
