"""What every place where Ray nodes run can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ray_slurm_provider.config import NodeConfig, SlurmSettings


class Sighting(NamedTuple):
    """What a backend sees of one node of the cluster.

    Attributes:
        node_id: The Ray node's id.
        head: Node id of the head that it works for; "" for a head.
        birth_tags: Ray's tags when it was created.
        alive: Whether it waits or runs.
        queued: Whether it still waits.
        state: The backend's own word for its state.
        reason: Why it is so; may be "".
        place: Where it runs; "" while it waits.
        start: When it started or may start; may be "".
        time_limit: How long it may run; may be "".
        end: When it ends at the latest, or has ended; may be "".
    """

    node_id: str
    head: str
    birth_tags: Mapping[str, str] = MappingProxyType({})
    alive: bool = True
    queued: bool = False
    state: str = ""
    reason: str = ""
    place: str = ""
    start: str = ""
    time_limit: str = ""
    end: str = ""


@dataclass(frozen=True)
class Launch:
    """A node to be created.

    Attributes:
        cluster: The cluster's name.
        home: Fingerprint of the cluster's directory.
        cluster_dir: The cluster's directory.
        settings: The cluster's settings.
        node_type: The Ray node type.
        config: Its resolved configuration.
        tags: Ray's tags.
        head: Node id of the head that it works for; "" for a head.
        gcs_address: Where that head listens; "" for a head.
        avoid: SLURM nodes on which it shall not start.
        environ: The environment that the node starts with.
    """

    cluster: str
    home: str
    cluster_dir: Path
    settings: SlurmSettings
    node_type: str
    config: NodeConfig
    tags: Mapping[str, str]
    head: str = ""
    gcs_address: str = ""
    avoid: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)


class NodeBackend(Protocol):
    """Creates, lists and ends nodes in one place."""

    def sightings(self) -> list[Sighting]:
        """Return the cluster's nodes, also those that ended a short while ago.

        Raises:
            SlurmError: Nothing is known now. Never an incomplete list.
        """

    def batch_size(self, launch: Launch) -> int:
        """Return how many nodes of a launch one `create` may make."""

    def create(self, launch: Launch, count: int = 1) -> list[str]:
        """Create nodes, all or none of them, and return their ids; the next `sightings` holds them."""

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End nodes; one that has ended already is no error."""

    def still_there(self, node_ids: Iterable[str]) -> str:
        """Ask about nodes that the listing does not hold any more; return one that exists, "" when there is none."""

    def how_ended(self, node_id: str) -> str:
        """Return how a node ended, for a person."""
