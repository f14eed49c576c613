"""How long `ray up` and a new worker take, next to a bare `sbatch` of `ray start` in the same run.

    .venv/bin/python tests/benchmarks/latency.py [--rounds 3]

It starts a sandbox of its own. The bare figures are what any tool has to pay: SLURM's scheduling and the
start of Ray. Times depend on the machine; compare the columns, not runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import RAY, UserCluster, cluster_config, user_environment, wait_for

from ray_slurm_provider.agent.network import free_ports
from ray_slurm_provider.agent.ray_command import STARTED_MARK
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox

UPDATE_INTERVAL_S = 5
ALLOWED_S = UPDATE_INTERVAL_S + 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    parent = Path(tempfile.mkdtemp(prefix="rsb-"))
    parent.chmod(0o755)
    box = Sandbox(parent / "s")
    box.up(usual_spec(nodes=3, cpus=4, memory="8G"))
    try:
        home = parent / "home"
        (home / "tmp").mkdir(parents=True)
        environ = user_environment(box.environment(), home)
        heads = [(bare_head(environ, parent, i), our_head(environ, parent, i)) for i in range(rounds)]
        workers = worker_times(environ, parent, rounds)
    finally:
        box.down()
        shutil.rmtree(parent)
    report("a head that answers", heads, "sbatch to 'Ray runtime started'", "`ray up`, the whole command")
    report("a task that runs on a new worker", workers, "sbatch to the task's start", "demand to the task's start")


def report(what, pairs, bare_meaning, our_meaning):
    bare, ours = ([pair[i] for pair in pairs] for i in (0, 1))
    extra = statistics.median(our - base for base, our in pairs)
    print(f"{what}")
    print(f"  bare sbatch of ray start  {statistics.median(bare):6.2f} s  ({bare_meaning}; {_list(bare)})")
    print(f"  ray-slurm-provider        {statistics.median(ours):6.2f} s  ({our_meaning}; {_list(ours)})")
    print(f"  difference                {extra:6.2f} s  (allowed: one update interval + 2 s = {ALLOWED_S} s)")


def _list(values):
    return " ".join(f"{value:.2f}" for value in values)


def bare_head(environ, parent, number):
    log = parent / f"bare-{number}.log"
    temp = tempfile.mkdtemp(prefix="rsb-")
    ports = free_ports(["gcs", "client", "dashboard"], "127.0.0.1")
    command = (
        f"exec {' '.join(RAY)} start --head --block --port={ports['gcs']} --temp-dir={temp} --num-cpus=1"
        f" --memory=1000000000 --object-store-memory=500000000 --ray-client-server-port={ports['client']}"
        f" --dashboard-port={ports['dashboard']} --dashboard-agent-listen-port=0"
    )
    began = time.monotonic()
    job = _sbatch(environ, log, command)
    wait_for(lambda: log.exists() and STARTED_MARK in log.read_bytes(), 120, "the bare head", poll_s=0.02)
    took = time.monotonic() - began
    _end(environ, job)
    shutil.rmtree(temp, ignore_errors=True)
    return took


def our_head(environ, parent, number):
    cluster = _cluster(environ, parent, f"bench{number}")
    try:
        began = time.monotonic()
        cluster.up()
        took = time.monotonic() - began
        cluster.down()
    finally:
        cluster.destroy()
    return took


def worker_times(environ, parent, rounds):
    cluster = _cluster(environ, parent, "bench")
    try:
        cluster.up()
        script = parent / "demand.py"
        script.write_text(
            """
import sys, time, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
def now():
    return time.time()

began = time.time()
print("READY", flush=True)
print("RESULT", ray.get(now.options(resources={sys.argv[1]: 1}).remote()) - began, flush=True)
"""
        )
        pairs = []
        for number in range(rounds):
            name = f"bare{number}"
            driver = cluster.start("exec", cluster.yaml, "--no-config-cache", f"python {script} {name}")
            wait_for(lambda driver=driver: "READY" in driver.stdout.readline(), 60, "the driver", poll_s=0)
            temp = tempfile.mkdtemp(prefix="rsb-")
            access = cluster.access()
            resources = json.dumps({name: 1})
            command = (
                f"exec {' '.join(RAY)} start --address={access['RAY_ADDRESS']} --block --temp-dir={temp} --num-cpus=1"
                f" --memory=1000000000 --object-store-memory=500000000 --resources='{resources}'"
                " --dashboard-agent-listen-port=0"
            )
            began = time.time()
            job = _sbatch(access, parent / f"{name}.log", command)
            # The demand is older than the submission: count from the submission.
            late = time.time() - began
            bare = _result(driver) - late
            _end(access, job)
            shutil.rmtree(temp, ignore_errors=True)

            driver = cluster.start("exec", cluster.yaml, "--no-config-cache", f"python {script} ours")
            ours = _result(driver)
            pairs.append((bare, ours))
            wait_for(lambda: not cluster.workers(), 120, "the worker to go")
        cluster.down()
    finally:
        cluster.destroy()
    return pairs


def _result(driver):
    output = driver.communicate(timeout=180)[0]
    return float(next(line for line in output.splitlines() if line.startswith("RESULT")).split()[1])


def _cluster(environ, parent, name):
    worker = {"max_workers": 1, "idle_timeout_s": 3, "resources": {"ours": 1}, "node_config": {"sbatch": {"mem": "2G"}}}
    config = cluster_config(
        name, parent / "state", types={"worker": worker}, slurm={"update_interval_s": UPDATE_INTERVAL_S}
    )
    return UserCluster(parent, environ, config)


def _sbatch(environ, log, command):
    script = f"#!/bin/bash\n{command}\n"
    argv = ["sbatch", "--parsable", "--mem=2G", "-o", str(log)]
    done = subprocess.run(argv, input=script, text=True, env=environ, capture_output=True, check=True, cwd="/tmp")
    return done.stdout.strip()


def _end(environ, job):
    subprocess.run(["scancel", "--quiet", job], env=environ, check=True)
    listing = ["squeue", "-h", "-j", job]
    wait_for(
        lambda: not subprocess.run(listing, env=environ, capture_output=True, text=True).stdout.strip(),
        60,
        f"the end of job {job}",
    )


if __name__ == "__main__":
    main()
