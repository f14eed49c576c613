"""Sites that own the comment, limit the queue, greet, or have several SLURMs behind one set of tools."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from fake.harness import HEAD, WORKER
from ray_slurm_provider import preflight
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.clusters import find_clusters
from ray_slurm_provider.config import NodeConfig, SlurmSettings
from ray_slurm_provider.deferred_launches import DeferredLaunches
from ray_slurm_provider.errors import (
    ConfigError,
    LaunchDelayed,
    SlurmUnavailable,
    StateError,
    SubmitRejected,
)
from ray_slurm_provider.findings import WARNING
from ray_slurm_provider.nodes import TAG_TYPE
from ray_slurm_provider.reports import NodeReport, write_report
from ray_slurm_provider.site_rules import SiteFile, SiteLimits

CONFIG = NodeConfig()


@pytest.fixture
def make(fake_slurm, tmp_path, monkeypatch):
    """Make the cluster as `ray up` sees it, or as the autoscaler of a head does; each reason is news, nothing is held."""
    monkeypatch.setattr(DeferredLaunches, "is_news", lambda *_: True)

    def make(head="", **settings):
        settings = SlurmSettings(
            state_dir=str(tmp_path / "state"), command_timeout_s=1, default_python="/usr/bin/python3", **settings
        )
        environ = dict(fake_slurm.environ)
        if head:
            environ |= {"RAY_CLOUD_INSTANCE_ID": head, "RAY_SLURM_GCS_ADDRESS": "1.2.3.4:5"}
            environ["RAY_SLURM_DIR"] = str(tmp_path / "state" / "c")
        # A clock that runs: every listing is asked for anew.
        return Cluster("c", settings, environ, clock=iter(range(0, 10**9, 1000)).__next__)

    return make


def test_a_comment_that_the_site_writes_is_told_and_no_job_is_left(make, fake_slurm):
    fake_slurm.faults(comment="billed")
    with pytest.raises(StateError, match="birth_record: file"):
        make().create_head("head", CONFIG, HEAD)
    assert [job["state"] for job in fake_slurm.jobs()] == ["CANCELLED"]


def test_with_records_in_files_everything_works_without_the_comment(make, fake_slurm, tmp_path):
    fake_slurm.faults(comment="billed")
    head = make(birth_record="file").create_head("head", CONFIG, HEAD)
    assert make().nodes()[head].tags == HEAD  # how it was written down does not matter to who reads
    monitor = make(head, birth_record="file")
    first, second = monitor.create_workers("worker", CONFIG, WORKER, 2)
    assert set(monitor.nodes()) == {head, first, second}
    assert make(head).nodes()[first].tags == WORKER
    # Somebody else's job with such a name; and one of ours under another id.
    fake_slurm.change(2, id="7")
    names = [job["name"] for job in fake_slurm.jobs()]
    assert names[0].startswith("ray-c-head-")
    fake_slurm.change(3, name="ray-c-worker-aaaaaa")
    seen = make(birth_record="file").nodes()
    assert set(seen) == {head, f"7-{first.partition('-')[2]}"}
    fake_slurm.change(3, name=names[2])
    (row,) = find_clusters(monitor.slurm_client(), tmp_path / "state")
    assert (row.name, row.head, row.queued) == ("c", head, 2)
    monitor.terminate([second])
    assert second not in monitor.nodes()


def test_records_that_were_deleted_hide_no_living_head(make, fake_slurm):
    head = make(birth_record="file").create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    directory = make().directory
    write_report(directory.reports, NodeReport(head, "ready"), head=True)
    shutil.rmtree(directory.births)
    for ask in (lambda: make().nodes(), lambda: make(birth_record="file").create_head("head", CONFIG, HEAD)):
        with pytest.raises(StateError, match=f"record of job {head} was deleted.*\n.*scancel 1"):
            ask()
    fake_slurm.change(1, state="CANCELLED")
    assert make().nodes() == {}


def test_a_record_is_there_before_its_job_and_goes_when_there_is_none(make, fake_slurm):
    fake_slurm.faults(lost=True)
    cluster = make(birth_record="file")
    head = cluster.create_head("head", CONFIG, HEAD)
    assert set(cluster.nodes()) == {head}
    fake_slurm.faults(refuse="Invalid account")
    with pytest.raises(SubmitRejected):
        make(head, birth_record="file").create_workers("worker", CONFIG, WORKER, 1)
    assert len(list(cluster.directory.births.iterdir())) == 1
    fake_slurm.faults(down=["sbatch"])
    with pytest.raises(SlurmUnavailable):
        make(head, birth_record="file").create_workers("worker", CONFIG, WORKER, 1)


def test_records_in_files_need_the_jobs_name(make):
    with pytest.raises(ConfigError, match="job_name"):
        make(birth_record="file", sbatch_skip=["job-name"]).create_head("head", CONFIG, HEAD)


def test_the_queue_takes_no_more_than_was_agreed(make, fake_slurm):
    head = make().create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    monitor = make(head, max_queued_jobs=3)
    with pytest.raises(LaunchDelayed, match=r"2 jobs of type worker have to wait.*3 of the cluster.*max_queued_jobs"):
        monitor.create_workers("worker", CONFIG, WORKER, 5)
    assert len(fake_slurm.jobs()) == 4
    with pytest.raises(LaunchDelayed, match="1 jobs"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    fake_slurm.change(2, state="RUNNING")
    assert len(monitor.create_workers("worker", CONFIG, WORKER, 1)) == 1


def test_a_node_type_has_a_number_of_its_own(make, fake_slurm):
    head = make().create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="RUNNING")
    monitor = make(head, max_queued_jobs=5)
    few = NodeConfig(max_queued_jobs=2)
    with pytest.raises(LaunchDelayed, match=r"2 jobs of type worker have to wait.*2 of this type"):
        monitor.create_workers("worker", few, WORKER, 4)
    monitor.create_workers("other", CONFIG, {**WORKER, TAG_TYPE: "other"}, 3)
    with pytest.raises(LaunchDelayed, match="5 of the cluster"):
        monitor.create_workers("other", CONFIG, {**WORKER, TAG_TYPE: "other"}, 1)
    assert len(fake_slurm.jobs()) == 6


def test_the_sites_number_of_nodes_holds_whatever_the_yaml_became(make, fake_slurm):
    rules = SiteFile(site="here", source="/x", limits=SiteLimits(max_nodes=5))
    head = make().create_head("head", CONFIG, HEAD)
    monitor = make(head, site=rules)
    monitor.create_workers("worker", CONFIG, WORKER, 1)
    with pytest.raises(LaunchDelayed, match=r"3 nodes have to wait: limits\.max_nodes of here"):
        monitor.create_workers("worker", CONFIG, WORKER, 6)
    assert len(fake_slurm.jobs()) == 5
    with pytest.raises(LaunchDelayed, match="1 nodes have to wait"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert len(fake_slurm.jobs()) == 5


def test_one_of_several_slurms_whatever_the_shell_says(make, fake_slurm):
    fake_slurm.environ["SLURM_CLUSTERS"] = "first"
    cluster = make(clusters="second")
    head = cluster.create_head("head", CONFIG, HEAD)
    assert [job["cluster"] for job in fake_slurm.jobs()] == ["second"]
    assert set(cluster.nodes()) == {head}
    cluster.terminate([head])
    assert [job["state"] for job in fake_slurm.jobs()] == ["CANCELLED"]


def test_a_job_that_another_cluster_of_a_federation_starts_is_cancelled_and_its_type_pauses(make, fake_slurm):
    head = make().create_head("head", CONFIG, HEAD)
    monitor = make(head)
    (worker,) = monitor.create_workers("worker", CONFIG, WORKER, 1)
    monitor.nodes()
    fake_slurm.change(2, state="REVOKED")
    # On a shared file system its report is seen here.
    write_report(monitor.directory.reports, NodeReport(worker, "ready", ready_at=1), head=False)
    monitor.nodes()
    assert fake_slurm.job("2")["state"] == "CANCELLED"
    with pytest.raises(LaunchDelayed, match="it pauses until.*another cluster of the federation has started the job"):
        monitor.create_workers("worker", CONFIG, WORKER, 1)
    assert len(fake_slurm.jobs()) == 2


def test_a_head_that_another_cluster_of_a_federation_starts_is_told(make, fake_slurm):
    cluster = make()
    head = cluster.create_head("head", CONFIG, HEAD)
    fake_slurm.change(1, state="REVOKED")
    assert "another cluster of the federation has started the job" in cluster.obituary(head)
    assert "`scancel 1` ends it there" in cluster.obituary(head)


def test_the_check_names_a_federation(make, fake_slurm):
    site = SimpleNamespace(slurm=make().slurm_client())
    assert list(preflight._federation(site)) == []
    fake_slurm.faults(federation="Federation: both\nSelf:       here:127.0.0.1:6817 ID:1 FedState:ACTIVE Features:\n")
    (finding,) = preflight._federation(site)
    assert finding.level == WARNING
    assert "the federation both may start jobs on another" in finding.text
