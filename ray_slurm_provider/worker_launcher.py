"""Submits the workers that Ray's autoscaler asks for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE, INSTANCE_VARIABLE
from ray_slurm_provider.backends.base import Launch
from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.backends.login_process import PREFIX as LOGIN_PREFIX
from ray_slurm_provider.config import NodeConfig
from ray_slurm_provider.deferred_launches import NODES_FULL, QUEUE_FULL, DeferredLaunches, LaunchRequest
from ray_slurm_provider.errors import (
    ConfigError,
    LaunchDelayed,
    SlurmError,
    StateError,
    SubmitRejected,
    SubmitUnanswered,
)
from ray_slurm_provider.nodes import TAG_TYPE, Node
from ray_slurm_provider.reports import ENDED
from ray_slurm_provider.site_file import rules_in_force

if TYPE_CHECKING:
    from ray_slurm_provider.cluster import Cluster  # which imports this module

logger = logging.getLogger(__name__)

# How often squeue is asked for what sbatch may have submitted, and for how long.
_LOOK_AGAIN_S = 10.0
_UNANSWERED_S = 600.0
_REASONS_TO_WAIT = (LaunchDelayed, SubmitRejected, ConfigError)


class WorkerLauncher:
    """Launches the workers of one cluster.

    Each request passes a chain of gates. A gate returns why not all of it may be launched now, and how many may
    (`LaunchDelayed.allowed`); or raises when nothing of it may ever be. Those that count what is in SLURM have it to
    themselves until the submission is done, so they come last.
    """

    def __init__(self, cluster: Cluster, environ: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._cluster = cluster
        self._environ = environ
        self._deferred = DeferredLaunches(clock)
        self._creating = threading.Lock()
        self._clock = clock
        # Submissions that may have been taken, by their tokens: of which node type, and since when.
        self._unanswered: dict[str, tuple[str, float]] = {}
        self._looked_for_at = float("-inf")
        self._gates = (self._back_off, self._require_directory)
        self._counting_gates = (self._limit_queue, self._limit_nodes)

    def create(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int) -> list[str]:
        """Submit the jobs of workers and return their node ids.

        What cannot be submitted now is deferred when Ray knows why, see `deferred_launches`.

        Raises:
            StateError: The cluster is being taken down, or this is not a head's job.
            SlurmUnavailable: SLURM does not answer.
            LaunchDelayed, SubmitRejected, SubmitUnanswered, ConfigError: Ray does not know yet why they have to wait.
        """
        self._require_live_head()
        request = LaunchRequest(node_type, config, tags, count)
        try:
            self._launch(request)
        except (*_REASONS_TO_WAIT, SubmitUnanswered) as error:
            if self._deferred.is_news(node_type, error):
                raise
            self._deferred.defer(request)
        return request.made

    def launch_deferred(self) -> None:
        """Launch what was asked for before and could not be launched then."""
        late = self._late()
        waiting = self._deferred.take()
        _count(late, waiting)
        if waiting:
            try:
                self._require_live_head()
            except StateError:
                return
        answers = True
        for request in waiting:
            try:
                # A SLURM that does not answer would keep us waiting for each of them.
                if answers:
                    self._launch(request)
            except (*_REASONS_TO_WAIT, StateError):
                pass
            except SlurmError:
                answers = False
            if request.missing:
                self._deferred.defer(request)

    def _late(self, node_type: str = "") -> list[Node]:
        """Return the nodes of unanswered submissions that squeue shows by now, each once."""
        tokens = {token for token, (of_type, _) in list(self._unanswered.items()) if node_type in {"", of_type}}
        nodes = self._cluster.nodes().values() if tokens else ()
        shown = {node.node_id.rpartition("-")[2] for node in nodes} & tokens
        mine = {token for token in shown if self._unanswered.pop(token, None) is not None}
        return [node for node in nodes if node.node_id.rpartition("-")[2] in mine]

    def _look_for_unanswered(self, request: LaunchRequest) -> None:
        """Before more is submitted, look once more for what was."""
        now = self._clock()
        for token, (_, since) in list(self._unanswered.items()):
            if now - since >= _UNANSWERED_S:
                self._unanswered.pop(token, None)
        if request.node_type not in {of_type for of_type, _ in list(self._unanswered.values())}:
            return
        # The back-off has let more time pass since the submission.
        if now - self._looked_for_at >= _LOOK_AGAIN_S:
            self._looked_for_at = now
            self._cluster.forget_listing()
        _count(self._late(request.node_type), [request])

    def _require_live_head(self) -> None:
        """Raise `StateError` when nothing may be submitted any more, or not by this process."""
        if self._cluster.directory.stopping:
            raise StateError(f"cluster {self._cluster.name} is being taken down; nothing is submitted")
        if not (self._environ.get(INSTANCE_VARIABLE) and self._environ.get(GCS_ADDRESS_VARIABLE)):
            raise StateError("workers are submitted by the head's autoscaler; this process is not a head's")
        report = self._cluster.directory.report(self._environ[INSTANCE_VARIABLE])
        if report is not None and report.phase == ENDED:
            raise StateError(f"the head {report.node_id} is ending; nothing is submitted")

    def _launch(self, request: LaunchRequest) -> None:
        """Submit as many jobs of a request as may be; raise why the others have to wait."""
        for gate in self._gates:
            if (refusal := gate(request)) is not None:
                raise refusal
        self._look_for_unanswered(request)
        allowed, delay = request.missing, None
        with self._creating:
            for counting_gate in self._counting_gates:
                found = counting_gate(request, allowed)
                if found is not None:
                    allowed, delay = found.allowed, found
            if allowed:
                self._submit(request, allowed)
        if delay is not None:
            raise delay
        self._deferred.launched(request.node_type)

    def _back_off(self, request: LaunchRequest) -> LaunchDelayed | None:
        return self._cluster.launches.delay_reason(request.node_type)

    def _require_directory(self, _: LaunchRequest) -> LaunchDelayed | None:
        missing = self._cluster.directory.missing
        if not missing:
            return None
        return LaunchDelayed(
            "slurm-no-directory",
            f"{missing} cannot be seen: was the cluster's directory deleted? No node can start without it;"
            " `ray down` ends the cluster and `ray up` starts it again",
        )

    def _limit_queue(self, request: LaunchRequest, count: int) -> LaunchDelayed | None:
        rules = rules_in_force(self._cluster.settings)
        of_all = (self._cluster.settings.max_queued_jobs, rules.limits.max_queued_jobs if rules is not None else None)
        limits = [(limit, "of the cluster") for limit in of_all if limit is not None]
        if request.config.max_queued_jobs is not None:
            limits.append((request.config.max_queued_jobs, "of this type"))
        fitting, by = count, ""
        for limit, whose in limits:
            queued = [node.tags.get(TAG_TYPE) for node in self._cluster.nodes().values() if node.seen.queued]
            free = limit - (queued.count(request.node_type) if whose == "of this type" else len(queued))
            if free < fitting:
                fitting, by = max(0, free), f"{limit} {whose}"
        if fitting == count:
            return None
        waiting = f"{count - fitting} jobs of type {request.node_type} have to wait"
        reason = f"{waiting}: no more than {by} may be in the queue (max_queued_jobs)"
        return LaunchDelayed(QUEUE_FULL, reason, allowed=fitting)

    def _limit_nodes(self, request: LaunchRequest, count: int) -> LaunchDelayed | None:
        rules = rules_in_force(self._cluster.settings)
        most = rules.limits.max_nodes if rules is not None else None
        if rules is None or most is None:
            return None
        in_slurm = [node_id for node_id in self._cluster.nodes() if not node_id.startswith(LOGIN_PREFIX)]
        fitting = min(count, max(0, most - len(in_slurm)))
        if fitting == count:
            return None
        path, waiting = f"available_node_types.{request.node_type}", f"{count - fitting} nodes have to wait"
        reason = rules.refusal(path, waiting, "limits.max_nodes", f"at most {most}, the head included")
        return LaunchDelayed(NODES_FULL, str(reason), allowed=fitting)

    def _submit(self, request: LaunchRequest, count: int) -> None:
        environ = self._cluster.directory.environment() or job_environment(self._environ)
        launch = replace(
            self._cluster.launch(request.node_type, request.config, request.tags, environ),
            head=self._environ[INSTANCE_VARIABLE],
            gcs_address=self._environ[GCS_ADDRESS_VARIABLE],
            avoid=self._cluster.launches.avoided(),
        )
        try:
            self._create_in_batches(launch, count, request.made)
        except (SubmitRejected, SubmitUnanswered) as error:
            if isinstance(error, SubmitUnanswered):
                self._unanswered[error.token] = request.node_type, self._clock()
            self._cluster.launches.refused(request.node_type, error.complaint, error.launch_category)
            raise

    def _create_in_batches(self, launch: Launch, count: int, made: list[str]) -> None:
        """Create nodes, as many at once as may be; where a limit on jobs is near, as many as fit below it."""
        largest = self._cluster.batch_size(launch) if count > 1 else 1
        left = count
        while left:
            batch = min(left, largest)
            try:
                made.extend(self._cluster.create(launch, batch))
                left -= batch
            except SubmitRejected as error:
                if batch > 1:
                    # Perhaps the site takes no arrays at all.
                    largest = batch // 2 if error.not_now or error.category == "array" else 1
                elif launch.avoid and not error.not_now:
                    # If there are no others, it may start on those that are to be avoided.
                    logger.warning("without %s sbatch refuses type %s", ",".join(launch.avoid), launch.node_type)
                    launch = replace(launch, avoid=())
                else:
                    raise


def _count(late: Iterable[Node], requests: Sequence[LaunchRequest]) -> None:
    """Count nodes for what is wanted of their types, as Ray does with nodes that it did not expect."""
    for node in late:
        of_type = (request for request in requests if request.node_type == node.tags.get(TAG_TYPE) and request.missing)
        if (request := next(of_type, None)) is not None:
            request.made.append(node.node_id)
