"""All clusters of this user: those in SLURM, and those whose directory is left."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ray_slurm_provider.backends.login_process import PREFIX as LOGIN_PREFIX
from ray_slurm_provider.backends.login_process import LoginProcess
from ray_slurm_provider.birth_certificate import BirthCertificate, read_certificate
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.files import is_gone
from ray_slurm_provider.reports import READY
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.types import Job, SlurmIdentity


@dataclass(frozen=True)
class ClusterRow:
    """One cluster, as a person wants to see it."""

    name: str
    state: str  # up, starting, queued, down; "no head" when only workers are left, "unknown" when nobody can tell
    head: str  # node id; "" when there is none
    running: int  # workers
    queued: int  # workers
    address: str  # where the head answers; "" when it does not
    directory: str  # "" when it is not known


@dataclass
class FoundCluster:
    """What is found of one cluster."""

    jobs: list[tuple[BirthCertificate, Job]] = field(default_factory=list)  # those that live
    directory: ClusterDir | None = None

    def heads(self, name: str, here: SlurmIdentity) -> tuple[list[tuple[str, bool]], str]:
        """Return the living heads, each with whether it waits, and why there may be one that is not seen from here."""
        heads = [
            (certificate.node_id(job.job_id), job.queued) for certificate, job in self.jobs if not certificate.head
        ]
        elsewhere = any(certificate.head.startswith(LOGIN_PREFIX) for certificate, _ in self.jobs)
        unseen = "its head is a process on a login node" if elsewhere else ""
        if self.directory is None:
            return heads, unseen
        try:
            seen = LoginProcess(self.directory, name).sightings()
            heads += [(one.node_id, one.queued) for one in seen if one.alive]
            if unseen and not seen:
                return heads, unseen
            return heads, "" if heads else _why_unseen(self.directory, here)
        except StateError as error:
            return heads, str(error).partition("\n")[0]


def find_clusters(client: SlurmClient, state_dir: Path) -> list[ClusterRow]:
    found, here = collect_clusters(client, state_dir), client.identity()
    return [_row(name, found[name, home], here) for name, home in sorted(found)]


def collect_clusters(client: SlurmClient, state_dir: Path) -> dict[tuple[str, str], FoundCluster]:
    """Return every cluster of this user, by name and fingerprint of its directory.

    Directories of clusters that have no job are looked for in ``state_dir``.

    Raises:
        SlurmError, StateError: SLURM or the file system does not answer; nothing is known then.
    """
    found: dict[tuple[str, str], FoundCluster] = defaultdict(FoundCluster)
    directories = [ClusterDir(root.parent, root.name) for root in _directories_in(state_dir)]
    births = [BirthRecords(directory.births) for directory in directories if not is_gone(directory.births)]
    for directory in directories:
        found[directory.root.name, directory.fingerprint].directory = directory
    for row in client.jobs():
        in_files = (record for known in births if (record := known.of_job(row.name)) is not None)
        certificate = read_certificate(row.comment) or next(in_files, None)
        if certificate is not None and row.alive:
            found[certificate.cluster, certificate.home].jobs += ((certificate, job) for job in row.elements())
    for (name, _), entry in found.items():
        if entry.directory is None:
            entry.directory = _directory_of(client, entry.jobs[0][1], name)
    return found


def _why_unseen(directory: ClusterDir, here: SlurmIdentity) -> str:
    """Return why a cluster without a head in squeue may live all the same."""
    slurm = directory.slurm()
    if slurm is not None and not slurm.is_same(here):
        return (
            f"its jobs are in {slurm}, but {here} answers here; set SLURM_CONF or SLURM_CLUSTERS for that one,"
            " or remove the directory when that SLURM is gone for good"
        )
    sign = directory.sign_of_life
    return f"its head {sign}, but {here} does not know it" if sign else ""


def _directories_in(state_dir: Path) -> Iterator[Path]:
    if state_dir.is_dir():
        yield from (path for path in state_dir.iterdir() if (path / "logs").is_dir() and (path / "nodes").is_dir())


def _directory_of(client: SlurmClient, job: Job, name: str) -> ClusterDir | None:
    log = Path(client.job_facts(job.job_id).get("StdOut", ""))
    root = log.parent.parent
    return ClusterDir(root.parent, name) if root.name == name else None


def _row(name: str, entry: FoundCluster, here: SlurmIdentity) -> ClusterRow:
    directory = entry.directory
    heads, unseen = entry.heads(name, here)
    workers = [job for certificate, job in entry.jobs if certificate.head]
    head, queued = heads[0] if heads else ("", False)
    report = directory.head_report() if directory is not None else None
    ready = report is not None and report.node_id == head and report.phase == READY
    if head:
        state = "up" if ready else "queued" if queued else "starting"
    else:
        state = "unknown" if unseen else "no head" if workers else "down"
    return ClusterRow(
        name=name,
        state=state,
        head=head,
        running=sum(not job.queued for job in workers),
        queued=sum(job.queued for job in workers),
        address=report.gcs_address if report is not None and ready else "",
        directory=str(directory.root) if directory is not None else "",
    )
