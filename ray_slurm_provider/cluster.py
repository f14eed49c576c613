"""A cluster: joins what the backend sees with the diary and the reports.

The only holder of locks and of the listing cache. Ray calls from several threads: a listing is asked for
once and shared for a moment, and dropped whenever something was created or ended.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ray_slurm_provider import procfs, tls
from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE, TEMP_DIR_VARIABLE, V2_VARIABLE
from ray_slurm_provider.backends.base import Launch, Sighting
from ray_slurm_provider.backends.launch_script import canary_script, preview_script
from ray_slurm_provider.backends.login_process import PREFIX as LOGIN_PREFIX
from ray_slurm_provider.backends.login_process import LoginProcess
from ray_slurm_provider.backends.places import Places
from ray_slurm_provider.backends.slurm_jobs import SlurmJobs
from ray_slurm_provider.batch_script import log_path
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.cluster_dir import ClusterDir, log_tail
from ray_slurm_provider.errors import (
    ConfigError,
    LaunchDelayed,
    NodeNotFound,
    SlurmError,
    SlurmParseError,
    StateError,
    SubmitRejected,
)
from ray_slurm_provider.ghosts import Ghosts
from ray_slurm_provider.held_launches import HeldLaunches
from ray_slurm_provider.launch_control import LaunchControl
from ray_slurm_provider.nodes import TAG_STATUS, TAG_TYPE, Node, join
from ray_slurm_provider.reports import ENDED
from ray_slurm_provider.site_file import rules_in_force
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from ray_slurm_provider.backends.base import NodeBackend
    from ray_slurm_provider.config import NodeConfig, SlurmSettings

logger = logging.getLogger(__name__)

_CACHE_S = 1.0
_CLEANUP_TIMEOUT_S = 120.0
# The state of a job that was submitted and that SLURM does not know: a controller that crashes forgets seconds.
_LOST = "LOST"
_INSTANCE_VARIABLE = "RAY_CLOUD_INSTANCE_ID"
# What belongs to the shell or the node of `ray up` and must not follow the job to another.
_NOT_FOR_JOBS = (
    "RAY_",
    "AUTOSCALER_",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "PMI_",
    "PMIX_",
)


@dataclass
class _Listing:
    nodes: dict[str, Node] = field(default_factory=dict)
    time: float = float("-inf")


class Cluster:
    """One Ray cluster on SLURM.

    Args:
        name: The cluster's name.
        settings: ``provider.slurm``.
        environ: The environment of this process.
        backend: Where its nodes run; SLURM and the login node when None.
        clock: A monotonic clock, seconds.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self,
        name: str,
        settings: SlurmSettings,
        environ: Mapping[str, str] | None = None,
        backend: NodeBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.settings = settings
        self.directory = ClusterDir(settings.directory(), name)
        self._environ = dict(os.environ if environ is None else environ)
        self._clock = clock
        self._backend = backend or Places(
            SlurmJobs(self.slurm_client(), name, self.directory.fingerprint, BirthRecords(self.directory.births)),
            LoginProcess(self.directory, name),
        )
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        self._listing = _Listing()
        self._known: dict[str, Node] = {}
        self._unlisted: dict[str, Sighting] = {}
        self._held = HeldLaunches(clock)
        self._ghosts = Ghosts(clock)
        self.launches = LaunchControl(self.directory, settings.pause_after_failures, wall_clock)

    def slurm_client(self) -> SlurmClient:
        """Return a way to SLURM with this cluster's settings."""
        settings = self.settings
        return SlurmClient(
            SlurmTools(settings.slurm_bin or "", settings.command_timeout_s, self._environ, settings.clusters or "")
        )

    # -- questions ------------------------------------------------------------------------------

    def nodes(self) -> dict[str, Node]:
        """Return the nodes that wait or run, by id.

        A node that was created here is listed once even when it has ended meanwhile, or when the controller has
        forgotten it: otherwise Ray's autoscaler would wait ten minutes for it to appear.

        Raises:
            SlurmError: Nothing is known now.
        """
        with self._lock:
            if self._clock() - self._listing.time > _CACHE_S:
                self._refresh()
            return dict(self._listing.nodes)

    def node(self, node_id: str) -> Node:
        """Return a node, also one that has ended, as it was when last seen.

        Raises:
            NodeNotFound: This cluster has never had it.
        """
        found = self.nodes().get(node_id) or self._known.get(node_id)
        if found is None:
            raise NodeNotFound(f"node {node_id} is not one of cluster {self.name}")
        return found

    def last_seen(self, node_id: str) -> Node:
        """Return a node from the last listing, without asking again."""
        found = self._known.get(node_id)
        return found if found is not None else self.node(node_id)

    def is_alive(self, node_id: str) -> bool:
        """Tell whether a node waits or runs."""
        return node_id in self.nodes()

    def head(self) -> Node | None:
        """Return the living head, None when there is none."""
        return next((node for node in self.nodes().values() if node.is_head and node.seen.alive), None)

    def minimum_of(self, node_ids: Iterable[str]) -> set[str]:
        """Return those of some workers that ``min_workers`` of their types keeps; those that run come first."""
        left = self.directory.min_workers()
        kept = set()
        for node in sorted((self.last_seen(node_id) for node_id in node_ids), key=lambda node: node.seen.queued):
            node_type = node.tags.get(TAG_TYPE, "")
            if left.get(node_type, 0) > 0:
                left[node_type] -= 1
                kept.add(node.node_id)
        return kept

    def log_of(self, node_id: str) -> Path:
        """Return where the job of a node writes."""
        return log_path(self.directory.root, node_id)

    def obituary(self, node_id: str) -> str:
        """Return how and why a node ended, with the last lines of its log."""
        why = self.directory.reason(node_id)
        report = self.directory.report(node_id)
        if not why and report is not None:
            why = report.reason
        known = self._known.get(node_id)
        lines = [f"{known.label if known else node_id} ended: {self._backend.how_ended(node_id)}"]
        lines += [f"  reason: {why}"] if why else []
        lines += [f"  log: {self.log_of(node_id)}"]
        return "\n".join(lines + [f"  | {line}" for line in log_tail(self.log_of(node_id))])

    def forget_listing(self) -> None:
        """Ask anew at the next question."""
        with self._lock:
            self._listing = _Listing(self._listing.nodes)

    # -- changes --------------------------------------------------------------------------------

    def create_head(self, node_type: str, config: NodeConfig, tags: Mapping[str, str]) -> str:
        """Submit the head's job and return its node id; that of another `ray up` which was faster.

        Raises:
            StateError: Another `ray up` has submitted a head of another configuration.
        """
        self.directory.prepare()
        if self.settings.tls:
            tls.make_authority(self.directory.tls, self.name)
        self.directory.set_stopping(False)
        environ = job_environment(self._environ)
        self.directory.save_environment(environ)
        with self.directory.head_lock():
            self.forget_listing()
            present = self.head()
            if present is None:
                # What a head that was lost together with its host has left in the queue.
                self.terminate(list(self.nodes()))
                return self._create(self._launch(node_type, config, tags, environ))
        if all(present.tags.get(name) == value for name, value in tags.items() if name != TAG_STATUS):
            logger.warning("another `ray up` has submitted the head, %s", present.label)
            return present.node_id
        raise StateError(
            f"another `ray up` has submitted {present.label} with another configuration meanwhile; run `ray up` again"
        )

    def create_workers(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int) -> list[str]:
        """Submit the jobs of workers; called in the head's job, by Ray's autoscaler.

        What cannot be submitted now is held, see `held_launches`, when Ray knows why.

        Raises:
            StateError: The cluster is being taken down, or this is not a head's job.
            SlurmUnavailable: SLURM does not answer.
            LaunchDelayed: Nodes of this type failed too often, or as many wait in the queue as may.
            SubmitRejected: SLURM does not take them.
            ConfigError: The site does not allow them.
        """
        self._refuse_at_the_end()
        made: list[str] = []
        try:
            self._launch_workers(node_type, config, tags, count, made)
        except (LaunchDelayed, SubmitRejected, ConfigError) as error:
            # The old autoscaler keeps no rows, and asks again.
            if self._environ.get(V2_VARIABLE) != "1" or self._held.is_news(node_type, error):
                raise
            self._held.hold(node_type, config, tags, count - len(made))
        else:
            self._held.launched(node_type)
        return made

    def launch_held(self) -> None:
        """Launch what was asked for before and could not be launched then."""
        waiting = self._held.take()
        if waiting:
            try:
                self._refuse_at_the_end()
            except StateError:
                return
        for held in waiting:
            made: list[str] = []
            try:
                self._launch_workers(held.node_type, held.config, held.tags, held.count, made)
            except (LaunchDelayed, SubmitRejected, ConfigError, SlurmError):
                held.count -= len(made)
                self._held.put_back(held)
            else:
                self._held.launched(held.node_type)

    def _refuse_at_the_end(self) -> None:
        """Raise `StateError` when nothing may be submitted any more, or not by this process."""
        if self.directory.stopping:
            raise StateError(f"cluster {self.name} is being taken down; nothing is submitted")
        if not (self._environ.get(_INSTANCE_VARIABLE) and self._environ.get(GCS_ADDRESS_VARIABLE)):
            raise StateError("workers are submitted by the head's autoscaler; this process is not a head's")
        report = self.directory.report(self._environ[_INSTANCE_VARIABLE])
        if report is not None and report.phase == ENDED:
            raise StateError(f"the head {report.node_id} is ending; nothing is submitted")

    def _launch_workers(
        self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int, made: list[str]
    ) -> None:
        """Submit jobs, as many as may be; add their nodes to a list."""
        self.launches.check(node_type)
        with self._creating:
            fitting, limit = self._fitting(node_type, config, count)
            self._submit(node_type, config, tags, fitting, made)
        if fitting < count:
            raise LaunchDelayed(
                "slurm-queue-full",
                f"{count - fitting} jobs of type {node_type} have to wait: no more than {limit} may be in the queue"
                " (max_queued_jobs)",
            )

    def _fitting(self, node_type: str, config: NodeConfig, count: int) -> tuple[int, str]:
        """Return how many of some jobs may be put into the queue now, and by which limit."""
        rules = rules_in_force(self.settings)
        of_all = (self.settings.max_queued_jobs, rules.limits.max_queued_jobs if rules is not None else None)
        limits = [(limit, f"{limit} of the cluster", "") for limit in of_all if limit is not None]
        if config.max_queued_jobs is not None:
            limits.append((config.max_queued_jobs, f"{config.max_queued_jobs} of this type", node_type))
        fitting, by = count, ""
        for limit, name, only in limits:
            queued = sum(node.seen.queued and only in {"", node.tags.get(TAG_TYPE)} for node in self.nodes().values())
            if limit - queued < fitting:
                fitting, by = max(0, limit - queued), name
        return fitting, by

    def _submit(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int, made: list[str]) -> None:
        rules = rules_in_force(self.settings)
        if rules is not None and count:
            in_slurm = [node_id for node_id in self.nodes() if not node_id.startswith(LOGIN_PREFIX)]
            rules.check_nodes(len(in_slurm) + count, f"available_node_types.{node_type}")
        environ = self.directory.environment() or job_environment(self._environ)
        launch = replace(
            self._launch(node_type, config, tags, environ),
            head=self._environ[_INSTANCE_VARIABLE],
            gcs_address=self._environ[GCS_ADDRESS_VARIABLE],
            head_temp_dir=self._environ.get(TEMP_DIR_VARIABLE, ""),
            autoscaler_v1=self._environ.get(V2_VARIABLE) == "0",
            avoid=self.launches.avoided(),
        )
        try:
            made.extend(self._create_worker(launch) for _ in range(count))
        except SubmitRejected as error:
            self.launches.rejected(node_type, error)
            raise

    def _create_worker(self, launch: Launch) -> str:
        """Create a node; without any others it may start on those that are to be avoided."""
        try:
            return self._create(launch)
        except SubmitRejected as error:
            if not launch.avoid or error.not_now:
                raise
            logger.warning("without %s sbatch refuses type %s", ",".join(launch.avoid), launch.node_type)
            return self._create(replace(launch, avoid=()))

    def preview(self, node_type: str, config: NodeConfig, *, head: bool) -> str:
        """Return the batch script of a node without submitting it."""
        launch = self._launch(node_type, config, {TAG_TYPE: node_type}, {})
        if not head:
            launch = replace(launch, head="HEAD", gcs_address="HEAD_ADDRESS:PORT")
        return preview_script(launch)

    def canary(self, node_type: str, config: NodeConfig, *, head: bool) -> str:
        """Return the batch script of a job that looks around where a node of this type would run."""
        launch = self._launch(node_type, config, {TAG_TYPE: node_type}, {})
        return canary_script(launch if head else replace(launch, head="HEAD"))

    def terminate(self, node_ids: list[str]) -> None:
        """End nodes; a node that has ended already is no error.

        The head's own autoscaler never ends the head: when Ray is restarted there, it sees the head's raylet
        go and would have the whole node removed.
        """
        if self._is_autoscaler:
            node_ids = [node_id for node_id in node_ids if node_id != self._environ.get(_INSTANCE_VARIABLE)]
        if any(node_id in self._known and self._known[node_id].is_head for node_id in node_ids):
            # Its autoscaler must not submit while it goes down.
            self.directory.set_stopping(True)
        with self._lock:
            for node_id in node_ids:
                self._unlisted.pop(node_id, None)
        try:
            self._backend.terminate(node_ids)
        finally:
            self.forget_listing()

    def set_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Change tags of a node; nothing happens when the cluster's directory is gone."""
        if not self.directory.exists:
            return
        with self.directory.change_diary() as diary:
            diary.tags.setdefault(node_id, {}).update(tags)
        self.forget_listing()

    def let_head_start(self, node_id: str, *, autoscaler_v2: bool, usage_stats: bool) -> None:
        """Tell the head's job that everything it needs is in place."""
        token = node_id.rpartition("-")[2]
        self.directory.let_head_start(token, autoscaler_v2=autoscaler_v2, usage_stats=usage_stats)

    def clean_up(self) -> None:
        """Wait until every job has left SLURM, and remove the cluster's directory.

        Raises:
            StateError: Jobs are still there; the directory stays.
        """

        def gone() -> bool:
            try:
                seen_now = self._backend.sightings()
                self._refuse_incomplete(self._known, {seen.node_id for seen in seen_now})
                left = [seen for seen in seen_now if seen.alive or seen.state == "COMPLETING"]
                # The autoscaler may have submitted while the head was being cancelled.
                self._backend.terminate([seen.node_id for seen in left if seen.alive])
            except SlurmError as error:
                logger.warning("whether all jobs have ended is not known: %s", error.complaint)
                return False
            return not left

        if not procfs.wait_until(gone, _CLEANUP_TIMEOUT_S, poll_s=0.5):
            raise StateError(
                f"jobs of cluster {self.name} have not ended after {_CLEANUP_TIMEOUT_S:g} s;"
                f" {self.directory.root} stays"
            )
        self.directory.remove()

    # -- inside ---------------------------------------------------------------------------------

    def _launch(
        self, node_type: str, config: NodeConfig, tags: Mapping[str, str], environ: Mapping[str, str]
    ) -> Launch:
        return Launch(
            cluster=self.name,
            home=self.directory.fingerprint,
            cluster_dir=self.directory.root,
            settings=self.settings,
            node_type=node_type,
            config=config,
            tags=tags,
            environ=environ,
        )

    def _create(self, launch: Launch) -> str:
        try:
            node_id = self._backend.create(launch)
        finally:
            self.forget_listing()
        lost = Sighting(node_id, launch.head, launch.tags, alive=False, state=_LOST)
        with self._lock:
            self._unlisted[node_id] = lost
        self.launches.launched(node_id)
        return node_id

    def _refresh(self) -> None:
        """Ask once and make the new listing; the lock is held."""
        own = self._environ.get(_INSTANCE_VARIABLE, "")
        before = self._listing.nodes
        sightings = self._backend.sightings()
        seen_ids = {seen.node_id for seen in sightings}
        sightings += [lost for node_id, lost in self._unlisted.items() if node_id not in seen_ids]
        inside = self._environ.get("RAY_SLURM_DIR") == str(self.directory.root)
        if inside and own not in seen_ids:
            raise SlurmParseError(["squeue"], 0, "", f"the answer lacks this very job, {own}")
        only_head = own if inside else ""
        diary = self.directory.diary()
        found = join(sightings, diary, self.directory.report, only_head)
        suspects = {*before, *self._unlisted}
        if not inside:
            # A process that has just begun remembers nothing; the directory does.
            suspects |= {*diary.tags, *self._head_that_said_so()}
        self._refuse_incomplete(suspects, seen_ids)
        self.launches.take_over(diary.launches)
        for node_id, node in found.items():
            if not node.seen.alive and node_id in before:
                self._note_end(node)
            elif node.ready and self._is_autoscaler and not node.is_head:
                self.launches.ready(node)
        if self._is_autoscaler:
            self._withdraw(found.values())
        listed = {i: node for i, node in found.items() if node.seen.alive or i in self._unlisted}
        self._unlisted = {node_id: lost for node_id, lost in self._unlisted.items() if node_id not in listed}
        self._known.update(found)
        self._listing = _Listing(listed, self._clock())

    def _refuse_incomplete(self, before: Iterable[str], seen_ids: set[str]) -> None:
        """Ask a second time about every node that the answer does not hold: unknown is not gone."""
        for node_id in before:
            if node_id not in seen_ids and self._backend.exists(node_id):
                raise SlurmParseError(["squeue"], 0, "", f"the answer lacks job {node_id}, which the controller knows")

    def _head_that_said_so(self) -> set[str]:
        """Return the head by its own report, when that does not say that it ended."""
        report = self.directory.head_report()
        return {report.node_id} if report is not None and report.phase != ENDED else set()

    def _withdraw(self, nodes: Iterable[Node]) -> None:
        """Cancel jobs that SLURM would never start, and those that ended without its notice: Ray counts on them."""
        workers = [node for node in nodes if node.seen.alive and not node.is_head]
        doomed = [*self.launches.hopeless(workers), *self._ghosts.among(workers)]
        if not doomed:
            return
        try:
            self._backend.terminate(doomed)
        except SlurmError as error:
            logger.warning("they could not be cancelled; that is tried again: %s", error)

    @property
    def _is_autoscaler(self) -> bool:
        """Whether this process is a head's, and so the one that launches workers."""
        return bool(self._environ.get(GCS_ADDRESS_VARIABLE))

    def _note_end(self, node: Node) -> None:
        if node.is_head or not self._is_autoscaler:
            return  # whoever waits for it tells the user
        reason = self.directory.reason(node.node_id)
        if self.launches.ended(node, reason, log_tail(self.log_of(node.node_id))):
            logger.warning("%s", self.obituary(node.node_id))
        else:
            logger.info("job %s ended (%s)", node.node_id, node.seen.state)


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that a job starts with, from that of `ray up`."""
    return {name: value for name, value in clean_environment(environ).items() if not name.startswith(_NOT_FOR_JOBS)}
