"""What a site has, by what SLURM says of it."""

from __future__ import annotations

import getpass
import grp
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.slurm import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_slurm_provider.slurm.client import SlurmClient

# Nodes of one order have a little more or less memory: such are one kind.
_SAME_MEMORY = 1.1
_ACCOUNT_VARIABLES = ("SBATCH_ACCOUNT", "SLURM_ACCOUNT", "SALLOC_ACCOUNT")


@dataclass(frozen=True)
class NodeKind:
    """SLURM nodes of a partition that are alike.

    Attributes:
        cpus: CPUs that jobs can have on each.
        memory_mib: Memory that jobs can have on each, MiB; of slightly different ones the least. 0 when SLURM does
            not know it.
        gpus: GPUs of each.
        gpu_type: Their type; "" when it is not given.
        names: The nodes.
        gone: How many of them are down or drained now.
        features: Features that all of them have, for ``constraint``.
    """

    cpus: int
    memory_mib: int
    gpus: int = 0
    gpu_type: str = ""
    names: tuple[str, ...] = ()
    gone: int = 0
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartitionFacts:
    """A partition, as somebody who wants to submit there sees it.

    Attributes:
        name: Its name.
        is_default: Whether jobs go there that name none.
        max_time_s: Longest time limit; None for no limit.
        default_time_s: Time limit of jobs that ask for none; None when there is no such.
        kinds: The kinds of nodes in it.
        closed: Why nothing can be submitted there; "" when it can.
        preempt_mode: What happens to its jobs when others want their nodes; "" when nothing does.
    """

    name: str
    is_default: bool = False
    max_time_s: int | None = None
    default_time_s: int | None = None
    kinds: tuple[NodeKind, ...] = ()
    closed: str = ""
    preempt_mode: str = ""


@dataclass(frozen=True)
class Survey:
    """A site.

    Attributes:
        cluster: SLURM's name of the cluster.
        version: SLURM's version.
        max_array_size: Largest index of a job array, plus one; 0 or 1 where there are none.
        memory_tracked: Whether memory is handed out to jobs.
        preempt_mode: What happens to jobs that are preempted.
        partitions: The partitions, the default one first.
        accounts: Accounts of this user, the default one first; empty where there is no accounting.
        qos: Names of the QOS that this user may ask for.
        partition_accounts: Accounts that partitions name.
        groups: This user's groups, the first one first.
        addresses: NodeAddr of the nodes.
    """

    cluster: str
    version: str
    max_array_size: int
    memory_tracked: bool
    preempt_mode: str
    partitions: tuple[PartitionFacts, ...]
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    partition_accounts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def open_partitions(self) -> list[PartitionFacts]:
        """Those to which this user can submit."""
        return [partition for partition in self.partitions if not partition.closed]


@dataclass(frozen=True)
class _Person:
    name: str
    groups: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    host: str = field(default_factory=lambda: socket.gethostname().partition(".")[0])
    is_root: bool = False


def usual_account(environ: Mapping[str, str]) -> str:
    """Return the account that a person's shell names for all jobs; "" when it names none.

    The provider does not pass these variables on to sbatch: they would beat what the YAML says.
    """
    return next((environ[name] for name in _ACCOUNT_VARIABLES if environ.get(name)), "")


def take_survey(slurm: SlurmClient) -> Survey:
    """Ask SLURM what there is.

    Raises:
        SlurmError: It does not answer.
    """
    config = slurm.configuration()
    nodes = slurm.nodes()
    person = _person(slurm)
    partitions = slurm.partitions().values()
    facts = [_partition(entry, nodes, person) for entry in partitions]
    named = [entry.get("AllowAccounts", "ALL") for entry in partitions]
    selection = config.get("SelectTypeParameters", "").upper()
    array = config.get("MaxArraySize", "0")
    return Survey(
        cluster=config.get("ClusterName", ""),
        version=config.get("SLURM_VERSION", ""),
        max_array_size=int(array) if array.isdigit() else 0,
        memory_tracked="MEMORY" in selection,
        preempt_mode=config.get("PreemptMode", "OFF"),
        partitions=tuple(sorted(facts, key=lambda partition: not partition.is_default)),
        accounts=person.accounts,
        qos=person.qos,
        partition_accounts=tuple(name for names in named if names != "ALL" for name in names.split(",")),
        groups=person.groups,
        addresses=tuple(dict.fromkeys(entry["NodeAddr"] for entry in nodes if entry.get("NodeAddr"))),
    )


