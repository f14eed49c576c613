"""Helpers of the tests that use a real SLURM: a cluster as a user has it, through the `ray` command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.guard import GUARD_NAME
from ray_slurm_provider.config import read_settings
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools, clean_environment

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RAY_SLURM = [sys.executable, "-m", "ray_slurm_provider.cli"]


def wait_for(condition, timeout_s, what, poll_s=0.25):
    """Return the first true answer; fail with what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        time.sleep(poll_s)


def controller_requests(sdiag):
    """How many requests of each kind the controller has had, by what sdiag prints; those of sdiag itself are left out.

    So are those of slurmd and slurmstepd, which are there with and without us.
    """
    counted = re.findall(
        r"(REQUEST_\w+)\s+\(\s*\d+\) count:(\d+)", sdiag.partition("by message type")[2].partition("by user")[0]
    )
    foreign = ("STATS_INFO", "COMPLETE", "STEP_", "NODE_REGISTRATION", "_PING")
    return {name: int(count) for name, count in counted if not any(part in name for part in foreign)}


def machines_are_allowed():
    """Whether the kernel lets this user make virtual machines out of namespaces."""
    own = [] if os.geteuid() == 0 else ["-U", "--map-root-user"]
    command = [
        "unshare",
        *own,
        "--net",
        "--uts",
        "--mount",
        "--ipc",
        "--pid",
        "--fork",
        "mount",
        "-t",
        "tmpfs",
        "x",
        "/mnt",
    ]
    return subprocess.run(command, capture_output=True).returncode == 0


def tasks_script(tmp_path, count, options="num_cpus=1"):
    """Write a driver that runs tasks, all at the same time, and prints as JSON what each saw of its node."""
    meeting = Path(tempfile.mkdtemp(dir=tmp_path))
    script = meeting.with_suffix(".py")
    script.write_text(
        f"""
import json, os, time, uuid
import ray
ray.init(log_to_driver=False)

@ray.remote({options})
def look():
    open({str(meeting)!r} + "/" + uuid.uuid4().hex, "w").close()
    while len(os.listdir({str(meeting)!r})) < {count}:
        time.sleep(0.1)
    context = ray.get_runtime_context()
    return {{
        "job": os.environ["RAY_CLOUD_INSTANCE_ID"].rpartition("-")[0], "node": context.get_node_id(), "slurm_node": os.environ["SLURMD_NODENAME"],
        "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"), "env": {{k: v for k, v in os.environ.items() if k.startswith(("MY_", "SLURM_ARRAY"))}},
    }}

print("RESULT " + json.dumps(ray.get([look.remote() for _ in range({count})], timeout=180)))
"""
    )
    return script


