"""A real cluster on a sandbox, from `ray up` to `ray down`, next to the bare tools."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from ray.autoscaler._private.commands import POLL_INTERVAL
from support import RAY, UserCluster, cluster_config, user_environment, wait_for

from benchmarks import standin
from benchmarks.bed import Bed, bed
from benchmarks.results import Result, above, at_most, within
from ray_slurm_provider.agent import ports as node_ports
from ray_slurm_provider.agent.ray_command import STARTED_MARK
from ray_slurm_provider.config import SlurmSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UPDATE_INTERVAL_S = SlurmSettings().update_interval_s
_IDLE_S = 6
_PHASE = "phase: "
_DEMAND = """
import json, sys, time, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
def start():
    return time.time()

count, name = int(sys.argv[1]), sys.argv[2]
print("READY", flush=True)
began = time.time()
starts = ray.get([start.options(resources={name: 1}).remote() for _ in range(count)])
print("RESULT", json.dumps([began, max(starts)]), flush=True)
"""


class Place:
    """A user with a home and a script, on a bed."""

    def __init__(self, box: Bed) -> None:
        home = box.parent / "home"
        (home / "tmp").mkdir(parents=True)
        self.box = box
        self.environ = user_environment(box.box.environment(), home)
        self.demand = box.parent / "demand.py"
        self.demand.write_text(_DEMAND)

    @contextmanager
    def cluster(self, name: str, workers: int = 1, **worker_type: object) -> Iterator[UserCluster]:
        """Give a cluster that can have so many workers, each for one task of resource ``ours``."""
        worker = {
            "max_workers": workers,
            "idle_timeout_s": _IDLE_S,
            "resources": {"ours": 1},
            "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}, "setup": ["date +BEGAN=%s.%N"]},
            **worker_type,
        }
        slurm = {"update_interval_s": UPDATE_INTERVAL_S}
        config = cluster_config(name, self.box.parent / "state", types={"worker": worker}, slurm=slurm)
        cluster = UserCluster(self.box.parent, self.environ, config)
        try:
            yield cluster
        finally:
            cluster.destroy()

    def start_bare_workers(self, cluster: UserCluster, name: str, count: int) -> list[str]:
        """Submit so many jobs that are nothing but ``ray start``."""
        access = cluster.access()
        jobs = []
        for number in range(count):
            temp = tempfile.mkdtemp(prefix="rsb-", dir=self.box.parent)
            command = (
                f"exec {' '.join(RAY)} start --address={access['RAY_ADDRESS']} --block --temp-dir={temp} --num-cpus=1"
                f" --memory=500000000 --object-store-memory=200000000 --resources='{json.dumps({name: 1})}'"
                " --dashboard-agent-listen-port=0"
            )
            jobs.append(self.sbatch(access, self.box.parent / f"{name}-{number}.log", command))
        return jobs

    def sbatch(self, environ: dict[str, str], log: Path, command: str) -> str:
        """Submit a bare command."""
        words = ["env", "-i", *(f"{key}={value}" for key, value in environ.items())]
        script = f"#!/bin/bash\n{command}\n"
        return self.box.run(*words, "sbatch", "--parsable", "--mem=1G", "-o", str(log), text=script).strip()

    def start_demand(self, cluster: UserCluster, count: int, name: str) -> subprocess.Popen[str]:
        """Start a driver that wants so many nodes, and wait until it is about to ask."""
        words = ("exec", cluster.yaml, "--no-config-cache", f"python {self.demand} {count} {name}")
        driver = cluster.start(*words)
        wait_for(lambda: "READY" in driver.stdout.readline(), 60, "the driver", poll_s=0)
        return driver

    def bare_head_s(self, number: int) -> float:
        """Return how long a job takes that is nothing but ``ray start --head``."""
        log = self.box.parent / f"bare-{number}.log"
        temp = tempfile.mkdtemp(prefix="rsb-", dir=self.box.parent)
        reservation = node_ports.reserve(["gcs", "client", "dashboard"])
        ports = dict(reservation.ports)
        reservation.release()
        command = (
            f"exec {' '.join(RAY)} start --head --block --port={ports['gcs']} --temp-dir={temp} --num-cpus=1"
            f" --memory=1000000000 --object-store-memory=500000000 --ray-client-server-port={ports['client']}"
            f" --dashboard-port={ports['dashboard']} --dashboard-agent-listen-port=0"
        )
        began = time.monotonic()
        job = self.sbatch(self.environ, log, command)
        wait_for(lambda: log.exists() and STARTED_MARK in log.read_bytes(), 120, "the bare head", poll_s=0.02)
        took = time.monotonic() - began
        self.end([job])
        return took

    def end(self, jobs: list[str]) -> float:
        """Cancel jobs and return how long it takes until they are gone."""
        began = time.monotonic()
        self.box.run("scancel", *jobs)
        self.wait_until_gone(jobs)
        return time.monotonic() - began

    def wait_until_gone(self, jobs: list[str]) -> float:
        """Wait until SLURM has given the allocations of jobs back; return when that was, seconds since the epoch."""
        left = ["squeue", "--noheader", "--format=%i", "--jobs", ",".join(jobs)]
        wait_for(lambda: not self._lines(left), 120, "the end of jobs", poll_s=0.05)
        return time.time()

    def _lines(self, words: list[str]) -> list[str]:
        try:
            return self.box.run(*words).split()
        except subprocess.CalledProcessError:
            # squeue fails when it knows none of the jobs any more.
            return []


def latencies(rounds: int) -> list[Result]:
    """Measure `ray up`, the first task on a new node, and the release of an idle one."""
    heads, firsts, releases, ends = [], [], [], []
    phases: dict[str, list[float]] = {}
    with bed(nodes=3, KillWait=5) as box:
        place = Place(box)
        for number in range(rounds):
            with place.cluster(f"head{number}") as cluster:
                bare = place.bare_head_s(number)
                began = time.monotonic()
                cluster.up()
                heads.append((bare, time.monotonic() - began))
                name = f"bare{number}"
                driver = place.start_demand(cluster, 1, name)
                submitted = time.time()
                jobs = place.start_bare_workers(cluster, name, 1)
                _, started = _answer(driver)
                ends.append(place.end(jobs))
                driver = place.start_demand(cluster, 1, "ours")
                began, ours_started = _answer(driver)
                firsts.append((started - submitted, ours_started - began))
                (job,) = cluster.workers()
                for name, lasts in _phases(cluster, job.job_id, began, ours_started).items():
                    phases.setdefault(name, []).append(lasts)
                gone = place.wait_until_gone([job.job_id])
                # The task ends where it starts.
                releases.append(gone - ours_started - _IDLE_S)
                cluster.down()
    completion = statistics.median(ends)
    bare_first = statistics.median(bare for bare, _ in firsts)
    return [
        above("`ray up` to a head that answers", "s", *_medians(heads), extra=1.5),
        above(
            "demand to the first task on a new node",
            "s",
            *_medians(firsts),
            extra=UPDATE_INTERVAL_S + 0.5,
            other=bare_first + standin.UPDATE_INTERVAL_S,
        ),
        above(
            "idle timeout passed to allocation released",
            "s",
            completion,
            statistics.median(releases),
            extra=UPDATE_INTERVAL_S + 2,
        ),
        *(Result(f"{_PHASE}{name}", "s", None, statistics.median(lasts)) for name, lasts in phases.items()),
    ]


def phases_of(results: list[Result]) -> dict[str, float]:
    """Return the phases among some results."""
    return {row.what.removeprefix(_PHASE): row.ours for row in results if row.what.startswith(_PHASE)}


def _phases(cluster: UserCluster, job_id: str, began: float, started: float) -> dict[str, float]:
    """Return what happened when on the way to the first task, from the logs of one host."""
    (log,) = cluster.root.glob(f"logs/{job_id}-*.log")
    text = log.read_text()
    marks = {
        "until the autoscaler's next round has submitted a job": _logged(
            cluster.head_monitor_log().read_text(), rf"submitted job {job_id.partition('_')[0]} "
        ),
        "until SLURM has started it": float(_first(r"BEGAN=([\d.]+)", text)),
        "checks and the agent's own start": _logged(text, "starting "),
        "`ray start`": _logged(text, "Ray is up"),
        "until Ray has started a worker process and the task": started,
    }
    result, before = {}, began
    for name, at in marks.items():
        result[name], before = at - before, at
    return result


def _logged(text: str, words: str) -> float:
    """Return when a line was logged."""
    when, millis = re.search(rf"([\d-]+ [\d:]+),(\d+)[^\n]*{words}", text).groups()
    return datetime.fromisoformat(when).timestamp() + int(millis) / 1000


def _first(pattern: str, text: str) -> str:
    return re.search(pattern, text)[1]


def many(workers: int, rest_s: float) -> list[Result]:
    """Measure the way from 0 to so many workers, the cluster at rest, and `ray down` of them."""
    with bed(nodes=4, KillWait=5) as box:
        place = Place(box)
        with place.cluster("many", workers, idle_timeout_s=600) as cluster:
            cluster.up()
            driver = place.start_demand(cluster, workers, "bare")
            began = time.time()
            jobs = place.start_bare_workers(cluster, "bare", workers)
            _, last = _answer(driver)
            floor = last - began
            end = place.end(jobs)
            before = box.requests()
            driver = place.start_demand(cluster, workers, "ours")
            began, last = _answer(driver)
            submissions = box.requests()["REQUEST_SUBMIT_BATCH_JOB"] - before["REQUEST_SUBMIT_BATCH_JOB"]
            at_rest = _requests_for_jobs(box, rest_s)
            began_down = time.monotonic()
            cluster.down()
            down = time.monotonic() - began_down
        return [
            within(
                f"0 to {workers} workers", "s", floor, last - began, times=1.15, other=floor + standin.rounds_s(workers)
            ),
            Result(f"submissions for {workers} workers", "requests", 1, submissions, workers, "1", submissions == 1),
            at_most(
                f"requests for jobs in 30 s, {workers} workers at rest",
                "requests",
                at_rest * 30 / rest_s,
                most=1,
                other=standin.requests_in(30, workers + 1),
            ),
            Result(f"`ray down` of {workers} nodes", "s", end, down),
            above(f"`ray down` of {workers} nodes but for Ray's own wait", "s", end, down - POLL_INTERVAL, extra=3),
        ]


def queued(seconds: float) -> list[Result]:
    """Measure how often the controller is asked while a job waits."""
    with bed(nodes=1) as box:
        place = Place(box)
        waits = {"node_config": {"sbatch": {"cpus_per_task": 4, "mem": "1G"}}}
        with place.cluster("queued", 1, **waits) as cluster:
            cluster.up()
            driver = place.start_demand(cluster, 1, "ours")
            wait_for(lambda: any(job.queued for job in cluster.workers()), 60, "a queued worker")
            asked = _requests_for_jobs(box, seconds)
            driver.kill()
            cluster.down()
    return [
        at_most(
            "requests for jobs in 5 s, a job in the queue",
            "requests",
            asked * 5 / seconds,
            most=1,
            other=standin.requests_in(5, 2),
        )
    ]


def _requests_for_jobs(box: Bed, seconds: float) -> int:
    """Count over some time; the time itself is what is measured."""
    before = box.requests()
    time.sleep(seconds)
    after = box.requests()
    return sum(count - before.get(name, 0) for name, count in after.items() if "JOB" in name)


def _answer(driver: subprocess.Popen[str]) -> tuple[float, float]:
    output = driver.communicate(timeout=300)[0]
    line = next(line for line in output.splitlines() if line.startswith("RESULT"))
    began, started = json.loads(line.partition(" ")[2])
    return began, started


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(bare for bare, _ in pairs), statistics.median(ours for _, ours in pairs)
