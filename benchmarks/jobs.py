"""Listing and creating jobs on a real controller, without Ray."""

from __future__ import annotations

import gc
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks import standin
from benchmarks.bed import HELD, WORKER, bed
from benchmarks.results import Result, at_most, median_of, within
from ray_slurm_provider.backends.launch_script import job_spec, new_certificate
from ray_slurm_provider.batch_script import render
from ray_slurm_provider.slurm.client import squeue_argv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bed import Bed
    from ray_slurm_provider.cluster import Cluster

_ROUNDS = 7
# Jobs that are cancelled to see what one change costs.
_CHANGES = 3
# One call for each node takes so long that some nodes have to speak for all.
_ASKED_ONE_BY_ONE = 100


def listing(sizes: Sequence[int]) -> list[Result]:
    """Measure a listing with so many jobs, as one held array and as single held jobs."""
    results = []
    with bed() as box:
        cluster = box.cluster()
        empty = min(_look(cluster)[1] for _ in range(_ROUNDS)), min(_look(box.cluster())[1] for _ in range(_ROUNDS))
        results.append(Result("own CPU of a listing without jobs", "ms", None, empty[0] * 1000))
        for size in sizes:
            for kind in ("array", "single jobs"):
                box.clear()
                cluster = box.cluster()
                _fill(box, cluster, size, kind)
                results += _listing(box, cluster, f"{size} jobs, {kind}", size, empty)
                results += _memory(box, size, kind) if size == max(sizes) else []
    return results


def creating(sizes: Sequence[int]) -> list[Result]:
    """Measure the submission of so many workers that are asked for at once."""
    results = []
    with bed(MaxJobCount=100000) as box:
        for size in sizes:
            box.clear()
            cluster = box.cluster()
            cluster.create_workers("worker", HELD, WORKER, 2)
            script = _script(cluster, size)
            bare = median_of(_ROUNDS, lambda script=script: box.seconds("sbatch", "--parsable", text=script))
            before = box.requests()
            ours = median_of(_ROUNDS, lambda size=size, cluster=cluster: _seconds_to_create(cluster, size))
            sent = _difference(before, box.requests())
            began = time.perf_counter()
            few = min(size, _ASKED_ONE_BY_ONE)
            standin.submit([_script(cluster, 1)] * few, box.environ)
            other = (time.perf_counter() - began) * size / few
            results += [
                within(f"create {size} workers", "s", bare, ours, times=1.3, other=other),
                Result(
                    f"submissions for {size} workers",
                    "requests",
                    1,
                    sent["REQUEST_SUBMIT_BATCH_JOB"] / _ROUNDS,
                    size,
                    "1",
                    sent["REQUEST_SUBMIT_BATCH_JOB"] == _ROUNDS,
                ),
            ]
    return results


def _fill(box: Bed, cluster: Cluster, size: int, kind: str) -> None:
    if kind == "array":
        cluster.create_workers("worker", HELD, WORKER, size)
        return
    script = _script(cluster, 1)
    with ThreadPoolExecutor(4) as pool:
        # Each with a token of its own, as the provider would give it.
        scripts = (re.sub(r'"t":"\w{6}"', f'"t":"{number:06d}"', script) for number in range(size))
        list(pool.map(lambda text: box.run("sbatch", "--parsable", text=text), scripts))


def _script(cluster: Cluster, size: int) -> str:
    """Return the very script that the provider submits."""
    head = next(node_id for node_id, node in cluster.nodes().items() if node.is_head)
    launch = replace(cluster.launch("worker", HELD, WORKER, {}), head=head, gcs_address="127.0.0.1:1")
    return render(job_spec(launch, new_certificate(launch), size))


