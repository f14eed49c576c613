"""What is known of a cluster's nodes, and when SLURM is asked again.

The autoscaler asks seldom while nothing changes: each job writes down how it stands, and one stat shows whether any
has.
"""

from collections.abc import Callable, Iterable, Mapping

from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE, INSTANCE_VARIABLE
from ray_slurm_provider.backends.base import Launch, NodeBackend, Sighting
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.errors import SlurmParseError
from ray_slurm_provider.nodes import VANISHED, Node, join
from ray_slurm_provider.report_cache import ReportCache
from ray_slurm_provider.reports import ENDED

_LOOK_S = 1.0
# While a job waits, starts or ends, the autoscaler asks so many times as often as at rest.
_BUSY_RATE = 6
# For people who watch; what nodes say they see at each look.
_FOR_PEOPLE_S = 5.0
# How long a controller that did not answer is left in peace.
_TROUBLE_S = 5.0
# Ray asks about nodes that have just gone, but not about all that ever were.
_REMEMBERED = 2000
# The state of a job that was submitted and that SLURM does not know: a controller that crashes forgets seconds.
_LOST = "LOST"


class Listing:
    """The nodes of one cluster.

    Attributes:
        nodes: Those that wait or run, by id. One that was created here is listed once even when it has ended
            meanwhile, or when the controller has forgotten it: otherwise Ray would wait ten minutes for it to appear.
        known: These, and those that were seen last before, as they were then.
        ended: Those that have ended since the look before.
    """

    def __init__(
        self,
        backend: NodeBackend,
        directory: ClusterDir,
        settings: SlurmSettings,
        environ: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.known: dict[str, Node] = {}
        self.ended: list[Node] = []
        self._backend = backend
        self._directory = directory
        self._clock = clock
        self._own = environ.get(INSTANCE_VARIABLE, "")
        self._patient = bool(environ.get(GCS_ADDRESS_VARIABLE))
        self._inside = self._patient and environ.get("RAY_SLURM_DIR") == str(directory.root)
        self._rest_s = float(settings.listing_interval_s)
        self._reports = ReportCache(directory.reports, clock, eager=not self._patient)
        self._sightings: list[Sighting] = []
        self._tags: Mapping[str, Mapping[str, str]] = {}
        self._unlisted: dict[str, Launch] = {}
        self._ending: set[str] = set()
        self._cancelling: set[str] = set()
        self._gone: set[str] = set()
        self._looked_at = self._asked_at = self._news_at = float("-inf")
        self._busy = self._passing = False
        self._trouble: Exception | None = None

    @property
    def is_due(self) -> bool:
        return self._clock() - self._looked_at > _LOOK_S

    def invalidate_view(self) -> None:
        """Look at the next question, however soon that is."""
        self._looked_at = float("-inf")

    def invalidate(self) -> None:
        """Look at the next question, and ask SLURM."""
        self._looked_at = self._asked_at = float("-inf")
        self._trouble = None

    def submitted(self, node_ids: Iterable[str], launch: Launch) -> None:
        """Expect nodes: one that SLURM never shows is listed once as ended."""
        self._unlisted.update(dict.fromkeys(node_ids, launch))

    def stop_expecting(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            self._unlisted.pop(node_id, None)
            self._cancelling.add(node_id)

    def cancel_is_over(self, node_ids: Iterable[str]) -> None:
        self._cancelling.difference_update(node_ids)

    def cancelled(self, node_ids: Iterable[str]) -> None:
        self._ending |= self.nodes.keys() & set(node_ids)

    def look(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        now = self._clock()
        news = self._reports.has_news()
        if news:
            self._news_at = now
        asks = now - self._asked_at >= self._interval()
        if asks:
            self._sightings = self._ask(tags)
        elif self._trouble is not None:
            raise self._trouble.with_traceback(None)
        self._looked_at = now
        self.ended = []
        if asks or news or self._reports.is_due() or self._unlisted or self._passing or tags != self._tags:
            self._build(tags)

    def _interval(self) -> float:
        if not self._patient:
            return _FOR_PEOPLE_S
        busy = self._rest_s / _BUSY_RATE
        if self._trouble is not None:
            return min(_TROUBLE_S, busy)
        # After news, and once more later: a job ends a little after it has said so.
        return busy if self._busy or self._ending or self._news_at > self._asked_at - busy else self._rest_s

    def _ask(self, tags: Iterable[str]) -> list[Sighting]:
        now = self._clock()
        try:
            sightings = self._backend.sightings()
            self._verify_complete(tags, {seen.node_id for seen in sightings})
        except Exception as error:
            # Whatever it was: until the next answer nothing is known, and no old answer stands in.
            self._trouble, self._asked_at = error, now
            raise
        self._trouble, self._asked_at = None, now
        return sightings

    def _verify_complete(self, tags: Iterable[str], seen_ids: set[str]) -> None:
        if self._inside and self._own not in seen_ids:
            raise SlurmParseError(["squeue"], 0, "", f"the answer lacks this very job, {self._own}")
        expected = {*self.nodes, *self._unlisted}
        if not self._inside:
            # A process that has just begun remembers nothing; the directory does.
            expected |= {*tags, *self._head_that_said_so()} - self._gone
        self.verify_missing(expected, seen_ids)
        self._gone |= expected - seen_ids - self._ending

    def verify_missing(self, expected: Iterable[str], seen_ids: set[str]) -> None:
        """Ask a second time about every node that an answer does not hold: unknown is not gone.

        Raises:
            SlurmError: One of them still lives.
        """
        # Those that were cancelled here may go without a trace.
        found = self._backend.still_there(set(expected) - seen_ids - self._ending)
        if found:
            raise SlurmParseError(["squeue"], 0, "", f"the answer lacks job {found}, which the controller knows")

    def _head_that_said_so(self) -> set[str]:
        """Return the head by its own report, when that does not say that it ended."""
        report = self._directory.head_report()
        return {report.node_id} if report is not None and report.phase != ENDED else set()

    def _build(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        sightings = [*self._sightings, *self._lost()]
        found = join(sightings, tags, self._reports.read(sightings), self._own if self._inside else "")
        vanished = sorted(self.nodes.keys() - found.keys() - self._ending - self._cancelling)
        self.ended = [
            *(node for node_id, node in found.items() if not node.seen.alive and node_id in self.nodes),
            *(self._vanished(self.nodes[node_id]) for node_id in vanished),
        ]
        self.nodes = {i: node for i, node in found.items() if node.seen.alive or i in self._unlisted}
        self._tags = tags
        self._unlisted = {}
        self._ending &= self.nodes.keys()
        self._passing = any(not node.seen.alive for node in self.nodes.values())
        self._busy = not all(node.settled for node in self.nodes.values())
        self._remember(found)

    def _lost(self) -> list[Sighting]:
        """Return as ended what was submitted and SLURM does not show."""
        if not self._unlisted:
            return []
        seen_ids = {seen.node_id for seen in self._sightings}
        return [
            Sighting(node_id, launch.head, launch.tags, alive=False, state=_LOST)
            for node_id, launch in self._unlisted.items()
            if node_id not in seen_ids
        ]

    def _vanished(self, node: Node) -> Node:
        """Return a node whose end was missed, an outage or a small MinJobAge long, with what it said last."""
        unknown = node.seen.alive or node.seen.state == _LOST
        seen = node.seen._replace(alive=False, state=VANISHED) if unknown else node.seen
        return node._replace(seen=seen, report=self._directory.report(node.node_id) or node.report)

    def _remember(self, found: Mapping[str, Node]) -> None:
        self.known.update(found)
        too_many = len(self.known) - len(found) - _REMEMBERED
        if too_many > 0:
            gone = [node_id for node_id in self.known if node_id not in found]
            for node_id in gone[:too_many]:
                del self.known[node_id]
