"""What a sandbox consists of: its files and its SLURM configuration, as pure functions.

The configuration was tried on SLURM 22.05; slurm.conf(5) and gres.conf(5) say what each line means.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# A Unix socket path holds 107 bytes, and slurmstepd adds its own name below the spool directory.
MAX_STATE_DIR_LENGTH = 60

_SETTINGS = """\
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


@dataclass(frozen=True)
class SandboxSpec:
    """How large a sandbox is.

    Attributes:
        nodes: Virtual nodes of the partition ``cpu``.
        gpu_nodes: Virtual nodes of the partition ``gpu``.
        gpus_per_node: Fake GPUs of each of these.
        cpus: CPUs that each virtual node claims.
        memory_mib: Memory that each virtual node claims, MiB.
        gpu_type: The type of the fake GPUs, for ``--gres=gpu:<type>:1``.
    """

    nodes: int = 4
    gpu_nodes: int = 0
    gpus_per_node: int = 2
    cpus: int = 4
    memory_mib: int = 4096
    gpu_type: str = "a100"

    @property
    def node_count(self) -> int:
        """How many slurmd there are."""
        return self.nodes + self.gpu_nodes

    def as_json(self) -> dict[str, Any]:
        """Return the fields for a JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class VirtualNode:
    """One slurmd: its SLURM name, its own loopback address, and its port."""

    name: str
    address: str
    port: int
    has_gpus: bool


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
    def logs(self) -> Path:
        """Where the daemons write."""
        return self.root / "log"


def virtual_nodes(spec: SandboxSpec, base_port: int) -> list[VirtualNode]:
    """Return the nodes: ``c1..`` then ``g1..``, addresses from 127.0.1.1 up, ports after the controller's."""
    names = [f"c{i}" for i in range(1, spec.nodes + 1)] + [f"g{i}" for i in range(1, spec.gpu_nodes + 1)]
    return [
        VirtualNode(name, f"127.0.{1 + index // 254}.{1 + index % 254}", base_port + 1 + index, index >= spec.nodes)
        for index, name in enumerate(names)
    ]


def render_slurm_conf(spec: SandboxSpec, paths: SandboxPaths, host: str, user: str, base_port: int) -> str:
    """Return the text of slurm.conf."""
    head = _SETTINGS.format(host=host, user=user, port=base_port, root=paths.root, munge_socket=paths.munge_socket)
    nodes = [
        f"NodeName={node.name} NodeHostname={host} NodeAddr={node.address} Port={node.port}"
        f" CPUs={spec.cpus} RealMemory={spec.memory_mib}"
        f" Feature={'gpu' if node.has_gpus else 'cpu'},{node.name}"
        + (f" Gres=gpu:{spec.gpu_type}:{spec.gpus_per_node}" if _with_gpus(spec, node) else "")
        + " State=UNKNOWN"
        for node in virtual_nodes(spec, base_port)
    ]
    partitions = [
        f"PartitionName={name} Nodes={letter}[1-{count}] Default={default} MaxTime=7-00:00:00"
        " DefaultTime=1:00:00 State=UP"
        for name, letter, count, default in (
            ("cpu", "c", spec.nodes, "YES"),
            ("gpu", "g", spec.gpu_nodes, "NO" if spec.nodes else "YES"),
        )
        if count
    ]
    return head + "\n".join(nodes + partitions) + "\n"


def render_gres_conf(spec: SandboxSpec, paths: SandboxPaths) -> str:
    """Return the text of gres.conf.

    A GPU's file must be a device; links to /dev/null are enough. Without ``nvidia_gpu_env`` jobs would
    get the variables of every other maker as well (gres.conf(5), Flags).
    """
    if not (spec.gpu_nodes and spec.gpus_per_node):
        return ""
    return (
        f"NodeName=g[1-{spec.gpu_nodes}] Name=gpu Type={spec.gpu_type} Flags=nvidia_gpu_env"
        f" File={paths.root}/dev/nvidia[0-{spec.gpus_per_node - 1}]\n"
    )


def _with_gpus(spec: SandboxSpec, node: VirtualNode) -> bool:
    return node.has_gpus and spec.gpus_per_node > 0
