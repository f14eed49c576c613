"""The head on the login node, with real Ray: what the commands of test_commands do not show."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess

import pytest
from support import RAY, RAY_SLURM, tasks_script, wait_for

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.ports import reserve

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]
HEAD = {"node_config": {"placement": "login_node"}}
WORKER = {"worker": {"max_workers": 2, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}}}}


def test_a_head_that_is_killed_is_noticed_and_the_next_one_takes_its_place(make_cluster, tmp_path):
    cluster = make_cluster("login", head=HEAD, types=WORKER)
    own = f"/tmp/rso-{os.getpid()}"
    client = reserve(["client"]).ports["client"]
    options = [f"--temp-dir={own}", f"--ray-client-server-port={client}", "--num-cpus=1", "--include-dashboard=false"]
    log = tmp_path / "other"
    other = subprocess.Popen(
        [*RAY, "start", "--head", "--block", "--port=0", "--dashboard-agent-listen-port=0", *options],
        env={**cluster.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        cluster.up()
        wait_for(lambda: "Ray runtime started" in log.read_text(), 60, "the user's other Ray")
        first = cluster.head()
        status = cluster.ray("exec", cluster.yaml, "--no-config-cache", "ray status").stdout
        assert "CPU" not in status.partition("Total Usage")[2].partition("Demands")[0]
        cluster.run_on_head(tasks_script(tmp_path, 2))
        (cluster.root / "state.json").unlink()
        assert cluster.head()["id"] == first["id"]

        guard = next(p for p in cluster.processes() if p.pid == int(first["id"].split("-")[-2]))
        everything = [p for p in cluster.processes() if b"SLURM_JOB_ID=" not in p.read("environ")]
        assert guard in everything
        procfs.send(everything, signal.SIGKILL)
        wait_for(lambda: cluster.head() is None, 20, "the end of the head")
        done = cluster.ray_slurm("env", cluster.yaml, check=False)
        assert done.returncode == 1
        assert "no head that answers" in done.stderr
        # Its workers notice by themselves.
        wait_for(lambda: not cluster.jobs(), 60, "the end of the workers")

        cluster.up()
        second = cluster.head()
        assert second["id"] != first["id"]
        assert len(cluster.run_on_head(tasks_script(tmp_path, 2))) == 2
        cluster.down()
        assert cluster.jobs() == []
        assert not cluster.root.exists()
        cluster.wait_until_no_process_is_left(15)
        assert other.poll() is None, "ray down ended a Ray that is not of this cluster"
    finally:
        other.terminate()
        other.wait(60)
        subprocess.run(["rm", "-rf", own], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="makes a host name of its own, which only root may")
def test_on_another_login_node_the_head_is_seen_and_ended(make_cluster):
    cluster = make_cluster("two", head=HEAD, types=WORKER)
    cluster.up()
    head = cluster.head()["id"]

    def elsewhere(*words):
        script = f"hostname login2 && exec {shlex.join(map(str, words))}"
        return subprocess.run(
            ["unshare", "--uts", "bash", "-c", script], env=cluster.environ, text=True, capture_output=True, timeout=120
        )

    (row,) = json.loads(elsewhere(*RAY_SLURM, "nodes", "--json", cluster.yaml).stdout)
    assert (row["id"], row["state"]) == (head, "RUNNING")
    done = elsewhere(*RAY, "exec", cluster.yaml, "--no-config-cache", "true")
    assert done.returncode == 1
    assert "and this is login2" in done.stderr
    done = elsewhere(*RAY, "down", "-y", cluster.yaml)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not cluster.root.exists()
    cluster.wait_until_no_process_is_left(15)


def test_a_setup_that_fails_is_told_with_the_log(make_cluster):
    cluster = make_cluster("wrong", head=HEAD, types=WORKER, head_setup_commands=["echo because; false"])
    done = cluster.ray("up", cluster.yaml, "--no-config-cache", "-y", check=False)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "head_setup_commands[0] failed with exit code 1" in output
    assert "| because" in output
    assert "Traceback" not in output
    assert cluster.processes() == []


def test_the_head_moves_into_slurm_when_its_placement_changes(make_cluster):
    cluster = make_cluster("moving", head=HEAD, types=WORKER)
    cluster.up()
    before = cluster.head()["id"]
    cluster.config["available_node_types"]["head"] = {
        "resources": {"CPU": 0},
        "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G"}},
    }
    done = cluster.up()
    assert "placement: 'login_node' becomes 'slurm'" in done.stdout + done.stderr
    after = cluster.head()["id"]
    assert before.startswith("login-")
    assert after.partition("-")[0].isdigit()
    assert json.loads((cluster.root / "head.json").read_text())["node_id"] == after
    cluster.down()
    cluster.wait_until_no_process_is_left(15)
