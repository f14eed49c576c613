"""What the node agent costs: time until it starts Ray, memory and CPU while it watches."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import wait_for

from benchmarks.bed import WORKER, bed
from benchmarks.results import Result, at_most, median_of
from ray_slurm_provider import procfs
from ray_slurm_provider.config import NodeConfig
from ray_slurm_provider.reports import READY

if TYPE_CHECKING:
    from ray_slurm_provider.cluster import Cluster
    from ray_slurm_provider.procfs import Process

# What `ray start` prints, and then nothing.
_FAKE_RAY = """
import signal
print("Ray runtime started.", flush=True)
signal.pause()
"""
# Each interpreter says when it is about to run something.
_SITE = """
import time
print(f"BEGAN={time.time()}", flush=True)
"""
_TICKS = os.sysconf("SC_CLK_TCK")


def agent(rounds: int, rest_s: float) -> list[Result]:
    """Start workers whose Ray is a stand-in that does nothing."""
    with bed(nodes=1) as box, socket.create_server(("127.0.0.1", 0)) as head:
        package = box.parent / "fake" / "ray" / "scripts"
        package.mkdir(parents=True)
        for file in (package.parent / "__init__.py", package / "__init__.py"):
            file.touch()
        (package / "scripts.py").write_text(_FAKE_RAY)
        (package.parents[1] / "sitecustomize.py").write_text(_SITE)
        interpreter_s = median_of(5, lambda: box.seconds(sys.executable, "-I", "-S", "-c", "pass"))
        config = NodeConfig.model_validate(
            {
                "sbatch": {"mem": "500M"},
                "env": {"PYTHONPATH": str(package.parents[1])},
            }
        )
        cluster = box.cluster({"RAY_SLURM_GCS_ADDRESS": f"127.0.0.1:{head.getsockname()[1]}"}, python=sys.executable)
        took, agents = [], []
        for _ in range(rounds):
            (node_id,) = cluster.create_workers("worker", config, WORKER, 1)
            wait_for(lambda node_id=node_id: _is_ready(cluster, node_id), 60, "the stand-in for Ray")
            took.append(_until_ray_starts(cluster.log_of(node_id).read_text()))
            agents = _agents(node_id)
            cpu = _cpu_s(agents)
            time.sleep(rest_s / rounds)
            cpu = _cpu_s(agents) - cpu
            resident = max(_resident_mb(process) for process in agents)
            cluster.terminate([node_id])
    return [
        at_most("agent: exec to the start of Ray", "ms", (sorted(took)[rounds // 2] + interpreter_s) * 1000, most=60),
        at_most("agent: memory", "MB", resident, most=15),
        at_most("agent and guard at rest", "% of a core", cpu / (rest_s / rounds) * 100, most=0.1),
    ]


def _is_ready(cluster: Cluster, node_id: str) -> bool:
    report = cluster.directory.report(node_id)
    return report is not None and report.phase == READY


def _until_ray_starts(log: str) -> float:
    """Return the seconds from the agent's first line of Python to its `starting`."""
    words = re.search(r"^([\d-]+ [\d:]+),(\d+) INFO starting ", log, re.MULTILINE)
    began = float(re.findall(r"BEGAN=([\d.]+)", log[: words.start()])[-1])
    return datetime.fromisoformat(words[1]).timestamp() + int(words[2]) / 1000 - began


def _agents(node_id: str) -> list[Process]:
    """Return guard and agent of a node."""
    wanted = f"RAY_CLOUD_INSTANCE_ID={node_id}".encode()
    return [
        process
        for process in procfs.processes()
        if b"ray_slurm_provider.agent" in process.read("cmdline").split(b"\0")
        and wanted in process.read("environ").split(b"\0")
    ]


def _cpu_s(processes: list[Process]) -> float:
    fields = [process.read("stat").rpartition(b")")[2].split() for process in processes]
    return sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS


def _resident_mb(process: Process) -> float:
    return int(re.search(rb"VmRSS:\s+(\d+)", process.read("status"))[1]) / 1024
