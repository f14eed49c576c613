"""Two users with a cluster each, on the same hosts."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from ray.core.generated import (
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
    ray_client_pb2,
    ray_client_pb2_grpc,
    reporter_pb2,
    reporter_pb2_grpc,
)
from support import UserCluster, cluster_config, listening_ports, tasks_script, user_environment, wait_for

from ray_slurm_provider import procfs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.cluster,
    pytest.mark.skipif(os.getuid() != 0, reason="makes users, which only root may"),
]

HTTP_PATHS = ("/", "/metrics", "/api/version", "/api/jobs/", "/api/v0/nodes", "/nodes?view=summary", "/logs", "/events")


@pytest.fixture(scope="module")
def clusters(public_place, users, site_prefix, sandbox_environment):
    """Alice's head is a job, Bob's is on the login node; both began at the same moment."""
    made = []
    python = str(site_prefix / "bin" / "python")
    for user, head in zip(users, (None, {"node_config": {"placement": "login_node"}}), strict=True):
        home = public_place / user
        environ = {
            **user_environment(sandbox_environment, home),
            "PATH": f"{Path(python).parent}:/usr/bin:/bin",
            "USER": user,
            "TMPDIR": "/tmp",
        }
        directory = public_place / f"{user}-yaml"
        directory.mkdir()
        worker = {"worker": {"max_workers": 2, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}}}}
        # The very same YAML for both, but for the place of the head.
        config = cluster_config("same", "~/state", head=head, types=worker)
        made.append(UserCluster(directory, environ, config, python, user))
    try:
        started = [cluster.start("up", cluster.yaml, "--no-config-cache", "-y") for cluster in made]
        for child in started:
            output = child.communicate(timeout=120)[0]
            assert child.returncode == 0, output
        yield made
    finally:
        for cluster in made:
            cluster.destroy()


def _driver(cluster, environ, timeout=60):
    program = "import ray; ray.init(log_to_driver=False); print('NODES', len(ray.nodes()))"
    return cluster.run("-c", program, env={**cluster.environ, **environ}, timeout=timeout)


def _access(cluster):
    return dict(re.findall(r"export (\w+)=(.*)", cluster.ray_slurm("env", cluster.yaml).stdout))


def test_both_work_at_the_same_time(clusters, public_place):
    shared = public_place / "tasks"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    children = []
    for cluster in clusters:
        script = tasks_script(shared, 2)
        for path in (script, script.with_suffix("")):
            shutil.chown(path, cluster.user)
        children.append(cluster.start("exec", cluster.yaml, "--no-config-cache", f"python {script}"))
    jobs = []
    for child in children:
        output = child.communicate(timeout=180)[0]
        line = next((line for line in output.splitlines() if "RESULT " in line), None)
        assert line, output
        jobs.append({task["job"] for task in json.loads(line.partition("RESULT ")[2])})
    assert [len(own) for own in jobs] == [2, 2]
    assert not jobs[0] & jobs[1]


def test_nobody_reads_or_writes_the_others_files(clusters):
    alice, bob = clusters
    for one, other in ((alice, bob), (bob, alice)):
        temp_dir = json.loads((other.root / "head.json").read_text())["temp_dir"]
        for path in (other.root, other.root / "auth_token", temp_dir, f"{temp_dir}/session_latest"):
            done = one.run(
                "-c",
                f"import os; print(os.listdir({str(path)!r}) if os.path.isdir({str(path)!r}) else open({str(path)!r}).read())",
            )
            assert done.returncode, path
            assert re.search(r"PermissionError|FileNotFoundError", done.stderr), path


def _join(one, address, access):
    """Start a Ray node of one user's for a cluster of another; return whether it could join."""
    with tempfile.TemporaryDirectory(prefix="rsj-", dir="/tmp") as temp_dir:
        shutil.chown(temp_dir, one.user)
        words = ["start", f"--address={address}", f"--temp-dir={temp_dir}/r", "--num-cpus=1"]
        try:
            done = one.run("-m", "ray.scripts.scripts", *words, env={**one.environ, **access}, timeout=45)
        except subprocess.TimeoutExpired:
            return False
        finally:
            procfs.end([p for p in procfs.processes() if temp_dir.encode() in p.read("cmdline")], 5)
        return done.returncode == 0


