"""The command runner: starts nothing, for the job does its own setup; what a person asks for is real.

# Design:
Ray's updater walks through its phases on the login node: wait for ssh, sync files, initialise, set up,
start Ray. Here files are copied as soon as the job is submitted, the setup commands are in the job, and
"start Ray" means: tell the job that everything is in place, then wait, however long it is queued. So a
Ctrl-C while it waits loses nothing; the job starts by itself and the next `ray up` finds it.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_slurm_provider.errors import HeadFailed, SlurmProviderError
from ray_slurm_provider.forward import Forward, Forwarder
from ray_slurm_provider.progress import HeadProgress
from ray_slurm_provider.ray_contract import CommandRunnerInterface, cli_logger
from ray_slurm_provider.slurm.process import clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_slurm_provider.cluster import Cluster

logger = logging.getLogger(__name__)

# Ray's commands name these ports; the head of this cluster has others.
_USUAL_PORTS = {8265: "dashboard", 10001: "client", 6379: "gcs"}
_BOOTSTRAP = "ray_bootstrap_config.yaml"
_RAY_LOGS = "/tmp/ray/session_latest"  # noqa: S108 what Ray's own commands name (ray/autoscaler/_private/commands.py)


class HeadStartError(click.ClickException):
    """The head did not come up.

    Ray's updater prints an exception that has these attributes without a traceback
    (ray/autoscaler/_private/updater.py, run).
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.cmd = "ray start --head"
        self.returncode = 1
        self.stderr = message


