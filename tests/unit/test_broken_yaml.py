"""A hundred mistakes: each is refused with its YAML path, before anything is submitted."""

from __future__ import annotations

import copy
import re

import click
import pytest
from ray.scripts import scripts
from support import cluster_config

from ray_slurm_provider import bootstrap
from ray_slurm_provider.config import read_node_config
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.ray_contract import prepare_config

NODE = "available_node_types.worker.node_config"
SLURM = "provider.slurm"

# (where to put it, what to put there, the path that the error must name)
MISTAKES = [
    *[((*["available_node_types", "worker", "node_config", "sbatch"], key), value, f"{NODE}.sbatch.{key}") for key, value in [
        ("mem", "lots"), ("mem", ""), ("mem", True), ("mem", None if False else [1]), ("mem", {"a": 1}), ("mem", 1.5), ("mem", "-4G"),
        ("mem_per_cpu", "4 G"), ("mem_per_gpu", "x"), ("tmp", "big"),
        ("cpus_per_task", "2"), ("cpus_per_task", 0), ("cpus_per_task", -1), ("cpus_per_task", True), ("cpus_per_task", 1.5), ("cpus_per_task", [2]),
        ("cpus_per_tasks", 2), ("cpus-per-task", 2), ("cpu", 2), ("partitions", "cpu"), ("Partition", "cpu"), ("gpu", 1), ("walltime", "1:00"),
        ("partition", "a\nb"), ("partition", "a\r#SBATCH --uid=0"), ("partition", ""), ("partition", "  "), ("partition", 7), ("partition", ["cpu"]), ("partition", "a\x00b"), ("partition", "a\x1bb"),
        ("account", 12), ("account", "x\n"), ("qos", True), ("constraint", {"a": "b"}), ("reservation", "\t"),
        ("time", 5400), ("time", "soon"), ("time", True), ("time", "1:2:3:4"), ("time", ""), ("time", ["1:00:00"]), ("time_min", "x"),
        ("gres", "gpu::"), ("gres", "gpu:"), ("gres", 1), ("gres", "gpu 1"), ("gres", "gpu:1\n"), ("gpus", "a b"), ("gpus", True), ("gpus", 1.5), ("gpus_per_node", "a100:x y"), ("gpus_per_task", []),
        ("exclusive", "no"), ("exclusive", 1), ("nice", True), ("nice", 1.5), ("hold", "yes"), ("kill_on_invalid_dep", "maybe"), ("wait_all_nodes", 7),
        ("job_name", "x"), ("job-name", "x"), ("comment", "x"), ("output", "/tmp/x"), ("error", "/tmp/x"), ("array", "1-5"), ("nodes", 2), ("ntasks", 2), ("export", "ALL"),
        ("requeue", True), ("wrap", "ls"), ("chdir", "/"), ("signal", "B:TERM@1"), ("uid", 0), ("open_mode", "truncate"), ("test-only", True), ("parsable", True),
    ]],
    *[((*["available_node_types", "worker", "node_config"], key), value, path) for key, value, path in [
        ("sbatch", [1], f"{NODE}.sbatch"), ("sbatch", "x", f"{NODE}.sbatch"), ("sbatch", 3, f"{NODE}.sbatch"), ("sbatsh", {}, f"{NODE}.sbatsh"),
        ("setup", "module load x", f"{NODE}.setup"), ("setup", [1], f"{NODE}.setup[0]"), ("setup", ["ok", ""], f"{NODE}.setup[1]"), ("setup", {"a": "b"}, f"{NODE}.setup"), ("setup", ["a\0b"], f"{NODE}.setup[0]"),
        ("env", ["A=1"], f"{NODE}.env"), ("env", {"A B": "1"}, f"{NODE}.env"), ("env", {"A": True}, f"{NODE}.env.A"), ("env", {"A": [1]}, f"{NODE}.env.A"), ("env", {"1A": "x"}, f"{NODE}.env"),
        ("env", {"RAY_ADDRESS": "x"}, f"{NODE}.env.RAY_ADDRESS"), ("env", {"SLURM_JOB_ID": "1"}, f"{NODE}.env.SLURM_JOB_ID"), ("env", {"A": "x\0y"}, f"{NODE}.env.A"),
        ("placement", "moon", f"{NODE}.placement"), ("placement", 1, f"{NODE}.placement"), ("ray_start_args", "--x", f"{NODE}.ray_start_args"), ("ray_start_args", ["a\nb"], f"{NODE}.ray_start_args[0]"),
        ("partition", "cpu", f"{NODE}.partition"), ("head_node", 1, f"{NODE}.head_node"),
    ]],
    *[(("available_node_types", "worker", key), value, path) for key, value, path in [
        ("node_config", "x", NODE), ("node_config", [1], NODE), ("node_config", 3, NODE),
        ("resources", {"CPU": 3}, "available_node_types.worker.resources.CPU"), ("resources", {"CPU": -1}, "available_node_types.worker.resources.CPU"),
        ("resources", {"CPU": "2"}, "available_node_types.worker.resources.CPU"), ("resources", {"CPU": 1.5}, "available_node_types.worker.resources.CPU"), ("resources", {"CPU": True}, "available_node_types.worker.resources.CPU"),
        ("resources", {"GPU": 1}, "available_node_types.worker.resources.GPU"), ("resources", {"memory": 2**31}, "available_node_types.worker.resources.memory"),
        ("resources", {"memory": 2**30}, "available_node_types.worker.resources.memory"), ("resources", {"object_store_memory": 2**31}, "available_node_types.worker.resources.object_store_memory"),
        ("resources", [1], "available_node_types.worker.resources"), ("resources", "CPU", "available_node_types.worker.resources"),
        ("labels", {"a": 1}, "available_node_types.worker.labels.a"), ("max_worker", 1, "available_node_types.worker"), ("min_workers", "2", "available_node_types.worker.min_workers"),
        ("worker_setup_commands", "ls", "available_node_types.worker.worker_setup_commands"), ("worker_setup_commands", [3], "available_node_types.worker.worker_setup_commands"),
    ]],
    *[(("provider", "slurm", key), value, f"{SLURM}.{key}") for key, value in [
        ("state_dri", "/x"), ("state_dir", 3), ("state_dir", "relative/path"), ("state_dir", ""), ("state_dir", "/a\n/b"), ("python", "python3"), ("python", 3), ("slurm_bin", "bin"), ("interface", ["ib0"]),
        ("update_interval_s", 0), ("update_interval_s", "5"), ("update_interval_s", 10**6), ("withdraw_after_s", -1), ("drain_s", "1m"), ("token_auth", "yes"), ("token_auth", 1), ("command_timeout_s", 0), ("temp_dir", 1), ("port", {}), ("sbatch_skip", ["comment"]), ("sbatch_skip", ["output"]), ("sbatch_skip", ["memory"]), ("sbatch_skip", "mem"), ("sbatch_extra", ["--comment=x"]), ("sbatch_extra", ["-N 2"]), ("sbatch_extra", ["--job-name=x"]), ("prologue", "module load x"), ("tls", "yes"), ("command_runner", "rsh"), ("ssh_args", "-p 22"), ("ports", "1-2"), ("metrics", 1),
        ("sbatch", [1]), ("max_queued_jobs", 0), ("birth_record", "nowhere"), ("clusters", 3), ("site", {}), ("default_python", "/x"), ("sbatch_extra", ["--nice=5 --array=1-3"]), ("sbatch_extra", ["--arr=1-3"]), ("sbatch_extra", ["--wckey=a b"]),
    ]],
    *[(("provider", "slurm", "sbatch"), value, f"{SLURM}.sbatch.{path}") for value, path in [
        ({"partitions": "x"}, "partitions"), ({"mem": "lots"}, "mem"), ({"comment": "x"}, "comment"), ({"time": 5400}, "time"),
    ]],
    *[(("provider", "slurm", "ports"), value, f"{SLURM}.{path}") for value, path in [
        ({"services": "20000-20009"}, "ports.services"), ({"services": "20000"}, "ports.services"), ({"services": 20000}, "ports.services"), ({"services": "80-2000"}, "ports.services"), ({"service": "20000-21000"}, "ports.service"),
        ({"workers": "21000-21006"}, "ports.workers"), ({"workers": "2-1"}, "ports.workers"), ({"services": "20000-20999", "workers": "20500-21999"}, "ports"),
    ]],
    *[(("available_node_types", node_type, "node_config"), value, f"available_node_types.{node_type}.node_config.{path}") for node_type, value, path in [
        ("worker", {"placement": "login_node"}, "placement"), ("head", {"placement": "login_node", "sbatch": {"mem": "1G"}}, "sbatch"),
        ("head", {"sbatch_skip": ["chdir"]}, "sbatch_skip"), ("worker", {"sbatch_extra": ["--array=1-2"]}, "sbatch_extra"), ("worker", {"sbatch_extra": ["--nice=1\n#SBATCH --uid=0"]}, "sbatch_extra"),
        ("head", {"ray_start_args": ["--port=6379"]}, "ray_start_args"), ("head", {"ray_start_args": ["--temp-dir /x"]}, "ray_start_args"), ("worker", {"ray_start_args": ["--address", "x:1"]}, "ray_start_args"),
    ]],
    *[(("available_node_types", "head"), {"node_config": {"placement": "login_node"}, "resources": value}, f"available_node_types.head.resources.{path}") for value, path in [
        ({"CPU": -1}, "CPU"), ({"memory": "1G"}, "memory"), ({"x": 1.5}, "x"),
    ]],
    *[(("provider", key), value, path) for key, value, path in [
        ("slurm", [1], SLURM), ("slurm", "x", SLURM), ("slrum", {}, "provider.slrum"), ("state_dir", "/x", "provider.state_dir"), ("partition", "cpu", "provider.partition"),
    ]],
    *[((key,), value, path) for key, value, path in [
        ("cluster_name", "a b", "cluster_name"), ("cluster_name", "../evil", "cluster_name"), ("cluster_name", "", "cluster_name"), ("cluster_name", "x" * 64, "cluster_name"), ("cluster_name", "a\nb", "cluster_name"), ("cluster_name", 7, "cluster_name"),
        ("head_node_type", "nosuch", "head_node_type"), ("head_node_type", 3, "head_node_type"), ("head_node_type", ["a"], "head_node_type"), ("docker", {"image": "x", "container_name": "c"}, "docker"), ("max_workerz", 3, "the YAML"), ("idle_timeout_minutes", "5", "idle_timeout_minutes"),
        ("initialization_commands", "ls", "initialization_commands"), ("available_node_types", [], "available_node_types"),
    ]],
]  # fmt: skip


