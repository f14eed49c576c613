"""What the reports of canaries mean, for defects that one host cannot have."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata

import pytest

import ray_slurm_provider
from ray_slurm_provider import procfs
from ray_slurm_provider.agent.canary import CanaryPaths, CanaryReport, _is_locked, ask_time, listen
from ray_slurm_provider.canary_findings import Canary, NodeTypeJob, what_they_found
from ray_slurm_provider.config import NodeConfig, ResolvedNode

GOOD = CanaryReport(
    greeting="word",
    slurm_node="c1",
    host="c1",
    boot_id="another",
    address="10.0.0.1",
    port=1,
    python=sys.version.split()[0],
    executable="/venv/bin/python",
    ray=metadata.version("ray"),
    plugin=ray_slurm_provider.__version__,
    lock_is_seen=True,
    open_files=100000,
    temp_dir="/tmp",
    temp_dir_free_mib=100000,
    shared_memory_mib=100000,
)


def _findings(report=GOOD, *, is_head=True, offset=0.1, reached=None):
    config = NodeConfig(resolved=ResolvedNode(resources={"object_store_memory": 2**30}))
    canary = Canary(
        NodeTypeJob("head", config, is_head), "1", report, {"login": 0.1} if reached is None else reached, offset
    )
    return {finding.check: finding for finding in what_they_found([canary], "word", ("10.0.0.9", 1))}


def test_a_good_report_is_all_ok():
    assert {finding.level for finding in _findings().values()} == {"ok"}
    assert "SLURM in the job" in _findings()
    assert "SLURM in the job" not in _findings(is_head=False)


@pytest.mark.parametrize(
    ("change", "check", "level", "said"),
    [
        ({"greeting": "else"}, "shared directory", "failure", "something else"),
        ({"lock_is_seen": False}, "file locks", "failure", "does not see a lock"),
        ({"python": "3.1.0"}, "software", "failure", "Python 3.1.0 (here"),
        ({"ray": ""}, "software", "failure", "Ray is missing"),
        ({"plugin": "0.0"}, "software", "failure", "ray-slurm-provider 0.0"),
        ({"address": "", "port": 0, "address_problem": "no ib9"}, "address", "failure", "no ib9"),
        ({"address": "127.0.1.1", "name_is_loopback": True}, "address", "failure", "127.0.1.1 there, by /etc/hosts"),
        ({"name_is_loopback": True}, "address", "warning", "127.0.1.1 in /etc/hosts"),
        ({"temp_dir_problem": "no such"}, "temp_dir", "failure", "no such"),
        ({"temp_dir_free_mib": 5}, "temp_dir", "warning", "only 5 MiB"),
        ({"open_files": 100}, "open files", "warning", "at most 100"),
        ({"shared_memory_mib": 64}, "shared memory", "warning", "/dev/shm has 64 MiB"),
        ({"slurm_problem": "sbatch is not on PATH"}, "SLURM in the job", "failure", "not on PATH"),
        ({"home_problem": "/home/x cannot be written"}, "home", "warning", "cannot be written"),
    ],
)
def test_a_defect_has_a_line_of_its_own_and_an_advice(change, check, level, said):
    finding = _findings(replace(GOOD, **change))[f"{check} of head"]
    assert finding.level == level
    assert said in finding.text
    assert finding.advice


def test_one_host_may_well_be_on_loopback():
    report = replace(GOOD, address="127.0.1.1", boot_id=procfs.boot_id(), name_is_loopback=True)
    assert {finding.level for finding in _findings(report).values()} == {"ok"}


@pytest.mark.parametrize(
    ("offset", "reached", "check", "said"),
    [
        (0.0, {}, "connections of head", "not said in time"),
        (None, {}, "connections of head", "this host does not reach it at 10.0.0.1"),
        (0.0, {"login": None}, "connections of head", "it does not reach this host at 10.0.0.9"),
        (-300.0, {}, "clock of head", "300 s behind"),
        (90.0, {}, "clock of head", "90 s ahead"),
    ],
)
def test_hosts_that_do_not_find_each_other_or_the_time(offset, reached, check, said):
    assert said in _findings(offset=offset, reached=reached)[check].text


def test_what_was_not_looked_at_is_not_called_well():
    found = _findings(replace(GOOD, address="", port=0, address_problem="no ib9"), offset=None)
    assert not {"connections", "clock", "connections of head", "clock of head"} & set(found)


def test_who_listens_tells_the_time():
    port = listen("127.0.0.1", "")
    assert abs(ask_time("127.0.0.1", port)) < 1
    assert ask_time("127.0.0.1", 1) is None


def test_a_lock_is_seen(tmp_path):
    from filelock import FileLock

    paths = CanaryPaths(tmp_path)
    with FileLock(paths.lock):
        assert _is_locked(paths.lock)
    assert not _is_locked(paths.lock)
