"""Submits the workers that Ray's autoscaler asks for."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE
from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.backends.login_process import PREFIX as LOGIN_PREFIX
from ray_slurm_provider.errors import ConfigError, LaunchDelayed, SlurmError, StateError, SubmitRejected
from ray_slurm_provider.held_launches import HeldLaunches
from ray_slurm_provider.nodes import TAG_TYPE
from ray_slurm_provider.reports import ENDED
from ray_slurm_provider.site_file import rules_in_force

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray_slurm_provider.backends.base import Launch
    from ray_slurm_provider.cluster import Cluster
    from ray_slurm_provider.config import NodeConfig
    from ray_slurm_provider.held_launches import HeldLaunch

logger = logging.getLogger(__name__)

INSTANCE_VARIABLE = "RAY_CLOUD_INSTANCE_ID"


class WorkerLauncher:
    """Launches the workers of one cluster.

    Args:
        cluster: The cluster.
        environ: The environment of this process: that of a head's job, where anything is to be launched.
        clock: A monotonic clock, seconds.
    """

    def __init__(self, cluster: Cluster, environ: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._cluster = cluster
        self._environ = environ
        self._held = HeldLaunches(clock)
        self._creating = threading.Lock()

    def create(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int) -> list[str]:
        """Submit the jobs of workers and return their node ids.

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
            self._launch(node_type, config, tags, count, made)
        except (LaunchDelayed, SubmitRejected, ConfigError) as error:
            if self._held.is_news(node_type, error):
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
        answers = True
        for held in waiting:
            # A SLURM that does not answer would keep us waiting for each of them.
            answers = answers and self._launch_one(held)
            if held.count:
                self._held.put_back(held)

    def _launch_one(self, held: HeldLaunch) -> bool:
        """Launch as much of it as may be, and take that off its count; tell whether SLURM answers."""
        made: list[str] = []
        try:
            self._launch(held.node_type, held.config, held.tags, held.count, made)
            self._held.launched(held.node_type)
        except (LaunchDelayed, SubmitRejected, ConfigError):
            return True
        except SlurmError:
            return False
        finally:
            held.count -= len(made)
        return True

    def _refuse_at_the_end(self) -> None:
        """Raise `StateError` when nothing may be submitted any more, or not by this process."""
        if self._cluster.directory.stopping:
            raise StateError(f"cluster {self._cluster.name} is being taken down; nothing is submitted")
        if not (self._environ.get(INSTANCE_VARIABLE) and self._environ.get(GCS_ADDRESS_VARIABLE)):
            raise StateError("workers are submitted by the head's autoscaler; this process is not a head's")
        report = self._cluster.directory.report(self._environ[INSTANCE_VARIABLE])
        if report is not None and report.phase == ENDED:
            raise StateError(f"the head {report.node_id} is ending; nothing is submitted")

    def _launch(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int, made: list[str]) -> None:
        """Submit jobs, as many as may be; add their nodes to a list."""
        self._cluster.launches.check(node_type)
        if missing := self._cluster.directory.missing:
            raise LaunchDelayed(
                "slurm-no-directory",
                f"{missing} cannot be seen: was the cluster's directory deleted? No node can start without it;"
                " `ray down` ends the cluster and `ray up` starts it again",
            )
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
        rules = rules_in_force(self._cluster.settings)
        of_all = (self._cluster.settings.max_queued_jobs, rules.limits.max_queued_jobs if rules is not None else None)
        limits = [(limit, f"{limit} of the cluster", "") for limit in of_all if limit is not None]
        if config.max_queued_jobs is not None:
            limits.append((config.max_queued_jobs, f"{config.max_queued_jobs} of this type", node_type))
        fitting, by = count, ""
        for limit, name, only in limits:
            queued = sum(
                node.seen.queued and only in {"", node.tags.get(TAG_TYPE)} for node in self._cluster.nodes().values()
            )
            if limit - queued < fitting:
                fitting, by = max(0, limit - queued), name
        return fitting, by

    def _submit(self, node_type: str, config: NodeConfig, tags: Mapping[str, str], count: int, made: list[str]) -> None:
        rules = rules_in_force(self._cluster.settings)
        if rules is not None and count:
            in_slurm = [node_id for node_id in self._cluster.nodes() if not node_id.startswith(LOGIN_PREFIX)]
            rules.check_nodes(len(in_slurm) + count, f"available_node_types.{node_type}")
        environ = self._cluster.directory.environment() or job_environment(self._environ)
        launch = replace(
            self._cluster.launch(node_type, config, tags, environ),
            head=self._environ[INSTANCE_VARIABLE],
            gcs_address=self._environ[GCS_ADDRESS_VARIABLE],
            avoid=self._cluster.launches.avoided(),
        )
        try:
            self._create_in_batches(launch, count, made)
        except SubmitRejected as error:
            self._cluster.launches.rejected(node_type, error)
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
