"""What every place where Ray nodes run can do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ray_slurm_provider.config import NodeConfig, SlurmSettings


class Sighting(NamedTuple):
    """What a backend sees of one node of the cluster."""

    node_id: str  # the Ray node's id
    head: str  # node id of the head that it works for; "" for a head
    birth_tags: Mapping[str, str] = MappingProxyType({})  # Ray's tags when it was created
    alive: bool = True  # whether it waits or runs
    queued: bool = False  # whether it still waits
    state: str = ""  # the backend's own word for its state
    reason: str = ""  # why it is so; may be ""
    place: str = ""  # where it runs; "" while it waits
    start: str = ""  # when it started or may start; may be ""
    time_limit: str = ""  # how long it may run; may be ""
    end: str = ""  # when it ends at the latest, or has ended; may be ""


@dataclass(frozen=True)
class Launch:
    """A node to be created."""

    cluster: str  # the cluster's name
    home: str  # fingerprint of the cluster's directory
    cluster_dir: Path  # the cluster's directory
    settings: SlurmSettings  # the cluster's settings
    node_type: str  # the Ray node type
    config: NodeConfig  # its resolved configuration
    tags: Mapping[str, str]  # Ray's tags
    head: str = ""  # node id of the head that it works for; "" for a head
    gcs_address: str = ""  # where that head listens; "" for a head
    avoid: Sequence[str] = ()  # SLURM nodes on which it shall not start
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # the environment that the node starts with


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
