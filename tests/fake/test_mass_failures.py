"""Hundreds of jobs that fail at once, and ends that nobody saw."""

from __future__ import annotations

import json
import time

import pytest
from filelock import FileLock

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider import cluster_dir, launch_control
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings

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
    with FileLock(monitor.directory.root / "state.lock"):
        began = time.monotonic()
        assert len(monitor.nodes()) == 1
        assert time.monotonic() - began < 15
    assert "worker" not in monitor.directory.diary().launches.types
    # The next look notes it, although nothing else has happened.
    clock.now += 2
    monitor.nodes()
    assert monitor.directory.diary().launches.types["worker"].failures == 1
