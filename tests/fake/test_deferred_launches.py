"""Launches that are not possible yet, as Ray's autoscaler v2 asks for them."""

from __future__ import annotations

import shutil
import threading

import click
import pytest

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import LaunchDelayed, SlurmUnavailable, StateError, SubmitRejected
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.nodes import KIND_HEAD, TAG_KIND, TAG_TYPE
from ray_slurm_provider.site_rules import SiteFile, SiteLimits

CONFIG = NodeConfig()


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def login(fake_slurm, tmp_path, clock):
    settings = SlurmSettings(
        state_dir=str(tmp_path / "state"), command_timeout_s=1, default_python="/usr/bin/python3", **EAGER
    )
    return Cluster("c", settings, fake_slurm.environ, clock=clock, wall_clock=clock)


@pytest.fixture
def make_monitor(login, fake_slurm, clock):
    head_id = login.create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")

    def make(**settings):
        environ = fake_slurm.of_head(head_id)
        return Cluster("c", login.settings.model_copy(update=settings), environ, clock=clock, wall_clock=clock)

    return make


def _create(monitor, count=1):
    return monitor.create_workers("worker", CONFIG, WORKER, count)


def test_ray_hears_of_a_reason_once_and_what_it_asks_for_then_is_launched_later(make_monitor, fake_slurm, clock):
    monitor = make_monitor()
    fake_slurm.faults(refuse="Invalid partition name specified")
    with pytest.raises(SubmitRejected):
        _create(monitor, 2)
    for _ in range(3):
        assert _create(monitor, 2) == []
        clock.now += 5
        monitor.launch_deferred()
    # Another reason is news again, when the time for the next try has come.
    fake_slurm.faults(refuse="Invalid account or account/partition combination specified")
    clock.now += 60
    with pytest.raises(SubmitRejected):
        _create(monitor, 1)
    fake_slurm.faults()
    clock.now += 60
    monitor.launch_deferred()
    # What failed, Ray asks for again by itself; what was held, it does not.
    assert len(monitor.nodes()) == 1 + 6
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 7


def test_a_full_queue_is_no_failure_and_is_filled_up_as_jobs_start(make_monitor, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=3)
    assert len(_create(monitor, 5)) == 3
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 4
    fake_slurm.change(2, state="RUNNING")
    clock.now += 2
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 5
    for number in (3, 4):
        fake_slurm.change(number, state="RUNNING")
    clock.now += 2
    monitor.launch_deferred()
    clock.now += 2
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 6


def test_places_below_the_sites_number_of_nodes_are_filled_as_they_become_free(make_monitor, fake_slurm, clock):
    monitor = make_monitor(site=SiteFile(site="here", source="/x", limits=SiteLimits(max_nodes=4)))
    assert len(_create(monitor, 6)) == 3
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 4
    for ended, submitted in ((["2_0"], 5), (["2_1", "2_2", "5"], 7)):
        for job in ended:
            fake_slurm.change(job, state="COMPLETED")
        clock.now += 2
        monitor.nodes()
        monitor.launch_deferred()
        assert len(fake_slurm.jobs()) == submitted


def test_slurms_own_limit_is_no_failure_either(make_monitor, fake_slurm, clock):
    monitor = make_monitor()
    fake_slurm.faults(refuse="AssocMaxSubmitJobLimit\nJob violates accounting/QOS policy")
    assert _create(monitor, 2) == []
    asked = fake_slurm.calls("sbatch")
    for _ in range(10):
        clock.now += 1
        monitor.launch_deferred()
    assert fake_slurm.calls("sbatch") == asked
    fake_slurm.faults()
    clock.now += 15
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 3


def test_what_ray_asks_for_anew_is_not_launched_twice(make_monitor, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=1)
    assert len(_create(monitor, 2)) == 1
    clock.now += 600  # Ray's patience
    assert _create(monitor, 1) == []
    fake_slurm.change(2, state="RUNNING")
    clock.now += 2
    for _ in range(3):
        monitor.launch_deferred()
        clock.now += 2
    assert len(fake_slurm.jobs()) == 3


def test_nothing_is_launched_any_more_when_the_cluster_goes_down(make_monitor, login, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=1)
    _create(monitor, 3)
    login.nodes()
    login.terminate(list(login.nodes()))
    clock.now += 2
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 2
    assert {job["state"] for job in fake_slurm.jobs()} == {"CANCELLED"}


def test_a_controller_that_is_away_keeps_what_is_held(make_monitor, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=1)
    _create(monitor, 2)
    fake_slurm.change(2, state="RUNNING")
    clock.now += 2
    fake_slurm.faults(down=["sbatch"])
    monitor.launch_deferred()
    with pytest.raises((SlurmUnavailable, LaunchDelayed)):
        _create(monitor, 1)
    fake_slurm.faults()
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 3


def test_a_slurm_that_does_not_answer_is_asked_once_for_all_that_is_held(make_monitor, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=1)
    _create(monitor)
    for _ in range(3):
        _create(monitor)
    fake_slurm.change(2, state="RUNNING")
    clock.now += 2
    fake_slurm.faults(down=["sbatch"])
    asked = fake_slurm.calls("sbatch")
    monitor.launch_deferred()
    assert fake_slurm.calls("sbatch") == asked + 1
    fake_slurm.faults()
    for number in (3, 4, 5):
        monitor.launch_deferred()
        fake_slurm.change(number, state="RUNNING")
        clock.now += 2
    assert len(fake_slurm.jobs()) == 5


