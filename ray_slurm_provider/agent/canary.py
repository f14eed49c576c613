"""``python -m ray_slurm_provider.agent.canary``: a job that looks around and tells `ray-slurm check`.

It judges what it finds on its host, listens where Ray would, tries to reach the others, and goes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ray_slurm_provider import locks, procfs
from ray_slurm_provider.agent import host_checks, network
from ray_slurm_provider.agent.spec import take_spec
from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.files import read_json_object, write_json
from ray_slurm_provider.findings import FAILURE, OK, Finding
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ray_slurm_provider.agent.spec import AgentSpec

_LIFE_S = 300.0
# Without locks nobody can tell whether the check still goes on.
_SHORT_LIFE_S = 60.0


# The files by which probe jobs and `ray-slurm check` talk, in the directory of the check.
GREETING = "greeting"  # what the login node says of itself
LOCK = "lock"  # held by the login node
WORKER_SCRIPT = "worker.sh"  # what the head's job shows to sbatch
PEERS = "peers.json"  # where everybody listens, when all that started have said so
STOP = "stop"  # there when the jobs shall go

_UNLOCKED = "does not see a lock that is held here"


def report_path(root: Path, job_id: str) -> Path:
    return root / f"{job_id}.found.json"


@dataclass(frozen=True)
class ProbeReport:
    """What a probe job found; written again when it has tried to reach the others."""

    host: str
    address: str
    port: int  # where it listens; 0 when it does not
    findings: list[Finding]
    reached: dict[str, float | None] = field(default_factory=dict)  # how far each one's clock is ahead, seconds


def look(spec: AgentSpec, environ: Mapping[str, str]) -> ProbeReport:
    """Return what is to be found here; from now on somebody listens."""
    slurm = SlurmClient(SlurmTools(spec.slurm_bin, spec.command_timeout_s, environ, spec.clusters))
    greeting = read_json_object(spec.directory / GREETING) or {}
    node_id, slurm_node = environ["RAY_CLOUD_INSTANCE_ID"], environ.get("SLURMD_NODENAME", "")
    address, port, finding = host_checks.listen_as_ray(
        lambda: network.choose_address(spec.interface, slurm_node, slurm.node_address),
        spec.service_ports,
        one_host=greeting.get("boot_id") == procfs.boot_id(),
    )
    findings = [
        *compare(greeting, node_id, why_not_locked(spec.directory / LOCK)),
        finding,
        *host_checks.check_host(spec.temp_dir, spec.resources),
        *(_check_slurm(slurm, spec.directory / WORKER_SCRIPT) if spec.is_head else ()),
    ]
    host = socket.gethostname()
    return ProbeReport(host if slurm_node in {"", host} else f"{slurm_node} ({host})", address, port, findings)


def compare(greeting: Mapping[str, Any], node_id: str, why_not_locked: str) -> Iterator[Finding]:
    """Yield what differs between this host and the login node, which is "here" for who reads it."""
    if greeting.get("token") != node_id.rpartition("-")[2]:
        text = "something else is read there than what was written here"
        advice = "a provider.slurm.state_dir that login and compute nodes share"
        yield Finding("shared directory", FAILURE, text, advice)
        return
    yield Finding("shared directory", OK, "what is written here is read there, and the other way round")
    if not why_not_locked:
        yield Finding("file locks", OK, "a lock that is held here is seen there")
    else:
        yield Finding("file locks", FAILURE, why_not_locked, locks.ADVICE)
    own, here = host_checks.versions(), greeting["versions"]
    differing = [
        f"{what} {version or 'is missing'} (here {here.get(what)})"
        for what, version in own.items()
        if version != here.get(what)
    ]
    if differing:
        advice = "the same environment on all hosts: provider.slurm.python, or setup commands that activate it"
        yield Finding("software", FAILURE, f"{sys.executable} has {', '.join(differing)}", advice)
    else:
        yield Finding("software", OK, ", ".join(f"{what} {version}" for what, version in own.items()) + " as here")


def _check_slurm(slurm: SlurmClient, worker_script: Path) -> Iterator[Finding]:
    """Yield whether a head on this host could submit jobs."""
    try:
        slurm.jobs()
        if worker_script.exists():
            slurm.test_submit(worker_script.read_text(encoding="utf-8"))
    except SlurmError as error:
        advice = "the head submits the workers' jobs: SLURM's tools must work there; or placement: login_node for it"
        yield Finding("SLURM in the job", FAILURE, str(error), advice)
    else:
        yield Finding("SLURM in the job", OK, "squeue answers, and sbatch would take a worker's job")


def why_not_locked(path: Path) -> str:
    """Return "" when another process's lock on a file keeps us out, as `locks` takes it."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"locks do not work there: {error}"
    return _UNLOCKED


def main() -> int:
    spec = take_spec(os.environ)
    root, file = spec.directory, report_path(spec.directory, os.environ["SLURM_JOB_ID"])
    lock_is_seen = not why_not_locked(root / LOCK)
    report = look(spec, dict(os.environ))
    write_json(file, asdict(report))

    def over() -> bool:
        # A check that was killed holds its lock no more.
        left_alone = lock_is_seen and root.exists() and why_not_locked(root / LOCK) == _UNLOCKED
        return left_alone or (root / STOP).exists() or not root.exists()

    life_s = _LIFE_S if lock_is_seen else _SHORT_LIFE_S
    deadline = time.monotonic() + life_s
    procfs.wait_until(lambda: (root / PEERS).exists() or over(), life_s, poll_s=0.2)
    peers = read_json_object(root / PEERS) or {}
    reached = {name: host_checks.ask_time(*where) for name, where in peers.items()}
    if not over():
        write_json(file, asdict(replace(report, reached=reached)))
    procfs.wait_until(over, max(0.0, deadline - time.monotonic()), poll_s=0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
