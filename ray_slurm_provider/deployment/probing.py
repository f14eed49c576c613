"""Finds the form of a job that a site accepts, by asking `sbatch --test-only`.

Sites forbid `--mem`, want an account, a QOS, shorter times; what they say about it is free text. So a job is changed in
one thing at a time, first in what sbatch's words point at. Each question is a scheduling run in slurmctld, so few are
asked.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings, read_node_config
from ray_slurm_provider.deployment.proposal import Option, TypeProposal
from ray_slurm_provider.deployment.survey import Survey
from ray_slurm_provider.errors import SlurmError, SlurmUnavailable
from ray_slurm_provider.site_file import read_site
from ray_slurm_provider.slurm.parse import format_time, parse_time_s

# Questions to sbatch about one node type.
MOST_QUESTIONS = 20
_SHORTER_S = (3600, 1800, 600)
_DIRECTIVES = ("signal", "no_requeue", "open_mode", "job_name", "nodes", "ntasks", "cpus_per_task")
# Words of sbatch and of sites' plugins that point at something to change; a directive is pointed at by its name.
_POINTERS = {
    "account": r"account(?!ing)|project",
    "mem": r"\bmem|configuration",
    "qos": r"qos|quality|policy",
    "gres": r"gres|gpu|generic|configuration",
    "time": r"time|policy",
    "partition": r"partition|queue|group|configuration",
    "no_requeue": r"requeue",
}


@dataclass(frozen=True)
class Change:
    """One thing to do otherwise."""

    what: str  # of several about the same the last one holds
    note: str  # for a person
    apply: Callable[[TypeProposal], TypeProposal]

    def is_meant(self, words: str) -> bool:
        """Whether a refusal points at what this changes."""
        return bool(re.search(_POINTERS.get(self.what, self.what.replace("_", ".")), words, re.IGNORECASE))

    def helps(self, before: str, after: str) -> bool:
        """Whether one refusal is gone for another one, which is not about this change."""
        return not after or (_plain(after) != _plain(before) and (self.is_meant(before) or not self.is_meant(after)))


@dataclass(frozen=True)
class Fit:
    """How far a node type came."""

    form: TypeProposal
    changes: Sequence[Change]  # what had to be done for this form
    refusal: str  # sbatch's last words on it; "" when it is accepted


def fit(proposed: TypeProposal, changes: Sequence[Change], refusal_of: Callable[[TypeProposal], str]) -> Fit:
    """Change a node type until sbatch accepts it, there is nothing left to try, or `MOST_QUESTIONS` were asked."""
    found = Fit(proposed, [], refusal_of(proposed))
    left, tried = list(changes), list[str]()
    while found.refusal and left and len(tried) < MOST_QUESTIONS - 1:
        change = _likeliest(left, found.refusal, tried)
        left.remove(change)
        tried.append(change.what)
        form = change.apply(found.form)
        refusal = refusal_of(form)
        if change.helps(found.refusal, refusal):
            made = [other for other in found.changes if other.what != change.what]
            found = Fit(form, [*made, change], refusal)
    return found


def _likeliest(changes: Sequence[Change], refusal: str, tried: Sequence[str]) -> Change:
    return min(changes, key=lambda change: (not change.is_meant(refusal), tried.count(change.what)))


def _plain(words: str) -> str:
    """Return a refusal without numbers: a time of day or a size in it says nothing new."""
    return re.sub(r"\d+", "", words)


class Prober:
    """Asks whether a site would accept a node type."""

    def __init__(self, settings: SlurmSettings, cluster_name: str, environ: Mapping[str, str]) -> None:
        self._cluster = Cluster(cluster_name, settings, environ)
        self._slurm = self._cluster.slurm_client()
        self._environ = job_environment(environ)
        self._site = read_site()

    def refusal(self, proposed: TypeProposal) -> str:
        """Return why sbatch would refuse a job of this type; "" when it would not."""
        try:
            self._slurm.test_submit(self._script(proposed), self._environ)
        except SlurmUnavailable:
            raise
        except SlurmError as error:
            return error.complaint
        return ""

    def keeps_comment(self, proposed: TypeProposal) -> bool:
        """Ask whether SLURM keeps the comment of a job, by a held job that is cancelled at once."""
        try:
            job_id = self._slurm.submit(self._script(proposed, hold=True), self._environ)
        except SlurmUnavailable:
            raise
        except SlurmError:
            return True  # a site without held jobs: `ray up` will tell
        try:
            return any(job.job_id == job_id and '"t":"TOKEN"' in job.comment for job in self._slurm.jobs())
        finally:
            self._slurm.cancel([job_id])

    def _script(self, proposed: TypeProposal, **further: bool) -> str:
        options: dict[str, Any] = {name: option.value for name, option in proposed.sbatch.items()}
        if self._site is not None:
            options = self._site.complete_options(options, f"available_node_types.{proposed.name}.node_config.sbatch")
        section = {"sbatch": {**options, **further}, "sbatch_skip": list(proposed.skip)}
        config = read_node_config(section, f"available_node_types.{proposed.name}.node_config")
        return self._cluster.preview(proposed.name, config, head=proposed.name == "head")


def possible_changes(survey: Survey, proposed: TypeProposal) -> Iterator[Change]:
    """Yield what may be tried with a node type that was refused, the likeliest first."""
    options = proposed.sbatch
    if "account" not in options:
        for account in survey.accounts:
            yield _adding("account", account, "the site wants an account")
    if "mem" in options:
        yield Change("mem", "without --mem, which the site refuses", lambda p: p.without_option("mem"))
    if "qos" not in options:
        for name in survey.qos:
            yield _adding("qos", name, "the site wants a QOS")
    if "gres" in options:
        yield Change("gres", "with --gpus-per-node in place of --gres", _gpus_per_node)
    limit = parse_time_s(str(options["time"].value)) if "time" in options else None
    for shorter in _SHORTER_S:
        if limit is None or shorter < limit:
            yield _adding("time", format_time(shorter), "more is refused")
    for name in _DIRECTIVES:
        yield _skipping(name)


def moving(head: TypeProposal) -> Change:
    """Return the change of another head into one in the partition of this one."""
    place = {name: head.sbatch[name] for name in ("partition", "mem", "time") if name in head.sbatch}
    return Change(
        "partition",
        f"in partition {place['partition'].value}, for sbatch refuses it elsewhere",
        lambda p: p.with_options({name: option for name, option in place.items() if name in p.sbatch}),
    )


def _adding(name: str, value: str, why: str) -> Change:
    return Change(name, f"with --{name}={value}: {why}", lambda p: p.with_options({name: Option(value, why)}))


def _skipping(name: str) -> Change:
    note = f"without --{name.replace('_', '-')}, which the site refuses"
    return Change(name, note, lambda p: replace(p, skip=[*p.skip, name]))


def _gpus_per_node(proposed: TypeProposal) -> TypeProposal:
    value = str(proposed.sbatch["gres"].value).removeprefix("gpu:")
    return proposed.without_option("gres").with_options({"gpus_per_node": Option(value, "all GPUs of a node")})
