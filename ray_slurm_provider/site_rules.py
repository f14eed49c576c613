"""What no cluster YAML gets around at a site.

Checked twice: when a YAML is read, so that a person gets an answer early, and before each submission.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ray_slurm_provider.errors import SiteRuleError
from ray_slurm_provider.fields import Count, Line, Section
from ray_slurm_provider.sbatch_options import SbatchOptions


class SiteLimits(Section):
    """``limits`` of a site file: what SLURM cannot know of a cluster."""

    max_nodes: Count | None = None
    """Nodes of one cluster at a time, its head included when it is a job."""
    max_queued_jobs: Count | None = None
    """Jobs of one cluster that may wait in the queue at a time."""
    login_node_head: bool = True
    """Whether a head may run on the login node."""


class SiteRules(Section):
    """What resolved configurations carry of a site file, for hosts that do not see it."""

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

    def check_nodes(self, count: int, path: str) -> None:
        """Refuse more nodes than the site allows one cluster.

        Raises:
            SiteRuleError: There are more.
        """
        most = self.limits.max_nodes
        if most is not None and count > most:
            raise self.refusal(path, f"{count} nodes, the head included", "limits.max_nodes", f"at most {most}")
