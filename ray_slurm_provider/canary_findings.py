"""What the reports of canaries mean."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from ray_slurm_provider import __version__, procfs
from ray_slurm_provider.agent import network
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.findings import FAILURE, FEW_FILES, OK, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ray_slurm_provider.agent.canary import CanaryReport
    from ray_slurm_provider.config import NodeConfig

# Under this name this host stands among those that canaries try to reach.
LOGIN = "login"
_CLOCK_S = 1.0
_FREE_MIB = 1024


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
class Canary:
    """A job that looks around where a node of some type would run.

    Attributes:
        kind: The node type.
        job_id: The job.
        report: What it found; None while it has not said so.
        reached: By how much the clocks of the others are ahead of its own, seconds; None for who was not reached.
        offset_s: By how much its clock is ahead of ours, seconds; None when we do not reach it.
        ended: Whether the job ended without a report.
        waits_for: Why it is queued; "" when it is not.
    """

    kind: NodeTypeJob
    job_id: str
    report: CanaryReport | None = None
    reached: Mapping[str, float | None] = field(default_factory=dict)
    offset_s: float | None = None
    ended: bool = False
    waits_for: str = ""

    @property
    def name(self) -> str:
        """The node type."""
        return self.kind.name


class _Problem(NamedTuple):
    level: str
    text: str
    advice: str


class _Look(NamedTuple):
    check: str
    problem: Callable[[Canary, CanaryReport], _Problem | None]
    good: Callable[[CanaryReport], str]
    applies: Callable[[Canary, CanaryReport], bool] = lambda canary, report: True  # noqa: ARG005


def what_they_found(canaries: Sequence[Canary], word: str, login: tuple[str, int] | None) -> Iterator[Finding]:
    """Yield a line for each thing that is well with some node types, and one for each problem.

    Args:
        canaries: Those that have reported.
        word: What they should have read in the shared directory.
        login: Where this host listens for them; None when it does not.
    """
    reports = [(canary, canary.report) for canary in canaries if canary.report is not None]
    yield Finding("canaries", OK, "ran: " + ", ".join(f"{canary.name} on {report.place}" for canary, report in reports))
    names = {canary.job_id: canary.name for canary, report in reports if report.port}
    for look in _looks(names, word, login):
        fine = []
        for canary, report in reports:
            if not look.applies(canary, report):
                continue
            problem = look.problem(canary, report)
            if problem is None:
                fine.append((canary.name, report))
            else:
                text = f"{report.place}: {problem.text}"
                yield Finding(f"{look.check} of {canary.name}", problem.level, text, problem.advice)
        if fine:
            yield Finding(look.check, OK, f"{', '.join(name for name, _ in fine)}: {look.good(fine[0][1])}")


def _looks(names: Mapping[str, str], word: str, login: tuple[str, int] | None) -> Iterator[_Look]:
    yield _Look(
        "shared directory",
        lambda _, report: _shared(report, word),
        lambda _: "what is written here is read there, and the other way round",
    )
    yield _Look("file locks", _locks, lambda _: "a lock that is held here is seen there")
    yield _Look(
        "software",
        _software,
        lambda report: f"Python {report.python}, Ray {report.ray}, ray-slurm-provider {report.plugin} as here",
    )
    yield _Look("address", _address, lambda report: f"Ray would use {report.address}")
    yield _Look(
        "connections",
        lambda canary, report: _connections(canary, report, names, login),
        lambda _: "reached from here, and by the others",
        applies=lambda _, report: bool(report.port),  # else its address tells
    )
    yield _Look(
        "clock",
        _clock,
        lambda _: f"less than {_CLOCK_S:g} s from this one",
        applies=lambda canary, _: canary.offset_s is not None,
    )
    yield _Look(
        "temp_dir", _temp_dir, lambda report: f"{report.temp_dir}, {report.temp_dir_free_mib / 1024:.0f} GiB free"
    )
    yield _Look("open files", _open_files, lambda report: f"up to {report.open_files} per process")
    yield _Look("shared memory", _shared_memory, lambda report: f"{report.shared_memory_mib / 1024:.1f} GiB")
    yield _Look("home", _home, lambda _: "can be written")
    yield _Look(
        "SLURM in the job",
        _slurm_inside,
        lambda _: "squeue answers, and sbatch would take a worker's job",
        applies=lambda canary, _: canary.kind.is_head,
    )


def _shared(report: CanaryReport, word: str) -> _Problem | None:
    if report.greeting == word:
        return None
    return _Problem(
        FAILURE,
        "something else is read there than what was written here",
        "a provider.slurm.state_dir that login and compute nodes share",
    )


def _locks(_: Canary, report: CanaryReport) -> _Problem | None:
    if report.lock_is_seen:
        return None
    return _Problem(
        FAILURE,
        "does not see a lock that is held here",
        "another provider.slurm.state_dir, or a mount with locks (NFS without nolock, Lustre with flock)",
    )


def _software(_: Canary, report: CanaryReport) -> _Problem | None:
    here = {"Python": sys.version.split()[0], "Ray": metadata.version("ray"), "ray-slurm-provider": __version__}
    there = {"Python": report.python, "Ray": report.ray, "ray-slurm-provider": report.plugin}
    differing = [
        f"{what} {there[what] or 'is missing'} (here {own})" for what, own in here.items() if own != there[what]
    ]
    if not differing:
        return None
    return _Problem(
        FAILURE,
        f"{report.executable} has {', '.join(differing)}",
        "the same environment on all hosts: provider.slurm.python, or setup commands that activate it",
    )


def _address(_: Canary, report: CanaryReport) -> _Problem | None:
    if report.address_problem:
        return _Problem(FAILURE, report.address_problem, "provider.slurm.interface, provider.slurm.ports")
    on_loopback = network.is_loopback(report.address)
    if on_loopback and report.boot_id != procfs.boot_id():
        trap = " (its own name means 127.0.1.1 there, by /etc/hosts)" if report.name_is_loopback else ""
        return _Problem(
            FAILURE,
            f"Ray would use {report.address}, which is itself for every other host{trap}",
            "provider.slurm.interface, or NodeAddr in slurm.conf",
        )
    if report.name_is_loopback and not on_loopback:
        return _Problem(
            WARNING,
            "its own name means a loopback address to it (127.0.1.1 in /etc/hosts);"
            f" Ray gets {report.address} in its place, other programs may not",
            "the admin: no line for the host's own name with 127.0.1.1 in /etc/hosts",
        )
    return None


def _connections(
    canary: Canary, report: CanaryReport, names: Mapping[str, str], login: tuple[str, int] | None
) -> _Problem | None:
    problems = []
    if canary.offset_s is None:
        problems.append(f"this host does not reach it at {report.address}")
    lost = [peer for peer, offset in canary.reached.items() if offset is None]
    if LOGIN in lost and login is not None:
        problems.append(f"it does not reach this host at {login[0]}")
    others = [names.get(peer, peer) for peer in lost if peer != LOGIN]
    if others:
        problems.append(f"it does not reach {', '.join(others)}")
    expected = {*names, *([LOGIN] if login is not None else [])} - {canary.job_id}
    if expected - set(canary.reached):
        problems.append("it has not said in time whom it reaches")
    if not problems:
        return None
    return _Problem(
        FAILURE,
        "; ".join(problems),
        "provider.slurm.interface for another network; provider.slurm.ports for what the firewall lets through",
    )


def _clock(canary: Canary, _: CanaryReport) -> _Problem | None:
    if canary.offset_s is None or abs(canary.offset_s) < _CLOCK_S:
        return None
    return _Problem(
        WARNING,
        f"its clock is {abs(canary.offset_s):.0f} s {'ahead' if canary.offset_s > 0 else 'behind'}",
        "the admin: time synchronisation; munge refuses more than 300 s",
    )


def _temp_dir(_: Canary, report: CanaryReport) -> _Problem | None:
    if report.temp_dir_problem:
        return _Problem(FAILURE, report.temp_dir_problem, "another provider.slurm.temp_dir")
    if report.temp_dir_free_mib < _FREE_MIB:
        text = f"only {report.temp_dir_free_mib} MiB are free in {report.temp_dir}"
        return _Problem(WARNING, text, "another provider.slurm.temp_dir")
    return None


def _open_files(_: Canary, report: CanaryReport) -> _Problem | None:
    if report.open_files < 0 or report.open_files >= FEW_FILES:
        return None
    return _Problem(
        WARNING,
        f"at most {report.open_files} open files per process",
        "the admin: LimitNOFILE of slurmd, PropagateResourceLimits in slurm.conf",
    )


def _shared_memory(canary: Canary, report: CanaryReport) -> _Problem | None:
    resolved = canary.kind.config.resolved
    wanted = (resolved.resources if resolved is not None else {}).get("object_store_memory", 0) // MIB
    if report.shared_memory_mib >= wanted:
        return None
    return _Problem(
        WARNING,
        f"/dev/shm has {report.shared_memory_mib} MiB, and the object store {wanted}",  # noqa: S108 where Ray's objects lie
        "a smaller object_store_memory in the type's resources; Ray would put objects on disk",
    )


def _home(_: Canary, report: CanaryReport) -> _Problem | None:
    if not report.home_problem:
        return None
    return _Problem(
        WARNING,
        report.home_problem,
        "the provider does not need it with state_dir elsewhere; what your tasks run may",
    )


def _slurm_inside(_: Canary, report: CanaryReport) -> _Problem | None:
    if not report.slurm_problem:
        return None
    return _Problem(
        FAILURE,
        report.slurm_problem,
        "the head submits the workers' jobs: SLURM's tools must work there; or placement: login_node for the head",
    )
