"""Makes a cluster YAML for the site that it is asked on."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider.agent import network
from ray_slurm_provider.bootstrap import resolve_written
from ray_slurm_provider.cluster_yaml import settings_of
from ray_slurm_provider.deployment.document import Deployment, cluster_document, node_type_lines
from ray_slurm_provider.deployment.probing import MOST_QUESTIONS, Prober, fit, moving, possible_changes
from ray_slurm_provider.deployment.proposal import HEAD, Proposal, TypeProposal, Wishes, propose
from ray_slurm_provider.deployment.survey import Survey
from ray_slurm_provider.errors import DeployError
from ray_slurm_provider.file_sync import on_local_disk
from ray_slurm_provider.files import write_atomically
from ray_slurm_provider.ray_contract import cluster_schema
from ray_slurm_provider.site_file import read_site

# Where sites usually say which file system their hosts share.
_SHARED_VARIABLES = ("SCRATCH", "WORK", "PROJECT", "WORKDIR", "PSCRATCH")
_USUAL_STATE_DIR = "~/.ray-slurm"
_WHAT_TO_SAY = "say what the site wants with --account, --qos, --partition, --time or --head-time"


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
    file_name: str,
    settings: Mapping[str, tuple[Any, str]],
    max_nodes: int | None,
    environ: Mapping[str, str],
    tell: Callable[[str], None],
) -> Deployment:
    """Return a YAML with node types that sbatch accepts; tell each thing that is not as usual."""
    site = read_site()
    if "state_dir" not in settings and not (site and "state_dir" in {**site.defaults.slurm, **site.locked.slurm}):
        settings = {"state_dir": usual_state_dir(survey, environ), **settings}
    proposal = propose(survey, wishes)
    if max_nodes is not None:
        is_job = bool(proposal.heads[0].sbatch)
        proposal = replace(proposal, max_workers=min(proposal.max_workers, max_nodes - is_job))
    section = {name: value for name, (value, _) in settings.items()}
    prober = Prober(settings_of({"provider": {"slurm": section}}), wishes.cluster_name, environ)
    proposal = _fitted(survey, proposal, prober)
    for note in proposal.notes:
        tell(note)
    if proposal.heads[0].sbatch and not prober.keeps_comment(proposal.heads[0]):
        settings = {**settings, "birth_record": ("file", "the site changes the comment of jobs")}
        tell("the site changes the comment of jobs: the provider keeps its records in files")
    types = list(node_type_lines(proposal, knows_priority=_knows_priority()))
    text = cluster_document(survey, wishes, proposal, file_name=file_name, settings=settings, types=types)
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
    if not force and difference(path, text):
        raise DeployError(f"{path} is there already and differs; nothing was written\n  --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, mode=0o644)
    except OSError as error:
        raise DeployError(f"{path} cannot be written: {error.strerror}") from None


def _knows_priority() -> bool:
    (node_type,) = cluster_schema()["properties"]["available_node_types"]["patternProperties"].values()
    return "priority" in node_type["properties"]


def _fitted(survey: Survey, proposal: Proposal, prober: Prober) -> Proposal:
    """Return the proposal in a form that sbatch accepts, with notes on what had to change for it."""
    head, known = proposal.heads[0], list[str]()
    if head.sbatch:
        head, known = _fitted_head(survey, proposal.heads, prober)
    workers, notes, left_out = [], list[str](), list[str]()
    for worker in proposal.workers:
        changes = sorted(possible_changes(survey, worker), key=lambda change: change.note not in known)
        found = fit(worker, changes, prober.refusal)
        if found.refusal:
            left_out.append(f"node type {worker.name} is left out, sbatch refuses it: {found.refusal}")
        else:
            workers.append(found.form)
            notes += [f"{worker.name}: {change.note}" for change in found.changes if change.note not in known]
    if left_out:
        left_out.append(f"at most {MOST_QUESTIONS} forms of a node type are tried; {_WHAT_TO_SAY}")
    if not workers:
        raise DeployError("\n  ".join(["sbatch refuses every node type", *left_out]))
    return replace(
        proposal,
        heads=[head],
        workers=workers,
        max_workers=min(proposal.max_workers, sum(worker.max_workers for worker in workers)),
        notes=[*proposal.notes, *known, *notes, *left_out],
    )


def _fitted_head(survey: Survey, heads: Sequence[TypeProposal], prober: Prober) -> tuple[TypeProposal, list[str]]:
    changes = [*possible_changes(survey, heads[0]), *map(moving, heads[1:])]
    found = fit(heads[0], changes, prober.refusal)
    if found.refusal:
        raise DeployError(
            f"sbatch refuses the {HEAD}'s job in every form that was tried, at most {MOST_QUESTIONS}: {found.refusal}\n"
            f"  {_WHAT_TO_SAY}; --head login-node needs no job"
        )
    return found.form, [change.note for change in found.changes]
