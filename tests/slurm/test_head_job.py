"""The head's job when things do not go smoothly."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess

import pytest
from support import tasks_script, wait_for

from ray_slurm_provider import procfs

pytestmark = [pytest.mark.slurm]


@pytest.mark.cluster
def test_a_site_adds_lines_and_directives_and_leaves_others_out(make_cluster, tmp_path):
    ended = tmp_path / "it's over"
    slurm = {
        "prologue": ["export MY_FIRST=1"],
        "epilogue": [f'echo "$MY_SECOND" > {shlex.quote(str(ended))}'],
        "sbatch_skip": ["mem", "no_requeue"],
        "sbatch_extra": ["--nice=5"],
    }
    setup = ["export MY_SECOND=${MY_FIRST}2"]
    cluster = make_cluster("site", head=_head(), slurm=slurm, initialization_commands=setup)
    cluster.up()
    head = cluster.head_job()
    facts = cluster.client.job_facts(head.job_id)
    assert facts["Requeue"] == "1"
    assert "mem=2G" not in facts["TRES"]
    assert "Nice=5" in " ".join(f"{name}={value}" for name, value in facts.items())
    # SLURM was not told, so Ray takes what the YAML says.
    nodes = "import ray; ray.init(log_to_driver=False); r = ray.cluster_resources(); print('MEMORY', r['memory'] + r['object_store_memory'])"
    done = cluster.ray("exec", cluster.yaml, f"python -c {shlex.quote(nodes)}")
    assert float(done.stdout.split("MEMORY ")[1].split()[0]) == 2 * 2**30
    cluster.down()
    assert ended.read_text() == "12\n"


@pytest.fixture
def blocked_node(sandbox_environment, sandbox):
    """Occupy node c3, so that jobs for it stay queued; call the result to free it."""
    environ = {**os.environ, **sandbox_environment}
    command = ["sbatch", "--parsable", "-w", "c3", "--exclusive", "--output=/dev/null", "--wrap", "exec sleep 600"]
    job = subprocess.run(command, env=environ, cwd="/tmp", text=True, capture_output=True, check=True).stdout.strip()

    def state():
        return subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], env=environ, text=True, capture_output=True
        ).stdout.strip()

    def free():
        subprocess.run(["scancel", "--quiet", job], env=environ, check=True)
        wait_for(lambda: not state(), 30, "the end of the blocking job")

    wait_for(lambda: state() == "RUNNING", 30, "the blocking job")
    yield free
    free()


def _head(**sbatch):
    return {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G", **sbatch}}}


def _refusal(done):
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in output
    return output


@pytest.mark.cluster
def test_a_queued_head_survives_ctrl_c_and_is_adopted_by_the_next_ray_up(make_cluster, blocked_node, tmp_path):
    cluster = make_cluster("patient", head=_head(nodelist="c3"))
    source = tmp_path / "dir with blank"
    source.mkdir()
    (source / "file.txt").write_text("hello")
    cluster.config["file_mounts"] = {str(tmp_path / "mounted"): str(source)}
    first = cluster.start("up", cluster.yaml, "--no-config-cache", "-y")
    head = wait_for(cluster.head_job, 60, "the head's job")
    (go,) = wait_for(lambda: list((cluster.root / "nodes").glob("*.go")), 60, "ray up waiting")
    assert json.loads(go.read_text())["max_workers"] == cluster.config["max_workers"]
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode != 0
    assert "PENDING" in output
    assert cluster.head_job().job_id == head.job_id
    assert (tmp_path / "mounted" / "file.txt").read_text() == "hello"

    second = cluster.start("up", cluster.yaml, "--no-config-cache", "-y")
    line = wait_for(lambda: _line(second, "PENDING"), 60, "ray up telling of the queue")
    refused = cluster.ray("exec", cluster.yaml, "--no-config-cache", "true", check=False)
    assert "is not up yet: job" in _refusal(refused)
    assert head.job_id in line
    assert "reason" in line
    blocked_node()
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 0, output
    assert [job.job_id for job in cluster.jobs(everything=True)] == [head.job_id]

    # And a head that was killed does not keep `ray down` from doing its work.
    cluster.client.cancel([head.job_id])
    wait_for(lambda: not cluster.jobs(), 30, "the end of the head")
    cluster.down()
    assert not cluster.root.exists()


def _line(child, word):
    line = child.stdout.readline()
    return line if word in line and line.startswith("job ") else ""


def test_a_failing_setup_command_ends_ray_up_with_its_reason_and_its_output(make_cluster):
    cluster = make_cluster("failing", setup_commands=["echo something is on fire; ls /does/not/exist"])
    output = _refusal(cluster.up(check=False))
    assert "head_setup_commands[0] failed with exit code 2: echo something is on fire; ls /does/not/exist" in output
    assert "| something is on fire" in output
    assert "FAILED" in output
    assert cluster.jobs() == []


def test_a_setup_command_that_ends_the_shell_is_told(make_cluster):
    cluster = make_cluster("exiting", head_setup_commands=["exit 7"])
    output = _refusal(cluster.up(check=False))
    assert "the job ended with exit code 7 in head_setup_commands[0]" in output


def test_an_environment_that_the_node_cannot_see_is_told_as_such(make_cluster):
    cluster = make_cluster("blind", slurm={"python": "/only/on/the/login/node/bin/python"})
    output = _refusal(cluster.up(check=False))
    assert "the Python /only/on/the/login/node/bin/python cannot be seen on" in output
    assert "shared file system" in output
    assert "command not found" not in output


def test_a_python_without_ray_is_told_as_such(make_cluster, tmp_path):
    lonely = tmp_path / "lonely"
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(lonely)], check=True)
    cluster = make_cluster("lonely", setup_commands=[f"source {lonely}/bin/activate"])
    output = _refusal(cluster.up(check=False))
    assert f"the Python {lonely}/bin/python" in output
    assert "cannot import ray_slurm_provider" in output


def test_a_submission_that_slurm_refuses_is_told_in_its_words(make_cluster):
    cluster = make_cluster("refused", head=_head(partition="nosuch"))
    assert "invalid partition specified: nosuch" in _refusal(cluster.up(check=False))
    assert cluster.jobs(everything=True) == []


def test_a_missing_source_of_a_file_mount_is_refused(make_cluster):
    cluster = make_cluster("mounts", file_mounts={"/tmp/x": "/does/not/exist"})
    assert "file_mounts./tmp/x: '/does/not/exist' does not exist here" in _refusal(cluster.up(check=False))
    assert cluster.jobs(everything=True) == []


def test_a_head_that_is_cancelled_in_the_queue_ends_ray_up(make_cluster, blocked_node):
    cluster = make_cluster("cancelled", head=_head(nodelist="c3"))
    child = cluster.start("up", cluster.yaml, "--no-config-cache", "-y")
    wait_for(lambda: list((cluster.root / "nodes").glob("*.go")), 60, "ray up waiting")
    cluster.client.cancel([cluster.head_job().job_id])
    output = child.communicate(timeout=20)[0]
    assert child.returncode == 1
    assert "CANCELLED" in output
    assert "Traceback" not in output


def test_a_mistake_in_the_yaml_is_refused_before_anything_is_submitted(make_cluster):
    cluster = make_cluster("mistaken", head=_head(mem="lots"))
    output = _refusal(cluster.up(check=False))
    assert "available_node_types.head.node_config.sbatch.mem: 'lots' is not allowed" in output
    assert cluster.jobs(everything=True) == []
    assert not cluster.root.exists()


@pytest.mark.cluster
def test_two_clusters_live_side_by_side_and_the_death_of_one_head_ends_only_its_own_jobs(
    make_cluster, blocked_node, tmp_path
):
    types = {
        # On the head's host, for one.
        "near": {
            "max_workers": 1,
            "resources": {"near": 1},
            "node_config": {"sbatch": {"mem": "1G", "nodelist": "c1"}},
        },
        "queued": {
            "max_workers": 1,
            "min_workers": 1,
            "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G", "nodelist": "c3"}},
        },
        "broken": {
            "max_workers": 1,
            "resources": {"broken": 1},
            "worker_setup_commands": ["echo no luck; false"],
            "node_config": {"sbatch": {"mem": "1G"}},
        },
    }
    one = make_cluster("one", head=_head(nodelist="c1"), types=types)
    two = make_cluster("two", head=_head(nodelist="c1"), types={"near": types["near"]})
    child = one.start("up", one.yaml, "--no-config-cache", "-y")
    two.up()
    assert child.wait(60) == 0
    script = tasks_script(tmp_path, 1, 'num_cpus=1, resources={"near": 1}')
    jobs = {}
    for cluster in (one, two):
        (seen,) = cluster.run_on_head(script)
        assert seen["slurm_node"] == "c1"
        jobs[cluster] = seen["job"]
    assert jobs[one] != jobs[two]
    assert jobs[one] in {job.job_id for job in one.jobs()}
    assert jobs[two] in {job.job_id for job in two.jobs()}
    assert one.access()["RAY_ADDRESS"] != two.access()["RAY_ADDRESS"]
    wait_for(lambda: any(job.queued for job in one.jobs()), 30, "the queued worker of cluster one")

    # A worker whose setup fails says so in the autoscaler's log.
    wants_broken = tasks_script(tmp_path, 1, "resources={'broken': 1}")
    driver = one.start("exec", one.yaml, f"python {wants_broken}")
    log = one.head_monitor_log()
    wait_for(
        lambda: "worker_setup_commands[0] failed with exit code 1" in log.read_text(),
        60,
        "the reason in the monitor log",
    )
    assert "| no luck" in log.read_text()
    driver.kill()

    before = {job.job_id for job in two.jobs()}
    os.kill(one.process(one.head_job().job_id, "gcs_server").pid, signal.SIGKILL)
    wait_for(lambda: not one.jobs(), 90, "the end of every job of cluster one")
    one.wait_until_no_process_is_left(30)
    assert {job.job_id for job in two.jobs()} == before
    one.down()
    assert not one.root.exists()
    assert two.root.exists()

    # Killed with its agent, a head cannot cancel anything itself.
    processes = two.processes(two.head_job().job_id)
    # The guard may be faster with what is left than this list is long.
    procfs.send([process for process in processes if process.name != "rsp-guard"], signal.SIGKILL)
    wait_for(lambda: not two.jobs(), 90, "the end of every job of cluster two")
    two.wait_until_no_process_is_left(60)
    two.down()
    assert not two.root.exists()
