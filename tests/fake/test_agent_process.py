"""The agent as a process, from its start to its end, over a SLURM and a Ray in miniature."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import wait_for

from fake.harness import HEAD, WORKER
from ray_slurm_provider import procfs
from ray_slurm_provider.agent.spec import SPEC_VARIABLE, AgentSpec
from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.reports import ENDED, READY, read_report

# `ray start`: says that it is up, and lives as long as what it started.
RAY_START = """
import os, subprocess, sys
with open(os.environ["STARTS"], "a") as file:
    print(" ".join(sys.argv[1:]), "AUTOSCALER" if "RAY_SLURM_GCS_ADDRESS" in os.environ else "", file=file)
if os.path.exists(os.environ["STARTS"] + ".taken"):
    os.unlink(os.environ["STARTS"] + ".taken")
    sys.exit("[Errno 98] error while attempting to bind on address: address already in use")
raylet = subprocess.Popen([os.environ["RAYLET"], "600"])
print("Ray runtime started.", flush=True)
try:
    raylet.wait()
    import time
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""
MONITOR = 'import os, time; open(os.environ["STARTS"] + ".monitor", "w").write(os.environ["RAY_SLURM_GCS_ADDRESS"]); time.sleep(600)'


class Node:
    """A running agent."""

    def __init__(self, cluster, node_id, environ, log, **told):
        self.cluster, self.node_id, self.starts = cluster, node_id, Path(environ["STARTS"])
        home = cluster.directory.fingerprint
        spec = AgentSpec("c", home, str(cluster.directory.root), interface="lo", temp_dir=environ["PLACE"], **told)
        place = {"RAY_CLOUD_INSTANCE_ID": node_id, "RAY_SLURM_DIR": str(cluster.directory.root)}
        allocation = {"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "512"}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "ray_slurm_provider.agent"],
            env={**environ, **place, **allocation, SPEC_VARIABLE: json.dumps(spec.as_json())},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def report(self):
        return self.cluster.directory.report(self.node_id)

    def wait_until_up(self):
        wait_for(lambda: self.report is not None and self.report.phase == READY, 20, "Ray", poll_s=0.05)
        return self

    def below(self):
        return procfs.descendants(self.process.pid)

    def end(self):
        code = self.process.wait(20)
        assert not self.below()
        return code


@pytest.fixture
def cluster(tmp_path, fake_slurm):
    """A cluster whose head runs and has two workers, one of them in the queue."""
    settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python=sys.executable)
    made = Cluster("c", settings, fake_slurm.environ)
    made.head_id = made.create_head("head", NodeConfig(), HEAD)
    fake_slurm.change(job_id_of(made.head_id), state="RUNNING")
    autoscaler = Cluster("c", settings, fake_slurm.of_head(made.head_id))
    made.worker_ids = [autoscaler.create_workers("worker", NodeConfig(), WORKER, 1)[0] for _ in range(2)]
    fake_slurm.change(job_id_of(made.worker_ids[0]), state="RUNNING")
    return made


@pytest.fixture
def start(tmp_path, fake_slurm, cluster):
    ray = tmp_path / "python" / "ray"
    for name, text in (("scripts/scripts.py", RAY_START), ("autoscaler/v2/monitor.py", MONITOR)):
        (ray / name).parent.mkdir(parents=True)
        (ray / name).write_text(text)
    for name in ("", "scripts", "autoscaler", "autoscaler/v2"):
        (ray / name / "__init__.py").touch()
    (ray / "_version.py").write_text('version = "9.9.9"\n')
    shutil.copy(shutil.which("sleep"), tmp_path / "raylet")
    place = Path(subprocess.check_output(["mktemp", "-d", "/tmp/rsa-XXXXXX"], text=True).strip())
    (cluster.directory.bootstrap_config).write_text("a: 1")
    environ = {
        **fake_slurm.environ,
        "PYTHONPATH": f"{tmp_path}/python:{Path(__file__).parents[2]}",
        "STARTS": str(tmp_path / "starts"),
        "RAYLET": str(tmp_path / "raylet"),
        "PLACE": str(place),
    }
    nodes = []

    def start(node_id, **told):
        nodes.append(Node(cluster, node_id, environ, tmp_path / f"{node_id}.log", **told))
        return nodes[-1]

    yield start
    for node in nodes:
        procfs.end([*node.below(), *filter(None, [procfs.find(node.process.pid)])], 5)
        node.process.wait()
    left = [path.name for path in place.glob("rsp-*")]
    shutil.rmtree(place)
    assert not left


def _states(fake_slurm):
    return [job["state"] for job in fake_slurm.jobs()]


def test_a_head_starts_ray_and_its_autoscaler_and_takes_all_with_it(start, cluster, fake_slurm):
    node = start(cluster.head_id).wait_until_up()
    autoscaler = Path(f"{node.starts}.monitor")
    wait_for(lambda: autoscaler.exists() and autoscaler.read_text(), 10, "the autoscaler", poll_s=0.05)
    assert autoscaler.read_text() == node.report.gcs_address
    assert "--head" in node.starts.read_text()
    assert "AUTOSCALER" not in node.starts.read_text()
    assert "raylet" in {process.name for process in node.below()}
    arguments = b"".join(process.read("cmdline") for process in [procfs.find(node.process.pid), *node.below()])
    assert cluster.directory.fingerprint.encode() not in arguments
    node.process.send_signal(signal.SIGTERM)
    assert node.end() == 0
    assert read_report(cluster.directory.reports.head).phase == ENDED
    assert _states(fake_slurm) == ["RUNNING", "CANCELLED", "CANCELLED"]


@pytest.mark.parametrize("victim", ["raylet", "agent"])
def test_what_is_killed_takes_the_head_with_it(start, cluster, fake_slurm, victim):
    node = start(cluster.head_id).wait_until_up()
    agent = next(process for process in node.below() if process.parent == node.process.pid)
    raylet = next(process for process in node.below() if process.name == "raylet")
    os.kill({"raylet": raylet, "agent": agent}[victim].pid, signal.SIGKILL)
    assert node.end() == {"raylet": 0, "agent": 137}[victim]
    assert _states(fake_slurm) == ["RUNNING", "CANCELLED", "CANCELLED"]


def test_a_lost_port_is_no_reason_to_give_up(start, cluster):
    Path(f"{cluster.directory.root.parents[1]}/starts.taken").touch()
    node = start(cluster.head_id).wait_until_up()
    first, second = node.starts.read_text().splitlines()
    assert first != second


def test_a_sign_restarts_ray_and_another_ends_the_head(start, cluster, fake_slurm):
    node = start(cluster.head_id).wait_until_up()
    before = node.report.ready_at
    paths = cluster.directory.reports
    paths.restart(cluster.head_id).touch()
    wait_for(lambda: node.report.phase == READY and node.report.ready_at != before, 20, "the next Ray", poll_s=0.05)
    assert _states(fake_slurm) == ["RUNNING", "CANCELLED", "CANCELLED"]
    paths.stop(cluster.head_id).touch()
    assert node.end() == 0


def test_a_worker_whose_head_refuses_ends_alone(start, cluster, fake_slurm):
    with subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as head:
        port = head.stdout.readline().strip()
        node = start(cluster.worker_ids[0], head=cluster.head_id, gcs_address=f"127.0.0.1:{port}").wait_until_up()
        head.kill()
    # Some seconds until it looks, and fifteen of refusals.
    assert node.process.wait(40) == 0
    assert "has refused connections" in node.report.reason
    assert _states(fake_slurm) == ["RUNNING", "RUNNING", "PENDING"]


LISTENER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
held = []
while True:
    held.append(server.accept())
"""
