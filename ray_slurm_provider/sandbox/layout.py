"""What a sandbox consists of: its files and its SLURM configuration, as pure functions.

The configuration was tried on SLURM 22.05; slurm.conf(5) and gres.conf(5) say what each line means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ray_slurm_provider.fields import Line, Memory, Section
from ray_slurm_provider.sandbox.machines import LOGIN, LOGIN_ADDRESS
from ray_slurm_provider.slurm.parse import parse_mem_mib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# A Unix socket path holds 107 bytes, and slurmstepd adds its own name below the spool directory.
MAX_STATE_DIR_LENGTH = 60

_SETTINGS = """\
ClusterName=sandbox
SlurmctldHost={controller}
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
# Separate machines are really lost, and soon: a node that does not answer is DOWN after about 11 s.
_ISOLATED_SETTINGS: dict[str, str | int] = {
    "CommunicationParameters": "",
    "SlurmdTimeout": 5,
    "MessageTimeout": 3,
    "TCPTimeout": 2,
}
_PARTITION_OPTIONS: dict[str, str | int] = {"MaxTime": "7-00:00:00", "DefaultTime": "1:00:00", "State": "UP"}


class NodeGroup(Section):
    """Virtual nodes of one kind, named ``<name>1``, ``<name>2``, ..."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")]
    """First letters of their names."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many there are."""
    cpus: Annotated[int, Field(ge=1)] = 4
    """CPUs that each claims."""
    memory: Memory = "4G"
    """Memory that each claims."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Fake GPUs of each."""
    gpu_type: Line = "a100"
    """Their type, for ``--gres=gpu:<type>:1``."""
    features: list[Line] = []
    """Features, for ``--constraint``."""
    options: dict[str, str | int] = {}
    """Further keys of its line in slurm.conf: ``CoreSpecCount``, ``MemSpecLimit``, ``Weight``."""

    @property
    def members(self) -> list[str]:
        """The names of its nodes."""
        return [f"{self.name}{number}" for number in range(1, self.count + 1)]

    @property
    def host_list(self) -> str:
        """The names of its nodes as SLURM writes them."""
        return f"{self.name}[1-{self.count}]"


class Partition(Section):
    """A partition."""

    name: Line
    """Its name."""
    groups: list[Line]
    """The groups of nodes in it."""
    default: bool = False
    """Whether jobs go there that name no partition."""
    options: dict[str, str | int] = {}
    """Further keys of its line in slurm.conf: ``MaxTime``, ``DefaultTime``, ``AllowAccounts``, ``State``."""


class SandboxSpec(Section):
    """What a sandbox consists of."""

    nodes: Annotated[list[NodeGroup], Field(min_length=1)]
    """The kinds of nodes."""
    partitions: Annotated[list[Partition], Field(min_length=1)]
    """The partitions."""
    settings: dict[str, str | int] = {}
    """Keys of slurm.conf that differ from the sandbox's own: ``EnforcePartLimits``, ``SelectTypeParameters``."""
    isolated: bool = False
    """Whether each node is a machine of its own: network, host name, ``/dev/shm`` and processes."""
    job_submit: str = ""
    """A job_submit plugin in Lua: what a site does with jobs that it does not like."""

    @property
    def node_count(self) -> int:
        """How many slurmd there are."""
        return sum(group.count for group in self.nodes)

    @property
    def most_gpus(self) -> int:
        """How many fake GPUs the node with most of them has."""
        return max(group.gpus for group in self.nodes)


def usual_spec(
    *,
    nodes: int = 4,
    gpu_nodes: int = 0,
    gpus_per_node: int = 2,
    cpus: int = 4,
    memory: str = "4G",
    gpu_type: str = "a100",
    isolated: bool = False,
) -> SandboxSpec:
    """Return a sandbox with the partitions ``cpu`` and ``gpu``.

    Args:
        nodes: Virtual nodes of the partition ``cpu``.
        gpu_nodes: Virtual nodes of the partition ``gpu``.
        gpus_per_node: Fake GPUs of each of these.
        cpus: CPUs that each virtual node claims.
        memory: Memory that each virtual node claims.
        gpu_type: The type of the fake GPUs.
        isolated: Whether each node is a machine of its own.

    Raises:
        ValueError: A number makes no sense.
    """
    if not nodes + gpu_nodes:
        raise ValueError("needs at least one node")
    groups = []
    if nodes:
        groups.append(NodeGroup(name="c", count=nodes, cpus=cpus, memory=memory, features=["cpu"]))
    if gpu_nodes:
        gpu_group = {"name": "g", "count": gpu_nodes, "cpus": cpus, "memory": memory, "features": ["gpu"]}
        groups.append(NodeGroup.model_validate({**gpu_group, "gpus": gpus_per_node, "gpu_type": gpu_type}))
    names = {"c": "cpu", "g": "gpu"}
    partitions = [
        Partition(name=names[group.name], groups=[group.name], default=group is groups[0]) for group in groups
    ]
    return SandboxSpec(nodes=groups, partitions=partitions, isolated=isolated)


