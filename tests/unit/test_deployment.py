"""What is made of what SLURM says of a site."""

from __future__ import annotations

import pytest
import yaml

from ray_slurm_provider.deployment.document import commented, read_template, scalar, template_names, write_document
from ray_slurm_provider.deployment.probing import possible_changes
from ray_slurm_provider.deployment.proposal import Proposal, Wishes, propose
from ray_slurm_provider.deployment.survey import take_survey
from ray_slurm_provider.errors import DeployError, SlurmError
from ray_slurm_provider.slurm import parse

CONFIG = """Configuration data as of 2026-01-01T00:00:00
ClusterName             = big
MaxArraySize            = 1001
PreemptMode             = REQUEUE
SelectTypeParameters    = CR_CORE_MEMORY
SLURM_VERSION           = 23.11.4

Slurmctld(primary) at ctl is UP
"""


def _node(name, partitions, *, cpus=64, memory=256000, gres="(null)", state="IDLE", more=""):
    return (
        f"NodeName={name} Arch=x86_64 CoresPerSocket=32 CPUAlloc=0 CPUEfctv={cpus} CPUTot=64 CPULoad=0.01"
        f" AvailableFeatures=rome Gres={gres} NodeAddr={name} OS=Linux 5.14 #1 SMP Fri (x) RealMemory={memory}"
        f" State={state} {more}Partitions={partitions}  BootTime=2026-01-01T00:00:00 Reason=it broke [root@2026]"
    )


NODES = [
    _node("n1", "cpu,all"),
    _node("n2", "cpu,all", memory=257000),
    _node("n3", "cpu,all", state="IDLE+DRAIN"),
    _node("f1", "cpu,all", memory=1000000, more="MemSpecLimit=24000 "),
    _node("g1", "gpu,all", gres="gpu:a100:4(S:0-1),shard:8(S:0)"),
    _node("g2", "gpu", gres="gpu:a100:4", cpus=62),
    _node("m1", "mig", gres="gpu:1g.10gb:7,gpu:2g.20gb:1"),
    _node("u1", "plain", gres="gpu:2", memory=1),
]
PARTITION = (
    "PartitionName={name} AllowGroups={groups} AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default={default}"
    " DefaultTime={default_time} DisableRootJobs=NO MaxTime={time} RootOnly=NO ReqResv=NO State={state} MaxNodes=UNLIMITED"
    " MaxCPUsPerNode={cpus} MaxMemPerNode={memory}"
)
FACTS = {
    "default": "NO",
    "time": "1-00:00:00",
    "default_time": "NONE",
    "groups": "ALL",
    "state": "UP",
    "cpus": "UNLIMITED",
    "memory": "UNLIMITED",
}
PARTITIONS = [
    {"name": "all", "time": "UNLIMITED", "cpus": "32", "memory": "100000"},
    {"name": "cpu", "default": "YES", "default_time": "12:00:00"},
    {"name": "gpu"},
    {"name": "mig"},
    {"name": "plain"},
    {"name": "closed", "state": "DRAIN"},
    {"name": "theirs", "groups": "nobody-is-in-it"},
    {"name": "empty"},
]


class Slurm:
    """Answers like `SlurmClient`."""

    def nodes(self):
        return [parse.parse_show(line) for line in NODES]

    def configuration(self):
        return parse.parse_config(CONFIG)

    def partitions(self):
        return {entry["name"]: parse.parse_show(PARTITION.format(**{**FACTS, **entry})) for entry in PARTITIONS}

    def associations(self, user):
        raise SlurmError(["sacctmgr"], 1, "", "there is no database")


@pytest.fixture
def survey(monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 1000)
    return take_survey(Slurm())


def test_a_site_is_read(survey):
    assert (survey.cluster, survey.version, survey.max_array_size) == ("big", "23.11.4", 1001)
    assert survey.memory_tracked
    assert survey.partitions[0].name == "cpu"
    assert {partition.name: partition.closed for partition in survey.partitions if partition.closed} == {
        "closed": "it is DRAIN",
        "theirs": "it is for the groups nobody-is-in-it",
        "empty": "it has no nodes",
    }
    cpu = survey.partitions[0]
    assert [(kind.cpus, kind.memory_mib, kind.names, kind.gone) for kind in cpu.kinds] == [
        (64, 256000, ("n1", "n3", "n2"), 1),
        (64, 976000, ("f1",), 0),
    ]
    (everywhere,) = [partition for partition in survey.partitions if partition.name == "all"]
    assert {(kind.cpus, kind.memory_mib) for kind in everywhere.kinds} == {(32, 100000)}
    assert everywhere.max_time_s is None


