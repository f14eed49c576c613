"""Faults on order: what goes wrong on a cluster on a bad day."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from ray_slurm_provider import procfs
from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox import daemons

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_slurm_provider.procfs import Process
    from ray_slurm_provider.sandbox.layout import VirtualNode
    from ray_slurm_provider.sandbox.lifecycle import Sandbox

_STOP_S = 20.0
NODE_FAULTS = ("cut", "join", "crash", "boot")
CONTROLLER_FAULTS = ("stop", "start", "freeze", "thaw", "crash")


def controller_fault(box: Sandbox, fault: str, *, forget_jobs: bool = False) -> None:
    """Do something to slurmctld.

    Args:
        box: The sandbox.
        fault: ``stop`` it in order, ``start`` it, ``freeze`` it (it takes connections and does not answer) and
            ``thaw`` it, or ``crash`` it (kill -9).
        forget_jobs: With ``start``: without any memory of jobs.

    Raises:
        SandboxError: It runs already, or it does not run.
    """
    running = [process for process in daemons.processes_of(box.paths) if process.name == "slurmctld"]
    if fault == "start":
        if running:
            raise SandboxError("slurmctld runs already")
        box.start_controller(forget_jobs=forget_jobs)
        return
    if not running:
        raise SandboxError("slurmctld does not run")
    procfs.send(
        running, {"freeze": signal.SIGSTOP, "thaw": signal.SIGCONT, "crash": signal.SIGKILL}.get(fault, signal.SIGTERM)
    )
    if fault == "stop":
        # One that is frozen hears nothing.
        procfs.send(running, signal.SIGCONT)
    if fault in {"stop", "crash"}:
        _wait_for_end(running, "slurmctld")


def node_fault(box: Sandbox, name: str, fault: str) -> None:
    """Do something to a virtual node.

    Args:
        box: The sandbox.
        name: The node.
        fault: ``cut`` its network, ``join`` it again, ``crash`` it (all its processes die at once), or ``boot`` it.

    Raises:
        SandboxError: There is no such node, or this sandbox cannot do that.
    """
    node = box.node(name)
    if fault in {"cut", "join"} and not box.isolated:
        raise SandboxError(f"{fault} needs a sandbox with networks of its own: ray-slurm sandbox up --isolated")
    actions: dict[str, Callable[[], None]] = {
        "cut": lambda: box.machines.cut(name),
        "join": lambda: box.machines.join(name),
        "crash": lambda: _crash(box, name),
        "boot": lambda: _boot(box, node),
    }
    actions[fault]()


def _crash(box: Sandbox, name: str) -> None:
    found = _processes_on(box, name)
    if not found:
        raise SandboxError(f"{name} does not run")
    if box.isolated:
        box.machines.crash(name)
    procfs.send(found, signal.SIGKILL)
    _wait_for_end(found, name)


def _boot(box: Sandbox, node: VirtualNode) -> None:
    if node.name in daemons.served_nodes(box.paths):
        raise SandboxError(f"{node.name} runs already")
    if box.isolated and not box.machines.alive(node.name):
        box.machines.boot(node.name, node.address)
    box.start_node(node)


def _processes_on(box: Sandbox, name: str) -> list[Process]:
    """Return slurmd and the processes of the jobs on a node."""
    found = []
    for process in daemons.processes_of(box.paths):
        words = process.read("cmdline").split(b"\0")
        variables = process.read("environ").split(b"\0")
        if (process.name == "slurmd" and name.encode() in words) or f"SLURMD_NODENAME={name}".encode() in variables:
            found.append(process)
    return found


def _wait_for_end(processes: list[Process], name: str) -> None:
    if not procfs.wait_until(lambda: not any(map(procfs.alive, processes)), _STOP_S):
        raise SandboxError(f"{name} has not ended after {_STOP_S:g} s")
