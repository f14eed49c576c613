"""Compares over time what SLURM, the diary and Ray say of a cluster, and names what was lost or made twice.

    python -m tests.faults.checker --minutes 10 --seed 1     a run of faults at random, with this checker on

Read apart from the code under test as far as that goes: jobs come from `scontrol show job`, submissions from the log of
slurmctld, nodes of Ray from its GCS.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in {None, ""} or __package__ == "tests.faults":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from ray_slurm_provider.birth_certificate import read_certificate

# How long two views may differ: SLURM and Ray take their time to notice a loss (65 s for a network that was cut).
ORPHAN_S = 90.0
FORGOTTEN_S = 150.0
_MAY_LAST_S = {
    "orphan": ORPHAN_S,
    **dict.fromkeys(("forgotten", "ghost", "diary", "requeued"), FORGOTTEN_S),
}
_ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
_NODES = """
import json, sys, time
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
client = GcsClient(address=sys.argv[1])
while True:
    try:
        nodes = client.get_all_node_info().values()
        alive = [node.instance_id for node in nodes if node.state == GcsNodeInfo.ALIVE]
        print(json.dumps(alive), flush=True)
    except Exception:
        print("null", flush=True)
    time.sleep(1)
"""


@dataclass
class Sample:
    """What was seen at one moment; None for a view that gave no answer."""

    time: float
    jobs: dict[str, dict[str, str]] | None
    ray: list[str] | None


@dataclass
class Checker:
    """Watches one cluster.

    Args:
        tell: Runs a command on the login machine and returns what it printed.
        name: The cluster's name.
        max_workers: More than so many living workers are duplicates.
        controller_log: The log of slurmctld.
        state: The cluster's diary.
    """

    tell: object
    name: str
    max_workers: int
    controller_log: Path
    state: Path
    problems: list[str] = field(default_factory=list)
    samples: int = 0
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)
    _tokens: dict[str, str] = field(default_factory=dict)
    _ray: list[str] | None = None
    _ray_at: float = 0.0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _child: subprocess.Popen | None = None
    _threads: list[threading.Thread] = field(default_factory=list)

    def look(self):
        """Take one sample and judge it."""
        self.samples += 1
        self.judge(Sample(time.time(), self._jobs(), self._ray if time.time() - self._ray_at < 5 else None))

    def judge(self, sample):
        """Judge a sample; pure but for what it remembers."""
        present = set()
        if sample.jobs is not None:
            alive = {job: facts for job, facts in sample.jobs.items() if facts["JobState"] in _ALIVE}
            ours = {job: (facts, self._certificate(facts)) for job, facts in alive.items()}
            ours = {job: pair for job, pair in ours.items() if pair[1] is not None}
            heads = {found.node_id(job) for job, (_, found) in ours.items() if not found.head}
            workers = [job for job, (_, found) in ours.items() if found.head]
            for job in workers:
                if ours[job][1].head not in heads:
                    present.add(("orphan", f"job {job} works for {ours[job][1].head}, which is gone"))
            # Those that have ended by their own word, and run only in the books of a controller that has crashed.
            ghosts = [job for job in workers if self._has_ended(ours[job][1].node_id(job))]
            present |= {("ghost", f"job {job} has ended, and nobody cancels it") for job in ghosts}
            # What SLURM could not launch, when munge is away, it requeues itself, held and in spite of --no-requeue.
            requeued = [job for job in workers if _is_requeued(alive[job])]
            present |= {("requeued", f"SLURM has requeued job {job}, and nobody cancels it") for job in requeued}
            living = len(workers) - len({*ghosts, *requeued})
            if living > self.max_workers:
                present.add(("duplicate", f"{living} workers live, {self.max_workers} may"))
            if len(heads) > 1:
                present.add(("duplicate", f"two heads: {sorted(heads)}"))
            for job, facts in sample.jobs.items():
                found = self._certificate(facts)
                submission = job.partition("_")[0]
                if found is not None and self._tokens.setdefault(found.token, submission) != submission:
                    present.add(("duplicate", f"jobs {self._tokens[found.token]} and {job} have one certificate"))
            if sample.ray is not None and heads:
                running = {found.node_id(job) for job, (facts, found) in ours.items() if facts["JobState"] == "RUNNING"}
                for node in sorted(running - set(sample.ray)):
                    present.add(("forgotten", f"{node} runs and Ray does not have it"))
                for node in sorted(set(sample.ray) - running):
                    present.add(("forgotten", f"Ray has {node}, which does not run"))
        if self.state.exists():
            try:
                json.loads(self.state.read_text() or "{}")
            except (OSError, ValueError):
                present.add(("diary", f"{self.state} cannot be read"))
        self._keep(present, sample.time, seen=sample.jobs is not None)

    def _keep(self, present, now, *, seen):
        """Report what lasts for longer than it may."""
        if not seen:
            # Time in which nobody can see or do anything does not count.
            self._since = dict.fromkeys(self._since, now)
            return
        for key in [key for key in self._since if key not in present]:
            del self._since[key]
        for key in present:
            lasts = now - self._since.setdefault(key, now)
            if lasts >= _MAY_LAST_S.get(key[0], 0.0) and key not in self._said:
                self._said.add(key)
                self.problems.append(f"{time.strftime('%H:%M:%S', time.localtime(now))} {key[0]}: {key[1]}")

    def submissions(self):
        """Return the job ids that slurmctld noted as submitted."""
        text = self.controller_log.read_text(errors="replace")
        return re.findall(r"_slurm_rpc_submit_batch_job: JobId=(\d+)", text)

    def watch_ray(self, command, environ):
        """Follow Ray's own list of its nodes; a process that ends is started again."""
        while not self._stopped.is_set():
            child = subprocess.Popen(
                command(), env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._child = child
            for line in child.stdout:
                self._ray, self._ray_at = json.loads(line), time.time()
            child.wait()
            self._stopped.wait(1)

    def start(self, command=None, environ=None):
        """Look once in a second, in a thread; follow Ray's list with a command that prints it."""

        def run():
            while not self._stopped.wait(1):
                self.look()

        targets = [run] + ([lambda: self.watch_ray(command, environ)] if command else [])
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stopped.set()
        if self._child is not None:
            self._child.kill()
        for thread in self._threads:
            thread.join(60)

    def _has_ended(self, node_id):
        try:
            return json.loads((self.state.parent / "nodes" / f"{node_id}.json").read_text())["phase"] == "ended"
        except (OSError, ValueError, KeyError):
            return False

    def _certificate(self, facts):
        found = read_certificate(facts.get("Comment", ""))
        return found if found is not None and found.cluster == self.name else None

    def _jobs(self):
        try:
            text = self.tell("scontrol", "show", "job", "-o")
        except (subprocess.SubprocessError, AssertionError, OSError):
            return None
        if "No jobs in the system" in text:
            return {}
        jobs = {}
        for line in text.splitlines():
            facts = dict(re.findall(r"(?:^| )([A-Z]\w*)=(\S*)", line))
            comment = re.search(r' Comment=(ray-slurm:1:\{.*?"t":"\w+"\})', line)
            # Somebody's job may be called by a name with a newline in it.
            if {"JobId", "JobState"} <= set(facts):
                facts["Comment"] = comment.group(1) if comment else ""
                jobs |= dict.fromkeys(_job_ids(facts), facts)
        return jobs


def _is_requeued(facts):
    return facts["JobState"] == "PENDING" and facts.get("Restarts", "0") != "0"


def _job_ids(facts):
    """Yield the ids of the jobs that a record is about: one, or the elements of an array that wait."""
    if "ArrayTaskId" not in facts:
        yield facts["JobId"]
        return
    for part in facts["ArrayTaskId"].partition("%")[0].split(","):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part).groups()
        for index in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{facts['ArrayJobId']}_{index}"


def ray_nodes_command(cluster):
    """Return what prints Ray's list of its living nodes, on the login machine."""
    script = cluster.directory / "ray_nodes.py"
    script.write_text(_NODES)

    def command():
        head = json.loads((cluster.root / "head.json").read_text())
        address = f"{head['address']}:{head['ports']['gcs']}"
        return [*cluster.prefix, sys.executable, str(script), address]

    return command


def main():
    """A run of faults at random."""
    from faults.random_faults import run

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    sys.exit(run(options.minutes, options.seed, options.json))


if __name__ == "__main__":
    main()
