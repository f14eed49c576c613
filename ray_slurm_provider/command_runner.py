"""The command runner: starts nothing, for the job does its own setup; what a person asks for is real.

# Design:
Ray's updater walks through its phases on the login node: wait for ssh, sync files, initialise, set up,
start Ray. Here files are copied as soon as the job is submitted, the setup commands are in the job, and
"start Ray" means: tell the job that everything is in place, then wait, however long it is queued. So a
Ctrl-C while it waits loses nothing; the job starts by itself and the next `ray up` finds it.
"""

import logging
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ray_slurm_provider.backends.login_process import PREFIX, host_name
from ray_slurm_provider.birth_certificate import job_id_of
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.errors import HeadFailed
from ray_slurm_provider.file_sync import SyncOptions, copy, is_shared
from ray_slurm_provider.forward import Forward, forwarded
from ray_slurm_provider.head_wait import wait_for_head, wait_for_restart
from ray_slurm_provider.nodes import Node
from ray_slurm_provider.progress import HeadProgress
from ray_slurm_provider.ray_contract import CommandRunnerInterface, cli_logger, ray_command, readable
from ray_slurm_provider.reports import NodeReport
from ray_slurm_provider.sessions import submission, with_stop
from ray_slurm_provider.shells import LocalShell, Shell, SrunShell, SshShell, run, ssh_arguments

logger = logging.getLogger(__name__)

# Ray's commands name these ports; the head of this cluster has others.
_USUAL_PORTS = {8265: "dashboard", 10001: "client", 6379: "gcs"}
_BOOTSTRAP, _BOOTSTRAP_KEY = "ray_bootstrap_config.yaml", "ray_bootstrap_key.pem"
_RAY_LOGS = "/tmp/ray/session_latest"  # noqa: S108 what Ray's own commands name (ray/autoscaler/_private/commands.py)


class UpdaterError(click.ClickException):
    """What went wrong while Ray's updater was at work.

    It prints an exception that has these attributes without a traceback (ray/autoscaler/_private/updater.py, run).
    """

    def __init__(self, message: str, cmd: str = "ray start --head") -> None:
        super().__init__(message)
        self.cmd = cmd
        self.returncode = 1
        self.stderr = message


