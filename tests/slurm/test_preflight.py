"""`ray-slurm check` on a real SLURM: each planted defect is named, and a good YAML is not blamed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from support import RAY_SLURM, UserCluster, cluster_config, user_environment, wait_for

from ray_slurm_provider import procfs
from ray_slurm_provider.sandbox import daemons
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox

pytestmark = pytest.mark.slurm


def _check(cluster, code, *words):
    cluster.write()
    done = cluster.ray_slurm("check", cluster.yaml, "--json", *words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def _probe_jobs(cluster):
    """The jobs of checks that are still there."""
    return [job for job in cluster.client.jobs() if job.alive and job.name.startswith("ray-.check")]


def _worker(cluster):
    return cluster.config["available_node_types"]["worker"]["node_config"]


def test_a_good_yaml_passes_in_both_placements_and_leaves_nothing(make_cluster):
    cluster = make_cluster("fine")
    before = {job.job_id for job in cluster.client.jobs()}
    findings = _check(cluster, 0, "--fast")
    assert {job.job_id for job in cluster.client.jobs()} <= before
    assert not any("shared" in finding["check"] for finding in findings)
    findings = _check(cluster, 0)
    assert {finding["level"] for finding in findings} == {"ok"}
    assert any("could start at" in finding["text"] for finding in findings)
    cluster.config["available_node_types"]["head"] = {"node_config": {"placement": "login_node"}}
    findings = _check(cluster, 0)
    assert ("address", "Ray would use 127.0.0.1") in {(finding["check"], finding["text"]) for finding in findings}
    assert {"home", "shared memory"} <= {finding["check"] for finding in _check(cluster, 0, "--fast")}
    assert {"shared directory", "file locks", "software", "connections", "clock"} <= {f["check"] for f in findings}
    assert _probe_jobs(cluster) == []
    assert not cluster.root.parent.exists()
    text = cluster.ray_slurm("check", "--fast", cluster.yaml).stdout
    assert text.startswith("ok       yaml:")


def _defects():
    def set_worker(**sbatch):
        return lambda cluster: _worker(cluster)["sbatch"].update(sbatch)

    def set_slurm(**settings):
        return lambda cluster: cluster.config["provider"]["slurm"].update(settings)

    return [
        ("yaml", "did you mean partition", set_worker(partitions="cpu")),
        ("tools", "not found", set_slurm(slurm_bin="/nowhere")),
        ("controller", "SLURM_CONF names", lambda cluster: cluster.environ.update(SLURM_CONF="/nowhere/slurm.conf")),
        ("partition of worker", "there is no partition", set_worker(partition="nosuch")),
        ("partition of worker", "waits for ever", set_worker(time="30-00:00:00")),
        ("job of worker", "sbatch refuses it", set_worker(mem="900G")),
        ("job of worker", "sbatch refuses it", set_worker(constraint="unicorn")),
        ("python", "does not exist", set_slurm(python="/nowhere/python")),
        ("temp_dir", "bytes too long", set_slurm(temp_dir="/tmp/" + "x" * 80)),
        ("yaml", "file_mounts./dev/shm/x: ", lambda cluster: cluster.config.update(file_mounts={"/dev/shm/x": "/tmp"})),
        ("state_dir", "", set_slurm(state_dir="/proc/nowhere")),
    ]


@pytest.mark.parametrize(
    ("check", "words", "plant"), _defects(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_defect_is_named(make_cluster, check, words, plant):
    cluster = make_cluster("defect")
    environ = dict(cluster.environ)
    plant(cluster)
    failures = [finding for finding in _check(cluster, 1, "--fast") if finding["level"] == "failure"]
    cluster.environ = environ
    assert check in {finding["check"] for finding in failures}, failures
    assert any(words in finding["text"] + finding["advice"] for finding in failures if finding["check"] == check), (
        failures
    )


def test_what_only_warns_does_not_fail(make_cluster):
    cluster = make_cluster("warned")
    cluster.environ["PATH"] = f"{os.path.dirname(cluster.python)}:{_only_slurm(cluster)}"
    (finding,) = [finding for finding in _check(cluster, 0, "--fast") if finding["level"] != "ok"]
    assert (finding["check"], finding["level"]) == ("rsync", "warning")


def _only_slurm(cluster):
    """A directory with SLURM's tools and nothing else."""
    place = cluster.directory / "slurm-bin"
    place.mkdir()
    for tool in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        (place / tool).symlink_to(f"/usr/bin/{tool}")
    return place


def _setup(*lines):
    return lambda cluster: cluster.config.update(setup_commands=list(lines))


