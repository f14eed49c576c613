"""The reports of a cluster's nodes, without opening a file for each node in each listing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_slurm_provider.reports import STARTING, read_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ray_slurm_provider.backends.base import Sighting
    from ray_slurm_provider.reports import NodeReport, ReportPaths

# Files that are written within one tick of a file system's clock leave the same time on their directory.
_SAME_TIME_S = 2.0
# A node that is up seldom has news, and the end of its job is SLURM's to tell.
_UP_AGAIN_S = 30.0


class ReportBook:
    """Remembers what nodes said.

    A look costs one stat. When the directory has changed, the reports of the nodes that are starting are read, and now
    and then those of the others.

    Args:
        paths: Where the reports are.
        clock: A monotonic clock, seconds.
        eager: Whether to read every report at every look, for a person who waits.
    """

    def __init__(self, paths: ReportPaths, clock: Callable[[], float], *, eager: bool) -> None:
        self._paths = paths
        self._clock = clock
        self._eager = eager
        self._changed_at = -1
        self._unsure_until = float("-inf")
        self._read_all_at = float("-inf")
        self._left_out = True
        self._news = False
        self._known: dict[tuple[str, bool], NodeReport | None] = {}

    def look(self) -> bool:
        """Tell whether a report may have changed since the last look."""
        now = self._clock()
        try:
            changed_at = self._paths.nodes.stat().st_mtime_ns
        except OSError:
            changed_at = -1
        self._news = self._eager or changed_at != self._changed_at or now < self._unsure_until
        if changed_at != self._changed_at:
            self._changed_at, self._unsure_until = changed_at, now + _SAME_TIME_S
        self._left_out |= self._news
        return self._news

    @property
    def is_stale(self) -> bool:
        """Whether to read again, as of the last look."""
        return self._news or self._all_are_due

    def read(self, sightings: Iterable[Sighting]) -> Mapping[str, NodeReport | None]:
        """Return what some nodes say of themselves, and forget all others."""
        everything = self._eager or self._all_are_due
        known = self._known
        # In the queue a node says nothing.
        speaking = [seen for seen in sightings if self._eager or not seen.queued]
        self._known = {(seen.node_id, seen.alive): self._one(seen, known, everything) for seen in speaking}
        if everything:
            self._read_all_at, self._left_out = self._clock(), False
        return {node_id: report for (node_id, _), report in self._known.items()}

    @property
    def _all_are_due(self) -> bool:
        return self._left_out and self._clock() - self._read_all_at >= _UP_AGAIN_S

    def _one(
        self, seen: Sighting, known: Mapping[tuple[str, bool], NodeReport | None], everything: bool
    ) -> NodeReport | None:
        key = (seen.node_id, seen.alive)
        if not self._eager and key in known:
            last = known[key]
            starting = last is None or last.phase == STARTING
            # What a node said last is read once after its end.
            if not (seen.alive and (everything or (starting and self._news))):
                return last
        return read_report(self._paths.report(seen.node_id))
