"""The logs of a cluster's nodes, of those that have ended too."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.errors import NodeNotFound, SlurmError, StateError

_POLL_S = 0.5
_ALIVE_CHECK_S = 10.0
_CHUNK_BYTES = 65536


def find_log(cluster: Cluster, name: str) -> Path:
    """Return the log of a node by its id, job, host or address, or the beginning of an id; the head's for ""."""
    log = next((path for path in _candidates(cluster, name) if path.exists()), None)
    if log is not None:
        return log
    if lost := cluster.lost_directory():
        raise StateError(lost)
    known = sorted(path.stem for path in (cluster.directory.root / "logs").glob("*.log"))
    raise NodeNotFound(
        f"no log of {name or 'a head'} in cluster {cluster.name}\n  logs: {', '.join(known) or 'none yet'}"
    )


def print_log(cluster: Cluster, log: Path, *, lines: int | None, follow: bool) -> None:
    """Print a log, or its last lines; follow it until the node ends or the user interrupts."""
    with log.open("rb") as file:
        if lines is not None:
            sys.stdout.buffer.writelines(file.readlines()[-lines:] if lines else [])
        next_check = 0.0
        while True:
            while data := file.read(_CHUNK_BYTES):
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            if not follow:
                return
            if time.monotonic() >= next_check:
                # What it wrote at the very end is read in one more round.
                follow = _lives(cluster, log.stem)
                next_check = time.monotonic() + _ALIVE_CHECK_S
            time.sleep(_POLL_S)


def _candidates(cluster: Cluster, name: str) -> Iterator[Path]:
    if name:
        yield cluster.log_of(name)
        for node in cluster.nodes().values():
            if name in node.names:
                yield cluster.log_of(node.node_id)
        yield from sorted((cluster.directory.root / "logs").glob(f"{name}*.log"))
        return
    report = cluster.directory.head_report()
    if report is not None:
        yield cluster.log_of(report.node_id)
    head = cluster.head()
    if head is not None:
        yield cluster.log_of(head.node_id)


def _lives(cluster: Cluster, node_id: str) -> bool:
    try:
        return cluster.is_alive(node_id)
    except SlurmError:
        return True
