"""What a site may ask for: port ranges, encryption, places for temporary files, IPv6, its plugins."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import RAY, RAY_SLURM, cluster_config, listening_ports, tasks_script, user_environment

from ray_slurm_provider.agent import ports
from ray_slurm_provider.sandbox.layout import read_layout
from ray_slurm_provider.sandbox.lifecycle import Sandbox

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]


def _free_range(length, start=41000):
    """A range of ports that nobody has, of the size of a careful admin."""
    for first in range(start, 65000, length):
        if all(ports.is_free(port) for port in range(first, first + length)):
            return f"{first}-{first + length - 1}"
    raise AssertionError("no ports")


WORKER = {
    "worker": {"max_workers": 2, "idle_timeout_s": 5, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}}}
}


def _answers_without_encryption(command, environ):
    plain = {name: value for name, value in environ.items() if not name.startswith(("RAY_USE_TLS", "RAY_TLS"))}
    try:
        done = subprocess.run(command, env=plain, text=True, capture_output=True, timeout=15)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 or "Node status" in done.stdout


@pytest.mark.parametrize("placement", ["slurm", "login_node"])
def test_a_firewalled_encrypted_cluster_with_its_own_place_for_files(make_cluster, tmp_path, placement):
    services, workers = _free_range(30), _free_range(24, 52000)
    scratch = Path(f"/tmp/rsc-{os.getpid()}")
    scratch.mkdir(mode=0o700)
    head = {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G"}}}
    if placement == "login_node":
        head = {"node_config": {"placement": "login_node"}}
    head["node_config"]["env"] = {"MY_SCRATCH": str(scratch)}
    node_config = {**WORKER["worker"]["node_config"], "env": {"MY_SCRATCH": str(scratch)}}
    worker = {"max_workers": 2, "node_config": node_config}
    slurm = {
        "ports": {"services": services, "workers": workers},
        "tls": True,
        "temp_dir": "$MY_SCRATCH",
    }
    cluster = make_cluster("site", head=head, types={"worker": worker}, slurm=slurm)
    try:
        cluster.up()
        report = json.loads((cluster.root / "head.json").read_text())
        assert report["temp_dir"].startswith(str(scratch))
        seen = cluster.run_on_head(tasks_script(tmp_path, 2))
        assert len({task["job"] for task in seen}) == 2

        found = listening_ports(cluster)
        allowed = {*ports.port_range(services), *ports.port_range(workers)}
        reports = [json.loads(path.read_text()) for path in (cluster.root / "nodes").glob("*.json")]
        assert len(reports) == 3
        assert {report["ports"]["node_manager"] for report in reports} <= set(found)
        assert set(found) <= allowed, {port: name for port, name in found.items() if port not in allowed}

        environ = {**cluster.environ, **cluster.access()}
        status = [*RAY, "status"]
        assert "Node status" in subprocess.run(status, env=environ, text=True, capture_output=True, timeout=60).stdout
        if placement == "slurm":
            assert not _answers_without_encryption(status, environ)
        program = "import ray; ray.init(); print('NODES', len(ray.nodes()))"
        done = subprocess.run([RAY[0], "-c", program], env=environ, text=True, capture_output=True, timeout=90)
        assert "NODES" in done.stdout, done.stderr
        for path in (cluster.root / "tls").iterdir():
            assert path.stat().st_mode & 0o077 == 0, path
        cluster.down()
        assert list(scratch.iterdir()) == []
    finally:
        cluster.destroy()
        subprocess.run(["rm", "-rf", scratch], check=True)


def test_a_range_with_too_few_free_ports_says_how_many_are_needed(make_cluster):
    within = _free_range(11)
    taken = ports.reserve("abc", within)
    cluster = make_cluster("narrow", slurm={"ports": {"services": within}})
    done = cluster.ray("up", cluster.yaml, "--no-config-cache", "-y", check=False)
    taken.release()
    assert done.returncode == 1
    assert re.search(r"only 8 are free .* needs 11", done.stdout + done.stderr)


@pytest.mark.skipif(os.getuid() != 0, reason="makes a network of its own, which only root may")
def test_an_interface_with_nothing_but_ipv6(tmp_path):
    """The IPv4 address is there for SLURM's tools only, which resolve nothing without one."""
    state = f"/tmp/rsv-{os.getpid()}"
    config = tmp_path / "six.yaml"
    head = {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G"}}}
    settings = {"state_dir": str(tmp_path / "state"), "update_interval_s": 1, "interface": "rs0"}
    config.write_text(json.dumps(cluster_config("six", tmp_path / "state", head=head, types=WORKER, slurm=settings)))
    script = tasks_script(tmp_path, 2)
    ray, ray_slurm = shlex.join(RAY), shlex.join(RAY_SLURM)
    (tmp_path / "home" / "tmp").mkdir(parents=True)
    steps = f"""
set -e
ip link set lo up
ip link add rs0 type veth peer name rs1
ip link set rs1 up
ip link set rs0 up
ip addr add 198.51.100.1/24 dev rs1
ip -6 addr add fd00:77::1/64 dev rs0 nodad
export HOME={tmp_path}/home TMPDIR={tmp_path}/home/tmp RAY_USAGE_STATS_ENABLED=0 RAY_UP_enable_autoscaler_v2=1
trap '{ray} down -y {config} || true; {ray_slurm} sandbox down --state-dir {state}' EXIT
{ray_slurm} sandbox up --state-dir {state} --nodes 2
eval "$({ray_slurm} sandbox env --state-dir {state})"
{ray} up {config} --no-config-cache -y
{ray} get-head-ip {config}
{ray} exec {config} --no-config-cache 'python {script}'
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", steps], env=environ, text=True, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fd00:77::1" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
    assert len({task["job"] for task in json.loads(line.partition("RESULT ")[2])}) == 2


def test_slurm_takes_the_plugin_of_the_docs_for_admins(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "site.md").read_text()
    plugin = re.search(r"^```lua\n(.*?)^```", text, re.DOTALL | re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory(prefix="rsl-") as parent:
        Path(parent).chmod(0o755)
        box = Sandbox(Path(parent) / "s")
        layout = {"nodes": [{"name": "c"}], "partitions": [{"name": "cpu", "groups": ["c"]}], "job_submit": plugin}
        box.up(read_layout(layout))
        try:
            environ = user_environment(box.environment(), tmp_path)

            def said(*options):
                command = ["sbatch", "--test-only", "--partition=cpu", *options, "--wrap=true"]
                return subprocess.run(command, env=environ, text=True, capture_output=True, timeout=60).stderr

            assert "name your account" in said()
            assert "to start at" in said("--account=physics")
            assert "--nodelist is not allowed here" in said("--account=physics", "--nodelist=c1")
            assert "only those of Ray" in said("--account=physics", "--reservation=course")
            assert "reservation is invalid" in said("--account=physics", "--reservation=ray-1")
        finally:
            box.down()
