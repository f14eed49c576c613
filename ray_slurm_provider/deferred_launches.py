"""Launches that were asked for and are not possible yet.

Ray's autoscaler v2 keeps a row for every launch that failed, for ever, and asks again in each round: a node type that
may not be launched for days would make it slower and slower. So a reason is told once; what is asked for after that is
deferred, and launched when the reason is gone. Ray waits ten minutes for a node to appear
(RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S) and then asks anew; by then it is dropped here.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ray_slurm_provider.backoff import LIMIT
from ray_slurm_provider.config import NodeConfig
from ray_slurm_provider.errors import SlurmProviderError

logger = logging.getLogger(__name__)

# A little less than Ray waits.
_DEFERRED_S = 570.0
QUEUE_FULL = "slurm-queue-full"
NODES_FULL = "slurm-nodes-full"
# These pass by themselves: no failures at all.
_PASSING = frozenset({LIMIT, QUEUE_FULL, NODES_FULL})


@dataclass
class LaunchRequest:
    """Workers of one type that Ray asked for together."""

    node_type: str
    config: NodeConfig
    tags: Mapping[str, str]
    count: int
    made: list[str] = field(default_factory=list)  # node ids
    until: float = 0.0  # Ray asks for them anew then, by the clock; 0 while it is not deferred

    @property
    def missing(self) -> int:
        return self.count - len(self.made)


class DeferredLaunches:
    """What one autoscaler waits for, and which reasons it knows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._requests: list[LaunchRequest] = []
        self._told: dict[str, str] = {}

    def is_news(self, node_type: str, error: SlurmProviderError) -> bool:
        """Return whether Ray has to hear of this reason: each once, until a node of the type was launched."""
        known = self._told.get(node_type) == error.launch_category
        if not known:
            self._told[node_type] = error.launch_category
            logger.warning("nodes of type %s cannot be launched: %s", node_type, error)
        return not known and error.launch_category not in _PASSING

    def launched(self, node_type: str) -> None:
        self._told.pop(node_type, None)

    def defer(self, request: LaunchRequest) -> None:
        """Keep what is missing of a request."""
        request.until = request.until or self._clock() + _DEFERRED_S
        with self._lock:
            self._requests.append(request)

    def take(self) -> list[LaunchRequest]:
        """Return what is deferred, and keep it no longer; what Ray asks for anew is left out."""
        with self._lock:
            taken, self._requests = self._requests, []
        return [request for request in taken if self._clock() < request.until]
