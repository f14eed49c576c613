"""A cluster: joins what the backend sees with the diary and the reports.

The only holder of locks and of the listing cache. Ray calls from several threads: a listing is asked for
once and shared for a moment, and dropped whenever something was created or ended.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from ray_slurm_provider import procfs, tls
from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE, INSTANCE_VARIABLE
from ray_slurm_provider.backends.base import Launch, NodeBackend
from ray_slurm_provider.backends.launch_script import canary_script, job_environment, preview_script
from ray_slurm_provider.backends.login_process import LoginProcess
from ray_slurm_provider.backends.places import Places
from ray_slurm_provider.backends.slurm_jobs import SlurmJobs
from ray_slurm_provider.batch_script import log_path
from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.cluster_dir import ClusterDir, log_tail
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import (
    NodeNotFound,
    SlurmError,
    SlurmNotFound,
    StateError,
)
from ray_slurm_provider.launch_control import End, LaunchControl
from ray_slurm_provider.listing import Listing
from ray_slurm_provider.nodes import TAG_STATUS, TAG_TYPE, VANISHED, Node
from ray_slurm_provider.slurm.client import SlurmClient, grouped
from ray_slurm_provider.slurm.process import SlurmTools
from ray_slurm_provider.slurm.reasons import ELSEWHERE
from ray_slurm_provider.slurm.types import SlurmIdentity
from ray_slurm_provider.worker_launcher import WorkerLauncher

logger = logging.getLogger(__name__)

_CLEANUP_TIMEOUT_S = 120.0
_OBITUARIES = 3


class Cluster:
    """One Ray cluster on SLURM."""

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
        self._backend = backend or Places(
            SlurmJobs(
                self.slurm_client(), name, self.directory.fingerprint, BirthRecords(self.directory.births, clock)
            ),
            LoginProcess(self.directory, name),
        )
        self._lock = threading.Lock()
        self._listing = Listing(self._backend, self.directory, settings, self._environ, clock)
        self.launches = LaunchControl(self.directory, settings.pause_after_failures, clock, wall_clock)
        self._launcher = WorkerLauncher(self, self._environ, clock)

    def slurm_client(self) -> SlurmClient:
        settings = self.settings
        return SlurmClient(
            SlurmTools(settings.slurm_bin or "", settings.command_timeout_s, self._environ, settings.clusters or "")
        )

    # -- questions ------------------------------------------------------------------------------

    def nodes(self) -> dict[str, Node]:
        """Return the nodes that wait or run, by id.

        Raises:
            SlurmError: Nothing is known now.
        """
        with self._lock:
            if self._listing.is_due:
                self._refresh()
            return dict(self._listing.nodes)

    def node(self, node_id: str) -> Node:
        """Return a node, also one that has ended, as it was when last seen."""
        found = self.nodes().get(node_id) or self._listing.known.get(node_id)
        if found is None:
            raise NodeNotFound(f"node {node_id} is not one of cluster {self.name}")
        return found

    def last_seen(self, node_id: str) -> Node:
        """Return a node from the last listing, without asking again."""
        found = self._listing.known.get(node_id)
        return found if found is not None else self.node(node_id)

    def is_alive(self, node_id: str) -> bool:
        return node_id in self.nodes()

    def head(self) -> Node | None:
        return next((node for node in self.nodes().values() if node.is_head and node.seen.alive), None)

    def lost_directory(self) -> str:
        """Return what to do about a directory that was deleted while the cluster lives, "" when it is there."""
        missing = self.directory.missing
        head = self.head() if missing else None
        if head is None:
            return ""
        return (
            f"{missing} cannot be seen: the directory of cluster {self.name} was deleted while its head, {head.label},"
            " lives\n  `ray down` ends the cluster, and `ray up` starts it again"
        )

    def log_of(self, node_id: str) -> Path:
        return log_path(self.directory.root, node_id)

    def obituary(self, node_id: str, how: str = "") -> str:
        """Return how, if that is not known already, and why a node ended, with the last lines of its log."""
        why = self.directory.reason(node_id)
        report = self.directory.report(node_id)
        if not why and report is not None:
            why = report.reason
        known = self._listing.known.get(node_id)
        lines = [f"{known.label if known else node_id} ended: {how or self._backend.how_ended(node_id)}"]
        lines += [f"  reason: {why}"] if why else []
        lines += [f"  log: {self.log_of(node_id)}"]
        return "\n".join(lines + [f"  | {line}" for line in log_tail(self.log_of(node_id))])

    def forget_listing(self) -> None:
        with self._lock:
            self._listing.invalidate()

    # -- changes --------------------------------------------------------------------------------

    def create_head(self, node_type: str, config: NodeConfig, tags: Mapping[str, str]) -> str:
        """Submit the head's job and return its node id; that of another `ray up` which was faster.

        Raises:
            StateError: Another `ray up` has submitted a head of another configuration.
        """
        self.directory.prepare()
        if self.settings.tls:
            tls.make_authority(self.directory.tls, self.name)
        environ = job_environment(self._environ)
        with self.directory.head_lock():
            self.forget_listing()
            present = self.head()
            if present is None:
                # What a head that was lost together with its host has left in the queue.
                self.terminate([node.node_id for node in self.nodes().values() if not node.is_head])
                with self.directory.claimed_by(self._own_slurm()):
                    self.directory.set_stopping(False)
                    self.directory.save_environment(environ)
                    self.directory.renew_token()
                    return self.create(self.launch(node_type, config, tags, environ))[0]
        if all(present.tags.get(name) == value for name, value in tags.items() if name != TAG_STATUS):
            logger.warning("another `ray up` has submitted the head, %s", present.label)
            return present.node_id
        raise StateError(
            f"another `ray up` has submitted {present.label} with another configuration meanwhile; run `ray up` again"
        )

    def create_workers(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int) -> list[str]:
        """Submit the jobs of workers, see `WorkerLauncher.create`; called by Ray's autoscaler in the head's job."""
        return self._launcher.create(node_type, config, tags, count)

    def launch_deferred(self) -> None:
        self._launcher.launch_deferred()

    def preview(self, node_type: str, config: NodeConfig, *, head: bool) -> str:
        launch = self.launch(node_type, config, {TAG_TYPE: node_type}, {})
        if not head:
            launch = replace(launch, head="HEAD", gcs_address="HEAD_ADDRESS:PORT")
        return preview_script(launch)

    def canary(self, node_type: str, config: NodeConfig, token: str, *, head: bool) -> str:
        """Return the batch script of a job that looks around where a node of this type would run."""
        launch = self.launch(node_type, config, {TAG_TYPE: node_type}, {})
        return canary_script(launch if head else replace(launch, head="HEAD"), token)

    def launch(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], environ: Mapping[str, str]) -> Launch:
        """Return a node of this cluster to be created, a head until more is said."""
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

    def batch_size(self, launch: Launch) -> int:
        return self._backend.batch_size(launch)

    def create(self, launch: Launch, count: int = 1) -> list[str]:
        """Create nodes, all or none of them, and return their ids; the next listing holds them."""
        try:
            node_ids = self._backend.create(launch, count)
        finally:
            self.forget_listing()
        with self._lock:
            self._listing.submitted(node_ids, launch)
            self.launches.launched(node_ids)
        return node_ids

    def terminate(self, node_ids: list[str]) -> None:
        """End nodes; a node that has ended already is no error.

        The head's own autoscaler never ends the head: when Ray is restarted there, it sees the head's raylet
        go and would have the whole node removed.
        """
        if self._is_autoscaler:
            node_ids = [node_id for node_id in node_ids if node_id != self._environ.get(INSTANCE_VARIABLE)]
        known = self._listing.known
        ends_head = any(node_id in known and known[node_id].is_head for node_id in node_ids)
        with self._lock:
            self._listing.stop_expecting(node_ids)
        try:
            with self._going_down() if ends_head else nullcontext():
                self._backend.terminate(node_ids)
            with self._lock:
                self._listing.cancelled(node_ids)
        finally:
            with self._lock:
                self._listing.cancel_is_over(node_ids)
            self.forget_listing()

    def set_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Change tags of a node; nothing happens when the cluster's directory is gone."""
        if not self.directory.exists:
            return
        with self.directory.change_diary() as diary:
            diary.tags.setdefault(node_id, {}).update(tags)
        with self._lock:
            self._listing.invalidate_view()

    def let_head_start(self, node_id: str, *, usage_stats: bool) -> None:
        self.directory.let_head_start(node_id.rpartition("-")[2], usage_stats=usage_stats)

    def clean_up(self) -> None:
        """Wait until every job has left SLURM, and remove the cluster's directory.

        Raises:
            StateError: Jobs are still there, or SLURM does not say; the directory stays.
        """
        trouble = ""

        def gone() -> bool:
            nonlocal trouble
            try:
                seen_now = self._backend.sightings()
                self._listing.verify_missing(self._listing.known, {seen.node_id for seen in seen_now})
                left = [seen for seen in seen_now if seen.alive or seen.state == "COMPLETING"]
                # The autoscaler may have submitted while the head was being cancelled.
                self._backend.terminate([seen.node_id for seen in left if seen.alive])
            except SlurmNotFound:
                raise
            except SlurmError as error:
                trouble = f": {error.complaint}"
                return False
            trouble = ""
            return not left

        with self._going_down():
            if not procfs.wait_until(gone, _CLEANUP_TIMEOUT_S, poll_s=0.5):
                raise StateError(
                    f"jobs of cluster {self.name} have not ended after {_CLEANUP_TIMEOUT_S:g} s{trouble}\n"
                    f"  {self.directory.root} stays; run `ray down` again"
                )
            if self.directory.exists:
                self._own_slurm()
            self.directory.remove()

    # -- inside ---------------------------------------------------------------------------------

    def _own_slurm(self) -> SlurmIdentity:
        """Return which SLURM answers.

        Raises:
            StateError: The jobs of this cluster are in another one, and it has not ended.
        """
        here, own = self.slurm_client().identity(), self.directory.slurm()
        if self.directory.head_has_ended or (own is not None and own.is_same(here)):
            return here
        sign = self.directory.sign_of_life if own is None else ""
        if own is None and not sign:
            return here
        raise StateError(
            f"the jobs of cluster {self.name} are in {own or f'the SLURM of its head, which {sign}'},"
            f" but {here} answers here\n"
            "  set SLURM_CONF and provider.slurm.clusters as they were for its `ray up`;"
            f" or, when nothing of the cluster runs there any more, remove {self.directory.root}"
        )

    @contextmanager
    def _going_down(self) -> Iterator[None]:
        """Keep the head's autoscaler from submitting meanwhile; a head that could not be ended goes on."""
        self.directory.set_stopping(True)
        try:
            yield
        except BaseException:
            self.directory.set_stopping(False)
            raise

    def _refresh(self) -> None:
        """Look at the nodes, and do what follows from what is seen; the lock is held."""
        diary = self.directory.diary()
        self._listing.look(diary.tags)
        self.launches.load(diary.launches)
        if not self._is_autoscaler:
            return  # whoever waits for a node tells the user of its end
        ended = [
            End(node, self.directory.reason(node.node_id), log_tail(self.log_of(node.node_id)))
            for node in self._listing.ended
            if not node.is_head
        ]
        workers = (node for node in self._listing.nodes.values() if node.seen.alive and not node.is_head)
        doomed, failed = self.launches.look(workers, ended)
        for end in ended:
            logger.info("job %s ended (%s)", end.node.node_id, end.node.seen.state)
        self._tell_of(failed)
        doomed += [node.node_id for node in failed if node.seen.state == ELSEWHERE]
        try:
            self._backend.terminate(doomed)
        except SlurmError as error:
            logger.warning("they could not be cancelled; that is tried again: %s", error)
        else:
            if doomed:
                self._listing.cancelled(doomed)
                self._listing.invalidate()

    @property
    def _is_autoscaler(self) -> bool:
        return bool(self._environ.get(GCS_ADDRESS_VARIABLE))

    def _tell_of(self, failed: Sequence[Node]) -> None:
        """Say how jobs failed, of a few in words: SLURM is asked about each of those."""
        for node in failed[:_OBITUARIES]:
            logger.warning("%s", self.obituary(node.node_id, VANISHED if node.seen.state == VANISHED else ""))
        others = [job_id_of(node.node_id) for node in failed[_OBITUARIES:]]
        if others:
            logger.warning("%d more jobs failed: %s", len(others), " ".join(grouped(others)))
