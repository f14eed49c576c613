"""What a sandbox consists of: its files and its SLURM configuration, as pure functions.

The configuration was tried on SLURM 22.05; slurm.conf(5) and gres.conf(5) say what each line means.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ray_slurm_provider.fields import Count, Line, Memory, Section
from ray_slurm_provider.slurm.parse import parse_mem_mib

# A Unix socket path holds 107 bytes, and slurmstepd adds its own name below the spool directory.
MAX_STATE_DIR_LENGTH = 60
REHEARSAL = (
    "machines that can be lost, and faults of slurmctld, are made from a clone of the repository:"
    " python -m tests.faults.rehearsal (docs/reliability.md)"
)

_SLURM_CONF = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the wait before a requeued job starts again, seconds.
AuthInfo=socket={munge_socket},cred_expire=5
# Not NoInAddrAny: slurmd would listen on the host name's address in place of NodeAddr.
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Virtual nodes claim CPUs and memory that the host need not have.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
MinJobAge=300
MaxJobCount=50000
MaxArraySize=20001
KillWait=5
CompleteWait=0
UnkillableStepTimeout=120
InactiveLimit=0
WaitTime=0
MailProg=/bin/true
GresTypes=gpu
PropagateResourceLimits=NONE
"""
_PARTITION_OPTIONS: dict[str, str | int] = {"MaxTime": "7-00:00:00", "DefaultTime": "1:00:00", "State": "UP"}


class NodeGroup(Section):
    """Virtual nodes of one kind, named ``<name>1``, ``<name>2``, ..."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")]
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    cpus: Count = 4  # that each claims, as all that follows
    memory: Memory = "4G"
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_type: Line = "a100"  # for --gres=gpu:<type>:1
    features: list[Line] = []  # for --constraint
    options: dict[str, str | int] = {}  # further keys of its line in slurm.conf: CoreSpecCount, MemSpecLimit, Weight


class Partition(Section):
    """A partition."""

    name: Line
    groups: list[Line]  # names of groups of nodes
    default: bool = False
    options: dict[str, str | int] = {}  # further keys of its line in slurm.conf: MaxTime, AllowAccounts, State


class SandboxSpec(Section):
    """What a sandbox consists of."""

    nodes: Annotated[list[NodeGroup], Field(min_length=1)]
    partitions: Annotated[list[Partition], Field(min_length=1)]
    settings: dict[str, str | int] = {}  # keys of slurm.conf that differ from the sandbox's own; "" leaves one out
    job_submit: str = ""  # a job_submit plugin in Lua: what a site does with jobs that it does not like

    @property
    def node_count(self) -> int:
        return sum(group.count for group in self.nodes)


def usual_spec(
    *,
    nodes: int = 4,
    gpu_nodes: int = 0,
    gpus_per_node: int = 2,
    cpus: int = 4,
    memory: str = "4G",
    gpu_type: str = "a100",
) -> SandboxSpec:
    """Return a sandbox with the partitions ``cpu`` and ``gpu``, of those that have nodes."""
    kinds: list[tuple[str, str, int, dict[str, Any]]] = [
        ("c", "cpu", nodes, {}),
        ("g", "gpu", gpu_nodes, {"gpus": gpus_per_node, "gpu_type": gpu_type}),
    ]
    kinds = [kind for kind in kinds if kind[2]]
    if not kinds:
        raise ValueError("needs at least one node")
    size = {"cpus": cpus, "memory": memory}
    return SandboxSpec.model_validate(
        {
            "nodes": [
                {"name": name, "count": count, "features": [partition], **size, **gpus}
                for name, partition, count, gpus in kinds
            ],
            "partitions": [
                {"name": partition, "groups": [name], "default": name == kinds[0][0]} for name, partition, _, _ in kinds
            ],
        }
    )


def read_layout(value: Any) -> SandboxSpec:
    if isinstance(value, dict) and "isolated" in value:
        raise ValueError(f"isolated: {REHEARSAL}")
    spec = SandboxSpec.model_validate(value)
    groups = {group.name for group in spec.nodes}
    if len(groups) != len(spec.nodes):
        raise ValueError("two groups of nodes have one name")
    for partition in spec.partitions:
        unknown = set(partition.groups) - groups
        if unknown:
            raise ValueError(f"partition {partition.name}: there are no nodes {', '.join(sorted(unknown))}")
    return spec


@dataclass(frozen=True)
class VirtualNode:
    """One slurmd."""

    name: str
    host: str
    address: str
    port: int
    group: NodeGroup


@dataclass(frozen=True)
class SandboxPaths:
    """The files of a sandbox, all below one directory."""

    root: Path

    @property
    def slurm_conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def record(self) -> Path:
        """What was started, as JSON; its presence says that this directory is a sandbox."""
        return self.root / "sandbox.json"

    @property
    def munge_socket(self) -> Path:
        return self.root / "munge" / "s"

    @property
    def logs(self) -> Path:
        return self.root / "log"


def virtual_nodes(spec: SandboxSpec, host: str, base_port: int) -> list[VirtualNode]:
    """Return the nodes, group by group, addresses from 127.0.1.1 up, ports after the controller's."""
    members = [(f"{group.name}{number}", group) for group in spec.nodes for number in range(1, group.count + 1)]
    return [
        VirtualNode(name, host, f"127.0.{1 + index // 254}.{1 + index % 254}", base_port + 1 + index, group)
        for index, (name, group) in enumerate(members)
    ]


