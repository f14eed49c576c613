"""``python -m ray_slurm_provider.agent.canary SPEC``: a job that looks around and tells `ray-slurm check`.

It says what it finds on its host, listens where Ray would, tries to reach the others, and goes.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider import __version__, procfs
from ray_slurm_provider.agent import network, ports, temp_dirs
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.agent.spec import read_spec
from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.files import read_json_object, write_json
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_slurm_provider.agent.spec import AgentSpec

_LIFE_S = 300.0
# Without locks nobody can tell whether the check still goes on.
_SHORT_LIFE_S = 60.0
CONNECT_S = 5.0


@dataclass(frozen=True)
class CanaryPaths:
    """The files by which canaries and `ray-slurm check` talk.

    Attributes:
        root: The directory of the check.
    """

    root: Path

    @property
    def greeting(self) -> Path:
        """What the login node has written: a word that every canary repeats."""
        return self.root / "greeting"

    @property
    def lock(self) -> Path:
        """A file that the login node holds a lock on."""
        return self.root / "lock"

    @property
    def worker_script(self) -> Path:
        """A script that the head's canary shows to sbatch."""
        return self.root / "worker.sh"

    @property
    def peers(self) -> Path:
        """Where everybody listens, when all that started have said so."""
        return self.root / "peers.json"

    @property
    def stop(self) -> Path:
        """There when the canaries shall go."""
        return self.root / "stop"

    def report(self, job_id: str) -> Path:
        """What a canary found."""
        return self.root / f"{job_id}.found.json"

    def reached(self, job_id: str) -> Path:
        """By how much the clock of everybody whom it reached is ahead; None for those that it did not."""
        return self.root / f"{job_id}.reached.json"


@dataclass(frozen=True)
class CanaryReport:
    """What a canary found on its host.

    Attributes:
        greeting: The word that it read.
        slurm_node: SLURM's name of the host.
        host: Its own name.
        boot_id: That host's boot: equal for two names of one host.
        address: The address that Ray would use; "" when there is none.
        port: Where it listens; 0 when it does not.
        address_problem: Why it does not.
        python: Version of the interpreter.
        executable: The interpreter.
        ray: Version of Ray; "" when it is not there.
        plugin: Version of this package.
        lock_is_seen: Whether the login node's lock keeps it out.
        open_files: Hard limit of open files.
        temp_dir: Where Ray's temporary directory would be.
        temp_dir_problem: Why it cannot be there; "".
        temp_dir_free_mib: What is free there.
        shared_memory_mib: Size of /dev/shm.
        name_is_loopback: Whether the host's own name means a loopback address to it.
        slurm_problem: Why the SLURM tools do not work in the job; "".
        home_problem: Why the home directory cannot be written; "".
    """

    greeting: str
    slurm_node: str
    host: str
    boot_id: str
    address: str = ""
    port: int = 0
    address_problem: str = ""
    python: str = ""
    executable: str = ""
    ray: str = ""
    plugin: str = ""
    lock_is_seen: bool = False
    open_files: int = 0
    temp_dir: str = ""
    temp_dir_problem: str = ""
    temp_dir_free_mib: int = 0
    shared_memory_mib: int = 0
    name_is_loopback: bool = False
    slurm_problem: str = ""
    home_problem: str = ""

    @property
    def place(self) -> str:
        """The host, for a person."""
        return self.host if self.slurm_node in {"", self.host} else f"{self.slurm_node} ({self.host})"


def listen(address: str, within: str) -> int:
    """Listen until this process ends, tell everybody who comes the time, and return the port.

    Args:
        address: Where to listen.
        within: Range for the port; "" for any.

    Raises:
        OSError: It is not possible.
    """
    reserved = ports.reserve(["canary"], within)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = reserved.ports["canary"]
    listener.bind((address, port))
    listener.listen()
    reserved.release()
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    return port


def _serve(listener: socket.socket) -> None:
    while True:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(f"{time.time()}\n".encode())


def ask_time(address: str, port: int) -> float | None:
    """Return by how many seconds the clock of a listener is ahead of ours, None when it cannot be reached."""
    try:
        began = time.time()
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            said = connection.makefile().readline()
        return float(said) - (began + time.time()) / 2
    except (OSError, ValueError):
        return None


