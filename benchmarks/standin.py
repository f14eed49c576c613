"""What the first SLURM provider for Ray does, in so many words: a call for each node, and loops of five seconds.

A stand-in, written from a description: one `squeue --jobs` for each node in each listing, one `sbatch` for each node,
Ray's own limits on launches, a new listing in each round of the autoscaler.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UPDATE_INTERVAL_S = 5.0


def states(job_ids: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Ask about every node by a call of its own."""
    found = []
    for job_id in job_ids:
        argv = ["squeue", "--jobs", job_id, "--states=all", "--noheader", "--format=%T"]
        found.append(
            subprocess.run(argv, env=dict(environ), capture_output=True, text=True, check=False).stdout.strip()
        )
    return found


def submit(scripts: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Submit every node by a call of its own."""
    return [
        subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            env=dict(environ),
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        ).stdout.strip()
        for script in scripts
    ]


def rounds_s(nodes: int) -> float:
    """Return the seconds until so many nodes are asked for: Ray's default is one of a type in each round."""
    return nodes * UPDATE_INTERVAL_S


def requests_in(seconds: float, nodes: int) -> float:
    """Return how many requests its listings make: each node in each round."""
    return nodes * seconds / UPDATE_INTERVAL_S
