"""Every name and habit of Ray that we rely on is still there, in the installed Ray."""

from __future__ import annotations

import inspect
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from ray._private import services
from ray.autoscaler import tags
from ray.autoscaler._private import commands, constants, updater, util
from ray.autoscaler._private.providers import MINIMAL_EXTERNAL_CONFIG
from ray.autoscaler.node_provider import NodeProvider
from ray.scripts import scripts
from support import cluster_config

from ray_slurm_provider import bootstrap, nodes
from ray_slurm_provider.agent.ray_command import (
    CONNECTION_ENVIRONMENT,
    HEAD_PORTS,
    OWN_FLAGS,
    STARTED_MARK,
    monitor_command,
    start_command,
    start_environment,
    unfit_ray,
)
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.errors import SlurmProviderError
from ray_slurm_provider.findings import FAILURE
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.preflight import preflight
from ray_slurm_provider.ray_contract import cluster_schema, prepare_config
from ray_slurm_provider.sessions import STOP_TAIL

CONFIGS = sorted((Path(__file__).parents[2] / "cluster_configs").glob("*.yaml"))


def test_our_tags_are_rays():
    assert tags.TAG_RAY_NODE_KIND == nodes.TAG_KIND
    assert tags.TAG_RAY_USER_NODE_TYPE == nodes.TAG_TYPE
    assert tags.TAG_RAY_NODE_STATUS == nodes.TAG_STATUS
    assert tags.NODE_KIND_HEAD == nodes.KIND_HEAD
    assert tags.STATUS_UP_TO_DATE == nodes.STATUS_UP_TO_DATE


@pytest.mark.parametrize(
    "name", [name for name, member in inspect.getmembers(SlurmNodeProvider, callable) if not name.startswith("_")]
)
def test_our_methods_take_what_ray_gives(name):
    if not hasattr(NodeProvider, name):
        # Ray looks for the first by its name; older ones do not know the second.
        assert name in {"cleanup_cluster_resources", "nodes_for_teardown"}
        return
    theirs = list(inspect.signature(getattr(NodeProvider, name)).parameters)
    ours = list(inspect.signature(getattr(SlurmNodeProvider, name)).parameters)
    assert ours == theirs


def test_the_autoscaler_is_started_as_ray_would(monkeypatch):
    taken = {}
    monkeypatch.setattr(services, "start_ray_process", lambda command, *_, **__: taken.update(command=command))
    config = "/t/ray_bootstrap_config.yaml"
    logs = "/t/session_latest/logs"
    services.start_monitor(
        "1.1.1.1:5",
        logs,
        f"{logs}/monitor.out",
        f"{logs}/monitor.err",
        config,
        monitor_ip="1.1.1.1",
        autoscaler_v2=True,
    )
    ours = monitor_command("1.1.1.1", "1.1.1.1:5", "/t")
    # Ray says how large a log may grow, and says the default.
    assert set(taken["command"]) - set(ours) == {"--logging-rotate-bytes=0", "--logging-rotate-backup-count=0"}
    assert set(ours) <= set(taken["command"])
    assert Path(ours[2]).exists()


def test_ray_asks_for_the_cleanup_at_the_end():
    assert "provider.cleanup_cluster_resources()" in inspect.getsource(commands.teardown_cluster)


def test_ray_start_has_our_options_and_says_our_word():
    options = {option for parameter in scripts.start.params for option in parameter.opts}
    ports = dict.fromkeys(HEAD_PORTS, 1)
    for spec in (AgentSpec("c", "d", "/x"), AgentSpec("c", "d", "/x", head="h", gcs_address="a:1")):
        for word in start_command(spec, "1.1.1.1", ports, "/t")[4:]:
            assert word.partition("=")[0] in options, word
    assert STARTED_MARK.decode() in inspect.getsource(scripts.start.callback)


def test_ray_knows_the_variables_that_the_head_sets():
    spec = AgentSpec("c", "d", "/x")
    ports = dict.fromkeys(HEAD_PORTS, 1)
    names = set(start_environment(spec, {}, ports, {})) - {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
    }
    root = Path(ray.__file__).parent
    # Settings of Ray's compiled part are written small, and stand in its programs.
    compiled = {name for name in names if name.removeprefix("RAY_")[0].islower()}
    assert compiled >= set(CONNECTION_ENVIRONMENT)
    with (root / "_raylet.so").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        for name in compiled:
            assert program.find(name.encode()) >= 0, name
    names -= compiled
    # Only files that hold constants: the whole of Ray takes long to read.
    text = "".join(
        path.read_text()
        for folder in ("_private", "_common", "autoscaler", "dashboard")
        for path in (root / folder).rglob("*.py")
        if path.name in {"constants.py", "ray_constants.py", "config.py", "consts.py", "usage_constants.py"}
    )
    unknown = {name for name in names if name not in text}
    # Came after the oldest Ray that we support; without them its defaults hold.
    assert unknown <= {"RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"}
    for name in unknown:
        assert ray.__version__ < "2.60", name


