"""Puts the fake tools on a PATH of their own and lets tests read and change what they know."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from ray_slurm_provider.nodes import TAG_KIND, TAG_STATUS, TAG_TYPE

HEAD = {TAG_KIND: "head", TAG_TYPE: "head", TAG_STATUS: "uninitialized"}
WORKER = {TAG_KIND: "worker", TAG_TYPE: "worker", TAG_STATUS: "uninitialized"}
# The autoscaler asks at every look.
EAGER = {"listing_interval_s": 1}
_SOURCE = Path(__file__).with_name("fake_slurm.py")


class FakeSlurm:
    """The fake tools in one directory."""

    def __init__(self, directory):
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        text = _SOURCE.read_text().split("\n", 1)[1]
        for tool in ("sbatch", "squeue", "scancel", "scontrol"):
            (self.bin / tool).write_text(f"#!{sys.executable} -SE\n{text}")
            (self.bin / tool).chmod(0o755)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY_"))},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_SLURM_DIR": str(directory),
        }

    def of_head(self, head_id):
        """The environment of the autoscaler in a head's job."""
        return {
            **self.environ,
            "RAY_CLOUD_INSTANCE_ID": head_id,
            "RAY_SLURM_GCS_ADDRESS": "1.2.3.4:5",
        }

    def jobs(self):
        path = self.directory / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else []

    def job(self, job_id):
        return next(job for job in self.jobs() if job["id"] == job_id)

    def calls(self, tool):
        path = self.directory / "calls.json"
        return json.loads(path.read_text()).get(tool, 0) if path.exists() else 0

    def script(self, job_id):
        return (self.directory / f"script-{job_id}.sh").read_text()

    def change(self, job_id, **fields):
        """Change a job, by its id or by how many were submitted before it."""
        jobs = self.jobs()
        found = [job for job in jobs if job["id"] == str(job_id)] or [jobs[int(job_id) - 1]]
        found[0].update(fields)
        (self.directory / "jobs.json").write_text(json.dumps(jobs))

    def faults(self, **switches):
        (self.directory / "faults.json").write_text(json.dumps(switches))

    def remove(self):
        shutil.rmtree(self.directory)


class Clock:
    """A clock that goes when it is told."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now
