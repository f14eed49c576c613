"""Finds the form of a job that a site accepts, by asking `sbatch --test-only`.

Sites forbid `--mem`, want an account, a QOS, shorter times; what they say about it is free text. So changes are tried,
the smallest first, until sbatch accepts the job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings, read_node_config
from ray_slurm_provider.deployment.proposal import Option, TypeProposal
from ray_slurm_provider.errors import SlurmError, SlurmUnavailable
from ray_slurm_provider.site_file import read_site
from ray_slurm_provider.slurm.parse import format_time, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_MOST_CHANGES = 3
_MOST_TRIALS = 400
_SHORTER_S = (3600, 1800, 600)
_DIRECTIVES = ("signal", "no_requeue", "open_mode", "job_name", "nodes", "ntasks", "cpus_per_task")


@dataclass(frozen=True)
class Change:
    """One thing to do otherwise.

    Attributes:
        what: What it is about; of several about the same only one is tried at a time.
        note: One line for a person.
        apply: Makes the other proposal.
    """

    what: str
    note: str
    apply: Callable[[TypeProposal], TypeProposal]


class Prober:
    """Asks whether a site would accept a node type.

    Args:
        settings: ``provider.slurm`` of the cluster.
        cluster_name: The cluster's name.
        environ: The environment of `ray up`.
    """

    def __init__(self, settings: SlurmSettings, cluster_name: str, environ: Mapping[str, str]) -> None:
        self._cluster = Cluster(cluster_name, settings, environ)
        self._slurm = self._cluster.slurm_client()
        self._environ = job_environment(environ)
        self._site = read_site()

    def script(self, proposed: TypeProposal, **further: bool) -> str:
        """Return the batch script of a node type, with further sbatch options."""
        options: dict[str, Any] = {name: option.value for name, option in proposed.sbatch.items()}
        if self._site is not None:
            options = self._site.complete_options(options, f"available_node_types.{proposed.name}.node_config.sbatch")
        section = {"sbatch": {**options, **further}, "sbatch_skip": list(proposed.skip)}
        config = read_node_config(section, f"available_node_types.{proposed.name}.node_config")
        return self._cluster.preview(proposed.name, config, head=proposed.name == "head")

    def refusal(self, proposed: TypeProposal) -> str:
        """Return why sbatch would refuse a job of this type; "" when it would not.

        Raises:
            SlurmUnavailable: Nobody answers.
        """
        try:
            self._slurm.test_submit(self.script(proposed), self._environ)
        except SlurmUnavailable:
            raise
        except SlurmError as error:
            return error.complaint
        return ""

    def fit(self, proposed: TypeProposal, changes: Sequence[Change]) -> tuple[TypeProposal, list[Change]] | None:
        """Return a form of a node type that sbatch accepts, and what had to change; None when there is none."""
        for chosen in islice(_combinations(changes), _MOST_TRIALS):
            candidate = proposed
            for change in chosen:
                candidate = change.apply(candidate)
            if (candidate != proposed or not chosen) and not self.refusal(candidate):
                return candidate, list(chosen)
        return None

    def keeps_comment(self, proposed: TypeProposal) -> bool:
        """Tell whether SLURM keeps the comment of a job, by a held job that is cancelled at once."""
        try:
            job_id = self._slurm.submit(self.script(proposed, hold=True), self._environ)
        except SlurmUnavailable:
            raise
        except SlurmError:
            return True  # a site without held jobs: `ray up` will tell
        try:
            return any(job.job_id == job_id and '"t":"TOKEN"' in job.comment for job in self._slurm.jobs())
        finally:
            self._slurm.cancel([job_id])


def possible_changes(accounts: Iterable[str], qos: Iterable[str], proposed: TypeProposal) -> list[Change]:
    """Return what may be tried with a node type that was refused, the likeliest first."""
    return list(_changes(accounts, qos, proposed))


def _changes(accounts: Iterable[str], qos: Iterable[str], proposed: TypeProposal) -> Iterator[Change]:
    options = proposed.sbatch
    if "account" not in options:
        for account in accounts:
            yield _adding("account", account, "the site wants an account")
    if "mem" in options:
        yield Change("mem", "without --mem, which the site refuses", lambda p: p.without_options(["mem"]))
    if "qos" not in options:
        for name in qos:
            yield _adding("qos", name, "the site wants a QOS")
    if "gres" in options:
        yield Change("gres", "with --gpus-per-node in place of --gres", _gpus_per_node)
    limit = parse_time_s(str(options["time"].value)) if "time" in options else None
    for shorter in _SHORTER_S:
        if limit is None or shorter < limit:
            yield _adding("time", format_time(shorter), "more is refused")
    for name in _DIRECTIVES:
        yield _skipping(name)


def _adding(name: str, value: str, why: str) -> Change:
    return Change(name, f"with --{name}={value}: {why}", lambda p: p.with_options({name: Option(value, why)}))


def _skipping(name: str) -> Change:
    option = name.replace("_", "-")
    return Change(
        f"skip {name}",
        f"without --{option}, which the site refuses",
        lambda p: replace(p, skip=[*dict.fromkeys([*p.skip, name])]),
    )


def _gpus_per_node(proposed: TypeProposal) -> TypeProposal:
    if "gres" not in proposed.sbatch:
        return proposed
    value = str(proposed.sbatch["gres"].value).removeprefix("gpu:")
    return proposed.without_options(["gres"]).with_options({"gpus_per_node": Option(value, "all GPUs of a node")})


def _combinations(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    for count in range(_MOST_CHANGES + 1):
        for chosen in combinations(changes, count):
            if len({change.what for change in chosen}) == len(chosen):
                yield chosen
