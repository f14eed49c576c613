"""The site file: what it fills in, and that nothing gets around it."""

from __future__ import annotations

import copy
import os
import pwd
import subprocess
import sys

import click
import pytest
import yaml

from ray_slurm_provider import site_file
from ray_slurm_provider.bootstrap import resolve_written, script
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.cluster_yaml import open_cluster
from ray_slurm_provider.config import SlurmSettings, read_node_config, read_settings
from ray_slurm_provider.deployment.site_document import user_yaml
from ray_slurm_provider.errors import ConfigError, SiteRuleError
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.ray_contract import prepare_config

ME = pwd.getpwuid(os.getuid()).pw_name
SITE = """
site: Example HPC
contact: help@example.org
defaults:
  slurm:
    withdraw_after_s: 60
    prologue: [source /etc/profile.d/modules.sh]
    sbatch_extra: [--gres-flags=enforce-binding]
  sbatch: {time: "02:00:00", partition: cpu}
  head_node_type: head
  available_node_types:
    head:
      resources: {CPU: 0}
      node_config: {sbatch: {cpus_per_task: 1, mem: 2G}}
    cpu:
      max_workers: 4
      node_config: {sbatch: {cpus_per_task: 4, mem: 8G}}
    gpu:
      max_workers: 2
      node_config: {sbatch: {partition: gpu, cpus_per_task: 4, gres: "gpu:a100:1"}}
locked:
  slurm:
    state_dir: SHARED/$USER/ray
    interface: lo
    ports: {services: 22000-22199}
  sbatch: {qos: ray}
limits:
  max_nodes: 9
  max_queued_jobs: 5
  login_node_head: false
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    path = tmp_path / "site.yaml"
    path.write_text(SITE.replace("SHARED", str(tmp_path / "shared")))
    monkeypatch.setenv("RAY_SLURM_SITE", str(path))
    return path


def _user():
    return yaml.safe_load(user_yaml())


def _refused(config):
    with pytest.raises(ConfigError) as caught:
        resolve_written(config)
    return caught.value


def test_five_lines_are_enough(site, tmp_path):
    lines = [line for line in user_yaml().splitlines() if not line.startswith("#")]
    assert len(lines) <= 5
    config = resolve_written(_user())
    types = config["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert (types["head"]["max_workers"], types["cpu"]["max_workers"], types["gpu"]["max_workers"]) == (0, 4, 2)
    assert types["cpu"]["node_config"]["sbatch"] == {
        "cpus_per_task": 4,
        "mem": "8G",
        "partition": "cpu",
        "qos": "ray",
        "time": "02:00:00",
    }
    settings = config["provider"]["slurm"]
    assert settings["state_dir"] == str(tmp_path / "shared" / ME / "ray")
    assert (settings["interface"], settings["withdraw_after_s"], settings["max_queued_jobs"]) == ("lo", 60, 5)
    path = tmp_path / "user.yaml"
    path.write_text(user_yaml())
    assert str(open_cluster(path).directory.root) == str(tmp_path / "shared" / ME / "ray" / "mine")
    text = script(path, "gpu")
    assert "--partition=gpu" in text
    assert "--qos=ray" in text
    assert "modules.sh" in text


def test_a_yaml_changes_what_it_may(site):
    config = _user()
    config["provider"]["slurm"] = {
        "withdraw_after_s": 5,
        "prologue": ["true"],
        "ports": {"workers": "30000-30999"},
        "sbatch_extra": ["--nice=5"],
        "max_queued_jobs": 3,
    }
    config["available_node_types"] = {
        "gpu": {"node_config": {"sbatch": {"gpus_per_node": 1, "time": "04:00:00", "account": "chem-1"}}},
        "own": {"node_config": {"sbatch": {"partition": "gpu,cpu", "mem_per_cpu": "1G"}}},
    }
    config = resolve_written(config)
    settings, types = config["provider"]["slurm"], config["available_node_types"]
    assert (settings["withdraw_after_s"], settings["max_queued_jobs"]) == (5, 3)
    assert settings["prologue"] == ["source /etc/profile.d/modules.sh", "true"]
    assert settings["sbatch_extra"] == ["--gres-flags=enforce-binding", "--nice=5"]
    assert settings["ports"] == {"services": "22000-22199", "workers": "30000-30999"}
    assert set(types) == {"head", "gpu", "own"}
    assert types["gpu"]["node_config"]["sbatch"] == {
        "partition": "gpu",
        "cpus_per_task": 4,
        "gpus_per_node": 1,
        "account": "chem-1",
        "time": "04:00:00",
        "qos": "ray",
    }
    assert types["own"]["node_config"]["sbatch"]["time"] == "02:00:00"


def test_one_key_says_something_of_all_types(site):
    config = _user()
    config["provider"]["slurm"] = {"sbatch": {"account": "physics", "mem_per_cpu": "1G", "time": "1:00:00"}}
    config["available_node_types"] = {"cpu": {}, "gpu": {}, "own": {"node_config": {}}}
    types = resolve_written(config)["available_node_types"]
    for name in ("head", "cpu", "gpu", "own"):
        options = types[name]["node_config"]["sbatch"]
        assert (options["account"], options["mem_per_cpu"], options["time"]) == ("physics", "1G", "1:00:00")
        assert "mem" not in options


def test_a_locked_option_wins_over_other_ways_to_say_it(site):
    site.write_text(site.read_text().replace("{qos: ray}", "{qos: ray, mem: 6G}"))
    config = _user()
    config["available_node_types"] = {"cpu": {"node_config": {"sbatch": {"mem_per_cpu": "90G"}}}}
    options = resolve_written(config)["available_node_types"]["cpu"]["node_config"]["sbatch"]
    assert options["mem"] == "6G"
    assert "mem_per_cpu" not in options
    config["available_node_types"]["cpu"]["node_config"]["sbatch_extra"] = ["--mem-per-cpu=90G"]
    assert "locked.sbatch.mem" in str(_refused(config))


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("extra", ["--reservation=other", "--mem-per-cpu=90G"])
def test_a_directive_that_is_locked_is_not_given_again(site, everywhere, extra):
    locked = "interface: lo\n"
    site.write_text(site.read_text().replace(locked, f"{locked}    sbatch_extra: [--reservation=site, --mem=6G]\n"))
    config = _user()
    own = {"sbatch_extra": ["--nice=5", "--reservation=site", extra]}
    config["available_node_types"] = {"cpu": {"node_config": {} if everywhere else own}}
    config["provider"].update(slurm=own if everywhere else {})
    assert "locked.slurm.sbatch_extra" in str(_refused(copy.deepcopy(config)))
    own["sbatch_extra"].remove(extra)
    settings = resolve_written(config)["provider"]["slurm"]
    assert settings["sbatch_extra"][1:3] == ["--reservation=site", "--mem=6G"]


@pytest.mark.parametrize(
    ("locked", "own"),
    [
        ("gres: gpu:1", {"sbatch_extra": ["--tres-per-task=gres/gpu:8"]}),
        ("gres: gpu:1", {"sbatch_extra": ["--gpus-per-socket=8"]}),
        ("cpus_per_task: 4", {"sbatch_extra": ["--tres-per-task=cpu:64"]}),
        ("cpus_per_task: 4", {"sbatch_extra": ["--cpus-per-gpu=64"]}),
        ("cpus_per_task: 4", {"sbatch": {"cpus_per_gpu": 64}}),
        ("licenses: a", {"sbatch_extra": ["--tres-per-task=license/b:1"]}),
        ("nodelist: n1", {"sbatch_extra": ["--nodefile=/x"]}),
        ("nodelist: n1", {"sbatch": {"nodefile": "/x"}}),
        ("cores_per_socket: 2", {"sbatch_extra": ["--extra-node-info=2:64"]}),
        ("oversubscribe: true", {"sbatch_extra": ["--share"]}),
    ],
)
def test_no_other_option_gives_more_than_the_locked_one(site, locked, own):
    site.write_text(site.read_text().replace("sbatch: {qos: ray}", f"sbatch:\n    {locked}"))
    config = _user()
    config["available_node_types"] = {"own": {"node_config": own}}
    assert f"locked.sbatch.{locked.partition(':')[0]}" in str(_refused(config))


def test_nothing_is_the_default_and_no_way_around(site):
    config = _user()
    config["provider"]["slurm"] = {"max_queued_jobs": None, "sbatch": None, "interface": "lo"}
    config["available_node_types"] = {"cpu": {"node_config": {"sbatch": {"time": None, "partition": None}}}}
    with pytest.raises(ConfigError, match=r"provider\.slurm\.sbatch"):
        resolve_written(copy.deepcopy(config))
    del config["provider"]["slurm"]["sbatch"]
    config = resolve_written(config)
    assert config["provider"]["slurm"]["max_queued_jobs"] == 5
    options = config["available_node_types"]["cpu"]["node_config"]["sbatch"]
    assert (options["time"], options["partition"]) == ("02:00:00", "cpu")


def _attempts():
    """Ways to get around the rules, each with the rule that stops it."""

    def sbatch(**options):
        return lambda config: config.update(available_node_types={"cpu": {"node_config": {"sbatch": options}}})

    def node(**keys):
        return lambda config: config.update(available_node_types={"cpu": {"node_config": keys}})

    def slurm(**keys):
        return lambda config: config["provider"].update(slurm=keys)

    def top(**keys):
        return lambda config: config.update(keys)

    return {
        "qos of everywhere": ("locked.sbatch.qos", slurm(sbatch_extra=["--qos=high"])),
        "qos in quotes": ("locked.sbatch.qos", node(sbatch_extra=["--qos='high'"])),
        "an abbreviation": ("in full", node(sbatch_extra=["--qo=high"])),
        "an abbreviation of what locks no option": ("in full", node(sbatch_extra=["--tres-per-t=gres/gpu:8"])),
        "a second option behind": ("one option", node(sbatch_extra=["--nice=5 --qos=high"])),
        "a short option behind": ("one option", node(sbatch_extra=["--nice=5 -qhigh"])),
        "quotes that end too early": ("one option", node(sbatch_extra=["--wckey='a' --qos='high'"])),
        "a short option": ("--name=value", node(sbatch_extra=["-q high"])),
        "a second line": ("one line", node(sbatch_extra=["--nice=5\n#SBATCH --qos=high"])),
        "more nodes": ("limits.max_nodes", top(max_workers=9)),
        "more of a type": ("defaults.available_node_types.cpu", top(available_node_types={"cpu": {"max_workers": 5}})),
        "a qos for all": ("locked.sbatch.qos", slurm(sbatch={"qos": "high"})),
        "another qos": ("locked.sbatch.qos", sbatch(qos="high")),
        "qos added": ("locked.sbatch.qos", node(sbatch_extra=["--qos=high"])),
        "qos left out": ("locked.sbatch.qos", slurm(sbatch_skip=["qos"])),
        "qos of a type left out": ("locked.sbatch.qos", node(sbatch_skip=["qos"])),
        "another directory": ("locked.slurm.state_dir", slurm(state_dir="/tmp/mine")),
        "another interface": ("locked.slurm.interface", slurm(interface="eth9")),
        "other ports": ("locked.slurm.ports.services", slurm(ports={"services": "40000-40999"})),
        "other tools": ("locked.slurm.slurm_bin", slurm(slurm_bin="/home/me/bin")),
        "another SLURM": ("locked.slurm.clusters", slurm(clusters="other")),
        "another SLURM added": ("provider.slurm.clusters", slurm(sbatch_extra=["--clusters=other"])),
        "more in the queue": ("limits.max_queued_jobs", slurm(max_queued_jobs=50)),
        "any number in the queue": ("limits.max_queued_jobs", slurm(max_queued_jobs=10**6)),
        "a head on the login node": (
            "limits.login_node_head",
            top(available_node_types={"head": {"node_config": {"placement": "login_node"}}}),
        ),
        "rules of one's own": ("by hand", slurm(site={"site": "mine"})),
        "resolved already": ("by hand", node(resolved={})),
        "the variable in the job": ("sets this variable", node(env={"RAY_SLURM_SITE": "/dev/null"})),
    }


@pytest.mark.parametrize("attempt", _attempts())
def test_no_way_around(site, attempt):
    rule, change = _attempts()[attempt]
    config = _user()
    change(config)
    error = _refused(copy.deepcopy(config))
    assert rule in str(error), error
    if isinstance(error, SiteRuleError):
        assert "Example HPC" in str(error)
        assert str(site) in str(error)
        assert "help@example.org" in str(error)
    # By Ray's own way in it is the same.
    filled = SlurmNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    with pytest.raises(click.ClickException, match=rule.replace(".", r"\.")):
        SlurmNodeProvider.bootstrap_config(filled)


def test_nobody_takes_the_name_of_another_for_it(site, tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "../../elsewhere")
    assert resolve_written(_user())["provider"]["slurm"]["state_dir"] == str(tmp_path / "shared" / ME / "ray")


def test_what_was_slipped_in_later_is_refused_at_the_submission(site, tmp_path):
    settings = read_settings({"state_dir": str(tmp_path / "state")})
    assert settings.site is None
    for section in ({}, {"sbatch": {"qos": "high"}}, {"sbatch": {"qos": "ray"}, "sbatch_extra": ["--qos=high"]}):
        with pytest.raises(SiteRuleError, match=r"locked\.sbatch\.qos"):
            Cluster("mine", settings).preview("cpu", read_node_config(section, "x"), head=True)
    with pytest.raises(SiteRuleError, match=r"limits\.login_node_head"):
        Cluster("mine", settings).preview("head", read_node_config({"placement": "login_node"}, "x"), head=True)


def test_a_head_whose_host_lacks_the_file_goes_by_what_ray_up_has_read(site, monkeypatch):
    resolved = resolve_written(_user())
    monkeypatch.delenv("RAY_SLURM_SITE")
    settings = read_settings(resolved["provider"]["slurm"])
    config = read_node_config({"sbatch": {"qos": "high"}}, "x")
    with pytest.raises(SiteRuleError, match=r"locked\.sbatch\.qos of Example HPC"):
        Cluster("mine", settings).preview("cpu", config, head=True)


def test_the_admins_file_in_its_place_cannot_be_replaced_by_a_variable(site, tmp_path, monkeypatch):
    fixed = tmp_path / "etc" / "site.yaml"
    fixed.parent.mkdir()
    fixed.write_text("site: fixed\n")
    monkeypatch.setattr(site_file, "_OF_THE_HOST", fixed)
    with pytest.raises(ConfigError, match="this site's file is"):
        site_file.read_site()
    for name in ("/dev/null", str(tmp_path / "nowhere")):
        monkeypatch.setenv("RAY_SLURM_SITE", name)
        with pytest.raises(ConfigError, match="this site's file is"):
            site_file.read_site()
    monkeypatch.setenv("RAY_SLURM_SITE", str(fixed))
    assert site_file.read_site().site == "fixed"
    monkeypatch.delenv("RAY_SLURM_SITE")
    assert site_file.read_site().site == "fixed"


def test_without_a_file_nothing_changes(monkeypatch):
    monkeypatch.delenv("RAY_SLURM_SITE", raising=False)
    assert site_file.read_site() is None
    monkeypatch.setenv("RAY_SLURM_SITE", "/nowhere/site.yaml")
    with pytest.raises(ConfigError, match="which is no file"):
        site_file.read_site()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a", "is a list"),
        ("site: [", "is not YAML"),
        ("contact: x", "site"),
        ("site: x\nlimit: {}", "did you mean limits"),
        ("site: x\nlimits: [max_nodes]", "is a list"),
        ("site: x\nsource: /x", "unknown key"),
        ("site: x\nlimits: {max_nodes: 0}", "max_nodes"),
        ("site: x\nlocked: {slurm: {state_dirs: /x}}", "did you mean state_dir"),
        ("site: x\nlocked: {slurm: {sbatch: {qos: a}}}", "locked.sbatch"),
        ("site: x\nlocked: {sbatch: {comment: x}}", "unknown key"),
        ("site: x\ndefaults: {available_node_types: {a: {node_config: {sbatch: {partitions: x}}}}}", "did you mean"),
        ("site: x\ndefaults: {available_node_types: {a: {}}, head_node_type: b}", "no node type"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, text, said):
    with pytest.raises(ConfigError) as caught:
        site_file.parse_site(text, tmp_path / "site.yaml")
    assert said in str(caught.value)
    assert "site.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "way"),
    [
        ("partitions: [cpu]", "AllowAccounts"),
        ('max_time: "4:00:00"', "MaxTime"),
        ("required_options: [account]", "job_submit plugin"),
        ("forbidden_options: [nodelist]", "job_submit plugin"),
        ("allowed_values: {qos: [ray]}", "AllowQos"),
        ("state_dir: [/scratch/*]", "locked.slurm.state_dir"),
    ],
)
def test_a_limit_that_is_slurms_own_work_says_what_does_it(site, limit, way):
    site.write_text(site.read_text() + f"  {limit}\n")
    filled = SlurmNodeProvider.fillout_available_node_types_resources(prepare_config(_user()))
    with pytest.raises(click.ClickException) as caught:
        SlurmNodeProvider.bootstrap_config(filled)
    (line,) = caught.value.message.splitlines()
    assert line.startswith(f"{site}: limits.{limit.partition(':')[0]}: ")
    assert way in line
    assert "docs/site.md" in line


@pytest.mark.parametrize("option", ["--max-time=4:00:00", "--require=account", "--forbid=nodelist"])
def test_deploy_says_what_does_the_work_of_an_option_that_it_had(option):
    done = subprocess.run(
        [sys.executable, "-m", "ray_slurm_provider.cli", "deploy", "--site", option], capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: SLURM does itself")
    assert "docs/site.md" in line


def test_defaults_of_the_models_are_no_rules():
    assert SlurmSettings().site is None
