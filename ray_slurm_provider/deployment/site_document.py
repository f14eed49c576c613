"""The site file that `ray-slurm deploy --site` writes, and the YAML that its users need."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_slurm_provider.deployment.document import commented, scalar
from ray_slurm_provider.errors import DeployError
from ray_slurm_provider.slurm.parse import format_time, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ray_slurm_provider.deployment.deploy import Deployment

_HEADER = """\
# The site file of ray-slurm-provider: what holds for the Ray clusters of all users here. Made by
# `ray-slurm deploy --site` from what SLURM says of the site; change what you like, docs/site.md explains each key.
# Every command of a user reads it anew; `ray-slurm check` of any cluster YAML tells a mistake in it.
"""
_USER_YAML = """\
cluster_name: mine
max_workers: 4
provider: {type: external, module: ray_slurm_provider.node_provider.SlurmNodeProvider}
# Ray wants to see these three, empty or not.
<<: {setup_commands: [], head_setup_commands: [], worker_setup_commands: []}
"""


@dataclass(frozen=True)
class SitePolicy:
    """What an admin decides.

    Attributes:
        name: The site's name.
        contact: Whom users may ask; may be "".
        max_nodes: Nodes of one cluster at the most, its head included; None for as many as the YAML made for it has.
        max_time_s: Longest time limit, seconds; None for the longest that a node type has.
        max_queued_jobs: Queued jobs of one cluster at the most; None for no limit.
        required: sbatch options that every node type must name.
        forbidden: sbatch options that none may name.
        locked: Keys of ``provider.slurm`` that a cluster YAML cannot change.
        login_node_head: Whether heads may run on login nodes.
    """

    name: str
    contact: str = ""
    max_nodes: int | None = None
    max_time_s: int | None = None
    max_queued_jobs: int | None = None
    required: Sequence[str] = ()
    forbidden: Sequence[str] = ()
    locked: Sequence[str] = ()
    login_node_head: bool = True


def user_yaml() -> str:
    """Return a cluster YAML that needs the site file for everything else."""
    return _USER_YAML


def site_document(made: Deployment, policy: SitePolicy) -> str:
    """Return the text of a site file.

    Args:
        made: The cluster YAML that was made for this site.
        policy: What the admin decides.

    Raises:
        DeployError: A key is to be locked that has no value.
    """
    return "\n".join(_lines(made, policy)) + "\n"


def _lines(made: Deployment, policy: SitePolicy) -> Iterator[str]:
    proposal, settings = made.proposal, made.settings
    for name in policy.locked:
        if name not in settings:
            raise DeployError(f"--lock {name}: there is no value for it; known here: {', '.join(settings)}")
    yield _HEADER
    yield commented(f"site: {scalar(policy.name)}", "stands in messages to users")
    if policy.contact:
        yield commented(f"contact: {scalar(policy.contact)}", "likewise")
    yield "\n# What a cluster YAML need not say."
    yield "defaults:"
    yield from _settings({name: value for name, value in settings.items() if name not in policy.locked})
    yield f"  head_node_type: {proposal.heads[0].name}"
    yield commented("  # A YAML without node types gets all of these", "")
    yield from textwrap.indent("\n".join(made.types), "  ").splitlines()
    yield "\n# What it cannot say otherwise: any key of provider.slurm (to lists such as prologue it can add)."
    yield "locked:"
    yield from _settings({name: value for name, value in settings.items() if name in policy.locked})
    yield commented("  sbatch: {}", "options that every job has, such as {qos: ray}")
    yield "\n# How far it may go."
    yield "limits:"
    yield from _limits(made, policy)


def _settings(settings: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    yield "  slurm:" if settings else "  slurm: {}"
    for name, (value, why) in settings.items():
        yield commented(f"    {name}: {_shown(value)}", why)


def _limits(made: Deployment, policy: SitePolicy) -> Iterator[str]:
    proposal = made.proposal
    types = [*proposal.heads[:1], *proposal.workers]
    partitions = dict.fromkeys(str(t.sbatch["partition"].value) for t in types if "partition" in t.sbatch)
    times = [parse_time_s(str(t.sbatch["time"].value)) or 0 for t in types if "time" in t.sbatch]
    longest = policy.max_time_s or max(times, default=0)
    nodes = policy.max_nodes or proposal.max_workers + 1
    yield commented(f"  partitions: {json.dumps(list(partitions))}", "a node type that names none gets the first")
    yield commented(f"  max_nodes: {nodes}", "of one cluster at a time, its head included")
    if longest:
        yield commented(f"  max_time: {json.dumps(format_time(longest))}", "a job that names none gets this one")
    if policy.max_queued_jobs:
        yield commented(f"  max_queued_jobs: {policy.max_queued_jobs}", "of one cluster at a time")
    else:
        yield commented("  # max_queued_jobs: 20", "of one cluster at a time")
    yield commented(f"  required_options: {json.dumps(list(policy.required))}", "every node type must name these")
    yield commented(f"  forbidden_options: {json.dumps(list(policy.forbidden))}", "and none of these")
    yield commented("  allowed_values: {}", "such as {container: [/apps/containers/*]}")
    yield commented("  # state_dir: [/scratch/$USER/*]", "patterns")
    yield commented(f"  login_node_head: {json.dumps(policy.login_node_head)}", "whether heads may run on login nodes")


def _shown(value: Any) -> str:
    return scalar(value) if isinstance(value, str) else json.dumps(value)