def _broken(place, value):
    config = copy.deepcopy(cluster_config("ok", "/tmp/state"))
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    return config


def test_there_are_more_than_a_hundred():
    assert len(MISTAKES) > 100


@pytest.mark.parametrize(("place", "value", "path"), MISTAKES, ids=lambda part: str(part)[:60])
def test_a_mistake_is_refused_with_its_path(place, value, path):
    config = prepare_config(_broken(place, value))
    # The two hooks in Ray's order, with Ray's own check between them.
    filled = SlurmNodeProvider.fillout_available_node_types_resources(config)
    bootstrap._check_by_schema(filled)
    with pytest.raises(click.ClickException) as error:
        SlurmNodeProvider.bootstrap_config(filled)
    first = error.value.message.splitlines()[0]
    assert re.match(re.escape(path) + r"(:|\b)", first), first


@pytest.fixture
def site_file(tmp_path, monkeypatch):
    path = tmp_path / "site.yaml"
    path.write_text(
        """
        site: here
        defaults:
          slurm: {prologue: ["true"], ports: {workers: 30000-31999}}
          sbatch: {time: "1:00:00"}
          head_node_type: head
          available_node_types:
            head: {node_config: {sbatch: {mem: 4G}}}
            worker: {max_workers: 9, node_config: {sbatch: {cpus_per_task: 2, mem: 2G}}}
        locked: {sbatch: {qos: ray}}
        limits: {max_nodes: 20, max_queued_jobs: 5}
        """
    )
    monkeypatch.setenv("RAY_SLURM_SITE", str(path))


