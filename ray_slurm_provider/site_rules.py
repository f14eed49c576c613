"""What a site allows: limits that no cluster YAML gets around.

They are checked twice: against the YAML, so that a person gets a good answer early, and against what is about to be
submitted, whatever the YAML was turned into.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ray_slurm_provider.errors import SiteRuleError
from ray_slurm_provider.fields import Count, Line, Section, TimeLimit
from ray_slurm_provider.sbatch_options import SbatchOptions
from ray_slurm_provider.slurm.parse import parse_time_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Requested:
    """An sbatch option that a YAML asks for.

    Attributes:
        path: Where it stands in the YAML.
        name: sbatch's long name, with ``_`` for ``-``.
        value: Its value.
    """

    path: str
    name: str
    value: bool | int | str


class SiteLimits(Section):
    """``limits`` of a site file: what a cluster may have at the most."""

    partitions: list[Line] = []
    """The partitions that may be used; all when it is empty. A node type that names none gets the first."""
    max_nodes: Count | None = None
    """Nodes of one cluster at a time, its head included when it is a job."""
    max_time: TimeLimit | None = None
    """Longest time limit of a job, in quotes; a job that names none gets this one."""
    max_queued_jobs: Count | None = None
    """Jobs of one cluster that may wait in the queue at a time."""
    required_options: list[Line] = []
    """sbatch options that every node type must name, for example ``account``."""
    forbidden_options: list[Line] = []
    """sbatch options that no node type may name, for example ``nodelist``."""
    allowed_values: dict[Line, list[Line]] = {}
    """Patterns for the values of sbatch options: ``container: [/apps/containers/*]``, ``qos: [ray-*]``."""
    state_dir: list[Line] = []
    """Patterns for ``provider.slurm.state_dir``, for example ``/scratch/$USER/*``."""
    login_node_head: bool = True
    """Whether a head may run on the login node."""


class SiteRules(Section):
    """What of a site file is checked again before each submission."""

    site: Line
    """The site's name, for messages."""
    source: str
    """The site file."""
    contact: str = ""
    """Whom to ask."""
    limits: SiteLimits = SiteLimits()
    """What a cluster may have at the most."""
    locked_sbatch: Annotated[SbatchOptions, Field(default_factory=SbatchOptions)]
    """sbatch options with a value that every job has."""

    def refusal(self, path: str, problem: str, rule: str, allowed: str = "") -> SiteRuleError:
        """Return the error for something that a rule of the site does not allow."""
        return SiteRuleError(path, problem, f"{rule} of {self.site} ({self.source})", allowed, self.contact)

    def check_options(self, requested: Sequence[Requested], node_config: str) -> None:
        """Refuse a node type whose sbatch options the site does not allow.

        Args:
            requested: All options that sbatch would see of it.
            node_config: YAML path of its ``node_config``.

        Raises:
            SiteRuleError: A rule does not allow them.
        """
        named = {option.name for option in requested}
        for option in requested:
            self._check_option(option)
        for name, wanted in self._needed():
            if name not in named:
                raise self.refusal(f"{node_config}.sbatch.{name}", "is missing", wanted, "a value")

    def check_nodes(self, count: int, path: str) -> None:
        """Refuse more nodes than the site allows one cluster.

        Raises:
            SiteRuleError: There are more.
        """
        most = self.limits.max_nodes
        if most is not None and count > most:
            raise self.refusal(path, f"{count} nodes, the head included", "limits.max_nodes", f"at most {most}")

    def _check_option(self, option: Requested) -> None:
        limits, values = self.limits, [part.strip() for part in str(option.value).split(",")]
        if option.name in _names(limits.forbidden_options):
            raise self.refusal(option.path, "is not allowed here", "limits.forbidden_options")
        fixed = getattr(self.locked_sbatch, option.name, None)
        if fixed is not None and option.value != fixed:
            raise self.refusal(
                option.path, f"{option.value!r} is not allowed here", f"locked.sbatch.{option.name}", repr(fixed)
            )
        if option.name == "partition" and limits.partitions and not set(values) <= set(limits.partitions):
            raise self.refusal(
                option.path, f"{option.value!r} is not allowed here", "limits.partitions", ", ".join(limits.partitions)
            )
        if option.name in {"time", "time_min"} and limits.max_time is not None:
            self._check_time(option, limits.max_time)
        patterns = {name.replace("-", "_"): found for name, found in limits.allowed_values.items()}.get(option.name)
        if patterns is not None and not all(any(fnmatchcase(value, p) for p in patterns) for value in values):
            raise self.refusal(
                option.path,
                f"{option.value!r} is not allowed here",
                f"limits.allowed_values.{option.name}",
                ", ".join(patterns),
            )

    def _check_time(self, option: Requested, longest: str) -> None:
        limit_s = parse_time_s(longest)
        try:
            wanted_s = parse_time_s(str(option.value))
        except ValueError:
            wanted_s = None
        if limit_s is not None and (wanted_s is None or wanted_s > limit_s):
            raise self.refusal(
                option.path, f"{option.value!r} is not allowed here", "limits.max_time", f"at most {longest}"
            )

    def _needed(self) -> Iterator[tuple[str, str]]:
        """Yield the options that must be there, and the rule that says so."""
        for name in _names(self.limits.required_options):
            yield name, "limits.required_options"
        if self.limits.partitions:
            yield "partition", "limits.partitions"
        if self.limits.max_time is not None:
            yield "time", "limits.max_time"
        for name in self.locked_sbatch.chosen():
            yield name, f"locked.sbatch.{name}"


def _names(names: Sequence[str]) -> list[str]:
    return [name.removeprefix("--").replace("-", "_") for name in names]
