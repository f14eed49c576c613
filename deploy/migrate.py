#!/usr/bin/env python3
"""Print a cluster YAML of TingkaiLiu/Ray-SLURM-autoscaler in the form of this package, and say what was left out.

python3 deploy/migrate.py OLD.yaml >NEW.yaml

The fields are those of its ``example-full.yaml``: ``head_node``, ``under_slurm``, ``init_commands``,
``additional_slurm_commands``, ``head_ip`` in a node's configuration; ``temp_folder_name``, ``template_path`` and
three ports in ``provider``.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import yaml
    from pydantic import ValidationError

    from ray_slurm_provider.cluster_yaml import load
    from ray_slurm_provider.errors import ConfigError
    from ray_slurm_provider.sbatch_options import PROTECTED_OPTIONS, SbatchOptions
except ImportError as missing:
    sys.exit(f"migrate.py: the Python {sys.executable} lacks {missing.name}; run it with the one that has ray-slurm")

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_KEPT = ("cluster_name", "max_workers", "idle_timeout_minutes", "upscaling_speed", "file_mounts", "head_node_type")
_COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
_START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
# The misspelt name is the real one there.
_PORTS = ("gcs_port", "ray_client_port", "dashboad_port", "dashboard_port")
# sbatch(1): short options by the long name of ours.
_SHORT = {
    "-A": "account",
    "-C": "constraint",
    "-G": "gpus",
    "-L": "licenses",
    "-b": "begin",
    "-c": "cpus_per_task",
    "-d": "dependency",
    "-p": "partition",
    "-q": "qos",
    "-t": "time",
    "-w": "nodelist",
    "-x": "exclude",
}
_MODULE = "ray_slurm_provider.node_provider.SlurmNodeProvider"


@dataclass
class Migration:
    """A migrated YAML."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what was left out or needs a look, one sentence each


def migrate(old: Mapping[str, Any]) -> Migration:
    """Return the new form of an old YAML; ConfigError when it is none."""
    try:
        return _migrate(old)
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError("the YAML", f"is not one of Ray-SLURM-autoscaler: {error}") from error


def _migrate(old: Mapping[str, Any]) -> Migration:
    provider = old.get("provider") or {}
    result = Migration({key: old[key] for key in _KEPT if key in old})
    config, notes = result.config, result.notes
    config["provider"] = {"type": "external", "module": _MODULE, "slurm": _settings(provider, notes)}
    if old.get("min_workers"):
        notes.append("min_workers at the top has no effect in Ray; write it into the node types")
    config["available_node_types"] = {
        name: _node_type(str(name), entry or {}, str(old.get("head_node_type")), notes)
        for name, entry in (old.get("available_node_types") or {}).items()
        if _is_ours(str(name), entry or {}, notes)
    }
    for key in _COMMANDS:
        config[key] = old.get(key) or []
    for key in _START_COMMANDS:
        if old.get(key):
            notes.append(f"{key} are not run: the provider starts Ray; see node_config.ray_start_args")
    known = {*_KEPT, *_COMMANDS, *_START_COMMANDS, "provider", "available_node_types", "min_workers"}
    notes += [f"{key} was left out: it has no meaning here" for key in old if key not in known and old[key]]
    notes.append("the time limit stood in the deployed templates: give each node type one, node_config.sbatch.time")
    notes.append("jobs had their SLURM nodes to themselves: write exclusive: true where that shall stay so")
    return result


