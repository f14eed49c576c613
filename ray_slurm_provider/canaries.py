"""Sends a small job to where each node type would run, and has it look around.

What a login node cannot know is asked there: whether the directory is really shared, whether hosts reach each other,
whether the same software is found.
"""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock

from ray_slurm_provider import procfs
from ray_slurm_provider.agent import network
from ray_slurm_provider.agent.canary import CONNECT_S, CanaryPaths, CanaryReport, ask_time, listen
from ray_slurm_provider.canary_findings import LOGIN, Canary, NodeTypeJob, what_they_found
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_dir import log_tail
from ray_slurm_provider.errors import SlurmError, SlurmProviderError, SubmitRejected
from ray_slurm_provider.files import read_json_object, write_atomically, write_json
from ray_slurm_provider.findings import FAILURE, WARNING, Finding
from ray_slurm_provider.slurm.parse import format_time, parse_time_s
from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ray_slurm_provider.config import NodeConfig, SlurmSettings
    from ray_slurm_provider.slurm.client import SlurmClient
    from ray_slurm_provider.slurm.types import Job

_CANARY_TIME_S = 600
_ASK_S = 1.0
_REACH_S = 30.0
_GO_S = 15.0


def look_around(
    settings: SlurmSettings, kinds: Sequence[NodeTypeJob], environ: Mapping[str, str], wait_s: float
) -> Iterator[Finding]:
    """Yield what canaries of all node types find.

    Args:
        settings: ``provider.slurm``.
        kinds: The node types.
        environ: The environment that jobs start with.
        wait_s: How long to wait for jobs to start, seconds.

    Raises:
        SlurmError: SLURM does not answer.
        StateError: The directory cannot be used.
    """
    cluster = Cluster(f".check-{secrets.token_hex(3)}", settings, environ)
    slurm = cluster.slurm_client()
    paths = CanaryPaths(cluster.directory.root)
    word = secrets.token_hex(8)
    canaries: list[Canary] = []
    with _in_a_directory_of_its_own(cluster), _cleared_away(slurm, paths, canaries), FileLock(paths.lock):
        write_atomically(paths.greeting, word)
        worker = next((kind for kind in kinds if not kind.is_head), None)
        if worker is not None:
            write_atomically(paths.worker_script, cluster.canary(worker.name, _brief(worker.config), head=False))
        for kind in kinds:
            script = cluster.canary(kind.name, _brief(kind.config), head=kind.is_head)
            try:
                canaries.append(Canary(kind, slurm.submit(script, environ)))
            except SubmitRejected as error:
                limited = error.not_now
                yield Finding(
                    f"canary of {kind.name}",
                    WARNING if limited else FAILURE,
                    f"sbatch refuses it: {error.complaint}",
                    "you have as many jobs as the site allows; try again later" if limited else "ask the site",
                )
        _wait_for_reports(slurm, paths, canaries, wait_s)
        yield from _those_without_report(cluster, slurm, canaries)
        here = [canary for canary in canaries if canary.report is not None]
        if here:
            yield from _comments(slurm.jobs(), here, settings)
            login = _login_address(settings, slurm, kinds)
            _let_them_meet(slurm, paths, here, login)
            yield from what_they_found(here, word, login)


@contextmanager
def _in_a_directory_of_its_own(cluster: Cluster) -> Iterator[None]:
    """Make the directory of the check, and leave nothing behind."""
    state_dir = cluster.directory.root.parent
    existed = state_dir.exists()
    cluster.directory.prepare()
    try:
        yield
    finally:
        with suppress(SlurmProviderError, OSError):
            cluster.directory.remove()
            if not existed:
                state_dir.rmdir()


@contextmanager
def _cleared_away(slurm: SlurmClient, paths: CanaryPaths, canaries: list[Canary]) -> Iterator[None]:
    """Let the canaries go, and end those that do not."""
    try:
        yield
    finally:
        with suppress(OSError):
            paths.stop.touch()
        ids = {canary.job_id for canary in canaries}

        def gone() -> bool:
            return not any(job.job_id in ids and (job.alive or job.state.label == "COMPLETING") for job in slurm.jobs())

        with suppress(SlurmError):
            slurm.cancel([canary.job_id for canary in canaries if canary.report is None])
            if ids and not procfs.wait_until(gone, _GO_S, poll_s=0.5):
                slurm.cancel(ids)


def _brief(config: NodeConfig) -> NodeConfig:
    """Return the same node for a short time: it starts sooner."""
    wanted = parse_time_s(config.sbatch.time) if config.sbatch.time else None
    time_s = _CANARY_TIME_S if wanted is None else min(wanted, _CANARY_TIME_S)
    return config.model_copy(update={"sbatch": config.sbatch.model_copy(update={"time": format_time(time_s)})})