def _defects_of_compute_nodes():
    """What only a job there can find out; a directory of files stands for software that differs there."""

    def module(name, text):
        def plant(cluster):
            place = cluster.directory / "there"
            place.mkdir()
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
            _setup(f"export PYTHONPATH={place}")(cluster)

        return plant

    def tools_not_in_jobs(cluster):
        place = cluster.directory / "tools"
        place.mkdir()
        for tool in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
            (place / tool).write_text(
                f'#!/bin/sh\n[ -z "$RAY_SLURM_DIR" ] || [ {tool} = scontrol ] || {{ echo "not here" >&2; exit 1; }}\n'
                f'exec /usr/bin/{tool} "$@"\n'
            )
            (place / tool).chmod(0o755)
        cluster.config["provider"]["slurm"]["slurm_bin"] = str(place)

    def set_slurm(**settings):
        return lambda cluster: cluster.config["provider"]["slurm"].update(settings)

    return [
        ("software of head", "Ray 1.0", module("ray-1.0.dist-info/METADATA", "Name: ray\nVersion: 1.0\n")),
        (
            "clock of worker",
            "120 s ahead",
            module("sitecustomize.py", "import time\nnow = time.time\ntime.time = lambda: now() + 120\n"),
        ),
        ("SLURM in the job of head", "not here", tools_not_in_jobs),
        ("probe job of worker", "setup_commands[0] failed with exit code 3", _setup("(exit 3)")),
        (
            "probe job of worker",
            "its report is not understood here: ",
            _setup('echo "{}" > "$RAY_SLURM_DIR/$SLURM_JOB_ID.found.json"; exit 0'),
        ),
        ("address of head", "interface 'ib9' does not exist", set_slurm(interface="ib9")),
        ("temp_dir of worker", "/nowhere", set_slurm(temp_dir="/nowhere/$USER")),
        ("open files of head", "at most 100 open files per process", _setup("ulimit -n 100")),
    ]


@pytest.mark.parametrize(
    ("check", "words", "plant"), _defects_of_compute_nodes(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_defect_of_compute_nodes_is_named(make_cluster, check, words, plant):
    cluster = make_cluster("there")
    plant(cluster)
    cluster.write()
    findings = json.loads(cluster.ray_slurm("check", cluster.yaml, "--json", check=False).stdout)
    found = {finding["check"]: finding for finding in findings if finding["level"] != "ok"}
    assert words in found[check]["text"], found
    assert found[check]["advice"]
    assert _probe_jobs(cluster) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_ended_leaves_no_job(make_cluster, number):
    cluster = make_cluster("ended")
    worker = cluster.config["available_node_types"]["worker"]["node_config"]["sbatch"]
    worker["begin"] = "now+1hour"
    child = subprocess.Popen([*RAY_SLURM, "check", cluster.write()], env=cluster.environ, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(cluster.root.parent.glob(".check-*/*.found.json")), 30, "the head's probe job")
    child.send_signal(number)
    assert child.wait(30) != 0
    wait_for(lambda: not [job for job in _probe_jobs(cluster) if not job.queued], 30, "the end of the head's probe job")
    if number == signal.SIGKILL:
        return cluster.client.cancel([job.job_id for job in _probe_jobs(cluster)])
    assert _probe_jobs(cluster) == []
    assert not cluster.root.parent.exists()
    return None


def test_a_queue_is_no_failure_and_nothing_stays_in_it(make_cluster):
    cluster = make_cluster("waiting")
    _worker(cluster)["sbatch"]["begin"] = "now+1hour"
    findings = _check(cluster, 0, "--wait", "2")
    (finding,) = [finding for finding in findings if finding["level"] != "ok"]
    assert (finding["check"], finding["level"]) == ("probe job of worker", "warning")
    assert "still queued: BeginTime" in finding["text"]
    assert _probe_jobs(cluster) == []


@pytest.mark.skipif(os.getuid() != 0, reason="a slurmd with mounts of its own needs root")
def test_a_directory_that_is_not_shared_is_named(tmp_path):
    parent = Path(tempfile.mkdtemp(prefix="rst-"))
    parent.chmod(0o755)
    box = Sandbox(parent / "s")
    state = tmp_path / "state"
    for place in (state, tmp_path / "tmp"):
        place.mkdir()
    try:
        box.up(usual_spec(nodes=2, memory="8G"))
        environ = user_environment(box.environment(), tmp_path)
        old = [p for p in daemons.processes_of(box.paths) if b"c2" in p.read("cmdline").split(b"\0")]
        procfs.end(old, 5)
        mounted = f"mount -t tmpfs none {state} && exec /usr/sbin/slurmd -N c2"
        subprocess.run(["unshare", "--mount", "sh", "-c", mounted], env=environ, check=True, timeout=20)
        cluster = UserCluster(tmp_path, environ, cluster_config("alone", state))
        _worker(cluster)["sbatch"]["nodelist"] = "c2"
        assert procfs.wait_until(lambda: box.status().healthy, 20)
        findings = _check(cluster, 1)
        (failure,) = [finding for finding in findings if finding["level"] == "failure"]
        assert failure["check"] == "probe job of worker"
        assert "the directory is not shared" in failure["text"]
        assert "c2" in failure["text"]
        assert any(finding["check"] == "shared directory" and "head" in finding["text"] for finding in findings)
    finally:
        box.down()
        shutil.rmtree(parent, ignore_errors=True)
