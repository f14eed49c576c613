"""The cluster's own directory on the shared file system: ``<state_dir>/<cluster_name>/``, 0700.

::

    state.json                  the diary: tags that changed since birth, and launches that failed
    state.json.broken-<time>    one that could not be read
    state.lock, head.lock       held while the diary changes, and while a head is submitted
    login_head.json             which process the head on the login node is
    head.json                   report of the head: address and ports
    slurm.json                  which SLURM has the cluster's jobs: its name, its controllers, the head before
    nodes/<node id>.json        reports;  <node id>.reason  why one did not come up
    nodes/<node id>.env         its environment, for commands that run there
    nodes/<node id>.stop        asks the head to end;  <node id>.restart  to restart Ray; it removes them
    nodes/<token>.sh            script of a head on the login node
    ray_bootstrap_config.yaml   what Ray's autoscaler reads
    auth_token                  Ray's token, 0600
    tls/                        the cluster's authority and the login nodes' certificates, 0700
    submit_env.json             the environment of `ray up`, for the workers' jobs, 0600
    stopping                    there while `ray down` runs
    births/<token>.birth        birth certificates, where the site owns the comment of jobs
    logs/<node id>.log          output of each job

What exists is SLURM's to say: this directory may be lost, and the nodes are still found.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider.agent.network import connection_state
from ray_slurm_provider.backoff import Backoff, read_backoff
from ray_slurm_provider.errors import StateError, SubmitRejected
from ray_slurm_provider.files import is_gone, open_file, read_json_object, read_text, write_atomically, write_json
from ray_slurm_provider.locks import locked
from ray_slurm_provider.reports import BOOTSTRAP_CONFIG, ENDED, NodeReport, ReportPaths, read_reason, read_report
from ray_slurm_provider.slurm.types import SlurmIdentity

logger = logging.getLogger(__name__)

# 1 had no launches.
_DIARY_VERSION = 2
_LOCK_TIMEOUT_S = 30.0
# Longer than sbatch and the search after it may take.
_HEAD_LOCK_TIMEOUT_S = 180.0
# Longer than a `ray down` takes from one step to the next.
_STOPPING_S = 300.0
_CONNECT_S = 2.0


@dataclass
class Diary:
    """What changed since birth."""

    tags: dict[str, dict[str, str]] = field(default_factory=dict)  # tag changes by node id
    launches: Backoff = field(default_factory=Backoff)  # launches that failed


@dataclass(frozen=True)
class LoginHead:
    """A head on the login node."""

    node_id: str  # its node id
    host: str  # the login node
    boot_id: str  # that host's boot; after another boot no process of it is left
    pid: int  # its process id
    start: str  # the start time of that process, as /proc shows it: process ids come back
    created: float  # when it was started, seconds since the epoch
    certificate: str  # its birth certificate


class ClusterDir:
    """The one place that reads and writes the cluster directory."""

    def __init__(self, state_dir: Path, cluster_name: str) -> None:
        self.root = state_dir / cluster_name
        self.reports = ReportPaths(self.root)
        self._last_diary = Diary()

    @property
    def fingerprint(self) -> str:
        """Return what tells this directory from others, for the birth certificates."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:10]

    @property
    def bootstrap_config(self) -> Path:
        return self.root / BOOTSTRAP_CONFIG

    @property
    def births(self) -> Path:
        return self.root / "births"

    @property
    def token_file(self) -> Path:
        return self.root / "auth_token"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def _diary(self) -> Path:
        return self.root / "state.json"

    @property
    def _login_head(self) -> Path:
        return self.root / "login_head.json"

    @property
    def exists(self) -> bool:
        return not is_gone(self.root)

    @property
    def missing(self) -> str:
        """What a node cannot start without and is positively gone, "" when all of it is there or nobody can tell."""
        return next((str(path) for path in self.reports.needed if is_gone(path)), "")

    def prepare(self) -> None:
        """Make the directory with everything that a head needs in it; nothing that is there is changed.

        Raises:
            StateError: It cannot be made, or belongs to somebody else.
        """
        try:
            self.root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
            if self.root.stat().st_uid != os.getuid():
                raise StateError(f"{self.root} belongs to another user; choose another provider.slurm.state_dir")
            self.root.chmod(0o700)
            for name in ("nodes", "logs"):
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateError(f"{self.root} cannot be used: {error.strerror or error}") from error

    @contextmanager
    def claimed_by(self, slurm: SlurmIdentity) -> Iterator[None]:
        """Note which SLURM has the jobs of a head that is submitted now; one that is refused changes nothing."""
        path, report = self.root / "slurm.json", self.head_report()
        before = read_json_object(path)
        write_json(path, {**slurm._asdict(), "after": report.node_id if report is not None else ""})
        try:
            yield
        except SubmitRejected:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                write_json(path, before)
            raise

    @property
    def head_has_ended(self) -> bool:
        """Whether the head says that it ended; what one before it has said does not count."""
        report, noted = self.head_report(), read_json_object(self.root / "slurm.json") or {}
        return report is not None and report.phase == ENDED and report.node_id != noted.get("after")

    @property
    def sign_of_life(self) -> str:
        """What speaks for a head that SLURM does not know, "" when nothing does; without a note of its SLURM, doubt."""
        if is_gone(self.reports.head):
            return ""
        report = self.head_report() or NodeReport("", "")
        if report.phase == ENDED:
            return ""
        at = report.gcs_address
        state = connection_state(report.address, report.ports["gcs"], _CONNECT_S) if at else "unknown"
        if state == "unknown" and self.slurm() is None:
            return f"may live on {report.host or 'some host'}: it has not said that it ended"
        return f"answers at {at}" if state == "open" else ""

    def slurm(self) -> SlurmIdentity | None:
        """Return which SLURM has the cluster's jobs, None when nobody has noted it.

        Raises:
            StateError: The note cannot be read now.
        """
        path = self.root / "slurm.json"
        if is_gone(path):
            return None
        value = read_json_object(path) or {}
        name, controllers = value.get("name"), value.get("controllers")
        if not isinstance(name, str) or not isinstance(controllers, list):
            raise StateError(f"{path} cannot be read: it is not known which SLURM has the cluster's jobs")
        return SlurmIdentity(name, tuple(map(str, controllers)))

    def renew_token(self) -> None:
        """Make the token of a new head: whoever got that of an earlier one, by its ports, has no use for it."""
        try:
            write_atomically(self.token_file, secrets.token_hex(32))
        except OSError as error:
            raise StateError(f"{self.token_file} cannot be written: {error.strerror or error}") from error

    def diary(self) -> Diary:
        """Return what changed since birth: what was last known when the file is lost, broken, or cannot be read now.

        Raises:
            StateError: A newer version of this package has written it.
        """
        try:
            self._last_diary = self._read_diary()
        except OSError as error:
            logger.warning("%s cannot be read now: %s", self._diary, error)
        return deepcopy(self._last_diary)

    def _read_diary(self) -> Diary:
        """Read the diary; a broken one is put aside, one that the file system does not let us read stays (OSError)."""
        try:
            value = json.loads(read_text(self._diary))
        except FileNotFoundError:
            return deepcopy(self._last_diary)
        except (IsADirectoryError, ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._put_aside()
            return deepcopy(self._last_diary)
        version = value.get("version")
        if isinstance(version, int) and version > _DIARY_VERSION:
            raise StateError(
                f"{self._diary} was written by a newer ray-slurm-provider (format {version}, this one knows"
                f" {_DIARY_VERSION})\n  use that version; or, when the cluster is down, remove {self.root}"
            )
        return Diary(_read_tags(value.get("tags")), read_backoff(value.get("launches")))

    def _put_aside(self) -> None:
        """Keep a broken diary under another name: writing is atomic, so it will not become whole by itself."""
        aside = self._diary.with_name(f"state.json.broken-{time.time():.0f}")
        logger.warning("%s cannot be read; it is kept as %s, going on with what is known", self._diary, aside.name)
        with suppress(OSError):
            self._diary.rename(aside)

    @contextmanager
    def change_diary(self, wait_s: float = _LOCK_TIMEOUT_S) -> Iterator[Diary]:
        """Change the diary under its lock; no SLURM command may run meanwhile.

        Raises:
            StateError: Somebody else holds the lock for too long, or the diary can be neither read nor written now.
        """
        with locked(self.root / "state.lock", wait_s):
            try:
                diary = self._read_diary()
            except OSError as error:
                raise StateError(f"{self._diary} cannot be read: {error.strerror or error}") from error
            yield diary
            value = {"version": _DIARY_VERSION, "tags": diary.tags, "launches": diary.launches.as_json()}
            try:
                write_json(self._diary, value)
            except OSError as error:
                raise StateError(f"{self._diary} cannot be written: {error.strerror or error}") from error
            self._last_diary = deepcopy(diary)

    def head_lock(self) -> AbstractContextManager[None]:
        """Keep another `ray up` from submitting a head meanwhile."""
        return locked(self.root / "head.lock", _HEAD_LOCK_TIMEOUT_S)

    def report(self, node_id: str) -> NodeReport | None:
        return read_report(self.reports.report(node_id))

    def head_report(self) -> NodeReport | None:
        return read_report(self.reports.head)

    def login_head(self) -> LoginHead | None:
        value = read_json_object(self._login_head)
        if value is None:
            return None
        try:
            # Another release may have written more.
            known = {name: value[name] for name in LoginHead.__dataclass_fields__}
            return LoginHead(**{**known, "pid": int(value["pid"])})
        except (TypeError, ValueError, KeyError):
            logger.warning("%s cannot be read", self._login_head)
            return None

    def logged_login_heads(self) -> list[str]:
        """Return the node ids of the heads on login nodes that have a log; none while that cannot be read."""
        with suppress(OSError):
            return sorted(path.stem for path in (self.root / "logs").glob("login-*.log"))
        return []

    def save_login_head(self, head: LoginHead) -> None:
        write_json(self._login_head, asdict(head))

    def write_script(self, token: str, text: str) -> Path:
        path = self.reports.nodes / f"{token}.sh"
        write_atomically(path, text)
        return path

    def ask_to_stop(self, node_id: str) -> None:
        """Ask a head on another login node to end; it looks for this sign every second."""
        if self.exists:
            self.reports.stop(node_id).touch(mode=0o600)

    def reason(self, node_id: str) -> str:
        return read_reason(self.reports.reason(node_id))

    def head_node_config(self) -> dict[str, Any] | None:
        """Return the node configuration that the head was started with, None when nothing is known of it."""
        config = self._autoscaler_config()
        found = config.get("available_node_types", {}).get(config.get("head_node_type"), {}).get("node_config")
        return found if isinstance(found, dict) else None

    def max_workers(self) -> int | None:
        found = self._autoscaler_config().get("max_workers")
        return found if isinstance(found, int) else None

    def _autoscaler_config(self) -> dict[str, Any]:
        try:
            config = yaml.safe_load(read_text(self.bootstrap_config))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return config if isinstance(config, dict) else {}

    def write_bootstrap_config(self, source: Path) -> None:
        write_atomically(self.bootstrap_config, source.read_text(encoding="utf-8"))

    def let_head_start(self, token: str, *, usage_stats: bool) -> None:
        write_json(self.reports.go(token), {"usage_stats": usage_stats, "max_workers": self.max_workers()})

    def save_environment(self, environ: Mapping[str, str]) -> None:
        write_atomically(self.root / "submit_env.json", json.dumps(dict(environ), sort_keys=True))

    def environment(self) -> dict[str, str] | None:
        """Return the environment of `ray up`, None when it was not saved.

        Raises:
            StateError: It cannot be read now.
        """
        path = self.root / "submit_env.json"
        value = read_json_object(path)
        if value is None and not is_gone(path):
            raise StateError(f"{path} cannot be read: it is the environment that the jobs start with")
        return None if value is None else {str(name): str(text) for name, text in value.items()}

    @property
    def stopping(self) -> bool:
        """Whether a `ray down` goes on, so that nothing may be submitted; one that was killed is over after a while."""
        try:
            return abs(time.time() - (self.root / "stopping").stat().st_mtime) < _STOPPING_S
        except OSError:
            return False

    def set_stopping(self, stopping: bool) -> None:
        if stopping and self.exists:
            with suppress(OSError):  # a full disk keeps nobody from ending a cluster
                (self.root / "stopping").touch(mode=0o600)
        if not stopping:
            with suppress(OSError):
                (self.root / "stopping").unlink()

    def remove(self) -> None:
        """Remove everything; and the directory of all clusters when nothing is left in it."""
        try:
            while self.exists:
                # Another `ray down` may be at it, too.
                with suppress(FileNotFoundError):
                    shutil.rmtree(self.root)
        except OSError as error:
            raise StateError(f"{self.root} cannot be removed: {error.strerror or error}") from error


def _read_tags(value: Any) -> dict[str, dict[str, str]]:
    given = value if isinstance(value, dict) else {}
    return {
        str(node): {str(name): str(tag) for name, tag in changed.items()}
        for node, changed in given.items()
        if isinstance(changed, dict)
    }


def log_tail(path: Path, lines: int = 15) -> list[str]:
    """Return the last lines of a log, none when there is no log."""
    try:
        with open_file(path) as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]