def test_our_own_flags_are_rays():
    options = {option for parameter in scripts.start.params for option in parameter.opts}
    assert options >= OWN_FLAGS


def test_sessions_and_the_end_are_asked_for_in_the_words_that_we_know():
    for command in (scripts.exec, scripts.submit, scripts.attach):
        assert {parameter.name for parameter in command.params} >= {"tmux", "screen"}
    for command in STOP_TAIL.split("; ")[1:]:
        assert f'"{command}"' in inspect.getsource(commands.exec_cluster)


def test_the_old_autoscaler_is_chosen_in_the_way_that_we_refuse():
    assert '"RAY_UP_enable_autoscaler_v2", "1") == "1"' in inspect.getsource(commands.get_or_create_head_node)


@pytest.mark.parametrize("name", ["RAY_UP_enable_autoscaler_v2", "RAY_enable_autoscaler_v2"])
def test_whoever_wants_the_old_autoscaler_is_told(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    with pytest.raises(SlurmProviderError, match=f"old autoscaler does not work here: unset {name}"):
        bootstrap.check_for_up({})


def test_the_check_before_ray_up_tells_it_too(monkeypatch, tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(cluster_config("c", tmp_path)))
    monkeypatch.setenv("RAY_UP_enable_autoscaler_v2", "0")
    (found,) = preflight(tmp_path / "x.yaml", {})
    assert (found.check, found.level) == ("yaml", FAILURE)
    assert "unset RAY_UP_enable_autoscaler_v2" in found.text


def test_a_ray_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(bootstrap, "unfit_ray", lambda: "this Ray is too old")
    with pytest.raises(SlurmProviderError, match="too old"):
        bootstrap.check_for_up({})


def test_the_installed_ray_is_new_enough():
    assert unfit_ray() == ""


def test_a_port_of_minus_one_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("AUTOSCALER_METRIC_PORT", "-1")
    assert constants.env_integer("AUTOSCALER_METRIC_PORT", 1) == -1


def test_the_updater_prints_our_failure_without_a_traceback():
    source = inspect.getsource(updater.NodeUpdater.run)
    assert 'hasattr(e, "cmd")' in source
    assert 'getattr(e, "stderr"' in source


def test_an_error_of_the_first_hook_would_only_be_a_warning():
    source = inspect.getsource(commands._bootstrap_config)
    assert (
        source.index("fillout_available_node_types_resources")
        < source.index("validate_config(config)")
        < source.index(".bootstrap_config(config)")
    )


def test_ray_fills_in_what_we_expect():
    assert set(MINIMAL_EXTERNAL_CONFIG) == {"available_node_types", "head_node_type", "head_node", "worker_nodes"}
    assert "provider" in cluster_schema()["properties"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_template_is_valid_for_ray_and_for_us(path):
    if "priority:" in path.read_text().replace("# priority", "") and '"priority"' not in json.dumps(cluster_schema()):
        assert ray.__version__ < "2.60"
        pytest.skip("this Ray does not know the key priority yet")
    config = bootstrap.resolve_file(path)
    util.validate_config(config)
    # And on the head, where the autoscaler reads it again in every round.
    again = prepare_config(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(config)))))
    util.validate_config(again)


def test_setup_commands_come_in_rays_order():
    config = cluster_config(
        "c",
        "/s",
        types={
            "plain": {"node_config": {"setup": ["own"]}},
            "special": {"node_config": {}, "worker_setup_commands": ["type"], "initialization_commands": ["type init"]},
        },
        initialization_commands=["init"],
        setup_commands=["all"],
        head_setup_commands=["head"],
        worker_setup_commands=["worker"],
    )
    types = bootstrap.resolve(prepare_config(config))["available_node_types"]
    steps = {
        name: [command for _, command in entry["node_config"]["resolved"]["steps"]] for name, entry in types.items()
    }
    assert steps == {
        "head": ["init", "all", "head"],
        "plain": ["init", "all", "worker", "own"],
        "special": ["type init", "type"],
    }


def test_the_agent_can_start_ray_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "--version"], capture_output=True, text=True, check=True
    )
    assert ray.__version__ in done.stdout
