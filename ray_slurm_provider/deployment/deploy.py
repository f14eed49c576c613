"""Makes a cluster YAML for the site that it is asked on."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ray_slurm_provider.agent import network
from ray_slurm_provider.bootstrap import resolve_written
from ray_slurm_provider.cluster_yaml import settings_of
from ray_slurm_provider.deployment.document import node_type_lines, read_template, write_document
from ray_slurm_provider.deployment.probing import Prober, possible_changes
from ray_slurm_provider.deployment.proposal import HEAD, Proposal, TypeProposal, propose
from ray_slurm_provider.deployment.survey import usual_account
from ray_slurm_provider.errors import DeployError
from ray_slurm_provider.file_sync import on_local_disk
from ray_slurm_provider.files import write_atomically
from ray_slurm_provider.ray_contract import cluster_schema
from ray_slurm_provider.site_file import read_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ray_slurm_provider.config import SlurmSettings
    from ray_slurm_provider.deployment.proposal import Wishes
    from ray_slurm_provider.deployment.survey import Survey

# Where sites usually say which file system their hosts share.
_SHARED_VARIABLES = ("SCRATCH", "WORK", "PROJECT", "WORKDIR", "PSCRATCH")
_USUAL_STATE_DIR = "~/.ray-slurm"


@dataclass(frozen=True)
class Deployment:
    """A cluster YAML that was made.

    Attributes:
        text: The YAML.
        proposal: The node types in it, as sbatch accepts them.
        types: The lines of its ``available_node_types``.
        settings: Keys of its ``provider.slurm``, each with one line on it.
    """

    text: str
    proposal: Proposal
    types: Sequence[str]
    settings: Mapping[str, tuple[Any, str]]


def usual_state_dir(survey: Survey, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return a directory that this host and the compute nodes seem to share, and one line on it."""
    if all(network.is_local(address) for address in survey.addresses):
        return _USUAL_STATE_DIR, "all SLURM nodes are on this host"
    if not on_local_disk(Path.home()):
        return _USUAL_STATE_DIR, "login and compute nodes must share it"
    for name in _SHARED_VARIABLES:
        place = Path(environ.get(name) or "/nowhere")
        if place.is_dir() and os.access(place, os.W_OK) and not on_local_disk(place):
            return f"${name}/.ray-slurm", "login and compute nodes must share it; the home directory looks local"
    return _USUAL_STATE_DIR, "login and compute nodes must share it, and the home directory looks local: change it"


def make_cluster_yaml(
    survey: Survey,
    wishes: Wishes,
    *,
    template: str,
    file_name: str,
    settings: Mapping[str, tuple[Any, str]],
    max_nodes: int | None,
    environ: Mapping[str, str],
    tell: Callable[[str], None],
) -> Deployment:
    """Return a YAML with node types that sbatch accepts.

    Args:
        survey: The site.
        wishes: What a person wants.
        template: Name or path of the template.
        file_name: What the file will be called.
        settings: Keys of ``provider.slurm``, each with one line on it.
        max_nodes: Nodes that the site allows one cluster, the head included; None for any number.
        environ: The environment of `ray up`.
        tell: Called with a line for each thing that is not as usual.

    Raises:
        DeployError: Nothing can be made.
        SlurmUnavailable: Nobody answers.
    """
    site = read_site()
    if "state_dir" not in settings and not (site and "state_dir" in {**site.defaults.slurm, **site.locked.slurm}):
        settings = {"state_dir": usual_state_dir(survey, environ), **settings}
    proposal = propose(survey, wishes)
    if max_nodes is not None:
        is_job = bool(proposal.heads[0].sbatch)
        proposal = replace(proposal, max_workers=min(proposal.max_workers, max_nodes - is_job))
    prober = Prober(_settings(settings), wishes.cluster_name, environ)
    proposal, notes = _fitted(survey, proposal, prober, environ)
    for note in [*proposal.notes, *notes]:
        tell(note)
    if proposal.heads[0].sbatch and not prober.keeps_comment(proposal.heads[0]):
        settings = {**settings, "birth_record": ("file", "the site changes the comment of jobs")}
        tell("the site changes the comment of jobs: the provider keeps its records in files")
    skeleton = read_template(template or _usual_template(proposal))
    types = list(node_type_lines(skeleton, proposal, knows_priority=_knows_priority()))
    text = write_document(
        skeleton,
        survey,
        wishes,
        replace(proposal, notes=[*proposal.notes, *notes]),
        file_name=file_name,
        settings=settings,
        types=types,
    )
    resolve_written(yaml.safe_load(text))
    return Deployment(text, proposal, types, settings)


