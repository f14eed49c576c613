"""Workers that are asked for together, as job arrays."""

from __future__ import annotations

import pytest

from fake.harness import EAGER, HEAD, WORKER, Clock
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import SlurmParseError

CONFIG = NodeConfig()


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def make_monitor(fake_slurm, tmp_path, clock):
    """The cluster as the autoscaler on a head sees it."""

    def make(**settings):
        settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python="/x", **EAGER, **settings)
        head_id = Cluster("c", settings, fake_slurm.environ).create_head("head", CONFIG, HEAD)
        fake_slurm.change(1, state="RUNNING")
        return Cluster("c", settings, fake_slurm.of_head(head_id), clock=clock, wall_clock=clock)

    return make


def _create(monitor, count):
    return monitor.create_workers("worker", CONFIG, WORKER, count)


def _workers(monitor):
    return {node_id for node_id, node in monitor.nodes().items() if not node.is_head}


def test_workers_of_one_request_are_one_submission_and_nodes_of_their_own(make_monitor, fake_slurm):
    monitor = make_monitor()
    asked = fake_slurm.calls("sbatch")
    made = _create(monitor, 5)
    assert fake_slurm.calls("sbatch") == asked + 1
    token = made[0].partition("-")[2]
    assert made == [f"2_{index}-{token}" for index in range(5)]
    assert _workers(monitor) == set(made)
    script = fake_slurm.script(2)
    assert "#SBATCH --array=0-4\n" in script
    assert f"/logs/%A_%a-{token}.log" in script
    # As tasks see it, the job is none of an array.
    assert script.index("RAY_CLOUD_INSTANCE_ID") < script.index('unset "${!SLURM_ARRAY_@}"')


def test_each_is_ended_by_itself_and_several_by_one_request(make_monitor, fake_slurm):
    monitor = make_monitor()
    made = _create(monitor, 5)
    fake_slurm.change("2_1", state="RUNNING")
    monitor.terminate([made[1]])
    assert _workers(monitor) == {made[0], *made[2:]}
    monitor.terminate([made[0], made[4]])
    assert _workers(monitor) == set(made[2:4])
    assert fake_slurm.calls("scancel") == 2


def test_one_alone_is_no_array(make_monitor, fake_slurm):
    _create(make_monitor(), 1)
    assert "--array" not in fake_slurm.script(2)


def test_where_arrays_are_not_wanted_each_is_a_job(make_monitor, fake_slurm):
    made = _create(make_monitor(job_arrays=False), 3)
    assert [node_id.partition("-")[0] for node_id in made] == ["2", "3", "4"]


def test_no_array_is_larger_than_the_site_allows(make_monitor, fake_slurm):
    monitor = make_monitor()
    fake_slurm.faults(says_max_array_size=3, max_array_size=3)
    assert len(_create(monitor, 7)) == 7
    assert [job["id"] for job in fake_slurm.jobs()][1:] == ["2_0", "2_1", "2_2", "3_0", "3_1", "3_2", "4"]


def test_a_site_that_has_lowered_the_size_since_is_no_failure(make_monitor, fake_slurm):
    monitor = make_monitor()
    fake_slurm.faults(max_array_size=2)
    assert len(_create(monitor, 7)) == len(_workers(monitor)) == 7


def test_as_many_are_submitted_as_a_limit_on_jobs_allows(make_monitor, fake_slurm, clock):
    monitor = make_monitor()
    fake_slurm.faults(max_submit=5)
    assert len(_create(monitor, 9)) == len(_workers(monitor)) == 5
    fake_slurm.faults()
    clock.now += 60
    monitor.launch_deferred()
    assert len(_workers(monitor)) == 9


def test_an_array_whose_submission_was_not_confirmed_is_found(make_monitor, fake_slurm):
    monitor = make_monitor()
    fake_slurm.faults(lost=True)
    made = _create(monitor, 4)
    fake_slurm.faults()
    assert _workers(monitor) == set(made)
    assert len(made) == 4


def test_many_that_are_gone_are_one_question(make_monitor, fake_slurm, clock):
    monitor = make_monitor()
    made = _create(monitor, 20)
    assert _workers(monitor) == set(made)
    for index in range(20):
        fake_slurm.change(f"2_{index}", forgotten=True)
    clock.now += 2
    with pytest.raises(SlurmParseError, match="which the controller knows"):
        monitor.nodes()
    for index in range(20):
        fake_slurm.change(f"2_{index}", purged=True)
    asked = fake_slurm.calls("scontrol")
    clock.now += 2
    assert _workers(monitor) == set()
    assert fake_slurm.calls("scontrol") == asked + 1


def test_those_that_were_ended_here_may_go_without_a_question(make_monitor, fake_slurm, clock):
    monitor = make_monitor()
    made = _create(monitor, 4)
    monitor.nodes()
    asked = fake_slurm.calls("scontrol")
    monitor.terminate(made)
    for index in range(4):
        fake_slurm.change(f"2_{index}", forgotten=True, purged=True)
    assert _workers(monitor) == set()
    assert fake_slurm.calls("scontrol") == asked


def test_elements_that_the_controller_lost_are_listed_once_as_ended(make_monitor, fake_slurm):
    monitor = make_monitor()
    made = _create(monitor, 3)
    for index in (1, 2):
        fake_slurm.change(f"2_{index}", forgotten=True, purged=True)
    seen = monitor.nodes()
    assert {node_id: seen[node_id].seen.alive for node_id in made} == {made[0]: True, made[1]: False, made[2]: False}
    monitor.forget_listing()
    assert _workers(monitor) == {made[0]}