def render_slurm_conf(
    spec: SandboxSpec, paths: SandboxPaths, nodes: list[VirtualNode], host: str, user: str, base_port: int
) -> str:
    """Return the text of slurm.conf; ``host`` is the controller's."""
    text = _SLURM_CONF.format(host=host, user=user, port=base_port, root=paths.root, munge_socket=paths.munge_socket)
    settings = {**spec.settings, **({"JobSubmitPlugins": "lua"} if spec.job_submit else {})}
    lines = [
        *(line for line in text.splitlines() if line.partition("=")[0] not in settings),
        *(f"{name}={value}" for name, value in settings.items() if value != ""),
        *map(_node_line, nodes),
        *(_partition_line(spec, partition) for partition in spec.partitions),
    ]
    return "\n".join(lines) + "\n"


def _node_line(node: VirtualNode) -> str:
    group = node.group
    return (
        f"NodeName={node.name} NodeHostname={node.host} NodeAddr={node.address} Port={node.port}"
        f" CPUs={group.cpus} RealMemory={parse_mem_mib(group.memory)} Feature={','.join([*group.features, node.name])}"
        + (f" Gres=gpu:{group.gpu_type}:{group.gpus}" if group.gpus else "")
        + f"{_pairs(group.options)} State=UNKNOWN"
    )


def _partition_line(spec: SandboxSpec, partition: Partition) -> str:
    counts = {group.name: group.count for group in spec.nodes}
    return (
        f"PartitionName={partition.name} Nodes={','.join(f'{name}[1-{counts[name]}]' for name in partition.groups)}"
        f" Default={'YES' if partition.default else 'NO'}{_pairs({**_PARTITION_OPTIONS, **partition.options})}"
    )


def render_gres_conf(spec: SandboxSpec, paths: SandboxPaths) -> str:
    """Return the text of gres.conf.

    A GPU's file must be a device; links to /dev/null are enough. Without ``nvidia_gpu_env`` jobs would
    get the variables of every other maker as well (gres.conf(5), Flags).
    """
    return "".join(
        f"NodeName={group.name}[1-{group.count}] Name=gpu Type={group.gpu_type} Flags=nvidia_gpu_env"
        f" File={paths.root}/dev/nvidia[0-{group.gpus - 1}]\n"
        for group in spec.nodes
        if group.gpus
    )


def render_cgroup_conf(version: str) -> str:
    """Return the text of cgroup.conf for a host with cgroup v2 alone, by what ``sinfo --version`` says.

    With its plugin for v2 slurmd does not start there without systemd. Releases up to 20.11 have no plugins.
    """
    found = re.search(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found is not None else (0, 0)
    if release >= (24, 11):
        return "CgroupPlugin=disabled\n"
    return "CgroupPlugin=cgroup/v1\n" if release >= (21, 8) else ""


def _pairs(options: Mapping[str, str | int]) -> str:
    return "".join(f" {name}={value}" for name, value in options.items())