def difference(path: Path, text: str) -> str:
    """Return how a text differs from the file of that name, "" when the file is not there or the same."""
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{path} cannot be read: {error}") from None
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), str(path), f"{path} (new)", lineterm="")
    return "\n".join(lines)


def write_file(path: Path, text: str, *, force: bool) -> None:
    """Write a file, never over another one that was not meant to go.

    Raises:
        DeployError: It is there already, or cannot be written.
    """
    if not force and difference(path, text):
        raise DeployError(f"{path} is there already and differs; nothing was written\n  --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, mode=0o644)
    except OSError as error:
        raise DeployError(f"{path} cannot be written: {error.strerror}") from None


def _settings(settings: Mapping[str, tuple[Any, str]]) -> SlurmSettings:
    return settings_of({"provider": {"slurm": {name: value for name, (value, _) in settings.items()}}})


def _usual_template(proposal: Proposal) -> str:
    if not proposal.heads[0].sbatch:
        return "login_node"
    return "gpu" if any(worker.has_gpus for worker in proposal.workers) else "minimal"


def _knows_priority() -> bool:
    (node_type,) = cluster_schema()["properties"]["available_node_types"]["patternProperties"].values()
    return "priority" in node_type["properties"]


def _fitted(
    survey: Survey, proposal: Proposal, prober: Prober, environ: Mapping[str, str]
) -> tuple[Proposal, list[str]]:
    """Return the proposal in a form that sbatch accepts, and what had to change for it."""
    accounts = list(_possible_accounts(survey, environ))
    head = proposal.heads[0]
    notes: list[str] = []
    if head.sbatch:
        head, notes = _fitted_head(proposal.heads, prober, accounts, survey.qos)
    workers: list[TypeProposal] = []
    said: list[str] = []
    for worker in proposal.workers:
        known = [change for change in possible_changes(accounts, survey.qos, worker) if change.note in notes]
        found = prober.fit(worker, known) or prober.fit(worker, possible_changes(accounts, survey.qos, worker))
        if found is None:
            said.append(f"node type {worker.name} is left out, sbatch refuses it: {prober.refusal(worker)}")
            continue
        fitted, changes = found
        workers.append(fitted)
        said += [f"{worker.name}: {change.note}" for change in changes if change.note not in notes]
    if not workers:
        raise DeployError("sbatch refuses every node type\n  " + "\n  ".join(said))
    names = {worker.name for worker in workers}
    lost = sum(worker.max_workers for worker in proposal.workers if worker.name not in names)
    most = min(proposal.max_workers, max(1, sum(worker.max_workers for worker in proposal.workers) - lost))
    return replace(proposal, heads=[head], workers=workers, max_workers=most), [*notes, *said]


def _fitted_head(
    heads: Sequence[TypeProposal], prober: Prober, accounts: Sequence[str], qos: Sequence[str]
) -> tuple[TypeProposal, list[str]]:
    for head in heads:
        found = prober.fit(head, [])
        if found is not None:
            return head, []
    for head in heads:
        found = prober.fit(head, possible_changes(accounts, qos, head))
        if found is not None:
            return found[0], [change.note for change in found[1]]
    raise DeployError(
        f"sbatch refuses the {HEAD}'s job in every form that was tried: {prober.refusal(heads[0])}\n"
        "  --account, --partition, --qos and --time say what it wants; --head login-node needs no job"
    )


def _possible_accounts(survey: Survey, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield accounts that may be this user's, the likeliest first; where there is accounting SLURM knows better."""
    names = [usual_account(environ), *survey.accounts, *survey.partition_accounts]
    if not survey.accounts:
        # Many sites name accounts like the groups of their people.
        names += survey.groups
    yield from dict.fromkeys(name for name in names if name)
