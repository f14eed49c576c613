"""What belongs to no living cluster: jobs without their head, and directories of which nothing runs.

Only what carries a birth certificate is looked at, and of that only this user's. Where it cannot be told whether a head
lives, nothing of its cluster is garbage.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from ray_slurm_provider.agent.temp_dirs import dead_temp_dirs, sweep_temp_dirs
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.clusters import collect_clusters
from ray_slurm_provider.slurm.client import SlurmClient

# A directory that was made a moment ago: `ray up` is about to submit its head.
_YOUNG_S = 120.0
# What a worker's canary has in place of a head (`ray-slurm check`); it ends by itself.
_CANARY_HEAD = "HEAD"


@dataclass(frozen=True)
class Garbage:
    """What can go."""

    jobs: dict[str, str]  # by their ids, what they are
    directories: list[ClusterDir]  # of clusters of which nothing runs
    temp_dirs: list[Path]  # what killed jobs left on this host
    kept: list[str]  # directories of clusters that may live elsewhere, and why

    def __bool__(self) -> bool:
        return bool(self.jobs or self.directories or self.temp_dirs)

    def lines(self) -> list[str]:
        return [
            *(f"job {job_id}: {what}" for job_id, what in self.jobs.items()),
            *(f"directory {directory.root}: nothing of the cluster runs" for directory in self.directories),
            *(f"directory {path}: left by a job that was killed on this host" for path in self.temp_dirs),
        ]


def find_garbage(client: SlurmClient, state_dir: Path, temp_dir: str, now: float | None = None) -> Garbage:
    """Return what belongs to no living cluster of this user.

    Raises:
        SlurmError: SLURM does not answer; nothing is known then.
    """
    now = time.time() if now is None else now
    jobs: dict[str, str] = {}
    directories, kept = [], []
    found, here = collect_clusters(client, state_dir), client.identity()
    for (name, _), entry in found.items():
        heads, unseen = entry.heads(name, here)
        living = {node_id for node_id, _ in heads}
        if unseen:
            kept += [f"directory {entry.directory.root} is left alone: {unseen}"] if entry.directory else []
            continue
        for certificate, job in entry.jobs:
            if certificate.head and certificate.head not in {*living, _CANARY_HEAD}:
                jobs[job.job_id] = (
                    f"a worker of cluster {name}, whose head {certificate.head} is gone ({job.state.label})"
                )
        if entry.directory is not None and not living and _age_s(entry.directory, now) > _YOUNG_S:
            left = [job for _, job in entry.jobs if job.job_id not in jobs]
            directories += [entry.directory] if entry.directory.exists and not left else []
    return Garbage(jobs, directories, dead_temp_dirs(temp_dir), kept)


def remove_garbage(client: SlurmClient, garbage: Garbage, temp_dir: str) -> None:
    """End the jobs and remove the directories.

    Raises:
        SlurmError: The jobs could not be cancelled; nothing was removed.
        StateError: A directory could not be removed.
    """
    client.cancel(garbage.jobs)
    for directory in garbage.directories:
        directory.remove()
    sweep_temp_dirs(temp_dir)


def _age_s(directory: ClusterDir, now: float) -> float:
    try:
        return now - directory.root.stat().st_mtime
    except OSError:
        return 0.0