def _person(slurm: SlurmClient) -> _Person:
    name = getpass.getuser()
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    # There may be no database, or it is away, or closed to users: the partitions still tell who may submit.
    with suppress(SlurmError):
        accounts, qos = slurm.associations(name)
    groups = tuple(_group_name(number) for number in dict.fromkeys([os.getgid(), *os.getgroups()]))
    return _Person(name, groups, accounts, qos, is_root=os.getuid() == 0)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _partition(facts: Mapping[str, str], nodes: list[dict[str, str]], person: _Person) -> PartitionFacts:
    name = facts["PartitionName"]
    members = [node for node in nodes if name in node.get("Partitions", "").split(",")]
    kinds = _kinds(members, facts)
    return PartitionFacts(
        name=name,
        is_default=facts.get("Default") == "YES",
        max_time_s=_time(facts.get("MaxTime")),
        default_time_s=_time(facts.get("DefaultTime")),
        kinds=kinds,
        closed=_why_closed(facts, person) or ("" if kinds else "it has no nodes"),
        preempt_mode="" if facts.get("PreemptMode", "OFF") == "OFF" else facts["PreemptMode"],
    )


def _why_closed(facts: Mapping[str, str], person: _Person) -> str:
    state = facts.get("State", "UP")
    plain = {
        f"it is {state}": state != "UP",
        "root may not submit there": person.is_root and facts.get("DisableRootJobs") == "YES",
        "only root may submit there": facts.get("RootOnly") == "YES" and not person.is_root,
        "it needs a reservation": facts.get("ReqResv") == "YES",
        "it allows no nodes": facts.get("MaxNodes") == "0",
    }
    return next((reason for reason, holds in plain.items() if holds), "") or _for_whom(facts, person)


def _for_whom(facts: Mapping[str, str], person: _Person) -> str:
    for key, mine, what in (
        ("AllowGroups", frozenset(person.groups), "groups"),
        ("AllowAccounts", frozenset(person.accounts), "accounts"),
        ("AllowQos", frozenset(person.qos), "QOS"),
        ("AllocNodes", frozenset({person.host}), "hosts"),
    ):
        allowed = facts.get(key, "ALL")
        # Without accounting nobody knows one's accounts, and SLURM does not ask for them.
        if not mine or allowed.upper() == "ALL" or (key == "AllocNodes" and "[" in allowed):
            continue
        if key == "AllowGroups" and person.is_root:
            continue
        if not mine & set(allowed.split(",")):
            return f"it is for the {what} {allowed}"
    return ""


def _kinds(members: list[dict[str, str]], partition: Mapping[str, str]) -> tuple[NodeKind, ...]:
    """Group nodes that are alike; those with GPUs last, smaller ones first."""
    groups: dict[tuple[int, int, str], list[tuple[int, dict[str, str]]]] = {}
    for node in members:
        gpus, gpu_type = _gpus(node)
        cpus = _number(node.get("CPUEfctv") or node.get("CPUTot"))
        cpus = _at_most(cpus, partition.get("MaxCPUsPerNode"))
        memory = _number(node.get("RealMemory")) - _number(node.get("MemSpecLimit"))
        memory = _at_most(memory, partition.get("MaxMemPerNode"))
        if partition.get("MaxMemPerCPU", "").isdigit():
            memory = min(memory, cpus * int(partition["MaxMemPerCPU"]))
        # 1 MiB is what SLURM takes for nodes whose memory nobody has told it.
        groups.setdefault((cpus, gpus, gpu_type), []).append((memory if memory > 1 else 0, node))
    kinds = [
        _kind(key, batch) for key, members_ in groups.items() if key[0] > 0 for batch in _of_similar_memory(members_)
    ]
    return tuple(sorted(kinds, key=lambda kind: (kind.gpus > 0, kind.cpus, kind.memory_mib, kind.gpus, kind.gpu_type)))


def _kind(key: tuple[int, int, str], members: list[tuple[int, dict[str, str]]]) -> NodeKind:
    cpus, gpus, gpu_type = key
    features = [node.get("AvailableFeatures", "").split(",") for _, node in members]
    common = [name for name in features[0] if name not in {"", "(null)"} and all(name in other for other in features)]
    return NodeKind(
        cpus=cpus,
        memory_mib=members[0][0],
        gpus=gpus,
        gpu_type=gpu_type,
        names=tuple(node.get("NodeName", "") for _, node in members),
        features=tuple(common),
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
    return min(value, int(limit)) if limit is not None and limit.isdigit() and int(limit) else value


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _time(text: str | None) -> int | None:
    if text is None or text in {"NONE", "UNLIMITED", "INFINITE"}:
        return None
    try:
        return parse.parse_time_s(text)
    except ValueError:
        return None
