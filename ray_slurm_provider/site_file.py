"""The site file: what an admin decides once for the cluster YAMLs of all users.

``defaults`` is what a YAML need not say, ``locked`` what it cannot say otherwise, ``limits`` how far it may go. The
file is read anew by every command, and by the head before it submits, where it is there.
"""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field

from ray_slurm_provider.config import (
    NodeConfig,
    SlurmSettings,
    expanded,
    read_node_config,
    read_section,
    read_settings,
    requested_options,
    with_defaults,
)
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.fields import Line, Section
from ray_slurm_provider.sbatch_options import SKIPPABLE_OPTIONS, SbatchOptions
from ray_slurm_provider.site_rules import SiteLimits, SiteRules
from ray_slurm_provider.slurm.parse import parse_time_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SITE_VARIABLE = "RAY_SLURM_SITE"
_OF_THE_HOST = Path("/etc/ray-slurm/site.yaml")
_BELOW_PREFIX = "etc/ray-slurm/site.yaml"
# Where the tools are and which SLURM they speak to would undo every other rule.
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
    """How far it may go."""
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
        defaults, locked = self.defaults.slurm, self.locked.slurm
        self._refuse_locked(section, locked, "provider.slurm", "locked.slurm")
        for name in _ALWAYS_LOCKED:
            fixed = locked.get(name, defaults.get(name))
            if section.get(name, fixed) != fixed:
                raise self.rules.refusal(
                    f"provider.slurm.{name}", f"{section[name]!r} is not allowed here", f"locked.slurm.{name}"
                )
        result = {**defaults, **section, **locked}
        # What is of another type than it should be is left for the models to refuse.
        for name in _JOINED:
            parts = [source[name] for source in (defaults, locked, section) if name in source]
            wrong = [part for part in parts if not isinstance(part, list)]
            if parts:
                result[name] = wrong[0] if wrong else [line for part in parts for line in part]
        if isinstance(result.get("ports"), dict) and isinstance(section.get("ports", {}), dict):
            ports = (source.get("ports", {}) for source in (defaults, section, locked))
            result["ports"] = {key: value for part in ports for key, value in part.items()}
        elif "ports" in section:
            result["ports"] = section["ports"]
        most = self.limits.max_queued_jobs
        if most is not None and self._more(section.get("max_queued_jobs"), most):
            raise self.rules.refusal(
                "provider.slurm.max_queued_jobs",
                f"{section['max_queued_jobs']} is not allowed here",
                "limits.max_queued_jobs",
                f"at most {most}",
            )
        if most is not None and result.get("max_queued_jobs") is None:
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
        self._complete_types(config, everywhere)
        types = config.get("available_node_types")
        for name, entry in types.items() if isinstance(types, dict) else ():
            node_config = entry.get("node_config") if isinstance(entry, dict) else None
            if isinstance(entry, dict) and node_config is None:
                node_config = entry["node_config"] = {}
            if not isinstance(node_config, dict) or node_config.get("placement") == "login_node":
                continue
            options = node_config.get("sbatch")
            if options is None or isinstance(options, dict):
                path = f"available_node_types.{name}.node_config.sbatch"
                node_config["sbatch"] = self.complete_options(options or {}, path)

    def check_state_dir(self, settings: SlurmSettings) -> None:
        """Refuse a state_dir that the site does not allow, also by a way round.

        Raises:
            SiteRuleError: It matches none of the patterns.
        """
        patterns = self.limits.state_dir
        if not patterns:
            return
        wanted = str(settings.directory())
        real = os.path.realpath(wanted)
        for pattern in map(expanded, patterns):
            if fnmatchcase(wanted, pattern) and any(fnmatchcase(real, p) for p in (pattern, _real_pattern(pattern))):
                return
        raise self.rules.refusal(
            "provider.slurm.state_dir", f"{wanted} is not allowed here", "limits.state_dir", ", ".join(patterns)
        )

    @staticmethod
    def _more(value: Any, most: int) -> bool:
        return isinstance(value, int) and value > most

    def _complete_types(self, config: dict[str, Any], everywhere: Mapping[str, Any]) -> None:
        ours = self.defaults.available_node_types
        types = config.get("available_node_types")
        if not ours or not (isinstance(types, dict) or types is None):
            return
        written = {} if types is None or set(types) == _RAY_TYPES else types
        if config.get("head_node_type") is None or config["head_node_type"] in [
            t for t in _RAY_TYPES if t not in written
        ]:
            config["head_node_type"] = self.defaults.head_node_type
        head = config["head_node_type"] if isinstance(config["head_node_type"], str) else ""
        chosen = list(written) or list(ours)
        if head not in chosen and head in ours:
            chosen.insert(0, head)
        most = config.get("max_workers", 0)
        config["available_node_types"] = {
            name: self._joined_type(name, written.get(name), most, everywhere) for name in chosen
        }
        if head in chosen and head not in written:
            config["available_node_types"][head]["max_workers"] = 0

    def _joined_type(self, name: str, written: Any, most: Any, everywhere: Mapping[str, Any]) -> Any:
        ours = copy.deepcopy(self.defaults.available_node_types.get(name))
        if ours is None or not (isinstance(written, dict) or written is None):
            return written
        limit = ours.get("max_workers", most)
        result = {"min_workers": 0, **ours, **(written or {})}
        asked = result.get("max_workers", limit)
        # Ray has filled in max_workers of all types together where the YAML says nothing.
        if isinstance(asked, int) and isinstance(limit, int) and asked > limit:
            if asked != most:
                path = f"available_node_types.{name}.max_workers"
                rule = f"defaults.available_node_types.{name}"
                raise self.rules.refusal(path, f"{asked} is not allowed here", rule, f"at most {limit}")
            asked = limit
        result["max_workers"] = asked
        inner, given = ours.get("node_config") or {}, (written or {}).get("node_config") or {}
        if isinstance(inner, dict) and isinstance(given, dict):
            if given.get("placement") == "login_node":
                inner.pop("sbatch", None)  # it is no job any more
            result["node_config"] = {**inner, **given}
            options, own = inner.get("sbatch"), given.get("sbatch") or {}
            own = with_defaults(own, everywhere) if isinstance(own, dict) else own
            if isinstance(options, dict) and isinstance(own, dict):
                result["node_config"]["sbatch"] = with_defaults(own, options)
        return result

    def complete_options(self, options: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Return the sbatch options of a node type with what the site says.

        Raises:
            SiteRuleError: They contradict a lock.
        """
        locked = self.locked.sbatch.chosen()
        self._refuse_locked(options, locked, path, "locked.sbatch")
        result = {**with_defaults(options, self.defaults.sbatch.chosen()), **locked}
        if self.limits.partitions:
            result.setdefault("partition", self.limits.partitions[0])
        if self.limits.max_time is not None:
            result.setdefault("time", self.limits.max_time)
        return result

    def _refuse_locked(self, section: Mapping[str, Any], locked: Mapping[str, Any], path: str, rule: str) -> None:
        for name, fixed in locked.items():
            if name not in section or name in _JOINED:
                continue
            if isinstance(fixed, dict) and isinstance(section[name], dict):
                self._refuse_locked(section[name], fixed, f"{path}.{name}", f"{rule}.{name}")
            elif section[name] != fixed:
                raise self.rules.refusal(
                    f"{path}.{name}", f"{section[name]!r} is not allowed here", f"{rule}.{name}", repr(fixed)
                )


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
    if isinstance(site.limits.max_time, str) and parse_time_s(site.limits.max_time) is None:
        raise ConfigError("limits.max_time", "is no limit", "a time, in quotes")
    known = {*SbatchOptions.model_fields, *SKIPPABLE_OPTIONS}
    for name in ("required_options", "forbidden_options", "allowed_values"):
        for option in getattr(site.limits, name):
            if option.removeprefix("--").replace("-", "_") not in known:
                raise ConfigError(
                    f"limits.{name}", f"{option!r} is no option of a node type", "names of sbatch options"
                )


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
    rules.check_options(requested_options(settings, config, path), path)


def _of_the_installation() -> Path | None:
    """Return the place of a site file that `install_site.sh` made beside the installed package."""
    here = Path(__file__).resolve()
    if here.parents[1].name not in {"site-packages", "dist-packages"}:
        return None
    return here.parents[4] / _BELOW_PREFIX


def _real_pattern(pattern: str) -> str:
    """Return a pattern with the links in its fixed part resolved: the site's own links are no way round."""
    fixed = Path(*[part for part in Path(pattern).parts if not set(part) & set("*?[")])
    return os.path.realpath(fixed) + pattern.removeprefix(str(fixed))
