"""What a site has, by what SLURM says of it."""

import getpass
import grp
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.slurm import parse
from ray_slurm_provider.slurm.client import SlurmClient

# Nodes of one order have a little more or less memory: such are one kind.
_SAME_MEMORY = 1.1
_ACCOUNT_VARIABLES = ("SBATCH_ACCOUNT", "SLURM_ACCOUNT", "SALLOC_ACCOUNT")


@dataclass(frozen=True)
class NodeKind:
    """SLURM nodes of a partition that are alike."""

    cpus: int  # of each, for jobs
    memory_mib: int  # of each, for jobs; the least when they differ a little, 0 when SLURM does not know it
    gpus: int = 0
    gpu_type: str = ""  # "" when it is not given
    names: tuple[str, ...] = ()
    gone: int = 0  # how many are down or drained now


@dataclass(frozen=True)
class PartitionFacts:
    """A partition, as somebody who wants to submit there sees it."""

    name: str
    is_default: bool = False
    max_time_s: int | None = None  # None: no limit
    kinds: tuple[NodeKind, ...] = ()
    closed: str = ""  # why nothing can be submitted there; "" when it can


@dataclass(frozen=True)
class Survey:
    """A site."""

    cluster: str
    version: str
    memory_tracked: bool  # whether memory is handed out to jobs
    partitions: tuple[PartitionFacts, ...]  # the default one first
    accounts: tuple[str, ...] = ()  # this user's, the default one first; empty where there is no accounting
    qos: tuple[str, ...] = ()  # which this user may ask for
    addresses: tuple[str, ...] = ()  # NodeAddr of the nodes

    @property
    def open_partitions(self) -> list[PartitionFacts]:
        return [partition for partition in self.partitions if not partition.closed]


@dataclass(frozen=True)
class _Person:
    groups: Sequence[str]
    accounts: tuple[str, ...]
    qos: tuple[str, ...]


def usual_account(environ: Mapping[str, str]) -> str:
    """Return the account that a person's shell names for all jobs; "" when it names none.

    The provider does not pass these variables on to sbatch: they would beat what the YAML says.
    """
    return next((environ[name] for name in _ACCOUNT_VARIABLES if environ.get(name)), "")


def take_survey(slurm: SlurmClient) -> Survey:
    config = slurm.configuration()
    nodes = slurm.nodes()
    person = _person(slurm)
    partitions = [_partition(facts, nodes, person) for facts in slurm.partitions().values()]
    return Survey(
        cluster=config.get("ClusterName", ""),
        version=config.get("SLURM_VERSION", ""),
        memory_tracked="MEMORY" in config.get("SelectTypeParameters", "").upper(),
        partitions=tuple(sorted(partitions, key=lambda partition: not partition.is_default)),
        accounts=person.accounts,
        qos=person.qos,
        addresses=tuple(dict.fromkeys(node["NodeAddr"] for node in nodes if node.get("NodeAddr"))),
    )


def _person(slurm: SlurmClient) -> _Person:
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    # There may be no database, or it is away, or closed to users: the partitions still tell who may submit.
    with suppress(SlurmError):
        accounts, qos = slurm.associations(getpass.getuser())
    return _Person([_group_name(number) for number in {os.getgid(), *os.getgroups()}], accounts, qos)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _partition(facts: Mapping[str, str], nodes: list[dict[str, str]], person: _Person) -> PartitionFacts:
    name = facts["PartitionName"]
    kinds = _kinds([node for node in nodes if name in node.get("Partitions", "").split(",")], facts)
    return PartitionFacts(
        name=name,
        is_default=facts.get("Default") == "YES",
        max_time_s=_time(facts.get("MaxTime")),
        kinds=kinds,
        closed=_why_closed(facts, person) or ("" if kinds else "it has no nodes"),
    )


