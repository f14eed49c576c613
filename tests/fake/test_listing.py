"""How often SLURM is asked."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress

import pytest

from fake.fake_slurm import HEADER
from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider import listing
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import NodeNotFound, SlurmError
from ray_slurm_provider.reports import ENDED, READY, STARTING, NodeReport, write_report

CONFIG = NodeConfig()


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def login(fake_slurm, tmp_path, clock):
    settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python="/x")
    return Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)


@pytest.fixture
def monitor(login, fake_slurm, clock):
    """The cluster as the autoscaler on a head sees it; the head is up."""
    head_id = login.create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    _say(login, head_id, READY)
    return Cluster("c", login.settings, fake_slurm.of_head(head_id), clock=clock, wall_clock=clock)


@pytest.fixture
def asked(monitor, fake_slurm, clock):
    """Return how often squeue is asked while the autoscaler asks for its nodes each second for so long."""

    def asked(seconds):
        before = fake_slurm.calls("squeue")
        for _ in range(seconds):
            clock.now += 1.01
            monitor.nodes()
        return fake_slurm.calls("squeue") - before

    return asked


def _say(cluster, node_id, phase):
    write_report(cluster.directory.reports, NodeReport(node_id, phase, ready_at=1), head=False)


def _worker(monitor):
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    return worker


def test_a_cluster_at_rest_is_asked_for_once_in_a_minute(monitor, asked):
    asked(30)
    assert 2 <= asked(180) <= 4


def test_while_a_job_waits_or_starts_it_is_asked_for_every_ten_seconds(monitor, asked, fake_slurm):
    asked(30)
    worker = _worker(monitor)
    # At once, and then in its time.
    assert asked(1) == 1
    assert asked(50) == 5
    fake_slurm.change(2, state="RUNNING")
    _say(monitor, worker, STARTING)
    assert asked(50) == 5
    _say(monitor, worker, READY)
    asked(30)
    assert monitor.nodes()[worker].ready
    assert 2 <= asked(180) <= 4


def test_what_a_job_says_of_itself_is_a_reason_to_ask(monitor, asked, fake_slurm):
    worker = _worker(monitor)
    fake_slurm.change(2, state="RUNNING")
    _say(monitor, worker, READY)
    asked(120)
    _say(monitor, worker, ENDED)
    fake_slurm.change(2, state="COMPLETING")
    assert asked(12) >= 1
    assert worker not in monitor.nodes()


def test_a_person_sees_what_nodes_say_each_second_and_what_slurm_says_every_five(login, monitor, fake_slurm, clock):
    (head_id,) = login.nodes()
    before = fake_slurm.calls("squeue")
    for number in range(1, 31):
        clock.now += 1.01
        _say(login, head_id, STARTING if number % 2 else READY)
        assert login.nodes()[head_id].ready == (number % 2 == 0)
    assert 5 <= fake_slurm.calls("squeue") - before <= 6


def test_a_trace_of_a_node_that_is_gone_is_followed_once(login, fake_slurm, clock):
    head_id = login.create_head("head", CONFIG, HEAD)
    login.set_tags("7-abcdef", {"x": "y"})
    another = Cluster("c", login.settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    asked = fake_slurm.calls("scontrol")
    for _ in range(3):
        assert set(another.nodes()) == {head_id}
        clock.now += 10
    assert fake_slurm.calls("scontrol") == asked + 1


def test_nothing_is_made_anew_until_something_is_heard(monitor, asked):
    asked(40)
    while not asked(1):
        pass
    before = monitor.nodes()
    assert asked(30) == 0
    assert all(node is before[node_id] for node_id, node in monitor.nodes().items())


def test_a_controller_that_is_away_is_asked_every_five_seconds(monitor, asked, fake_slurm, clock):
    asked(30)
    fake_slurm.faults(down=["squeue"])
    clock.now += 60
    before = fake_slurm.calls("squeue")
    for _ in range(20):
        with pytest.raises(SlurmError):
            monitor.nodes()
        clock.now += 1.01
    assert fake_slurm.calls("squeue") - before == 4


def test_a_node_that_does_not_end_at_once_is_asked_for_soon(monitor, asked, fake_slurm):
    worker = _worker(monitor)
    fake_slurm.change(2, state="RUNNING")
    _say(monitor, worker, READY)
    asked(120)
    monitor.terminate([worker])
    # Its processes take their time; the controller's answer is still the old one.
    fake_slurm.change(2, state="RUNNING")
    asked(1)
    fake_slurm.change(2, state="COMPLETING")
    assert asked(11) >= 1
    assert worker not in monitor.nodes()
    asked(30)
    assert 2 <= asked(180) <= 4


def test_a_job_that_slurm_would_never_start_is_withdrawn_and_counted_once(monitor, asked, fake_slurm):
    worker = _worker(monitor)
    fake_slurm.change(2, reason="BadConstraints")
    cancelled = fake_slurm.calls("scancel")
    asked(30)
    assert worker not in monitor.nodes()
    assert fake_slurm.calls("scancel") == cancelled + 1
    assert monitor.directory.diary().launches.types["worker"].failures == 1


def test_nodes_that_went_long_ago_are_forgotten(monitor, fake_slurm, clock, monkeypatch):
    monkeypatch.setattr(listing, "_REMEMBERED", 3)
    made = [_worker(monitor) for _ in range(5)]
    monitor.nodes()
    for number in range(2, 7):
        fake_slurm.change(number, forgotten=True, purged=True)
    monitor.forget_listing()
    assert len(monitor.nodes()) == 1
    for worker in made[:2]:
        with pytest.raises(NodeNotFound):
            monitor.node(worker)
    assert monitor.node(made[4]).node_id == made[4]


def test_tags_change_without_a_question_to_slurm(login, monitor, asked):
    asked(30)
    (head_id,) = monitor.nodes()
    login.set_tags(head_id, {"x": "y"})
    assert asked(1) == 0
    assert monitor.nodes()[head_id].tags["x"] == "y"


@pytest.mark.parametrize("size", [2, 30])
def test_at_rest_a_look_opens_one_file_of_any_number_of_nodes(monitor, asked, fake_slurm, size):
    made = monitor.create_workers("worker", CONFIG, WORKER, size)
    for number, worker in enumerate(made):
        fake_slurm.change(f"2_{number}", state="RUNNING")
        _say(monitor, worker, READY)
    asked(60)
    assert all(node.ready for node in monitor.nodes().values())
    assert len(monitor.nodes()) == 1 + size
    with _opened_below(str(monitor.directory.root)) as opened:
        asked(10)
    assert opened == [str(monitor.directory.root / "state.json")] * 10


@contextmanager
def _opened_below(directory):
    """Collect the files below a directory that this process opens."""
    opened, active = [], [True]

    def hook(event, arguments):
        if active and event == "open" and str(arguments[0]).startswith(directory):
            opened.append(str(arguments[0]))

    # There is no way to take a hook away again.
    sys.addaudithook(hook)
    try:
        yield opened
    finally:
        active.clear()


def test_after_an_interrupted_question_the_next_one_is_asked(login, fake_slurm, clock, monkeypatch):
    head = login.create_head("head", CONFIG, HEAD)
    person = Cluster("c", login.settings, fake_slurm.environ, clock=clock, wall_clock=clock)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(person._backend, "sightings", interrupted)
        with pytest.raises(KeyboardInterrupt):
            person.nodes()
    assert set(person.nodes()) == {head}


@pytest.mark.parametrize("interval_s", [6, 60])
def test_a_person_asks_a_silent_controller_once_in_five_seconds_too(login, fake_slurm, clock, interval_s):
    settings = login.settings.model_copy(update={"listing_interval_s": interval_s})
    person = Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)
    person.create_head("head", CONFIG, HEAD)
    person.nodes()
    fake_slurm.faults(down=["squeue"])
    before = fake_slurm.calls("squeue")
    clock.now += 10
    for _ in range(30):
        with pytest.raises(SlurmError):
            person.nodes()
        clock.now += 2
    assert fake_slurm.calls("squeue") - before <= 12


def test_an_end_that_slurm_forgets_is_seen_although_another_node_has_just_had_news(monitor, asked, fake_slurm, clock):
    worker = _worker(monitor)
    fake_slurm.change(2, state="RUNNING")
    _say(monitor, worker, READY)
    asked(120)
    assert monitor.nodes()[worker].ready
    _say(monitor, "another-one", STARTING)
    asked(5)
    _say(monitor, worker, ENDED)
    before, cancelled = clock.now, fake_slurm.calls("scancel")
    while fake_slurm.calls("scancel") == cancelled:
        asked(1)
        assert clock.now - before < 90


@pytest.fixture
def filed(fake_slurm, tmp_path, clock):
    """A cluster with its birth records in files, as its autoscaler sees it; the site writes into comments."""
    fake_slurm.faults(comment="billed")
    settings = SlurmSettings(state_dir=str(tmp_path / "filed"), default_python="/x", birth_record="file", **EAGER)
    head_id = Cluster("c", settings, fake_slurm.environ).create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    return Cluster("c", settings, fake_slurm.of_head(head_id), clock=clock, wall_clock=clock)


def test_records_of_jobs_are_read_once_and_other_jobs_have_none(filed, fake_slurm, clock):
    filed.create_workers("worker", CONFIG, WORKER, 30)
    names = [f"my-{number:06}" for number in range(40)]
    jobs = fake_slurm.jobs()
    others = [{**jobs[0], "id": str(number), "name": name} for number, name in enumerate(names, 100)]
    (fake_slurm.directory / "jobs.json").write_text(json.dumps([*jobs, *others]))
    clock.now += 10
    with _opened_below(str(filed.directory.births)) as opened:
        for _ in range(20):
            assert len(filed.nodes()) == 31
            clock.now += 60
    # At the beginning, and now and then whether they have got one after all.
    assert len(opened) <= 31 + 4 * len(names)
    with _opened_below(str(filed.directory.births)) as opened:
        for _ in range(5):
            filed.nodes()
            clock.now += 2
    assert opened == []


def test_a_record_that_another_host_sees_late_is_found(filed, fake_slurm, clock):
    (worker,) = filed.create_workers("worker", CONFIG, WORKER, 1)
    record = filed.directory.births / f"{worker.partition('-')[2]}.birth"
    for away_s in (30, 700):
        person = Cluster("c", filed.settings, fake_slurm.environ, clock=clock, wall_clock=clock)
        hidden = record.rename(record.with_suffix(".hidden"))
        assert worker not in person.nodes()
        for _ in range(away_s // 10):
            clock.now += 10
            person.nodes()
        hidden.rename(record)
        clock.now += 600 if away_s > 60 else 10
        assert worker in person.nodes()


def test_records_of_jobs_that_are_gone_for_long_are_deleted_and_no_others(filed, fake_slurm, clock):
    living = filed.create_workers("worker", CONFIG, WORKER, 2)
    hidden = filed.create_workers("worker", CONFIG, WORKER, 2)
    gone = [filed.create_workers("worker", CONFIG, WORKER, 2)[0] for _ in range(15)]
    filed.nodes()

    def records():
        return {path.stem for path in filed.directory.births.iterdir()}

    def look(seconds):
        for _ in range(seconds // 100):
            clock.now += 100
            with suppress(SlurmError):
                filed.nodes()

    everything = records()
    tokens = {node_id.partition("-")[2] for node_id in gone}
    assert len(everything) == 18
    _change_all(fake_slurm, gone, state="FAILED")
    look(1000)
    _change_all(fake_slurm, gone, forgotten=True, purged=True)
    _change_all(fake_slurm, hidden, forgotten=True)  # of these the controller knows
    look(3000)
    assert records() == everything
    fake_slurm.faults(comment="billed", down=["squeue"])
    look(3000)
    assert records() == everything
    fake_slurm.faults(
        comment="billed", squeue=HEADER + "\n", scontrol=("slurm_load_jobs error: Invalid job id specified\n", 1)
    )
    look(3000)
    assert records() == everything
    fake_slurm.faults(comment="billed")
    look(1000)
    assert records() == everything - tokens
    _change_all(fake_slurm, hidden, forgotten=False)
    look(200)
    assert {*living, *hidden} <= set(filed.nodes())


def _change_all(fake_slurm, node_ids, **fields):
    """Change the jobs of launches."""
    numbers = {node_id.partition("_")[0] for node_id in node_ids}
    jobs = fake_slurm.jobs()
    for job in jobs:
        if job["id"].partition("_")[0] in numbers:
            job.update(fields)
    (fake_slurm.directory / "jobs.json").write_text(json.dumps(jobs))
