"""Every template is brought up as it is, does some work, and goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import UserCluster, tasks_script, user_environment

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]
CONFIGS = sorted((Path(__file__).parents[2] / "cluster_configs").glob("*.yaml"))
WORK = {"gpu": "num_cpus=1, num_gpus=1", "shared-and-exclusive": "num_cpus=4", "partitions": "num_cpus=2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_template_works_without_an_edit(path, sandbox_environment, tmp_path):
    (tmp_path / "tmp").mkdir()
    config = yaml.safe_load(path.read_text())
    cluster = UserCluster(tmp_path, user_environment(sandbox_environment, tmp_path), config)
    try:
        # Without --no-config-cache: it makes no difference.
        cluster.ray("up", cluster.yaml, "-y")
        (task,) = cluster.run_on_head(tasks_script(tmp_path, 1, WORK.get(config["cluster_name"], "num_cpus=1")))
        (worker,) = cluster.workers()
        assert task["job"] == worker.job_id
        if config["cluster_name"] == "partitions":
            assert worker.name == "ray-partitions-cheap"
        cluster.down()
        assert cluster.jobs() == []
        assert not cluster.root.exists()
    finally:
        cluster.destroy()
