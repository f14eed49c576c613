"""What people read of nodes."""

from __future__ import annotations

from datetime import datetime

import pytest

from ray_slurm_provider import node_table
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.errors import SlurmUnavailable
from ray_slurm_provider.node_table import time_left


@pytest.mark.parametrize(
    ("end", "left"),
    [("2026-01-02T03:04:05", "01:00:00"), ("2026-01-02T02:04:00", "00:00:00"), ("", "4:00"), ("NONE", "4:00")],
)
def test_the_time_left_is_what_is_left_until_the_end(end, left):
    now = datetime(2026, 1, 2, 2, 4, 5).timestamp()  # noqa: DTZ001 squeue prints local time
    assert time_left(end, "4:00", now) == left


def test_a_watched_table_goes_on_when_slurm_falls_silent_in_the_middle(tmp_path, monkeypatch, capsys):
    cluster = Cluster("c", SlurmSettings(state_dir=str(tmp_path)))

    def silent():
        raise SlurmUnavailable(["squeue"], 1, "", "down")

    monkeypatch.setattr(node_table, "node_rows", lambda _: [node_table.NodeRow(*[""] * 11)])
    monkeypatch.setattr(cluster, "lost_directory", silent)
    rows, _ = node_table._look(cluster)
    assert rows == []
    assert "SLURM does not answer" in capsys.readouterr().out
