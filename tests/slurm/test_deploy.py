"""`ray-slurm deploy --yes && ray up` on sites of several shapes, with no edit."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from support import RAY_SLURM, UserCluster, tasks_script, user_environment

from ray_slurm_provider.sandbox.layout import read_layout
from ray_slurm_provider.sandbox.lifecycle import Sandbox

pytestmark = [pytest.mark.slurm]

LUA = """
function slurm_job_submit(job_desc, part_list, submit_uid)
  %s
  return slurm.SUCCESS
end
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
  return slurm.SUCCESS
end
return slurm.SUCCESS
"""
FORBIDDEN_MEMORY = """
  if job_desc.pn_min_memory ~= nil and job_desc.pn_min_memory < 0xfffffffffffffff0 then
    slurm.log_user("Do not ask for memory")
    return slurm.ERROR
  end
"""
REQUIRED_ACCOUNT = """
  slurm.log_user("*** Welcome ***")
  if job_desc.account ~= "physics" then
    return 2045
  end
"""
# A plugin that greets, owns the comment, and lowers what it does not like.
MEDDLING = """
  slurm.log_user("*** Welcome ***")
  job_desc.comment = "billed"
  job_desc.time_limit = 20
"""
CPU = {"name": "c", "count": 2, "memory": "8G"}
SHAPES = {
    "one-node": {"nodes": [{**CPU, "count": 1}], "partitions": [{"name": "all", "groups": ["c"]}]},
    "two-gpu-types": {
        "nodes": [CPU, {"name": "v", "gpus": 2, "gpu_type": "v100"}, {"name": "a", "cpus": 8, "gpus": 4}],
        "partitions": [
            {"name": "cpu", "groups": ["c"], "default": True},
            {"name": "gpu", "groups": ["v", "a"]},
        ],
    },
    "heterogeneous": {
        "nodes": [
            {"name": "small", "cpus": 2},
            {"name": "large", "cpus": 6, "memory": "9000M"},
            {"name": "fat", "cpus": 6, "memory": "64G", "options": {"MemSpecLimit": 1024}},
        ],
        "partitions": [
            {"name": "mixed", "groups": ["small", "large"], "default": True},
            {"name": "all", "groups": ["small", "large", "fat"], "options": {"MaxTime": "2:00:00"}},
            {"name": "closed", "groups": ["fat"], "options": {"State": "DOWN"}},
        ],
    },
    "tiny-max-time-and-no-mem": {
        "nodes": [CPU],
        "partitions": [
            {
                "name": "debug",
                "groups": ["c"],
                "default": True,
                "options": {"MaxTime": 5, "DefaultTime": 2, "DefMemPerCPU": 1500},
            }
        ],
        "settings": {"EnforcePartLimits": "NO"},
        "job_submit": LUA % FORBIDDEN_MEMORY,
    },
    "required-account-and-meddling": {
        "nodes": [CPU],
        "partitions": [{"name": "cpu", "groups": ["c"], "default": True}],
        "job_submit": LUA % (REQUIRED_ACCOUNT + MEDDLING),
        "settings": {"MaxArraySize": 0, "SelectTypeParameters": "CR_CPU"},
    },
}


class Site:
    """A SLURM of some shape, and a user on it."""

    def __init__(self, shape, directory):
        self.parent = Path(tempfile.mkdtemp(prefix="rst-"))
        self.parent.chmod(0o755)
        self.box = Sandbox(self.parent / "s")
        self.directory = directory
        (directory / "tmp").mkdir()
        self.box.up(read_layout(shape))
        self.environ = user_environment(self.box.environment(), directory)
        # A variable of the user's shell, which the provider does not pass on to sbatch.
        self.environ["SBATCH_ACCOUNT"] = "physics"

    def deploy(self, *words, code=0):
        done = subprocess.run(
            [*RAY_SLURM, "deploy", *words],
            env=self.environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def tests(self):
        """How often slurmctld was asked whether it would run a job."""
        said = subprocess.run(["sdiag"], env=self.environ, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REQUEST_JOB_WILL_RUN\s.*count:(\d+)", said)
        return int(found.group(1)) if found else 0

    def cluster(self):
        text = (self.directory / "ray-slurm.yaml").read_text()
        return UserCluster(self.directory, self.environ, yaml.safe_load(text), text=text)

    def down(self):
        self.box.down()
        shutil.rmtree(self.parent, ignore_errors=True)


@pytest.fixture
def make_site(tmp_path):
    made = []

    def make(shape):
        made.append(Site(shape, tmp_path))
        return made[-1]

    yield make
    for site in made:
        site.down()


@pytest.mark.cluster
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_deployed_comes_up_without_an_edit(make_site, tmp_path, shape):
    site = make_site(SHAPES[shape])
    said = site.deploy("--yes").stderr
    cluster = site.cluster()
    types = cluster.config["available_node_types"]
    check = json.loads(cluster.ray_slurm("check", "--fast", "--json", cluster.write()).stdout)
    assert {finding["level"] for finding in check} == {"ok"}, check
    try:
        cluster.up()
        name = max(types, key=lambda name: types[name]["node_config"]["sbatch"]["cpus_per_task"])
        cpus = types[name]["node_config"]["sbatch"]["cpus_per_task"]
        (task,) = cluster.run_on_head(tasks_script(tmp_path, 1, f"num_cpus={cpus}"))
        (worker,) = cluster.workers()
        assert (task["job"], worker.name.split("-")[2]) == (worker.job_id, name.split("-")[0])
        _look_at(shape, types, said, cluster)
        cluster.down()
        assert cluster.jobs() == []
    finally:
        cluster.destroy()


def _look_at(shape, types, said, cluster):
    """What is special about a shape."""
    options = {name: entry["node_config"]["sbatch"] for name, entry in types.items()}
    if shape == "two-gpu-types":
        assert set(types) == {"head", "cpu", "gpu-v100x2", "gpu-a100x4"}
        assert options["gpu-a100x4"]["gres"] == "gpu:a100:4"
    elif shape == "heterogeneous":
        assert set(types) == {"head", "mixed-2c", "mixed-6c", "all-2c", "all-6c-9g", "all-6c-63g"}
        assert "closed is left out: it is DOWN" in said
    elif shape == "tiny-max-time-and-no-mem":
        assert {entry["time"] for entry in options.values()} == {"00:05:00"}
        assert "--head login-node" in said
        assert not any("mem" in entry for entry in options.values())
        assert "without --mem" in said
    elif shape == "required-account-and-meddling":
        assert {entry["account"] for entry in options.values()} == {"physics"}
        assert cluster.config["provider"]["slurm"]["birth_record"] == "file"
        assert not any("mem" in entry for entry in options.values())
        assert {job.comment for job in cluster.client.jobs()} == {"billed"}
        assert json.loads(cluster.ray_slurm("clusters", "--json").stdout)[0]["state"] == "up"


def test_what_is_asked_for_is_written_and_nothing_is_overwritten(make_site, tmp_path):
    site = make_site(
        {**SHAPES["two-gpu-types"], "job_submit": LUA % ("if job_desc.account == nil then return 2045 end")}
    )
    del site.environ["SBATCH_ACCOUNT"]
    # Nobody says which account, and no database knows.
    assert "--account" in site.deploy("--yes", "-o", "-", code=1).stderr
    words = ("--yes", "--account", "chem", "--qos", "fast", "--partition", "gpu", "--time", "90", "--max-workers", "2")
    site.deploy(*words, "--setup", "module load 'cuda: 12'", "--setup", "true", "--head", "login-node")
    config = site.cluster().config
    types = config["available_node_types"]
    assert set(types) == {"head", "gpu-v100x2", "gpu-a100x4"}
    assert types["head"]["node_config"] == {"placement": "login_node"}
    assert types["gpu-a100x4"]["node_config"]["sbatch"] == {
        "partition": "gpu",
        "account": "chem",
        "qos": "fast",
        "cpus_per_task": 8,
        "mem": "4G",
        "gres": "gpu:a100:4",
        "time": "01:30:00",
    }
    assert config["max_workers"] == 2
    assert config["setup_commands"] == ["module load 'cuda: 12'", "true"]
    text = (site.directory / "ray-slurm.yaml").read_text()
    assert all(
        "#" in line for line in text.splitlines() if re.match(r"  +(partition|cpus_per_task|mem|gres|time):", line)
    )
    refused = site.deploy("--yes", "--account", "chem", code=1)
    assert "-max_workers: 2" in refused.stdout
    assert "--force" in refused.stderr
    assert (site.directory / "ray-slurm.yaml").read_text() == text
    site.deploy("--yes", "--account", "chem", "--force")
    assert set(site.cluster().config["available_node_types"]) == {"head", "cpu", "gpu-v100x2", "gpu-a100x4"}
    for words, said in (
        (["--partition", "nosuch"], "there are cpu, gpu"),
        (["--time", "99-0"], "at most 7-00:00:00"),
        (["--template", "gpu"], "copy a template from"),
        (["--cluster-name", "a b"], "cannot name a cluster"),
        (["-o", "/proc/x/y.yaml"], "cannot be written"),
    ):
        assert said in site.deploy("--yes", "--account", "chem", *words, code=1).stderr


def test_the_script_of_the_clone_is_the_same(make_site):
    site = make_site(SHAPES["one-node"])
    script = Path(__file__).parents[2] / "deploy" / "deploy.py"
    done = subprocess.run(
        [sys.executable, script, "--yes", "-o", "-"], env=site.environ, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout == site.deploy("--yes", "-o", "-").stdout
    lonely = site.directory / "deploy" / "deploy.py"
    lonely.parent.mkdir()
    shutil.copy(script, lonely)
    bare = subprocess.run(
        [sys.executable, "-I", "-S", lonely, "--yes"], env=site.environ, capture_output=True, text=True
    )
    assert bare.returncode == 1
    assert "pip install" in bare.stderr
    assert "Traceback" not in bare.stderr


def test_in_a_terminal_it_asks(make_site):
    site = make_site(SHAPES["two-gpu-types"])
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*RAY_SLURM, "deploy"], env=site.environ, cwd=site.directory, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = ""
    answers = {
        "Name of the cluster": "mine",
        "Partitions (of cpu, gpu)": "cpu",
        "Head (slurm": "",
        "Time limit": "1:00:00",
        "Shell line": "module load python",
        "File [": "my.yaml",
    }
    for question, answer in answers.items():
        while question not in said.rpartition("\n")[2]:
            said += os.read(ours, 1000).decode()
        os.write(ours, f"{answer}\n".encode())
    with contextlib.suppress(OSError):
        while True:
            said += os.read(ours, 1000).decode()
    os.close(ours)
    assert child.wait(30) == 0, said
    config = yaml.safe_load((site.directory / "my.yaml").read_text())
    assert (config["cluster_name"], set(config["available_node_types"])) == ("mine", {"head", "cpu"})
    assert config["available_node_types"]["cpu"]["node_config"]["sbatch"]["time"] == "01:00:00"
    assert config["setup_commands"] == ["module load python"]


def test_a_site_that_refuses_everything_is_told_in_its_own_words(make_site):
    site = make_site(SHAPES["required-account-and-meddling"])
    del site.environ["SBATCH_ACCOUNT"]
    said = site.deploy("--yes", code=1).stderr
    assert 1 < site.tests() <= 20
    assert "*** Welcome ***; allocation failure: Invalid account" in said
    assert "--account" in said
    assert not (site.directory / "ray-slurm.yaml").exists()
    before = site.tests()
    site.deploy("--yes", "--account", "physics")
    cluster = site.cluster()
    assert site.tests() - before == len(cluster.config["available_node_types"])
    cluster.text = cluster.text.replace("physics", "other")
    findings = json.loads(cluster.ray_slurm("check", "--fast", "--json", cluster.write(), check=False).stdout)
    assert "Invalid account" in next(f for f in findings if f["level"] == "failure")["text"]
