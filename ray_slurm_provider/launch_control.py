"""What becomes of launches: which types wait, which hosts are avoided, and which jobs have to be cancelled.

The autoscaler on the head notes here what it sees; the notes are in the diary, so that a new autoscaler goes on with
them, people see them, and `ray-slurm resume` can strike them out.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ray_slurm_provider.backoff import NEVER, Backoff
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.errors import LaunchDelayed, StateError
from ray_slurm_provider.nodes import TAG_TYPE, VANISHED, Node
from ray_slurm_provider.reports import ENDED
from ray_slurm_provider.slurm.reasons import ELSEWHERE, STARTED_ELSEWHERE, in_words, waits_for_ever

logger = logging.getLogger(__name__)

# A node on which Ray has run for so long has started well.
SETTLED_S = 30.0
# For so long a job has to be without hope before it is withdrawn: partitions change while a site is configured anew.
HOPELESS_S = 5.0
# Longer than the end of a job takes after its agent has said goodbye, KillWait and an epilogue included.
STALE_S = 45.0
LOG_LINES = 8
# The autoscaler does not stand still for a lock: what it cannot note now, it notes with the next look.
_NOTE_S = 2.0
# How a job ends without having failed: somebody wanted it.
_NO_FAILURE = frozenset({"CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "PREEMPTED"})
_UNSTARTABLE = "unstartable"  # SLURM would never start it
# A controller that crashes forgets its last seconds, and with them the ends of jobs: after its return they run again,
# in its books, until somebody cancels them. Ray would wait for such a node for ever, and count on it.
_STALE = "stale"
_PATIENCE_S = {_UNSTARTABLE: HOPELESS_S, _STALE: STALE_S}


Change: TypeAlias = Callable[[Backoff], object]


class End(NamedTuple):
    """How a node ended, by what it left."""

    node: Node
    reason: str  # why it did not come up, by its job's own words; "" when it says nothing
    log: list[str]  # the last lines of its job's log


@dataclass
class _Worker:
    """What is remembered of one worker."""

    submitted_at: float | None = None  # seconds since the epoch; None when another autoscaler did it
    ready_since: float | None = None
    settled: bool = False
    trouble: str = ""
    trouble_since: float = 0.0


class LaunchControl:
    """The launches of one cluster; durations go by a monotonic clock, what is noted by the wall clock."""

    def __init__(
        self,
        directory: ClusterDir,
        pause_after: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._pause_after = pause_after
        self._clock = clock
        self._wall_clock = wall_clock
        self._backoff = Backoff()
        self._unsaved = False
        self._workers: dict[str, _Worker] = {}

    def load(self, backoff: Backoff) -> None:
        """Go on with what the diary says, unless what happened since could not be written there."""
        if self._directory.exists and not self._unsaved:
            self._backoff = backoff

    def delay_reason(self, node_type: str) -> LaunchDelayed | None:
        return self._backoff.delay_reason(node_type, self._wall_clock())

    def avoided(self) -> list[str]:
        return self._backoff.avoided(self._wall_clock())

    def launched(self, node_ids: Iterable[str]) -> None:
        now = self._wall_clock()
        self._workers.update((node_id, _Worker(submitted_at=now)) for node_id in node_ids)

    def refused(self, node_type: str, reason: str, category: str) -> None:
        self._change([self._refusal(node_type, reason, category)])

    def look(self, workers: Iterable[Node], ended: Iterable[End]) -> tuple[list[str], list[Node]]:
        """Note how living workers do and how others ended, in one change of the diary.

        Returns:
            The nodes whose jobs have to be cancelled, for Ray counts on them; and those that failed.
        """
        changes: list[Change] = []
        failed = [end.node for end in ended if self._has_failed(end, changes)]
        doomed = self._watch(workers, changes)
        self._change(changes)
        return doomed, failed

    def _watch(self, workers: Iterable[Node], changes: list[Change]) -> list[str]:
        now = self._clock()
        doomed = []
        for node in workers:
            worker = self._workers.get(node.node_id) or self._workers.setdefault(node.node_id, _Worker())
            if _is_doomed(node, worker, now):
                doomed.append(node)
            elif node.ready and not worker.settled:
                worker.ready_since = now if worker.ready_since is None else worker.ready_since
                worker.settled = now - worker.ready_since >= SETTLED_S
                if worker.settled:
                    changes += self._success(node)
        for node_type, node in {node.tags.get(TAG_TYPE, ""): node for node in doomed if node.seen.queued}.items():
            reason = f"{node.label}: {in_words(node.seen.reason)}"
            changes.append(self._refusal(node_type, reason, NEVER))
            logger.error("jobs of type %s are withdrawn, SLURM would never start them: %s", node_type, reason)
        return [node.node_id for node in doomed]

    def _has_failed(self, end: End, changes: list[Change]) -> bool:
        node = end.node
        worker = self._workers.pop(node.node_id, _Worker())
        well = node.came_up if node.seen.state == VANISHED else node.seen.state in _NO_FAILURE
        failed = bool(end.reason) or not well
        settled = worker.ready_since is None or self._clock() - worker.ready_since >= SETTLED_S
        if failed and (node.seen.state == ELSEWHERE or not (node.came_up and settled)):
            changes.append(self._failure(end, worker.submitted_at))
        elif not failed and node.came_up and node.seen.state != VANISHED:
            changes += self._success(node)
        return failed

    def _failure(self, end: End, submitted_at: float | None) -> Change:
        node, now = end.node, self._wall_clock()
        # Elements of an array that somebody cancels while they wait vanish, too.
        traceless = node.seen.state == VANISHED and not (end.reason or end.log or node.report)
        elsewhere = node.seen.state == ELSEWHERE
        return lambda backoff: backoff.failed(
            node.tags.get(TAG_TYPE, ""),
            f"{node.label}: {STARTED_ELSEWHERE if elsewhere else end.reason or node.seen.state}",
            now,
            host="" if elsewhere else node.seen.place,
            log=end.log[-LOG_LINES:],
            submitted_at=submitted_at,
            # The next one would go there, too.
            pause_after=1 if elsewhere else None if traceless else self._pause_after,
        )

    def _refusal(self, node_type: str, reason: str, category: str) -> Change:
        now = self._wall_clock()
        return lambda backoff: backoff.refused(node_type, reason, now, category)

    def _success(self, node: Node) -> list[Change]:
        node_type, host = node.tags.get(TAG_TYPE, ""), node.seen.place
        known = node_type in self._backoff.types or host in self._backoff.hosts
        return [lambda backoff: backoff.succeeded(node_type, host)] if known else []

    def summary(self) -> list[str]:
        return self._backoff.summary(self._wall_clock())

    def resume(self, node_type: str = "") -> list[str]:
        """Lift the pause of a type, or of all; return the types and hosts that this concerns."""
        if not self._directory.exists:
            return []
        with self._directory.change_diary() as diary:
            return diary.launches.resume(node_type)

    def _change(self, changes: Sequence[Change]) -> None:
        for change in changes:
            change(self._backoff)
        if not (changes or self._unsaved) or not self._directory.exists:
            return
        try:
            with self._directory.change_diary(_NOTE_S) as diary:
                if self._unsaved:
                    diary.launches = self._backoff
                else:
                    for change in changes:
                        change(diary.launches)
            self._unsaved = False
        except StateError as error:
            self._unsaved = True
            logger.warning("what became of launches cannot be noted now: %s", error)


def _is_doomed(node: Node, worker: _Worker, now: float) -> bool:
    """Return whether a worker's job has been in trouble for too long."""
    trouble = _trouble(node)
    if trouble != worker.trouble:
        worker.trouble, worker.trouble_since = trouble, now
        if trouble == _UNSTARTABLE:
            logger.warning("%s waits in vain: %s", node.label, in_words(node.seen.reason))
    if not trouble or now - worker.trouble_since < _PATIENCE_S[trouble]:
        return False
    if trouble == _STALE:
        logger.warning("job %s has ended, and SLURM does not know it; cancelling it", node.node_id)
    return True


def _trouble(node: Node) -> str:
    if node.seen.queued:
        return _UNSTARTABLE if waits_for_ever(node.seen.reason) else ""
    return _STALE if node.report is not None and node.report.phase == ENDED else ""
