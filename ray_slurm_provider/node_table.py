"""The table of a cluster's nodes, for people and for programs."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.clusters import ClusterRow
from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.nodes import TAG_TYPE, Node
from ray_slurm_provider.progress import waits_for
from ray_slurm_provider.slurm.parse import format_time

_WATCH_S = 2.0
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(frozen=True)
class NodeRow:
    """One node, each field as text."""

    id: str  # node id
    type: str  # Ray node type
    state: str  # SLURM's state of the job
    ray: str  # whether Ray is up there
    reason: str  # SLURM's reason while it waits
    waits_for: str  # that in plain words, with its expected start as far as SLURM tells
    host: str  # SLURM node
    address: str  # address that Ray uses
    time_left: str  # until the time limit
    start: str  # start, or its estimate
    log: str  # the job's log


def node_rows(cluster: Cluster) -> list[NodeRow]:
    """Return a row for each living node, the head first."""
    nodes = sorted(cluster.nodes().values(), key=lambda node: (not node.is_head, _job_number(node)))
    return [_row(cluster, node) for node in nodes]


def print_nodes(cluster: Cluster) -> None:
    """Print the table once, and below it what jobs wait for, types that are not launched, and hosts to avoid."""
    _console().print(_view(cluster, node_rows(cluster)))


def watch_nodes(cluster: Cluster) -> None:
    """Show the table until interrupted: live in a terminal, elsewhere at every change."""
    console = _console()
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    live.update(_look(cluster)[1], refresh=True)
                    time.sleep(_WATCH_S)
        last: list[tuple[str, str, str]] | None = None
        while True:
            rows, view = _look(cluster)
            now = [(row.id, row.state, row.ray) for row in rows]
            if now != last:
                console.print(time.strftime("%H:%M:%S"), view, sep="\n")
                last = now
            time.sleep(_WATCH_S)
    except KeyboardInterrupt:
        return


def _view(cluster: Cluster, rows: Sequence[NodeRow]) -> Group:
    waiting = [f"{row.id} waits: {row.waits_for}" for row in rows if row.waits_for]
    lost = cluster.lost_directory() if rows else ""
    return Group(_table(rows), *waiting, *([lost] if lost else []), *cluster.launches.summary())


def _look(cluster: Cluster) -> tuple[list[NodeRow], Group]:
    """Return the rows and what is shown of them; nothing while SLURM does not answer."""
    try:
        rows = node_rows(cluster)
        return rows, _view(cluster, rows)
    except SlurmError as error:
        _console().print(f"SLURM does not answer: {error}", markup=False)
        return [], Group(_table([]))


def _row(cluster: Cluster, node: Node) -> NodeRow:
    report = node.report
    return NodeRow(
        id=node.node_id,
        type=node.tags.get(TAG_TYPE, ""),
        state=node.seen.state,
        ray="up" if node.ready else "",
        reason=node.seen.reason if node.seen.queued else "",
        waits_for=", ".join(waits_for(node)),
        host=node.seen.place,
        address=report.address if report else "",
        time_left=time_left(node.seen.end, node.seen.time_limit, time.time()),
        start=node.seen.start,
        log=str(cluster.log_of(node.node_id)),
    )


def time_left(end: str, time_limit: str, now: float) -> str:
    """Return how long a job may still run, by what squeue prints: its limit counts when it has not started."""
    try:
        return format_time(max(0, round(datetime.fromisoformat(end).timestamp() - now)))
    except ValueError:
        return time_limit


def _table(rows: Sequence[NodeRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("id", "type", "state", "ray", "reason", "host", "address", "time_left")
    for column in columns:
        table.add_column(column.upper().replace("_", " "), no_wrap=True)
    table.add_column("LOG", overflow="fold")
    for row in rows:
        table.add_row(*(getattr(row, column) for column in columns), row.log)
    if not rows:
        table.add_row("no nodes", *[""] * len(columns))
    return table


def print_clusters(rows: Sequence[ClusterRow]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "state", "head", "workers", "queued", "address"):
        table.add_column(column.upper(), no_wrap=True)
    table.add_column("DIRECTORY", overflow="fold")
    for row in rows:
        table.add_row(row.name, row.state, row.head, str(row.running), str(row.queued), row.address, row.directory)
    _console().print(table if rows else "no clusters")


def _console() -> Console:
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(width=width, highlight=False, markup=False)


def _job_number(node: Node) -> list[int]:
    """Return the number of a node's job, and which element of an array it is."""
    return [int(digits) for digits in job_id_of(node.node_id).split("_") if digits.isdigit()]