def look(spec: AgentSpec, paths: CanaryPaths, environ: Mapping[str, str]) -> CanaryReport:
    """Return what is to be found here; from now on somebody listens."""
    slurm = SlurmClient(SlurmTools(spec.slurm_bin, spec.command_timeout_s, environ, spec.clusters))
    address, port, address_problem = "", 0, ""
    try:
        address = network.choose_address(spec.interface, environ.get("SLURMD_NODENAME", ""), slurm.node_address)
        port = listen(address, spec.service_ports)
    except (OSError, ValueError, SlurmError) as error:
        address_problem = str(error)
    place, problem, free_mib = _look_at_temp_dir(spec)
    return CanaryReport(
        greeting=paths.greeting.read_text(encoding="utf-8"),
        slurm_node=environ.get("SLURMD_NODENAME", ""),
        host=socket.gethostname(),
        boot_id=procfs.boot_id(),
        address=address,
        port=port,
        address_problem=address_problem,
        python=platform.python_version(),
        executable=sys.executable,
        ray=_version_of("ray"),
        plugin=__version__,
        lock_is_seen=_is_locked(paths.lock),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        temp_dir=place,
        temp_dir_problem=problem,
        temp_dir_free_mib=free_mib,
        shared_memory_mib=_size_mib("/dev/shm", total=True),  # noqa: S108 where Ray's objects lie
        name_is_loopback=_name_is_loopback(),
        slurm_problem=_ask_slurm(slurm, paths) if spec.is_head else "",
        home_problem=_why_not_writable(Path.home()),
    )


def main() -> int:
    """Look around, tell, reach the others, and go."""
    spec = read_spec(sys.argv[1])
    job_id = os.environ["SLURM_JOB_ID"]
    paths = CanaryPaths(spec.directory)
    report = look(spec, paths, dict(os.environ))
    write_json(paths.report(job_id), report.__dict__)

    def over() -> bool:
        # A check that was killed holds its lock no more.
        left_alone = report.lock_is_seen and paths.root.exists() and not _is_locked(paths.lock)
        return left_alone or paths.stop.exists() or not paths.root.exists()

    life_s = _LIFE_S if report.lock_is_seen else _SHORT_LIFE_S
    deadline = time.monotonic() + life_s
    procfs.wait_until(lambda: paths.peers.exists() or over(), life_s, poll_s=0.2)
    peers = read_json_object(paths.peers) or {}
    reached = {name: ask_time(*where) for name, where in peers.items() if name != job_id}
    if not over():
        write_json(paths.reached(job_id), reached)
    procfs.wait_until(over, max(0.0, deadline - time.monotonic()), poll_s=0.2)
    return 0


def _look_at_temp_dir(spec: AgentSpec) -> tuple[str, str, int]:
    try:
        made = temp_dirs.make_temp_dir(spec.temp_dir, os.environ["RAY_CLOUD_INSTANCE_ID"])
    except (OSError, ValueError) as error:
        return spec.temp_dir, str(error), 0
    place = made.parent.parent
    free_mib = _size_mib(str(place), total=False)
    temp_dirs.leave_temp_dir(made, os.environ["RAY_CLOUD_INSTANCE_ID"])
    return str(place), "", free_mib


def _size_mib(place: str, *, total: bool) -> int:
    try:
        found = os.statvfs(place)
    except OSError:
        return 0
    return found.f_frsize * (found.f_blocks if total else found.f_bavail) // MIB


def _is_locked(path: Path) -> bool:
    """Tell whether somebody else's lock on a file keeps us out, as `filelock` takes it (flock(2))."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _name_is_loopback() -> bool:
    try:
        return network.is_loopback(socket.gethostbyname(socket.gethostname()))
    except OSError:
        return False


def _ask_slurm(slurm: SlurmClient, paths: CanaryPaths) -> str:
    """Return what keeps a head on this host from submitting jobs, "" for nothing."""
    try:
        slurm.jobs()
        if paths.worker_script.exists():
            slurm.test_submit(paths.worker_script.read_text(encoding="utf-8"))
    except SlurmError as error:
        return str(error)
    return ""


def _why_not_writable(directory: Path) -> str:
    return "" if os.access(directory, os.W_OK) else f"{directory} cannot be written"


if __name__ == "__main__":
    sys.exit(main())
