"""The head as a process on the login node, outside SLURM.

# Design:
Whether it lives, the kernel of its host knows: process id, start time and boot id name it for good. The
record in the cluster directory tells these to every `ray` command. When the record is lost, the names of
the head's files hold its host and process id, and that process carries its birth certificate in its
environment. On another login node its life is read from what it says itself, and from its GCS port when that is
open; a refused connection may be a firewall's.
"""

import logging
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.network import connection_state
from ray_slurm_provider.backends.base import Launch, Sighting
from ray_slurm_provider.backends.launch_script import certificate_text, job_spec, new_certificate
from ray_slurm_provider.batch_script import render_process
from ray_slurm_provider.birth_certificate import CERTIFICATE_VARIABLE, BirthCertificate, read_certificate
from ray_slurm_provider.cluster_dir import ClusterDir, LoginHead
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.reports import ENDED

logger = logging.getLogger(__name__)

PREFIX = "login-"
_NODE_ID = re.compile(rf"{PREFIX}(.+)-(\d{{1,10}})-[a-z0-9]+")
_CONNECT_S = 5.0
# The agent ends Ray and cancels the cluster's jobs first.
_END_S = 30.0


class LoginProcess:
    """The one head of a cluster on a login node."""

    def __init__(self, directory: ClusterDir, cluster: str) -> None:
        self._directory = directory
        self._cluster = cluster
        self._last: LoginHead | None = None
        self._searched = False
        self._children: list[subprocess.Popen[bytes]] = []

    def sightings(self) -> list[Sighting]:
        """Return the head, also one that has ended.

        Raises:
            StateError: It runs on another host, and whether it lives cannot be told from here.
        """
        head = self._head()
        certificate = None if head is None else read_certificate(head.certificate)
        if head is None or certificate is None:
            return []
        alive, reason = self._life(head)
        return [
            Sighting(
                node_id=head.node_id,
                head="",
                birth_tags=certificate.tags,
                alive=alive,
                state="RUNNING" if alive else "ENDED",
                reason=reason,
                place=head.host,
                start=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(head.created)),
            )
        ]

    def batch_size(self, launch: Launch) -> int:  # noqa: ARG002 whatever it is
        return 1

    def create(self, launch: Launch, count: int = 1) -> list[str]:  # noqa: ARG002 there is one head
        """Start the head on this host, detached from the terminal."""
        certificate = new_certificate(launch)
        text = certificate_text(launch, certificate)
        host = host_name()
        script = self._directory.write_script(certificate.token, render_process(job_spec(launch, certificate), host))
        child = subprocess.Popen(
            ["/bin/bash", str(script)],
            env={**launch.environ, CERTIFICATE_VARIABLE: text},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        self._children.append(child)
        head = self._last = self._record(certificate, child.pid, text)
        logger.info("started %s as process %d", head.node_id, child.pid)
        return [head.node_id]

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End the head and everything below it; one that has ended already is no error."""
        head = self._head()
        if head is None or head.node_id not in node_ids or not self._life(head)[0]:
            return
        if head.host != host_name():
            self._directory.ask_to_stop(head.node_id)
            return
        process = procfs.find(head.pid)
        if process is None:
            return
        procfs.send([process], signal.SIGTERM)
        if not procfs.wait_until(lambda: not procfs.alive(process), _END_S):
            procfs.end([*procfs.descendants(process.pid), process], 1.0)
        self._reap()

    def still_there(self, node_ids: Iterable[str]) -> str:
        head = self._head()
        return head.node_id if head is not None and head.node_id in set(node_ids) and self._life(head)[0] else ""

    def how_ended(self, node_id: str) -> str:
        head = self._head()
        if head is None or head.node_id != node_id:
            return "nothing is known of it any more"
        alive, reason = self._life(head)
        return "it still runs" if alive else reason

    def _head(self) -> LoginHead | None:
        """Return the record; the one of the last question, or what else tells, when it is lost."""
        self._last = self._directory.login_head() or self._last
        if self._last is None and not self._searched:
            self._last = self._find_again()
            self._searched = True
        return self._last

    def _find_again(self) -> LoginHead | None:
        """Return the head whose record was lost: the process that one of its files names carries its certificate."""
        report = self._directory.head_report()
        named = [report.node_id] if report is not None else []
        found = map(self._running_here, dict.fromkeys([*named, *self._directory.logged_login_heads()]))
        head = next((head for head in found if head is not None), None)
        if head is not None:
            return head
        # Earlier heads have left logs, so these count only where no head has said yet that it is the one.
        for node_id in named or self._directory.logged_login_heads():
            match = _NODE_ID.fullmatch(node_id)
            host = match[1] if match is not None else host_name()
            if host != host_name() and self._life_elsewhere(node_id, host)[0]:
                raise StateError(f"the record of the head on {host} was lost; log in to {host} and try there")
        return None

    def _running_here(self, node_id: str) -> LoginHead | None:
        match = _NODE_ID.fullmatch(node_id)
        if match is None or match[1] != host_name():
            return None
        pid = int(match[2])
        text = _carried_certificate(pid)
        certificate = read_certificate(text)
        this = self._cluster, self._directory.fingerprint, node_id
        if certificate is None or (certificate.cluster, certificate.home, _node_id(certificate, pid)) != this:
            return None
        logger.warning("the record of the head was lost; found it as process %d", pid)
        return self._record(certificate, pid, text)

    def _record(self, certificate: BirthCertificate, pid: int, text: str) -> LoginHead:
        process = procfs.find(pid)
        head = LoginHead(
            node_id=_node_id(certificate, pid),
            host=host_name(),
            boot_id=procfs.boot_id(),
            pid=pid,
            start=process.start if process else "",
            created=time.time(),
            certificate=text,
        )
        self._directory.save_login_head(head)
        return head

    def _life(self, head: LoginHead) -> tuple[bool, str]:
        """Tell whether the head lives, and if not, why that is known."""
        if head.host == host_name():
            if head.boot_id != procfs.boot_id():
                return False, f"{head.host} was rebooted"
            self._reap()
            alive = procfs.alive(procfs.Process(head.pid, 0, "", head.start))
            return alive, "" if alive else self._last_words(head) or f"process {head.pid} is gone"
        return self._life_elsewhere(head.node_id, head.host, head.created)

    def _life_elsewhere(self, node_id: str, host: str, since: float = float("inf")) -> tuple[bool, str]:
        report = self._directory.head_report()
        if report is not None and report.node_id == node_id:
            if report.phase == ENDED:
                return False, report.reason
            port = report.ports.get("gcs")
            if port and report.address and connection_state(report.address, port, _CONNECT_S) == "open":
                return True, ""
        ours = self._directory.report(node_id)
        if ours is not None and ours.phase == ENDED:
            return False, ours.reason
        if report is not None and report.node_id != node_id and report.time > (since if ours is None else ours.time):
            # Heads are started under a lock, and only where none lives.
            return False, f"head {report.node_id} has taken its place"
        raise StateError(
            f"the head runs on {host}, and from {host_name()} nobody can tell whether it lives\n"
            f"  log in to {host} and try there; if that host is gone for good, remove {self._directory.root}"
        )

    def _last_words(self, head: LoginHead) -> str:
        report = self._directory.report(head.node_id)
        return report.reason if report is not None and report.phase == ENDED else ""

    def _reap(self) -> None:
        """Let a head that this process started and that has ended leave the process table."""
        self._children = [child for child in self._children if child.poll() is None]


def host_name() -> str:
    """Return this host's name as it stands in node ids."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname().partition(".")[0]) or "host"


def _node_id(certificate: BirthCertificate, pid: int) -> str:
    return certificate.node_id(f"{PREFIX}{host_name()}-{pid}")


def _carried_certificate(pid: int) -> str:
    """Return the certificate in the environment of a process, "" when there is none."""
    process = procfs.find(pid)
    variables = process.read("environ").decode(errors="replace").split("\0") if process is not None else []
    found = (text for text in variables if text.startswith(f"{CERTIFICATE_VARIABLE}="))
    return next(found, "").partition("=")[2]