@pytest.mark.parametrize(("place", "value", "path"), MISTAKES, ids=lambda part: str(part)[:60])
def test_a_site_file_makes_no_mistake_right(place, value, path, site_file):
    config = prepare_config(_broken(place, value))
    filled = SlurmNodeProvider.fillout_available_node_types_resources(config)
    bootstrap._check_by_schema(filled)
    with pytest.raises(click.ClickException):
        SlurmNodeProvider.bootstrap_config(filled)


@pytest.mark.parametrize("words", [["up", "x.yaml"], ["exec", "x.yaml", "true", "--start"]])
def test_a_mount_that_the_jobs_cannot_see_is_refused_only_when_the_head_is_one(tmp_path, words):
    config = cluster_config("ok", tmp_path, file_mounts={"/dev/shm/data": str(tmp_path)})
    filled = SlurmNodeProvider.fillout_available_node_types_resources(prepare_config(copy.deepcopy(config)))
    with scripts.cli.commands[words[0]].make_context(words[0], words[1:]).scope():
        with pytest.raises(click.ClickException, match=r"file_mounts./dev/shm/data: is on a file system of this host"):
            SlurmNodeProvider.bootstrap_config(filled)
        config["available_node_types"]["head"] = {"node_config": {"placement": "login_node"}}
        filled = SlurmNodeProvider.fillout_available_node_types_resources(prepare_config(config))
        assert SlurmNodeProvider.bootstrap_config(filled)["file_mounts"]
    assert filled["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_what_was_resolved_is_not_for_people():
    config = prepare_config(cluster_config("ok", "/tmp/state"))
    config["available_node_types"]["worker"]["node_config"]["resolved"] = {}
    filled = SlurmNodeProvider.fillout_available_node_types_resources(config)
    with pytest.raises(click.ClickException, match="node_config.resolved: unknown key"):
        SlurmNodeProvider.bootstrap_config(filled)


def test_the_right_one_is_taken_and_the_head_takes_it_as_it_is(monkeypatch):
    config = prepare_config(cluster_config("ok", "/tmp/state"))
    once = SlurmNodeProvider.bootstrap_config(SlurmNodeProvider.fillout_available_node_types_resources(config))
    monkeypatch.setenv("RAY_SLURM_GCS_ADDRESS", "127.0.0.1:1")
    twice = SlurmNodeProvider.bootstrap_config(
        SlurmNodeProvider.fillout_available_node_types_resources(copy.deepcopy(once))
    )
    assert once == twice


def test_what_another_release_has_resolved_is_understood_by_the_autoscaler():
    section = {"resolved": {"steps": [["setup", "true"]], "of_tomorrow": 1}}
    assert read_node_config(section, "x").resolved.steps == [["setup", "true"]]
