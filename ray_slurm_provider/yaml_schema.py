"""The JSON Schema of a whole cluster YAML: Ray's own, with our two sections in it."""

from typing import Any

from pydantic import BaseModel

from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.ray_contract import cluster_schema

# Ray reads these before it asks the provider, and ends in a traceback without them.
_REQUIRED = {
    "cluster_name",
    "provider",
    "max_workers",
    "head_node_type",
    "available_node_types",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
}
_MODULE = "ray_slurm_provider.node_provider.SlurmNodeProvider"


def yaml_schema() -> dict[str, Any]:
    """Return the schema, for editors that complete and check YAML."""
    schema = cluster_schema()
    definitions: dict[str, Any] = {}
    provider = schema["properties"]["provider"]
    provider["properties"] |= {
        "type": {"const": "external", "description": "Always external."},
        "module": {"const": _MODULE, "description": "The class of this package."},
        "slurm": _section(SlurmSettings, definitions),
    }
    provider["required"] = ["type", "module"]
    (node_type,) = schema["properties"]["available_node_types"]["patternProperties"].values()
    # The provider derives them.
    node_type["required"] = [name for name in node_type.get("required", []) if name != "resources"]
    node_type["properties"]["node_config"] = _section(NodeConfig, definitions)
    schema["properties"].pop("docker", None)
    schema["required"] = sorted(_REQUIRED.union(schema.get("required", [])))
    return {
        **schema,
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Cluster YAML of Ray with ray-slurm-provider",
        "$defs": definitions,
    }


def _section(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema()
    definitions |= schema.pop("$defs", {})
    schema["properties"] = {name: value for name, value in schema["properties"].items() if not value.get("internal")}
    for name in ("ResolvedNode", "SiteFile", "SiteDefaults", "SiteLocks", "SiteLimits"):
        definitions.pop(name, None)
    return schema
