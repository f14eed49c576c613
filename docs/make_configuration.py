"""Writes from the models what repeats them: docs/configuration.md, cluster_configs/full.yaml and schema.json.

python docs/make_configuration.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ray_slurm_provider.config import NodeConfig, Ports, SlurmSettings
from ray_slurm_provider.sbatch_options import PROTECTED_OPTIONS, SbatchOptions
from ray_slurm_provider.site_rules import SiteDefaults, SiteFile, SiteLimits, SiteLocks
from ray_slurm_provider.yaml_schema import yaml_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = """\
# Configuration

Made from the models by `python docs/make_configuration.py`; change them, not this page.

A cluster YAML is [Ray's own](https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html).
Ours are the two sections below; an unknown key in them is refused with its path. Of Ray's keys these
behave in a way of their own here:

| key | here |
|---|---|
| `resources` of a node type | derived from the sbatch options: CPU, GPU, `accelerator_type:*`, memory, object store (30 % of the job's memory). What you write wins; more than the job has is an error. |
| `initialization_commands`, `setup_commands`, `head_setup_commands`, `worker_setup_commands` | run in the job, in Ray's order, in one shell that then becomes the node: what they export stays in force. Lists of a node type replace the global ones, as in Ray. |
| `head_start_ray_commands`, `worker_start_ray_commands` | not run: the job starts Ray itself. Further arguments go to `ray_start_args`. |
| `file_mounts` | copied on the shared file system before the head starts; a target that only this host sees is refused by `ray up` and `ray-slurm check`. |
| `rsync_exclude`, `rsync_filter` | count, as in Ray. |
| `auth` | for `command_runner: ssh` only. |
| `idle_timeout_minutes` | 5 when it is not given; `idle_timeout_s` of a node type wins. |
| `upscaling_speed` | 1000 when it is not given: Ray submits all the jobs that it needs at once. |
| `docker` | refused. |

"""


_FULL = """\
# yaml-language-server: $schema=schema.json
# Every key of the provider with its default, made from the models by docs/make_configuration.py. A key in a comment
# has no default; of the others you need to write only what you change. Ray's own keys stand in the usual places.
#
#     ray up full.yaml --no-config-cache

cluster_name: full              # letters, digits, '.', '_' and '-'
max_workers: 4                  # jobs of workers at the most, all types together
idle_timeout_minutes: 5         # a worker without work is cancelled after that
upscaling_speed: 1000.0         # how fast Ray asks for more; 1000: everything at once
file_mounts: {{}}                 # target on a shared file system: source here
rsync_exclude: []               # for ray rsync-up and -down, patterns of rsync
rsync_filter: []                # names of files with such patterns, for example .gitignore
auth: {{}}                        # for command_runner: ssh; ssh_user, ssh_private_key, ssh_proxy_command

provider:
  type: external
  module: ray_slurm_provider.node_provider.SlurmNodeProvider
  slurm:
{settings}

head_node_type: head
available_node_types:
  head:
    resources: {{CPU: 0}}         # no tasks on the head; derived from the sbatch options when they are not given
    node_config:
      sbatch: {{cpus_per_task: 1, mem: 2G, time: "24:00:00"}}
  worker:
    min_workers: 0              # so many are always there
    max_workers: 4
    idle_timeout_s: 300         # wins over idle_timeout_minutes
    # priority: 0               # of the types that fit, the one with the highest number is taken; newer Rays only
    labels: {{kind: worker}}      # for label selectors
    initialization_commands: [] # of this type only, in place of the global ones
    worker_setup_commands: []   # likewise
    node_config:
{node_config}

# They run in the job, in this order, before Ray starts.
initialization_commands: []     # on every node
setup_commands: []              # on every node
head_setup_commands: []
worker_setup_commands: []
"""
_WIDTH = 118
_SITE: list[tuple[str, type[BaseModel]]] = [
    ("site.yaml", SiteFile),
    ("defaults", SiteDefaults),
    ("locked", SiteLocks),
    ("limits", SiteLimits),
]


def main() -> None:
    """Write the files."""
    configs = Path(__file__).parents[1] / "cluster_configs"
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
    (configs / "full.yaml").write_text(full_yaml(), encoding="utf-8")
    (configs / "schema.json").write_text(json.dumps(yaml_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def full_yaml() -> str:
    """Return a cluster YAML with every key of ours."""
    return _FULL.format(
        settings="\n".join(_keys(SlurmSettings, "    ")),
        node_config="\n".join(
            _keys(NodeConfig, "      ", sbatch={"cpus_per_task": 1, "mem": "1G", "time": "04:00:00"})
        ),
    )


def _keys(model: type[BaseModel], indent: str, **written: Any) -> Iterator[str]:
    """Yield a line for each key, with its description above it."""
    for name, field in model.model_fields.items():
        if field.json_schema_extra:
            continue
        yield from textwrap.wrap(
            _text(field.description), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        section = next((kind for kind in (Ports, SbatchOptions) if field.annotation is kind), None)
        if section is not None:
            chosen = written.get(name, {})
            yield f"{indent}{name}:" if chosen else f"{indent}{name}: {{}}"
            yield from (f"{indent}  {key}: {json.dumps(value)}" for key, value in chosen.items())
            yield from (
                f"{indent}  # {key}: ...".ljust(40) + _text(inner.description)
                for key, inner in section.model_fields.items()
                if key not in chosen
            )
        elif field.default is None:
            yield f"{indent}# {name}: ..."
        else:
            yield f"{indent}{name}: {json.dumps(field.default)}"


def page() -> str:
    """Return the page."""
    return _HEAD + "\n".join(
        [
            _section("`provider.slurm`", "What concerns the whole cluster.", SlurmSettings),
            _section("`provider.slurm.ports`", "For sites with a firewall between their hosts.", Ports),
            _section("`available_node_types.<type>.node_config`", "How the job of such a node looks.", NodeConfig),
            _section(
                "`node_config.sbatch`",
                "Options of sbatch by their long names with `_` for `-`; the man page of sbatch explains each.",
                SbatchOptions,
            ),
            "## The site file\n",
            "What an admin decides once for all users: [for admins](site.md).\n",
            *(_table(heading, model) for heading, model in _SITE),
            "## Options that the provider sets itself\n",
            "| option | because |\n|---|---|",
            *(f"| `{name}` | {reason} |" for name, reason in sorted(PROTECTED_OPTIONS.items())),
            "",
        ]
    )


def _section(title: str, intro: str, model: type[BaseModel]) -> str:
    return f"## {title}\n\n{intro}\n\n{_table('', model)}"


def _table(heading: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {_type(properties[name])} | {_default(field.default)} | {_text(field.description)} |"
        for name, field in model.model_fields.items()
        if not (field.json_schema_extra or {})
    ]
    return "\n".join(
        [
            *([f"### `{heading}`\n"] if heading else []),
            "| key | type | default | meaning |\n|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"] if part.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    words = {"string": "text", "integer": "number", "number": "number", "boolean": "true or false"}
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return words.get(schema.get("type", ""), "mapping")


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value in (None, "") or isinstance(value, BaseModel):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _text(description: str | None) -> str:
    return " ".join((description or "").replace("``", "`").replace("|", "\\|").split())


if __name__ == "__main__":
    main()
