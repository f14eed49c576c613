"""Faults that are made once, each with a cluster of its own: those that end the head, and what people do at the same time."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from support import wait_for

from faults.faults import is_agent, is_monitor, kill, named
from ray_slurm_provider import procfs

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]


HEAD_ON_C1 = {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G", "nodelist": "c1"}}}


def _types(**options):
    worker = {"max_workers": 3, "idle_timeout_s": 10, "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G"}}}
    return {"worker": {**worker, **options}}


def _nothing_is_left(cluster, timeout_s=60):
    if cluster.driver is not None:
        cluster.driver.end()
    wait_for(lambda: not cluster.alive(), timeout_s, f"the end of every job: {cluster.alive()}")
    cluster.wait_until_no_process_is_left(30)


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("raylet", marks=pytest.mark.all_faults),
        pytest.param("gcs_server", marks=pytest.mark.all_faults),
        pytest.param("agent", marks=pytest.mark.all_faults),
        pytest.param("guard", marks=pytest.mark.all_faults),
        "host",
        pytest.param("network", marks=pytest.mark.all_faults),
    ],
)
def test_a_head_that_is_lost_takes_all_its_jobs_with_it_and_ray_up_begins_anew(make, lost):
    # One worker runs on another host, two wait for long: nobody but that one can end them.
    options = {"cpus_per_task": 2, "mem": "1G", "exclude": "c1"}
    types = {
        **_types(min_workers=1, max_workers=1, node_config={"sbatch": options}),
        "later": {
            "min_workers": 2,
            "max_workers": 2,
            "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G", "begin": "now+1hour"}},
        },
    }
    cluster = make("lost", types=types, head=HEAD_ON_C1)
    cluster.up()
    wait_for(lambda: len(cluster.alive(head=False)) == 3, 60, "three workers")
    wait_for(lambda: any(not job.queued for job in cluster.alive(head=False)), 60, "a worker that runs")
    wait_for(lambda: cluster.ready_workers() == 1, 90, "Ray on it")
    head, bed = cluster.head_node, cluster.bed
    if lost == "host":
        bed.node(head, "crash")
    elif lost == "network":
        bed.node(head, "cut")
    else:
        wanted = {"agent": is_agent, "guard": named("rsp-guard")}.get(lost, named(lost))
        assert kill(cluster, wanted, head=True)
    wait_for(lambda: not cluster.alive(head=True), 60, "the head's end")
    wait_for(lambda: not cluster.alive(head=False), 120, "the end of its workers, of those that wait, too")
    if lost == "host":
        bed.node(head, "boot")
    elif lost == "network":
        bed.node(head, "join")
    bed.wait_until_healthy()
    cluster.up()
    wait_for(lambda: len(cluster.alive(head=False)) == 3, 60, "new workers")
    assert len(cluster.alive(head=True)) == 1
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_what_a_lost_head_left_in_the_queue_goes_with_the_next_ray_up(make):
    later = {"sbatch": {"cpus_per_task": 2, "mem": "1G", "begin": "now+1hour"}}
    cluster = make("alone", types={"later": {"min_workers": 2, "max_workers": 2, "node_config": later}})
    cluster.up()
    wait_for(lambda: len(cluster.alive(head=False)) == 2, 60, "two workers that wait")
    left = {job.job_id for job in cluster.alive(head=False)}
    name = cluster.head_node
    cluster.bed.node(name, "crash")
    wait_for(lambda: not cluster.alive(head=True), 60, "the head's end")
    # Nobody is left to end them.
    listed = cluster.ray_slurm("gc", "--state-dir", cluster.config["provider"]["slurm"]["state_dir"]).stdout
    assert all(f"job {job_id}: " in listed for job_id in left)
    cluster.bed.node(name, "boot")
    cluster.bed.wait_until_healthy()
    cluster.up()
    wait_for(lambda: len(cluster.alive(head=False)) == 2, 60, "new ones")
    assert not left & {job.job_id for job in cluster.alive()}
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
@pytest.mark.parametrize("seconds", [20, 300])
def test_a_worker_whose_network_is_cut_is_replaced_and_leaves_nothing(make, seconds):
    cluster = make(
        "cut", types=_types(node_config={"sbatch": {"cpus_per_task": 2, "mem": "1G", "exclude": "c1"}}), head=HEAD_ON_C1
    )
    cluster.up()
    driver = cluster.start_driver(tasks=1, seconds=2)
    driver.want()
    driver.wait_for_wanted(120)
    (job,) = cluster.alive(head=False)
    began = time.monotonic()
    cluster.bed.node(job.nodes, "cut")
    driver.want()
    # SLURM gives the node up after 11 s, and Ray needs the longer for it.
    wait_for(lambda: job.job_id not in {found.job_id for found in cluster.alive(head=False)}, 60, "NODE_FAIL")
    time.sleep(max(0, began + seconds - time.monotonic()))
    cluster.bed.node(job.nodes, "join")
    driver.wait_for_wanted(240, "the work of the lost node")
    cluster.bed.wait_until_healthy()
    wait_for(
        lambda: not cluster.processes(job.job_id),
        90,
        "the end of its processes",
    )
    driver.finish()
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_a_controller_that_loses_its_jobs_loses_nothing_else(make):
    cluster = make("forgot", types=_types(min_workers=1))
    cluster.up()
    wait_for(lambda: cluster.ready_workers() == 1, 90, "a worker")
    cluster.bed.controller("crash")
    cluster.bed.controller("start", forget_jobs=True)
    cluster.bed.wait_until_healthy()
    # SLURM ends processes that it knows nothing of.
    cluster.wait_until_no_process_is_left(90)
    assert cluster.alive() == []
    cluster.up()
    wait_for(lambda: cluster.ready_workers() == 1, 90, "a worker of the new head")
    assert len(cluster.alive()) == 2
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_a_deleted_directory_is_told_everywhere_and_ray_down_and_ray_up_make_it_new(make):
    cluster = make("gone", types=_types())
    cluster.up()
    driver = cluster.start_driver(tasks=3, seconds=1)
    driver.want()
    driver.wait_for_wanted(120)
    log = cluster.head_monitor_log()
    before = len(log.read_text())
    shutil.rmtree(cluster.root)
    (head,) = cluster.alive(head=True)
    for words in (("exec", cluster.yaml, "true"), ("up", cluster.yaml, "--no-config-cache", "-y")):
        done = cluster.ray(*words, check=False)
        assert done.returncode == 1
        assert f"the directory of cluster gone was deleted while its head, job {head.job_id}-" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    for words in (("env", cluster.yaml), ("logs", cluster.yaml), ("ssh-command", cluster.yaml)):
        done = cluster.ray_slurm(*words, check=False)
        assert (done.returncode, "`ray down` ends the cluster" in done.stderr) == (1, True), done.stderr
    assert "was deleted while its head" in cluster.ray_slurm("nodes", cluster.yaml).stdout
    # Idle workers are still ended, and no job is submitted that could not work.
    wait_for(lambda: not cluster.alive(head=False), 60, "the end of idle workers")
    submitted = len(cluster.certified())
    driver.want()
    wait_for(lambda: "was the cluster's directory deleted?" in log.read_text(), 60, "the reason")
    assert len(cluster.certified()) == submitted
    assert "Traceback" not in log.read_text()[before:]
    assert [job.job_id for job in cluster.alive()] == [head.job_id]
    assert not cluster.root.exists()
    driver.end()
    cluster.down()
    _nothing_is_left(cluster)
    cluster.up()
    assert cluster.head()["ray"] == "up"
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_the_disk_may_be_full(make, small_disk):
    cluster = make("disk", types=_types(), state_dir=small_disk)
    cluster.up()
    driver = cluster.start_driver(tasks=3, seconds=1)
    driver.want()
    driver.wait_for_wanted(120)
    wait_for(lambda: not cluster.alive(head=False), 60, "the end of idle workers")
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler"], capture_output=True)
    driver.want()
    time.sleep(15)
    (small_disk / "filler").unlink()
    driver.wait_for_wanted(180, "the workload to go on when there is room again")
    driver.finish()
    cluster.down()
    _nothing_is_left(cluster)
    assert not cluster.root.exists()


def test_an_sbatch_that_gives_no_answer_is_not_repeated(make):
    cluster = make("answer", types=_types())
    log = cluster.bed.box.paths.logs / "slurmctld.log"
    before = log.read_text().count("_slurm_rpc_submit_batch_job")
    # The job is submitted, and then the tool hangs for longer than it may, or says that it could not reach anybody.
    once = cluster.bed.parent / "once"
    hang = f'real "$@" >/dev/null; if mkdir {once} 2>/dev/null; then exec sleep 60; fi'
    fail = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    cluster.bed.trouble("sbatch", f"{hang}; {fail}")
    cluster.up()
    driver = cluster.start_driver(tasks=3, seconds=1)
    driver.want()
    driver.wait_for_wanted(120)
    assert once.exists()
    cluster.bed.trouble("sbatch", None)
    once.rmdir()
    assert len(cluster.alive(head=True)) == 1
    assert len(cluster.alive(head=False)) <= 3
    # Every submission, whether a job or an array, was found by its certificate.
    tokens = {found.token for _, found in cluster.certified()}
    assert log.read_text().count("_slurm_rpc_submit_batch_job") - before == len(tokens)
    driver.finish()
    cluster.down()
    _nothing_is_left(cluster)


def test_two_ray_ups_and_two_ray_downs_at_once(make):
    cluster = make("twice", types=_types(min_workers=2))
    ups = [cluster.start("up", cluster.yaml, "--no-config-cache", "-y") for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in ups]
    assert [child.returncode for child in ups] == [0, 0], outputs
    heads = [job for job, found in cluster.certified() if not found.head]
    assert len(heads) == 1
    wait_for(lambda: len(cluster.alive(head=False)) == 2, 60, "two workers")
    downs = [cluster.start("down", cluster.yaml, "-y") for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in downs]
    assert [child.returncode for child in downs] == [0, 0], outputs
    assert not any("Traceback" in output for output in outputs)
    _nothing_is_left(cluster)
    assert not cluster.root.exists()


@pytest.mark.all_faults
def test_ray_down_while_jobs_are_being_submitted(make):
    cluster = make("late", types=_types(max_workers=30))
    cluster.bed.trouble("sbatch", "sleep 0.5")
    cluster.up()
    driver = cluster.start_driver(tasks=30, seconds=60)
    driver.want()
    wait_for(lambda: len(cluster.alive(head=False)) >= 2, 60, "the first of many workers")
    cluster.down()
    _nothing_is_left(cluster)
    assert not cluster.root.exists()


@pytest.mark.all_faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ray_up_may_be_interrupted_at_every_step(make, number):
    cluster = make("steps", types=_types(max_workers=1))
    steps = 0
    delay = 0.3
    while True:
        child = cluster.start("up", cluster.yaml, "--no-config-cache", "-y")
        try:
            child.wait(delay)
            break
        except subprocess.TimeoutExpired:
            target = [p for p in procfs.descendants(child.pid) if p.name.startswith("python")]
            os.kill(target[0].pid if target else child.pid, number)
        output = child.communicate(timeout=60)[0]
        if number == signal.SIGINT and delay > 2.0:
            assert "Traceback" not in output, output
        assert len(cluster.alive(head=True)) <= 1
        steps += 1
        delay += 0.7
    assert child.returncode == 0
    assert steps >= 3
    heads = [job for job, found in cluster.certified() if not found.head and job.alive]
    assert len(heads) == 1
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_odd_names_and_strangers(make, tmp_path):
    home = tmp_path / 'hôme of "o\'neil"'
    cluster = make("a.b-c_1", types={"größe 2 'x\"": _types()["worker"]})
    cluster.environ["HOME"] = str(home)
    home.mkdir()
    cluster.config["provider"]["slurm"]["state_dir"] = "~/state dir"
    cluster.environ["USER"] = "so mebödy"
    cluster.up()
    driver = cluster.start_driver(tasks=2, seconds=1)
    driver.want()
    driver.wait_for_wanted(120)
    nodes = json.loads(cluster.ray_slurm("nodes", "--json", cluster.yaml).stdout)
    assert {row["type"] for row in nodes} == {"head", "größe 2 'x\""}
    driver.finish()
    cluster.down()
    _nothing_is_left(cluster)


def test_what_is_left_over_is_found_and_removed(make):
    options = {"cpus_per_task": 2, "mem": "1G", "exclude": "c1"}
    cluster = make("left", types=_types(min_workers=1, node_config={"sbatch": options}), head=HEAD_ON_C1)
    cluster.up()
    state = cluster.config["provider"]["slurm"]["state_dir"]
    wait_for(lambda: cluster.ready_workers() == 1, 90, "a worker")
    cluster.bed.tell("sbatch", "-H", "-J", "ray-left-worker", "-o", "/dev/null", "--wrap", "true")
    line = cluster.ray_slurm("gc", "--state-dir", state).stdout
    assert line == "nothing is left over\n"
    monitor = next(process for process in cluster.processes() if is_monitor(process))
    # Nobody is left to end the worker: the head's host is gone, and the worker hangs.
    workers = [p for p in cluster.processes() if p.pid != monitor.pid and not _on_head(cluster, p)]
    procfs.send(workers, signal.SIGSTOP)
    cluster.bed.node(cluster.head_node, "crash")
    wait_for(lambda: not cluster.alive(head=True), 60, "the end of the head")
    (worker,) = cluster.alive(head=False)
    listed = cluster.ray_slurm("gc", "--state-dir", state).stdout
    assert f"job {worker.job_id}: a worker of cluster left" in listed
    assert "--yes" in listed
    assert cluster.alive(head=False)
    cluster.ray_slurm("gc", "--yes", "--state-dir", state)
    procfs.send(workers, signal.SIGCONT)
    wait_for(lambda: not cluster.alive(), 30, "its end")
    (stranger,) = [job for job in cluster.client.jobs() if job.alive]
    assert stranger.name == "ray-left-worker"
    cluster.client.cancel([stranger.job_id])


def _on_head(cluster, process):
    return f"SLURMD_NODENAME={cluster.head_node}".encode() in process.read("environ").split(b"\0")


def test_a_type_that_fails_pauses_and_is_resumed(make, tmp_path):
    works = tmp_path / "works"
    types = _types(
        node_config={"sbatch": {"cpus_per_task": 2, "mem": "1G"}, "setup": [f"ls {shlex.quote(str(works))}"]}
    )
    cluster = make("pause", types=types, slurm={"pause_after_failures": 3})
    cluster.up()
    driver = cluster.start_driver(tasks=1, seconds=1)
    driver.want()

    def paused():
        return "it pauses until `ray-slurm resume`" in cluster.ray_slurm("nodes", cluster.yaml).stdout

    wait_for(paused, 120, "the pause", poll_s=1)
    text = cluster.ray_slurm("nodes", cluster.yaml).stdout
    assert "cannot access" in text
    assert "setup[0] failed with exit code 2" in text
    submitted = len(cluster.certified())
    time.sleep(5)
    assert len(cluster.certified()) == submitted
    works.touch()
    assert cluster.ray_slurm("resume", cluster.yaml, "nope", check=False).returncode == 1
    assert cluster.ray_slurm("resume", cluster.yaml, "worker").stdout.startswith("resumed: worker")
    driver.wait_for_wanted(60, "the workload")
    driver.finish()
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_what_slurm_would_never_start_is_told_and_withdrawn(make):
    options = {"cpus_per_task": 2, "mem": "1G"}
    types = {
        "long": {"min_workers": 1, "max_workers": 1, "node_config": {"sbatch": {**options, "time": "30-00:00:00"}}},
        "fourth": {
            "min_workers": 1,
            "max_workers": 1,
            "node_config": {"sbatch": {**options, "constraint": "c4", "begin": "now+20"}},
        },
    }
    cluster = make("never", types=types)
    cluster.up()
    wait_for(lambda: len(cluster.certified()) >= 3, 60, "two workers")
    # The nodes of a type leave the partition while its job waits.
    cluster.bed.tell("scontrol", "update", "PartitionName=cpu", "Nodes=c1,c2,c3")
    try:

        def told(*words):
            text = cluster.ray_slurm("nodes", cluster.yaml).stdout
            return all(word in text for word in words)

        wait_for(
            lambda: told("PartitionTimeLimit (its time is more", "never start a job of type long"), 60, "the reason"
        )
        wait_for(lambda: told("BadConstraints (no node fulfils", "never start a job of type fourth"), 90, "the other")
        log = cluster.head_monitor_log().read_text()
        assert (
            "waits in vain: PartitionTimeLimit (its time is more than the partition allows; it will never start)" in log
        )

        def failures():
            return cluster.ray("exec", cluster.yaml, "ray status").stdout.partition("Recent failures:")[2]

        for node_type in ("long", "fourth"):
            wait_for(
                lambda kind=node_type: f"{kind}: LaunchFailed" in failures(),
                60,
                f"the failure of {node_type}",
                poll_s=2,
            )
    finally:
        cluster.bed.tell("scontrol", "update", "PartitionName=cpu", "Nodes=c1,c2,c3,c4")
    # The site has mended it: the next try succeeds, without hands.
    wait_for(lambda: cluster.ready_workers() == 1, 150, "a worker of the fourth machine", poll_s=1)
    cluster.down()
    _nothing_is_left(cluster)


@pytest.mark.all_faults
def test_a_head_that_slurm_would_never_start_ends_ray_up(make):
    head = {
        "resources": {"CPU": 0},
        "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G", "time": "30-00:00:00"}},
    }
    cluster = make("never", types=_types(), head=head)
    done = cluster.up(check=False)
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "was cancelled: PartitionTimeLimit (its time is more than the partition allows; it will never start)" in text
    assert "Traceback" not in text
    assert not cluster.alive()


@pytest.mark.all_faults
def test_a_queued_job_is_withdrawn_when_nobody_needs_it_any_more_and_not_before(make):
    later = {"sbatch": {"cpus_per_task": 2, "mem": "1G", "begin": "now+1hour"}}
    cluster = make("needed", types={"later": {"max_workers": 2, "node_config": later}}, slurm={"withdraw_after_s": 5})
    cluster.up()
    driver = cluster.start_driver(tasks=1, seconds=1)
    driver.want()
    (job,) = wait_for(lambda: cluster.alive(head=False), 60, "the job")
    time.sleep(15)
    assert [found.job_id for found in cluster.alive(head=False)] == [job.job_id]
    text = cluster.ray_slurm("nodes", cluster.yaml).stdout
    assert "waits: reason BeginTime (its begin time is not reached" in text
    assert "start expected 20" in text
    driver.end()
    wait_for(lambda: not cluster.alive(head=False), 60, "its end")
    cluster.down()
    _nothing_is_left(cluster)
