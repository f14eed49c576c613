"""Sends a small job to where each node type would run, and has it look around.

What a login node cannot know is asked there: whether the directory is really shared, whether hosts reach each other,
whether the same software is found.
"""

from __future__ import annotations

import secrets
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ray_slurm_provider import __version__, procfs
from ray_slurm_provider.agent import network
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.agent.canary import CanaryPaths, CanaryReport, ask_time, listen
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_dir import log_tail
from ray_slurm_provider.errors import SlurmError, SlurmProviderError
from ray_slurm_provider.files import read_json_object, write_atomically, write_json
from ray_slurm_provider.findings import FAILURE, FEW_FILES, OK, WARNING, Finding
from ray_slurm_provider.slurm.parse import format_time, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ray_slurm_provider.config import NodeConfig, SlurmSettings
    from ray_slurm_provider.slurm.client import SlurmClient
    from ray_slurm_provider.slurm.types import Job

_CANARY_TIME_S = 600
_ASK_S = 1.0
_REACH_S = 30.0
_GO_S = 15.0
_CLOCK_S = 1.0
_FREE_MIB = 1024
_LOGIN = "login"


@dataclass(frozen=True)
class NodeTypeJob:
    """A node type that is a job.

    Attributes:
        name: The node type.
        config: Its resolved configuration.
        is_head: Whether it is the head.
    """

    name: str
    config: NodeConfig
    is_head: bool


@dataclass
class _Canary:
    kind: NodeTypeJob
    job_id: str
    report: CanaryReport | None = None
    reached: Mapping[str, float | None] = field(default_factory=dict)
    offset_s: float | None = None
    ended: bool = False
    waits_for: str = ""

    @property
    def name(self) -> str:
        return self.kind.name


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
    cluster.directory.prepare()
    paths = CanaryPaths(cluster.directory.root)
    word = secrets.token_hex(8)
    write_atomically(paths.greeting, word)
    canaries: list[_Canary] = []
    with FileLock(paths.lock), _cleared_away(cluster, slurm, paths, canaries):
        worker = next((kind for kind in kinds if not kind.is_head), None)
        if worker is not None:
            write_atomically(paths.worker_script, cluster.canary(worker.name, _brief(worker.config), head=False))
        for kind in kinds:
            script = cluster.canary(kind.name, _brief(kind.config), head=kind.is_head)
            try:
                canaries.append(_Canary(kind, slurm.submit(script, environ)))
            except SlurmError as error:
                yield Finding(
                    f"canary of {kind.name}", FAILURE, f"sbatch refuses it: {error}", "see the line job of it"
                )
        _wait_for_reports(slurm, paths, canaries, wait_s)
        yield from _those_without_report(cluster, slurm, canaries)
        here = [canary for canary in canaries if canary.report is not None]
        if here:
            yield from _comments(slurm.jobs(), here, settings)
            login = _login_address(settings, slurm, kinds)
            _let_them_meet(slurm, paths, here, login)
            yield from _facts(here, word, login)


@contextmanager
def _cleared_away(cluster: Cluster, slurm: SlurmClient, paths: CanaryPaths, canaries: list[_Canary]) -> Iterator[None]:
    """Let the canaries go, end those that do not, and leave nothing behind."""
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
            if ids and not procfs.wait_until(gone, _GO_S, poll_s=0.2):
                slurm.cancel(ids)
        with suppress(SlurmProviderError):
            cluster.directory.remove()
        with suppress(OSError):
            cluster.directory.root.parent.rmdir()  # there only if this check has made it


def _brief(config: NodeConfig) -> NodeConfig:
    """Return the same node for a short time: it starts sooner."""
    wanted = parse_time_s(config.sbatch.time) if config.sbatch.time else None
    time_s = _CANARY_TIME_S if wanted is None else min(wanted, _CANARY_TIME_S)
    return config.model_copy(update={"sbatch": config.sbatch.model_copy(update={"time": format_time(time_s)})})


def _wait_for_reports(slurm: SlurmClient, paths: CanaryPaths, canaries: list[_Canary], wait_s: float) -> None:
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


def _those_without_report(cluster: Cluster, slurm: SlurmClient, canaries: list[_Canary]) -> Iterator[Finding]:
    for canary in canaries:
        if canary.report is not None:
            continue
        check = f"canary of {canary.name}"
        if not canary.ended:
            why = f"is still queued: {canary.waits_for}" if canary.waits_for else "runs, and has not reported yet"
            yield Finding(check, WARNING, f"job {canary.job_id} {why}", "--wait longer, or look at squeue")
            continue
        yield _how_it_ended(cluster, slurm, canary, check)