def read_layout(value: Any) -> SandboxSpec:
    """Return the sandbox that a layout file describes.

    Raises:
        ValueError: It holds a mistake.
    """
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
    """One slurmd: its SLURM name, its own address, and its port."""

    name: str
    address: str
    port: int
    group: NodeGroup


@dataclass(frozen=True)
class SandboxPaths:
    """The files of a sandbox, all below one directory."""

    root: Path

    @property
    def slurm_conf(self) -> Path:
        """The configuration that SLURM_CONF names."""
        return self.root / "slurm.conf"

    @property
    def record(self) -> Path:
        """What was started, as JSON; its presence says that this directory is a sandbox."""
        return self.root / "sandbox.json"

    @property
    def munge_socket(self) -> Path:
        """Where munged listens."""
        return self.root / "munge" / "s"

    @property
    def job_submit(self) -> Path:
        """The job_submit plugin, beside slurm.conf where SLURM looks for it."""
        return self.root / "job_submit.lua"

    @property
    def logs(self) -> Path:
        """Where the daemons write."""
        return self.root / "log"


def virtual_nodes(spec: SandboxSpec, base_port: int) -> list[VirtualNode]:
    """Return the nodes, group by group, addresses from 127.0.1.1 or 10.77.1.1 up, ports after the controller's."""
    members = [(name, group) for group in spec.nodes for name in group.members]
    network = "10.77" if spec.isolated else "127.0"
    return [
        VirtualNode(name, f"{network}.{1 + index // 254}.{1 + index % 254}", base_port + 1 + index, group)
        for index, (name, group) in enumerate(members)
    ]


def render_slurm_conf(spec: SandboxSpec, paths: SandboxPaths, host: str, user: str, base_port: int) -> str:
    """Return the text of slurm.conf."""
    controller = f"{LOGIN}({LOGIN_ADDRESS})" if spec.isolated else f"{host}(127.0.0.1)"
    text = _SETTINGS.format(
        controller=controller, user=user, port=base_port, root=paths.root, munge_socket=paths.munge_socket
    )
    settings = {
        **(_ISOLATED_SETTINGS if spec.isolated else {}),
        **spec.settings,
        **({"JobSubmitPlugins": "lua"} if spec.job_submit else {}),
    }
    kept = [line for line in text.splitlines() if line.partition("=")[0] not in settings]
    nodes = [
        f"NodeName={node.name} NodeHostname={node.name if spec.isolated else host}"
        f" NodeAddr={node.address} Port={node.port}"
        f" CPUs={node.group.cpus} RealMemory={parse_mem_mib(node.group.memory)}"
        f" Feature={','.join([*node.group.features, node.name])}"
        + (f" Gres=gpu:{node.group.gpu_type}:{node.group.gpus}" if node.group.gpus else "")
        + f"{_pairs(node.group.options)} State=UNKNOWN"
        for node in virtual_nodes(spec, base_port)
    ]
    lists = {group.name: group.host_list for group in spec.nodes}
    partitions = [
        f"PartitionName={partition.name} Nodes={','.join(lists[name] for name in partition.groups)}"
        f" Default={'YES' if partition.default else 'NO'}{_pairs({**_PARTITION_OPTIONS, **partition.options})}"
        for partition in spec.partitions
    ]
    said = [f"{name}={value}" for name, value in settings.items() if value != ""]
    return "\n".join([*kept, *said, *nodes, *partitions]) + "\n"


def render_gres_conf(spec: SandboxSpec, paths: SandboxPaths) -> str:
    """Return the text of gres.conf.

    A GPU's file must be a device; links to /dev/null are enough. Without ``nvidia_gpu_env`` jobs would
    get the variables of every other maker as well (gres.conf(5), Flags).
    """
    return "".join(
        f"NodeName={group.host_list} Name=gpu Type={group.gpu_type} Flags=nvidia_gpu_env"
        f" File={paths.root}/dev/nvidia[0-{group.gpus - 1}]\n"
        for group in spec.nodes
        if group.gpus
    )


def _pairs(options: Mapping[str, str | int]) -> str:
    return "".join(f" {name}={value}" for name, value in options.items())
