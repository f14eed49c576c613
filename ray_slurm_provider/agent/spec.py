"""What the node agent is told by the batch script.

The release that submitted the job has written it, and the one that is installed when the job starts, days later, reads
it. So fields may be added and dropped at any time: an unknown one is passed over, a missing one has its default. No
field ever gets another type or meaning, and scripts of any age start `ray_slurm_provider.agent`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

logger = logging.getLogger(__name__)

SPEC_VARIABLE = "RAY_SLURM_SPEC"


class AgentSpec(NamedTuple):
    """One Ray node, from the agent's side."""

    cluster: str  # the cluster's name
    home: str  # fingerprint of the cluster's directory, as in the birth certificate
    cluster_dir: str  # the cluster's directory
    login_node: bool = False  # whether this is a head outside SLURM
    head: str = ""  # node id of the head that this worker belongs to; "" for a head
    gcs_address: str = ""  # where that head listens; "" for a head
    resources: Mapping[str, int] = MappingProxyType({})  # the Ray resources that the autoscaler counts on
    written: Sequence[str] = ()  # names of those that a person wrote into the YAML: these are kept
    labels: Mapping[str, str] = MappingProxyType({})  # Ray labels
    ray_start_args: Sequence[str] = ()  # further arguments for ``ray start``
    epilogue: Sequence[str] = ()  # shell lines to run when everything has ended
    interface: str = ""  # network interface to use; "" for the usual one
    temp_dir: str = ""  # where Ray's temporary directory is made
    token_auth: bool = True  # whether Ray asks for the cluster's token
    tls: bool = False  # whether Ray encrypts its connections
    metrics: bool = False  # whether Ray's metrics can be read, by everybody
    service_ports: str = ""  # range for the ports of Ray's services; "" for any
    worker_ports: str = ""  # range for the ports of Ray's worker processes; "" for any
    update_interval_s: int = 2  # period of the autoscaler, seconds
    withdraw_after_s: int = 300  # when a queued job that nobody needs is cancelled, seconds
    drain_s: int = 60  # time to move work away before the time limit, seconds
    slurm_bin: str = ""  # directory of the SLURM tools; "" for PATH
    clusters: str = ""  # SLURM's name of the cluster, where the tools speak to several; "" for their own
    command_timeout_s: int = 60  # how long a SLURM tool may take, seconds

    @property
    def is_head(self) -> bool:
        return not self.head

    @property
    def directory(self) -> Path:
        return Path(self.cluster_dir)

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "resources": dict(self.resources), "labels": dict(self.labels)}


def take_spec(environ: MutableMapping[str, str]) -> AgentSpec:
    """Return the spec and take it out of the environment, for what is started from here has no use for it."""
    # Scripts that were submitted before there was the variable give it as an argument.
    spec = read_spec(environ.pop(SPEC_VARIABLE, "") or sys.argv[1])
    # The same path, in the bytes that the script has: the locale need not be that of the process that wrote it.
    return spec._replace(cluster_dir=environ.get("RAY_SLURM_DIR", spec.cluster_dir))


def read_spec(text: str) -> AgentSpec:
    value: dict[str, Any] = json.loads(text)
    if unknown := sorted(set(value) - set(AgentSpec._fields)):
        logger.warning("the job was submitted by another release of ray-slurm-provider; passed over: %s", unknown)
    known = {name: item for name, item in value.items() if name not in unknown}
    arguments: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in known.items()}
    return AgentSpec(**arguments)
