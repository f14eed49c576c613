"""A site file: what an admin decides once for the cluster YAMLs of all users, and how it completes and limits them.

``defaults`` is what a YAML need not say, ``locked`` what it cannot say otherwise, ``limits`` what SLURM cannot limit
itself. Locks and limits are checked twice: when a YAML is read, so that a person gets an answer early, and before each
submission.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ray_slurm_provider.errors import SiteRuleError
from ray_slurm_provider.fields import Count, Line, Section
from ray_slurm_provider.sbatch_options import SbatchOptions, with_defaults

# Another SLURM would know nothing of this site's nodes and jobs.
_ALWAYS_LOCKED = ("slurm_bin", "clusters")
# A YAML adds to these lists; what the site put there stays.
_JOINED = ("prologue", "epilogue", "sbatch_skip", "sbatch_extra", "ssh_args")
# What Ray puts in place of node types that a YAML does not have (ray/autoscaler/_private/providers.py).
_RAY_TYPES = frozenset({"ray.head.default", "ray.worker.default"})


class SiteDefaults(Section):
    """``defaults`` of a site file: a cluster YAML may say otherwise."""

    slurm: dict[str, Any] = {}
    """Keys of ``provider.slurm``."""
    sbatch: SbatchOptions = SbatchOptions()
    """sbatch options of every node type that is a job."""
    head_node_type: Line | None = None
    """The node type of the head."""
    available_node_types: dict[Line, dict[str, Any]] = {}
    """Node types as in a cluster YAML. A YAML without node types gets them all; one that names some of them gets these,
    with what it says of them in place of what stands here."""


class SiteLocks(Section):
    """``locked`` of a site file: a cluster YAML cannot say otherwise."""

    slurm: dict[str, Any] = {}
    """Keys of ``provider.slurm``. To lists such as ``prologue`` a cluster YAML can add."""
    sbatch: SbatchOptions = SbatchOptions()
    """sbatch options of every node type that is a job."""


class SiteLimits(Section):
    """``limits`` of a site file: what SLURM cannot know of a cluster."""

    max_nodes: Count | None = None
    """Nodes of one cluster at a time, its head included when it is a job."""
    max_queued_jobs: Count | None = None
    """Jobs of one cluster that may wait in the queue at a time."""
    login_node_head: bool = True
    """Whether a head may run on the login node."""


class SiteFile(Section):
    """A site file. Resolved configurations carry it, but for the defaults, to hosts that do not see it."""

    site: Line
    """The site's name, for messages."""
    contact: str = ""
    """Whom users may ask, for messages."""
    defaults: SiteDefaults = SiteDefaults()
    """What a cluster YAML need not say."""
    locked: SiteLocks = SiteLocks()
    """What it cannot say otherwise."""
    limits: SiteLimits = SiteLimits()
    """How far it may go in what SLURM does not limit itself."""
    source: Annotated[str, Field(json_schema_extra={"internal": True})] = ""
    """Where it was read; filled in by the provider."""

    def refusal(self, path: str, problem: str, rule: str, allowed: str = "") -> SiteRuleError:
        return SiteRuleError(path, problem, f"{rule} of {self.site} ({self.source})", allowed, self.contact)

    def check_nodes(self, count: int, path: str) -> None:
        most = self.limits.max_nodes
        if most is not None and count > most:
            raise self.refusal(path, f"{count} nodes, the head included", "limits.max_nodes", f"at most {most}")

    def complete_settings(self, section: Mapping[str, Any]) -> dict[str, Any]:
        defaults = self.defaults.slurm
        locked = {**{name: defaults.get(name) for name in _ALWAYS_LOCKED}, **self.locked.slurm}
        self._refuse_locked(section, locked, "provider.slurm", "locked.slurm")
        result = _joined(defaults, locked, section)
        most, asked = self.limits.max_queued_jobs, section.get("max_queued_jobs")
        if most is not None and isinstance(asked, int) and asked > most:
            raise self.refusal(
                "provider.slurm.max_queued_jobs",
                f"{asked} is not allowed here",
                "limits.max_queued_jobs",
                f"at most {most}",
            )
        if result.get("max_queued_jobs") is None:
            result["max_queued_jobs"] = most
        result["site"] = self.model_dump(exclude={"defaults"}, exclude_none=True)
        return result

    def complete(self, config: dict[str, Any], everywhere: Mapping[str, Any]) -> None:
        """Fill in the node types of a cluster YAML, which has some sbatch options for all of them."""
        types = config.get("available_node_types")
        if self.defaults.available_node_types and (types is None or isinstance(types, dict)):
            types = self._chosen_types(config, {} if types is None or set(types) == _RAY_TYPES else types)
        if isinstance(types, dict):
            most = config.get("max_workers", 0)
            config["available_node_types"] = {
                name: self._complete_type(name, entry, most, everywhere) for name, entry in types.items()
            }

    def complete_options(
        self, options: Mapping[str, Any], path: str, of_type: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sbatch options of a node type with what the site says of this type and of all."""
        locked = self.locked.sbatch.chosen()
        self._refuse_locked(options, locked, path, "locked.sbatch")
        for defaults in (of_type or {}, self.defaults.sbatch.chosen()):
            options = with_defaults(options, defaults)
        return with_defaults(locked, options)

    def _chosen_types(self, config: dict[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
        """Return the node types of a cluster, each as its YAML has it, and fill in which one is the head's."""
        ours = self.defaults.available_node_types
        if config.get("head_node_type") in [None, *_RAY_TYPES - set(written)]:
            config["head_node_type"] = self.defaults.head_node_type
        head = config["head_node_type"]
        chosen = dict(written) or {name: {} for name in ours}
        if isinstance(head, str) and head in ours and head not in written:
            return {head: {}} | chosen | {head: {"max_workers": 0}}
        return chosen

    def _complete_type(self, name: str, entry: Any, most: Any, everywhere: Mapping[str, Any]) -> Any:
        """Return a node type with what the site says; a mistake in it as it is, for the models to refuse."""
        ours = self.defaults.available_node_types.get(name)
        if not isinstance(entry, dict):
            return entry
        result = dict(entry)
        if ours is not None:
            result = {"min_workers": 0, **ours, **entry}
            result["max_workers"] = self._workers_of(name, result, ours.get("max_workers", most), most)
        site, own = (ours or {}).get("node_config") or {}, entry.get("node_config")
        if own is None or isinstance(own, dict):
            result["node_config"] = self._complete_node_config(name, own or {}, site, everywhere)
        return result

    def _complete_node_config(
        self, name: str, own: Mapping[str, Any], site: Mapping[str, Any], everywhere: Mapping[str, Any]
    ) -> dict[str, Any]:
        result = {**site, **own}
        options = own.get("sbatch")
        if options is None:
            options = {}
        if isinstance(options, dict) and result.get("placement") != "login_node":  # there it is no job
            path = f"available_node_types.{name}.node_config.sbatch"
            options = self.complete_options(with_defaults(options, everywhere), path, site.get("sbatch"))
        return {**result, "sbatch": options}

    def _workers_of(self, name: str, entry: Mapping[str, Any], limit: Any, most: Any) -> Any:
        """Return how many workers of a type of the site there may be: no more than the site says."""
        asked = entry.get("max_workers", limit)
        if not (isinstance(asked, int) and isinstance(limit, int) and asked > limit):
            return asked
        # Ray has filled in max_workers of all types together where the YAML says nothing.
        if asked == most:
            return limit
        path, rule = f"available_node_types.{name}.max_workers", f"defaults.available_node_types.{name}"
        raise self.refusal(path, f"{asked} is not allowed here", rule, f"at most {limit}")

    def _refuse_locked(self, section: Mapping[str, Any], locked: Mapping[str, Any], path: str, rule: str) -> None:
        for name, fixed in locked.items():
            if name not in section or name in _JOINED:
                continue
            if isinstance(fixed, dict) and isinstance(section[name], dict):
                self._refuse_locked(section[name], fixed, f"{path}.{name}", f"{rule}.{name}")
            elif section[name] != fixed:
                allowed = "" if fixed is None else repr(fixed)
                raise self.refusal(
                    f"{path}.{name}", f"{section[name]!r} is not allowed here", f"{rule}.{name}", allowed
                )


def _joined(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings as one: later ones add to lists and to mappings inside, and win elsewhere."""
    result: dict[str, Any] = {}
    for name, value in ((name, value) for source in sources for name, value in source.items()):
        before = result.get(name)
        if name in _JOINED and isinstance(before, list) and isinstance(value, list):
            result[name] = [*before, *value]
        elif isinstance(before, dict) and isinstance(value, dict):
            result[name] = {**before, **value}
        else:
            result[name] = value
    return result
