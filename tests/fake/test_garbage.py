"""What belongs to no living cluster, and what must not be touched."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from fake.harness import HEAD, WORKER
from ray_slurm_provider import cluster_dir
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.clusters import find_clusters
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.errors import SlurmError, StateError, SubmitRejected
from ray_slurm_provider.garbage import find_garbage, remove_garbage
from ray_slurm_provider.reports import ENDED, READY, STARTING, NodeReport, write_report


@pytest.fixture(params=["comment", "file"])
def cluster(request, fake_slurm, tmp_path):
    """A cluster with a head and two workers; both ways of recognising a job."""
    settings = SlurmSettings(
        state_dir=str(tmp_path / "state"), default_python="/usr/bin/python3", birth_record=request.param
    )
    login = Cluster("c", settings, fake_slurm.environ)
    head = login.create_head("head", NodeConfig(), HEAD)
    environ = {**fake_slurm.environ, "RAY_CLOUD_INSTANCE_ID": head, "RAY_SLURM_GCS_ADDRESS": "1.2.3.4:5"}
    for _ in range(2):
        Cluster("c", settings, environ).create_workers("worker", NodeConfig(), WORKER, 1)
    for number in (1, 2):
        fake_slurm.change(number, state="RUNNING")
    return login


def _garbage(cluster, tmp_path, later=3600):
    return find_garbage(cluster.slurm_client(), tmp_path / "state", str(tmp_path), time.time() + later)


def test_a_living_cluster_is_no_garbage(cluster, tmp_path):
    assert not _garbage(cluster, tmp_path)


def test_workers_whose_head_is_gone_and_then_the_directory(cluster, fake_slurm, tmp_path):
    fake_slurm.change(1, state="NODE_FAIL")
    garbage = _garbage(cluster, tmp_path)
    assert sorted(garbage.jobs) == ["2", "3"]
    # With its jobs nothing of the cluster is left.
    assert [directory.root for directory in garbage.directories] == [cluster.directory.root]
    assert any("whose head" in line for line in garbage.lines())
    remove_garbage(cluster.slurm_client(), garbage, str(tmp_path))
    assert [job["state"] for job in fake_slurm.jobs()] == ["NODE_FAIL", "CANCELLED", "CANCELLED"]
    assert not cluster.directory.root.exists()
    assert not _garbage(cluster, tmp_path)


def test_workers_of_a_head_that_was_replaced(cluster, fake_slurm, tmp_path):
    fake_slurm.change(1, state="CANCELLED")
    cluster.create_head("head", NodeConfig(), HEAD)
    # It has ended them; but say that SLURM did not answer then.
    for number in (2, 3):
        fake_slurm.change(number, state="PENDING")
    garbage = _garbage(cluster, tmp_path)
    assert (sorted(garbage.jobs), garbage.directories) == (["2", "3"], [])


@pytest.mark.parametrize("cluster", ["comment"], indirect=True)
def test_a_head_in_a_job_makes_no_garbage_of_the_workers_of_one_that_nobody_sees(cluster, fake_slurm, tmp_path):
    head = next(node.node_id for node in cluster.nodes().values() if node.is_head)
    fake_slurm.change(2, comment=fake_slurm.job("2")["comment"].replace(head, "login-elsewhere-7-abcdef"))
    garbage = _garbage(cluster, tmp_path)
    assert garbage.jobs == {}
    assert "a process on a login node" in garbage.kept[0]


def test_a_directory_that_was_made_a_moment_ago_is_left_alone(cluster, fake_slurm, tmp_path):
    for number in (1, 2, 3):
        fake_slurm.change(number, state="CANCELLED")
    assert _garbage(cluster, tmp_path, later=1).directories == []
    assert len(_garbage(cluster, tmp_path).directories) == 1


def test_jobs_without_our_certificate_are_never_touched(cluster, fake_slurm, tmp_path):
    fake_slurm.change(1, state="FAILED")
    fake_slurm.change(2, comment="mine", name="ray-c-worker")
    fake_slurm.change(3, comment="ray-slurm:1:{not json", name="ray-c-worker-abcdef")
    garbage = _garbage(cluster, tmp_path)
    assert garbage.jobs == {}


def test_directories_that_are_no_clusters_are_left_alone(cluster, tmp_path):
    precious = tmp_path / "state" / "precious"
    precious.mkdir()
    os.utime(precious, (0, 0))
    assert not _garbage(cluster, tmp_path)


@pytest.fixture
def another_slurm(fake_slurm):
    """Return what makes the tools speak to a SLURM of another identity, which has none of the jobs."""

    def speak(**identity):
        (fake_slurm.directory / "jobs.json").unlink(missing_ok=True)
        fake_slurm.faults(**identity)

    return speak


OTHERS = [{"slurm": "other"}, {"controllers": ["ctl9"]}]


@pytest.mark.parametrize("identity", OTHERS)
def test_a_cluster_of_another_slurm_is_left_alone(cluster, another_slurm, tmp_path, identity):
    another_slurm(**identity)
    garbage = _garbage(cluster, tmp_path)
    assert not garbage
    assert "its jobs are in SLURM cluster fake (ctl1:6817), but SLURM cluster" in garbage.kept[0]
    (row,) = find_clusters(cluster.slurm_client(), tmp_path / "state")
    assert (row.name, row.state) == ("c", "unknown")


@pytest.mark.parametrize("identity", OTHERS)
def test_a_command_that_reaches_another_slurm_neither_removes_nor_starts_a_cluster(cluster, another_slurm, identity):
    another_slurm(**identity)
    again = Cluster("c", cluster.settings, cluster._environ)
    token, environment = cluster.directory.token_file.read_text(), cluster.directory.environment()
    with pytest.raises(StateError, match="set SLURM_CONF"):
        again.clean_up()
    with pytest.raises(StateError, match="set SLURM_CONF"):
        Cluster("c", cluster.settings, {**cluster._environ, "ITS": "own"}).create_head("head", NodeConfig(), HEAD)
    assert cluster.directory.token_file.read_text() == token
    # With it the living head submits its workers: a SLURM_CONF in it would take them elsewhere.
    assert cluster.directory.environment() == environment
    # With its own word that it ended it may be started anywhere, and belongs there then.
    write_report(cluster.directory.reports, NodeReport("1-a", ENDED), head=True)
    again.create_head("head", NodeConfig(), HEAD)
    assert again.directory.slurm() == again.slurm_client().identity()


def test_an_earlier_head_that_ended_says_nothing_of_the_present_one(cluster, fake_slurm, another_slurm):
    write_report(cluster.directory.reports, NodeReport("1-a", ENDED), head=True)
    for number in (1, 2, 3):
        fake_slurm.change(number, state="COMPLETED")
    queued = Cluster("c", cluster.settings, cluster._environ).create_head("head", NodeConfig(), HEAD)
    another_slurm(slurm="other")
    again = Cluster("c", cluster.settings, cluster._environ)
    with pytest.raises(StateError, match="set SLURM_CONF"):
        again.clean_up()
    with pytest.raises(StateError, match="set SLURM_CONF"):
        again.create_head("head", NodeConfig(), HEAD)
    write_report(cluster.directory.reports, NodeReport(queued, ENDED), head=True)
    again.clean_up()
    assert not cluster.directory.exists


def test_without_a_note_of_its_slurm_a_head_that_answers_is_neither_removed_nor_replaced(cluster, another_slurm):
    (cluster.directory.root / "slurm.json").unlink()
    another_slurm(slurm="other")
    again = Cluster("c", cluster.settings, cluster._environ)
    with socket.socket() as gcs:
        gcs.bind(("127.0.0.1", 0))
        gcs.listen()
        report = NodeReport("1-a", READY, address="127.0.0.1", ports={"gcs": gcs.getsockname()[1]})
        write_report(cluster.directory.reports, report, head=True)
        with pytest.raises(StateError, match="its head, which answers at 127.0.0.1:"):
            again.clean_up()
        with pytest.raises(StateError, match="its head, which answers at 127.0.0.1:"):
            again.create_head("head", NodeConfig(), HEAD)
    again.clean_up()
    assert not cluster.directory.exists


@pytest.mark.parametrize(
    "said",
    [
        # A documentation address: no packet comes back.
        json.dumps({"node_id": "1-a", "phase": READY, "host": "n1", "address": "192.0.2.1", "ports": {"gcs": 6379}}),
        json.dumps({"node_id": "1-a", "phase": STARTING, "host": "n1"}),
        '{"node_id": "1-',
    ],
)
def test_without_a_note_of_its_slurm_only_a_head_that_is_positively_gone_is(
    cluster, another_slurm, tmp_path, monkeypatch, said
):
    monkeypatch.setattr(cluster_dir, "connection_state", lambda *_: "unknown")
    noted = (cluster.directory.root / "slurm.json").read_text()
    (cluster.directory.root / "slurm.json").unlink()
    cluster.directory.reports.head.write_text(said)
    another_slurm(slurm="other")
    assert "its head may live on" in _garbage(cluster, tmp_path).kept[0]
    again = Cluster("c", cluster.settings, cluster._environ)
    with pytest.raises(StateError, match="its head, which may live on"):
        again.create_head("head", NodeConfig(), HEAD)
    with pytest.raises(StateError, match="its head, which may live on"):
        again.clean_up()
    # Its own SLURM's word counts, whatever the head says.
    another_slurm()
    (cluster.directory.root / "slurm.json").write_text(noted)
    assert [directory.root for directory in _garbage(cluster, tmp_path).directories] == [cluster.directory.root]


def test_a_head_that_was_refused_changes_no_claim_on_the_cluster(cluster, fake_slurm, another_slurm):
    noted = (cluster.directory.root / "slurm.json").read_text()
    write_report(cluster.directory.reports, NodeReport("1-a", READY, host="n1"), head=True)
    another_slurm(refuse="Invalid partition name specified")
    with pytest.raises(SubmitRejected):
        Cluster("c", cluster.settings, cluster._environ).create_head("head", NodeConfig(), HEAD)
    assert (cluster.directory.root / "slurm.json").read_text() == noted
    fake_slurm.faults()
    assert Cluster("c", cluster.settings, cluster._environ).create_head("head", NodeConfig(), HEAD)


def test_a_slurm_that_refused_the_head_has_no_claim_on_the_cluster(fake_slurm, tmp_path):
    settings = SlurmSettings(state_dir=str(tmp_path / "state"), default_python="/usr/bin/python3")
    cluster = Cluster("c", settings, fake_slurm.environ)
    fake_slurm.faults(refuse="sbatch: error: Batch job submission failed: Invalid partition name specified")
    with pytest.raises(SubmitRejected):
        cluster.create_head("head", NodeConfig(), HEAD)
    fake_slurm.faults(slurm="other")
    cluster.create_head("head", NodeConfig(), HEAD)
    assert cluster.directory.slurm() == cluster.slurm_client().identity()


def test_a_slurm_that_does_not_say_which_it_is_changes_nothing(cluster, another_slurm):
    noted = cluster.directory.slurm()
    another_slurm(slurm="")
    with pytest.raises(SlurmError, match="which SLURM this is"):
        Cluster("c", cluster.settings, cluster._environ).create_head("head", NodeConfig(), HEAD)
    assert cluster.directory.slurm() == noted


def test_another_host_for_the_controller_is_no_other_slurm(cluster, another_slurm, tmp_path):
    another_slurm(controllers=["ctl0", "ctl1"])
    assert not _garbage(cluster, tmp_path).kept


def test_a_head_that_answers_is_no_garbage_though_slurm_does_not_know_it(cluster, fake_slurm, tmp_path):
    (cluster.directory.root / "slurm.json").unlink()
    for number in (1, 2, 3):
        fake_slurm.change(number, state="CANCELLED")
    with socket.socket() as gcs:
        gcs.bind(("127.0.0.1", 0))
        gcs.listen()
        report = NodeReport("1-a", READY, address="127.0.0.1", ports={"gcs": gcs.getsockname()[1]})
        write_report(cluster.directory.reports, report, head=True)
        garbage = _garbage(cluster, tmp_path)
        assert not garbage
        assert "its head answers at 127.0.0.1:" in garbage.kept[0]
    assert len(_garbage(cluster, tmp_path).directories) == 1


@pytest.mark.parametrize("faults", [{"down": ["squeue"]}, {"squeue": ""}, {"squeue": "half"}])
def test_when_slurm_does_not_answer_nothing_is_garbage(cluster, fake_slurm, tmp_path, faults):
    fake_slurm.faults(**faults)
    with pytest.raises(SlurmError):
        _garbage(cluster, tmp_path)
