"""Sends a small job to where each node type would run, and has it look around.

What a login node cannot know is asked there. The jobs judge for themselves (`agent/canary`); added here is whether
they start and report, and whether hosts reach each other and agree on the time.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.canary import GREETING, LOCK, PEERS, STOP, WORKER_SCRIPT, ProbeReport, report_path
from ray_slurm_provider.agent.host_checks import CONNECT_S, ask_time, versions
from ray_slurm_provider.birth_certificate import new_token
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_dir import log_tail
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import SlurmError, StateError, SubmitRejected
from ray_slurm_provider.files import write_atomically, write_json
from ray_slurm_provider.findings import FAILURE, OK, WARNING, Finding
from ray_slurm_provider.locks import locked
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.parse import format_time, parse_time_s
from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever
from ray_slurm_provider.slurm.types import Job

_PROBE_TIME_S = 600
_ASK_S = 1.0
_REACH_S = 30.0
_GO_S = 15.0
_CLOCK_S = 1.0
_LOCK_S = 5.0
_REPORT = TypeAdapter(ProbeReport)
# The name of the login node among the node types that are to be reached.
_THIS_HOST = "this host"
Address = tuple[str, int]  # with the port


class NodeType(NamedTuple):
    """A node type of the YAML, with its resolved configuration."""

    name: str
    config: NodeConfig
    is_head: bool


@dataclass
class ProbeJob:
    """A job that looks around where a node of some type would run."""

    name: str  # the node type
    job_id: str
    report: ProbeReport | None = None
    offset_s: float | None = None  # by how much its clock is ahead of ours; None when we do not reach it

    def read_report(self, root: Path) -> None:
        """Take what it says, if it has said so yet; the file may hold anything, and then that is what was found."""
        try:
            self.report = _REPORT.validate_json(report_path(root, self.job_id).read_bytes(), strict=True)
        except OSError:
            return
        except ValidationError as error:
            first = error.errors()[0]
            text = f"its report is not understood here: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            advice = "the same ray-slurm-provider on all hosts: provider.slurm.python, or setup commands"
            self.report = ProbeReport(f"job {self.job_id}", "", 0, [Finding("probe job", FAILURE, text, advice)])


def look_around(
    settings: SlurmSettings, types: Sequence[NodeType], environ: Mapping[str, str], wait_s: float, login: Address | None
) -> Iterator[Finding]:
    """Yield what probe jobs of all node types find, and those that do not start within `wait_s` seconds.

    `login` is where this host listens as a head would; None when the head is a job.
    """
    cluster = Cluster(f".check-{secrets.token_hex(3)}", settings, environ)
    slurm, root, token = cluster.slurm_client(), cluster.directory.root, new_token()
    jobs: list[ProbeJob] = []
    with ExitStack() as stack:
        stack.callback(_remove_directory, cluster)
        cluster.directory.prepare()
        stack.callback(_clear_away, slurm, root, jobs)
        with suppress(StateError):  # the jobs tell of it
            stack.enter_context(locked(root / LOCK, _LOCK_S))
        write_json(root / GREETING, {"token": token, "boot_id": procfs.boot_id(), "versions": versions()})
        scripts = {
            kind.name: cluster.canary(kind.name, _brief(kind.config), token, head=kind.is_head) for kind in types
        }
        workers = [scripts[kind.name] for kind in types if not kind.is_head]
        if workers:
            write_atomically(root / WORKER_SCRIPT, workers[0])
        yield from _submit(slurm, scripts, environ, jobs)
        left = _wait_for_reports(slurm, root, jobs, wait_s)
        yield from (_why_silent(cluster, job, token, left.get(job.job_id)) for job in jobs if job.report is None)
        if any(job.report for job in jobs):
            yield from _check_comments(settings, slurm, jobs)
            yield from findings_of(jobs, _let_them_meet(slurm, root, jobs, login))


def _remove_directory(cluster: Cluster) -> None:
    with suppress(StateError, OSError):
        cluster.directory.remove()


def _clear_away(slurm: SlurmClient, root: Path, jobs: Sequence[ProbeJob]) -> None:
    """Let the jobs go, and end those that do not."""
    ids = {job.job_id for job in jobs}

    def gone() -> bool:
        return not any(row.job_id in ids and (row.alive or row.state.label == "COMPLETING") for row in slurm.jobs())

    with suppress(OSError):
        (root / STOP).touch()
    with suppress(SlurmError):
        slurm.cancel([job.job_id for job in jobs if job.report is None])
        if ids and not procfs.wait_until(gone, _GO_S, poll_s=0.5):
            slurm.cancel(ids)


def _submit(
    slurm: SlurmClient, scripts: Mapping[str, str], environ: Mapping[str, str], jobs: list[ProbeJob]
) -> Iterator[Finding]:
    """Submit the scripts of node types, their jobs into the list; yield those that are refused."""
    for name, script in scripts.items():
        try:
            jobs.append(ProbeJob(name, slurm.submit(script, environ)))
        except SubmitRejected as error:  # noqa: PERF203 a job each
            check, text = f"probe job of {name}", f"sbatch refuses it: {error.complaint}"
            if error.not_now:
                yield Finding(check, WARNING, text, "you have as many jobs as the site allows; try again later")
            else:
                yield Finding(check, FAILURE, text, "ask the site")


def _brief(config: NodeConfig) -> NodeConfig:
    """Return the same node for a short time: it starts sooner."""
    wanted = parse_time_s(config.sbatch.time) if config.sbatch.time else None
    time_s = _PROBE_TIME_S if wanted is None else min(wanted, _PROBE_TIME_S)
    return config.model_copy(update={"sbatch": config.sbatch.model_copy(update={"time": format_time(time_s)})})


def _wait_for_reports(slurm: SlurmClient, root: Path, jobs: Sequence[ProbeJob], wait_s: float) -> Mapping[str, Job]:
    """Wait for the reports; return the jobs that have not ended."""
    alive: dict[str, Job] = {}
    deadline, next_question = time.monotonic() + wait_s, 0.0
    while True:
        now = time.monotonic()
        if now >= next_question:
            alive = {row.job_id: row for row in slurm.jobs() if row.alive}
            next_question = now + _ASK_S
        for job in jobs:
            # After the question: what a job has written just before its end counts.
            if job.report is None:
                job.read_report(root)
        awaited = [alive[job.job_id] for job in jobs if job.report is None and job.job_id in alive]
        # A job that runs may still be setting itself up: it gets as long again.
        running = any(not row.queued for row in awaited)
        if not awaited or now > deadline + (wait_s if running else 0):
            return alive
        time.sleep(0.1)


def _why_silent(cluster: Cluster, job: ProbeJob, token: str, row: Job | None) -> Finding:
    """Return why there is no report of a job; it has ended when there is no row of it."""
    check = f"probe job of {job.name}"
    if row is not None:
        why = f"is still queued: {in_words(row.reason)}" if row.queued else "runs, and has not reported yet"
        hopeless = row.queued and waits_for_ever(row.reason)
        text, advice = f"job {job.job_id} {why}", "--wait longer, or look at squeue"
        return Finding(check, FAILURE if hopeless else WARNING, text, advice)
    slurm = cluster.slurm_client()
    end = slurm.job_end(job.job_id)
    host = slurm.job_facts(job.job_id).get("NodeList", "") or "its host"
    log = cluster.log_of(f"{job.job_id}-{token}")
    said = cluster.directory.reason(f"{job.job_id}-{token}") or " | ".join(log_tail(log, 3))
    if said or log.exists():
        text = f"job {job.job_id} ended on {host} ({end}): {said}"
        return Finding(check, FAILURE, text, "the node would end so too")
    text = f"job {job.job_id} ran on {host} ({end}), and nothing of it is to be seen in {cluster.directory.root}"
    advice = "a provider.slurm.state_dir on a file system that login and compute nodes share"
    return Finding(check, FAILURE, f"{text}: the directory is not shared", advice)


def _check_comments(settings: SlurmSettings, slurm: SlurmClient, jobs: Sequence[ProbeJob]) -> Iterator[Finding]:
    comments = {row.job_id: row.comment for row in slurm.jobs()}
    changed = [job.name for job in jobs if not comments.get(job.job_id, "ray-slurm:").startswith("ray-slurm:")]
    if settings.birth_record == "comment" and changed:
        text = f"the site changes the comment of jobs ({', '.join(changed)}), by which they are known"
        yield Finding("comment", FAILURE, text, "provider.slurm.birth_record: file")


def _let_them_meet(
    slurm: SlurmClient, root: Path, jobs: Sequence[ProbeJob], login: Address | None
) -> dict[str, Address]:
    """Have everybody connect to everybody, and this host to all; return where each listens."""
    listening = {job.name: job for job in jobs if job.report and job.report.port}
    peers = {name: (job.report.address, job.report.port) for name, job in listening.items() if job.report}
    if login is not None:
        peers[_THIS_HOST] = login
    write_json(root / PEERS, peers)
    for name, job in listening.items():
        job.offset_s = ask_time(*peers[name])

    def all_met() -> bool:
        for job in listening.values():
            job.read_report(root)
        alive = {row.job_id for row in slurm.jobs() if row.alive}
        return all((job.report and job.report.reached) or job.job_id not in alive for job in listening.values())

    procfs.wait_until(all_met, _REACH_S + CONNECT_S * len(peers), poll_s=0.5)
    return peers


def findings_of(jobs: Sequence[ProbeJob], peers: Mapping[str, Address]) -> Iterator[Finding]:
    """Yield a line for each thing that is well with some node types, and one for each problem."""
    reports = [(job, job.report) for job in jobs if job.report is not None]
    yield Finding("probe jobs", OK, "ran: " + ", ".join(f"{job.name} on {report.host}" for job, report in reports))
    found = [
        (job.name, report.host, finding)
        for job, report in reports
        for finding in (*report.findings, *_meeting(job, report, peers))
    ]
    for check in dict.fromkeys(finding.check for *_, finding in found):
        here = [(name, host, finding) for name, host, finding in found if finding.check == check]
        for name, host, finding in here:
            if finding.level != OK:
                yield Finding(f"{check} of {name}", finding.level, f"{host}: {finding.text}", finding.advice)
        fine = [(name, finding.text) for name, _, finding in here if finding.level == OK]
        if fine:
            yield Finding(check, OK, f"{', '.join(name for name, _ in fine)}: {fine[0][1]}")


def _meeting(job: ProbeJob, report: ProbeReport, peers: Mapping[str, Address]) -> Iterator[Finding]:
    """Yield whether the host of a job and the others find each other, and the same time."""
    if job.name not in peers:
        return  # its address tells
    problems = [] if job.offset_s is not None else [f"this host does not reach it at {report.address}"]
    lost = [f"{name} at {address}" for name, (address, _) in peers.items() if report.reached.get(name) is None]
    if not report.reached:
        problems.append("it has not said in time whom it reaches")
    elif lost:
        problems.append(f"it does not reach {', '.join(lost)}")
    if problems:
        advice = "provider.slurm.interface for another network; provider.slurm.ports for what the firewall lets through"
        yield Finding("connections", FAILURE, "; ".join(problems), advice)
    else:
        yield Finding("connections", OK, "reached from here, and by the others")
    if job.offset_s is not None and not abs(job.offset_s) < _CLOCK_S:
        text = f"its clock is {abs(job.offset_s):.0f} s {'ahead' if job.offset_s > 0 else 'behind'}"
        yield Finding("clock", WARNING, text, "the admin: time synchronisation; munge refuses more than 300 s")
    elif job.offset_s is not None:
        yield Finding("clock", OK, f"less than {_CLOCK_S:g} s from this one")
