"""Jobs that SLURM believes to run although they have ended.

A controller that crashes forgets its last seconds, and with them the ends of jobs: after its return they run again, in
its books, until somebody cancels them. Ray would wait for such a node for ever, and count on it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_slurm_provider.reports import ENDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_slurm_provider.nodes import Node

logger = logging.getLogger(__name__)

# Longer than the end of a job takes after its agent has said goodbye, KillWait and an epilogue included.
_LASTS_S = 45.0


class Ghosts:
    """Looks for them.

    Args:
        clock: A monotonic clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}

    def suspects(self, node: Node) -> bool:
        """Tell whether a node runs by SLURM's word, and has ended by its own."""
        return node.seen.alive and not node.seen.queued and node.report is not None and node.report.phase == ENDED

    def among(self, nodes: Iterable[Node]) -> list[str]:
        """Return those that said long ago that they have ended, and still run by SLURM's word."""
        now = self._clock()
        doubtful = {node.node_id for node in nodes if self.suspects(node)}
        self._since = {node_id: self._since.get(node_id, now) for node_id in doubtful}
        found = [node_id for node_id, since in self._since.items() if now - since >= _LASTS_S]
        for node_id in found:
            logger.warning("job %s has ended, and SLURM does not know it; cancelling it", node_id)
        return found
