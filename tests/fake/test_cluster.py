"""The cluster service over the fake tools: what it believes, and what it does not."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import click
import pytest
from ray.scripts import scripts

from fake.fake_slurm import HEADER
from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider import cluster, cluster_dir, files
from ray_slurm_provider.agent.ray_command import HEAD_PORTS, start_environment
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.deferred_launches import DeferredLaunches
from ray_slurm_provider.errors import (
    HeadFailed,
    LaunchDelayed,
    NodeNotFound,
    SlurmError,
    SlurmParseError,
    SlurmUnavailable,
    StateError,
    SubmitRejected,
)
from ray_slurm_provider.head_wait import wait_for_head
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.nodes import TAG_KIND, TAG_STATUS, TAG_TYPE
from ray_slurm_provider.reports import ENDED, READY, NodeReport, write_report
from ray_slurm_provider.sbatch_options import SbatchOptions

CONFIG = NodeConfig()
HEADER_ONLY = HEADER + "\n"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def settings(tmp_path):
    return SlurmSettings(
        state_dir=str(tmp_path / "state"), command_timeout_s=1, default_python="/usr/bin/python3", **EAGER
    )


@pytest.fixture
def login(fake_slurm, settings, clock):
    """The cluster as `ray up` sees it."""
    return Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)


@pytest.fixture
def head_id(login):
    return login.create_head("head", CONFIG, HEAD)


@pytest.fixture
def monitor(login, head_id, fake_slurm, settings, clock, monkeypatch):
    """The cluster as the autoscaler on the head sees it; each reason is news, nothing is held."""
    monkeypatch.setattr(DeferredLaunches, "is_news", lambda *_: True)
    environ = {
        **fake_slurm.environ,
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_SLURM_GCS_ADDRESS": "1.2.3.4:5",
        "RAY_SLURM_DIR": str(login.directory.root),
    }
    return Cluster("c", settings, environ, clock=clock, wall_clock=clock)


def test_a_job_is_listed_as_soon_as_it_is_submitted_with_all_its_tags(login, head_id):
    node = login.nodes()[head_id]
    assert node.tags == HEAD
    assert node.seen.queued
    assert node.address == f"slurm-job-{head_id}"


def test_the_autoscaler_cannot_end_its_own_head(login, monitor, head_id, fake_slurm):
    fake_slurm.change(head_id.partition("-")[0], state="RUNNING")
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.terminate([head_id, worker])
    assert set(login.nodes()) == {head_id}
    login.terminate([head_id])
    assert login.nodes() == {}


@pytest.mark.parametrize("where", ["head", "worker"])
def test_a_driver_on_a_node_is_not_the_autoscaler(login, monitor, settings, head_id, fake_slurm, tmp_path, where):
    """It has what the node's job gave Ray."""
    fake_slurm.change(head_id.partition("-")[0], state="RUNNING")
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    place = {"RAY_CLOUD_INSTANCE_ID": head_id if where == "head" else worker}
    environ = {**fake_slurm.environ, **place, "RAY_SLURM_DIR": str(login.directory.root)}
    environ |= start_environment(AgentSpec("c", "d", str(tmp_path)), {}, dict.fromkeys(HEAD_PORTS, 1), {})
    driver = Cluster("c", settings, environ)
    with pytest.raises(StateError, match="not a head's"):
        driver.create_workers("worker", CONFIG, WORKER, 1)
    assert set(driver.nodes()) == {head_id, worker}
    driver.terminate([head_id])
    assert login.head() is None


def test_a_listing_is_shared_for_a_moment_and_dropped_by_what_changes_it(login, head_id, fake_slurm, clock):
    login.nodes()
    asked = fake_slurm.calls("squeue")
    login.nodes()
    assert fake_slurm.calls("squeue") == asked
    clock.now += 6
    login.nodes()
    assert fake_slurm.calls("squeue") == asked + 1
    login.terminate([head_id])
    assert head_id not in login.nodes()


def test_one_question_lists_any_number_of_nodes(monitor, fake_slurm, clock):
    monitor.create_workers("worker", CONFIG, WORKER, 12)
    clock.now += 10
    asked = fake_slurm.calls("squeue")
    assert len(monitor.nodes()) == 13
    for node_id in monitor.nodes():
        assert monitor.last_seen(node_id).tags[TAG_KIND] in {"head", "worker"}
        assert monitor.is_alive(node_id)
    assert fake_slurm.calls("squeue") == asked + 1