def _why_closed(facts: Mapping[str, str], person: _Person) -> str:
    """Return why this user cannot submit to a partition. What is not looked at here, sbatch says."""
    state, is_root = facts.get("State", "UP"), os.getuid() == 0
    if state != "UP":
        return f"it is {state}"
    if facts.get("RootOnly") == "YES" and not is_root:
        return "only root may submit there"
    if facts.get("ReqResv") == "YES":
        return "it needs a reservation"
    for key, mine, what in (
        ("AllowGroups", [] if is_root else person.groups, "groups"),  # SLURM asks root for none
        ("AllowAccounts", person.accounts, "accounts"),
        ("AllowQos", person.qos, "QOS"),
    ):
        allowed = facts.get(key, "ALL")
        # Without accounting nobody knows one's accounts, and SLURM does not ask for them.
        if mine and allowed.upper() != "ALL" and not set(mine) & set(allowed.split(",")):
            return f"it is for the {what} {allowed}"
    return ""


def _kinds(members: list[dict[str, str]], partition: Mapping[str, str]) -> tuple[NodeKind, ...]:
    """Group nodes that are alike; those with GPUs last, smaller ones first."""
    groups: dict[tuple[int, int, str], list[tuple[int, dict[str, str]]]] = {}
    for node in members:
        cpus = _at_most(_number(node.get("CPUEfctv") or node.get("CPUTot")), partition.get("MaxCPUsPerNode"))
        if cpus > 0:
            groups.setdefault((cpus, *_gpus(node)), []).append((_memory_mib(node, cpus, partition), node))
    kinds = [_kind(key, batch) for key, members_ in groups.items() for batch in _of_similar_memory(members_)]
    return tuple(sorted(kinds, key=lambda kind: (kind.gpus > 0, kind.cpus, kind.memory_mib, kind.gpus, kind.gpu_type)))


def _memory_mib(node: Mapping[str, str], cpus: int, partition: Mapping[str, str]) -> int:
    memory = _number(node.get("RealMemory")) - _number(node.get("MemSpecLimit"))
    memory = _at_most(memory, partition.get("MaxMemPerNode"))
    memory = min(memory, cpus * _number(partition.get("MaxMemPerCPU")) or memory)
    # 1 MiB is what SLURM takes for nodes whose memory nobody has told it.
    return memory if memory > 1 else 0


def _kind(key: tuple[int, int, str], members: list[tuple[int, dict[str, str]]]) -> NodeKind:
    cpus, gpus, gpu_type = key
    return NodeKind(
        cpus=cpus,
        memory_mib=members[0][0],
        gpus=gpus,
        gpu_type=gpu_type,
        names=tuple(node.get("NodeName", "") for _, node in members),
        gone=sum(bool(parse.OUT_OF_SERVICE.search(node.get("State", ""))) for _, node in members),
    )


def _of_similar_memory(members: list[tuple[int, dict[str, str]]]) -> list[list[tuple[int, dict[str, str]]]]:
    batches: list[list[tuple[int, dict[str, str]]]] = []
    for memory, node in sorted(members, key=lambda member: member[0]):
        if batches and memory <= batches[-1][0][0] * _SAME_MEMORY:
            batches[-1].append((memory, node))
        else:
            batches.append([(memory, node)])
    return batches


def _gpus(node: Mapping[str, str]) -> tuple[int, str]:
    """Return number and type of a node's GPUs; of several types the one it has most of."""
    found: list[tuple[int, str]] = []
    # "gpu:a100:4(S:0-1),shard:8": the sockets in brackets are not ours.
    for part in re.sub(r"\([^)]*\)", "", node.get("Gres", "")).split(","):
        try:
            gres = parse.parse_gres(part)
        except ValueError:
            continue
        if gres.get("gpu", (0, ""))[0]:
            found.append(gres["gpu"])
    return max(found, default=(0, ""))


def _at_most(value: int, limit: str | None) -> int:
    return min(value, _number(limit) or value)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _time(text: str | None) -> int | None:
    try:
        return parse.parse_time_s(text or "")
    except ValueError:
        return None