def _listing(box: Bed, cluster: Cluster, name: str, size: int, empty: tuple[float, float]) -> list[Result]:
    """Measure one kind of listing; what a listing without jobs costs anyway is not counted for each job."""
    argv = squeue_argv()
    environ = {**box.environ, "SLURM_BITSTR_LEN": "0"}

    def bare() -> float:
        began = time.perf_counter()
        subprocess.run(argv, env=environ, capture_output=True, check=True)
        return time.perf_counter() - began

    _look(cluster)
    if len(cluster.nodes()) < size:
        raise RuntimeError(f"{len(cluster.nodes())} of {size} jobs are listed")
    one = min(size, _ASKED_ONE_BY_ONE)
    ids = box.run("squeue", "--noheader", "--array", "--format=%i").split()[:one]
    began = time.perf_counter()
    standin.states(ids, box.environ)
    other = (time.perf_counter() - began) * size / one
    before = box.requests()
    looks, floors = [], []
    for _ in range(_ROUNDS):
        # In turns: what else happens on the machine hits both.
        floors.append(bare())
        looks.append(_look(cluster))
    floor = statistics.median(floors)
    asked = _difference(before, box.requests())
    # Half of them are the bare squeue's.
    requests = sum(count for kind, count in asked.items() if "JOB" in kind) / _ROUNDS - 1
    first = [_first_look(box) for _ in range(3)]
    changed = []
    for job_id in ids[-_CHANGES:]:
        box.run("scancel", job_id)
        changed.append(_look(cluster))
    return [
        within(f"list {name}", "s", floor, sorted(look[0] for look in looks)[_ROUNDS // 2], times=1.3, other=other),
        at_most(
            f"list {name}, own CPU for each job",
            "us",
            max(0.0, sorted(look[1] for look in looks)[_ROUNDS // 2] - empty[0]) / size * 1e6,
            most=10,
        ),
        at_most(
            f"list {name}, own CPU for each job when one has changed",
            "us",
            max(0.0, min(look[1] for look in changed) - empty[0]) / size * 1e6,
            most=10,
        ),
        at_most(
            f"list {name}, own CPU for each job the first time",
            "us",
            max(0.0, min(look[1] for look in first) - empty[1]) / size * 1e6,
            most=10,
        ),
        Result(
            f"list {name}, requests for jobs",
            "requests",
            1,
            requests,
            size,
            "1",
            requests == 1,
        ),
    ]


def _look(cluster: Cluster) -> tuple[float, float]:
    """Have the provider ask; return seconds and seconds of its own CPU."""
    cluster.forget_listing()
    cpu, began = _own_cpu(), time.perf_counter()
    cluster.nodes()
    return time.perf_counter() - began, _own_cpu() - cpu


def _first_look(box: Bed) -> tuple[float, float]:
    # What the parts before left behind is not collected at the cost of this one.
    gc.collect()
    return _look(box.cluster())


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _seconds_to_create(cluster: Cluster, size: int) -> float:
    began = time.perf_counter()
    cluster.create_workers("worker", HELD, WORKER, size)
    return time.perf_counter() - began


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


def _memory(box: Bed, size: int, kind: str) -> list[Result]:
    """Compare the memory of a fresh process before and after it has listed everything, and a few changes after that."""
    code = """
import json, os, re, subprocess, sys
from pathlib import Path
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.node_provider import SlurmNodeProvider

def resident_kib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

cluster = Cluster("bench", SlurmSettings(state_dir=sys.argv[1]), {**os.environ, "RAY_SLURM_GCS_ADDRESS": "x"})
empty = resident_kib()
found = list(cluster.nodes())
for node_id in found[-5:]:
    subprocess.run(["scancel", node_id.partition("-")[0]], check=True)
    cluster.forget_listing()
    cluster.nodes()
print(json.dumps([len(found), resident_kib() - empty]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(box.parent / "state")],
        env={**box.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, grown_kib = map(int, done.stdout.strip("[]\n").split(","))
    if found < size - _CHANGES:
        raise RuntimeError(f"{found} of {size} jobs are listed")
    return [at_most(f"memory for {size} jobs, {kind}", "MB", grown_kib / 1024, most=30)]
