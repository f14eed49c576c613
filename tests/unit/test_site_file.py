"""The site file: what it fills in, and that nothing gets around it."""

from __future__ import annotations

import copy
import os
import pwd

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
  sbatch: {time: "02:00:00"}
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
  partitions: [cpu, gpu]
  max_nodes: 9
  max_time: "04:00:00"
  max_queued_jobs: 5
  forbidden_options: [nodelist, exclusive]
  allowed_values: {container: [/apps/containers/*], account: [physics, chem-*]}
  state_dir: [SHARED/$USER/*]
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
    site.write_text(site.read_text().replace("forbidden_options:", "required_options: [account]\n  forbidden_options:"))
    assert "limits.required_options" in str(_refused(_user()))
    config = _user()
    config["provider"]["slurm"] = {"sbatch": {"account": "physics", "mem_per_cpu": "1G", "time": "1:00:00"}}
    types = resolve_written(config)["available_node_types"]
    for name in ("head", "cpu", "gpu"):
        options = types[name]["node_config"]["sbatch"]
        assert (options["account"], options["mem_per_cpu"], options["time"]) == ("physics", "1G", "1:00:00")
        assert "mem" not in options
    config["provider"]["slurm"]["sbatch"]["partition"] = "secret"
    assert "limits.partitions" in str(_refused(config))


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
        "another partition": ("limits.partitions", sbatch(partition="secret")),
        "one of a list": ("limits.partitions", sbatch(partition="cpu,secret")),
        "a list with a blank": ("limits.partitions", sbatch(partition="cpu, secret")),
        "partition of everywhere": ("limits.partitions", slurm(sbatch_extra=["--partition=secret"])),
        "partition of a type": ("limits.partitions", node(sbatch_extra=["--partition=secret"])),
        "partition in quotes": ("limits.partitions", node(sbatch_extra=["--partition='secret'"])),
        "an abbreviation": ("in full", node(sbatch_extra=["--parti=secret"])),
        "a second option behind": ("one option", node(sbatch_extra=["--nice=5 --partition=secret"])),
        "a short option behind": ("one option", node(sbatch_extra=["--nice=5 -psecret"])),
        "a short option": ("--name=value", node(sbatch_extra=["-p secret"])),
        "a second line": ("one line", node(sbatch_extra=["--nice=5\n#SBATCH --partition=secret"])),
        "no partition": ("limits.partitions", slurm(sbatch_skip=["partition"])),
        "more time": ("limits.max_time", sbatch(time="04:00:01")),
        "days": ("limits.max_time", sbatch(time="1-0")),
        "no limit": ("limits.max_time", sbatch(time="UNLIMITED")),
        "zero is no limit": ("limits.max_time", sbatch(time="0")),
        "least time": ("limits.max_time", sbatch(time_min="5:00:00")),
        "time left out": ("limits.max_time", node(sbatch_skip=["time"])),
        "time added": ("limits.max_time", slurm(sbatch_extra=["--time=9:00:00"])),
        "more nodes": ("limits.max_nodes", top(max_workers=9)),
        "more of a type": ("defaults.available_node_types.cpu", top(available_node_types={"cpu": {"max_workers": 5}})),
        "a partition for all": ("limits.partitions", slurm(sbatch={"partition": "secret"})),
        "a qos for all": ("locked.sbatch.qos", slurm(sbatch={"qos": "high"})),
        "another qos": ("locked.sbatch.qos", sbatch(qos="high")),
        "qos added": ("locked.sbatch.qos", node(sbatch_extra=["--qos=high"])),
        "qos left out": ("locked.sbatch.qos", slurm(sbatch_skip=["qos"])),
        "a forbidden option": ("limits.forbidden_options", sbatch(nodelist="n1")),
        "a forbidden option added": ("limits.forbidden_options", node(sbatch_extra=["--exclusive"])),
        "another container": ("limits.allowed_values.container", sbatch(container="/home/me/evil")),
        "another account": ("limits.allowed_values.account", sbatch(account="physics,other")),
        "another directory": ("locked.slurm.state_dir", slurm(state_dir="/tmp/mine")),
        "another interface": ("locked.slurm.interface", slurm(interface="eth9")),
        "other ports": ("locked.slurm.ports.services", slurm(ports={"services": "40000-40999"})),
        "other tools": ("locked.slurm.slurm_bin", slurm(slurm_bin="/home/me/bin")),
        "another SLURM": ("locked.slurm.clusters", slurm(clusters="other")),
        "another SLURM added": ("provider.slurm.clusters", slurm(sbatch_extra=["--clusters=other"])),
        "more in the queue": ("limits.max_queued_jobs", slurm(max_queued_jobs=50)),
        "any number in the queue": ("limits.max_queued_jobs", slurm(max_queued_jobs=10**6)),
        "no time at all": ("limits.max_time", node(sbatch={"time": None}, sbatch_skip=["time"])),
        "a head on the login node": (
            "limits.login_node_head",
            top(available_node_types={"head": {"node_config": {"placement": "login_node"}}}),
        ),
        "rules of one's own": ("by hand", slurm(site={"site": "mine", "source": "", "locked_sbatch": {}})),
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


def test_a_state_dir_outside_of_the_patterns_is_refused_by_links_and_dots_too(site, tmp_path):
    text = site.read_text().replace(f"    state_dir: {tmp_path}/shared/$USER/ray\n", "")
    site.write_text(text)
    home = tmp_path / "shared" / ME
    home.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (home / "link").symlink_to(tmp_path / "elsewhere")
    good = _user()
    good["provider"]["slurm"] = {"state_dir": str(home / "fine")}
    resolve_written(good)
    for bad in (tmp_path / "elsewhere", f"{home}/../../elsewhere", home / "link"):
        config = _user()
        config["provider"]["slurm"] = {"state_dir": str(bad)}
        assert "limits.state_dir" in str(_refused(config))


def test_nobody_takes_the_name_of_another_for_it(site, tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "../../elsewhere")
    assert resolve_written(_user())["provider"]["slurm"]["state_dir"] == str(tmp_path / "shared" / ME / "ray")


def test_what_was_slipped_in_later_is_refused_at_the_submission(site, tmp_path):
    settings = read_settings({"state_dir": str(tmp_path / "state")})
    assert settings.site is None
    config = read_node_config({"sbatch": {"partition": "secret", "time": "1:00:00", "qos": "ray"}}, "x")
    with pytest.raises(SiteRuleError, match=r"limits\.partitions"):
        Cluster("mine", settings).preview("cpu", config, head=True)


def test_a_head_whose_host_lacks_the_file_goes_by_what_ray_up_has_read(site, monkeypatch):
    resolved = resolve_written(_user())
    monkeypatch.delenv("RAY_SLURM_SITE")
    settings = read_settings(resolved["provider"]["slurm"])
    config = read_node_config({"sbatch": {"partition": "secret", "time": "1:00:00", "qos": "ray"}}, "x")
    with pytest.raises(SiteRuleError, match=r"limits\.partitions"):
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
        ("site: x\nlimits: {max_time: 10:30:00}", "must be in quotes"),
        ("site: x\nlimits: {max_time: UNLIMITED}", "is no limit"),
        ("site: x\nlimits: {forbidden_options: [unicorn]}", "no option"),
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


def test_defaults_of_the_models_are_no_rules():
    assert SlurmSettings().site is None
