"""Reads what concerns us from a cluster YAML. Imports no Ray, so that commands start fast."""

from pathlib import Path
from typing import Any

import yaml

from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings, check_cluster_name, read_settings
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.site_file import read_site


def load(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("provider"), dict):
        raise ConfigError(str(path), "is no cluster YAML: it has no section provider")
    return value


def open_cluster(path: Path) -> Cluster:
    """Return the cluster of a YAML; only its name and ``provider.slurm`` are looked at."""
    config = load(path)
    return Cluster(check_cluster_name(config.get("cluster_name")), settings_of(config))


def settings_of(config: dict[str, Any]) -> SlurmSettings:
    """Return ``provider.slurm`` of a YAML as a person wrote it, completed by what the site says."""
    section = config["provider"].get("slurm")
    for name, field in SlurmSettings.model_fields.items():
        if isinstance(section, dict) and name in section and field.json_schema_extra:
            raise ConfigError(f"provider.slurm.{name}", "unknown key", "it is filled in by the provider, never by hand")
    site = read_site()
    if site is None or not (section is None or isinstance(section, dict)):
        return read_settings(section)
    return read_settings(site.complete_settings(section or {}))