def _wait_for_reports(slurm: SlurmClient, paths: CanaryPaths, canaries: list[Canary], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    next_question = 0.0
    while True:
        for canary in canaries:
            found = read_json_object(paths.report(canary.job_id)) if canary.report is None else None
            if found is not None:
                canary.report = CanaryReport(**found)
        missing = [canary for canary in canaries if canary.report is None and not canary.ended]
        if not missing:
            return
        now = time.monotonic()
        if now >= next_question:
            next_question = now + _ASK_S
            jobs = {job.job_id: job for job in slurm.jobs()}
            for canary in missing:
                job = jobs.get(canary.job_id)
                # A report that was written just before the end is read in the next round.
                canary.ended = (job is None or not job.alive) and not paths.report(canary.job_id).exists()
                canary.waits_for = job.reason if job is not None and job.queued else ""
        # A job that runs may still be setting itself up: it gets as long again.
        running = any(not canary.waits_for for canary in missing)
        if now > deadline + (wait_s if running else 0):
            return
        time.sleep(0.1)


def _those_without_report(cluster: Cluster, slurm: SlurmClient, canaries: list[Canary]) -> Iterator[Finding]:
    for canary in canaries:
        if canary.report is not None:
            continue
        check = f"canary of {canary.name}"
        if not canary.ended:
            why = (
                f"is still queued: {in_words(canary.waits_for)}"
                if canary.waits_for
                else "runs, and has not reported yet"
            )
            level = FAILURE if waits_for_ever(canary.waits_for) else WARNING
            yield Finding(check, level, f"job {canary.job_id} {why}", "--wait longer, or look at squeue")
            continue
        yield _how_it_ended(cluster, slurm, canary, check)


def _how_it_ended(cluster: Cluster, slurm: SlurmClient, canary: Canary, check: str) -> Finding:
    end = slurm.job_end(canary.job_id)
    host = slurm.job_facts(canary.job_id).get("NodeList", "") or "its host"
    nodes = sorted(cluster.directory.reports.nodes.glob(f"{canary.job_id}-*.reason"))
    reason = cluster.directory.reason(nodes[0].stem) if nodes else ""
    log = next(iter(sorted((cluster.directory.root / "logs").glob(f"{canary.job_id}-*.log"))), None)
    if reason:
        return Finding(check, FAILURE, f"job {canary.job_id} ended on {host}: {reason}", "the node would end so too")
    if log is None:
        return Finding(
            check,
            FAILURE,
            f"job {canary.job_id} ran on {host} ({end}), and nothing of it is to be seen in {cluster.directory.root}:"
            " the directory is not shared",
            "a provider.slurm.state_dir on a file system that login and compute nodes share",
        )
    said = " | ".join(log_tail(log, 3))
    return Finding(check, FAILURE, f"job {canary.job_id} ended on {host} ({end}): {said}", "the node would end so too")


def _comments(jobs: Sequence[Job], canaries: Sequence[Canary], settings: SlurmSettings) -> Iterator[Finding]:
    comments = {job.job_id: job.comment for job in jobs}
    changed = [c.name for c in canaries if not comments.get(c.job_id, "ray-slurm:").startswith("ray-slurm:")]
    if settings.birth_record == "comment" and changed:
        yield Finding(
            "comment",
            FAILURE,
            f"the site changes the comment of jobs ({', '.join(changed)}), by which they are known",
            "provider.slurm.birth_record: file",
        )


def _login_address(settings: SlurmSettings, slurm: SlurmClient, kinds: Sequence[NodeTypeJob]) -> tuple[str, int] | None:
    """Listen where a head on the login node would, None when the head is a job."""
    if any(kind.is_head for kind in kinds):
        return None
    try:
        address = network.choose_login_address(settings.interface or "", slurm.node_addresses)
        return address, listen(address, settings.ports.services or "")
    except (OSError, ValueError):
        return None  # the check of the address tells


def _let_them_meet(
    slurm: SlurmClient, paths: CanaryPaths, canaries: Sequence[Canary], login: tuple[str, int] | None
) -> None:
    """Have everybody connect to everybody, and this host to all."""
    peers: dict[str, tuple[str, int]] = {
        c.job_id: (c.report.address, c.report.port) for c in canaries if c.report is not None and c.report.port
    }
    if login is not None:
        peers[LOGIN] = login
    write_json(paths.peers, peers)
    for canary in canaries:
        if canary.job_id in peers:
            canary.offset_s = ask_time(*peers[canary.job_id])

    def all_met() -> bool:
        for canary in canaries:
            canary.reached = read_json_object(paths.reached(canary.job_id)) or canary.reached
        alive = {job.job_id for job in slurm.jobs() if job.alive}
        return all(canary.reached or len(peers) < 2 or canary.job_id not in alive for canary in canaries)

    procfs.wait_until(all_met, _REACH_S + CONNECT_S * len(peers), poll_s=0.5)
