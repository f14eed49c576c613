"""Patience with node types whose nodes do not come up: jobs that fail at once are not submitted without end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# The first failures may be one bad host; after them the pause doubles.
FREE_FAILURES = 2
FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 600.0


@dataclass
class _Record:
    failures: int = 0
    until: float = 0.0
    reason: str = ""


class LaunchBackoff:
    """Counts failed starts in a row for each node type.

    Args:
        clock: A monotonic clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def failed(self, node_type: str, reason: str) -> None:
        """Note that a node of this type ended before Ray was up on it."""
        record = self._records.setdefault(node_type, _Record())
        record.failures += 1
        record.reason = reason
        over = record.failures - FREE_FAILURES
        if over > 0:
            record.until = self._clock() + min(FIRST_PAUSE_S * 2 ** (over - 1), LONGEST_PAUSE_S)

    def succeeded(self, node_type: str) -> None:
        """Note that a node of this type came up: everything is forgiven."""
        self._records.pop(node_type, None)

    def why_not_now(self, node_type: str) -> str:
        """Return why nothing of this type is submitted now, "" when nothing speaks against it."""
        record = self._records.get(node_type)
        if record is None or self._clock() >= record.until:
            return ""
        return (
            f"{record.failures} nodes of type {node_type} in a row did not come up;"
            f" the next try is in {record.until - self._clock():.0f} s. The last one: {record.reason}"
        )
