"""Starts Ray in the job, watches it, and ends the job with it.

# Design:
When the agent ends, the job ends: its parent, the guard, is the job's batch process. Both are child
subreapers (prctl(2)), so whatever Ray leaves behind becomes their child and is ended with them. One loop
waits for Ray's output, for signals and for time; there are no threads. What it watches:

* ``ray start`` or the raylet ended: the job ends at once, for an allocation without a raylet is waste.
* SIGTERM (scancel, or the end of the time limit): Ray is ended and cleaned up after.
* SIGUSR1 (SLURM announces the time limit): ``ray start`` gets SIGTERM and moves its work away (drains).
* on a worker, the head is positively gone: the job ends, and the cluster's other jobs are cancelled, for
  a head that was killed can no longer do that itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_slurm_provider import procfs
from ray_slurm_provider.agent import kernel, network, ray_command
from ray_slurm_provider.agent.allocation import read_allocation
from ray_slurm_provider.agent.temp_dirs import StartLock, join_temp_dir, leave_temp_dir, make_temp_dir, sweep_temp_dirs
from ray_slurm_provider.birth_certificate import job_id_of, read_certificate
from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.files import read_json_object, write_atomically
from ray_slurm_provider.reports import (
    ENDED,
    READY,
    STARTING,
    NodeReport,
    ReportPaths,
    read_reason,
    read_report,
    write_report,
)
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_slurm_provider.agent.spec import AgentSpec

logger = logging.getLogger("ray_slurm_provider.agent")

_LOOP_S = 1.0
_TURN_POLL_S = 0.1
_HEAD_CHECK_S = 5.0
# A head that restarts its network card refuses nothing; refused connections for this long mean that it is gone.
_HEAD_REFUSED_S = 15.0
# Stays below SLURM's KillWait, which is 30 s by default and 5 s on some sites.
_GRACE_S = 3.0
_START_ATTEMPTS = 3
_TAIL_BYTES = 8192


class StartError(Exception):
    """The node cannot start; the text is for the user."""


class Supervisor:
    """The life of one Ray node.

    Args:
        spec: What the node shall be.
        environ: The job's environment.
    """

    def __init__(self, spec: AgentSpec, environ: Mapping[str, str]) -> None:
        self._spec = spec
        self._environ = environ
        self._node_id = environ["RAY_CLOUD_INSTANCE_ID"]
        self._paths = ReportPaths(spec.directory)
        self._slurm = SlurmClient(SlurmTools(spec.slurm_bin, spec.command_timeout_s, environ))
        self._report = NodeReport(
            self._node_id, STARTING, host=socket.gethostname(), slurm_node=environ.get("SLURMD_NODENAME", "")
        )
        self._temp_dir: Path | None = None
        self._start_lock: StartLock | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._raylet: procfs.Process | None = None
        self._tail = b""
        self._signals: list[int] = []
        self._draining = False
        self._next_head_check = 0.0
        self._refused_since: float | None = None

    def run(self) -> int:
        """Run the node to its end and return the job's exit code."""
        wakeup = kernel.watch_signals(self._signals)
        # The guard has blocked them until someone listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        kernel.become_subreaper()
        code = 1
        reason = "the agent failed"
        try:
            command, environment = self._prepare()
            reason, code = self._supervise(command, environment, wakeup)
        except (StartError, SlurmError, OSError) as error:
            reason = str(error)
        finally:
            self._finish(reason, code)
        return code

    # -- before Ray -----------------------------------------------------------------------------

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        if importlib.util.find_spec("ray") is None:
            raise StartError(
                f"the Python {sys.executable} on {self._report.host} has no ray; install ray[default] there"
            )
        self._publish()
        for path in sweep_temp_dirs(self._spec.temp_dir):
            logger.info("removed %s, left behind by a job that was killed", path)
        try:
            allocation = read_allocation(self._environ, self._job_facts)
            resources = ray_command.promised_resources(self._spec, allocation.resources())
            address = network.choose_address(self._spec.interface, self._report.slurm_node, self._slurm.node_address)
            self._temp_dir = self._take_temp_dir()
        except ValueError as error:
            raise StartError(str(error)) from error
        ports = network.free_ports(ray_command.HEAD_PORTS, address) if self._spec.is_head else {}
        self._publish(address=address, ports=ports, temp_dir=str(self._temp_dir))
        if not self._spec.is_head:
            self._require_head()
        go = read_json_object(self._paths.go(self._node_id.rpartition("-")[2])) or {}
        command = ray_command.start_command(self._spec, address, ports, str(self._temp_dir))
        added = ray_command.start_environment(
            self._spec, resources, self._report.gcs_address, str(self._temp_dir), ports, go
        )
        logger.info("this node has %s at %s", added["RAY_OVERRIDE_RESOURCES"], address)
        # What the user's `env` says about Ray's own knobs wins.
        return command, {
            **added,
            **self._environ,
            **{name: added[name] for name in added if name.startswith(("RAY_OVERRIDE", "RAY_AUTH"))},
        }

    def _take_temp_dir(self) -> Path:
        if self._spec.is_head or ray_command.has_own_temp_dir():
            return make_temp_dir(self._spec.temp_dir, self._node_id)
        shared = Path(self._spec.head_temp_dir)
        join_temp_dir(shared, self._node_id)
        self._start_lock = StartLock(shared)
        return shared

    def _leave_temp_dir(self) -> None:
        if self._temp_dir is not None:
            leave_temp_dir(self._temp_dir, self._node_id)
            self._temp_dir = None

    def _wait_for_turn(self) -> None:
        """Wait until no other node that shares our directory is starting."""
        while self._start_lock is not None and not self._start_lock.acquired() and not self._signals:
            time.sleep(_TURN_POLL_S)

    def _end_turn(self) -> None:
        if self._start_lock is not None:
            self._start_lock.release()
            self._start_lock = None

    def _job_facts(self) -> Mapping[str, str]:
        return self._slurm.job_facts(job_id_of(self._node_id))

    def _require_head(self) -> None:
        host, port = network.split_address(self._spec.gcs_address)
        if self._other_head() or network.connection_state(host, port, _HEAD_CHECK_S) == "refused":
            raise StartError(f"the head {self._spec.head} at {self._spec.gcs_address} is gone")

    # -- while Ray runs -------------------------------------------------------------------------

    def _supervise(self, command: list[str], environment: dict[str, str], wakeup: socket.socket) -> tuple[str, int]:
        """Start Ray and wait for the end; return why and with which exit code."""
        for _ in range(_START_ATTEMPTS):
            reason, code = self._run_ray(command, environment, wakeup)
            lost_a_port = self._report.phase == STARTING and re.search(
                rb"[Aa]ddress already in use|port.{1,40} in use", self._tail
            )
            if not (self._spec.is_head and lost_a_port and not self._signals):
                break
            logger.warning("somebody took a port in the meantime; trying others")
            self._end_processes()
            self._leave_temp_dir()
            command, environment = self._prepare()
        return reason, code

    def _run_ray(self, command: list[str], environment: dict[str, str], wakeup: socket.socket) -> tuple[str, int]:
        self._wait_for_turn()
        logger.info("starting %s", shlex.join(command))
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=kernel.die_with_parent,  # noqa: PLW1509 this process has no threads
        )
        output = self._child.stdout
        assert output is not None  # noqa: S101 stdout=PIPE
        os.set_blocking(output.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ, self._pump)
            selector.register(wakeup, selectors.EVENT_READ, kernel.drain_wakeup)
            while True:
                for key, _ in selector.select(_LOOP_S):
                    if not key.data(key.fileobj):
                        selector.unregister(key.fileobj)
                end = self._reason_to_end()
                if end is not None:
                    self._pump(output)
                    return end

    def _pump(self, output: object) -> bool:
        """Hand Ray's output on to the job's log; tell whether more can come."""
        try:
            text = os.read(output.fileno(), 65536)  # type: ignore[attr-defined]
        except BlockingIOError:
            return True
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        self._tail = (self._tail + text)[-_TAIL_BYTES:]
        if self._report.phase == STARTING and ray_command.STARTED_MARK in self._tail:
            self._ready()
        return bool(text)

    def _ready(self) -> None:
        assert self._child is not None  # noqa: S101 called from its output
        self._raylet = next((p for p in procfs.descendants(self._child.pid) if p.name == "raylet"), None)
        if self._spec.is_head:
            text = self._shell_environment()
            with contextlib.suppress(FileNotFoundError):
                write_atomically(self._paths.head_environment, text)
        self._publish(phase=READY, ready_at=time.time())
        self._end_turn()
        logger.info("Ray is up; raylet %s", self._raylet.pid if self._raylet else "not found")

    def _reason_to_end(self) -> tuple[str, int] | None:
        """Look at signals, Ray and the head; return why to end and the exit code, None to go on."""
        assert self._child is not None  # noqa: S101 started before
        if signal.SIGTERM in self._signals:
            return "the job was cancelled or reached its time limit", 0
        if signal.SIGUSR1 in self._signals and not self._draining:
            logger.info("the time limit is near: Ray moves its work away")
            self._draining = True
            self._child.send_signal(signal.SIGTERM)
        code = self._child.poll()
        if code is not None:
            if self._draining:
                return "the time limit was near, and Ray has moved its work away", 0
            return f"ray start ended with exit code {code}", code or 1
        if self._raylet is not None and not procfs.alive(self._raylet):
            # Also after a drain by the autoscaler: `ray start --block` stays when the raylet ended in order.
            return "the raylet ended", 0
        if not self._spec.is_head and self._head_is_gone():
            self._cancel_workers()
            return f"the head {self._spec.head} is gone", 0
        return None

    def _head_is_gone(self) -> bool:
        now = time.monotonic()
        if now < self._next_head_check:
            return False
        self._next_head_check = now + _HEAD_CHECK_S
        if self._other_head():
            return True
        host, port = network.split_address(self._spec.gcs_address)
        if network.connection_state(host, port, _HEAD_CHECK_S) != "refused":
            self._refused_since = None
            return False
        self._refused_since = self._refused_since or now
        return now - self._refused_since >= _HEAD_REFUSED_S

    def _other_head(self) -> bool:
        """Tell whether the head says that it ended, or another one took its place; a missing file says nothing."""
        head = read_report(self._paths.head)
        return head is not None and (head.node_id != self._spec.head or head.phase == ENDED)

    # -- the end --------------------------------------------------------------------------------

    def _finish(self, reason: str, code: int) -> None:
        logger.info("the node ends: %s", reason)
        if self._spec.is_head:
            # Before the end of Ray takes its time: the controller may kill us at any moment now.
            self._publish(phase=ENDED, reason=reason)
            self._cancel_workers()
        self._end_processes()
        if code and not self._report.ready_at and not read_reason(self._paths.reason(self._node_id)):
            with contextlib.suppress(FileNotFoundError):
                write_atomically(self._paths.reason(self._node_id), reason + "\n")
        if not self._spec.is_head:
            self._publish(phase=ENDED, reason=reason)
        self._leave_temp_dir()

    def _end_processes(self) -> None:
        """End everything below this process, also what it inherited as subreaper."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_GRACE_S)
        kernel.end_descendants(_GRACE_S)

    def clean_up_after_kill(self) -> None:
        """Do in the guard what a killed agent cannot do any more; it ends the processes itself."""
        if self._spec.is_head:
            self._cancel_workers()
        sweep_temp_dirs(self._spec.temp_dir)

    def _cancel_workers(self) -> None:
        """Cancel every job of this head, queued ones too; but not the own one."""
        head = self._spec.head or self._node_id
        own = job_id_of(self._node_id)
        try:
            doomed = [
                job.job_id
                for job in self._slurm.jobs()
                if job.alive
                and job.job_id != own
                and (certificate := read_certificate(job.comment)) is not None
                and (certificate.cluster, certificate.home, certificate.head)
                == (self._spec.cluster, self._spec.home, head)
            ]
            if doomed:
                logger.info("cancelling the cluster's jobs %s", " ".join(doomed))
                self._slurm.cancel(doomed)
        except SlurmError as error:
            logger.warning("the cluster's other jobs could not be cancelled: %s", error)

    # -- telling others -------------------------------------------------------------------------

    def _publish(self, **changes: Any) -> None:
        self._report = replace(self._report, time=time.time(), **changes)
        if self._report.phase == ENDED and self._spec.is_head and self._replaced():
            return
        write_report(self._paths, self._report, head=self._spec.is_head)

    def _replaced(self) -> bool:
        head = read_report(self._paths.head)
        return head is not None and head.node_id != self._node_id

    def _shell_environment(self) -> str:
        """Return shell lines that give a command the environment of this job."""
        left_out = re.compile(r"SLURM|RAY_OVERRIDE|(PWD|OLDPWD|SHLVL|_)$")
        variables = {
            name: value for name, value in self._environ.items() if name.isidentifier() and not left_out.match(name)
        }
        variables.update(ray_command.access_environment(self._spec.directory, token_auth=self._spec.token_auth))
        variables["RAY_ADDRESS"] = self._report.gcs_address
        variables[ray_command.TEMP_DIR_VARIABLE] = self._report.temp_dir
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))
