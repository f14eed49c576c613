"""The processes of a sandbox: found by what they carry."""

from itertools import pairwise

from ray_slurm_provider import procfs
from ray_slurm_provider.procfs import Process
from ray_slurm_provider.sandbox.layout import SandboxPaths

DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")


def processes_of(paths: SandboxPaths) -> list[Process]:
    """Return every living process of this sandbox: its daemons, and whatever its jobs left behind."""
    return [process for process in procfs.processes() if _belongs(process, paths)]


def daemons_of(paths: SandboxPaths) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in DAEMONS}
    for process in processes_of(paths):
        if process.name in found:
            found[process.name].append(process.pid)
    return found


def served_nodes(paths: SandboxPaths) -> set[str]:
    """Return the virtual nodes whose slurmd lives (``slurmd -N NAME``)."""
    found: set[str] = set()
    for process in processes_of(paths):
        if process.name == "slurmd":
            words = process.read("cmdline").decode(errors="replace").split("\0")
            found.update(name for option, name in pairwise(words) if option == "-N")
    return found


def _belongs(process: Process, paths: SandboxPaths) -> bool:
    if process.name == "munged":
        return f"--socket={paths.munge_socket}".encode() in process.read("cmdline").split(b"\0")
    variables = process.read("environ").split(b"\0")
    if f"SLURM_CONF={paths.slurm_conf}".encode() not in variables:
        return False
    # A head on the login node is no job, but belongs to the SLURM that it submits to.
    return process.name in DAEMONS or any(one.startswith((b"SLURM_JOB_ID=", b"RAY_SLURM_DIR=")) for one in variables)
