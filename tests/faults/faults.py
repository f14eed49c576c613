"""Faults that a cluster survives with its workload: how each begins and how it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.bed import BedCluster


def _nothing(cluster):
    """It ends by itself."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: What.
        begin: Makes it.
        end: Undoes it.
        lasts_s: How long it lasts in a quick run, seconds.
        when: What the cluster is doing: ``busy`` with workers, scaling ``up`` from none, or ``down`` again.
        in_ci: Whether it belongs to the part that runs each time.
    """

    name: str
    begin: Callable[[BedCluster], object]
    end: Callable[[BedCluster], object] = _nothing
    lasts_s: float = 0.0
    when: str = "busy"
    in_ci: bool = False


def controller(fault, undo):
    return (lambda c: c.bed.controller(fault)), (lambda c: c.bed.controller(undo))


def trouble(tool, script):
    return (lambda c: c.bed.trouble(tool, script)), (lambda c: c.bed.trouble(tool, None))


def worker_node(cluster):
    """A machine with a worker, and without the head."""
    head = cluster.head_node
    return next((job.nodes for job in cluster.alive(head=False) if job.nodes and job.nodes != head), "")


def remembered(cluster, action):
    """Do something to a worker's machine, and remember which."""
    cluster.victim = worker_node(cluster)
    if cluster.victim:
        action(cluster.victim)


def on_victim(action):
    def end(cluster):
        if cluster.victim:
            action(cluster, cluster.victim)

    return end


def kill(cluster, wanted, *, head):
    """Kill -9 the first process that fits."""
    for job in cluster.alive(head=head):
        for process in cluster.processes(job.job_id):
            if wanted(process):
                os.kill(process.pid, signal.SIGKILL)
                return process
    return None


def named(name):
    return lambda process: process.name == name


def is_monitor(process):
    return b"/autoscaler/v2/monitor.py" in process.read("cmdline")


def is_agent(process):
    return process.name.startswith("python") and b"ray_slurm_provider.agent" in process.read("cmdline").split(b"\0")


def tell_jobs(cluster, *words, head=False):
    """Have the administrator do something to a worker's job."""
    jobs = [job.job_id for job in cluster.alive(head=head) if not job.queued]
    cluster.victim = jobs[0] if jobs else ""
    if jobs:
        cluster.bed.tell(*words, jobs[0], check=False)


def write_state(text):
    def begin(cluster):
        (cluster.root / "state.json").write_text(text)

    return begin


def hold_lock(seconds):
    """Have a living process hold the lock of the diary."""

    def begin(cluster):
        script = f"import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep({seconds})"
        cluster.holder = subprocess.Popen(
            [sys.executable, "-c", script, str(cluster.root / "state.lock")], stdout=subprocess.PIPE
        )
        cluster.holder.stdout.readline()

    def end(cluster):
        cluster.holder.kill()
        cluster.holder.wait()
        cluster.holder.stdout.close()

    return begin, end