class CommandFailed(click.ClickException):
    """A command on the node failed; `ray exec` ends with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the command ended with exit code {code}")
        self.exit_code = code  # type: ignore[misc]


class SlurmCommandRunner(CommandRunnerInterface):
    """Runs commands in the job of one node."""

    def __init__(self, cluster: Cluster, node_id: str, auth: dict[str, str] | None = None) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._auth = auth or {}
        self._command = ray_command()

    @readable
    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,  # noqa: ARG002 Ray's signature
        exit_on_fail: bool = False,  # noqa: ARG002
        port_forward: Any = None,
        with_output: bool = False,
        environment_variables: dict[str, object] | None = None,
        run_env: str = "auto",
        ssh_options_override_ssh_key: str = "",  # noqa: ARG002
        shutdown_after_run: bool = False,  # noqa: ARG002 Ray never sets it
    ) -> str:
        """Run a command on the node, or do what it stands for; see the interface in Ray."""
        if port_forward:
            with self._forwarded(port_forward):
                return self._wait_for_interrupt() if cmd is None else self._run_command(cmd, with_output=with_output)
        if cmd is None:
            raise click.ClickException("there is no command and no port to forward")
        if environment_variables is not None:
            if "ray start" in cmd:
                self._start_head(environment_variables)
            return ""
        if run_env == "host" and self._command.name != "exec":
            # The updater's own probes.
            return ""
        if cmd.strip() == "ray stop":
            # It would end every Ray of this user on that host. `ray down` sends it first, and ends the jobs then.
            if self._command.name != "down":
                raise click.ClickException("`ray stop` would end all your Ray clusters on that host; use `ray down`")
            return ""
        return self._run_command(cmd, with_output=with_output)

    @readable
    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy to a place that the node sees too."""
        if Path(target).name == _BOOTSTRAP:
            self._cluster.directory.write_bootstrap_config(Path(source))
            return
        if Path(target).name == _BOOTSTRAP_KEY:
            return  # the autoscaler submits jobs; it needs no key
        if not self._sees_the_same(target):
            raise self._not_shared(target, f"cp -r SHARED_PATH {_as_word(target)}")
        copy(source, target, _sync_options(options))

    @readable
    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy from a place that the node sees too."""
        there = self._with_our_paths(source)
        if not self._sees_the_same(there):
            raise self._not_shared(source, f"cp -r {_as_word(source)} SHARED_PATH")
        copy(there, target, _sync_options(options))

    def remote_shell_command_str(self) -> str:
        return shlex.join(self._shell().command("exec bash -l", terminal=True))

    def run_init(self, *, as_head: bool, file_mounts: dict[str, str], sync_run_yet: bool) -> bool | None:  # noqa: ARG002
        return None

    def _start_head(self, variables: dict[str, object]) -> None:
        node = self._cluster.last_seen(self._node_id)
        # Whoever types `ray up` wants another try of whatever failed.
        self._cluster.launches.resume()
        if node.ready and not self._command.options.get("restart_only"):
            cli_logger.print("Ray already runs in {}; nothing is restarted.", node.label)
            self._say_what_next()
            return
        usage_stats = str(variables.get("RAY_USAGE_STATS_ENABLED", 0)) == "1"
        self._cluster.let_head_start(self._node_id, usage_stats=usage_stats)
        if node.ready:
            self._restart(node)
        try:
            with HeadProgress(self._cluster.log_of(self._node_id)) as progress:
                wait_for_head(self._cluster, self._node_id, progress.tell, progress.trouble)
        except HeadFailed as error:
            raise UpdaterError(str(error)) from error
        self._say_what_next()

    def _restart(self, node: Node) -> None:
        """Have Ray started anew in the same job; its workers are new jobs, for they do not survive their head."""
        cli_logger.print("Restarting Ray in {}.", node.label)
        # Made there: a network file system may show it to another host a minute later.
        sign = self._cluster.directory.reports.restart(self._node_id)
        code, _ = run(self._shell(), f"touch {shlex.quote(str(sign))}")
        if code:
            raise UpdaterError("the node agent could not be asked to restart Ray")
        try:
            wait_for_restart(self._cluster, node)
        except HeadFailed:
            # A restart that nobody waits for any more.
            sign.unlink(missing_ok=True)
            raise

    def _say_what_next(self) -> None:
        report = self._cluster.directory.report(self._node_id)
        if report is None:
            return
        label = self._cluster.last_seen(self._node_id).label
        cli_logger.success("Ray answers at {} ({}, {})", report.gcs_address, label, report.slurm_node or report.host)
        cli_logger.print("Use it from this shell:")
        cli_logger.print('  eval "$(ray-slurm env {})" && ray status', shlex.quote(self._command.cluster_yaml))

    def _run_command(self, cmd: str, *, with_output: bool) -> str:
        shell = self._shell()
        options = self._command.options
        if self._command.name == "submit" and "script" in options:
            cmd = submission(cmd, [options["script"], *options.get("script_args", ())])
        cmd = self._rewritten(cmd)
        terminal = not with_output and sys.stdin.isatty() and sys.stdout.isatty()
        code, output = run(shell, cmd, with_output=with_output, terminal=terminal)
        if code:
            raise CommandFailed(code)
        return output

    def _shell(self) -> Shell:
        settings, directory = self._cluster.settings, self._cluster.directory
        exports, report = directory.reports.environment(self._node_id), directory.report(self._node_id)
        if report is None or not exports.exists():
            raise click.ClickException(
                f"Ray is not up on node {self._node_id}, or the cluster's directory was lost; see `ray-slurm logs`"
            )
        if self._on_this_host():
            return LocalShell(exports)
        if settings.command_runner == "ssh":
            return SshShell(exports, ssh_arguments(report.host, self._auth, settings.ssh_args), report.temp_dir)
        if self._node_id.startswith(PREFIX):
            raise click.ClickException(
                f"the head runs on {report.host}, and this is {host_name()}: log in there, or set"
                " provider.slurm.command_runner: ssh"
            )
        slurm, job_id = self._cluster.slurm_client(), job_id_of(self._node_id)
        if "_" in job_id:
            # srun knows an element of an array by its own number only.
            job_id = slurm.job_facts(job_id).get("JobId", job_id)
        return SrunShell(exports, slurm.tools.path_of("srun"), job_id, slurm.tools.cluster)

    def _on_this_host(self) -> bool:
        return self._node_id.startswith(PREFIX) and self._cluster.last_seen(self._node_id).seen.place == host_name()

    def _sees_the_same(self, path: str) -> bool:
        return self._on_this_host() or is_shared(path, self._cluster.directory.root.parent)

    def _not_shared(self, path: str, command: str) -> UpdaterError:
        """Refuse to copy to or from a node's own file system, and show what does it."""
        if self._command.name == "submit":
            command = f"python SHARED_PATH/{_as_word(Path(path).name)}"
        return UpdaterError(
            f"{path} is on a file system that only its own host sees: use a path that all hosts share, or"
            f" `ray exec {shlex.quote(self._command.cluster_yaml)} {shlex.quote(command)}`",
            "rsync",
        )

    @contextmanager
    def _forwarded(self, pairs: Any) -> Iterator[None]:
        """Forward local ports to the head; Ray's usual port numbers stand for those of this cluster."""
        report = self._cluster.directory.report(self._node_id)
        if report is None or not report.address:
            raise click.ClickException(f"node {self._node_id} has no address yet")
        wanted: list[tuple[int, int]] = [pairs] if isinstance(pairs, tuple) else list(pairs)
        forwards = []
        for local, usual in wanted:
            name = _USUAL_PORTS.get(usual, "")
            remote = report.ports.get(name, usual)
            if remote == local and self._on_this_host():
                cli_logger.print("Port {} is on this host already.", local)
                continue
            forwards.append(Forward(local, self._listening_address(report, name), remote))
        for forward in forwards:
            cli_logger.print("127.0.0.1:{} leads to {}:{}", forward.local, forward.host, forward.remote)
        try:
            with forwarded(forwards):
                yield
        except OSError as error:
            raise click.ClickException(f"the port cannot be forwarded: {error.strerror or error}") from error

    def _listening_address(self, report: NodeReport, port: str) -> str:
        if port != "dashboard" or self._cluster.settings.token_auth:
            return report.address
        if report.host != socket.gethostname():
            raise click.ClickException(
                f"without a token (token_auth: false) the dashboard can be seen on {report.host} only"
            )
        return "127.0.0.1"

    def _wait_for_interrupt(self) -> str:
        cli_logger.print("Ctrl-C ends the forwarding.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            cli_logger.newline()
        return ""

    def _rewritten(self, cmd: str) -> str:
        """Replace what Ray's own commands name by what this cluster has."""
        directory = self._cluster.directory
        cmd = with_stop(cmd, directory.reports.stop(self._node_id))
        return self._with_our_paths(cmd.replace(f"~/{_BOOTSTRAP}", shlex.quote(str(directory.bootstrap_config))))

    def _with_our_paths(self, text: str) -> str:
        report = self._cluster.directory.report(self._node_id)
        return text.replace(_RAY_LOGS, f"{report.temp_dir}/session_latest") if report and report.temp_dir else text


def _as_word(path: str) -> str:
    """Return a path for a shell, which is to expand ``~``."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def _sync_options(options: dict[str, Any] | None) -> SyncOptions:
    given = options or {}
    return SyncOptions(given.get("rsync_exclude") or (), given.get("rsync_filter") or ())
