"""What people read of nodes."""

from __future__ import annotations

from datetime import datetime

import pytest

from ray_slurm_provider.node_table import time_left


@pytest.mark.parametrize(
    ("end", "left"),
    [("2026-01-02T03:04:05", "01:00:00"), ("2026-01-02T02:04:00", "00:00:00"), ("", "4:00"), ("NONE", "4:00")],
)
def test_the_time_left_is_what_is_left_until_the_end(end, left):
    now = datetime(2026, 1, 2, 2, 4, 5).timestamp()  # noqa: DTZ001 squeue prints local time
    assert time_left(end, "4:00", now) == left