def _how_it_ended(cluster: Cluster, slurm: SlurmClient, canary: _Canary, check: str) -> Finding:
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


def _comments(jobs: Sequence[Job], canaries: Sequence[_Canary], settings: SlurmSettings) -> Iterator[Finding]:
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
    slurm: SlurmClient, paths: CanaryPaths, canaries: Sequence[_Canary], login: tuple[str, int] | None
) -> None:
    """Have everybody connect to everybody, and this host to all."""
    peers: dict[str, tuple[str, int]] = {
        c.job_id: (c.report.address, c.report.port) for c in canaries if c.report is not None and c.report.port
    }
    if login is not None:
        peers[_LOGIN] = login
    write_json(paths.peers, peers)
    for canary in canaries:
        if canary.job_id in peers:
            canary.offset_s = ask_time(*peers[canary.job_id])

    def all_met() -> bool:
        for canary in canaries:
            canary.reached = read_json_object(paths.reached(canary.job_id)) or canary.reached
        alive = {job.job_id for job in slurm.jobs() if job.alive}
        return all(canary.reached or len(peers) < 2 or canary.job_id not in alive for canary in canaries)

    procfs.wait_until(all_met, _REACH_S, poll_s=0.5)


# -- what the reports mean --------------------------------------------------------------------------


def _facts(canaries: Sequence[_Canary], word: str, login: tuple[str, int] | None) -> Iterator[Finding]:
    names = {canary.job_id: canary.name for canary in canaries} | {_LOGIN: "this host"}
    looks: dict[str, Callable[[_Canary, CanaryReport], Finding | None]] = {
        "shared directory": lambda c, r: _shared(c, r, word),
        "file locks": _locks,
        "software": _software,
        "address": _address,
        "connections": lambda c, r: _connections(c, r, names, login),
        "clock": _clock,
        "temp_dir": _temp_dir,
        "open files": _open_files,
        "shared memory": _shared_memory,
        "home": _home,
        "SLURM in the job": _slurm_inside,
    }
    places = ", ".join(f"{c.name} on {c.report.place}" for c in canaries if c.report is not None)
    yield Finding("canaries", OK, f"ran: {places}")
    for check, look in looks.items():
        fine = []
        for canary in canaries:
            if canary.report is None or (check == "SLURM in the job" and not canary.kind.is_head):
                continue
            problem = look(canary, canary.report)
            if problem is not None:
                yield problem
            else:
                fine.append(canary)
        if fine:
            yield Finding(check, OK, f"{', '.join(c.name for c in fine)}: {_GOOD[check](fine[0].report)}")


_GOOD: dict[str, Callable[[Any], str]] = {
    "shared directory": lambda _: "what is written here is read there, and the other way round",
    "file locks": lambda _: "a lock that is held here is seen there",
    "software": lambda r: f"Python {r.python}, Ray {r.ray}, ray-slurm-provider {r.plugin} as here",
    "address": lambda r: f"Ray would use {r.address}",
    "connections": lambda _: "reached from here, and by the others",
    "clock": lambda _: f"less than {_CLOCK_S:g} s from this one",
    "temp_dir": lambda r: f"{r.temp_dir}, {r.temp_dir_free_mib / 1024:.0f} GiB free",
    "open files": lambda r: f"up to {r.open_files} per process",
    "shared memory": lambda r: f"{r.shared_memory_mib / 1024:.1f} GiB",
    "home": lambda _: "can be written",
    "SLURM in the job": lambda _: "squeue answers, and sbatch would take a worker's job",
}


def _shared(canary: _Canary, report: CanaryReport, word: str) -> Finding | None:
    if report.greeting == word:
        return None
    return Finding(
        f"shared directory of {canary.name}",
        FAILURE,
        f"{report.place} reads something else than what was written here",
        "a provider.slurm.state_dir that login and compute nodes share",
    )


def _locks(canary: _Canary, report: CanaryReport) -> Finding | None:
    if report.lock_is_seen:
        return None
    return Finding(
        f"file locks of {canary.name}",
        FAILURE,
        f"{report.place} does not see a lock that is held here",
        "another provider.slurm.state_dir, or a mount with locks (NFS without nolock, Lustre with flock)",
    )


def _software(canary: _Canary, report: CanaryReport) -> Finding | None:
    here = {"Python": sys.version.split()[0], "Ray": metadata.version("ray"), "ray-slurm-provider": __version__}
    there = {"Python": report.python, "Ray": report.ray, "ray-slurm-provider": report.plugin}
    differing = [
        f"{what} {there[what] or 'is missing'} (here {here[what]})" for what in here if here[what] != there[what]
    ]
    if not differing:
        return None
    return Finding(
        f"software of {canary.name}",
        FAILURE,
        f"{report.executable} on {report.place}: {', '.join(differing)}",
        "the same environment on all hosts: provider.slurm.python, or setup commands that activate it",
    )


