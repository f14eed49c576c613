"""Starts, examines and ends a sandbox."""

import getpass
import logging
import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.temp_dirs import remove_temp_dirs
from ray_slurm_provider.errors import SandboxError, SlurmError
from ray_slurm_provider.files import read_json_object, write_json
from ray_slurm_provider.sandbox import daemons
from ray_slurm_provider.sandbox.layout import (
    MAX_STATE_DIR_LENGTH,
    SandboxPaths,
    SandboxSpec,
    VirtualNode,
    read_layout,
    render_cgroup_conf,
    render_gres_conf,
    render_slurm_conf,
    virtual_nodes,
)
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools, clean_environment

logger = logging.getLogger(__name__)

_TOOLS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
_PACKAGES = "slurmctld slurmd slurm-client munge"
_STARTUP_TIMEOUT_S = 20.0
# A little more than the KillWait of its configuration.
_JOBS_END_TIMEOUT_S = 8.0
_DAEMON_GRACE_S = 3.0
_CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers")  # there where v2 is the only one
# Below the usual ephemeral range (/proc/sys/net/ipv4/ip_local_port_range starts at 32768).
_PORT_RANGE = (20000, 30000)
# Without root all jobs run as whoever started the sandbox, those of other users too (srun, tried with 22.05). So no
# other user may reach munge, and with it SLURM; munged wants its socket open to everybody, and is told otherwise.
_ROOTLESS = os.getuid() != 0


@dataclass(frozen=True)
class SandboxStatus:
    """What of a sandbox is alive."""

    controller: bool  # whether slurmctld answers
    munged: bool
    nodes: dict[str, str]  # states as sinfo prints them

    @property
    def healthy(self) -> bool:
        usable = {"idle", "mixed", "allocated", "completing", "planned", "reserved", "maint"}
        # sinfo(1), NODE STATE CODES: "-" planned for another job, "+" jobs are completing, "$" in maintenance.
        return self.controller and self.munged and all(state.rstrip("-+$") in usable for state in self.nodes.values())


