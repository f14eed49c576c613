"""Launches that were asked for and are not possible yet.

Ray's autoscaler v2 keeps a row for every launch that failed, for ever, and asks again in each round: a node type that
may not be launched for days would make it slower and slower. So a reason is told once; what is asked for after that is
held here, and launched when the reason is gone. Ray waits ten minutes for a node to appear
(RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S) and then asks anew; by then it is not held any more.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_slurm_provider.config import NodeConfig
    from ray_slurm_provider.errors import SlurmProviderError

logger = logging.getLogger(__name__)

# A little less than Ray waits.
_HELD_S = 570.0
# These pass by themselves: no failures at all.
_NOT_NOW = frozenset({"slurm-limit", "slurm-queue-full"})


@dataclass
class HeldLaunch:
    """Nodes of one request that are not there yet.

    Attributes:
        node_type: Their type.
        config: Their configuration.
        tags: Ray's tags.
        count: How many.
        until: When Ray asks for them anew, by the clock.
    """

    node_type: str
    config: NodeConfig
    tags: Mapping[str, str]
    count: int
    until: float


class HeldLaunches:
    """What one autoscaler waits for.

    Args:
        clock: A monotonic clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: list[HeldLaunch] = []
        self._told: dict[str, str] = {}

    def is_news(self, node_type: str, error: SlurmProviderError) -> bool:
        """Tell whether Ray shall hear of this reason: each once, until a node of the type was launched."""
        known = self._told.get(node_type) == error.launch_category
        if not known:
            self._told[node_type] = error.launch_category
            logger.warning("nodes of type %s cannot be launched: %s", node_type, error)
        return not known and error.launch_category not in _NOT_NOW

    def launched(self, node_type: str) -> None:
        """Note that nodes of a type could be launched."""
        self._told.pop(node_type, None)

    def hold(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int) -> None:
        """Keep what is missing of a request."""
        with self._lock:
            self._held.append(HeldLaunch(node_type, config, tags, count, self._clock() + _HELD_S))

    def take(self) -> list[HeldLaunch]:
        """Return what is held, and hold it no longer; what Ray asks for anew is left out."""
        with self._lock:
            taken, self._held = self._held, []
        return [held for held in taken if self._clock() < held.until]

    def put_back(self, held: HeldLaunch) -> None:
        """Hold something again."""
        with self._lock:
            self._held.append(held)
