"""Ray's NodeProvider for SLURM: translates and delegates.

# Design:
A Ray node is a SLURM job; its id is the job id and a launch token, and the job exports it as
RAY_CLOUD_INSTANCE_ID, by which Ray's autoscaler v2 recognises the raylet. Everything that is known
lives in SLURM and in the cluster directory, for each `ray` command and the autoscaler on the head are
processes of their own on hosts of their own. Raising is always safe here, an incomplete answer never:
Ray takes what is missing for dead.
"""

import json
import logging
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ray_slurm_provider import bootstrap
from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.command_runner import SlurmCommandRunner
from ray_slurm_provider.config import read_node_config, read_settings
from ray_slurm_provider.errors import SlurmProviderError
from ray_slurm_provider.progress import describe
from ray_slurm_provider.ray_contract import (
    NODE_KIND_HEAD,
    STATUS_UNINITIALIZED,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
    NodeLaunchException,
    NodeProvider,
    RayCommand,
    cli_logger,
    ray_command,
    readable,
    silence_legacy_warnings,
)

logger = logging.getLogger(__name__)

# Ray's commands that end in a traceback without a head that is up.
_FOR_A_RUNNING_HEAD = frozenset(
    {"attach", "dashboard", "exec", "get-head-ip", "monitor", "rsync-down", "rsync-up", "submit"}
)


