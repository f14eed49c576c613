"""Whether nodes of a type may be launched now, judged by what became of those before them.

The autoscaler on the head notes here what it sees; the notes are in the diary, so that a new autoscaler goes on with
them, people see them, and `ray-slurm resume` can strike them out.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.launch_records import LaunchRecords
from ray_slurm_provider.nodes import TAG_TYPE
from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_slurm_provider.cluster_dir import ClusterDir
    from ray_slurm_provider.errors import SubmitRejected
    from ray_slurm_provider.nodes import Node

logger = logging.getLogger(__name__)

# A node on which Ray has run for so long has started well.
SETTLED_S = 30.0
# For so long a job has to be without hope before it is withdrawn: partitions change while a site is configured anew.
HOPELESS_S = 5.0
LOG_LINES = 8
# How a job ends without having failed: somebody wanted it.
_NO_FAILURE = frozenset({"CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "PREEMPTED", "REVOKED"})


class LaunchControl:
    """The launches of one cluster.

    Args:
        directory: The cluster's directory.
        pause_after: Failed starts in a row after which a type pauses.
        clock: Seconds since the epoch.
    """

    def __init__(self, directory: ClusterDir, pause_after: int, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._pause_after = pause_after
        self._clock = clock
        self._records = LaunchRecords()
        self._unsaved = False
        self._born: dict[str, float] = {}
        self._ready_since: dict[str, float] = {}
        self._settled: set[str] = set()
        self._hopeless_since: dict[str, float] = {}

    def take_over(self, records: LaunchRecords) -> None:
        """Go on with what the diary says, unless what happened since could not be written there."""
        if self._directory.exists and not self._unsaved:
            self._records = records

    def check(self, node_type: str) -> None:
        """Refuse a launch for which it is too early.

        Raises:
            LaunchDelayed: It is.
        """
        obstacle = self._records.why_not_now(node_type, self._clock())
        if obstacle is not None:
            raise obstacle

    def avoided(self) -> list[str]:
        """Return the SLURM nodes on which nothing shall start now."""
        return self._records.avoided(self._clock())

    def launched(self, node_ids: Iterable[str]) -> None:
        """Note that nodes were submitted."""
        self._born.update(dict.fromkeys(node_ids, self._clock()))

    def rejected(self, node_type: str, error: SubmitRejected) -> None:
        """Note that SLURM does not take a job."""
        now = self._clock()
        if error.not_now:
            self._change(lambda records: records.not_now(node_type, error.complaint, now))
        else:
            self._change(lambda records: records.refused(node_type, error.complaint, now, error.launch_category))

    def watches(self, node: Node) -> bool:
        """Tell whether a living node is one of those that `ready` or `hopeless` want to see again and again."""
        if node.seen.queued:
            return waits_for_ever(node.seen.reason) or node.node_id in self._hopeless_since
        return node.ready and node.node_id not in self._settled

    def ready(self, node: Node) -> None:
        """Note that Ray runs on a node; when it has for a while, its type and its host are forgiven."""
        since = self._ready_since.setdefault(node.node_id, self._clock())
        if self._clock() - since >= SETTLED_S and node.node_id not in self._settled:
            self._settled.add(node.node_id)
            self._succeeded(node)

    def ended(self, node: Node, reason: str, log: list[str]) -> bool:
        """Note that a node ended; tell whether it failed.

        Args:
            node: The node.
            reason: What its job says about that; "" for nothing.
            log: The last lines of its log.
        """
        since = self._ready_since.pop(node.node_id, None)
        born = self._born.pop(node.node_id, None)
        self._hopeless_since.pop(node.node_id, None)
        self._settled.discard(node.node_id)
        failed = bool(reason) or node.seen.state not in _NO_FAILURE
        now = self._clock()
        settled = node.came_up and (since is None or now - since >= SETTLED_S)
        if failed and not settled:
            self._change(
                lambda records: records.failed(
                    node.tags.get(TAG_TYPE, ""),
                    f"{node.label}: {reason or node.seen.state}",
                    now,
                    host=node.seen.place,
                    log=log[-LOG_LINES:],
                    born=born,
                    pause_after=self._pause_after,
                )
            )
        elif not failed and node.came_up:
            self._succeeded(node)
        return failed

    def hopeless(self, nodes: Iterable[Node]) -> list[str]:
        """Return those of some nodes whose jobs SLURM would never start, and note that."""
        now = self._clock()
        found = []
        for node in nodes:
            if not (node.seen.queued and waits_for_ever(node.seen.reason)):
                self._hopeless_since.pop(node.node_id, None)
                continue
            if node.node_id not in self._hopeless_since:
                self._hopeless_since[node.node_id] = now
                logger.warning("%s waits in vain: %s", node.label, in_words(node.seen.reason))
            if now - self._hopeless_since[node.node_id] >= HOPELESS_S:
                found.append(node)
        by_type = {node.tags.get(TAG_TYPE, ""): node for node in found}
        for node_type, node in by_type.items():
            reason = f"{node.label}: {in_words(node.seen.reason)}"
            self._change(partial(_never, node_type=node_type, reason=reason, now=now))
            logger.error("jobs of type %s are withdrawn, SLURM would never start them: %s", node_type, reason)
        return [node.node_id for node in found]

    def summary(self) -> list[str]:
        """Return for people which types are not launched now, and which hosts are avoided."""
        now = self._clock()
        waiting = [self._records.why_not_now(node_type, now) for node_type in sorted(self._records.types)]
        lines = [str(obstacle) for obstacle in waiting if obstacle is not None]
        for host in self.avoided():
            record = self._records.hosts[host]
            minutes = (record.until - now) / 60
            lines.append(
                f"{host} is avoided for {minutes:.0f} min: {record.failures} starts there in a row have failed."
                f" The last one: {record.reason}"
            )
        return lines

    def resume(self, node_type: str = "") -> list[str]:
        """Lift the pause of a type, or of all; return the types that waited or paused, and the hosts that were avoided.

        Raises:
            StateError: The diary cannot be written.
        """
        if not self._directory.exists:
            return []
        with self._directory.change_diary() as diary:
            return diary.launches.resume(node_type)

    def _succeeded(self, node: Node) -> None:
        node_type, host = node.tags.get(TAG_TYPE, ""), node.seen.place
        if node_type in self._records.types or host in self._records.hosts:
            self._change(lambda records: records.succeeded(node_type, host))

    def _change(self, change: Callable[[LaunchRecords], object]) -> None:
        change(self._records)
        if not self._directory.exists:
            return
        try:
            with self._directory.change_diary() as diary:
                if self._unsaved:
                    diary.launches = self._records
                else:
                    change(diary.launches)
            self._unsaved = False
        except StateError as error:
            self._unsaved = True
            logger.warning("what became of launches cannot be noted: %s", error)


def _never(records: LaunchRecords, node_type: str, reason: str, now: float) -> None:
    records.refused(node_type, reason, now, "slurm-never")
    # Perhaps there is no node left but those that are avoided.
    records.hosts.clear()