@pytest.mark.parametrize(
    "faults",
    [
        {"down": ["squeue"]},
        {"hang": ["squeue"]},
        {"squeue": ""},
        {"squeue": "half"},
        {"squeue": "slurm is being upgraded\n"},
        # A header alone, though this very job runs: an answer for another cluster.
        {"squeue": HEADER_ONLY},
    ],
    ids=["down", "hang", "empty", "half a line", "garbage", "another cluster"],
)
def test_what_is_not_an_answer_is_an_error_and_never_an_empty_list(monitor, fake_slurm, clock, faults):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    before = set(monitor.nodes())
    clock.now += 10
    fake_slurm.faults(**faults)
    with pytest.raises(SlurmError):
        monitor.nodes()
    fake_slurm.faults()
    asked = fake_slurm.calls("squeue")
    with pytest.raises(SlurmError):
        monitor.nodes()
    # It is left in peace for a moment.
    assert fake_slurm.calls("squeue") == asked
    clock.now += 2
    assert set(monitor.nodes()) == before
    assert worker in before


def test_a_job_that_the_answer_lacks_is_asked_for_before_it_counts_as_gone(monitor, fake_slurm, clock):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert worker in monitor.nodes()
    job = worker.partition("-")[0]
    fake_slurm.change(job, forgotten=True)
    clock.now += 10
    with pytest.raises(SlurmParseError, match="which the controller knows"):
        monitor.nodes()
    fake_slurm.change(job, purged=True)
    clock.now += 2
    assert worker not in monitor.nodes()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("/usr/local/bin/scontrol: line 3: /opt/slurm/bin/scontrol: command not found\n", 127),
        ("module slurm not found\n", 1),
        ("scontrol: error: Invalid job id specified by the wrapper\n", 1),
        ("Invalid job id specified\n", 77),
        ("", 0),
        ("*** Welcome ***\n", 0),
    ],
)
def test_what_a_wrapper_says_is_no_word_of_slurms(monitor, fake_slurm, clock, words, code):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert worker in monitor.nodes()
    fake_slurm.change(worker.partition("-")[0], forgotten=True)
    fake_slurm.faults(scontrol=(words, code))
    clock.now += 10
    with pytest.raises(SlurmError):
        monitor.nodes()
    fake_slurm.faults()
    fake_slurm.change(worker.partition("-")[0], forgotten=False)
    clock.now += 10
    assert worker in monitor.nodes()


@pytest.mark.parametrize("trace", ["tags", "report"])
def test_a_new_process_does_not_believe_that_the_head_is_gone_either(
    login, head_id, fake_slurm, settings, clock, trace
):
    if trace == "tags":
        login.set_tags(head_id, {TAG_STATUS: "up-to-date"})
    else:
        write_report(login.directory.reports, NodeReport(head_id, READY), head=True)
    fake_slurm.faults(squeue=HEADER_ONLY)
    another = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    for action in (another.nodes, lambda: another.create_head("head", CONFIG, HEAD)):
        with pytest.raises(SlurmParseError, match="which the controller knows"):
            action()
    assert len(fake_slurm.jobs()) == 1
    fake_slurm.faults()
    fake_slurm.change(head_id.partition("-")[0], forgotten=True, purged=True)
    clock.now += 10
    assert another.nodes() == {}


def test_the_directory_stays_until_slurm_really_says_that_all_is_over(login, head_id, fake_slurm, monkeypatch):
    login.nodes()
    monkeypatch.setattr("ray_slurm_provider.cluster._CLEANUP_TIMEOUT_S", 2)
    for faults in ({"squeue": HEADER_ONLY}, {"down": ["squeue"]}, {"down": ["scancel"]}):
        fake_slurm.faults(**faults)
        with pytest.raises(StateError, match="have not ended"):
            login.clean_up()
        assert login.directory.exists
    fake_slurm.faults()
    login.clean_up()
    assert not login.directory.exists


def test_a_submission_without_an_answer_is_found_and_not_repeated(monitor, fake_slurm):
    fake_slurm.faults(lost=True)
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.faults()
    assert worker in monitor.nodes()
    assert len(fake_slurm.jobs()) == 2


def test_a_submission_that_reached_nobody_is_an_error(monitor, fake_slurm):
    fake_slurm.faults(down=["sbatch"])
    with pytest.raises(SlurmUnavailable):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert len(fake_slurm.jobs()) == 1


