"""Reads what concerns us from a cluster YAML. Imports no Ray, so that commands start fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import check_cluster_name, read_settings
from ray_slurm_provider.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: There is none.
    """
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
    """Return the cluster of a YAML; only its name and ``provider.slurm`` are looked at.

    Raises:
        ConfigError: These hold a mistake.
    """
    config = load(path)
    return Cluster(check_cluster_name(config.get("cluster_name")), read_settings(config["provider"].get("slurm")))