@dataclass(eq=False)
class UserCluster:
    """A cluster YAML and what a user does with it; another user when one is named, with an interpreter of theirs."""

    directory: Path
    environ: dict[str, str]
    config: dict[str, Any]
    python: str = sys.executable
    user: str | None = None
    text: str | None = None
    prefix: list[str] = field(default_factory=list)
    children: list[subprocess.Popen] = field(default_factory=list)

    @property
    def yaml(self):
        return self.directory / f"{self.config['cluster_name']}.yaml"

    @property
    def root(self):
        state_dir = self.config["provider"]["slurm"]["state_dir"].replace("~", self.environ["HOME"])
        return Path(state_dir) / self.config["cluster_name"]

    @property
    def settings(self):
        return read_settings(self.config["provider"]["slurm"])

    def write(self):
        self.yaml.write_text(self.text or yaml.safe_dump(self.config))
        return self.yaml

    def run(self, *words, timeout=180, **parts):
        """Run the user's interpreter."""
        return subprocess.run(
            [*self.prefix, self.python, *map(str, words)],
            **{
                "env": self.environ,
                "text": True,
                "capture_output": True,
                "timeout": timeout,
                "stdin": subprocess.DEVNULL,
                "cwd": "/",
                **self._as_user(),
                **parts,
            },
        )

    def _as_user(self):
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}

    def ray(self, *words, check=True, timeout=180):
        self.write()
        done = self.run(*RAY[1:], *words, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"ray {words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *words):
        """Start `ray` and leave it running."""
        self.write()
        child = subprocess.Popen(
            [*self.prefix, self.python, *RAY[1:], *map(str, words)],
            **self._as_user(),
            env=self.environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self.children.append(child)
        return child

    def up(self, **options):
        return self.ray("up", self.yaml, "--no-config-cache", "-y", **options)

    def down(self, **options):
        return self.ray("down", self.yaml, "-y", **options)

    def run_on_head(self, script, timeout=240):
        """Run a Python script on the head and return what it printed after RESULT."""
        done = self.ray("exec", self.yaml, "--no-config-cache", f"python {script}", timeout=timeout)
        line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
        return json.loads(line.partition("RESULT ")[2])

    def ray_slurm(self, *words, check=True):
        done = self.run(*RAY_SLURM[1:], *words, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"ray-slurm {words}: {done.stdout}{done.stderr}")
        return done

    def access(self):
        """The environment that `ray-slurm env` gives."""
        text = self.ray_slurm("env", self.yaml).stdout
        done = subprocess.run(
            ["bash", "-c", f"{text}\nenv -0"], env=self.environ, capture_output=True, text=True, check=True
        )
        return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if "=" in pair)

    @property
    def client(self):
        return SlurmClient(SlurmTools(environ=self.environ))

    def jobs(self, everything=False):
        """This cluster's jobs; ended ones only when everything is asked for."""
        name = f"ray-{self.config['cluster_name']}-"
        rows = [job for job in self.client.jobs() if job.name.startswith(name) and (everything or job.alive)]
        return [job for row in rows for job in row.elements()]

    def workers(self):
        return [job for job in self.jobs() if not re.search(r"-head(-[a-z0-9]{6})?$", job.name)]

    def head_job(self):
        workers = self.workers()
        return next((job for job in self.jobs() if job not in workers), None)

    def head(self):
        """The head as `ray-slurm nodes` shows it, None when there is none."""
        rows = json.loads(self.ray_slurm("nodes", "--json", self.yaml).stdout)
        return next((row for row in rows if row["type"] == "head"), None)

    def processes(self, job_id=None):
        """Processes of this cluster's jobs."""
        wanted = f"RAY_SLURM_DIR={self.root}".encode()
        node = f"RAY_CLOUD_INSTANCE_ID={job_id}-".encode()
        found = []
        for process in procfs.processes():
            variables = process.read("environ").split(b"\0")
            if wanted in variables and (job_id is None or any(pair.startswith(node) for pair in variables)):
                found.append(process)
        return found

    def process(self, job_id, name):
        return next(p for p in self.processes(job_id) if p.name == name)

    def head_monitor_log(self):
        temp_dir = json.loads((self.root / "head.json").read_text())["temp_dir"]
        return Path(temp_dir) / "session_latest" / "logs" / "monitor.log"

    def wait_until_no_process_is_left(self, timeout_s, job_id=None):
        """Wait for the end of every process of this cluster's jobs; name those that stay."""
        if not procfs.wait_until(lambda: not self.processes(job_id), timeout_s):
            left = [f"{p.pid} {p.name} {p.read('cmdline')[:300]!r} parent {p.parent}" for p in self.processes(job_id)]
            assert not left, left

    def destroy(self):
        """End whatever is left, after a test that failed too."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            child.stdout.close()
        if self.user is None:
            self.client.cancel([job.job_id for job in self.jobs()])
        else:
            subprocess.run(["scancel", "--user", self.user], env=self.environ, check=True)
        login_head = [p for p in self.processes() if p.name == GUARD_NAME and b"SLURM_JOB_ID=" not in p.read("environ")]
        procfs.send(login_head, signal.SIGTERM)
        procfs.wait_until(lambda: not self.processes(), 15)
        procfs.end(self.processes(), 5)


def listening_ports(cluster):
    """The TCP ports on which processes of a cluster listen, with the process's name (proc(5), net/tcp)."""
    inodes = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    found = {}
    for process in cluster.processes():
        try:
            links = [os.readlink(handle) for handle in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        for link in links:
            inode = link.removeprefix("socket:[").removesuffix("]")
            if inode in inodes:
                found[inodes[inode]] = process.name
    return found


def user_environment(sandbox_environment, home):
    """The environment of a user's shell on the login node."""
    environ = clean_environment(os.environ)
    for name in [name for name in environ if name.startswith("RAY_")]:
        del environ[name]
    return {
        **environ,
        **sandbox_environment,
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_UP_enable_autoscaler_v2": "1",
        "PYTHONWARNINGS": "ignore",
    }


def cluster_config(name, state_dir, *, head=None, types=None, slurm=None, **top):
    """A complete cluster YAML as a mapping."""
    return {
        "cluster_name": name,
        "max_workers": 8,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray_slurm_provider.node_provider.SlurmNodeProvider",
            "slurm": {"state_dir": str(state_dir), "update_interval_s": 1, **(slurm or {})},
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": head or {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G"}}},
            **(types or {"worker": {"max_workers": 8, "node_config": {"sbatch": {"cpus_per_task": 2, "mem": "1G"}}}}),
        },
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        **top,
    }
