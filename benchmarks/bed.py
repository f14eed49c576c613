"""A sandbox of its own, and the bare tools in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from support import controller_requests

from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.nodes import TAG_KIND, TAG_STATUS, TAG_TYPE
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox
from ray_slurm_provider.sbatch_options import SbatchOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HEAD = {TAG_KIND: "head", TAG_TYPE: "head", TAG_STATUS: "uninitialized"}
# What Ray's autoscaler v2 gives a node, in length.
WORKER = {
    TAG_KIND: "worker",
    TAG_TYPE: "worker",
    TAG_STATUS: "uninitialized",
    "ray-node-name": "ray-bench-worker",
    "ray-launch-config": "0" * 52,
    "ray-node-launch-request": "0" * 36,
}
HELD = NodeConfig(sbatch=SbatchOptions(hold=True))


class Bed:
    """A SLURM with nothing else on it.

    Args:
        nodes: Virtual nodes.
        settings: Further lines of slurm.conf.
    """

    def __init__(self, nodes: int = 2, **settings: str | int) -> None:
        self.parent = Path(tempfile.mkdtemp(prefix="rsb-"))
        self.parent.chmod(0o755)
        self.box = Sandbox(self.parent / "s")
        spec = usual_spec(nodes=nodes, cpus=4, memory="8G")
        self.box.up(spec.model_copy(update={"settings": {"MinJobAge": 2, **settings}}))
        self.environ = {**os.environ, **self.box.environment()}

    def down(self) -> None:
        """End it and leave nothing."""
        self.box.down()
        shutil.rmtree(self.parent, ignore_errors=True)

    def run(self, *words: str, text: str = "") -> str:
        """Run a tool and return what it prints."""
        done = subprocess.run(
            words, input=text, env=self.environ, capture_output=True, text=True, check=True, cwd="/", errors="replace"
        )
        return done.stdout

    def seconds(self, *words: str, text: str = "") -> float:
        """Run a tool and return how long it takes."""
        began = time.perf_counter()
        self.run(*words, text=text)
        return time.perf_counter() - began

    def clear(self) -> None:
        """End all jobs, and wait until the controller has forgotten them."""
        self.run("scancel", "--user", str(os.getuid()))
        deadline = time.monotonic() + 120
        while self.run("squeue", "--noheader", "--states=all", "--format=%i").strip():
            if time.monotonic() > deadline:
                raise TimeoutError("the controller remembers old jobs")
            time.sleep(0.5)

    def requests(self) -> dict[str, int]:
        """Return how many requests of each kind the controller has had, see `support.controller_requests`."""
        found: dict[str, int] = controller_requests(self.run("sdiag"))
        return found

    def cluster(self, environ: Mapping[str, str] | None = None, **settings: object) -> Cluster:
        """Return the provider as the autoscaler on a head has it; the head itself is only a held job."""
        options = {"listing_interval_s": 1, "default_python": sys.executable, **settings}
        known = SlurmSettings.model_validate({"state_dir": str(self.parent / "state"), **options})
        login = Cluster("bench", known, self.environ)
        head = login.head()
        head_id = head.node_id if head else login.create_head("head", HELD, HEAD)
        autoscaler = {
            **self.environ,
            "RAY_CLOUD_INSTANCE_ID": head_id,
            "RAY_SLURM_GCS_ADDRESS": "127.0.0.1:1",
            "RAY_SLURM_DIR": str(login.directory.root),
            "RAY_enable_autoscaler_v2": "1",
        }
        return Cluster("bench", known, {**autoscaler, **(environ or {})})


@contextmanager
def bed(nodes: int = 2, **settings: str | int) -> Iterator[Bed]:
    """Give a bed, and take it away."""
    made = Bed(nodes, **settings)
    try:
        yield made
    finally:
        made.down()
