"""Waiting for the head of a cluster, as long as it takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray_slurm_provider import procfs
from ray_slurm_provider.errors import HeadFailed, SlurmError, SlurmNotFound
from ray_slurm_provider.launch_control import HOPELESS_S
from ray_slurm_provider.reports import READY
from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_slurm_provider.cluster import Cluster
    from ray_slurm_provider.nodes import Node

_RESTART_S = 60.0


def wait_for_head(
    cluster: Cluster,
    node_id: str,
    tell: Callable[[Node], None],
    trouble: Callable[[SlurmError], None],
    *,
    poll_s: float = 0.2,
    ask_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
) -> Node:
    """Wait as long as it takes until Ray runs on the head.

    Args:
        cluster: The cluster.
        node_id: The head.
        tell: Called with the node after each question to SLURM.
        trouble: Called when SLURM does not answer; the next question may be answered.
        poll_s: Seconds between two looks at its report.
        ask_s: Seconds between two questions to SLURM.
        clock: A monotonic clock, seconds.

    Raises:
        SlurmNotFound: The tools are gone; asking again does not help.
        HeadFailed: Its job ended, or would never start and was cancelled; the text says why.
    """
    next_question = clock()
    hopeless_since: float | None = None
    while True:
        report = cluster.directory.report(node_id)
        ready = report is not None and report.phase == READY
        if ready or clock() >= next_question:
            try:
                node = cluster.nodes().get(node_id)
            except SlurmNotFound:
                raise
            except SlurmError as error:
                trouble(error)
                next_question = clock() + ask_s
                time.sleep(poll_s)
                continue
            next_question = clock() + ask_s
            if node is None:
                raise HeadFailed(cluster.obituary(node_id))
            tell(node)
            if ready and node.ready:
                return node
            if not (node.seen.queued and waits_for_ever(node.seen.reason)):
                hopeless_since = None
            elif hopeless_since is None:
                hopeless_since = clock()
            elif clock() - hopeless_since >= HOPELESS_S:
                cluster.terminate([node_id])
                raise HeadFailed(f"{node.label} was cancelled: {in_words(node.seen.reason)}")
        time.sleep(poll_s)


def wait_for_restart(cluster: Cluster, before: Node) -> None:
    """Wait until the report of a head no longer speaks of the Ray that was ended.

    Args:
        cluster: The cluster.
        before: The head as it was.

    Raises:
        HeadFailed: That does not happen.
    """
    old = before.report.ready_at if before.report is not None else 0.0

    def begun() -> bool:
        report = cluster.directory.report(before.node_id)
        return report is None or report.phase != READY or report.ready_at != old

    if not procfs.wait_until(begun, _RESTART_S):
        raise HeadFailed(f"{before.label} did not restart Ray in {_RESTART_S:g} s")
    cluster.forget_listing()
