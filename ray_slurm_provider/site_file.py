"""The site file: what an admin decides once for the cluster YAMLs of all users.

``defaults`` is what a YAML need not say, ``locked`` what it cannot say otherwise, ``limits`` what SLURM cannot limit
itself. Every command reads the file, and so does the head before it submits, where it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from ray_slurm_provider.config import (
    NodeConfig,
    SlurmSettings,
    read_node_config,
    read_section,
    read_settings,
    with_alternatives,
    with_defaults,
)
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.fields import Line, Section
from ray_slurm_provider.sbatch_options import SbatchOptions, option_name
from ray_slurm_provider.site_rules import SiteLimits, SiteRules

SITE_VARIABLE = "RAY_SLURM_SITE"
_OF_THE_HOST = Path("/etc/ray-slurm/site.yaml")
_BELOW_PREFIX = "etc/ray-slurm/site.yaml"
# Another SLURM would know nothing of this site's nodes and jobs.
_ALWAYS_LOCKED = ("slurm_bin", "clusters")
# A YAML adds to these lists; what the site put there stays.
_JOINED = ("prologue", "epilogue", "sbatch_skip", "sbatch_extra", "ssh_args")
# What Ray puts in place of node types that a YAML does not have (ray/autoscaler/_private/providers.py).
_RAY_TYPES = frozenset({"ray.head.default", "ray.worker.default"})
# Limits that site files had, and what does their work.
_FORMER_LIMITS = {
    "partitions": "SLURM does this itself, with AllowAccounts, AllowGroups or AllowQos of the partition",
    "max_time": "SLURM does this itself, with MaxTime of the partition or MaxWall of a QOS",
    "required_options": "SLURM does this itself, with a job_submit plugin",
    "forbidden_options": "SLURM does this itself, with a job_submit plugin",
    "allowed_values": "SLURM does this itself, with AllowAccounts and AllowQos or a job_submit plugin",
    "state_dir": "locked.slurm.state_dir does this, also with $USER in the path",
}


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


class SiteFile(Section):
    """A site file."""

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

    @property
    def rules(self) -> SiteRules:
        """What is checked again before each submission."""
        return SiteRules(
            site=self.site,
            source=self.source,
            contact=self.contact,
            limits=self.limits,
            locked_sbatch=self.locked.sbatch,
        )

    def complete_settings(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``provider.slurm`` with what the site says.

        Raises:
            SiteRuleError: It contradicts a lock.
        """
        defaults = self.defaults.slurm
        locked = {**{name: defaults.get(name) for name in _ALWAYS_LOCKED}, **self.locked.slurm}
        self._refuse_locked(section, locked, "provider.slurm", "locked.slurm")
        result = _joined(defaults, locked, section)
        most, asked = self.limits.max_queued_jobs, section.get("max_queued_jobs")
        if most is not None and isinstance(asked, int) and asked > most:
            raise self.rules.refusal(
                "provider.slurm.max_queued_jobs",
                f"{asked} is not allowed here",
                "limits.max_queued_jobs",
                f"at most {most}",
            )
        if result.get("max_queued_jobs") is None:
            result["max_queued_jobs"] = most
        result["site"] = self.rules.model_dump(exclude_none=True)
        return result

    def complete(self, config: dict[str, Any], everywhere: Mapping[str, Any]) -> None:
        """Fill in the node types of a cluster YAML, and their sbatch options.

        Args:
            config: The cluster YAML.
            everywhere: sbatch options that it has for all node types.

        Raises:
            SiteRuleError: They contradict a lock.
        """
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
        """Return the sbatch options of a node type with what the site says.

        Args:
            options: What a cluster YAML says.
            path: Where.
            of_type: What the site says of this node type.

        Raises:
            SiteRuleError: They contradict a lock.
        """
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
        raise self.rules.refusal(path, f"{asked} is not allowed here", rule, f"at most {limit}")

    def _refuse_locked(self, section: Mapping[str, Any], locked: Mapping[str, Any], path: str, rule: str) -> None:
        for name, fixed in locked.items():
            if name not in section or name in _JOINED:
                continue
            if isinstance(fixed, dict) and isinstance(section[name], dict):
                self._refuse_locked(section[name], fixed, f"{path}.{name}", f"{rule}.{name}")
            elif section[name] != fixed:
                allowed = "" if fixed is None else repr(fixed)
                raise self.rules.refusal(
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


def find_site_file() -> Path | None:
    """Return the site file that counts here, None where there is none.

    One that the admin has put into its fixed place cannot be replaced by a variable.

    Raises:
        ConfigError: ``RAY_SLURM_SITE`` names another one, or one that does not exist.
    """
    fixed = next((path for path in (_OF_THE_HOST, _of_the_installation()) if path is not None and path.exists()), None)
    named = os.environ.get(SITE_VARIABLE)
    if not named:
        return fixed
    path = Path(named).expanduser()
    if fixed is not None and not (path.exists() and path.samefile(fixed)):
        raise ConfigError(SITE_VARIABLE, f"names {named}, but this site's file is {fixed}", f"unset {SITE_VARIABLE}")
    if not path.is_file():
        raise ConfigError(SITE_VARIABLE, f"names {named}, which is no file", "the site's file, or unset it")
    return path


def site_file_to_write() -> Path:
    """Return where an admin's site file goes."""
    named = os.environ.get(SITE_VARIABLE)
    if named:
        return Path(named).expanduser()
    installed = _of_the_installation()
    return installed if installed is not None and installed.parent.is_dir() else _OF_THE_HOST


_overlooked: ContextVar[bool] = ContextVar("overlooked", default=False)


@contextmanager
def without_site_file() -> Iterator[None]:
    """Overlook the site file, for the admin who makes a new one."""
    token = _overlooked.set(True)
    try:
        yield
    finally:
        _overlooked.reset(token)


def read_site() -> SiteFile | None:
    """Return the site file that counts here, None where there is none.

    Raises:
        ConfigError: It cannot be read or holds a mistake.
    """
    path = None if _overlooked.get() else find_site_file()
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_site(text, path)


def parse_site(text: str, path: Path) -> SiteFile:
    """Return the site file of a text.

    Args:
        text: The YAML.
        path: Where it is, for messages.

    Raises:
        ConfigError: It holds a mistake.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {error}") from None
    try:
        _refuse_former_limits(value)
        site = read_section(SiteFile, value, "site file")
        _check(site)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.path.removeprefix('site file.')}", error.problem, error.allowed) from None
    return site.model_copy(update={"source": str(path)})


def _check(site: SiteFile) -> None:
    """Refuse mistakes inside the parts that are written as in a cluster YAML."""
    if site.source:
        raise ConfigError("source", "unknown key", ", ".join(SiteFile.model_fields))
    for kind, section in (("defaults", site.defaults.slurm), ("locked", site.locked.slurm)):
        if "sbatch" in section:
            raise ConfigError(f"{kind}.slurm.sbatch", "unknown key", f"{kind}.sbatch")
        read_settings(section, f"{kind}.slurm")
    types, head = site.defaults.available_node_types, site.defaults.head_node_type
    for name, entry in types.items():
        read_node_config(entry.get("node_config"), f"defaults.available_node_types.{name}.node_config")
    if types and head not in types:
        raise ConfigError("defaults.head_node_type", f"{head!r} is no node type", ", ".join(types))


def _refuse_former_limits(value: Any) -> None:
    limits = value.get("limits") if isinstance(value, dict) else None
    for name, way in _FORMER_LIMITS.items():
        if isinstance(limits, dict) and name in limits:
            raise ConfigError(f"limits.{name}", f"{way}; docs/site.md shows how")


def rules_in_force(settings: SlurmSettings) -> SiteRules | None:
    """Return what must be checked before a submission.

    The site file says it; where there is none to be seen, as on some compute nodes, what `ray up` has read.
    """
    site = read_site()
    return site.rules if site is not None else settings.site


def check_node_config(rules: SiteRules, settings: SlurmSettings, config: NodeConfig, path: str) -> None:
    """Refuse a node type that the site does not allow.

    Args:
        rules: What the site allows.
        settings: ``provider.slurm``.
        config: The ``node_config``.
        path: Its YAML path.

    Raises:
        SiteRuleError: A rule does not allow it.
    """
    if config.placement == "login_node":
        if not rules.limits.login_node_head:
            raise rules.refusal(f"{path}.placement", "login_node is not allowed here", "limits.login_node_head")
        return
    for name, fixed in rules.locked_sbatch.chosen().items():
        value, rule = getattr(config.sbatch, name), f"locked.sbatch.{name}"
        if value != fixed:
            problem = "is missing" if value is None else f"{value!r} is not allowed here"
            raise rules.refusal(f"{path}.sbatch.{name}", problem, rule, repr(fixed))
        # Of two directives of one name sbatch takes the last.
        for key, names in (("sbatch_skip", {name}), ("sbatch_extra", with_alternatives([name]))):
            for where, section in (("provider.slurm", settings), (path, config)):
                if names & set(map(option_name, getattr(section, key))):
                    raise rules.refusal(f"{where}.{key}", f"{name} is not allowed here", rule, repr(fixed))


def _of_the_installation() -> Path | None:
    """Return the place of a site file that `install_site.sh` made beside the installed package."""
    here = Path(__file__).resolve()
    if here.parents[1].name not in {"site-packages", "dist-packages"}:
        return None
    return here.parents[4] / _BELOW_PREFIX
