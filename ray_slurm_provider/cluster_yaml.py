"""Reads a cluster YAML outside `ray`, exactly as `ray` would.

Belongs to the Ray ring: the defaults are Ray's.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import yaml

from ray_slurm_provider import bootstrap
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import check_cluster_name, read_node_config, read_settings
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.ray_contract import prepare_config

if TYPE_CHECKING:
    from pathlib import Path

_LISTS = ("setup_commands", "head_setup_commands", "worker_setup_commands")


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


def resolved(path: Path) -> dict[str, Any]:
    """Return the configuration as `ray up` would work with it.

    Raises:
        ConfigError: It holds a mistake.
    """
    config = load(path)
    missing = [key for key in _LISTS if key not in config]
    if missing:
        raise ConfigError(missing[0], "Ray needs this key", "[] when there is nothing to run")
    if isinstance(config.get("max_workers"), bool) or not isinstance(config.get("max_workers"), int):
        raise ConfigError("max_workers", f"{config.get('max_workers')!r} is not allowed", "a whole number")
    return bootstrap.resolve(prepare_config(copy.deepcopy(config)))


def open_cluster(path: Path) -> Cluster:
    """Return the cluster of a YAML; only its name and ``provider.slurm`` are looked at.

    Raises:
        ConfigError: These hold a mistake.
    """
    config = load(path)
    return Cluster(check_cluster_name(config.get("cluster_name")), read_settings(config["provider"].get("slurm")))


def script(path: Path, node_type: str) -> str:
    """Return the batch script of a node type.

    Raises:
        ConfigError: The YAML holds a mistake, or has no such type.
    """
    config = resolved(path)
    types = config["available_node_types"]
    if node_type not in types:
        raise ConfigError("available_node_types", f"there is no node type {node_type!r}", ", ".join(types))
    node_config = read_node_config(types[node_type]["node_config"], f"available_node_types.{node_type}.node_config")
    cluster = Cluster(config["cluster_name"], bootstrap.settings_of(config))
    return cluster.preview(node_type, node_config, head=node_type == config["head_node_type"])