def test_a_refused_submission_has_a_category(monitor, fake_slurm):
    fake_slurm.faults(refuse="Invalid partition name specified")
    with pytest.raises(SubmitRejected) as error:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert error.value.category == "partition"


def test_a_job_that_ended_before_it_was_listed_is_listed_once(monitor, fake_slurm, clock):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(worker.partition("-")[0], state="FAILED")
    assert worker in monitor.nodes()
    clock.now += 10
    assert worker not in monitor.nodes()
    assert monitor.last_seen(worker).tags == WORKER


def test_a_job_that_a_crashed_controller_forgot_is_listed_once(monitor, fake_slurm, clock):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    job = worker.partition("-")[0]
    fake_slurm.change(job, forgotten=True)
    with pytest.raises(SlurmParseError, match="which the controller knows"):
        monitor.nodes()
    fake_slurm.change(job, purged=True)
    clock.now += 10
    assert monitor.nodes()[worker].tags == WORKER
    assert not monitor.nodes()[worker].seen.alive
    clock.now += 10
    assert worker not in monitor.nodes()
    # It was no fault of its type.
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)


def test_a_type_whose_nodes_do_not_come_up_is_tried_again_after_a_pause(monitor, fake_slurm, clock):
    def fail():
        (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
        monitor.directory.reports.reason(worker).write_text("setup[0] failed with exit code 1: false\n")
        monitor.nodes()
        fake_slurm.change(worker.partition("-")[0], state="FAILED")
        for _ in range(2):
            clock.now += 2
            monitor.nodes()

    for _ in range(3):
        fail()
    submitted = len(fake_slurm.jobs())
    with pytest.raises(LaunchDelayed, match="setup.0. failed with exit code 1") as error:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert error.value.launch_category == "slurm-backoff"
    assert len(fake_slurm.jobs()) == submitted
    monitor.create_workers("other", CONFIG, {**WORKER, TAG_TYPE: "other"}, 1)
    clock.now += 10
    monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert len(fake_slurm.jobs()) == submitted + 2


def test_a_type_that_goes_on_failing_pauses_until_a_person_resumes_it(
    monitor, login, head_id, fake_slurm, settings, clock
):
    for _ in range(settings.pause_after_failures):
        clock.now += 700
        (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
        monitor.log_of(worker).write_text("module: command not found\n")
        monitor.nodes()
        fake_slurm.change(worker.partition("-")[0], state="FAILED")
        for _ in range(2):
            clock.now += 2
            monitor.nodes()
    clock.now += 10**6
    with pytest.raises(LaunchDelayed, match=r"(?s)6 starts.*FAILED.*module: command not found"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    login.nodes()
    assert "until `ray-slurm resume`" in login.launches.summary()[0]
    # Another autoscaler, after the first was killed, knows it too.
    again = Cluster("c", settings, monitor._environ, clock=clock, wall_clock=clock)
    again.nodes()
    with pytest.raises(LaunchDelayed):
        again.create_workers("worker", CONFIG, WORKER, 1)
    assert login.launches.resume("other") == []
    assert login.launches.resume() == ["worker"]
    clock.now += 2
    monitor.nodes()
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert login.launches.resume() == []


@pytest.mark.parametrize("state", ["lost", "unreadable", "broken"])
def test_a_state_file_that_cannot_be_read_lifts_no_pause(monitor, login, clock, state):
    with login.directory.change_diary() as diary:
        diary.launches.failed("worker", "module: command not found", clock.now, pause_after=1)
    clock.now += 2
    monitor.nodes()
    path = monitor.directory.root / "state.json"
    path.unlink()
    if state == "unreadable":
        path.symlink_to(path)  # too many levels of symbolic links
    if state == "broken":
        path.write_bytes(b"\xff{")
    for _ in range(2):
        clock.now += 2
        monitor.nodes()
        with pytest.raises(LaunchDelayed, match="command not found"):
            monitor.create_workers("worker", CONFIG, WORKER, 1)


def _fail_on_c7(monitor, fake_slurm, clock):
    """Launch a worker and have it fail on a host."""
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.nodes()
    fake_slurm.change(worker.partition("-")[0], state="FAILED", nodes="c7")
    for _ in range(2):
        clock.now += 2
        monitor.nodes()


def test_a_host_where_starts_fail_is_excluded_and_the_users_own_exclusions_stay(monitor, fake_slurm, clock):
    def start(config=CONFIG):
        (worker,) = monitor.create_workers("worker", config, WORKER, 1)
        monitor.nodes()
        return worker.partition("-")[0]

    for _ in range(2):
        _fail_on_c7(monitor, fake_slurm, clock)
    assert "#SBATCH --exclude=c7\n" in fake_slurm.script(start())
    assert "#SBATCH --exclude=c1,c7\n" in fake_slurm.script(start(NodeConfig(sbatch=SbatchOptions(exclude="c1"))))
    assert "--exclude" not in fake_slurm.script(start(NodeConfig(sbatch=SbatchOptions(nodelist="c7"))))
    clock.now += 1801
    assert "--exclude" not in fake_slurm.script(start())


def test_without_other_hosts_an_avoided_one_is_better_than_none(monitor, fake_slurm, clock):
    for _ in range(2):
        _fail_on_c7(monitor, fake_slurm, clock)
    fake_slurm.faults(refuse_with={"exclude": "Requested node configuration is not available"})
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert "--exclude" not in fake_slurm.script(worker.partition("-")[0])


def test_a_node_that_came_up_and_settled_forgives_what_was(monitor, fake_slurm, clock):
    _fail_on_c7(monitor, fake_slurm, clock)
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(worker.partition("-")[0], state="RUNNING", nodes="c7")
    write_report(monitor.directory.reports, NodeReport(worker, READY, ready_at=1), head=False)
    for seconds, kept in ((2, True), (31, False)):
        clock.now += seconds
        monitor.nodes()
        assert ("worker" in monitor.directory.diary().launches.types) == kept


def test_slurms_limit_on_queued_jobs_is_not_asked_against_in_every_round(monitor, fake_slurm, clock):
    fake_slurm.faults(refuse="QOSMaxSubmitJobPerUserLimit\nJob violates accounting/QOS policy")
    with pytest.raises(SubmitRejected) as error:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert error.value.not_now
    asked = fake_slurm.calls("sbatch")
    with pytest.raises(LaunchDelayed, match="QOSMaxSubmitJobPerUserLimit") as delayed:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert delayed.value.launch_category == "slurm-limit"
    assert fake_slurm.calls("sbatch") == asked
    fake_slurm.faults()
    clock.now += 16
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert "worker" not in [
        name for name, record in monitor.directory.diary().launches.types.items() if record.failures
    ]


def test_what_slurm_refuses_is_asked_for_less_and_less_often(monitor, fake_slurm, clock):
    fake_slurm.faults(refuse="Invalid partition name specified")
    waits = []
    for _ in range(4):
        with pytest.raises(SubmitRejected):
            monitor.create_workers("worker", CONFIG, WORKER, 1)
        began = clock.now
        while True:
            clock.now += 1
            with pytest.raises((LaunchDelayed, SubmitRejected)) as error:
                monitor.create_workers("worker", CONFIG, WORKER, 1)
            if isinstance(error.value, SubmitRejected):
                break
            assert error.value.launch_category == "slurm-partition"
        waits.append(clock.now - began)
        clock.now += 1000
    assert waits == sorted(waits)
    assert waits[0] >= 10
    assert waits[-1] > 100


def test_a_job_that_slurm_would_never_start_is_withdrawn_and_its_type_told(monitor, fake_slurm, clock, caplog):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(worker.partition("-")[0], reason="PartitionTimeLimit")
    clock.now += 2
    assert worker in monitor.nodes()
    assert "waits in vain: PartitionTimeLimit (its time is more than the partition allows" in caplog.text
    clock.now += 6
    monitor.nodes()
    clock.now += 2
    assert worker not in monitor.nodes()
    with pytest.raises(LaunchDelayed, match="PartitionTimeLimit") as delayed:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert delayed.value.launch_category == "slurm-never"
    clock.now += 30
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)


@pytest.mark.parametrize(
    "reason", ["Priority", "Resources", "JobHeldAdmin", "JobHeldUser", "PartitionDown", "BrandNew"]
)
def test_a_queued_job_keeps_its_place_for_days(monitor, fake_slurm, clock, reason):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(worker.partition("-")[0], reason=reason)
    for _ in range(5):
        clock.now += 24 * 3600
        assert worker in monitor.nodes()
    assert len(fake_slurm.jobs()) == 2


def test_a_head_that_slurm_would_never_start_is_cancelled_and_the_user_told(login, head_id, fake_slurm, clock):
    fake_slurm.change(head_id.partition("-")[0], reason="BadConstraints")

    def tell(node):
        clock.now += 3

    with pytest.raises(HeadFailed, match=r"BadConstraints \(no node fulfils"):
        wait_for_head(login, head_id, tell, pytest.fail, poll_s=0, ask_s=0, clock=clock)
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED"


def test_a_diary_that_cannot_be_read_just_now_stays(login, head_id, clock, monkeypatch):
    login.set_tags(head_id, {"x": "y"})
    read = files.open_file

    def stale(path):
        if path.name == "state.json":
            raise OSError(116, "Stale file handle")
        return read(path)

    monkeypatch.setattr(files, "open_file", stale)
    clock.now += 10
    assert head_id in login.nodes()
    with pytest.raises(StateError, match="cannot be read"):
        login.set_tags(head_id, {"y": "z"})
    monkeypatch.undo()
    clock.now += 10
    assert login.nodes()[head_id].tags["x"] == "y"


def test_a_broken_diary_is_put_aside_and_told_once(login, head_id, clock, caplog):
    path = login.directory.root / "state.json"
    path.write_text('{"version": 2, "ta')
    for _ in range(3):
        clock.now += 10
        assert head_id in login.nodes()
    assert caplog.text.count("cannot be read") == 1
    (aside,) = path.parent.glob("state.json.broken-*")
    assert aside.read_text() == '{"version": 2, "ta'


def test_a_diary_of_an_older_version_is_taken_over(login, head_id, clock):
    path = login.directory.root / "state.json"
    path.write_text(json.dumps({"version": 1, "tags": {head_id: {TAG_STATUS: "up-to-date"}}}))
    clock.now += 10
    assert login.nodes()[head_id].tags[TAG_STATUS] == "up-to-date"
    login.set_tags(head_id, {"x": "y"})
    assert json.loads(path.read_text())["version"] == 2
    clock.now += 10
    assert login.nodes()[head_id].tags[TAG_STATUS] == "up-to-date"


def test_a_diary_of_a_newer_version_is_refused_and_left_alone(login, head_id, clock):
    path = login.directory.root / "state.json"
    text = json.dumps({"version": 3, "tags": [["something", "new"]]})
    path.write_text(text)
    clock.now += 10
    for action in (login.nodes, lambda: login.set_tags(head_id, {"x": "y"})):
        with pytest.raises(StateError, match=r"(?s)newer ray-slurm-provider.*use that version"):
            action()
    assert path.read_text() == text


@pytest.mark.parametrize("state", ["CONFIGURING", "SUSPENDED", "STAGE_OUT", "REQUEUED", "NEVER_HEARD_OF"])
def test_states_that_are_not_an_end_count_as_alive(monitor, fake_slurm, clock, state):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.nodes()
    fake_slurm.change(worker.partition("-")[0], state=state)
    clock.now += 10
    assert worker in monitor.nodes()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED"])
def test_states_that_are_an_end_count_as_ended(monitor, fake_slurm, clock, state):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.nodes()
    fake_slurm.change(worker.partition("-")[0], state=state)
    clock.now += 10
    assert worker not in monitor.nodes()


def test_workers_of_another_head_are_not_the_autoscalers_business(monitor, fake_slurm, settings, clock):
    monitor.create_workers("worker", CONFIG, WORKER, 1)
    other = Cluster(
        "c",
        settings,
        {**fake_slurm.environ, "RAY_CLOUD_INSTANCE_ID": "9-old", "RAY_SLURM_GCS_ADDRESS": "x:1"},
        clock=clock,
    )
    (stranger,) = other.create_workers("worker", CONFIG, WORKER, 1)
    clock.now += 10
    assert stranger not in monitor.nodes()
    assert len(monitor.nodes()) == 2


def test_a_new_head_ends_what_a_lost_one_left(login, monitor, head_id, fake_slurm, clock):
    fake_slurm.change(head_id.partition("-")[0], state="RUNNING")
    monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(head_id.partition("-")[0], state="NODE_FAIL")
    clock.now += 10
    again = login.create_head("head", CONFIG, HEAD)
    assert [job["state"] for job in fake_slurm.jobs()] == ["NODE_FAIL", "CANCELLED", "PENDING"]
    clock.now += 10
    assert set(login.nodes()) == {again}


def test_a_second_ray_up_finds_the_head_of_the_first(login, head_id, fake_slurm, settings, clock):
    other = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    login.set_tags(head_id, {TAG_STATUS: "waiting-for-ssh"})
    assert other.create_head("head", CONFIG, HEAD) == head_id
    assert len(fake_slurm.jobs()) == 1
    with pytest.raises(StateError, match="with another configuration meanwhile"):
        other.create_head("head", CONFIG, {**HEAD, "ray-launch-config": "another"})


def test_a_job_whose_end_the_controller_forgot_is_cancelled(monitor, fake_slurm, clock):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    job = worker.partition("-")[0]
    fake_slurm.change(job, state="RUNNING")
    write_report(monitor.directory.reports, NodeReport(worker, READY, ready_at=1), head=False)
    clock.now += 100
    assert worker in monitor.nodes()
    write_report(monitor.directory.reports, NodeReport(worker, ENDED, ready_at=1), head=False)
    for seconds, state in ((2, "RUNNING"), (30, "RUNNING"), (40, "RUNNING"), (6, "CANCELLED")):
        clock.now += seconds
        monitor.nodes()
        assert next(found for found in fake_slurm.jobs() if found["id"] == job)["state"] == state
    clock.now += 2
    assert worker not in monitor.nodes()


def test_two_clusters_of_one_name_in_two_places_do_not_see_each_other(login, head_id, fake_slurm, tmp_path, clock):
    other = Cluster(
        "c", SlurmSettings(state_dir=str(tmp_path / "elsewhere")), fake_slurm.environ, clock=clock, wall_clock=clock
    )
    assert other.nodes() == {}


def test_a_job_id_that_was_given_out_again_is_not_cancelled(login, head_id, fake_slurm, clock):
    login.nodes()
    job = head_id.partition("-")[0]
    fake_slurm.change(job, comment="somebody else's", name="precious", state="RUNNING")
    clock.now += 10
    login.terminate([head_id])
    assert fake_slurm.jobs()[0]["state"] == "RUNNING"


def test_terminating_twice_is_no_error(monitor):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.terminate([worker])
    monitor.terminate([worker])
    assert worker not in monitor.nodes()


def test_tags_outlive_the_process_and_the_loss_of_the_diary(login, head_id, fake_slurm, settings, clock):
    login.set_tags(head_id, {TAG_STATUS: "up-to-date"})
    again = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    assert again.nodes()[head_id].tags[TAG_STATUS] == "up-to-date"
    (login.directory.root / "state.json").write_text('{"version": 1, "tags": {"1-')
    clock.now += 10
    assert again.nodes()[head_id].tags[TAG_STATUS] == "up-to-date"
    anew = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    assert anew.nodes()[head_id].tags == HEAD


def test_nothing_is_submitted_while_the_cluster_is_taken_down(login, head_id, monitor, fake_slurm):
    login.nodes()
    login.terminate([head_id])
    with pytest.raises(StateError, match="being taken down"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert len(fake_slurm.jobs()) == 1
    login.create_head("head", CONFIG, HEAD)
    assert not login.directory.stopping


@pytest.mark.parametrize("error", [SlurmUnavailable(["scancel"], 1, "", "no answer"), KeyboardInterrupt()])
def test_a_head_that_could_not_be_ended_goes_on_scaling(login, head_id, monitor, monkeypatch, error):
    def fail(*_):
        raise error

    login.nodes()
    monkeypatch.setattr(login._backend._jobs._client, "cancel", fail)
    with pytest.raises(type(error)):
        login.terminate([head_id])
    monkeypatch.setattr(cluster, "_CLEANUP_TIMEOUT_S", 0.1)
    with pytest.raises((StateError, KeyboardInterrupt)):
        login.clean_up()
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)


def test_a_ray_down_that_was_killed_stops_scaling_for_minutes_only(login, head_id, monitor):
    login.directory.set_stopping(True)
    mark = login.directory.root / "stopping"
    with pytest.raises(StateError, match="being taken down"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    for seconds in (-301, 86400):  # and the clock may be set back
        os.utime(mark, (mark.stat().st_mtime + seconds,) * 2)
        assert monitor.create_workers("worker", CONFIG, WORKER, 1)


def test_ray_up_keeps_a_cluster_that_a_failed_ray_down_has_left(login, head_id, settings, fake_slurm, monkeypatch):
    for name, value in fake_slurm.environ.items():
        monkeypatch.setenv(name, value)
    for command, kept in (("exec", True), ("up", False)):
        login.directory.set_stopping(True)
        with getattr(scripts, command).make_context(command, ["x.yaml", "true"][: 2 if kept else 1]).scope():
            provider = SlurmNodeProvider({"slurm": {"state_dir": settings.state_dir}}, "c")
            with suppress(click.ClickException):  # the head is not up yet
                provider.non_terminated_nodes({TAG_KIND: "head"})
        assert login.directory.stopping is kept


def test_a_full_disk_keeps_nobody_from_ending_a_cluster(login, head_id, fake_slurm, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    login.nodes()
    monkeypatch.setattr(Path, "touch", fail)
    login.terminate([head_id])
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED"
    monkeypatch.setattr(cluster_dir, "write_atomically", fail)
    with pytest.raises(StateError, match="No space left"):
        login.directory.renew_token()


def test_a_pause_that_was_noted_here_is_not_lifted_by_a_look_that_fails(monitor, clock):
    monitor.nodes()
    monitor.launches.refused("worker", "no partition", "never")
    path = monitor.directory.root / "state.json"
    path.unlink()
    path.symlink_to(path)  # too many levels of symbolic links
    clock.now += 2
    monitor.nodes()
    with pytest.raises(LaunchDelayed, match="no partition"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)


def test_each_head_has_a_token_of_its_own(login, head_id, settings, fake_slurm, clock):
    token = login.directory.token_file.read_text()
    other = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    other.create_head("head", CONFIG, HEAD)
    assert login.directory.token_file.read_text() == token  # the head lives
    login.terminate([head_id])
    login.create_head("head", CONFIG, HEAD)
    assert login.directory.token_file.read_text() not in ("", token)
    assert login.directory.token_file.stat().st_mode & 0o777 == 0o600


def test_a_worker_starts_with_the_environment_of_ray_up_and_not_of_the_head(fake_slurm, settings, clock):
    login = Cluster(
        "c", settings, {**fake_slurm.environ, "MINE": "1", "RAY_ADDRESS": "x", "SBATCH_PARTITION": "y"}, clock=clock
    )
    login.create_head("head", CONFIG, HEAD)
    kept = login.directory.environment()
    assert kept["MINE"] == "1"
    assert not {"RAY_ADDRESS", "SBATCH_PARTITION"} & set(kept)


def test_waiting_for_a_head_that_ended_tells_why(login, head_id, fake_slurm, clock):
    fake_slurm.change(head_id.partition("-")[0], state="FAILED")
    login.directory.reports.reason(head_id).write_text("setup_commands[0] failed with exit code 3: x\n")
    login.log_of(head_id).write_text("first\nlast words\n")
    login.nodes()
    clock.now += 10
    with pytest.raises(HeadFailed) as error:
        wait_for_head(login, head_id, lambda node: None, pytest.fail, ask_s=0)
    for word in ("FAILED", "setup_commands[0] failed", "| last words", str(login.log_of(head_id))):
        assert word in str(error.value)


def test_waiting_for_a_head_outlasts_a_controller_that_does_not_answer(login, head_id, fake_slurm, clock):
    fake_slurm.faults(down=["squeue"])
    said = []

    def trouble(error):
        said.append(error.complaint)
        clock.now += 10
        if len(said) == 3:
            fake_slurm.faults()
            fake_slurm.change(head_id.partition("-")[0], state="RUNNING")
            write_report(login.directory.reports, NodeReport(head_id, READY, ready_at=1), head=True)

    node = wait_for_head(login, head_id, lambda node: None, trouble, poll_s=0, ask_s=0)
    assert node.ready
    assert said == ["squeue: error: Unable to contact slurm controller (connect failure)"] * 3


def test_taking_down_removes_the_directory_and_late_jobs(login, head_id, monitor, fake_slurm):
    monitor.create_workers("worker", CONFIG, WORKER, 2)
    login.nodes()
    login.clean_up()
    assert {job["state"] for job in fake_slurm.jobs()} == {"CANCELLED"}
    assert not login.directory.root.exists()


def test_a_node_that_never_was_is_said_so(login):
    with pytest.raises(NodeNotFound):
        login.node("7-abc")
