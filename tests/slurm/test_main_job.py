"""One cluster from `ray up` to `ray down`, as a user has it. The tests go on from each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import RAY, controller_requests, tasks_script, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster(module_cluster):
    cluster = module_cluster(
        "main",
        types={
            "worker": {
                "max_workers": 6,
                "idle_timeout_s": 20,
                "labels": {"team": "blue"},
                "node_config": {
                    "sbatch": {"cpus_per_task": 2, "mem": "1G", "time": "01:00:00"},
                    "env": {"MY_BLANK": "a b'c\"d"},
                    "setup": ["export MY_SETUP=node", "export MY_CHAIN=$MY_CHAIN-node"],
                },
            },
            "gpu": {
                "max_workers": 2,
                "idle_timeout_s": 20,
                "node_config": {"sbatch": {"partition": "gpu", "cpus_per_task": 1, "mem": "1G", "gres": "gpu:a100:1"}},
            },
        },
        initialization_commands=["export MY_CHAIN=init"],
        setup_commands=["export MY_CHAIN=$MY_CHAIN-setup"],
        head_setup_commands=["export MY_HEAD=1"],
        worker_setup_commands=["export MY_CHAIN=$MY_CHAIN-worker"],
    )
    cluster.first_up = cluster.up()
    return cluster


def test_ray_up_ends_with_the_address_and_what_to_type_next(cluster):
    output = cluster.first_up.stdout + cluster.first_up.stderr
    head = json.loads((cluster.root / "head.json").read_text())
    assert f"Ray answers at {head['address']}:{head['ports']['gcs']}" in output
    assert f'eval "$(ray-slurm env {cluster.yaml})"' in output
    assert "Traceback" not in output
    assert str(cluster.root / "logs" / f"{head['node_id']}.log") in output
    # Not a terminal: a line per change, no flood.
    assert len([line for line in output.splitlines() if line.startswith("job ")]) <= 6


def test_a_shell_with_the_exports_sees_the_cluster_and_one_without_the_token_does_not(cluster):
    access = cluster.access()
    assert (
        "worker" not in subprocess.run([*RAY, "status"], env=access, capture_output=True, text=True, check=True).stdout
    )
    assert (os.stat(cluster.root).st_mode & 0o777, os.stat(access["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777) == (
        0o700,
        0o600,
    )
    without = {name: value for name, value in access.items() if not name.startswith("RAY_AUTH")}
    probe = "import ray; ray.init(); print('CONNECTED')"
    done = subprocess.run([sys.executable, "-c", probe], env=without, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert "CONNECTED" not in done.stdout
    wrong = {**without, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    assert subprocess.run([*RAY, "status"], env=wrong, capture_output=True, text=True, timeout=90).returncode != 0


def test_twelve_tasks_run_in_several_jobs_with_the_environment_of_the_yaml(cluster, tmp_path):
    seen = cluster.run_on_head(tasks_script(tmp_path, 12))
    assert len({task["job"] for task in seen}) >= 6
    assert len({task["node"] for task in seen}) == len({task["job"] for task in seen})
    # They were asked for together: nearly all are elements of one array, which a task does not see.
    assert len({task["job"].partition("_")[0] for task in seen}) <= 3
    for task in seen:
        assert task["env"] == {
            "MY_BLANK": "a b'c\"d",
            "MY_SETUP": "node",
            "MY_CHAIN": "init-setup-worker-node",
        }


def test_a_node_has_what_its_allocation_has(cluster):
    access = cluster.access()
    code = (
        "import ray, json; ray.init(log_to_driver=False);"
        "print('RESULT', json.dumps([[n['Resources'], n['Labels']] for n in ray.nodes() if n['Alive']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=access, capture_output=True, text=True, check=True)
    nodes = json.loads(done.stdout.partition("RESULT ")[2])
    workers = [(resources, labels) for resources, labels in nodes if labels["ray.io/node-group"] == "worker"]
    assert workers
    for resources, labels in workers:
        assert resources["CPU"] == 2
        assert resources["memory"] + resources["object_store_memory"] == 2**30
        assert labels["team"] == "blue"


def test_the_nodes_stay_the_same_when_the_diary_is_deleted(cluster):
    before = {job.job_id for job in cluster.jobs()}
    (cluster.root / "state.json").unlink()
    listed = cluster.ray("get-worker-ips", cluster.yaml).stdout.split()
    assert len(listed) == len(before) - 1
    # Several rounds of the autoscaler.
    rounds = _listings(cluster)
    wait_for(lambda: _listings(cluster) >= rounds + 4, 60, "four more rounds of the autoscaler")
    assert {job.job_id for job in cluster.jobs(everything=True)} == before


def test_a_second_ray_up_restarts_nothing_and_a_new_node_type_is_used(cluster, tmp_path):
    head = cluster.head_job()
    raylet = cluster.process(head.job_id, "raylet")
    cluster.config["available_node_types"]["big"] = {
        "max_workers": 1,
        "resources": {"special": 1},
        "node_config": {"sbatch": {"cpus_per_task": 3, "mem": "1G"}},
        "idle_timeout_s": 20,
    }
    output = cluster.up().stdout
    assert "nothing is restarted" in output
    assert cluster.process(head.job_id, "raylet") == raylet
    seen = cluster.run_on_head(tasks_script(tmp_path, 1, 'num_cpus=1, resources={"special": 1}'))
    assert cluster.head_job().job_id == head.job_id
    assert {job.job_id for job in cluster.jobs() if job.name == "ray-main-big"} == {seen[0]["job"]}


def test_each_gpu_worker_sees_just_its_own_gpu(cluster, tmp_path):
    seen = cluster.run_on_head(tasks_script(tmp_path, 2, "num_cpus=0, num_gpus=1, accelerator_type='A100'"))
    assert {task["slurm_node"] for task in seen} == {"g1"}
    assert {task["cuda"] for task in seen} == {"0", "1"}
    assert len({task["job"] for task in seen}) == 2


def test_a_job_whose_raylet_is_killed_is_gone_at_once(cluster):
    victim = wait_for(cluster.workers, 30, "a worker")[0]
    os.kill(cluster.process(victim.job_id, "raylet").pid, signal.SIGKILL)
    wait_for(lambda: victim.job_id not in {job.job_id for job in cluster.jobs()}, 15, f"the end of job {victim.job_id}")
    wait_for(lambda: not cluster.processes(victim.job_id), 15, "the end of its processes")


def test_a_worker_that_hears_of_its_time_limit_moves_its_work_away_and_ends(cluster, tmp_path):
    (seen,) = cluster.run_on_head(tasks_script(tmp_path, 1))
    job = seen["job"]
    # What `--signal=B:USR1@...` makes SLURM send.
    cluster.client.tools.run(["scancel", "--batch", "--signal=USR1", job])
    wait_for(lambda: job not in {job.job_id for job in cluster.jobs()}, 60, f"the end of job {job}")
    (log,) = cluster.root.glob(f"logs/{job}-*.log")
    assert "the time limit is near: Ray moves its work away" in log.read_text()
    cluster.wait_until_no_process_is_left(15, job)


@pytest.mark.parametrize("victim", ["agent", "guard"])
def test_a_job_whose_agent_or_guard_is_killed_leaves_nothing_behind(cluster, tmp_path, victim):
    (seen,) = cluster.run_on_head(tasks_script(tmp_path, 1))
    job = seen["job"]
    guard = cluster.process(job, "rsp-guard")
    agent = next(process for process in cluster.processes(job) if process.parent == guard.pid)
    os.kill((agent if victim == "agent" else guard).pid, signal.SIGKILL)
    wait_for(lambda: job not in {job.job_id for job in cluster.jobs()}, 15, f"the end of job {job}")
    cluster.wait_until_no_process_is_left(15, job)


def test_only_the_head_is_left_after_the_idle_time(cluster):
    wait_for(lambda: [job.name for job in cluster.jobs()] == ["ray-main-head"], 90, "only the head left")


def test_a_changed_head_says_what_it_will_do_and_gets_a_new_job(cluster):
    old = cluster.head_job().job_id
    cluster.config["available_node_types"]["head"]["node_config"]["env"] = {"MY_NEW": "1"}
    done = cluster.up()
    output = done.stdout + done.stderr
    assert "node_config.env.MY_NEW: None becomes '1'" in output
    assert "the job of the present one is cancelled, and all jobs of its workers" in output
    assert cluster.head_job().job_id != old
    assert (
        cluster.ray("exec", cluster.yaml, "--no-config-cache", "echo new=$MY_NEW; exit 3", check=False).returncode == 3
    )


def test_ray_down_leaves_nothing(cluster):
    temp_dir = json.loads((cluster.root / "head.json").read_text())["temp_dir"]
    assert os.path.isdir(temp_dir)
    started = time.monotonic()
    cluster.down()
    assert time.monotonic() - started < 60
    assert cluster.jobs() == []
    assert not [job for job in cluster.client.jobs() if job.state.label == "COMPLETING"]
    assert not cluster.root.exists()
    assert not os.path.exists(temp_dir)
    assert cluster.processes() == []


def _listings(cluster):
    """How often the controller was asked for jobs (sdiag)."""
    return controller_requests(cluster.client.tools.run(["sdiag"]).stdout)["REQUEST_JOB_INFO"]
