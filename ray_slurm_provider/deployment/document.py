"""The cluster YAML that `ray-slurm deploy` writes, as text. Pure functions."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider.deployment.proposal import Proposal, TypeProposal, Wishes
from ray_slurm_provider.deployment.survey import Survey

_COMMENT_COLUMN = 40
_WIDTH = 118


@dataclass(frozen=True)
class Deployment:
    """A cluster YAML that was made."""

    text: str
    proposal: Proposal  # as sbatch accepts it
    types: Sequence[str]  # the lines of available_node_types
    settings: Mapping[str, tuple[Any, str]]  # keys of provider.slurm, each with one line on it


def template_directory() -> Path:
    """Return where the templates are: in the installed package, or in the clone."""
    installed = Path(__file__).parents[1] / "cluster_configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "cluster_configs"


def commented(text: str, why: str) -> str:
    """Return a line with its comment in a column of its own."""
    return f"{text.ljust(_COMMENT_COLUMN - 2)}  # {why}" if why else text


def scalar(value: str | int) -> str:
    """Return a value as YAML, in quotes where YAML would take it for something else."""
    if isinstance(value, int):
        return str(value)
    plain = re.fullmatch(r"[A-Za-z0-9_./~$][A-Za-z0-9_./~$ -]*", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def cluster_document(
    survey: Survey,
    wishes: Wishes,
    proposal: Proposal,
    *,
    file_name: str,
    settings: Mapping[str, tuple[Any, str]],
    types: Sequence[str],
) -> str:
    """Return the YAML; settings come each with one line on them, types as the lines of ``available_node_types``."""
    lines = [
        *_header(survey, file_name, proposal.notes),
        "",
        commented(f"cluster_name: {scalar(wishes.cluster_name)}", "names its jobs, and its directory below state_dir"),
        commented(f"max_workers: {proposal.max_workers}", "jobs of workers at the most, all types together"),
        commented("idle_timeout_minutes: 5", "a worker without work is cancelled after that"),
        "",
        "provider:",
        "  type: external",
        "  module: ray_slurm_provider.node_provider.SlurmNodeProvider",
        *_settings(settings),
        "",
        f"head_node_type: {proposal.heads[0].name}",
        *types,
        "",
        "# Ray wants to see these keys, empty or not. The commands run in the job, before Ray starts.",
        commented(f"setup_commands: {_flow(list(wishes.setup))}", "on every node"),
        "head_setup_commands: []",
        "worker_setup_commands: []",
    ]
    return "\n".join(lines) + "\n"


def _header(survey: Survey, file_name: str, notes: Sequence[str]) -> list[str]:
    text = [
        f"A Ray cluster for {survey.cluster} (SLURM {survey.version}), made by `ray-slurm deploy`. To start it:",
        "",
        f"    ray up {file_name} --no-config-cache",
        "",
        f"`ray-slurm check {file_name}` tells beforehand whether it will work.",
        "Change what you like; `ray-slurm schema` prints every key with its meaning.",
        *(["", *(f"* {note}" for note in notes)] if notes else []),
    ]
    wrapped = [part for line in text for part in textwrap.wrap(line, _WIDTH - 2) or [""]]
    schema = template_directory() / "schema.json"
    return [f"# yaml-language-server: $schema={schema}", *(f"# {line}".rstrip() for line in wrapped)]


def _settings(settings: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    if settings:
        yield "  slurm:"
    for name, (value, why) in settings.items():
        yield commented(f"    {name}: {scalar(value) if isinstance(value, str) else _flow(value)}", why)


def node_type_lines(proposal: Proposal, *, knows_priority: bool) -> Iterator[str]:
    """Yield the lines of ``available_node_types``; not every Ray knows the key ``priority``."""
    head = proposal.heads[0]
    yield "available_node_types:"
    yield commented(f"  {head.name}:", head.about)
    yield commented("    resources: {CPU: 0}", "no tasks on the head: it has the others to look after")
    yield "    node_config:"
    if head.sbatch:
        yield from _sbatch(head)
    else:
        yield commented("      placement: login_node", "no sbatch options: it is no job")
    for worker in proposal.workers:
        yield f"  # {worker.about}"
        yield f"  {worker.name}:"
        yield commented(f"    max_workers: {worker.max_workers}", "jobs of this type at the most")
        if worker.priority and knows_priority:
            yield commented(f"    priority: {worker.priority}", "the same nodes are in a partition that comes first")
        if worker.has_gpus:
            yield commented("    idle_timeout_s: 120", "GPUs are dear: give them back sooner")
        yield "    node_config:"
        yield from _sbatch(worker)


def _sbatch(proposed: TypeProposal) -> Iterator[str]:
    yield "      sbatch:"
    for name, option in proposed.sbatch.items():
        yield commented(f"        {name}: {scalar(option.value)}", option.why)
    if proposed.skip:
        yield commented(f"      sbatch_skip: {_flow(list(proposed.skip))}", "the site refuses these directives")


def _flow(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