def _settings(provider: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    ports = [key for key in _PORTS if provider.get(key)]
    if ports:
        notes.append(f"{', '.join(ports)}: ports are chosen free for each cluster; for ranges see provider.slurm.ports")
    if provider.get("template_path"):
        notes.append("template_path: there are no templates; see setup, sbatch_extra, prologue and epilogue")
    folder = provider.get("temp_folder_name")
    known = {"type", "module", "temp_folder_name", "template_path", *_PORTS}
    notes.extend(f"provider.{key} was left out: it has no meaning here" for key in provider if key not in known)
    return {"state_dir": str(folder)} if folder else {}


def _is_ours(name: str, entry: Mapping[str, Any], notes: list[str]) -> bool:
    kind = str((entry.get("node_config") or {}).get("node_type", "SLURM")).upper()
    if kind == "K8S":
        notes.append(f"node type {name} was left out: it is a Kubernetes pod")
    return kind != "K8S"


def _node_type(name: str, entry: Mapping[str, Any], head: str, notes: list[str]) -> dict[str, Any]:
    old = entry.get("node_config") or {}
    result = {key: value for key, value in entry.items() if key != "node_config"}
    under_slurm = str(old.get("under_slurm", 1)) != "0" and str(old.get("node_type", "SLURM")).upper() == "SLURM"
    node_config: dict[str, Any] = {}
    if name == head and not under_slurm:
        node_config["placement"] = "login_node"
    elif not under_slurm:
        notes.append(f"node type {name}: only the head can run outside SLURM; its nodes become jobs")
    if old.get("head_ip"):
        notes.append(
            f"node type {name}: head_ip {old['head_ip']} was left out; provider.slurm.interface names an interface"
        )
    if old.get("init_commands"):
        node_config["setup"] = list(old["init_commands"])
    if "placement" not in node_config:
        node_config |= _sbatch(name, old.get("additional_slurm_commands") or [], result.get("resources") or {}, notes)
    elif old.get("additional_slurm_commands"):
        notes.append(f"node type {name}: a head on the login node is no job; its #SBATCH lines were left out")
    return {**result, "node_config": node_config}


def _sbatch(name: str, lines: list[str], resources: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return ``sbatch`` and ``sbatch_extra`` from lines of a script, and what the deployed templates asked for."""
    options: dict[str, Any] = {}
    extra: list[str] = []
    for option, value in (pair for line in lines for pair in _directives(line)):
        key = _SHORT.get(option, option.removeprefix("--").replace("-", "_"))
        if key in PROTECTED_OPTIONS:
            notes.append(f"node type {name}: {option} was left out: {PROTECTED_OPTIONS[key]}")
        elif key in SbatchOptions.model_fields and (typed := _typed(key, value)) is not None:
            options[key] = typed
        elif option.startswith("--"):
            extra.append(f"{option}={_quoted(value)}" if value else option)
        else:
            notes.append(f"node type {name}: {option} {value} is not known and was left out")
    if resources.get("CPU"):
        options.setdefault("cpus_per_task", int(resources["CPU"]))
    if resources.get("GPU") and not {"gres", "gpus", "gpus_per_node", "gpus_per_task"} & set(options):
        options["gres"] = f"gpu:{int(resources['GPU'])}"
    return {"sbatch": options, **({"sbatch_extra": extra} if extra else {})}


def _quoted(value: str) -> str:
    if not re.search(r"[\s'\"\\#]", value):
        return value
    return f'"{value}"' if "'" in value else f"'{value}'"


def _directives(line: str) -> Iterator[tuple[str, str]]:
    """Yield option and value of each option in a ``#SBATCH`` line."""
    words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            option, _, value = word.partition("=")
        else:
            option, value = word[:2], word[2:]
        if not value and words and not words[0].startswith("-"):
            value = words.pop(0)
        yield option, value


def _typed(key: str, text: str) -> Any:
    """Return a value as the model wants it, None when it takes no form of it."""
    for value in (True if not text else None, int(text) if text.isdigit() and key != "time" else None, text):
        if value is None:
            continue
        try:
            SbatchOptions.model_validate({key: value})
        except ValidationError:
            continue
        return value
    return None


def main(arguments: list[str]) -> None:
    """Print the new YAML, and the notes on standard error."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: migrate.py OLD.yaml >NEW.yaml")
    try:
        result = migrate(load(Path(arguments[0])))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    print(yaml.safe_dump(result.config, sort_keys=False), end="")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
