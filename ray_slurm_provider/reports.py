"""What a node says of itself: small JSON files in the cluster directory. Standard library only.

The job writes them, everybody else reads them. They tell addresses and reasons; whether a node exists is
SLURM's to say.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ray_slurm_provider.files import read_json_object, read_text, write_json

STARTING = "starting"
READY = "ready"
ENDED = "ended"
# What Ray's autoscaler reads, in the cluster directory and on the head.
BOOTSTRAP_CONFIG = "ray_bootstrap_config.yaml"


class NodeReport(NamedTuple):
    """The state of one Ray node as its own job sees it."""

    node_id: str  # whose report this is
    phase: str  # `STARTING`, `READY` or `ENDED`
    host: str = ""  # host name
    slurm_node: str = ""  # name of the SLURM node
    address: str = ""  # the address that Ray uses; "" when not chosen yet
    # Ray's ports by name; a head has ``gcs``, ``client`` and ``dashboard``
    ports: Mapping[str, int] = MappingProxyType({})
    temp_dir: str = ""  # Ray's temporary directory on that host
    reason: str = ""  # why it ended; "" while it lives
    ready_at: float = 0.0  # when Ray was up, seconds since the epoch; 0 when it never was
    time: float = 0.0  # when this was written, seconds since the epoch

    @property
    def gcs_address(self) -> str:
        """Return what RAY_ADDRESS holds, "" when this is no head."""
        return self._at("gcs")

    @property
    def client_address(self) -> str:
        address = self._at("client")
        return f"ray://{address}" if address else ""

    def _at(self, port: str) -> str:
        number = self.ports.get(port)
        return f"{bracketed(self.address)}:{number}" if self.address and number else ""


class ReportPaths(NamedTuple):
    """Where the reports of a cluster are."""

    root: Path  # the cluster directory

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"

    @property
    def needed(self) -> tuple[Path, ...]:
        """What a node cannot start without."""
        return self.nodes, self.root / "logs", self.root / "auth_token"

    def report(self, node_id: str) -> Path:
        return self.nodes / f"{node_id}.json"

    def reason(self, node_id: str) -> Path:
        """Why a node did not come up, as plain text: the batch script can write that."""
        return self.nodes / f"{node_id}.reason"

    def go(self, token: str) -> Path:
        """The sign for the head's job that everything it needs is in place."""
        return self.nodes / f"{token}.go"

    def stop(self, node_id: str) -> Path:
        """The sign for a head to end, and the cluster with it."""
        return self.nodes / f"{node_id}.stop"

    def restart(self, node_id: str) -> Path:
        """The sign for a head to restart Ray."""
        return self.nodes / f"{node_id}.restart"

    @property
    def head(self) -> Path:
        return self.root / "head.json"

    def environment(self, node_id: str) -> Path:
        """Shell exports with which a command runs as if the node's job had started it."""
        return self.nodes / f"{node_id}.env"


def write_report(paths: ReportPaths, report: NodeReport, *, head: bool) -> None:
    """Write a node's report; a cluster directory that is gone stays gone."""
    with contextlib.suppress(FileNotFoundError):
        value = {**report._asdict(), "ports": dict(report.ports)}
        write_json(paths.report(report.node_id), value)
        if head:
            write_json(paths.head, value)


def read_report(path: Path) -> NodeReport | None:
    value = read_json_object(path)
    return None if value is None else _from_json(value)


def read_reason(path: Path) -> str:
    try:
        return read_text(path, errors="replace").strip()
    except OSError:
        return ""


def bracketed(address: str) -> str:
    """Return an address as it stands before a port."""
    return f"[{address}]" if ":" in address else address


def _from_json(value: dict[str, Any]) -> NodeReport | None:
    try:
        return NodeReport(
            node_id=str(value["node_id"]),
            phase=str(value["phase"]),
            host=str(value.get("host", "")),
            slurm_node=str(value.get("slurm_node", "")),
            address=str(value.get("address", "")),
            ports={str(name): int(port) for name, port in dict(value.get("ports") or {}).items()},
            temp_dir=str(value.get("temp_dir", "")),
            reason=str(value.get("reason", "")),
            ready_at=float(value.get("ready_at", 0)),
            time=float(value.get("time", 0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
