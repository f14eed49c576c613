"""From the YAML that a person wrote to the one that Ray works with.

Ray calls two hooks before it does anything: ``fillout_available_node_types_resources``, whose exceptions
it only warns about, then after its own schema check ``bootstrap_config``, whose exceptions reach the
user (ray/autoscaler/_private/commands.py, _bootstrap_config). So everything is checked and filled in by
the first, and a mistake travels through Ray's check in a stub to the second, which refuses it.
"""

import copy
import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema

from ray_slurm_provider import resources
from ray_slurm_provider.agent.ports import port_range
from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE, WORKER_PORTS_BESIDES_TASKS, unfit_ray
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_dir import ClusterDir
from ray_slurm_provider.cluster_yaml import load, settings_of
from ray_slurm_provider.config import NodeConfig, SlurmSettings, check_cluster_name, read_node_config, read_settings
from ray_slurm_provider.errors import ConfigError, SlurmProviderError
from ray_slurm_provider.file_sync import is_shared
from ray_slurm_provider.ray_contract import (
    accelerator_names,
    cluster_schema,
    prepare_config,
    silence_legacy_warnings,
)
from ray_slurm_provider.reports import ENDED
from ray_slurm_provider.sbatch_options import SbatchOptions, with_defaults
from ray_slurm_provider.site_file import check_node_config, read_site

_REFUSED = "refused"
# `ray up` warns when no head command starts Ray with an autoscaler; the runner takes this one as its sign.
_HEAD_START = ["ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"]
_DEFAULTS: dict[str, Any] = {
    "idle_timeout_minutes": 5,
    # Ray's own default asks for one node in each round.
    "upscaling_speed": 1000.0,
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "worker_start_ray_commands": [],
    "auth": {},
}
# The job sets itself up: Ray's updaters would only disturb it
# (the same flags as for KubeRay, ray/autoscaler/_private/kuberay/autoscaling_config.py).
_PROVIDER_FLAGS = {"disable_node_updaters": True, "disable_launch_config_check": True}
_PROVIDER_KEYS = frozenset({"type", "module", "slurm", "_config_cache_path", *_PROVIDER_FLAGS})


