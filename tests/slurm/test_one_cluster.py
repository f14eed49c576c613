"""The shortest proof that a Ray version works: up, grow, shrink, down. `tests/run.sh --ray` runs it."""

from __future__ import annotations

import pytest
from support import tasks_script, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]


def test_a_cluster_grows_shrinks_and_goes(make_cluster, tmp_path):
    worker = {"max_workers": 2, "idle_timeout_s": 5, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}}}
    cluster = make_cluster("short", types={"worker": worker})
    cluster.up()
    seen = cluster.run_on_head(tasks_script(tmp_path, 2))
    assert {task["job"] for task in seen} == {job.job_id for job in cluster.workers()}
    wait_for(lambda: [job.name for job in cluster.jobs()] == ["ray-short-head"], 90, "only the head left")
    cluster.down()
    assert cluster.jobs() == []
    assert not cluster.root.exists()
    assert cluster.processes() == []