def _address(canary: _Canary, report: CanaryReport) -> Finding | None:
    check = f"address of {canary.name}"
    if report.address_problem:
        return Finding(check, FAILURE, f"{report.place}: {report.address_problem}", "provider.slurm.interface")
    if network.is_loopback(report.address) and report.boot_id != procfs.boot_id():
        trap = " (its own name means 127.0.1.1 there, by /etc/hosts)" if report.name_is_loopback else ""
        return Finding(
            check,
            FAILURE,
            f"{report.place} would use {report.address}, which is itself for every other host{trap}",
            "provider.slurm.interface, or NodeAddr in slurm.conf",
        )
    if report.name_is_loopback and not network.is_loopback(report.address):
        return Finding(
            check,
            WARNING,
            f"{report.place} takes its own name for a loopback address (127.0.1.1 in /etc/hosts); Ray gets"
            f" {report.address} in its place, other programs may not",
            "the admin: no line for the host's own name with 127.0.1.1 in /etc/hosts",
        )
    return None


def _connections(
    canary: _Canary, report: CanaryReport, names: Mapping[str, str], login: tuple[str, int] | None
) -> Finding | None:
    if not report.port:
        return None
    problems = []
    if canary.offset_s is None:
        problems.append(f"this host does not reach it at {report.address}")
    lost = [names.get(peer, peer) for peer, offset in canary.reached.items() if offset is None]
    if lost:
        problems.append(
            f"it does not reach {', '.join(lost)}" + (f" at {login[0]}" if login and "this host" in lost else "")
        )
    if not problems:
        return None
    return Finding(
        f"connections of {canary.name}",
        FAILURE,
        f"{report.place}: {'; '.join(problems)}",
        "provider.slurm.interface for another network; provider.slurm.ports for what the firewall lets through",
    )


def _clock(canary: _Canary, report: CanaryReport) -> Finding | None:
    if canary.offset_s is None or abs(canary.offset_s) < _CLOCK_S:
        return None
    return Finding(
        f"clock of {canary.name}",
        WARNING,
        f"that of {report.place} is {abs(canary.offset_s):.0f} s {'ahead' if canary.offset_s > 0 else 'behind'}",
        "the admin: time synchronisation; munge refuses more than 300 s",
    )


def _temp_dir(canary: _Canary, report: CanaryReport) -> Finding | None:
    check = f"temp_dir of {canary.name}"
    if report.temp_dir_problem:
        return Finding(check, FAILURE, f"{report.place}: {report.temp_dir_problem}", "another provider.slurm.temp_dir")
    if report.temp_dir_free_mib < _FREE_MIB:
        text = f"{report.place}: only {report.temp_dir_free_mib} MiB are free in {report.temp_dir}"
        return Finding(check, WARNING, text, "another provider.slurm.temp_dir")
    return None


def _open_files(canary: _Canary, report: CanaryReport) -> Finding | None:
    if report.open_files < 0 or report.open_files >= FEW_FILES:
        return None
    return Finding(
        f"open files of {canary.name}",
        WARNING,
        f"{report.place}: at most {report.open_files} per process",
        "the admin: LimitNOFILE of slurmd, PropagateResourceLimits in slurm.conf",
    )


def _shared_memory(canary: _Canary, report: CanaryReport) -> Finding | None:
    resolved = canary.kind.config.resolved
    wanted = (resolved.resources if resolved is not None else {}).get("object_store_memory", 0) // MIB
    if report.shared_memory_mib >= wanted:
        return None
    return Finding(
        f"shared memory of {canary.name}",
        WARNING,
        f"{report.place}: /dev/shm has {report.shared_memory_mib} MiB, and the object store {wanted}",
        "a smaller object_store_memory in the type's resources; Ray would put objects on disk",
    )


def _home(canary: _Canary, report: CanaryReport) -> Finding | None:
    if not report.home_problem:
        return None
    return Finding(
        f"home of {canary.name}",
        WARNING,
        f"{report.place}: {report.home_problem}",
        "the provider does not need it with state_dir elsewhere; what your tasks run may",
    )


def _slurm_inside(canary: _Canary, report: CanaryReport) -> Finding | None:
    if not report.slurm_problem:
        return None
    return Finding(
        f"SLURM in the job of {canary.name}",
        FAILURE,
        f"{report.place}: {report.slurm_problem}",
        "the head submits the workers' jobs: SLURM's tools must work there; or placement: login_node for the head",
    )
