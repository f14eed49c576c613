"""A Ray node as the cluster knows it: what is seen of it, what it says, and Ray's tags. Pure."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ray_slurm_provider.backends.base import Sighting
from ray_slurm_provider.backends.login_process import PREFIX
from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.reports import READY, NodeReport

# Ray's own names (ray/autoscaler/tags.py); the contract tests compare them.
TAG_KIND = "ray-node-type"
TAG_TYPE = "ray-user-node-type"
TAG_STATUS = "ray-node-status"
KIND_HEAD = "head"
STATUS_UP_TO_DATE = "up-to-date"
# The state of a job that SLURM showed and does not know any more.
VANISHED = "gone, and SLURM does not say how it ended"


class Node(NamedTuple):
    """A Ray node of the cluster."""

    node_id: str  # its id
    tags: Mapping[str, str]  # Ray's tags as they are now
    seen: Sighting  # what the backend sees of it
    report: NodeReport | None = None  # what it says of itself; None when it has said nothing yet

    @property
    def is_head(self) -> bool:
        return self.tags.get(TAG_KIND) == KIND_HEAD

    @property
    def ready(self) -> bool:
        return self.report is not None and self.report.phase == READY

    @property
    def settled(self) -> bool:
        """Whether nothing is expected to change: it runs, and Ray with it."""
        return self.ready and self.seen.alive and not self.seen.queued

    @property
    def came_up(self) -> bool:
        """Whether Ray runs there, or did."""
        return self.report is not None and bool(self.report.ready_at)

    @property
    def label(self) -> str:
        return f"process {self.node_id}" if self.node_id.startswith(PREFIX) else f"job {self.node_id}"

    @property
    def names(self) -> set[str]:
        """By what people may call it: its id, job, address, SLURM node and host."""
        report = self.report
        found = {self.node_id, job_id_of(self.node_id), self.address, self.seen.place, report.host if report else ""}
        return found - {""}

    @property
    def address(self) -> str:
        """The address that Ray uses there, or a name for a node that has none yet."""
        if self.report is not None and self.report.address:
            return self.report.address
        return self.node_id if self.node_id.startswith(PREFIX) else f"slurm-job-{self.node_id}"


def join(
    sightings: Iterable[Sighting],
    changes: Mapping[str, Mapping[str, str]],
    reports: Mapping[str, NodeReport | None],
    only_head: str = "",
) -> dict[str, Node]:
    """Return the cluster's nodes, alive or just ended, by id.

    Args:
        sightings: What the backend sees; this alone decides what exists.
        changes: Tags that changed since birth, by node id.
        reports: What nodes say of themselves, by node id.
        only_head: Leave out the workers of other heads; "" for all.
    """
    nodes = {}
    for seen in sightings:
        if only_head and only_head not in (seen.head, seen.node_id):
            continue
        node_id = seen.node_id
        report = reports.get(node_id)
        tags = seen.birth_tags
        if report is not None and report.phase == READY:
            tags = {**tags, TAG_STATUS: STATUS_UP_TO_DATE}
        if node_id in changes:
            tags = {**tags, **changes[node_id]}
        nodes[node_id] = Node(node_id, tags, seen, report)
    return nodes
