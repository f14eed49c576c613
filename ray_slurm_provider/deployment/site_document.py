"""The site file that `ray-slurm deploy --site` writes, and the YAML that its users need."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ray_slurm_provider.deployment.document import Deployment, commented, scalar
from ray_slurm_provider.errors import DeployError

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


def user_yaml() -> str:
    return _USER_YAML


def site_document(made: Deployment, answers: Mapping[str, Any], cluster: str) -> str:
    """Return the text of a site file from the cluster YAML that was made for this site and what the admin answered."""
    return "\n".join(_lines(made, answers, answers["site_name"] or cluster)) + "\n"


def _lines(made: Deployment, answers: Mapping[str, Any], site: str) -> Iterator[str]:
    proposal, settings, locked = made.proposal, made.settings, answers["lock"]
    for name in locked:
        if name not in settings:
            raise DeployError(f"--lock {name}: there is no value for it; known here: {', '.join(settings)}")
    yield _HEADER
    yield commented(f"site: {scalar(site)}", "stands in messages to users")
    if answers["contact"]:
        yield commented(f"contact: {scalar(answers['contact'])}", "likewise")
    yield "\n# What a cluster YAML need not say."
    yield "defaults:"
    yield from _settings({name: value for name, value in settings.items() if name not in locked})
    yield f"  head_node_type: {proposal.heads[0].name}"
    yield commented("  # A YAML without node types gets all of these", "")
    yield from textwrap.indent("\n".join(made.types), "  ").splitlines()
    yield "\n# What it cannot say otherwise: any key of provider.slurm (to lists such as prologue it can add)."
    yield "locked:"
    yield from _settings({name: value for name, value in settings.items() if name in locked})
    yield commented("  sbatch: {}", "options that every job has, such as {qos: ray}")
    yield "\n# What SLURM does not limit itself; docs/site.md shows how it limits partitions, times and options."
    yield "limits:"
    yield from _limits(made, answers)


def _settings(settings: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    yield "  slurm:" if settings else "  slurm: {}"
    for name, (value, why) in settings.items():
        yield commented(f"    {name}: {_shown(value)}", why)


def _limits(made: Deployment, answers: Mapping[str, Any]) -> Iterator[str]:
    nodes, queued = answers["max_nodes"] or made.proposal.max_workers + 1, answers["max_queued_jobs"]
    on_login_node = json.dumps(not answers["no_login_node_head"])
    yield commented(f"  max_nodes: {nodes}", "of one cluster at a time, its head included")
    yield commented(f"  {'' if queued else '# '}max_queued_jobs: {queued or 20}", "of one cluster at a time")
    yield commented(f"  login_node_head: {on_login_node}", "whether heads may run on login nodes")


def _shown(value: Any) -> str:
    return scalar(value) if isinstance(value, str) else json.dumps(value)