def fill_out(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration complete, or a stub that `bootstrap` refuses."""
    if _is_resolved(config) and os.environ.get(GCS_ADDRESS_VARIABLE):
        return config  # the head's autoscaler reads what `ray up` has resolved
    try:
        return resolve(config)
    except ConfigError as error:
        return _stub(config, str(error))


def bootstrap(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that Ray goes on with.

    Raises:
        click.ClickException: It holds a mistake; nothing has been done yet.
    """
    section = config["provider"].get("slurm")
    refused = section.get(_REFUSED) if isinstance(section, dict) else None
    if refused:
        raise click.ClickException(refused)
    if _is_resolved(config):
        return config
    try:
        return resolve(config)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Check a cluster YAML and fill in what follows from it.

    Setup commands move into the ``node_config`` of each type, for the job runs them; resources are
    derived from the sbatch options; paths and the interpreter are those of this process.
    """
    config = {**_DEFAULTS, **copy.deepcopy(config)}
    check_cluster_name(config.get("cluster_name"))
    provider = config["provider"]
    _check_provider_keys(provider)
    _refuse_resolved(config)
    settings = settings_of(config)
    site = read_site()
    if site is not None:
        site.complete(config, settings.sbatch.chosen())
    provider["slurm"] = {
        **settings.model_dump(exclude_none=True),
        "state_dir": str(settings.directory()),
        "default_python": sys.executable,
    }
    provider.update(_PROVIDER_FLAGS)
    _refuse_docker(config)
    types = config.get("available_node_types")
    if not isinstance(types, dict) or not types:
        raise ConfigError("available_node_types", "is no mapping of node types", "one entry per node type")
    if not isinstance(config.get("head_node_type"), str) or config["head_node_type"] not in types:
        raise ConfigError(
            "head_node_type", f"{config.get('head_node_type')!r} is no node type", ", ".join(map(str, types))
        )
    names = accelerator_names()
    for name, node_type in types.items():
        _resolve_type(config, str(name), node_type, names)
    _check_site_rules(config, settings)
    for key in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        config[key] = []
    config["head_start_ray_commands"] = list(_HEAD_START)
    config["worker_start_ray_commands"] = []
    _check_by_schema(config)
    return config


def resolve_file(path: Path) -> dict[str, Any]:
    return resolve_written(load(path))


def resolve_written(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that `ray up` would work with, from a YAML that was read."""
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        # Ray reads these before it asks us, and ends with a bare KeyError.
        _command_list(config.get(key, ""), key)
    if isinstance(config.get("max_workers"), bool) or not isinstance(config.get("max_workers"), int):
        raise ConfigError("max_workers", f"{config.get('max_workers')!r} is not allowed", "a whole number")
    silence_legacy_warnings()
    return resolve(prepare_config(config))


def script(path: Path, node_type: str) -> str:
    config = resolve_file(path)
    types = config["available_node_types"]
    if node_type not in types:
        raise ConfigError("available_node_types", f"there is no node type {node_type!r}", ", ".join(types))
    node_config = read_node_config(types[node_type]["node_config"], f"available_node_types.{node_type}.node_config")
    cluster = Cluster(config["cluster_name"], read_settings(config["provider"]["slurm"]))
    return cluster.preview(node_type, node_config, head=node_type == config["head_node_type"])


def check_for_up(config: dict[str, Any]) -> None:
    """Refuse what Ray would stumble over only after it has submitted the head.

    Raises:
        ConfigError: A file mount is wrong.
        SlurmProviderError: This Ray, or its old autoscaler, does not work here.
    """
    for name in ("RAY_UP_enable_autoscaler_v2", "RAY_enable_autoscaler_v2"):
        if os.environ.get(name, "1") != "1":
            raise SlurmProviderError(f"Ray's old autoscaler does not work here: unset {name}")
    if unfit := unfit_ray():
        raise SlurmProviderError(unfit)
    _check_file_mounts(config)


def _check_file_mounts(config: dict[str, Any]) -> None:
    shared = read_settings(config["provider"].get("slurm")).directory()
    head = config["available_node_types"][config["head_node_type"]]["node_config"]
    for target, source in config["file_mounts"].items():
        if not Path(source).expanduser().exists():
            raise ConfigError(f"file_mounts.{target}", f"{source!r} does not exist here", "a file or directory")
        if head["placement"] == "slurm" and not is_shared(target, shared):
            raise ConfigError(
                f"file_mounts.{target}",
                "is on a file system of this host alone, and the jobs run on others",
                "a path that all hosts share; or a setup command that copies it from one",
            )


def head_changes(config: dict[str, Any]) -> list[str]:
    """Return what of the head's configuration differs from the head that runs, as lines for a person."""
    settings = read_settings(config["provider"].get("slurm"))
    directory = ClusterDir(settings.directory(), config["cluster_name"])
    report, old = directory.head_report(), directory.head_node_config()
    if report is None or report.phase == ENDED or old is None:
        return []
    new = config["available_node_types"][config["head_node_type"]]["node_config"]
    return [_in_users_words(line) for line in _differences(old, new, "node_config")]


def _in_users_words(line: str) -> str:
    for ours, theirs in (("node_config.resolved.steps", "setup commands"), ("node_config.resolved.", "")):
        line = line.replace(ours, theirs)
    return line


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield f"{path}: {old!r} becomes {new!r}"


def ignored_start_commands(config: dict[str, Any]) -> list[str]:
    """Return the start commands of the YAML that the provider will not run, for a warning."""
    usual = {"ray stop", *_HEAD_START}
    return [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config.get(key) or []
        if isinstance(command, str) and command.strip() not in usual
    ]


def _check_site_rules(config: dict[str, Any], settings: SlurmSettings) -> None:
    if settings.site is None:
        return
    for name, entry in config["available_node_types"].items():
        path = f"available_node_types.{name}.node_config"
        check_node_config(settings.site, settings, read_node_config(entry["node_config"], path), path)
    head = config["available_node_types"][config["head_node_type"]]
    is_job = head["node_config"]["placement"] == "slurm"
    if isinstance(config["max_workers"], int):
        settings.site.check_nodes(config["max_workers"] + is_job, "max_workers")


def _refuse_resolved(config: dict[str, Any]) -> None:
    types = config.get("available_node_types")
    for name, entry in types.items() if isinstance(types, dict) else ():
        node_config = entry.get("node_config") if isinstance(entry, dict) else None
        if isinstance(node_config, dict) and "resolved" in node_config:
            raise ConfigError(
                f"available_node_types.{name}.node_config.resolved",
                "unknown key",
                "it is filled in by the provider, never by hand",
            )


def _is_resolved(config: dict[str, Any]) -> bool:
    types = config.get("available_node_types")
    return isinstance(types, dict) and any(
        isinstance(entry, dict) and isinstance(entry.get("node_config"), dict) and "resolved" in entry["node_config"]
        for entry in types.values()
    )


def _resolve_type(config: dict[str, Any], name: str, node_type: Any, accelerators: list[str]) -> None:
    path = f"available_node_types.{name}"
    if not isinstance(node_type, dict):
        raise ConfigError(path, "is no mapping", "node_config, resources, min_workers, max_workers, labels, ...")
    node_config = _with_options_of_all(
        read_node_config(node_type.get("node_config"), f"{path}.node_config"), config["provider"]["slurm"]["sbatch"]
    )
    written = node_type.get("resources") or {}
    if not isinstance(written, dict):
        raise ConfigError(f"{path}.resources", f"{written!r} is no mapping", "names of resources and whole numbers")
    if node_config.placement == "login_node":
        _check_login_node(config, name, node_config, path)
        merged = resources.on_login_node(written, f"{path}.resources")
    else:
        derived = resources.derive(node_config.sbatch, accelerators)
        merged = resources.merge(written, node_config.sbatch, derived, f"{path}.resources")
    labels = node_type.get("labels") or {}
    # What SLURM is not told it cannot give back: then the number of the YAML is Ray's too.
    counted = sorted({*written, *_not_told_to_slurm(config, node_config, merged)})
    _check_worker_ports(config, name, merged)
    node_type["resources"] = merged
    node_type["node_config"] = {
        **node_config.model_dump(exclude_none=True),
        "resolved": {
            "steps": [list(step) for step in _steps(config, name, node_type, node_config)],
            "resources": merged,
            "written": counted,
            "labels": labels,
        },
    }


def _with_options_of_all(node_config: NodeConfig, options: dict[str, Any]) -> NodeConfig:
    if node_config.placement != "slurm" or not options:
        return node_config
    joined = with_defaults(node_config.sbatch.chosen(), options)
    return node_config.model_copy(update={"sbatch": SbatchOptions.model_validate(joined)})


def _not_told_to_slurm(config: dict[str, Any], node_config: NodeConfig, found: Mapping[str, int]) -> set[str]:
    skipped = {
        name.replace("-", "_") for name in (*config["provider"]["slurm"]["sbatch_skip"], *node_config.sbatch_skip)
    }
    if not skipped & {"mem", "mem_per_cpu", "mem_per_gpu"}:
        return set()
    return {"memory", "object_store_memory"} & set(found)


def _check_worker_ports(config: dict[str, Any], name: str, resources_: Mapping[str, int]) -> None:
    within = config["provider"]["slurm"].get("ports", {}).get("workers")
    if within is None:
        return
    needed = resources_.get("CPU", 0) + WORKER_PORTS_BESIDES_TASKS
    found = len(port_range(within))
    if found < needed:
        raise ConfigError(
            "provider.slurm.ports.workers",
            f"{within} holds {found} ports, and a node of type {name} needs {needed}: one for each of its"
            f" {resources_.get('CPU', 0)} CPUs and {WORKER_PORTS_BESIDES_TASKS} more",
            "a larger range",
        )


def _check_login_node(config: dict[str, Any], name: str, node_config: NodeConfig, path: str) -> None:
    if name != config["head_node_type"]:
        raise ConfigError(
            f"{path}.node_config.placement", "only the head can be on the login node", "slurm, for workers"
        )
    if node_config.sbatch.chosen():
        raise ConfigError(
            f"{path}.node_config.sbatch", "a head on the login node is no job", "placement: slurm, or no sbatch options"
        )


def _steps(
    config: dict[str, Any], name: str, node_type: dict[str, Any], node_config: NodeConfig
) -> Iterator[tuple[str, str]]:
    """Yield the commands of a node in Ray's order, each with its YAML path.

    Ray has merged ``setup_commands`` into the head's and the workers' lists already, and the lists of a
    type replace the global ones (ray/autoscaler/_private/util.py, merge_setup_commands;
    ray/autoscaler/_private/autoscaler.py, _get_node_type_specific_fields).
    """
    for index, command in enumerate(config["provider"]["slurm"]["prologue"]):
        yield f"provider.slurm.prologue[{index}]", command
    kind = "head_setup_commands" if name == config["head_node_type"] else "worker_setup_commands"
    for key in ("initialization_commands", kind):
        own = node_type.pop(key, None)
        where, commands = (key, config.get(key)) if own is None else (f"available_node_types.{name}.{key}", own)
        for index, command in enumerate(_command_list(commands, where)):
            yield f"{where}[{index}]", command
    for index, command in enumerate(node_config.setup):
        yield f"available_node_types.{name}.node_config.setup[{index}]", command


def _command_list(commands: Any, where: str) -> list[str]:
    commands = [] if commands is None else commands
    if not isinstance(commands, list) or not all(isinstance(command, str) and command.strip() for command in commands):
        raise ConfigError(where, f"{commands!r} is not allowed", "a list of shell commands, each a text")
    if any("\0" in command for command in commands):
        raise ConfigError(where, "a command holds a NUL character", "a list of shell commands")
    return commands


def _check_provider_keys(provider: dict[str, Any]) -> None:
    known = _PROVIDER_KEYS | set(cluster_schema()["properties"]["provider"]["properties"])
    for key in provider:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"provider.{key}",
                "unknown key",
                f"did you mean {close[0]}?" if close else "type, module, slurm",
            )


def _refuse_docker(config: dict[str, Any]) -> None:
    if (config.get("docker") or {}) != {}:
        raise ConfigError(
            "docker",
            "Ray's docker section does not work in SLURM jobs",
            "leave it out; start the container in the site's own way",
        )


def _check_by_schema(config: dict[str, Any]) -> None:
    """Check by Ray's own schema, with an error that says where."""
    try:
        jsonschema.validate(config, cluster_schema())
    except jsonschema.ValidationError as error:
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(
            "."
        )
        raise ConfigError(where or "the YAML", error.message) from None
    minimum = sum(entry.get("min_workers", 0) for entry in config["available_node_types"].values())
    if minimum > config["max_workers"]:
        raise ConfigError("max_workers", f"{config['max_workers']} is less than all min_workers together, {minimum}")


def _stub(config: dict[str, Any], message: str) -> dict[str, Any]:
    provider = config.get("provider") if isinstance(config.get("provider"), dict) else {}
    return {
        **_DEFAULTS,
        "cluster_name": "refused",
        "max_workers": 0,
        "provider": {
            "type": "external",
            "module": (provider or {}).get("module", ""),
            "slurm": {_REFUSED: message},
        },
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {}, "node_config": {}}},
        "head_start_ray_commands": [],
    }
