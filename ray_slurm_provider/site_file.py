"""Where the site file is, how it is read, and what it allows.

Every command reads it, and so does the head before it submits, where it is there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider.config import NodeConfig, SlurmSettings, read_node_config, read_section, read_settings
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.sbatch_options import option_name, ways_around
from ray_slurm_provider.site_rules import SiteFile

SITE_VARIABLE = "RAY_SLURM_SITE"
_OF_THE_HOST = Path("/etc/ray-slurm/site.yaml")
_BELOW_PREFIX = "etc/ray-slurm/site.yaml"
# Limits that site files had, and what does their work.
_FORMER_LIMITS = {
    "partitions": "SLURM does this itself, with AllowAccounts, AllowGroups or AllowQos of the partition",
    "max_time": "SLURM does this itself, with MaxTime of the partition or MaxWall of a QOS",
    "required_options": "SLURM does this itself, with a job_submit plugin",
    "forbidden_options": "SLURM does this itself, with a job_submit plugin",
    "allowed_values": "SLURM does this itself, with AllowAccounts and AllowQos or a job_submit plugin",
    "state_dir": "locked.slurm.state_dir does this, also with $USER in the path",
}


def find_site_file() -> Path | None:
    """Return the site file that counts here, None where there is none.

    One that the admin has put into its fixed place cannot be replaced by a variable.
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
    """Return the site file that counts here, None where there is none."""
    path = None if _overlooked.get() else find_site_file()
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_site(text, path)


def parse_site(text: str, path: Path) -> SiteFile:
    """Return the site file of a text; the path is for messages."""
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


def rules_in_force(settings: SlurmSettings) -> SiteFile | None:
    """Return the site file; where there is none to be seen, as on some compute nodes, what `ray up` has read of it."""
    return read_site() or settings.site


def check_node_config(site: SiteFile, settings: SlurmSettings, config: NodeConfig, path: str) -> None:
    """Refuse a node type that the site does not allow."""
    if config.placement == "login_node":
        if not site.limits.login_node_head:
            raise site.refusal(f"{path}.placement", "login_node is not allowed here", "limits.login_node_head")
        return
    for name, fixed in site.locked.sbatch.chosen().items():
        value, rule = getattr(config.sbatch, name), f"locked.sbatch.{name}"
        if value != fixed:
            problem = "is missing" if value is None else f"{value!r} is not allowed here"
            raise site.refusal(f"{path}.sbatch.{name}", problem, rule, repr(fixed))
        around = ways_around(name)
        if other := next((other for other in config.sbatch.chosen() if other in around), ""):
            raise site.refusal(f"{path}.sbatch.{other}", "is not allowed here", rule, f"{name}: {fixed!r}")
        # Of two directives of one name sbatch takes the last.
        for key, names in (("sbatch_skip", {name}), ("sbatch_extra", {name, *around})):
            for where, section in (("provider.slurm", settings), (path, config)):
                if names & set(map(option_name, getattr(section, key))):
                    raise site.refusal(f"{where}.{key}", f"{name} is not allowed here", rule, repr(fixed))
    _refuse_other_extras(site, settings, config, path)


def _refuse_other_extras(site: SiteFile, settings: SlurmSettings, config: NodeConfig, path: str) -> None:
    """Refuse a directive that would win over one which the site has locked, for it stands behind that."""
    locked = site.locked.slurm.get("sbatch_extra") or []
    names = {name for directive in locked for name in (option_name(directive), *ways_around(option_name(directive)))}
    for where, section in (("provider.slurm", settings), (path, config)):
        for directive in section.sbatch_extra:
            if directive not in locked and option_name(directive) in names:
                rule, allowed = "locked.slurm.sbatch_extra", ", ".join(locked)
                raise site.refusal(f"{where}.sbatch_extra", f"{directive} is not allowed here", rule, allowed)


def _of_the_installation() -> Path | None:
    """Return the place of a site file that `install_site.sh` made beside the installed package."""
    here = Path(__file__).resolve()
    if here.parents[1].name not in {"site-packages", "dist-packages"}:
        return None
    return here.parents[4] / _BELOW_PREFIX
