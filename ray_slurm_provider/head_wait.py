"""Waiting for the head of a cluster, as long as it takes."""

import time
from collections.abc import Callable

from ray_slurm_provider import procfs
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.errors import HeadFailed, SlurmError, SlurmNotFound
from ray_slurm_provider.launch_control import HOPELESS_S
from ray_slurm_provider.nodes import Node
from ray_slurm_provider.reports import READY
from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever

_RESTART_S = 60.0


def wait_for_head(
    cluster: Cluster,
    node_id: str,
    tell: Callable[[Node], None],
    trouble: Callable[[SlurmError], None],
    *,
    poll_s: float = 0.2,
    ask_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Node:
    """Wait as long as it takes until Ray runs on the head; its report is looked at more often than SLURM is asked.

    Raises:
        SlurmNotFound: The tools are gone; asking again does not help.
        HeadFailed: Its job ended, or would never start and was cancelled; the text says why.
    """
    unstartable_since: float | None = None
    while True:
        said_so = _says_ready(cluster, node_id)
        node = _ask(cluster, node_id, trouble)
        if node is not None:
            tell(node)
            if node.ready:
                return node
            if not (node.seen.queued and waits_for_ever(node.seen.reason)):
                unstartable_since = None
            elif unstartable_since is None:
                unstartable_since = clock()
            elif clock() - unstartable_since >= HOPELESS_S:
                cluster.terminate([node_id])
                raise HeadFailed(f"{node.label} was cancelled: {in_words(node.seen.reason)}")
        procfs.wait_until(lambda: not said_so and _says_ready(cluster, node_id), ask_s, poll_s)  # noqa: B023 called here
        cluster.forget_listing()


def _ask(cluster: Cluster, node_id: str, trouble: Callable[[SlurmError], None]) -> Node | None:
    try:
        node = cluster.nodes().get(node_id)
    except SlurmNotFound:
        raise
    except SlurmError as error:
        trouble(error)
        return None
    if node is None:
        raise HeadFailed(cluster.obituary(node_id))
    return node


def _says_ready(cluster: Cluster, node_id: str) -> bool:
    report = cluster.directory.report(node_id)
    return report is not None and report.phase == READY


def wait_for_restart(cluster: Cluster, before: Node) -> None:
    """Wait until the report of a head no longer speaks of the Ray that was ended."""
    old = before.report.ready_at if before.report is not None else 0.0

    def begun() -> bool:
        report = cluster.directory.report(before.node_id)
        return report is None or report.phase != READY or report.ready_at != old

    if not procfs.wait_until(begun, _RESTART_S):
        raise HeadFailed(f"{before.label} did not restart Ray in {_RESTART_S:g} s")
    cluster.forget_listing()
