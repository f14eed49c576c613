"""A run of faults at random on a living cluster, judged by the checker."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from support import RAY, wait_for

from faults.bed import PATIENT, Bed
from faults.checker import Checker, ray_nodes_command
from faults.faults import FAULTS, apply

WORKERS = 3
# The partition's default is an hour.
HEAD = {
    "resources": {"CPU": 0},
    "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G", "time": "1-00:00:00"}},
}


def keep_evidence(cluster, place):
    """Keep what Ray has to say about itself beside the cluster's directory, and its connections."""
    with suppress(OSError, ValueError, KeyError, subprocess.SubprocessError):
        head = json.loads((cluster.root / "head.json").read_text())
        gcs, dashboard = (f"{head['address']}:{head['ports'][name]}" for name in ("gcs", "dashboard"))
        questions = {
            "ray-status.txt": [*RAY, "status", "-v", f"--address={gcs}"],
            "ray-nodes.txt": [*RAY, "list", "nodes", f"--address=http://{dashboard}"],
            "ray-tasks.txt": [*RAY, "list", "tasks", "--filter=state!=FINISHED", f"--address=http://{dashboard}"],
            "connections.txt": ["ss", "-tnpoi"],
        }
        environ = {**os.environ, **cluster.access_variables()}
        for name, question in questions.items():
            command = [*cluster.prefix, *question]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
            (place / name).write_text(done.stdout + done.stderr)
        logs = f"{head['temp_dir']}/session_latest/logs"
        shutil.copytree(logs, place / "ray-logs", symlinks=True, dirs_exist_ok=True)


def run(minutes, seed, figures=None):
    """Make faults for some minutes, print what happens, and return the exit code: 0 when nothing went wrong.

    Args:
        minutes: How long.
        seed: Makes the order and the durations; a new one when None.
        figures: Where to write the figures as JSON.
    """
    seed = random.randrange(10**6) if seed is None else seed
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    place = Path(tempfile.mkdtemp(prefix="rst-faults-"))
    bed = Bed(**PATIENT)
    types = {
        "worker": {
            "max_workers": WORKERS,
            "idle_timeout_s": 10,
            "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G"}},
        }
    }
    cluster = bed.cluster(place, "random", types=types, head=HEAD)
    checker = Checker(bed.tell, "random", WORKERS, bed.box.paths.logs / "slurmctld.log", cluster.root / "state.json")
    recovered = defaultdict(list)
    problems = []
    began = time.monotonic()
    try:
        cluster.up()
        driver = cluster.start_driver(tasks=WORKERS, seconds=1.5)
        checker.start(ray_nodes_command(cluster), {**os.environ, **cluster.access_variables()})
        try:
            while time.monotonic() - began < minutes * 60:
                fault = chance.choice(FAULTS)
                lasts_s = fault.lasts_s * chance.uniform(0.2, 2.0)
                print(f"{time.monotonic() - began:6.0f} s  {fault.name} for {lasts_s:.0f} s", end="", flush=True)
                seconds = apply(fault, cluster, driver, lasts_s)
                print(f": all work done {seconds:.0f} s after its end", flush=True)
                recovered[fault.name].append(seconds)
                bed.wait_until_healthy()
            driver.finish()
            wait_for(lambda: not cluster.alive(head=False), 120, "the end of idle workers")
            jobs = [job for job, _ in cluster.certified()]
            waves = len(driver.waves())
            cluster.down()
            wait_for(lambda: not cluster.alive(), 60, "the end of every job")
        except AssertionError as error:
            print(f"\n{error}")
            problems.append(str(error))
            keep_evidence(cluster, place)
            jobs, waves = [], 0
        checker.stop()
        problems += checker.problems
        summary = {
            "seed": seed,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "faults": sum(map(len, recovered.values())),
            "waves": waves,
            "submissions": len(set(checker.submissions())),
            "remembered at the end": len(jobs),
            "samples": checker.samples,
            "problems": problems,
            "seconds to recover": {
                name: {
                    "times": len(seconds),
                    "median": round(statistics.median(seconds), 1),
                    "most": round(max(seconds), 1),
                }
                for name, seconds in sorted(recovered.items())
            },
        }
    finally:
        cluster.destroy()
        bed.down()
        if problems:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(summary, indent=1))
    if figures is not None:
        figures.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if problems else 0