def test_nobody_uses_or_joins_the_others_cluster(clusters):
    alice, bob = clusters
    before = len(json.loads(bob.ray_slurm("nodes", "--json", bob.yaml).stdout))
    attempts = []
    with ThreadPoolExecutor() as pool:  # Ray tries for a while before it gives up.
        joined = pool.submit(_join, alice, _access(bob)["RAY_ADDRESS"], _access(alice))
        for one, other in ((alice, bob), (bob, alice)):
            own, address = _access(one), {"RAY_ADDRESS": _access(other)["RAY_ADDRESS"]}
            assert "NODES" in _driver(one, own).stdout
            tries = ({**own, **address}, {"RAY_AUTH_MODE": "disabled", **address})
            attempts += [pool.submit(_driver, one, environ, timeout=120) for environ in tries]
            status = ("-m", "ray.scripts.scripts", "status")
            attempts.append(pool.submit(one.run, *status, env={**one.environ, **own, **address}, timeout=120))
    for attempt in attempts:
        done = attempt.result()
        assert done.returncode
        assert not re.search("NODES|Node status", done.stdout)
    assert not joined.result()
    status = bob.ray("exec", bob.yaml, "--no-config-cache", "python -m ray.scripts.scripts status")
    assert len(json.loads(bob.ray_slurm("nodes", "--json", bob.yaml).stdout)) == before
    assert "node_" not in status.stdout.partition("Active:")[2].partition("Pending:")[0]


def test_no_port_of_the_head_answers_with_data_without_the_token(clusters):
    for cluster in clusters:
        report = json.loads((cluster.root / "head.json").read_text())
        ports = listening_ports(cluster)
        assert {report["ports"]["gcs"], report["ports"]["dashboard"]} <= set(ports)
        for port in ports:
            for path in HTTP_PATHS:
                assert _answer(report["address"], port, path) is None, (port, ports[port], path)


def test_no_service_of_ray_answers_without_the_token(clusters):
    for cluster in clusters:
        report = json.loads((cluster.root / "head.json").read_text())
        for port, question in {
            "gcs": lambda channel: gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVKeys(
                gcs_service_pb2.InternalKVKeysRequest(), timeout=10
            ),
            "node_manager": lambda channel: node_manager_pb2_grpc.NodeManagerServiceStub(channel).GetNodeStats(
                node_manager_pb2.GetNodeStatsRequest(), timeout=10
            ),
            "client": lambda channel: ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(
                ray_client_pb2.ClusterInfoRequest(), timeout=10
            ),
            "dashboard_agent_grpc": lambda channel: reporter_pb2_grpc.ReporterServiceStub(channel).GetTraceback(
                reporter_pb2.GetTracebackRequest(pid=1), timeout=10
            ),
        }.items():
            with grpc.insecure_channel(f"{report['address']}:{report['ports'][port]}") as channel:
                with pytest.raises(grpc.RpcError) as error:
                    question(channel)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED, port


