"""One cluster with a workload goes through everything that may happen to it, one fault after the other."""

from __future__ import annotations

import os

import pytest
from support import wait_for

from faults.checker import Checker, ray_nodes_command
from faults.faults import FAULTS, apply

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]

WORKERS = 3


@pytest.fixture(scope="module")
def live(patient_bed, tmp_path_factory):
    """A cluster with a driver, watched by the checker."""
    types = {
        "worker": {
            "max_workers": WORKERS,
            "idle_timeout_s": 10,
            "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G"}},
        }
    }
    bed = patient_bed
    cluster = bed.cluster(tmp_path_factory.mktemp("live"), "live", types=types)
    checker = Checker(bed.tell, "live", WORKERS, bed.box.paths.logs / "slurmctld.log", cluster.root / "state.json")
    try:
        cluster.up()
        cluster.start_driver(tasks=WORKERS, seconds=1.5)
        checker.start(ray_nodes_command(cluster), {**os.environ, **cluster.access_variables()})
        yield cluster, checker
    finally:
        checker.stop()
        cluster.destroy()


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=[] if fault.in_ci else pytest.mark.all_faults) for fault in FAULTS],
)
def test_the_workload_goes_on_although(live, fault, request):
    cluster, checker = live
    apply(fault, cluster, cluster.driver, fault.lasts_s * request.config.getoption("--fault-times"))
    cluster.bed.wait_until_healthy()
    assert checker.problems == []


def test_at_the_end_nothing_is_left_and_nothing_was_made_twice(live):
    cluster, checker = live
    cluster.driver.finish()
    # A node that Ray had forgotten would never be idle enough to go.
    wait_for(lambda: not cluster.alive(head=False), 90, "the end of idle workers")
    jobs = cluster.certified()
    tokens = {found.token for _, found in jobs}
    cluster.down()
    wait_for(lambda: not cluster.alive(), 30, "the end of every job")
    assert not cluster.root.exists()
    cluster.wait_until_no_process_is_left(30)
    assert checker.problems == []
    assert checker.samples > 10
    assert len(jobs) > WORKERS
    assert len(checker.submissions()) >= len(tokens)
