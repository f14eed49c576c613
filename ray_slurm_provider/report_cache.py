"""The reports of a cluster's nodes, without opening a file for each node in each listing."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ray_slurm_provider.backends.base import Sighting
from ray_slurm_provider.reports import STARTING, NodeReport, ReportPaths, read_report

# Files that are written within one tick of a file system's clock leave the same time on their directory.
_SAME_TIME_S = 2.0
# A node that is up seldom has news, and the end of its job is SLURM's to tell.
_UP_AGAIN_S = 30.0


class _Entry(NamedTuple):
    report: NodeReport | None
    alive: bool  # whether its node was
    read_at: float


class ReportCache:
    """Remembers what nodes said; eager, it reads every report at every look, for a person who waits."""

    def __init__(self, paths: ReportPaths, clock: Callable[[], float], *, eager: bool) -> None:
        self._paths = paths
        self._clock = clock
        self._eager = eager
        self._changed_ns = -1
        self._news_until = float("-inf")
        self._again_at = float("inf")  # when one that is up has to be read again
        self._entries: dict[str, _Entry] = {}

    def has_news(self) -> bool:
        """Return whether a report may have changed since the last look; that costs one stat."""
        now = self._clock()
        try:
            changed_ns = self._paths.nodes.stat().st_mtime_ns
        except OSError:
            changed_ns = -1
        if changed_ns != self._changed_ns:
            self._changed_ns, self._news_until = changed_ns, now + _SAME_TIME_S
        return self._eager or now < self._news_until

    def is_due(self) -> bool:
        """Return whether a report that was not read at the last news has to be read now."""
        return self._clock() >= self._again_at

    def read(self, sightings: Iterable[Sighting]) -> dict[str, NodeReport | None]:
        """Return what some nodes say of themselves, and forget all others."""
        now = self._clock()
        self._again_at = float("inf")
        # In the queue a node says nothing.
        speaking = (seen for seen in sightings if self._eager or not seen.queued)
        self._entries = {seen.node_id: self._entry(seen, now) for seen in speaking}
        return {node_id: entry.report for node_id, entry in self._entries.items()}

    def _entry(self, seen: Sighting, now: float) -> _Entry:
        last = self._entries.get(seen.node_id)
        if last is None or self._is_outdated(last, seen, now):
            # What a node once said is not unsaid by a file that cannot be read now.
            known = None if last is None else last.report
            return _Entry(read_report(self._paths.report(seen.node_id)) or known, seen.alive, now)
        return last

    def _is_outdated(self, last: _Entry, seen: Sighting, now: float) -> bool:
        if self._eager or seen.alive != last.alive:
            return True
        # What a node said last is read once after its end.
        if not seen.alive or last.read_at >= self._news_until:
            return False
        starting = last.report is None or last.report.phase == STARTING
        if starting or now - last.read_at >= _UP_AGAIN_S:
            return True
        self._again_at = min(self._again_at, last.read_at + _UP_AGAIN_S)
        return False
