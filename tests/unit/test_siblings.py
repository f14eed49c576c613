"""Which other jobs a node's job may cancel, and on whose word."""

from __future__ import annotations

import pytest

from ray_slurm_provider.agent.siblings import Siblings
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.birth_certificate import BirthCertificate
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.errors import SlurmUnavailable
from ray_slurm_provider.reports import NodeReport, ReportPaths, write_report
from ray_slurm_provider.slurm.types import Job, JobState


class Slurm:
    """A SLURM that knows some jobs."""

    def __init__(self, jobs):
        self.rows = jobs
        self.away = False
        self.cancelled = []

    def jobs(self):
        if self.away:
            raise SlurmUnavailable(["squeue"], 1, "", "nobody there")
        return self.rows

    def cancel(self, job_ids):
        self.cancelled += job_ids


def _job(job_id, token, head="1-a", state=JobState.RUNNING, cluster="c", home="d"):
    return Job(job_id, state, comment=BirthCertificate(cluster, home, token, head).text())


HEAD = _job("1", "a", head="")
OTHERS = [
    HEAD,
    _job("2", "b"),
    _job("3", "c"),
    _job("4_[0-7]", "d", state=JobState.PENDING),
    _job("5", "e", state=JobState.COMPLETED),
    _job("6", "f", head="9-z"),
    _job("7", "g", cluster="other"),
    _job("8", "h", home="elsewhere"),
    Job("10", JobState.RUNNING, comment="a job of mine"),
]
OURS = ["3", "4_[0-7]"]  # of job 2
ENDED = [HEAD._replace(state=JobState.CANCELLED), *OTHERS[1:]]


@pytest.fixture
def slurm():
    return Slurm(OTHERS)


@pytest.fixture
def worker(tmp_path, slurm):
    (tmp_path / "nodes").mkdir()
    return _siblings(tmp_path, slurm)


def _siblings(tmp_path, slurm, node_id="2-b", head="1-a"):
    return Siblings(AgentSpec("c", "d", str(tmp_path), head=head, gcs_address="10.0.0.1:5"), node_id, slurm)


def test_a_head_cancels_what_works_for_it_and_nothing_else(tmp_path, slurm):
    _siblings(tmp_path, slurm, "1-a", head="").cancel()
    assert slurm.cancelled == ["2", *OURS]


def test_a_worker_cancels_nothing_while_the_heads_job_lives(worker, slurm):
    worker.cancel_orphans()
    assert slurm.cancelled == []


@pytest.mark.parametrize(
    "rows", [ENDED, OTHERS[1:], [_job("1", "later", head=""), *OTHERS[1:]]], ids=["ended", "forgotten", "id came back"]
)
def test_a_worker_cancels_the_others_when_slurm_says_that_the_heads_job_ended(worker, slurm, rows):
    slurm.rows = rows
    worker.cancel_orphans()
    assert slurm.cancelled == OURS


def test_a_controller_that_has_lost_its_list_says_nothing(worker, slurm):
    slurm.rows = []
    assert not worker.head_ended()


def test_slurm_that_does_not_answer_says_nothing(worker, slurm):
    slurm.away = True
    worker.cancel_orphans()
    assert not worker.head_ended()
    assert slurm.cancelled == []


def test_a_failing_scancel_is_a_warning(worker, slurm, caplog, monkeypatch):
    slurm.rows = ENDED

    def refuse(_):
        raise SlurmUnavailable(["scancel"], 1, "", "nobody there")

    monkeypatch.setattr(slurm, "cancel", refuse)
    worker.cancel_orphans()
    assert "could not be cancelled" in caplog.text


@pytest.mark.parametrize("head", ["1-a", "login-host-77-a"])
def test_the_heads_own_word_is_enough_also_of_one_on_a_login_node(tmp_path, slurm, head):
    (tmp_path / "nodes").mkdir()
    slurm.rows = [HEAD, *(_job(str(ord(token)), token, head=head) for token in "bc")]
    worker = _siblings(tmp_path, slurm, "98-b", head=head)
    for phase, cancelled in (("ready", []), ("ended", ["99"])):
        write_report(ReportPaths(tmp_path), NodeReport(head, phase), head=True)
        worker.cancel_orphans()
        assert slurm.cancelled == cancelled


def test_slurm_has_no_word_about_a_head_on_a_login_node(tmp_path, slurm):
    worker = _siblings(tmp_path, slurm, head="login-host-77-a")
    assert not worker.head_ended()


@pytest.mark.parametrize("record", [None, b"\xff\xfe", b"{", b"[" * 100_000])
def test_a_head_whose_record_cannot_be_read_has_not_ended(tmp_path, worker, slurm, record):
    """With `birth_record: file` the comment is the site's."""
    slurm.rows = [Job("1", JobState.RUNNING, name="ray-c-head-aaaaaa"), OTHERS[1]]
    if record is not None:
        (tmp_path / "births").mkdir()
        (tmp_path / "births" / "aaaaaa.birth").write_bytes(record)
    assert not worker.head_ended()


def test_jobs_are_known_by_their_records(tmp_path, slurm):
    births = BirthRecords(tmp_path / "births")
    births.save(BirthCertificate("c", "d", "bbbbbb", "1-aaaaaa"))
    slurm.rows = [Job("2", JobState.RUNNING, name="ray-c-w-bbbbbb"), Job("3", JobState.RUNNING, name="ray-c-w-cccccc")]
    _siblings(tmp_path, slurm, "1-aaaaaa", head="").cancel()
    assert slurm.cancelled == ["2"]
