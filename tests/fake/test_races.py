"""Threads and looks that meet at the wrong moment."""

from __future__ import annotations

import errno
import json
import threading
import time

import pytest

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider import birth_records
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import StateError, SubmitUnanswered
from ray_slurm_provider.garbage import find_garbage

CONFIG = NodeConfig()
UNCLEAR = {"err": "sbatch: error: Batch job submission failed: Connection reset by peer\n"}


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def make(fake_slurm, tmp_path, clock):
    def make(head="", **changed):
        settings = SlurmSettings(**{"state_dir": str(tmp_path / "state"), "default_python": "/x", **EAGER, **changed})
        environ = fake_slurm.of_head(head) if head else fake_slurm.environ
        return Cluster("c", settings, environ, clock=clock, wall_clock=clock)

    return make


@pytest.fixture
def head(make, fake_slurm):
    head = make().create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    return head


def _create(monitor, count):
    return monitor.create_workers("worker", CONFIG, WORKER, count)


def test_an_unclear_submission_is_not_looked_for_in_every_round(make, head, fake_slurm, clock):
    monitor = make(head, max_queued_jobs=1, listing_interval_s=60)
    fake_slurm.faults(sbatch_ends=UNCLEAR)
    with pytest.raises(SubmitUnanswered):
        _create(monitor, 1)
    fake_slurm.faults()
    clock.now += 30
    _create(monitor, 3)
    for most in (10, 6):
        before = fake_slurm.calls("squeue")
        for _ in range(30):
            clock.now += 1.1
            monitor.launch_deferred()
            monitor.nodes()
        assert fake_slurm.calls("squeue") - before <= most
        clock.now += 600  # so long it is looked for


def test_jobs_that_are_shown_late_count_once_though_two_threads_look(make, head, fake_slurm, clock):
    monitor = make(head)
    fake_slurm.faults(late=True, sbatch_ends={"submits": True, **UNCLEAR})
    with pytest.raises(SubmitUnanswered):
        _create(monitor, 4)
    fake_slurm.faults()
    for index in range(4):
        fake_slurm.change(f"2_{index}", forgotten=False)
    clock.now += 30
    monitor.forget_listing()
    nodes, together, found = monitor.nodes, threading.Barrier(2), []

    def both_at_once():
        seen = nodes()
        together.wait(20)
        return seen

    monitor.nodes = both_at_once
    threads = [threading.Thread(target=lambda: found.extend(monitor._launcher._late())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4


def test_a_look_while_workers_are_cancelled_counts_no_failure(make, head, fake_slurm, clock):
    monitor = make(head)
    terminate = monitor._backend.terminate
    made = _create(monitor, 2)
    monitor.nodes()

    def look_before_it_is_noted(node_ids):
        terminate(node_ids)
        monitor._backend.terminate = terminate
        # The elements of an array that waits vanish at once.
        left = [job for job in fake_slurm.jobs() if job["state"] != "CANCELLED"]
        (fake_slurm.directory / "jobs.json").write_text(json.dumps(left))
        clock.now += 12
        look = threading.Thread(target=monitor.nodes)
        look.start()
        look.join()

    monitor._backend.terminate = look_before_it_is_noted
    monitor.terminate(made)
    clock.now += 20
    assert set(monitor.nodes()) == {head}
    assert not monitor.directory.diary().launches.types


def test_a_record_that_cannot_be_read_now_makes_no_cluster_garbage(make, fake_slurm, tmp_path, monkeypatch):
    cluster = make(birth_record="file")
    cluster.create_head("head", CONFIG, HEAD)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as now:
        now.setattr(birth_records, "read_text", stale)
        with pytest.raises(StateError, match="Stale file handle"):
            find_garbage(cluster.slurm_client(), tmp_path / "state", str(tmp_path), time.time() + 3600)
    assert not find_garbage(cluster.slurm_client(), tmp_path / "state", str(tmp_path), time.time() + 3600)
