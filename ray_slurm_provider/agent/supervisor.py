"""Starts Ray in the job, watches it, and ends the job with it.

# Design:
When the agent ends, the job ends: its parent, the guard, is the job's batch process. Both are child
subreapers (prctl(2)), so whatever Ray leaves behind becomes their child and is ended with them. One loop
waits for Ray's output, for signals and for time; there are no threads. What it watches:

* ``ray start`` or the raylet ended: the job ends at once, for an allocation without a raylet is waste.
* SIGTERM (scancel, or the end of the time limit): Ray is ended and cleaned up after.
* SIGUSR1 (SLURM announces the time limit): ``ray start`` gets SIGTERM and moves its work away (drains).
* on a head, Ray's autoscaler: it is started here, and again when it was killed.
* on a worker, the head is lost: the job ends; and the cluster's other jobs are cancelled when SLURM or the
  head's own report says that it ended, for a head that was killed can no longer do that itself.
* on a head, the files by which commands ask it to restart Ray, or to end (`reports.ReportPaths`).
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray_slurm_provider import procfs, tls
from ray_slurm_provider.agent import kernel, network, ray_command
from ray_slurm_provider.agent.allocation import read_allocation
from ray_slurm_provider.agent.directory_watch import DirectoryWatch
from ray_slurm_provider.agent.head_watch import HeadWatch
from ray_slurm_provider.agent.monitor import Monitor
from ray_slurm_provider.agent.pace import Pace
from ray_slurm_provider.agent.place import Place
from ray_slurm_provider.agent.siblings import Siblings
from ray_slurm_provider.agent.temp_dirs import sweep_temp_dirs
from ray_slurm_provider.birth_certificate import CERTIFICATE_VARIABLE, job_id_of
from ray_slurm_provider.errors import SlurmError, SlurmUnavailable, StateError
from ray_slurm_provider.files import is_gone, read_json_object, write_atomically
from ray_slurm_provider.reports import (
    BOOTSTRAP_CONFIG,
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
    from collections.abc import Callable, Mapping

    from ray_slurm_provider.agent.spec import AgentSpec

T = TypeVar("T")

logger = logging.getLogger("ray_slurm_provider.agent")

_LOOP_S = 1.0
# From the first step of the end on Ray has so long to end in order, and what is left so long to die. Together they stay
# below SLURM's KillWait, which is 30 s by default and 5 s on some sites.
_GRACE_S = 3.0
_KILL_S = 1.0
_START_ATTEMPTS = 3
# How often a node looks after what it has written. Thousands of workers shall not keep a file system busy.
_HEAD_KEEPS_S = 5.0
_WORKER_KEEPS_S = 60.0
# How long a node that starts waits for a controller that does not answer, and how often it asks.
_SLURM_AWAY_S = 600.0
_ASK_AGAIN_S = 2.0
_TAIL_BYTES = 8192


class StartError(Exception):
    """The node cannot start; the text is for the user."""


class Supervisor:
    """The life of one Ray node."""

    def __init__(self, spec: AgentSpec, environ: Mapping[str, str]) -> None:
        self._spec = spec
        self._environ = environ
        self._node_id = environ["RAY_CLOUD_INSTANCE_ID"]
        self._paths = ReportPaths(spec.directory)
        self._slurm = SlurmClient(SlurmTools(spec.slurm_bin, spec.command_timeout_s, environ, spec.clusters))
        self._report = NodeReport(
            self._node_id, STARTING, host=socket.gethostname(), slurm_node=environ.get("SLURMD_NODENAME", "")
        )
        self._siblings = Siblings(spec, self._node_id, self._slurm)
        self._head = HeadWatch(spec, self._siblings.head_ended)
        self._monitor: Monitor | None = None
        self._directory = DirectoryWatch(spec.directory)
        self._missed = False
        self._looking_for_signs = Pace(_LOOP_S)
        self._keeping = Pace(_HEAD_KEEPS_S if spec.is_head else _WORKER_KEEPS_S)
        self._unpublished = False
        self._place = Place(spec)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: subprocess.Popen[bytes] | None = None  # the one that was told to end
        self._raylet: procfs.Process | None = None
        self._tail = b""
        self._signals: list[int] = []
        self._draining = False
        self._restarting = False

    def run(self) -> int:
        wakeup = kernel.watch_signals(self._signals)
        # The guard has blocked them until someone listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        kernel.become_subreaper()
        code = 1
        reason = "the agent failed"
        try:
            command, environment = self._prepare()
            reason, code = self._supervise(command, environment, wakeup)
        except (StartError, SlurmError, StateError, OSError) as error:
            reason = str(error)
        finally:
            self._finish(reason, code)
        return code

    # -- before Ray -----------------------------------------------------------------------------

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """Take what Ray needs on this host, and return its command line and environment."""
        if importlib.util.find_spec("ray") is None:
            raise StartError(
                f"the Python {sys.executable} on {self._report.host} has no ray; install ray[default] there"
            )
        if unfit := ray_command.unfit_ray():
            raise StartError(f"on {self._report.host}, {unfit}")
        try:
            resources = self._resources()
            address = self._choose_address()
            self._place.take()
        except ValueError as error:
            raise StartError(str(error)) from error
        self._publish(phase=STARTING, address=address, ports=self._place.ports, temp_dir=str(self._place.temp_dir))
        if not self._spec.is_head and (reason := self._head.why_not_start(self._signals)):
            if not self._signals:
                # Nobody else may be left to do that.
                self._siblings.cancel_orphans()
            raise StartError(reason)
        if self._spec.tls:
            tls.make_certificate(self._authority, self._certificate, [address, *network.own_addresses()])
        return self._ray_start(resources)

    def _ray_start(self, resources: dict[str, int]) -> tuple[list[str], dict[str, str]]:
        report = self._report
        go = read_json_object(self._paths.go(self._node_id.rpartition("-")[2])) or {}
        command = ray_command.start_command(self._spec, report.address, report.ports, report.temp_dir)
        added = ray_command.start_environment(self._spec, resources, report.ports, go)
        logger.info("this node has %s at %s", added["RAY_OVERRIDE_RESOURCES"], report.address)
        # What the user's `env` says about Ray's own knobs wins.
        environment = {
            **added,
            **self._environ,
            **{name: added[name] for name in added if name.startswith(("RAY_OVERRIDE", "RAY_AUTH"))},
            **self._tls_environment(),
        }
        environment.pop(CERTIFICATE_VARIABLE, None)
        return command, environment

    def _resources(self) -> dict[str, int]:
        if self._spec.login_node:
            return dict(self._spec.resources)
        allocation = read_allocation(self._environ, self._job_facts)
        return ray_command.promised_resources(self._spec, allocation.resources())

    def _choose_address(self) -> str:
        if self._spec.login_node:
            return network.choose_login_address(
                self._spec.interface, lambda: self._patiently(self._slurm.node_addresses)
            )
        return network.choose_address(
            self._spec.interface,
            self._report.slurm_node,
            lambda node: self._patiently(lambda: self._slurm.node_address(node)),
        )

    @property
    def _authority(self) -> Path:
        return self._spec.directory / "tls"

    @property
    def _certificate(self) -> Path:
        return Path(self._report.temp_dir) / f"tls-{self._node_id.rpartition('-')[2]}.pem"

    def _tls_environment(self) -> dict[str, str]:
        return tls.tls_environment(self._authority, self._certificate) if self._spec.tls else {}

    def _job_facts(self) -> Mapping[str, str]:
        return self._patiently(lambda: self._slurm.job_facts(job_id_of(self._node_id)))

    def _patiently(self, question: Callable[[], T]) -> T:
        """Ask SLURM something, again while it does not answer: this node has its allocation and can wait."""
        deadline = time.monotonic() + _SLURM_AWAY_S
        while True:
            try:
                return question()
            except SlurmUnavailable as error:  # noqa: PERF203 waiting is what the loop is for
                if self._signals or time.monotonic() > deadline:
                    raise
                logger.warning("SLURM does not answer, trying again: %s", error.complaint)
                self._publish()
                time.sleep(_ASK_AGAIN_S)

    # -- while Ray runs -------------------------------------------------------------------------

    def _supervise(self, command: list[str], environment: dict[str, str], wakeup: socket.socket) -> tuple[str, int]:
        """Start Ray and wait for the end; return why and with which exit code."""
        attempts = _START_ATTEMPTS
        while True:
            reason, code = self._run_ray(command, environment, wakeup)
            attempts -= 1
            restarting, self._restarting = self._restarting and not self._signals, False
            if restarting:
                logger.info("restarting Ray as asked; its workers do not survive that")
            elif attempts and self._lost_a_port():
                logger.warning("somebody took a port in the meantime; trying others")
            else:
                return reason, code
            self._publish(phase=STARTING)
            self._end_processes(time.monotonic() + _GRACE_S)
            if restarting:
                # Now that no autoscaler can ask for more.
                self._siblings.cancel()
            self._place.give_back()
            self._tail, self._raylet = b"", None
            command, environment = self._prepare()

    def _lost_a_port(self) -> bool:
        taken = re.search(rb"[Aa]ddress already in use|port.{1,40} in use", self._tail)
        return self._report.phase == STARTING and taken is not None and not self._signals

    def _run_ray(self, command: list[str], environment: dict[str, str], wakeup: socket.socket) -> tuple[str, int]:
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
            selector.register(output, selectors.EVENT_READ, lambda stream: self._pump(stream, environment))
            selector.register(wakeup, selectors.EVENT_READ, kernel.drain_wakeup)
            while True:
                for key, _ in selector.select(_LOOP_S):
                    if not key.data(key.fileobj):
                        selector.unregister(key.fileobj)
                end = self._reason_to_end()
                if end is not None:
                    self._pump(output, environment)
                    return end

    def _new_monitor(self, environment: Mapping[str, str]) -> Monitor:
        report = self._report
        command = ray_command.monitor_command(report.address, report.gcs_address, report.temp_dir)
        written, copy = self._spec.directory / BOOTSTRAP_CONFIG, Path(report.temp_dir) / BOOTSTRAP_CONFIG
        # Not in the environment of Ray itself: each driver and each task on this host would pass for the autoscaler.
        return Monitor(command, {**environment, ray_command.GCS_ADDRESS_VARIABLE: report.gcs_address}, written, copy)

    def _pump(self, output: object, environment: Mapping[str, str]) -> bool:
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
            self._ready(environment)
        return bool(text)

    def _ready(self, environment: Mapping[str, str]) -> None:
        assert self._child is not None  # noqa: S101 called from its output
        self._raylet = next((p for p in procfs.descendants(self._child.pid) if p.name == "raylet"), None)
        self._write_exports()
        self._publish(phase=READY, ready_at=time.time())
        if self._spec.is_head:
            self._monitor = self._new_monitor(environment)
        kernel.give_memory_back()
        logger.info("Ray is up; raylet %s", self._raylet.pid if self._raylet else "not found")

    def _reason_to_end(self) -> tuple[str, int] | None:
        """Look at signals, Ray and the head; return why to end and the exit code, None to go on."""
        assert self._child is not None  # noqa: S101 started before
        ordered = self._ordered_to_end()
        if ordered:
            return ordered, 0
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
        if not self._spec.is_head and (gone := self._head.why_gone()):
            self._siblings.cancel_orphans()
            return gone, 0
        if (self._spec.is_head or self._report.phase == READY) and self._keeping.due():
            self._keep_reports()
            if self._spec.is_head:
                self._look_after_directory()
        trouble = self._monitor.tend() if self._monitor is not None else ""
        return (trouble, 1) if trouble else None

    def _ordered_to_end(self) -> str:
        """Return why to end Ray, when somebody wants that."""
        if signal.SIGTERM in self._signals:
            return "the job was cancelled or reached its time limit"
        if not (self._spec.is_head and self._looking_for_signs.due()):
            return ""
        if _taken(self._paths.stop(self._node_id)):
            return "it was asked to end, by `ray exec --stop` or from another host"
        if not self._signals and _taken(self._paths.restart(self._node_id)):
            self._restarting = True
            return "a restart was asked for"
        return ""

    # -- the end --------------------------------------------------------------------------------

    def _finish(self, reason: str, code: int) -> None:
        logger.info("the node ends: %s", reason)
        deadline, answered = time.monotonic() + _GRACE_S, False
        if self._spec.is_head:
            # From the report on, the autoscaler submits nothing more.
            self._publish(phase=ENDED, reason=reason)
            # Nothing waits for anything here: the controller may kill us at any moment now, or not answer.
            self._ask_to_end()
            answered = self._siblings.cancel()
        self._end_processes(deadline)
        if self._spec.is_head and answered:
            # What it submitted at the very last.
            self._siblings.cancel()
        if code and not self._report.ready_at and not read_reason(self._paths.reason(self._node_id)):
            with contextlib.suppress(OSError):
                write_atomically(self._paths.reason(self._node_id), reason + "\n")
        if not self._spec.is_head:
            self._publish(phase=ENDED, reason=reason)
        self._place.give_back()

    def _end_processes(self, deadline: float) -> None:
        """End everything below this process, and Ray by force when the time has come."""
        self._ask_to_end()
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(max(deadline - time.monotonic(), 0))
        kernel.end_descendants(_KILL_S)

    def _ask_to_end(self) -> None:
        """End the autoscaler, and have Ray end in order, once."""
        if self._monitor is not None:
            self._monitor.end()
            self._monitor = None
        if self._child is not None and self._child is not self._asked and self._child.poll() is None:
            self._child.terminate()
            self._asked = self._child

    def clean_up_after_kill(self) -> None:
        """Do in the guard what a killed agent cannot do any more; it ends the processes itself."""
        if self._spec.is_head:
            self._siblings.cancel()
        sweep_temp_dirs(self._spec.temp_dir)

    # -- telling others -------------------------------------------------------------------------

    def _publish(self, **changes: Any) -> None:
        self._report = self._report._replace(time=time.time(), **changes)
        if self._report.phase == ENDED and self._spec.is_head and self._replaced():
            return
        try:
            write_report(self._paths, self._report, head=self._spec.is_head)
            self._unpublished = False
        except OSError as error:
            # A full disk ends no node; what it has to say is tried again.
            if not self._unpublished:
                logger.warning("the report of this node cannot be written: %s", error)
            self._unpublished = True

    def _look_after_directory(self) -> None:
        self._directory.keep_young()
        if not self._missed and self._directory.is_deleted():
            self._missed = True
            logger.warning(
                "the cluster's directory %s was deleted: what runs goes on, but no new node and no new process of Ray"
                " starts, and `ray exec`, `ray submit` and `ray attach` do not work; to have them back, end this head"
                " (`%s`) and run `ray up`",
                self._spec.directory,
                f"kill {os.getppid()}" if self._spec.login_node else f"scancel {job_id_of(self._node_id)}",
            )

    def _keep_reports(self) -> None:
        """Write again what this node has written and what is not there any more."""
        reports = [self._paths.report(self._node_id), *([self._paths.head] if self._spec.is_head else [])]
        if self._unpublished or any(map(is_gone, reports)):
            self._publish()
        exports = self._paths.environment(self._node_id)
        if is_gone(exports) and not is_gone(exports.parent):
            self._write_exports()

    def _write_exports(self) -> None:
        try:
            write_atomically(self._paths.environment(self._node_id), self._shell_environment())
        except OSError as error:
            logger.warning("the environment of this node cannot be written: %s", error)

    def _replaced(self) -> bool:
        head = read_report(self._paths.head)
        return head is not None and head.node_id != self._node_id

    def _shell_environment(self) -> str:
        access = ray_command.access_environment(self._spec.directory, token_auth=self._spec.token_auth)
        address = self._report.gcs_address or self._spec.gcs_address
        access |= {"RAY_ADDRESS": address, **self._tls_environment()}
        return ray_command.shell_environment(self._environ, access)


def _taken(sign: Path) -> bool:
    """Take a sign away, and tell whether it was there: what was done once is not done again."""
    try:
        sign.unlink()
    except OSError:
        return False
    return True
