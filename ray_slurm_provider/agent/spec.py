"""What the node agent is told by the batch script."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class AgentSpec(NamedTuple):
    """One Ray node, from the agent's side.

    Attributes:
        cluster: The cluster's name.
        home: Fingerprint of the cluster's directory, as in the birth certificate.
        cluster_dir: The cluster's directory.
        login_node: Whether this is a head outside SLURM.
        head: Node id of the head that this worker belongs to; "" for a head.
        gcs_address: Where that head listens; "" for a head.
        resources: The Ray resources that the autoscaler counts on.
        written: Names of those that a person wrote into the YAML: these are kept.
        labels: Ray labels.
        ray_start_args: Further arguments for ``ray start``.
        epilogue: Shell lines to run when everything has ended.
        interface: Network interface to use; "" for the usual one.
        temp_dir: Where Ray's temporary directory is made.
        token_auth: Whether Ray asks for the cluster's token.
        tls: Whether Ray encrypts its connections.
        metrics: Whether Ray's metrics can be read, by everybody.
        service_ports: Range for the ports of Ray's services; "" for any.
        worker_ports: Range for the ports of Ray's worker processes; "" for any.
        update_interval_s: Period of the autoscaler, seconds.
        withdraw_after_s: When a queued job that nobody needs is cancelled, seconds.
        drain_s: Time to move work away before the time limit, seconds.
        slurm_bin: Directory of the SLURM tools; "" for PATH.
        clusters: SLURM's name of the cluster, where the tools speak to several; "" for their own.
        command_timeout_s: How long a SLURM tool may take, seconds.
    """

    cluster: str
    home: str
    cluster_dir: str
    login_node: bool = False
    head: str = ""
    gcs_address: str = ""
    resources: Mapping[str, int] = MappingProxyType({})
    written: Sequence[str] = ()
    labels: Mapping[str, str] = MappingProxyType({})
    ray_start_args: Sequence[str] = ()
    epilogue: Sequence[str] = ()
    interface: str = ""
    temp_dir: str = ""
    token_auth: bool = True
    tls: bool = False
    metrics: bool = False
    service_ports: str = ""
    worker_ports: str = ""
    update_interval_s: int = 2
    withdraw_after_s: int = 300
    drain_s: int = 60
    slurm_bin: str = ""
    clusters: str = ""
    command_timeout_s: int = 60

    @property
    def is_head(self) -> bool:
        """Whether this node is the head."""
        return not self.head

    @property
    def directory(self) -> Path:
        """The cluster's directory."""
        return Path(self.cluster_dir)

    def as_json(self) -> dict[str, Any]:
        """Return it for the batch script."""
        return {**self._asdict(), "resources": dict(self.resources), "labels": dict(self.labels)}


def read_spec(text: str) -> AgentSpec:
    """Return the spec that the batch script hands over.

    Raises:
        ValueError: It is from another version of this package.
    """
    value = json.loads(text)
    unknown = set(value) - set(AgentSpec._fields)
    if unknown:
        raise ValueError(f"the job was submitted by another version of ray-slurm-provider: {sorted(unknown)}")
    known: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    return AgentSpec(**known)
