"""Which `ray` command runs, and with which options, is known where Ray calls us."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import ray
import yaml
from click.testing import CliRunner
from ray.autoscaler._private import commands, updater
from ray.autoscaler._private.util import prepare_config
from ray.scripts import scripts
from support import cluster_config

from ray_slurm_provider import node_provider
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.command_runner import SlurmCommandRunner
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.nodes import TAG_KIND
from ray_slurm_provider.ray_contract import RayCommand, ray_command

COMMANDS = {
    "up": ["-y", "--restart-only"],
    "down": ["-y", "--workers-only", "--keep-min-workers"],
    "exec": ["--start", "--no-config-cache", "true"],
    "submit": ["s.py", "--", "--n", "it's"],
    "attach": ["--start"],
    "rsync-up": ["a", "b"],
    "rsync-down": ["a", "b"],
    "dashboard": [],
    "monitor": [],
    "get-head-ip": [],
    "get-worker-ips": [],
}
# The options that we look at, by command.
OPTIONS = {
    "up": {"restart_only": True, "no_config_cache": False},
    "down": {"workers_only": True, "keep_min_workers": True},
    "exec": {"start": True, "no_config_cache": True},
    "submit": {"script": "s.py", "script_args": ("--n", "it's"), "start": False},
    "attach": {"start": True},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_known_with_its_options_in_the_hook_and_in_the_provider(name, tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(cluster_config("c", tmp_path)))
    seen = []

    def record():
        seen.append(ray_command())
        raise click.ClickException("enough")

    monkeypatch.setattr(node_provider, "ray_command", record)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = [name, str(path), *COMMANDS[name]]
    for hook in ("bootstrap_config", "__init__"):
        done = CliRunner().invoke(scripts.cli, ["--logging-level", "info", *words])
        assert done.exit_code == 1
        monkeypatch.setattr(node_provider.SlurmNodeProvider, "bootstrap_config", staticmethod(lambda config: config))
        command = seen.pop()
        assert (command.name, command.cluster_yaml) == (name, str(path)), hook
        assert OPTIONS.get(name, {}).items() <= command.options.items()


def test_the_command_runner_knows_it_in_the_threads_of_rays_updaters_too(tmp_path):
    assert "provider.get_command_runner(" in inspect.getsource(updater.NodeUpdater.__init__)
    with scripts.up.make_context("up", ["x.yaml", "--restart-only"]).scope():
        runner = SlurmCommandRunner(Cluster("c", SlurmSettings(state_dir=str(tmp_path))), "7-abc")
        there = []
        thread = threading.Thread(target=lambda: there.extend([ray_command(), runner._command]))
        thread.start()
        thread.join()
    assert there[0] == RayCommand()
    assert (there[1].name, there[1].options["restart_only"]) == ("up", True)


def test_the_autoscaler_runs_no_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["monitor.py", "up", "--start"])
    assert ray_command() == RayCommand()
    assert ray_command().cluster_yaml == "CLUSTER.yaml"
    for monitor in ("_private/monitor.py", "v2/monitor.py"):
        assert "click" not in (Path(ray.__file__).parent / "autoscaler" / monitor).read_text()


def test_keep_min_workers_is_refused_before_anything_is_cancelled(tmp_path):
    with scripts.down.make_context("down", ["x.yaml", "-y", "--keep-min-workers"]).scope():
        provider = node_provider.SlurmNodeProvider({"slurm": {"state_dir": str(tmp_path)}}, "c")
    with pytest.raises(click.ClickException, match="use `ray down --workers-only x.yaml`") as refusal:
        provider.nodes_for_teardown({TAG_KIND: "worker"})
    assert refusal.value.exit_code == 1
    # It is the first that `ray down` asks for, and Ray lets what it raises pass.
    teardown = inspect.getsource(commands.teardown_cluster)
    assert teardown.index("provider.nodes_for_teardown") < teardown.index("provider.terminate_nodes")


def test_ray_down_imports_what_a_cached_yaml_names_so_tmpdir_must_be_private(tmp_path, fake_slurm):
    """When the first half fails, Ray has mended it: the docs and the private TMPDIR may go."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(cluster_config("c", tmp_path / "state")))
    config = prepare_config(yaml.safe_load(path.read_text()))
    digest = hashlib.sha256(json.dumps([config], sort_keys=True).encode()).hexdigest()
    planted = {**config, "provider": {**config["provider"], "module": "this.Provider"}}
    public, private = tmp_path / "public", tmp_path / "private"
    for place in (public, private):
        place.mkdir()
    (public / f"ray-config-{digest}").write_text(json.dumps({"_version": 1, "config": planted}))
    said = []
    for place in (public, private):
        argv = [sys.executable, "-m", "ray.scripts.scripts", "down", str(path), "--yes"]
        done = subprocess.run(argv, env={**fake_slurm.environ, "TMPDIR": str(place)}, capture_output=True, text=True)
        said.append("The Zen of Python" in done.stdout)
    assert said == [True, False]