def dead_lock(cluster):
    """Leave the lock file of a process that was killed."""
    begin, end = hold_lock(600)
    begin(cluster)
    end(cluster)
    with open(cluster.root / "state.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def strangers(cluster):
    """Jobs of the same user that look like ours."""
    name = cluster.config["cluster_name"]
    comments = ["ray-slurm:1:{", "ray-slurm:1:" + '{"c":"other","d":"x","t":"aaaaaa","h":"","g":{}}', "none of ours"]
    names = [(f"ray-{name}-worker", comment) for comment in comments] + [("two\nlines", "a\nb")]
    cluster.strangers = [
        cluster.bed.tell(
            "sbatch",
            "--parsable",
            "-H",
            "-J",
            job_name,
            f"--comment={comment}",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 600",
        ).strip()
        for job_name, comment in names
    ]


def no_strangers(cluster):
    """They are all still there; now they may go."""
    for job in cluster.strangers:
        assert "JobState=PENDING" in cluster.bed.tell("scontrol", "show", "job", job)
    cluster.client.cancel(cluster.strangers)


FAULTS = [
    Fault("slurmctld is stopped", *controller("stop", "start"), lasts_s=20),
    Fault("slurmctld is stopped (scaling up)", *controller("stop", "start"), lasts_s=20, when="up", in_ci=True),
    Fault("slurmctld is stopped (scaling down)", *controller("stop", "start"), lasts_s=20, when="down"),
    Fault("slurmctld crashes (scaling up)", *controller("crash", "start"), lasts_s=8, when="up"),
    Fault("slurmctld hangs", *controller("freeze", "thaw"), lasts_s=15),
    Fault("slurmctld crashes", *controller("crash", "start"), lasts_s=8),
    Fault("munge is down", lambda c: c.bed.stop_munge(), lambda c: c.bed.start_munge(), lasts_s=15),
    Fault("squeue hangs", *trouble("squeue", "exec sleep 600"), lasts_s=12),
    Fault("squeue prints half a line", *trouble("squeue", 'real "$@" | head -c -40; exit 0'), lasts_s=8, in_ci=True),
    Fault("squeue prints nothing", *trouble("squeue", "exit 0"), lasts_s=8, in_ci=True),
    Fault("squeue answers for another cluster", *trouble("squeue", 'real "$@" | head -1; exit 0'), lasts_s=8),
    Fault("squeue fails", *trouble("squeue", "echo no >&2; exit 1"), lasts_s=8),
    Fault("sbatch hangs", *trouble("sbatch", "exec sleep 600"), lasts_s=12, when="up"),
    Fault(
        "sbatch refuses",
        *trouble("sbatch", "echo 'sbatch: error: Batch job submission failed: Access/permission denied' >&2; exit 1"),
        lasts_s=12,
        when="up",
    ),
    Fault("scancel fails", *trouble("scancel", "echo 'scancel: error: no' >&2; exit 1"), lasts_s=20, when="down"),
    Fault(
        "a machine is lost and comes back",
        lambda c: remembered(c, lambda name: c.bed.node(name, "crash")),
        on_victim(lambda c, name: c.bed.node(name, "boot")),
        lasts_s=15,
        in_ci=True,
    ),
    Fault(
        "a worker's network is cut for 5 s",
        lambda c: remembered(c, lambda name: c.bed.node(name, "cut")),
        on_victim(lambda c, name: c.bed.node(name, "join")),
        lasts_s=5,
    ),
    Fault(
        "a worker's network is cut for 40 s",
        lambda c: remembered(c, lambda name: c.bed.node(name, "cut")),
        on_victim(lambda c, name: c.bed.node(name, "join")),
        lasts_s=40,
    ),
    Fault("an administrator cancels a worker", lambda c: tell_jobs(c, "scancel"), in_ci=True),
    Fault(
        "an administrator suspends a worker",
        lambda c: tell_jobs(c, "scontrol", "suspend"),
        lambda c: c.victim and c.bed.tell("scontrol", "resume", c.victim, check=False),
        lasts_s=10,
    ),
    Fault("an administrator requeues a worker", lambda c: tell_jobs(c, "scontrol", "requeue")),
    Fault("an administrator requeues and holds a worker", lambda c: tell_jobs(c, "scontrol", "requeuehold")),
    Fault("the autoscaler is killed", lambda c: kill(c, is_monitor, head=True), in_ci=True),
    Fault("a worker's raylet is killed", lambda c: kill(c, named("raylet"), head=False)),
    Fault("a worker's agent is killed", lambda c: kill(c, is_agent, head=False)),
    Fault("a worker's guard is killed", lambda c: kill(c, named("rsp-guard"), head=False)),
    Fault("the diary is deleted", lambda c: (c.root / "state.json").unlink(missing_ok=True)),
    Fault("the diary is cut short", write_state('{"version": 2, "tags": {"1-ab'), in_ci=True),
    Fault(
        "the diary is a directory",
        lambda c: _replace_by_directory(c.root / "state.json"),
        lambda c: _remove_directory(c.root / "state.json"),
        lasts_s=5,
    ),
    Fault("the lock is held by a living process", *hold_lock(600), lasts_s=20),
    Fault("the lock was held by a dead process", dead_lock),
    Fault("there are jobs that look like ours", strangers, no_strangers, lasts_s=5, in_ci=True),
]


def _replace_by_directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def _remove_directory(path):
    if path.is_dir():
        path.rmdir()


def apply(fault, cluster, driver, lasts_s):
    """Make a fault at its moment, undo it, and return the seconds until all the work was done."""

    def no_worker():
        return not cluster.alive(head=False)

    if fault.when == "up":
        wait_for(no_worker, 120, "the end of idle workers")
    driver.want(1)
    if fault.when == "busy":
        # Workers have to be there, or to be on their way, to be lost.
        wait_for(lambda: not no_worker(), 60, "a worker")
    if fault.when == "down":
        driver.wait_for_wanted(120)
    fault.begin(cluster)
    try:
        time.sleep(lasts_s)
    finally:
        fault.end(cluster)
    began = time.monotonic()
    if fault.when == "down":
        wait_for(no_worker, 120, f"the end of idle workers after: {fault.name}")
    else:
        driver.want(1)
        driver.wait_for_wanted(240, f"the workload to recover from: {fault.name}")
    return time.monotonic() - began
