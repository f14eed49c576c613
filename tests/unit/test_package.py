"""The wheel holds what it must."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_templates_scripts_and_types(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {f"ray_slurm_provider/cluster_configs/{path.name}" for path in (ROOT / "cluster_configs").glob("*.yaml")}
    wanted |= {
        "ray_slurm_provider/scripts/job.sh",
        "ray_slurm_provider/py.typed",
        "ray_slurm_provider/agent/__main__.py",
    }
    assert wanted <= names
    assert not any(name.startswith("tests/") for name in names)
