"""Node types for a site, from what it has and what a person wants. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ray_slurm_provider.deployment.survey import NodeKind, PartitionFacts, Survey
from ray_slurm_provider.errors import DeployError
from ray_slurm_provider.slurm.parse import format_time

HEAD = "head"
# What a head needs: Ray's own processes, and none of the work.
_HEAD_CPUS = 1
_HEAD_MEMORY_MIB = 2048
_HEAD_TIME_S = 7 * 86400
_SHORT_FOR_A_HEAD_S = 86400
_WORKER_TIME_S = 4 * 3600
_MAX_WORKERS = 10
# Of a kind with fewer nodes every node counts: a worker then leaves room for the head beside it.
_FEW_NODES = 3


@dataclass(frozen=True)
class Wishes:
    """What a person wants, of all that could be asked."""

    cluster_name: str
    partitions: Sequence[str] = ()  # empty: all that are open
    account: str = ""  # "": the site decides
    qos: str = ""  # likewise
    head: Literal["slurm", "login_node"] = "slurm"
    time_s: int | None = None  # of the workers; None: a usual one
    head_time_s: int | None = None  # None: the longest
    max_workers: int | None = None  # None: a usual number
    setup: Sequence[str] = ()  # shell lines that every node runs first


@dataclass(frozen=True)
class Option:
    """One sbatch option of a node type, with one line on why it is there."""

    value: str | int
    why: str


@dataclass(frozen=True)
class TypeProposal:
    """One Ray node type."""

    name: str
    about: str
    sbatch: Mapping[str, Option] = field(default_factory=dict)  # in the order of the YAML; empty: no job
    skip: Sequence[str] = ()  # directives to leave out
    max_workers: int = 0  # 0 for a head
    has_gpus: bool = False
    priority: int = 0  # Ray's preference among types that fit

    def with_options(self, options: Mapping[str, Option]) -> TypeProposal:
        return replace(self, sbatch={**self.sbatch, **options})

    def without_option(self, name: str) -> TypeProposal:
        return replace(self, sbatch={key: option for key, option in self.sbatch.items() if key != name})


@dataclass(frozen=True)
class Proposal:
    """A cluster for a site."""

    heads: Sequence[TypeProposal]  # to try, the best first
    workers: Sequence[TypeProposal]
    max_workers: int  # all types together
    notes: Sequence[str] = ()  # for a person


_LOGIN_NODE_HEAD = TypeProposal(HEAD, "a process on the host where `ray up` is typed; no job, and no time limit")


def propose(survey: Survey, wishes: Wishes) -> Proposal:
    partitions = _chosen(survey, wishes)
    notes = [f"partition {p.name} is left out: {p.closed}" for p in survey.partitions if p.closed]
    if wishes.time_s is not None and all(_limited(wishes.time_s, p) < wishes.time_s for p in partitions):
        longest = max(p.max_time_s or 0 for p in partitions)
        raise DeployError(
            f"a time of {format_time(wishes.time_s)} is more than any partition allows; at most {format_time(longest)}"
        )
    homes = [] if wishes.head == "login_node" else sorted(partitions, key=_rank_for_head)
    heads = [_head(survey, partition, wishes) for partition in homes] or [_LOGIN_NODE_HEAD]
    workers = _workers(survey, partitions, wishes, near_head=set(_names(homes[0])) if homes else set())
    total = sum(worker.max_workers for worker in workers)
    most = wishes.max_workers if wishes.max_workers is not None else min(total, _MAX_WORKERS)
    if homes and (homes[0].max_time_s or _HEAD_TIME_S) < 3600:
        notes.append("the head ends with its time limit, and the cluster with it; --head login-node has none")
    return Proposal(heads, workers, most, notes)


def _chosen(survey: Survey, wishes: Wishes) -> list[PartitionFacts]:
    by_name = {partition.name: partition for partition in survey.partitions}
    for name in wishes.partitions:
        if name not in by_name:
            raise DeployError(f"there is no partition {name}; there are {', '.join(by_name) or 'none'}")
        if by_name[name].closed:
            raise DeployError(f"partition {name} cannot be used: {by_name[name].closed}")
    chosen = [by_name[name] for name in wishes.partitions] or survey.open_partitions
    if not chosen:
        reasons = "; ".join(f"{partition.name}: {partition.closed}" for partition in survey.partitions)
        raise DeployError(f"no partition can be used ({reasons or 'there is none'})")
    return chosen


def _rank_for_head(partition: PartitionFacts) -> tuple[bool, bool, bool, float]:
    """Order partitions as places for the head: not on GPU nodes, not for a short time, the default one."""
    only_gpus = all(kind.gpus for kind in partition.kinds)
    short = partition.max_time_s is not None and partition.max_time_s < _SHORT_FOR_A_HEAD_S
    longest = -(partition.max_time_s or float("inf"))
    return only_gpus, short, not partition.is_default and not short, longest


def _head(survey: Survey, partition: PartitionFacts, wishes: Wishes) -> TypeProposal:
    time_s = _limited(wishes.head_time_s or _HEAD_TIME_S, partition)
    least = min(kind.memory_mib for kind in partition.kinds)
    sbatch = {
        "partition": Option(partition.name, "where the head waits and runs"),
        **_who(wishes),
        "cpus_per_task": Option(_HEAD_CPUS, "enough for Ray's own processes: no tasks run here"),
        **_memory(survey, min(_HEAD_MEMORY_MIB, least // 2) if least else 0, "for Ray's own processes"),
        "time": Option(format_time(time_s), f"the cluster ends with its head; {_allowed(partition)}"),
    }
    return TypeProposal(HEAD, "a job too; it lives as long as the cluster, and runs no tasks", sbatch)


def _workers(
    survey: Survey, partitions: Sequence[PartitionFacts], wishes: Wishes, *, near_head: set[str]
) -> list[TypeProposal]:
    second = _second_choices(partitions)
    workers = [
        _worker(survey, partition, kind, wishes, beside_head=not near_head.isdisjoint(_names(partition)))
        for partition in partitions
        for kind in partition.kinds
    ]
    return [
        replace(worker, name=name, priority=-1 if worker.sbatch["partition"].value in second else 0)
        for worker, name in zip(workers, _type_names(partitions), strict=True)
    ]


def _worker(
    survey: Survey, partition: PartitionFacts, kind: NodeKind, wishes: Wishes, *, beside_head: bool
) -> TypeProposal:
    count = max(1, len(kind.names) - kind.gone)
    few = beside_head and count <= _FEW_NODES and kind.cpus > _HEAD_CPUS
    cpus = kind.cpus - _HEAD_CPUS if few else kind.cpus
    memory_mib = kind.memory_mib
    if few and memory_mib:
        memory_mib -= min(_HEAD_MEMORY_MIB, memory_mib // 2)
    share = "all of a node but what the head needs beside it" if few else "all of a node; less fits in sooner"
    sbatch = {
        "partition": Option(partition.name, _allowed(partition)),
        **_who(wishes),
        "cpus_per_task": Option(cpus, share),
        **_memory(survey, memory_mib, share),
        **({"gres": Option(f"gpu:{_gpus(kind)}", "all GPUs of a node")} if kind.gpus else {}),
        "time": Option(
            format_time(_limited(wishes.time_s or _WORKER_TIME_S, partition)), "Ray moves work away before it ends"
        ),
    }
    return TypeProposal(
        name=partition.name,
        about=_about(partition, kind),
        sbatch=sbatch,
        max_workers=count if few or not beside_head or count == 1 else count - 1,
        has_gpus=kind.gpus > 0,
    )


def _who(wishes: Wishes) -> dict[str, Option]:
    return {
        **({"account": Option(wishes.account, "who pays")} if wishes.account else {}),
        **({"qos": Option(wishes.qos, "quality of service")} if wishes.qos else {}),
    }


def _memory(survey: Survey, memory_mib: int, why: str) -> dict[str, Option]:
    if not (survey.memory_tracked and memory_mib):
        return {}
    text = f"{memory_mib // 1024}G" if memory_mib % 1024 == 0 else f"{memory_mib}M"
    return {"mem": Option(text, why)}


def _gpus(kind: NodeKind) -> str:
    return f"{kind.gpu_type}:{kind.gpus}" if kind.gpu_type else str(kind.gpus)


def _limited(wanted_s: int, partition: PartitionFacts) -> int:
    return wanted_s if partition.max_time_s is None else min(wanted_s, partition.max_time_s)


def _allowed(partition: PartitionFacts) -> str:
    if partition.max_time_s is None:
        return "jobs there have no time limit"
    return f"jobs there end after {format_time(partition.max_time_s)} at the latest"


def _names(partition: PartitionFacts) -> list[str]:
    return [name for kind in partition.kinds for name in kind.names]


def _type_names(partitions: Sequence[PartitionFacts]) -> list[str]:
    """Return a name for each kind in each partition; those that are the same in spite of all are numbered."""
    names = [name for partition in partitions for name in _names_of(partition)]
    before = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def _names_of(partition: PartitionFacts) -> list[str]:
    """Return a name for each kind by which people recognise it: ``gpu-a100x4``, ``cpu``; ``cpu-64c`` of several."""
    bases = [_base_name(partition, kind) for kind in partition.kinds]
    names = []
    for base, kind in zip(bases, partition.kinds, strict=True):
        alike = [other for name, other in zip(bases, partition.kinds, strict=True) if name == base]
        parts = [base]
        if len({other.cpus for other in alike}) > 1:
            parts.append(f"{kind.cpus}c")
        if sum(other.cpus == kind.cpus for other in alike) > 1:
            parts.append(f"{round(kind.memory_mib / 1024)}g")
        names.append("-".join(parts))
    return names


def _base_name(partition: PartitionFacts, kind: NodeKind) -> str:
    label = f"{kind.gpu_type or 'gpu'}x{kind.gpus}"
    name = partition.name
    if kind.gpus:
        name = label if partition.name == kind.gpu_type else f"{partition.name}-{label}"
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return f"{name}-nodes" if name == HEAD else name


def _about(partition: PartitionFacts, kind: NodeKind) -> str:
    count = len(kind.names)
    parts = [f"{kind.cpus} CPUs", *([f"{kind.memory_mib / 1024:.4g} GiB"] if kind.memory_mib else [])]
    if kind.gpus:
        parts.append(f"{kind.gpus} GPUs" + (f" {kind.gpu_type}" if kind.gpu_type else ""))
    gone = f"; {kind.gone} of them down or drained" if kind.gone else ""
    return f"partition {partition.name}: {count} node{'s' if count > 1 else ''} with {', '.join(parts)}{gone}"


def _second_choices(partitions: Sequence[PartitionFacts]) -> set[str]:
    """Return the partitions with nodes that are also in one that was named or listed before."""
    owner: dict[str, str] = {}
    for partition in partitions:
        for name in _names(partition):
            owner.setdefault(name, partition.name)
    return {p.name for p in partitions if any(owner[name] != p.name for name in _names(p))}