class CommandFailed(click.ClickException):
    """A command on the node failed; `ray exec` ends with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the command ended with exit code {code}")
        self.exit_code = code  # type: ignore[misc]


class SlurmCommandRunner(CommandRunnerInterface):
    """Runs commands in the job of one node.

    Args:
        cluster: The cluster.
        node_id: The node.
    """

    def __init__(self, cluster: Cluster, node_id: str) -> None:
        self._cluster = cluster
        self._node_id = node_id

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
        shutdown_after_run: bool = False,
    ) -> str:
        """Run a command on the node, or do what it stands for; see the interface in Ray."""
        if port_forward:
            with self._forwarded(port_forward):
                return self._wait_for_interrupt() if cmd is None else self._run_command(cmd, with_output=with_output)
        if cmd is None:
            raise click.ClickException("there is no command and no port to forward")
        if environment_variables is not None:
            if "ray start" in cmd:
                self._start_head(cmd, environment_variables)
            return ""
        if run_env == "host" or cmd.strip() == "ray stop":
            # The updater's own probes, and the `ray stop` of `ray down`, which would end every Ray of this
            # user on that host: the node ends with its job.
            return ""
        if shutdown_after_run:
            raise click.ClickException("--stop is not supported yet; use `ray down` when the command has ended")
        return self._run_command(cmd, with_output=with_output)

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy to the node: a local copy, for the file system is shared."""
        if Path(target).name == _BOOTSTRAP:
            self._cluster.directory.write_bootstrap_config(Path(source))
            return
        copy(source, target, _excluded(options))

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy from the node."""
        copy(source, target, _excluded(options))

    def remote_shell_command_str(self) -> str:
        """Return what a person types for a shell on the node."""
        return shlex.join(self._srun_command("exec bash -l", terminal=True))

    def run_init(self, *, as_head: bool, file_mounts: dict[str, str], sync_run_yet: bool) -> bool | None:  # noqa: ARG002
        """Nothing to initialise."""
        return None

    def _start_head(self, cmd: str, variables: dict[str, object]) -> None:
        node = self._cluster.last_seen(self._node_id)
        if node.ready:
            cli_logger.print("Ray already runs in job {}; nothing is restarted.", self._node_id)
            self._say_what_next()
            return
        self._cluster.let_head_start(
            self._node_id,
            autoscaler_v2="RAY_enable_autoscaler_v2=1" in cmd,
            usage_stats=str(variables.get("RAY_USAGE_STATS_ENABLED", 0)) == "1",
        )
        try:
            with HeadProgress(self._cluster.log_of(self._node_id)) as progress:
                self._cluster.wait_for_head(self._node_id, progress.tell)
        except HeadFailed as error:
            raise HeadStartError(str(error)) from error
        except SlurmProviderError as error:
            raise click.ClickException(str(error)) from error
        self._say_what_next()

    def _say_what_next(self) -> None:
        report = self._cluster.directory.report(self._node_id)
        if report is None:
            return
        config = next((word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))), "CLUSTER.yaml")
        cli_logger.success(
            "Ray answers at {} (job {}, {})",
            report.gcs_address,
            self._node_id,
            report.slurm_node or report.host,
        )
        cli_logger.print("Use it from this shell:")
        cli_logger.print('  eval "$(ray-slurm env {})" && ray status', shlex.quote(config))

    def _run_command(self, cmd: str, *, with_output: bool) -> str:
        return self._srun(self._rewritten(cmd), with_output=with_output)

    @contextmanager
    def _forwarded(self, pairs: Any) -> Iterator[None]:
        """Forward local ports to the head; Ray's usual port numbers stand for those of this cluster."""
        report = self._cluster.directory.report(self._node_id)
        if report is None or not report.address:
            raise click.ClickException(f"node {self._node_id} has no address yet")
        wanted: list[tuple[int, int]] = [pairs] if isinstance(pairs, tuple) else list(pairs)
        forwards = []
        for local, usual in wanted:
            remote = report.ports.get(_USUAL_PORTS.get(usual, ""), usual)
            forwards.append(Forward(local, report.address, remote))
        for forward in forwards:
            cli_logger.print("127.0.0.1:{} leads to {}:{}", forward.local, forward.host, forward.remote)
        try:
            with Forwarder(forwards):
                yield
        except OSError as error:
            raise click.ClickException(f"the port cannot be forwarded: {error.strerror or error}") from error

    def _wait_for_interrupt(self) -> str:
        cli_logger.print("Ctrl-C ends the forwarding.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            cli_logger.newline()
        return ""

    def _rewritten(self, cmd: str) -> str:
        """Replace the paths that Ray's own commands name by those of this cluster."""
        cmd = cmd.replace(f"~/{_BOOTSTRAP}", shlex.quote(str(self._cluster.directory.bootstrap_config)))
        report = self._cluster.directory.report(self._node_id)
        return cmd.replace(_RAY_LOGS, f"{report.temp_dir}/session_latest") if report and report.temp_dir else cmd

    def _srun(self, cmd: str, *, with_output: bool) -> str:
        command = self._srun_command(cmd, terminal=not with_output and sys.stdin.isatty() and sys.stdout.isatty())
        try:
            done = subprocess.run(
                command,
                env=clean_environment(os.environ),
                stdout=subprocess.PIPE if with_output else None,
                text=True,
                check=False,
            )
        except OSError as error:
            raise click.ClickException(f"srun: {error.strerror}") from error
        if done.returncode:
            raise CommandFailed(done.returncode)
        return done.stdout or ""

    def _srun_command(self, cmd: str, *, terminal: bool) -> list[str]:
        tools = self._cluster.slurm_client().tools
        environment = shlex.quote(str(self._cluster.directory.reports.head_environment))
        job_id = self._node_id.rpartition("-")[0]
        return [
            tools.path_of("srun"),
            f"--jobid={job_id}",
            "--overlap",
            "--nodes=1",
            "--ntasks=1",
            "--unbuffered",
            "--quit-on-interrupt",
            *(["--pty"] if terminal else []),
            "bash",
            "-c",
            f". {environment} && cd && {{ {cmd}\n}}",
        ]


def _excluded(options: dict[str, Any] | None) -> list[str]:
    """Return the patterns that Ray wants left out; filter files are told to be unknown here."""
    filters = (options or {}).get("rsync_filter") or []
    if filters:
        cli_logger.warning("rsync_filter is not supported here; everything is copied: {}", ", ".join(filters))
    return list((options or {}).get("rsync_exclude") or [])


def copy(source: str, target: str, excluded: Sequence[str] = ()) -> None:
    """Copy a file or a directory on the shared file system as rsync would.

    Args:
        source: What; one that ends with ``/`` stands for the content of the directory.
        target: Where to; directories on the way are made.
        excluded: Patterns of names below a directory to leave out.

    Raises:
        click.ClickException: It cannot be copied.
    """
    origin, goal = Path(source).expanduser(), Path(target).expanduser()
    if not origin.exists():
        raise click.ClickException(f"{source} does not exist")
    if (origin.is_dir() and not source.endswith("/")) or (origin.is_file() and (target.endswith("/") or goal.is_dir())):
        goal = goal / origin.name
    try:
        if goal.exists() and origin.samefile(goal):
            return
        goal.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            ignore = shutil.ignore_patterns(*(pattern.strip("/") for pattern in excluded))
            shutil.copytree(origin, goal, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy2(origin, goal)
    except (OSError, shutil.Error) as error:
        raise click.ClickException(f"{source} cannot be copied to {goal}: {error}") from error
