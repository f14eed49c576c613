"""The checker finds what it is there for, and nothing else."""

from __future__ import annotations

import pytest

from faults.checker import FORGOTTEN_S, ORPHAN_S, Checker, Sample
from ray_slurm_provider.birth_certificate import BirthCertificate

HEAD, WORKER = "1-aaaaaa", "2-bbbbbb"


def _job(token, head="", state="RUNNING", cluster="c"):
    return {"JobState": state, "Comment": BirthCertificate(cluster, "d", token, head, {}).text()}


@pytest.fixture
def checker(tmp_path):
    return Checker(None, "c", 2, tmp_path / "log", tmp_path / "state.json")


def _judge(checker, jobs, ray, *times):
    for now in times:
        checker.judge(Sample(now, jobs, ray))
    return checker.problems


def test_a_healthy_cluster_has_no_problems(checker):
    jobs = {
        "1": _job("aaaaaa"),
        "2": _job("bbbbbb", HEAD),
        "3": _job("cccccc", HEAD, "PENDING"),
        "9": {"JobState": "RUNNING"},
    }
    assert _judge(checker, jobs, [HEAD, WORKER], 0, 1000) == []


def test_a_worker_without_its_head_is_an_orphan_when_that_lasts(checker):
    jobs = {"1": _job("aaaaaa", state="NODE_FAIL"), "2": _job("bbbbbb", HEAD)}
    assert _judge(checker, jobs, None, 0, ORPHAN_S - 1) == []
    (problem,) = _judge(checker, jobs, None, ORPHAN_S + 1, ORPHAN_S + 2)
    assert "orphan: job 2" in problem


def test_more_workers_than_there_may_be_two_heads_and_one_certificate_twice_are_duplicates(checker):
    assert _judge(checker, {"1": _job("aaaaaa"), **{str(i): _job(f"bbbbb{i}", HEAD) for i in (2, 3, 4)}}, None, 0)
    checker.problems.clear()
    assert "two heads" in _judge(checker, {"1": _job("aaaaaa"), "7": _job("dddddd")}, None, 1)[0]
    checker.problems.clear()
    jobs = {"1": _job("aaaaaa"), "5": _job("eeeeee", HEAD), "6": _job("eeeeee", HEAD, "CANCELLED")}
    assert "one certificate" in _judge(checker, jobs, None, 2)[0]


def test_the_elements_of_an_array_are_jobs_of_one_submission(checker):
    comment = BirthCertificate("c", "d", "eeeeee", HEAD, {}).text()
    waiting = f"JobId=5 ArrayJobId=5 ArrayTaskId=1,3-4%7 JobState=PENDING Comment={comment}"
    runs = f"JobId=6 ArrayJobId=5 ArrayTaskId=0 JobState=RUNNING Comment={comment}"
    checker.tell = lambda *words: f"{waiting}\n{runs}\n"
    jobs = checker._jobs()
    assert sorted(jobs) == ["5_0", "5_1", "5_3", "5_4"]
    assert _judge(checker, {"1": _job("aaaaaa"), "5_0": jobs["5_0"], "5_1": jobs["5_1"]}, None, 0) == []
    assert "one certificate" in _judge(checker, {"1": _job("aaaaaa"), "7_0": jobs["5_0"]}, None, 1)[0]


def test_a_job_that_has_ended_by_its_own_word_is_no_duplicate_but_must_go(checker, tmp_path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "2-bbbbb2.json").write_text('{"phase": "ended"}')
    jobs = {"1": _job("aaaaaa"), **{str(i): _job(f"bbbbb{i}", HEAD) for i in (2, 3, 4)}}
    assert _judge(checker, jobs, None, 0, FORGOTTEN_S - 1) == []
    assert "ghost: job 2" in _judge(checker, jobs, None, FORGOTTEN_S + 1)[0]


def test_a_job_that_slurm_itself_has_requeued_is_no_duplicate_but_must_go(checker):
    again = {"2": {**_job("bbbbb2", HEAD, "PENDING"), "Restarts": "1"}}
    jobs = {"1": _job("aaaaaa"), **again, **{str(i): _job(f"bbbbb{i}", HEAD) for i in (3, 4)}}
    assert _judge(checker, jobs, None, 0, FORGOTTEN_S - 1) == []
    assert "requeued: SLURM has requeued job 2" in _judge(checker, jobs, None, FORGOTTEN_S + 1)[0]


@pytest.mark.parametrize("ray", [[HEAD], [HEAD, WORKER, "8-ffffff"]])
def test_what_slurm_has_and_ray_has_not_or_the_other_way_is_forgotten_when_that_lasts(checker, ray):
    jobs = {"1": _job("aaaaaa"), "2": _job("bbbbbb", HEAD)}
    assert _judge(checker, jobs, ray, 0, FORGOTTEN_S - 1) == []
    assert len(_judge(checker, jobs, ray, FORGOTTEN_S + 1)) == 1


def test_time_in_which_slurm_does_not_answer_does_not_count(checker):
    jobs = {"1": _job("aaaaaa"), "2": _job("bbbbbb", HEAD)}
    _judge(checker, jobs, [HEAD], 0)
    _judge(checker, None, [HEAD], 1000)
    assert _judge(checker, jobs, [HEAD], 1001, 1001 + FORGOTTEN_S - 2) == []
    assert len(_judge(checker, jobs, [HEAD], 1001 + FORGOTTEN_S)) == 1


def test_what_scontrol_prints_is_read(checker):
    comment = BirthCertificate("c", "d", "aaaaaa", "", {"ray-user-node-type": "größe 2"}).text()
    line = f"JobId=7 JobName=ray c UserId=root(0) JobState=RUNNING Reason=None Comment={comment} StdErr=/x y/z"
    checker.tell = lambda *words: line + "\nJobId=8 JobState=PENDING Comment=other x=1\n"
    jobs = checker._jobs()
    assert jobs["7"]["JobState"] == "RUNNING"
    assert checker._certificate(jobs["7"]).token == "aaaaaa"
    assert checker._certificate(jobs["8"]) is None