def test_no_job_starts_with_another_environment_while_that_of_ray_up_cannot_be_read(make_monitor, fake_slurm, clock):
    monitor = make_monitor(max_queued_jobs=1)
    for _ in range(3):
        _create(monitor)
    file = monitor.directory.root / "submit_env.json"
    saved = file.read_text()
    file.unlink()
    file.symlink_to(file)  # too many levels of symbolic links
    fake_slurm.change(2, state="RUNNING")
    clock.now += 2
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 2
    with pytest.raises(StateError, match="cannot be read"):
        _create(make_monitor())
    file.unlink()
    file.write_text(saved)
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == 3


def test_a_pause_that_is_lifted_launches_at_once_what_waited(make_monitor, login, fake_slurm, clock):
    monitor = make_monitor(pause_after_failures=3)
    for _ in range(3):
        clock.now += 700
        (worker,) = _create(monitor)
        monitor.nodes()
        fake_slurm.change(worker.partition("-")[0], state="FAILED")
        for _ in range(2):
            clock.now += 2
            monitor.nodes()
    with pytest.raises(LaunchDelayed) as error:
        _create(monitor)
    assert error.value.launch_category == "slurm-paused"
    assert _create(monitor, 4) == []
    assert login.launches.resume() == ["worker"]
    before = len(fake_slurm.jobs())
    clock.now += 2
    monitor.nodes()
    monitor.launch_deferred()
    assert len(fake_slurm.jobs()) == before + 4


@pytest.mark.parametrize("birth_record", ["comment", "file"])
@pytest.mark.parametrize("part", ["", "logs", "auth_token"])
def test_without_the_clusters_directory_nothing_is_submitted_and_ray_hears_of_it_once(
    make_monitor, fake_slurm, birth_record, part
):
    monitor = make_monitor(birth_record=birth_record)
    lost = monitor.directory.root / part
    aside = lost.rename(monitor.directory.root.with_name("aside"))
    with pytest.raises(LaunchDelayed, match="was the cluster's directory deleted.*`ray down`"):
        _create(monitor, 2)
    for _ in range(3):
        assert _create(monitor, 1) == []
        monitor.launch_deferred()
        assert len(monitor.nodes()) == 1
    assert fake_slurm.calls("sbatch") == 1
    assert not lost.exists()
    # Its file system was away.
    aside.rename(lost)
    monitor.launch_deferred()
    assert len([node for node in monitor.nodes().values() if not node.is_head]) == 3


def test_a_directory_that_was_deleted_under_a_living_head_is_told(make_monitor, login, fake_slurm):
    make_monitor()
    assert login.lost_directory() == ""
    (login.directory.root / "auth_token").unlink()
    assert "auth_token cannot be seen: the directory of cluster c was deleted while its head, job 1-" in (
        login.lost_directory()
    )
    shutil.rmtree(login.directory.root)
    assert "`ray down` ends the cluster" in login.lost_directory()
    login.terminate(list(login.nodes()))
    assert login.lost_directory() == ""
    login.clean_up()


def test_a_round_does_not_wait_for_the_submission_of_another_type(make_monitor, monkeypatch, clock):
    monitor = make_monitor()
    with monitor.directory.change_diary() as diary:
        diary.launches.failed("paused", "why", clock.now, pause_after=1)
    monitor.nodes()
    with pytest.raises(LaunchDelayed):
        monitor.create_workers("paused", CONFIG, {**WORKER, TAG_TYPE: "paused"}, 1)
    assert monitor.create_workers("paused", CONFIG, {**WORKER, TAG_TYPE: "paused"}, 1) == []
    began, may_end = threading.Event(), threading.Event()
    create = monitor._backend.create

    def slow(*arguments):
        began.set()
        assert may_end.wait(60)
        return create(*arguments)

    monkeypatch.setattr(monitor._backend, "create", slow)
    submission = threading.Thread(target=_create, args=(monitor,))
    submission.start()
    round_ = threading.Thread(target=monitor.launch_deferred)
    try:
        assert began.wait(60)
        round_.start()
        round_.join(30)
        assert not round_.is_alive()
    finally:
        may_end.set()
        submission.join()
        round_.join()


def test_rays_cache_of_the_yaml_goes_also_when_ray_writes_it_again(
    make_monitor, login, fake_slurm, monkeypatch, tmp_path
):
    make_monitor()
    for name in ("PATH", "FAKE_SLURM_DIR"):
        monkeypatch.setenv(name, fake_slurm.environ[name])
    cache = tmp_path / "ray-config-1"
    cache.touch()
    config = {"slurm": {"state_dir": login.settings.state_dir}, "_config_cache_path": str(cache)}
    with click.Context(click.Command("submit")):
        provider = SlurmNodeProvider(config, "c")
    assert not cache.exists()
    cache.touch()
    provider.non_terminated_nodes({})
    assert not cache.exists()


@pytest.mark.parametrize("command", ["up", "exec", "rsync-up", "get-head-ip"])
def test_commands_tell_of_a_deleted_directory_and_ray_down_ends_the_cluster(
    make_monitor, login, fake_slurm, monkeypatch, command
):
    make_monitor()
    shutil.rmtree(login.directory.root)
    for name in ("PATH", "FAKE_SLURM_DIR"):
        monkeypatch.setenv(name, fake_slurm.environ[name])
    settings = {"slurm": {"state_dir": login.settings.state_dir}}
    with click.Context(click.Command(command)):
        provider = SlurmNodeProvider(settings, "c")
    with pytest.raises(click.ClickException, match="was deleted while its head, job 1-") as told:
        provider.non_terminated_nodes({TAG_KIND: KIND_HEAD})
    assert told.value.exit_code == 1
    with click.Context(click.Command("down")):
        provider = SlurmNodeProvider(settings, "c")
    (head_id,) = provider.non_terminated_nodes({TAG_KIND: KIND_HEAD})
    provider.terminate_nodes([head_id])
    assert provider.non_terminated_nodes({TAG_KIND: KIND_HEAD}) == []
    provider.cleanup_cluster_resources()
