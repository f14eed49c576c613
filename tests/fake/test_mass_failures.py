"""Hundreds of jobs that fail at once, and ends that nobody saw."""

from __future__ import annotations

import json
import time

import pytest

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider import cluster_dir, launch_control
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import LaunchDelayed, SlurmError
from ray_slurm_provider.locks import locked
from ray_slurm_provider.nodes import TAG_TYPE, VANISHED
from ray_slurm_provider.reports import ENDED, READY, STARTING, NodeReport, write_report

CONFIG = NodeConfig()


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def monitor(fake_slurm, tmp_path, clock):
    settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python="/x", **EAGER)
    head_id = Cluster("c", settings, fake_slurm.environ).create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    return Cluster("c", settings, fake_slurm.of_head(head_id), clock=clock, wall_clock=clock)


@pytest.fixture
def failing(monitor, fake_slurm, clock):
    """300 workers that have just failed."""
    made = monitor.create_workers("worker", CONFIG, WORKER, 300)
    monitor.nodes()
    clock.now += 2
    jobs = fake_slurm.jobs()
    for job in jobs[1:]:
        job["state"] = "FAILED"
    (fake_slurm.directory / "jobs.json").write_text(json.dumps(jobs))
    return made


def test_many_that_fail_together_are_one_change_of_the_diary_and_a_few_questions(
    monitor, failing, fake_slurm, monkeypatch, caplog
):
    written = []
    write = cluster_dir.write_json
    monkeypatch.setattr(cluster_dir, "write_json", lambda path, value: (written.append(path.name), write(path, value)))
    asked = fake_slurm.calls("scontrol")
    assert len(monitor.nodes()) == 1
    assert written == ["state.json"]
    assert fake_slurm.calls("scontrol") - asked <= 3
    assert "297 more jobs failed: 2_[" in caplog.text
    for node_id in failing:
        assert node_id.partition("-")[0].partition("_")[2] in caplog.text
    assert monitor.directory.diary().launches.types["worker"].failures == 1


def test_a_lock_that_another_holds_does_not_hold_up_the_autoscaler(monitor, failing, clock, monkeypatch):
    monkeypatch.setattr(launch_control, "_NOTE_S", 0.2)
    with locked(monitor.directory.root / "state.lock", 1):
        began = time.monotonic()
        assert len(monitor.nodes()) == 1
        assert time.monotonic() - began < 15
    assert "worker" not in monitor.directory.diary().launches.types
    # The next look notes it, although nothing else has happened.
    clock.now += 2
    monitor.nodes()
    assert monitor.directory.diary().launches.types["worker"].failures == 1


def _vanish(monitor, fake_slurm, clock, *, phase="", reason="", state="RUNNING"):
    """Launch a worker that is listed and then gone, with what it said."""
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    job = worker.partition("-")[0]
    fake_slurm.change(job, state=state)
    clock.now += 2
    assert worker in monitor.nodes()
    if phase:
        report = NodeReport(worker, phase, ready_at=int(phase == READY))
        write_report(monitor.directory.reports, report, head=False)
    if reason:
        monitor.directory.reports.reason(worker).write_text(reason)
    fake_slurm.change(job, forgotten=True, purged=True)
    clock.now += 2
    assert worker not in monitor.nodes()


def _failures(monitor):
    record = monitor.directory.diary().launches.types.get("worker")
    return record.failures if record else 0


@pytest.mark.parametrize(
    "left",
    [
        {"phase": STARTING, "reason": "setup_commands[0] failed with exit code 1: false"},
        {"phase": STARTING},
        {"reason": "the head cannot be reached", "state": "PENDING"},
    ],
    ids=["a reason", "a report", "a reason of a job that was never seen to run"],
)
def test_ends_that_were_missed_reach_the_pause(monitor, fake_slurm, clock, left):
    for number in range(1, 7):
        clock.now += 700
        _vanish(monitor, fake_slurm, clock, **left)
        assert _failures(monitor) == number
    with pytest.raises(LaunchDelayed, match="6 starts of type worker in a row have failed: it pauses") as delayed:
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert left.get("reason", VANISHED) in str(delayed.value)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_those_that_leave_no_trace_are_launched_less_and_less_often_and_never_pause(monitor, fake_slurm, clock, state):
    for _ in range(20):
        clock.now += 700
        _vanish(monitor, fake_slurm, clock, state=state)
    assert _failures(monitor) == 20
    with pytest.raises(LaunchDelayed, match=f"the next try is in.*{VANISHED}"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    clock.now += 700
    assert monitor.create_workers("worker", CONFIG, WORKER, 1)


@pytest.mark.parametrize("phase", [READY, ENDED])
def test_a_node_that_was_up_and_ended_during_an_outage_is_no_failure(monitor, fake_slurm, clock, phase):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(2, state="RUNNING")
    write_report(monitor.directory.reports, NodeReport(worker, READY, ready_at=1), head=False)
    clock.now += 2
    assert monitor.nodes()[worker].ready
    fake_slurm.faults(down=["squeue", "scontrol"])
    for _ in range(20):
        clock.now += 100
        with pytest.raises(SlurmError):
            monitor.nodes()
    write_report(monitor.directory.reports, NodeReport(worker, phase, ready_at=1), head=False)
    fake_slurm.change(2, forgotten=True, purged=True)
    fake_slurm.faults()
    clock.now += 100
    assert worker not in monitor.nodes()
    assert _failures(monitor) == 0


def test_those_that_were_ended_here_are_no_failure(monitor, fake_slurm, clock):
    for of_type in ("ended", "withdrawn"):
        made = monitor.create_workers(of_type, CONFIG, {**WORKER, TAG_TYPE: of_type}, 4)
        clock.now += 2
        monitor.nodes()
        number = made[0].partition("_")[0]
        if of_type == "ended":
            monitor.terminate(made)
        for index in range(4):
            # Elements that wait vanish when they are cancelled.
            hidden = {"forgotten": True, "purged": True} if of_type == "ended" else {"reason": "BadConstraints"}
            fake_slurm.change(f"{number}_{index}", **hidden)
        for _ in range(4):
            clock.now += 4
            monitor.nodes()
            for index in range(4):
                if fake_slurm.job(f"{number}_{index}")["state"] == "CANCELLED":
                    fake_slurm.change(f"{number}_{index}", forgotten=True, purged=True)
    types = monitor.directory.diary().launches.types
    assert {name: record.failures for name, record in types.items()} == {"withdrawn": 1}