def test_each_kind_in_each_partition_is_a_type_with_a_name_that_people_know(survey):
    proposal = propose(survey, Wishes("mine"))
    types = {worker.name: worker for worker in proposal.workers}
    assert list(types) == [
        "cpu-250g",
        "cpu-953g",
        "all",
        "all-a100x4",
        "gpu-a100x4-62c",
        "gpu-a100x4-64c",
        "mig-1g.10gbx7",
        "plain-gpux2",
    ]
    assert types["gpu-a100x4-64c"].sbatch["gres"].value == "gpu:a100:4"
    assert types["plain-gpux2"].sbatch["gres"].value == "gpu:2"
    assert "mem" not in types["plain-gpux2"].sbatch
    head = proposal.heads[0]
    assert (head.sbatch["partition"].value, head.sbatch["time"].value) == ("cpu", "1-00:00:00")
    assert [other.sbatch["partition"].value for other in proposal.heads] == ["cpu", "all", "gpu", "mig", "plain"]
    cpu = [worker for worker in proposal.workers if worker.sbatch["partition"].value == "cpu"]
    assert {worker.sbatch["time"].value for worker in cpu} == {"12:00:00"}
    # Of few nodes each has room for the head.
    assert {worker.sbatch["cpus_per_task"].value for worker in cpu} == {63}
    assert all(worker.priority == -1 for name, worker in types.items() if name.startswith("all"))


def test_wishes_count(survey):
    proposal = propose(
        survey,
        Wishes("mine", partitions=["gpu"], account="a", qos="q", head="login_node", time_s=3600, max_workers=3),
    )
    assert proposal.heads[0].sbatch == {}
    assert proposal.max_workers == 3
    for worker in proposal.workers:
        options = {name: option.value for name, option in worker.sbatch.items()}
        assert (options["account"], options["qos"], options["time"]) == ("a", "q", "01:00:00")


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"partitions": ["nosuch"]}, "there is no partition nosuch"),
        ({"partitions": ["closed"]}, "cannot be used: it is DRAIN"),
        ({"partitions": ["gpu"], "time_s": 10**6}, "at most 1-00:00:00"),
    ],
)
def test_what_cannot_be_is_said(survey, wishes, said):
    with pytest.raises(DeployError, match=said):
        propose(survey, Wishes("mine", **wishes))


def test_what_a_site_may_want_is_tried_in_a_sensible_order(survey):
    worker = propose(survey, Wishes("mine", partitions=["gpu"])).workers[0]
    changes = possible_changes(["one", "two"], ["fast"], worker)
    assert [change.what for change in changes][:5] == ["account", "account", "mem", "qos", "gres"]
    assert "gpus_per_node" in next(c for c in changes if c.what == "gres").apply(worker).sbatch
    assert "mem" not in next(c for c in changes if c.what == "mem").apply(worker).sbatch


@pytest.mark.parametrize("name", template_names())
def test_every_template_keeps_its_comments_and_settings(survey, name):
    text = read_template(name)
    written = write_document(
        text,
        survey,
        Wishes("mine", setup=["a", "b"]),
        Proposal([], [], 7),
        file_name="x.yaml",
        settings={"state_dir": ("/s", "why"), "interface": ("ib0", "why"), "birth_record": ("file", "why")},
        types=["available_node_types:", "  head: {}"],
    )
    old, new = yaml.safe_load(text), yaml.safe_load(written)
    assert (new["cluster_name"], new["max_workers"], new["setup_commands"]) == ("mine", 7, ["a", "b"])
    assert new["provider"]["slurm"] == {
        **old["provider"]["slurm"],
        "state_dir": "/s",
        "interface": "ib0",
        "birth_record": "file",
    }
    changed = {"cluster_name", "max_workers", "setup_commands", "provider", "available_node_types", "head_node_type"}
    assert {key: value for key, value in new.items() if key not in changed} == {
        key: value for key, value in old.items() if key not in changed
    }
    assert "Ray wants to see these keys" in written or name == "full"


def test_a_template_of_ones_own_may_look_otherwise(survey):
    text = (
        "max_workers: 1\nhead_node_type: x\navailable_node_types: {x: {}}\ncluster_name: y  # mine\n"
        "provider:\n      # deep\n      type: external\n      module: m\n\n# the end\nauth: {}\n"
    )
    settings = {"state_dir": ("/s", "why"), "ports": ({"services": "1-2"}, "why")}
    lines = ["available_node_types:", "  head: {}"]
    written = write_document(
        text, survey, Wishes("mine"), Proposal([], [], 7), file_name="x", settings=settings, types=lines
    )
    new = yaml.safe_load(written)
    assert new["provider"] == {
        "type": "external",
        "module": "m",
        "slurm": {"state_dir": "/s", "ports": {"services": "1-2"}},
    }
    assert (new["auth"], new["cluster_name"], new["available_node_types"]) == ({}, "mine", {"head": {}})
    assert "# deep" in written
    assert "# the end" in written


@pytest.mark.parametrize(
    "text", ["- a", "a: 1", "available_node_types: {}", "cluster_name: x\navailable_node_types: {a: {}}"]
)
def test_a_template_that_is_none_is_refused(survey, text):
    with pytest.raises(DeployError, match="template"):
        write_document(text, survey, Wishes("m"), Proposal([], [], 1), file_name="x", settings={}, types=[])


@pytest.mark.parametrize(
    "value", ["cpu", "01:00:00", "7-00:00:00", "gpu:a100:4", "yes", "1e3", "a b", "~/x", "ä", "", "0x1", "# x"]
)
def test_a_value_is_read_as_it_was_meant(value):
    assert yaml.safe_load(f"key: {commented(scalar(value), 'why')}")["key"] == value