class SlurmNodeProvider(NodeProvider):
    """Creates, lists and ends the jobs of one cluster.

    Args:
        provider_config: The ``provider`` section, as written or bootstrapped.
        cluster_name: The cluster's name.
    """

    @readable
    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._command = ray_command()
        self._config_cache = str(provider_config.get("_config_cache_path") or "")
        _drop_config_cache(self._config_cache, self._command)
        self._torn_down: dict[str, set[str]] = {}
        self._head_id = ""
        self._cluster = Cluster(cluster_name, read_settings(provider_config.get("slurm")))
        silence_legacy_warnings()

    @readable
    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Return the ids of the nodes that wait or run and have these tags."""
        # `ray submit` writes it again, and finds this object in Ray's cache of providers.
        _drop_config_cache(self._config_cache, self._command)
        if tag_filters == {TAG_RAY_NODE_KIND: NODE_KIND_HEAD} and self._command.name in {"up", *_FOR_A_RUNNING_HEAD}:
            self._require_head()
        self._cluster.launch_deferred()
        return [
            node_id
            for node_id, node in self._cluster.nodes().items()
            if all(node.tags.get(name) == value for name, value in tag_filters.items())
            # Ray looks for the head that it asked for by its first status; another `ray up` may have changed it.
            or (node_id == self._head_id and tag_filters.get(TAG_RAY_NODE_STATUS) == STATUS_UNINITIALIZED)
        ]

    def _require_head(self) -> None:
        """Say in a sentence what Ray would say in a traceback."""
        head = self._cluster.head()
        if lost := self._cluster.lost_directory():
            raise click.ClickException(lost)
        if self._command.name == "up":
            if head is not None:
                self._cluster.directory.set_stopping(False)  # what a `ray down` that failed has left
            return
        if self._command.options.get("start") or (head is not None and head.ready):
            return
        if head is None:
            raise click.ClickException(f"cluster {self.cluster_name} has no head; start it with `ray up`")
        raise click.ClickException(f"the head of cluster {self.cluster_name} is not up yet: {describe(head)}")

    def is_running(self, node_id: str) -> bool:
        """Tell whether the node's job has its allocation."""
        return not self._cluster.last_seen(node_id).seen.queued

    @readable
    def is_terminated(self, node_id: str) -> bool:
        """Tell whether the node's job has ended."""
        return not self._cluster.is_alive(node_id)

    @readable
    def node_tags(self, node_id: str) -> dict[str, str]:
        """Return the node's tags, also when it has just ended."""
        return dict(self._cluster.last_seen(node_id).tags)

    @readable
    def external_ip(self, node_id: str) -> str:
        """Return the node's address; a name for its job while it has none."""
        return self._cluster.last_seen(node_id).address

    @readable
    def internal_ip(self, node_id: str) -> str:
        """Return the node's address; a name for its job while it has none."""
        return self._cluster.last_seen(node_id).address

    @readable
    def get_node_id(self, ip_address: str, use_internal_ip: bool = False) -> str:  # noqa: ARG002 Ray's signature
        """Return the node with an address, a node id, a job id or a host name."""
        for node_id, node in self._cluster.nodes().items():
            if ip_address in node.names:
                return node_id
        raise click.ClickException(f"no node of cluster {self.cluster_name} has the address {ip_address}")

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Submit the head's job (`ray up` calls this), or the jobs of workers without more ado."""
        if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
            self._create_head(node_config, tags)
        else:
            self._create_workers(node_config, tags, count)

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],  # noqa: ARG002 they are in node_config already
        labels: dict[str, str],  # noqa: ARG002
    ) -> None:
        """Submit the jobs of workers (the autoscaler calls this)."""
        self._create_workers(node_config, tags, count)

    @readable
    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Change tags of a node."""
        self._cluster.set_tags(node_id, tags)

    @readable
    def terminate_node(self, node_id: str) -> None:
        """Cancel the node's job."""
        self._cluster.terminate([node_id])

    @readable
    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Cancel the nodes' jobs."""
        self._cluster.terminate(list(node_ids))

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Return the nodes that `ray down` ends; it asks again until none is left.

        With ``--workers-only`` the autoscaler goes on, and replaces what it needs: those of the first answer count.
        """
        if self._command.options.get("keep_min_workers"):
            raise click.ClickException(
                "--keep-min-workers has no effect in Ray: use `ray down --workers-only"
                f" {shlex.quote(self._command.cluster_yaml)}`; the head asks for the min_workers of each type again"
            )
        nodes = self.non_terminated_nodes(tag_filters)
        if self._cluster.directory.stopping:
            return nodes
        first = self._torn_down.setdefault(json.dumps(tag_filters, sort_keys=True), set(nodes))
        return [node_id for node_id in nodes if node_id in first]

    @readable
    def cleanup_cluster_resources(self) -> None:
        """Wait until the jobs are really gone, and remove the cluster's directory; the end of `ray down`."""
        self._cluster.clean_up()

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Return what the autoscaler on the head reads."""
        return cluster_config

    def get_command_runner(
        self,
        log_prefix: str,  # noqa: ARG002 Ray's signature
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,  # noqa: ARG002
        process_runner: Any,  # noqa: ARG002
        use_internal_ip: bool,  # noqa: ARG002
        docker_config: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> SlurmCommandRunner:
        """Return what runs commands in the node's job."""
        return SlurmCommandRunner(self._cluster, node_id, auth_config)

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Check our sections and fill in what follows from them; Ray calls this first."""
        ignored = bootstrap.ignored_start_commands(cluster_config)
        if ignored:
            cli_logger.warning("The provider starts Ray itself; these commands are not run: {}", "; ".join(ignored))
        return bootstrap.fill_out(cluster_config)

    @staticmethod
    @readable
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Refuse a YAML with a mistake; Ray calls this second."""
        config = bootstrap.bootstrap(cluster_config)
        command = ray_command()
        _refuse_sessions(command)
        if command.name == "up" or command.options.get("start"):
            bootstrap.check_for_up(config)
        if command.name != "up":
            return config
        changes = bootstrap.head_changes(config)
        if changes:
            cli_logger.warning("The head runs with another configuration:")
            for change in changes:
                cli_logger.warning("  {}", change)
            cli_logger.warning(
                "A new head takes its place: the job of the present one is cancelled, and all jobs of its workers."
            )
        return config

    @readable
    def _create_head(self, node_config: dict[str, Any], tags: dict[str, str]) -> None:
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        config = read_node_config(node_config, f"available_node_types.{node_type}.node_config")
        node_id = self._cluster.create_head(node_type, config, tags)
        self._head_id = node_id
        if config.placement == "login_node":
            cli_logger.print("Started the head on this host as {}", node_id)
        else:
            cli_logger.print("Submitted the head as job {}", job_id_of(node_id))

    def _create_workers(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        try:
            config = read_node_config(node_config, f"available_node_types.{node_type}.node_config")
            self._cluster.create_workers(node_type, config, tags, count)
        except SlurmProviderError as error:
            logger.error("could not submit %d jobs of type %s: %s", count, node_type, error)  # noqa: TRY400 the text says it
            raise NodeLaunchException(error.launch_category, str(error), None) from error


def _refuse_sessions(command: RayCommand) -> None:
    """Refuse ``--tmux`` and ``--screen`` of exec, submit and attach."""
    tool = next((name for name in ("tmux", "screen") if command.options.get(name)), "")
    if tool:
        raise click.ClickException(
            f"--{tool} does not work here, because SLURM ends what a command has started together with the command;"
            " for work that goes on without you, run"
            f' `eval "$(ray-slurm env {shlex.quote(command.cluster_yaml)})"`'
            " and then `ray job submit --no-wait -- COMMAND`"
        )


def _drop_config_cache(path: str, command: RayCommand) -> None:
    """Remove Ray's cache of the resolved YAML, and refuse that of somebody else.

    It lies in a directory of everybody's under a name that depends on the YAML alone, so another user with the
    same YAML would be served ours, with our paths (ray/autoscaler/_private/commands.py, _bootstrap_config).
    """
    if not path or not command.name:
        return  # the autoscaler reads another file
    try:
        owner = Path(path).stat().st_uid
    except OSError:
        return
    if owner == os.getuid():
        with suppress(OSError):
            Path(path).unlink()
    elif not command.options.get("no_config_cache"):
        raise click.ClickException(
            f"Ray took the configuration from {path}, which another user has written\n"
            "  set TMPDIR to a directory of your own and try again"
        )
