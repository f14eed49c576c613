"""The benchmarks work; how fast anything is does not matter here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slurm
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_quick_form_measures_everything_and_counts_one_request_each(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", tmp_path / "r.json", "--svg", tmp_path],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "r.json").read_text())
    rows = {row["what"]: row for row in found["results"]}
    assert all(row["ours"] >= 0 for row in rows.values() if "phase" not in row["what"] and "idle" not in row["what"])
    counted = [row for what, row in rows.items() if "submissions" in what or what.endswith("requests for jobs")]
    assert len(counted) == 5
    assert all(row["ours"] == 1 for row in counted), counted
    for part in ("agent: memory", "provider's share", "`ray up`", "0 to 2 workers", "a job in the queue"):
        assert any(part in what for what in rows), part
    assert len(found["phases"]) == 5
    for picture in ("ratios.svg", "phases.svg"):
        assert (tmp_path / picture).read_text().rstrip().endswith("</svg>")
