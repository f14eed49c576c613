"""What is made of what SLURM says of a site."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from ray_slurm_provider.bootstrap import resolve_written
from ray_slurm_provider.cli import cli
from ray_slurm_provider.deployment import deploy
from ray_slurm_provider.deployment.document import cluster_document, commented, node_type_lines, scalar
from ray_slurm_provider.deployment.probing import MOST_QUESTIONS, fit, moving, possible_changes
from ray_slurm_provider.deployment.proposal import Option, Wishes, propose
from ray_slurm_provider.deployment.survey import take_survey
from ray_slurm_provider.errors import DeployError, SlurmError, SubmitRejected
from ray_slurm_provider.slurm import parse
from ray_slurm_provider.slurm.client import SlurmClient

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
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 1000)
        return take_survey(Slurm())


def test_a_site_is_read(survey):
    assert (survey.cluster, survey.version) == ("big", "23.11.4")
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
    assert {worker.sbatch["time"].value for worker in cpu} == {"04:00:00"}
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
    changes = list(possible_changes(replace(survey, accounts=("one", "two"), qos=("fast",)), worker))
    assert [change.what for change in changes][:5] == ["account", "account", "mem", "qos", "gres"]
    assert "gpus_per_node" in next(c for c in changes if c.what == "gres").apply(worker).sbatch
    assert "mem" not in next(c for c in changes if c.what == "mem").apply(worker).sbatch


class Sbatch:
    """Refuses a node type by rules: the first that speaks; what was asked is kept."""

    def __init__(self, *rules):
        self.rules = rules
        self.asked = []

    def __call__(self, form):
        self.asked.append(form)
        options = {name: option.value for name, option in form.sbatch.items()} | dict.fromkeys(form.skip, "skipped")
        return next((words for rule in self.rules if (words := rule(options))), "")


def _no_mem(options):
    return "mem" in options and "Do not ask for memory; allocation failure: Unspecified error"


def _account(options):
    return options.get("account") != "two" and "Invalid account or account/partition combination specified"


def _qos(options):
    return options.get("qos") != "fast" and "Job violates accounting/QOS policy (user's size and/or time limits)"


def _short(options):
    return options["time"] > "00:30:00" and "Requested time limit is invalid"


def _silent(options):
    return ("mem" in options or options.get("account") != "two") and "Unspecified error"


def _talkative(options):
    return _no_mem(options) and f"Welcome, it is {10 + len(options)}:07; mem, time, qos and account are yours to choose"


@pytest.mark.parametrize(
    ("rules", "most", "changed"),
    [
        ([], 1, []),
        ([_no_mem], 2, ["mem"]),
        ([_account, _no_mem], 4, ["account", "mem"]),
        ([_no_mem, _account], 4, ["mem", "account"]),
        ([_no_mem, _account, _qos, _short], 9, ["mem", "account", "qos", "time"]),
        ([lambda options: "signal" not in options and "no --signal here"], 2, ["signal"]),
        ([lambda options: "ntasks" not in options and "Unspecified error"], 14, ["ntasks"]),
        ([lambda options: "gres" in options and "GPUs are asked for otherwise"], 2, ["gres"]),
        ([_talkative], 4, ["mem"]),
    ],
)
def test_what_sbatch_says_leads_to_the_form_that_it_accepts(survey, rules, most, changed):
    worker = propose(survey, Wishes("mine", partitions=["gpu"])).workers[0]
    sbatch = Sbatch(*rules)
    found = fit(worker, list(possible_changes(replace(survey, accounts=("one", "two"), qos=("fast",)), worker)), sbatch)
    assert not found.refusal
    assert [change.what for change in found.changes] == changed
    assert len(sbatch.asked) <= most
    # Nothing is left in it of what was tried in vain.
    assert not sbatch(found.form)
    assert set(found.form.skip) <= set(changed)
    assert {name for name in found.form.sbatch if name not in worker.sbatch} <= {*changed, "gpus_per_node"}


@pytest.mark.parametrize("rule", [_silent, lambda _: "No", lambda options: f"No {sorted(options.items())}"])
def test_sbatch_is_asked_at_most_20_times(survey, rule):
    worker = propose(survey, Wishes("mine", partitions=["gpu"])).workers[0]
    accounts = tuple(f"a{number}" for number in range(50))
    sbatch = Sbatch(rule)
    found = fit(worker, list(possible_changes(replace(survey, accounts=accounts, qos=accounts), worker)), sbatch)
    assert len(sbatch.asked) == MOST_QUESTIONS == 20
    assert found.refusal == rule(
        {name: option.value for name, option in found.form.sbatch.items()} | dict.fromkeys(found.form.skip, "skipped")
    )


def test_a_change_that_makes_a_new_mistake_is_undone(survey):
    worker = propose(survey, Wishes("mine", partitions=["gpu"])).workers[0]
    sbatch = Sbatch(lambda options: options.get("account") == "one" and "Invalid account", _no_mem)
    changes = possible_changes(replace(survey, accounts=("one",)), worker)
    found = fit(worker, sorted(changes, key=lambda change: change.what != "account"), sbatch)
    assert "account" not in found.form.sbatch


def test_a_head_is_tried_in_the_other_partitions_too(survey):
    heads = propose(survey, Wishes("mine")).heads
    sbatch = Sbatch(
        _account, lambda options: options["partition"] != "gpu" and "User's group not permitted to use this partition"
    )
    changes = [*possible_changes(replace(survey, accounts=("one", "two")), heads[0]), *map(moving, heads[1:])]
    found = fit(heads[0], changes, sbatch)
    assert (found.refusal, found.form.sbatch["partition"].value) == ("", "gpu")
    assert found.form.sbatch["time"] == heads[2].sbatch["time"]
    assert len(sbatch.asked) <= 10


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """What sbatch is asked, and what it says to it, by the directives of the script."""
    seen = SimpleNamespace(tests=[], says=lambda directives: "", comment="")

    def test_submit(self, script, environ):
        directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))
        seen.tests.append(directives)
        if words := seen.says(directives):
            raise SubmitRejected(["sbatch"], 1, "", f"sbatch: error: *** Welcome ***\n{words}", "refused")
        return "could start"

    monkeypatch.setattr(SlurmClient, "test_submit", test_submit)
    monkeypatch.setattr(SlurmClient, "submit", lambda self, script, environ: "1")
    monkeypatch.setattr(SlurmClient, "jobs", lambda self: [SimpleNamespace(job_id="1", comment='{"t":"TOKEN"}')])
    monkeypatch.setattr(SlurmClient, "cancel", lambda self, ids: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    return seen


def _deployed(survey, tell=lambda line: None, **wishes):
    return deploy.make_cluster_yaml(
        survey,
        Wishes("mine", **wishes),
        file_name="x.yaml",
        settings={},
        max_nodes=None,
        environ={},
        tell=tell,
    )


def test_a_site_that_refuses_everything_is_asked_20_times(survey, slurm):
    slurm.says = lambda directives: "allocation failure: Invalid qos specification"
    with pytest.raises(DeployError) as refused:
        _deployed(replace(survey, accounts=tuple("abcdefghijkl"), qos=("q", "r")))
    assert len(slurm.tests) == 20
    assert "*** Welcome ***; allocation failure: Invalid qos specification" in str(refused.value)
    assert all(option in str(refused.value) for option in ("--account", "--qos", "--partition", "--head login-node"))
    slurm.tests.clear()
    with pytest.raises(DeployError, match="sbatch refuses every node type"):
        _deployed(replace(survey, accounts=tuple("abcdefghijkl")), partitions=["cpu"], head="login_node")
    assert len(slurm.tests) == 40


def test_what_the_head_needs_is_tried_first_with_the_workers(survey, slurm):
    def says(directives):
        if "mem" in directives:
            return "Do not ask for memory"
        return "" if directives.get("account") == "c" else "Invalid account"

    slurm.says = says
    told = []
    made = _deployed(replace(survey, accounts=("a", "b", "c")), told.append)
    types = yaml.safe_load(made.text)["available_node_types"]
    assert {entry["node_config"]["sbatch"]["account"] for entry in types.values()} == {"c"}
    assert not any("mem" in entry["node_config"]["sbatch"] for entry in types.values())
    # Without anything, without memory, three accounts; the one that was right comes first with the eight workers.
    assert len(slurm.tests) == 5 + 8 * 3 - 1
    assert told == [
        "partition closed is left out: it is DRAIN",
        "partition theirs is left out: it is for the groups nobody-is-in-it",
        "partition empty is left out: it has no nodes",
        "without --mem, which the site refuses",
        "with --account=c: the site wants an account",
    ]
    assert all(f"# * {line}" in made.text for line in told)


def test_a_type_that_is_refused_is_left_out_and_the_options_that_may_help_are_said(survey, slurm):
    slurm.says = lambda directives: "No" if directives["partition"] == "gpu" else ""
    told = []
    made = _deployed(survey, told.append)
    config = yaml.safe_load(made.text)
    assert not any(name.startswith("gpu") for name in config["available_node_types"])
    assert config["max_workers"] == sum(worker.max_workers for worker in made.proposal.workers)
    assert told[-2].startswith("node type gpu-a100x4-64c is left out, sbatch refuses it: sbatch: error: *** Welcome")
    assert "--account" in told[-1]


def _document(survey, wishes, settings, proposal=None):
    proposal = proposal or propose(survey, wishes)
    types = list(node_type_lines(proposal, knows_priority=True))
    return cluster_document(survey, wishes, proposal, file_name="my cluster.yaml", settings=settings, types=types)


def test_the_yaml_says_what_was_proposed_and_every_line_why(survey):
    wishes = Wishes("mine", setup=["a", "module load 'cuda: 12'"], qos="1e3", max_workers=7)
    settings = {
        "state_dir": ("~/x", "why"),
        "prologue": (["a #"], "why"),
        "ports": ({"services": "22000-22199"}, "why"),
    }
    text = _document(survey, wishes, settings)
    config = yaml.safe_load(text)
    assert (config["cluster_name"], config["max_workers"]) == ("mine", 7)
    assert config["setup_commands"] == ["a", "module load 'cuda: 12'"]
    assert config["provider"]["slurm"] == {
        "state_dir": "~/x",
        "prologue": ["a #"],
        "ports": {"services": "22000-22199"},
    }
    types = config["available_node_types"]
    assert list(types)[:3] == ["head", "cpu-250g", "cpu-953g"]
    assert types["gpu-a100x4-64c"]["node_config"]["sbatch"] == {
        "partition": "gpu",
        "qos": "1e3",
        "cpus_per_task": 64,
        "mem": "250G",
        "gres": "gpu:a100:4",
        "time": "04:00:00",
    }
    assert (types["gpu-a100x4-64c"]["idle_timeout_s"], "idle_timeout_s" in types["all"]) == (120, False)
    assert (types["all"]["priority"], "priority" in types["cpu-250g"]) == (-1, False)
    bare = {line.partition(":")[0].strip() for line in text.splitlines() if "#" not in line}
    assert bare - set(types) == {
        *("", "provider", "type", "module", "slurm", "head_node_type", "available_node_types", "node_config", "sbatch"),
        *("head_setup_commands", "worker_setup_commands"),
    }
    assert all(len(line) <= 120 for line in text.splitlines()[1:])
    resolve_written(_without(config, "priority"))


def _without(config, key):
    """Ray does not know this key yet, maybe."""
    for entry in config["available_node_types"].values():
        entry.pop(key, None)
    return config


def test_the_yaml_has_no_section_that_is_empty(survey):
    config = yaml.safe_load(_document(survey, Wishes("mine", head="login_node"), {}))
    assert "slurm" not in config["provider"]
    assert config["available_node_types"]["head"]["node_config"] == {"placement": "login_node"}
    proposal = propose(survey, Wishes("mine", partitions=["cpu"]))
    skips = [replace(worker, skip=["signal", "ntasks"]) for worker in proposal.workers]
    odd = [worker.with_options({"mem": Option("a: #b", "why")}) for worker in skips]
    text = _document(survey, Wishes("mine"), {}, replace(proposal, workers=odd, notes=["one: 1 " * 40]))
    worker = yaml.safe_load(text)["available_node_types"]["cpu-250g"]["node_config"]
    assert (worker["sbatch_skip"], worker["sbatch"]["mem"]) == (["signal", "ntasks"], "a: #b")


def test_whoever_asks_for_a_template_is_told_where_they_are():
    done = CliRunner().invoke(cli, ["deploy", "--template", "gpu"])
    assert isinstance(done.exception, DeployError)
    (directory,) = re.findall(r"copy a template from (\S+) and edit it", str(done.exception))
    assert "gpu.yaml" in {path.name for path in Path(directory).iterdir()}


@pytest.mark.parametrize(
    "value", ["cpu", "01:00:00", "7-00:00:00", "gpu:a100:4", "yes", "1e3", "a b", "~/x", "ä", "", "0x1", "# x"]
)
def test_a_value_is_read_as_it_was_meant(value):
    assert yaml.safe_load(f"key: {commented(scalar(value), 'why')}")["key"] == value
