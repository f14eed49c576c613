"""The schema for editors takes what the provider takes, and marks the mistakes that a schema can know."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from support import cluster_config

from ray_slurm_provider.cli import cli
from ray_slurm_provider.yaml_schema import yaml_schema

CONFIGS = sorted((Path(__file__).parents[2] / "cluster_configs").glob("*.yaml"))


def _errors(config):
    return list(jsonschema.Draft7Validator(yaml_schema()).iter_errors(config))


def test_it_is_a_schema():
    jsonschema.Draft7Validator.check_schema(yaml_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_template_fits_and_names_it_in_its_first_line(path):
    text = path.read_text()
    assert _errors(yaml.safe_load(text)) == []
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"


def _ours(schema):
    """What does not depend on the installed Ray."""
    (node_type,) = schema["properties"]["available_node_types"]["patternProperties"].values()
    return (
        schema["$defs"],
        schema["properties"]["provider"]["properties"]["slurm"],
        node_type["properties"]["node_config"],
    )


def test_the_file_beside_the_templates_is_what_the_command_prints():
    printed = CliRunner().invoke(cli, ["schema"], catch_exceptions=False).output
    assert json.loads(printed) == yaml_schema()
    assert _ours(json.loads((CONFIGS[0].parent / "schema.json").read_text())) == _ours(json.loads(printed))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("provider", "slurm", "state_dri"), "/x"),
        (("provider", "slurm", "update_interval_s"), 0),
        (("provider", "slurm", "default_python"), "/usr/bin/python3"),
        (("provider", "module"), "something.Else"),
        (("available_node_types", "worker", "node_config", "placement"), "moon"),
        (("available_node_types", "worker", "node_config", "resolved"), {}),
        (("available_node_types", "worker", "node_config", "sbatch", "partitions"), "cpu"),
        (("available_node_types", "worker", "node_config", "sbatch", "time"), 5400),
        (("docker",), {"image": "x"}),
        (("max_workerz",), 1),
    ],
    ids=str,
)
def test_mistakes_are_marked(place, value):
    config = copy.deepcopy(cluster_config("ok", "/tmp/state"))
    assert _errors(config) == []
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    assert _errors(config)


@pytest.mark.parametrize("key", ["setup_commands", "max_workers", "cluster_name"])
def test_what_ray_stumbles_over_is_required(key):
    config = cluster_config("ok", "/tmp/state")
    del config[key]
    assert _errors(config)