def _answer(host, port, path):
    """What an HTTP server tells a stranger; None for nothing, a refusal, and the dashboard's empty page."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as response:
            body = response.read().decode(errors="replace")
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return None if '<div id="root"></div>' in body else body


def test_ports_of_both_are_different_and_told(clusters):
    alice, bob = (listening_ports(cluster) for cluster in clusters)
    assert not set(alice) & set(bob)


def test_each_sees_only_the_own_cluster(clusters):
    for cluster in clusters:
        (row,) = json.loads(cluster.ray_slurm("clusters", "--json").stdout)
        assert (row["state"], row["directory"]) == ("up", str(cluster.root))


def test_what_a_killed_cluster_leaves_breaks_nobodys_next_one(clusters):
    alice, bob = clusters
    report = json.loads((alice.root / "head.json").read_text())
    # Everything at once, guard and all: nobody is left to clean up.
    doomed = alice.processes()
    procfs.send(doomed, signal.SIGKILL)
    wait_for(lambda: not any(map(procfs.alive, doomed)), 20, "the end of the processes")
    assert os.path.isdir(report["temp_dir"])
    wait_for(lambda: json.loads(alice.ray_slurm("nodes", "--json", alice.yaml).stdout) == [], 60, "the end of the jobs")
    alice.ray("up", alice.yaml, "--no-config-cache", "-y")
    assert not os.path.isdir(report["temp_dir"])
    assert "NODES" in _driver(alice, _access(alice)).stdout
    assert "NODES" in _driver(bob, _access(bob)).stdout


def test_the_same_yaml_means_each_ones_own_cluster(clusters):
    alice, bob = clusters
    bob.config["available_node_types"]["head"] = alice.config["available_node_types"]["head"]
    # Without --no-config-cache, as `ray down` always is.
    for cluster in (alice, bob):
        cluster.ray("exec", cluster.yaml, "true")
        assert [path for path in Path("/tmp").glob("ray-config-*") if path.owner().startswith("rsp-")] == []
    alice.down()
    assert bob.root.exists()
    assert "NODES" in _driver(bob, _access(bob)).stdout


def test_a_cache_that_somebody_else_has_written_is_refused(clusters, monkeypatch):
    alice, bob = clusters
    text = bob.write().read_text()
    program = (
        "import hashlib, json, sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config\n"
        "config = prepare_config(yaml.safe_load(sys.stdin.read()))\n"
        "print(hashlib.sha256(json.dumps([config], sort_keys=True).encode()).hexdigest())"
    )
    digest = bob.run("-c", program, input=text, stdin=None).stdout.split()[-1]
    config = {**bob.config, "provider": {**bob.config["provider"], "slurm": {"state_dir": "/tmp/evil"}}}
    cache = Path(f"/tmp/ray-config-{digest}")
    cache.write_text(json.dumps({"_version": 1, "provider_log_info": {}, "config": config}))
    shutil.chown(cache, alice.user)
    try:
        done = bob.ray("exec", bob.yaml, "true", check=False)
        assert done.returncode == 1
        assert "another user has written" in done.stderr
        assert "Traceback" not in done.stderr
        bob.ray("exec", bob.yaml, "--no-config-cache", "true")
        # Ray imports a module that is not ours before we are asked: from a private TMPDIR it never comes.
        config["provider"]["module"] = "this.Provider"
        cache.write_text(json.dumps({"_version": 1, "provider_log_info": {}, "config": config}))
        checked = json.loads(bob.ray_slurm("check", "--fast", "--json", bob.yaml).stdout)
        assert "/tmp/ray-config-" in next(finding["text"] for finding in checked if finding["check"] == "TMPDIR")
        exec_true = ("-m", "ray.scripts.scripts", "exec", bob.yaml, "true")
        assert "The Zen of Python" in bob.run(*exec_true).stdout
        done = bob.run(*exec_true, env={**bob.environ, **_access(bob)})
        assert (done.returncode, "The Zen of Python" in done.stdout) == (0, False)
    finally:
        cache.unlink()


def test_no_job_of_another_user_runs_in_a_sandbox_without_root(users, site_prefix, sandbox_environment, public_place):
    python, root = str(site_prefix / "bin" / "python"), public_place / users[0] / "sandbox"
    environ = {name: value for name, value in sandbox_environment.items() if name != "SLURM_CONF"}

    def run(user, *words, **variables):
        return subprocess.run(
            words,
            user=user,
            group=user,
            extra_groups=[],
            cwd="/",
            env={**environ, "PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(public_place / user), **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    sandbox = (users[0], python, "-m", "ray_slurm_provider.cli", "sandbox")
    done = run(*sandbox, "up", "--nodes", "1", "--state-dir", str(root))
    assert done.returncode == 0, done.stderr
    try:
        (public_place / users[0]).chmod(0o755)
        srun = ("srun", "--immediate=20", "id", "-un")
        assert run(users[0], *srun, SLURM_CONF=str(root / "slurm.conf")).stdout.strip() == users[0]
        for words in (srun, ("sbatch", "--wrap", "id"), ("scontrol", "ping")):
            done = run(users[1], *words, SLURM_CONF=str(root / "slurm.conf"))
            assert users[0] not in done.stdout
            assert "munge" in done.stderr.lower() or "is DOWN" in done.stdout
    finally:
        (public_place / users[0]).chmod(0o700)
        done = run(*sandbox, "down", "--state-dir", str(root))
        assert done.returncode == 0, done.stderr


def test_both_go_and_leave_nothing(clusters):
    for cluster in clusters:
        cluster.down()
        assert not cluster.root.exists()
        cluster.wait_until_no_process_is_left(20)
    assert [path for path in Path("/tmp").glob("rsp-*") if path.owner().startswith("rsp-")] == []
