"""Every name and file of Ray that this package relies on, in one place; the contract tests look at each.

Together with ``node_provider``, ``command_runner`` and ``bootstrap`` the only module that imports Ray.
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import click
import ray.autoscaler
from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UNINITIALIZED,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)
from ray.util.accelerators import accelerators

from ray_slurm_provider.errors import SlurmProviderError

__all__ = [
    "CommandRunnerInterface",
    "NodeLaunchException",
    "NodeProvider",
    "RayCommand",
    "cli_logger",
    "NODE_KIND_HEAD",
    "STATUS_UNINITIALIZED",
    "STATUS_UP_TO_DATE",
    "TAG_RAY_NODE_KIND",
    "TAG_RAY_NODE_STATUS",
    "TAG_RAY_USER_NODE_TYPE",
    "accelerator_names",
    "cluster_schema",
    "prepare_config",
    "readable",
    "ray_command",
    "silence_legacy_warnings",
]

P = ParamSpec("P")
T = TypeVar("T")


def readable(method: Callable[P, T]) -> Callable[P, T]:
    """Make our errors one message without a traceback in `ray`'s command line."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except SlurmProviderError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def silence_legacy_warnings() -> None:
    """Keep Ray from telling what it fills in each time it reads a YAML: two empty legacy fields, and max_workers."""
    logging.getLogger("ray.autoscaler._private.util").addFilter(_not_about_legacy_fields)


def _not_about_legacy_fields(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "legacy field" not in message and not message.startswith("setting max workers for")


class RayCommand(NamedTuple):
    """The `ray` command that runs in this process: some of its options do not reach a provider in any other way."""

    name: str = ""  # "" in the autoscaler and in programs
    options: Mapping[str, Any] = MappingProxyType({})  # by the names of click's parameters

    @property
    def cluster_yaml(self) -> str:
        """The cluster YAML that was named, or a word that stands for it."""
        return self.options.get("cluster_config_file") or "CLUSTER.yaml"


def ray_command() -> RayCommand:
    """Return the `ray` command that runs; click tells it to its own thread only, not to those of Ray's updaters."""
    context = click.get_current_context(silent=True)
    return RayCommand() if context is None else RayCommand(context.command.name or "", context.params)


def accelerator_names() -> list[str]:
    """Return Ray's names of accelerators (ray/util/accelerators/accelerators.py)."""
    return sorted({value for name, value in vars(accelerators).items() if name.isupper() and isinstance(value, str)})


def cluster_schema() -> dict[str, Any]:
    path = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema
