"""A cluster on a sandbox of machines, with a handle on everything that can break."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from support import UserCluster, cluster_config, user_environment, wait_for

from faults.machines import MachineSandbox
from ray_slurm_provider import procfs
from ray_slurm_provider.birth_certificate import read_certificate
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools

# With less, a controller that could not ask for a while takes all its nodes for lost; sites have 300 s.
PATIENT = {"SlurmdTimeout": 60}
_TOOLS = ("sbatch", "squeue", "scancel", "scontrol", "srun", "sinfo")
_DRIVER = Path(__file__).with_name("driver.py")


class Bed:
    """A sandbox of machines and tools between it and the cluster that can be told to fail."""

    def __init__(self, nodes=4, **settings):
        self.parent = Path(tempfile.mkdtemp(prefix="rst-"))
        self.parent.chmod(0o755)
        self.box = MachineSandbox(self.parent / "s")
        spec = usual_spec(nodes=nodes, cpus=4, memory="8G")
        self.box.up(spec.model_copy(update={"settings": settings}))
        self.prefix = self.box.prefix()
        self.environ = self.box.environment()
        self.bin = self.parent / "bin"
        self.bin.mkdir()
        for tool in _TOOLS:
            real = shutil.which(tool)
            trouble = self.bin / f"{tool}.trouble"
            script = f'#!/bin/bash\nreal() {{ "{real}" "$@"; }}\nif [ -e {trouble} ]; then . {trouble}; fi\nexec {real} "$@"\n'
            (self.bin / tool).write_text(script)
            (self.bin / tool).chmod(0o755)

    def down(self):
        self.box.down()
        shutil.rmtree(self.parent, ignore_errors=True)

    @property
    def client(self):
        """The real tools, whatever happens to the others."""
        return SlurmClient(SlurmTools(timeout_s=30, environ={**os.environ, **self.environ}, prefix=self.prefix))

    def tell(self, *words, check=True):
        """Run a command on the login machine as the site's administrator."""
        done = subprocess.run(
            [*self.prefix, *map(str, words)],
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, (words, done.stderr)
        return done.stdout

    def trouble(self, tool, script):
        """Have a tool run these shell lines first; None for no trouble."""
        path = self.bin / f"{tool}.trouble"
        if script is None:
            path.unlink(missing_ok=True)
        else:
            path.with_suffix(".new").write_text(script + "\n")
            path.with_suffix(".new").replace(path)

    def controller(self, fault, **options):
        self.box.controller_fault(fault, **options)

    def node(self, name, fault):
        self.box.node_fault(name, fault)

    def stop_munge(self):
        pids = [
            p
            for p in procfs.processes()
            if p.name == "munged" and str(self.box.paths.munge_socket).encode() in p.read("cmdline")
        ]
        procfs.end(pids, 5)

    def start_munge(self):
        self.box.start_munged()

    def heal(self):
        """Undo every fault that can be undone."""
        for tool in _TOOLS:
            self.trouble(tool, None)
        status = self.box.status()
        if not status.munged:
            self.start_munge()
        with suppress(Exception):
            self.controller("thaw")
        if not self.box.status().controller:
            with suppress(Exception):
                self.controller("start")
        for name in status.nodes:
            with suppress(Exception):
                self.node(name, "join")
            with suppress(Exception):
                self.node(name, "boot")

    def wait_until_healthy(self, timeout_s=300):
        """SLURM itself takes its time to take a node back that it had given up."""
        wait_for(lambda: self.box.status().healthy, timeout_s, f"a healthy SLURM: {self.box.status()}", poll_s=0.5)

    def cluster(self, directory, name="c", *, types=None, slurm=None, state_dir=None, **top):
        """Make a cluster YAML for this bed."""
        home = directory / "home"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        worker = {
            "worker": {
                "max_workers": 6,
                "idle_timeout_s": 15,
                "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G"}},
            }
        }
        config = cluster_config(
            name,
            state_dir or directory / "state",
            types=types or worker,
            slurm={"slurm_bin": str(self.bin), "command_timeout_s": 5, **(slurm or {})},
            **top,
        )
        return BedCluster(directory, user_environment(self.environ, home), config, prefix=self.prefix, bed=self)


class BedCluster(UserCluster):
    """A cluster on a bed."""

    def __init__(self, *parts, bed, **options):
        super().__init__(*parts, **options)
        self.bed = bed
        self.driver = None

    @property
    def client(self):
        return self.bed.client

    def certified(self):
        """All jobs of this cluster with their certificates, whatever they are called."""
        pairs = [(job, read_certificate(job.comment)) for job in self.client.jobs()]
        name = self.config["cluster_name"]
        return [(job, found) for row, found in pairs if found and found.cluster == name for job in row.elements()]

    def alive(self, head=None):
        """Living jobs: heads, or workers, or both."""
        return [job for job, found in self.certified() if job.alive and (head is None or head == (not found.head))]

    @property
    def head_node(self):
        """The machine of the head."""
        return self.alive(head=True)[0].nodes

    def start_driver(self, tasks=6, seconds=2.0):
        """Start a workload beside the head, without SLURM in between."""
        progress = self.directory / f"progress-{time.time():.0f}.json"
        environment = json.loads((self.root / "head.json").read_text())["node_id"]
        exports = self.root / "nodes" / f"{environment}.env"
        line = f". {shlex.quote(str(exports))}; exec {sys.executable} {_DRIVER} {progress} {tasks} {seconds}"
        log = (self.directory / "driver.log").open("a")
        child = subprocess.Popen(
            self.bed.box.machines.command(self.head_node, ["bash", "-c", line]),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.driver = Driver(child, progress, self.directory / "driver.log")
        return self.driver

    def ready_workers(self):
        """How many workers say that Ray runs on them."""
        rows = json.loads(self.ray_slurm("nodes", "--json", self.yaml).stdout)
        return sum(row["ray"] == "up" and row["type"] != "head" for row in rows)

    def access_variables(self):
        """What a process needs to talk to the head."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.root / "auth_token")}

    def destroy(self):
        if self.driver is not None:
            self.driver.end()
        self.bed.heal()
        super().destroy()


class Driver:
    """A workload that runs."""

    def __init__(self, child, progress, log):
        self.child, self.progress, self.log = child, progress, log
        self.wanted = 0

    def want(self, more=1):
        """Have the driver do so many more waves."""
        self.wanted += more
        self._say(self.wanted)

    def _say(self, number):
        path = Path(f"{self.progress}.todo")
        path.with_suffix(".new").write_text(str(number))
        path.with_suffix(".new").replace(path)

    def waves(self):
        if not self.progress.exists():
            return []
        return [json.loads(line) for line in self.progress.read_text().splitlines()]

    def wait_for_wanted(self, timeout_s, what="the workload to finish"):
        """Wait until every wave that was wanted has finished; return the seconds that took."""
        began = time.monotonic()

        def went_on():
            assert self.child.poll() is None, f"the driver ended: {self.log.read_text()[-3000:]}"
            return len(self.waves()) >= self.wanted

        wait_for(went_on, timeout_s, what, poll_s=0.5)
        return time.monotonic() - began

    def finish(self, timeout_s=180):
        """End the workload after its present wave."""
        self._say(-1)
        code = self.child.wait(timeout_s)
        assert code == 0, self.log.read_text()[-3000:]

    def end(self):
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
