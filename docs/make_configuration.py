"""Writes docs/configuration.md from the models.

python docs/make_configuration.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_slurm_provider.config import NodeConfig, Ports, SlurmSettings
from ray_slurm_provider.sbatch_options import PROTECTED_OPTIONS, SbatchOptions

if TYPE_CHECKING:
    from pydantic import BaseModel

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
| `file_mounts` | copied on the shared file system before the head starts; a target that only this host sees is refused. |
| `rsync_exclude`, `rsync_filter` | count, as in Ray. |
| `auth` | for `command_runner: ssh` only. |
| `idle_timeout_minutes` | 5 when it is not given; `idle_timeout_s` of a node type wins. |
| `upscaling_speed` | 1000 when it is not given: Ray submits all the jobs that it needs at once. |
| `docker` | refused. |

"""


def main() -> None:
    """Write the page."""
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")


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
            "## Options that the provider sets itself\n",
            "| option | because |\n|---|---|",
            *(f"| `{name}` | {reason} |" for name, reason in sorted(PROTECTED_OPTIONS.items())),
            "",
        ]
    )


def _section(title: str, intro: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {_type(properties[name])} | {_default(field.default)} | {_text(field.description)} |"
        for name, field in model.model_fields.items()
        if not (field.json_schema_extra or {})
    ]
    return "\n".join(
        [f"## {title}\n", f"{intro}\n", "| key | type | default | meaning |\n|---|---|---|---|", *rows, ""]
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
    if value is None or isinstance(value, (SbatchOptions, Ports)):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _text(description: str | None) -> str:
    return " ".join((description or "").replace("``", "`").replace("|", "\\|").split())


if __name__ == "__main__":
    main()