class Sandbox:
    """A real SLURM below one directory, `default_state_dir` when none is given.

    The fault tests make another kind of it, whose nodes are machines: by overriding `prefix` and `virtual_nodes`.
    """

    def __init__(self, state_dir: Path | None = None) -> None:
        self.paths = SandboxPaths(Path(os.path.abspath(state_dir or default_state_dir())))  # noqa: PTH100 keeps links

    @property
    def exists(self) -> bool:
        return self.paths.record.exists()

    def environment(self) -> dict[str, str]:
        self._require()
        return {"SLURM_CONF": str(self.paths.slurm_conf)}

    def up(self, spec: SandboxSpec) -> None:
        """Start it, and return when every node is idle."""
        _check_tools()
        self._make_root()
        try:
            self._start(spec)
        except BaseException as error:
            said = self._last_errors()
            kept = self._keep_logs()
            self._remove()
            if isinstance(error, (SandboxError, SlurmError, OSError)):
                raise SandboxError(f"the sandbox did not start: {error}{said}\n  logs: {kept}") from error
            raise

    def down(self) -> None:
        """End every process and remove every file of it; nothing to do is no error."""
        self._require_private()
        if self.paths.root.exists() and not self.exists and any(self.paths.root.iterdir()):
            raise SandboxError(f"{self.paths.root} is not a sandbox; it is left alone")
        self._remove()

    def status(self) -> SandboxStatus:
        nodes = self.nodes()
        munged = self._runs("munged")
        # Without munge the question alone takes 20 s.
        answers = munged and self._client().answers()
        served = daemons.served_nodes(self.paths)
        states = self._node_states() if answers else {}
        # The controller notices a dead slurmd only after a while.
        found = {name: states.get(name, "unknown") if name in served else "slurmd is dead" for name in nodes}
        return SandboxStatus(answers, munged, found)

    def nodes(self) -> dict[str, VirtualNode]:
        record = self._require()
        return {node.name: node for node in self.virtual_nodes(read_layout(record["spec"]), record["port"])}

    def virtual_nodes(self, spec: SandboxSpec, base_port: int) -> list[VirtualNode]:
        return virtual_nodes(spec, _host(), base_port)

    def prefix(self, node: str = "") -> list[str]:  # noqa: ARG002 every node is this host
        """Return the words that run a command where a node is, or where slurmctld and people's commands are."""
        return []

    def start_munged(self) -> None:
        """Start munged; its key is made once."""
        directory = self.paths.root / "munge"
        key = directory / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(1024))
        self._daemon(
            "munged",
            f"--socket={self.paths.munge_socket}",
            f"--key-file={key}",
            f"--pid-file={directory / 'pid'}",
            f"--seed-file={directory / 'seed'}",
            f"--log-file={self.paths.logs / 'munged.log'}",
            "--num-threads=4",
            "--group-update-time=-1",
            *(["--force"] if _ROOTLESS else []),
        )

    def start_controller(self, option: str = "-i") -> None:
        """Start slurmctld, and return when it answers."""
        self._daemon("slurmctld", option, prefix=self.prefix())
        # slurmctld goes to the background before it can still fail: ask it.
        if not procfs.wait_until(self._client().answers, _STARTUP_TIMEOUT_S):
            raise SandboxError(f"slurmctld {'does not answer' if self._runs('slurmctld') else 'ended at once'}")

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-N", name, prefix=self.prefix(name))

    def _require_private(self) -> None:
        """Refuse a directory in which another user may have put files, for they tell what is run."""
        root = self.paths.root
        # A munged that is told to look away takes any directory above, too; in a sticky one nobody can rename ours.
        for path in (root, *(root.parents if _ROOTLESS else ())):
            try:
                owners, mode = {path.lstat().st_uid, path.stat().st_uid}, path.stat().st_mode
            except FileNotFoundError:
                continue
            except OSError as error:
                raise SandboxError(f"{path}: {error.strerror}; choose another --state-dir") from error
            if not owners <= {0, os.getuid()} or (mode & 0o022 and (path == root or not mode & stat.S_ISVTX)):
                raise SandboxError(
                    f"{path} must be yours, and writable by nobody else; remove it or choose another --state-dir"
                )

    def _require(self) -> dict[str, Any]:
        self._require_private()
        record = read_json_object(self.paths.record)
        if record is None:
            raise SandboxError(f"there is no sandbox in {self.paths.root}; start one: ray-slurm sandbox up")
        return record

    def _make_root(self) -> None:
        root = self.paths.root
        if len(str(root)) > MAX_STATE_DIR_LENGTH:
            raise SandboxError(
                f"{root} is too long: at most {MAX_STATE_DIR_LENGTH} characters (Unix sockets lie below it)"
            )
        if any(character.isspace() or character in "#,\\\"'" for character in str(root)):
            raise SandboxError(f"{root!s}: slurm.conf cannot hold such a path; use one without blanks and quotes")
        self._require_private()
        if self.exists:
            if daemons.processes_of(self.paths):
                raise SandboxError(
                    f"a sandbox is up in {root}; end it first: ray-slurm sandbox down --state-dir {root}"
                )
            self._remove()
        try:
            root.mkdir(parents=True, mode=0o755)
        except FileExistsError:
            if not root.is_dir() or any(root.iterdir()):
                raise SandboxError(f"{root} exists and is not a sandbox; choose another --state-dir") from None
            self._require_private()
        except OSError as error:
            raise SandboxError(f"{root} cannot be made: {error.strerror}") from error

    def _start(self, spec: SandboxSpec) -> None:
        base_port = _free_port_block(spec.node_count + 1)
        write_json(self.paths.record, {"spec": spec.model_dump(), "port": base_port})
        self._write_files(spec, base_port)
        self.start_munged()
        self.start_controller()
        nodes = self.nodes()
        for name in nodes:
            (self.paths.root / "spool" / name).mkdir()
            self.start_node(name)
        if not procfs.wait_until(
            lambda: self._node_states() == dict.fromkeys(nodes, "idle"), _STARTUP_TIMEOUT_S, poll_s=0.1
        ):
            raise SandboxError(f"not every node came up: {self._node_states()}")

    def _write_files(self, spec: SandboxSpec, base_port: int) -> None:
        root = self.paths.root
        # munged refuses directories that others may write to.
        root.chmod(0o755)
        for name in ("munge", "log", "run", "ctld", "spool", "dev"):
            (root / name).mkdir(mode=0o700 if name == "ctld" or (name == "munge" and _ROOTLESS) else 0o755)
        for index in range(max(group.gpus for group in spec.nodes)):
            (root / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        nodes = self.virtual_nodes(spec, base_port)
        self.paths.slurm_conf.write_text(
            render_slurm_conf(spec, self.paths, nodes, _host(), getpass.getuser(), base_port)
        )
        (root / "gres.conf").write_text(render_gres_conf(spec, self.paths))
        if _CGROUP_V2.exists():
            # Here, for there are no machines yet (`prefix`).
            tools = SlurmTools(timeout_s=20.0, environ=self._daemon_environment())
            (root / "cgroup.conf").write_text(render_cgroup_conf(tools.run(["sinfo", "--version"]).stdout))
        if spec.job_submit:
            # SLURM looks for it beside slurm.conf.
            (root / "job_submit.lua").write_text(spec.job_submit)

    def _runs(self, daemon: str) -> bool:
        return bool(daemons.daemons_of(self.paths)[daemon])

    def _daemon(self, name: str, *arguments: str, prefix: list[str] | None = None) -> None:
        with (self.paths.logs / "start.log").open("ab") as log:
            done = subprocess.run(
                [*(prefix or []), shutil.which(name, path=_search_path()) or name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.paths.root,
                env=self._daemon_environment(),
                timeout=_STARTUP_TIMEOUT_S,
                check=False,
            )
        if done.returncode != 0:
            raise SandboxError(f"{name} ended with exit code {done.returncode}")

    def _daemon_environment(self) -> dict[str, str]:
        return {**clean_environment(os.environ), "SLURM_CONF": str(self.paths.slurm_conf), "PATH": _search_path()}

    def _client(self) -> SlurmClient:
        return SlurmClient(SlurmTools(timeout_s=20.0, environ=self._daemon_environment(), prefix=self.prefix()))

    def _ask(self, *words: str) -> str:
        return self._client().tools.run(list(words)).stdout

    def _jobs(self) -> list[str]:
        return self._ask("squeue", "--noheader", "--format", "%i").split()

    def _node_states(self) -> dict[str, str]:
        try:
            lines = self._ask("sinfo", "--noheader", "--Node", "--format", "%N %T").split("\n")
        except SlurmError:
            return {}
        return dict(line.split()[:2] for line in lines if len(line.split()) >= 2)

    def _last_errors(self) -> str:
        """The last complaints of the daemons, for a start that failed."""
        lines = [
            f"\n    {file.name}: {line.strip()}"
            for file in sorted(self.paths.logs.glob("*.log"))
            for line in file.read_text(errors="replace").splitlines()
            if any(word in line.lower() for word in ("error", "fatal")) and "pmi" not in line.lower()
        ]
        return "".join(lines[-5:])

    def _keep_logs(self) -> Path:
        """Move the logs beside the directory that is about to be removed."""
        # A name that nobody can have taken.
        kept = Path(tempfile.mkdtemp(prefix=f"{self.paths.root.name}.failed-logs-", dir=self.paths.root.parent))
        if self.paths.logs.is_dir():
            shutil.copytree(self.paths.logs, kept, dirs_exist_ok=True)
        return kept

    def _remove(self) -> None:
        self._end_processes()
        remove_temp_dirs(slurm_conf=str(self.paths.slurm_conf))
        shutil.rmtree(self.paths.root, ignore_errors=True)

    def _end_processes(self) -> None:
        self._end_jobs()
        for daemon in ("slurmd", "slurmctld"):
            procfs.end([p for p in daemons.processes_of(self.paths) if p.name == daemon], _DAEMON_GRACE_S)
        # What outlived its job, the slurmstepds among it, and last of all munged.
        procfs.end([p for p in daemons.processes_of(self.paths) if p.name != "munged"], _DAEMON_GRACE_S)
        procfs.end(daemons.processes_of(self.paths), _DAEMON_GRACE_S)

    def _end_jobs(self) -> None:
        if not (self.paths.slurm_conf.exists() and self._runs("slurmctld") and self._runs("munged")):
            return
        try:
            jobs = self._jobs()
            if jobs:
                self._ask("scancel", "--quiet", *jobs)
                if "slurmd is dead" not in self.status().nodes.values():
                    procfs.wait_until(lambda: not self._jobs(), _JOBS_END_TIMEOUT_S, poll_s=0.1)
        except SlurmError as error:
            logger.warning("the sandbox's jobs could not be cancelled, their processes are ended one by one: %s", error)


def default_state_dir() -> Path:
    return Path(f"/tmp/ray-slurm-sandbox-{os.getuid()}")  # noqa: S108 short for the sockets, private by its owner


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _check_tools() -> None:
    missing = [name for name in _TOOLS if shutil.which(name, path=_search_path()) is None]
    if missing:
        raise SandboxError(f"{', '.join(missing)} not found: apt-get install {_PACKAGES}")


def _search_path() -> str:
    # The daemons live where an ordinary user's PATH does not look.
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _free_port_block(count: int) -> int:
    for _ in range(200):
        base = random.randrange(_PORT_RANGE[0], _PORT_RANGE[1] - count)  # noqa: S311 no secret
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return base
    raise SandboxError(f"no {count} free ports in a row between {_PORT_RANGE[0]} and {_PORT_RANGE[1]}")
