"""What a host can say of itself, asked on the login node and in the jobs of `ray-slurm check`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import threading
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider import __version__
from ray_slurm_provider.agent import network, ports, temp_dirs
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.findings import FAILURE, OK, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CONNECT_S = 5.0
_ENOUGH_FILES = 4096  # Ray wants more, and says so (docs.ray.io, "Ray cluster: ulimit")
_ENOUGH_MIB = 1024


def check_host(temp_dir: str, resources: Mapping[str, int]) -> Iterator[Finding]:
    """Yield what is found on a host where a Ray node is to run."""
    yield check_temp_dir(temp_dir)
    yield check_open_files()
    yield check_shared_memory(resources.get("object_store_memory", 0) // MIB)
    yield check_home()


def check_temp_dir(base: str) -> Finding:
    try:
        made = temp_dirs.make_temp_dir(base)
        free_mib = shutil.disk_usage(made).free // MIB
        temp_dirs.leave_temp_dir(made)
    except (OSError, ValueError) as error:
        return Finding("temp_dir", FAILURE, str(error), "another provider.slurm.temp_dir")
    place = made.parent.parent
    if free_mib < _ENOUGH_MIB:
        text = f"only {free_mib} MiB are free in {place}"
        return Finding("temp_dir", WARNING, text, "another provider.slurm.temp_dir")
    return Finding("temp_dir", OK, f"{place}, {free_mib / 1024:.0f} GiB free")


def check_open_files() -> Finding:
    """Judge the soft limit: `ray start` leaves it as it is."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not 0 <= soft < _ENOUGH_FILES:  # -1 is no limit
        return Finding("open files", OK, f"up to {soft} per process")
    advice = f"ulimit -n {_ENOUGH_FILES} or more, before `ray up` or in setup; the admin: LimitNOFILE of slurmd"
    return Finding("open files", WARNING, f"at most {soft} open files per process", advice)


def check_shared_memory(wanted_mib: int) -> Finding:
    """Compare /dev/shm with the object store that is to lie there."""
    total_mib = 0
    with suppress(OSError):
        total_mib = shutil.disk_usage("/dev/shm").total // MIB  # noqa: S108 where Ray's objects lie
    if total_mib >= wanted_mib:
        return Finding("shared memory", OK, f"{total_mib / 1024:.1f} GiB")
    text = f"/dev/shm has {total_mib} MiB, and the object store {wanted_mib}"  # noqa: S108 as above
    advice = "a smaller object_store_memory in the type's resources; Ray would put objects on disk"
    return Finding("shared memory", WARNING, text, advice)


def check_home() -> Finding:
    if os.access(Path.home(), os.W_OK):
        return Finding("home", OK, "can be written")
    advice = "the provider does not need it with state_dir elsewhere; what your tasks run may"
    return Finding("home", WARNING, f"{Path.home()} cannot be written", advice)


def check_address(address: str, *, one_host: bool) -> Finding:
    """Judge the address that Ray would use; when everything is on one host, loopback serves."""
    misleading = _own_name_is_loopback()
    if network.is_loopback(address) and not one_host:
        hint = " (its own name means 127.0.1.1 there, by /etc/hosts)" if misleading else ""
        text = f"Ray would use {address}, which is itself for every other host{hint}"
        return Finding("address", FAILURE, text, "provider.slurm.interface, or NodeAddr in slurm.conf")
    if network.is_loopback(address) or not misleading:
        return Finding("address", OK, f"Ray would use {address}")
    text = (
        "its own name means a loopback address to it (127.0.1.1 in /etc/hosts);"
        f" Ray gets {address} in its place, other programs may not"
    )
    advice = "the admin: no line for the host's own name with 127.0.1.1 in /etc/hosts"
    return Finding("address", WARNING, text, advice)


def _own_name_is_loopback() -> bool:
    try:
        return network.is_loopback(socket.gethostbyname(socket.gethostname()))
    except OSError:
        return False


def listen_as_ray(choose: Callable[[], str], within: str, *, one_host: bool) -> tuple[str, int, Finding]:
    """Listen at the address that `choose` returns, until this process ends, and tell everybody who comes the time.

    Returns address, port (0 when it is not possible), and what was found.
    """
    try:
        address = choose()
        reserved = ports.reserve(["check"], within)
        port = reserved.ports["check"]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
    except (OSError, ValueError, SlurmError) as error:
        return "", 0, Finding("address", FAILURE, str(error), "provider.slurm.interface, provider.slurm.ports")
    reserved.release()
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    return address, port, check_address(address, one_host=one_host)


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
            said = connection.makefile().readline()
        return float(said) - (began + time.time()) / 2
    except (OSError, ValueError, OverflowError):  # the last for what is no port
        return None


def versions() -> dict[str, str]:
    """Return what has to be the same on all hosts; "" for what is missing."""
    try:
        ray = metadata.version("ray")
    except metadata.PackageNotFoundError:
        ray = ""
    return {"Python": platform.python_version(), "Ray": ray, "ray-slurm-provider": __version__}
