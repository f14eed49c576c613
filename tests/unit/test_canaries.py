"""What probe jobs find and what the login node makes of it, for defects that one host cannot have."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_slurm_provider import procfs
from ray_slurm_provider.agent import canary, host_checks
from ray_slurm_provider.agent.canary import LOCK, ProbeReport, compare, why_not_locked
from ray_slurm_provider.agent.host_checks import ask_time, check_address, check_host, listen_as_ray, versions
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.canaries import ProbeJob, _check_comments, _submit, _why_silent, findings_of
from ray_slurm_provider.errors import SlurmError, StateError, SubmitRejected
from ray_slurm_provider.files import write_json
from ray_slurm_provider.findings import Finding
from ray_slurm_provider.locks import locked

GREETING = {"token": "abc", "boot_id": "another", "versions": versions()}
HOST = {"temp_dir": "/tmp", "resources": {"object_store_memory": 2**30}}


def _by_check(findings):
    return {finding.check: finding for finding in findings}


def _on_this_host(**changed):
    return _by_check(check_host(**{**HOST, **changed}))


def _compared(*, why_not_locked="", **changed):
    return _by_check(compare({**GREETING, **changed}, "1-abc", why_not_locked))


@pytest.fixture
def good_host(monkeypatch):
    """A host with a name of its own and room for everything, as changed by who asks for it."""

    def change(*, disk_mib=10**5, shm_mib=10**5, files=10**5, own_address="10.0.0.1", home_is_writable=True):
        shm, disk = SimpleNamespace(total=shm_mib * 2**20), SimpleNamespace(free=disk_mib * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shm if path == "/dev/shm" else disk)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
        monkeypatch.setattr(socket, "gethostbyname", lambda _: own_address)
        monkeypatch.setattr(os, "access", lambda *_: home_is_writable)

    change()
    return change


def test_a_good_host_is_all_ok(good_host):
    findings = [*compare(GREETING, "1-abc", ""), *check_host(**HOST)]
    findings.append(check_address("10.0.0.1", one_host=False))
    assert {finding.level for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == [
        *("shared directory", "file locks", "software"),
        *("temp_dir", "open files", "shared memory", "home", "address"),
    ]


@pytest.mark.parametrize(
    ("change", "check", "level", "said"),
    [
        ({"token": "else"}, "shared directory", "failure", "something else"),
        ({"why_not_locked": "no locks"}, "file locks", "failure", "no locks"),
        ({"versions": {**versions(), "Python": "3.1.0"}}, "software", "failure", "(here 3.1.0)"),
        ({"versions": {**versions(), "ray-slurm-provider": "0.0"}}, "software", "failure", "(here 0.0)"),
        ({"versions": {}}, "software", "failure", "Python"),
    ],
)
def test_a_difference_from_the_login_node_is_told_with_an_advice(change, check, level, said):
    finding = _compared(**change)[check]
    assert finding.level == level
    assert said in finding.text
    assert finding.advice


def test_a_host_without_ray_is_told(monkeypatch):
    monkeypatch.setattr(host_checks, "versions", lambda: {**versions(), "Ray": ""})
    assert "Ray is missing (here " in _compared()["software"].text


def test_nothing_is_compared_with_a_greeting_that_is_not_ours():
    assert list(_by_check(compare({}, "1-abc", "no locks"))) == ["shared directory"]


@pytest.mark.parametrize(
    ("change", "asked", "check", "level", "said"),
    [
        ({}, {"temp_dir": "/nowhere"}, "temp_dir", "failure", "/nowhere"),
        ({}, {"temp_dir": "/tmp/" + "x" * 80}, "temp_dir", "failure", "bytes too long"),
        ({"disk_mib": 512}, {}, "temp_dir", "warning", "only 512 MiB"),
        ({"files": 100}, {}, "open files", "warning", "at most 100"),
        ({"shm_mib": 64}, {}, "shared memory", "warning", "/dev/shm has 64 MiB, and the object store 1024"),
        ({"home_is_writable": False}, {}, "home", "warning", "cannot be written"),
    ],
)
def test_a_defect_of_a_host_is_told_with_an_advice(good_host, change, asked, check, level, said):
    good_host(**change)
    finding = _on_this_host(**asked)[check]
    assert finding.level == level
    assert said in finding.text
    assert finding.advice


def test_without_limit_files_are_many(good_host):
    good_host(files=resource.RLIM_INFINITY)
    assert _on_this_host()["open files"].level == "ok"


def test_the_temp_dir_is_not_left_behind(good_host):
    with tempfile.TemporaryDirectory(prefix="rst-") as place:
        assert _on_this_host(temp_dir=place)["temp_dir"].level == "ok"
        assert list(Path(place).iterdir()) == []


@pytest.mark.parametrize(
    ("address", "one_host", "own_address", "level", "said"),
    [
        ("127.0.1.1", False, "127.0.1.1", "failure", "127.0.1.1 there, by /etc/hosts"),
        ("127.0.0.1", False, "10.0.0.1", "failure", "itself for every other host"),
        ("10.0.0.1", False, "127.0.1.1", "warning", "127.0.1.1 in /etc/hosts"),
        ("127.0.1.1", True, "127.0.1.1", "ok", "Ray would use 127.0.1.1"),
    ],
)
def test_an_address_has_to_serve_the_others(good_host, address, one_host, own_address, level, said):
    good_host(own_address=own_address)
    finding = check_address(address, one_host=one_host)
    assert finding.level == level
    assert said in finding.text
    assert bool(finding.advice) == (level != "ok")


def test_an_interface_that_is_not_there_is_told():
    def choose():
        raise ValueError("no ib9")

    address, port, finding = listen_as_ray(choose, "", one_host=False)
    assert (address, port) == ("", 0)
    assert (finding.check, finding.level, finding.text) == ("address", "failure", "no ib9")
    assert finding.advice


def test_who_listens_tells_the_time():
    address, port, _ = listen_as_ray(lambda: "127.0.0.1", "", one_host=True)
    assert abs(ask_time(address, port)) < 1
    for nobody in (1, 0, -1, 10**6):
        assert ask_time("127.0.0.1", nobody) is None


class _Slurm:
    def __init__(self, *_):
        pass

    def node_address(self, _):
        return "127.0.0.1"

    def jobs(self):
        raise SlurmError(["squeue"], 1, "", "squeue is not on PATH")


def test_only_the_heads_job_asks_for_slurm(good_host, monkeypatch, tmp_path):
    monkeypatch.setattr(canary, "SlurmClient", _Slurm)
    write_json(tmp_path / canary.GREETING, {**GREETING, "boot_id": procfs.boot_id()})
    environ = {"RAY_CLOUD_INSTANCE_ID": "1-abc", "SLURMD_NODENAME": "c1"}
    spec = AgentSpec("x", "home", str(tmp_path))
    found = {head: canary.look(spec._replace(head=head), environ) for head in ("", "HEAD")}
    slurm = _by_check(found[""].findings)["SLURM in the job"]
    assert slurm.level == "failure"
    assert "not on PATH" in slurm.text
    assert slurm.advice
    assert "SLURM in the job" not in _by_check(found["HEAD"].findings)
    assert found["HEAD"].host == f"c1 ({socket.gethostname()})"
    # Nobody holds a lock; all else is well.
    assert [finding.check for finding in found["HEAD"].findings if finding.level != "ok"] == ["file locks"]


def test_a_lock_is_seen(tmp_path):
    with locked(tmp_path / LOCK, 1):
        assert why_not_locked(tmp_path / LOCK) == ""
    assert "does not see" in why_not_locked(tmp_path / LOCK)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EIO, errno.ESTALE])
def test_locks_that_do_not_work_are_not_called_held(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert os.strerror(number) in why_not_locked(tmp_path / LOCK)
    with pytest.raises(StateError, match=os.strerror(number)), locked(tmp_path / LOCK, 0.1):
        pytest.fail("it is not locked")


def test_a_host_without_locks_breaks_none_of_another_host(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    flock = fcntl.flock
    with locked(tmp_path / LOCK, 1):
        monkeypatch.setattr(fcntl, "flock", fail)
        with pytest.raises(StateError, match="cannot be locked"), locked(tmp_path / LOCK, 0.1):
            pytest.fail("it is not locked")
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(StateError, match="another process holds it"), locked(tmp_path / LOCK, 0.1):
            pytest.fail("it is locked already")
    with locked(tmp_path / LOCK, 0.1):
        pass


HEAD = ProbeReport(
    "c1", "10.0.0.1", 1, [Finding("home", "ok", "can be written")], {"head": 0.0, "worker": 0.1, "this host": 0.1}
)
WORKER = replace(HEAD, host="c2 (n2)", address="10.0.0.2")
LOGIN = {"this host": ("10.0.0.9", 1)}


def _told(head=HEAD, worker=WORKER, offset=0.1, login=LOGIN):
    jobs = [ProbeJob("head", "1", head, offset), ProbeJob("worker", "2", worker, 0.0)]
    peers = {job.name: (job.report.address, job.report.port) for job in jobs if job.report.port}
    return _by_check(findings_of(jobs, {**peers, **login}))


def test_what_is_well_has_one_line_for_all():
    told = _told()
    assert {finding.level for finding in told.values()} == {"ok"}
    assert list(told) == ["probe jobs", "home", "connections", "clock"]
    assert told["probe jobs"].text == "ran: head on c1, worker on c2 (n2)"
    assert told["home"].text == "head, worker: can be written"


def test_what_is_not_well_has_a_line_of_its_own():
    told = _told(worker=replace(WORKER, findings=[Finding("home", "warning", "cannot be written", "another")]))
    assert told["home"].text == "head: can be written"
    assert told["home of worker"] == Finding("home of worker", "warning", "c2 (n2): cannot be written", "another")


@pytest.mark.parametrize(
    ("offset", "reached", "check", "level", "said"),
    [
        (0.0, {}, "connections of head", "failure", "not said in time"),
        (None, HEAD.reached, "connections of head", "failure", "this host does not reach it at 10.0.0.1"),
        (0.0, {**HEAD.reached, "this host": None}, "connections of head", "failure", "not reach this host at 10.0.0.9"),
        (0.0, {**HEAD.reached, "worker": None}, "connections of head", "failure", "not reach worker at 10.0.0.2"),
        (0.0, {"head": 0.0, "worker": 0.0}, "connections of head", "failure", "not reach this host at 10.0.0.9"),
        (-300.0, HEAD.reached, "clock of head", "warning", "300 s behind"),
        (90.0, HEAD.reached, "clock of head", "warning", "90 s ahead"),
        (float("nan"), HEAD.reached, "clock of head", "warning", "its clock is"),
    ],
)
def test_hosts_that_do_not_find_each_other_or_the_time(offset, reached, check, level, said):
    finding = _told(replace(HEAD, reached=reached), offset=offset)[check]
    assert finding.level == level
    assert said in finding.text
    assert finding.advice


def test_what_was_not_looked_at_is_not_called_well():
    told = _told(replace(HEAD, address="", port=0), offset=None)
    assert {"connections of head", "clock of head"} & set(told) == set()
    assert "head" not in told["connections"].text + told["clock"].text


def test_a_report_is_read_as_it_was_written(tmp_path):
    job = ProbeJob("head", "1")
    job.read_report(tmp_path)
    assert job.report is None
    write_json(canary.report_path(tmp_path, "1"), asdict(HEAD))
    job.read_report(tmp_path)
    assert job.report == HEAD


def _changed(**changed):
    return json.dumps({**asdict(HEAD), **changed}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\0",
        b"[]",
        b"null",
        b'{"host": "c1"}',
        _changed()[:-9],
        _changed(host=["c1"]),
        _changed(port="80"),
        _changed(findings=[{"check": "home"}]),
        _changed(findings=[{"check": "home", "level": "splendid", "text": "", "advice": ""}]),
        _changed(reached={"worker": "soon"}),
    ],
)
def test_a_report_that_is_none_is_a_finding(tmp_path, text):
    job = ProbeJob("head", "1")
    canary.report_path(tmp_path, "1").write_bytes(text)
    job.read_report(tmp_path)
    assert (job.report.port, job.report.reached) == (0, {})
    finding = _told(job.report, offset=None)["probe job of head"]
    assert finding.level == "failure"
    assert "job 1: its report is not understood here: " in finding.text
    assert finding.advice


@pytest.mark.parametrize(("category", "level"), [("limit", "warning"), ("partition", "failure")])
def test_a_refused_job_is_told_and_the_others_run(category, level):
    class Slurm:
        def submit(self, script, _):
            if script == "bad":
                raise SubmitRejected(["sbatch"], 1, "", "no, thanks", category)
            return "7"

    jobs = []
    (finding,) = _submit(Slurm(), {"head": "bad", "worker": "good"}, {}, jobs)
    assert (finding.check, finding.level) == ("probe job of head", level)
    assert "sbatch refuses it: no, thanks" in finding.text
    assert finding.advice
    assert jobs == [ProbeJob("worker", "7")]


@pytest.mark.parametrize(
    ("row", "level", "said"),
    [
        (SimpleNamespace(queued=False, reason="None"), "warning", "job 1 runs, and has not reported yet"),
        (SimpleNamespace(queued=True, reason="Priority"), "warning", "job 1 is still queued: Priority"),
        (SimpleNamespace(queued=True, reason="BadConstraints"), "failure", "it will never start"),
    ],
)
def test_a_job_that_does_not_report_in_time_is_told(row, level, said):
    finding = _why_silent(None, ProbeJob("head", "1"), "abc", row)
    assert (finding.check, finding.level) == ("probe job of head", level)
    assert said in finding.text
    assert finding.advice


def test_a_site_that_changes_comments_is_told():
    rows = [SimpleNamespace(job_id="1", comment="ray-slurm:x"), SimpleNamespace(job_id="2", comment="project 7")]
    slurm, settings = SimpleNamespace(jobs=lambda: rows), SimpleNamespace(birth_record="comment")
    jobs = [ProbeJob("head", "1"), ProbeJob("worker", "2")]
    (finding,) = _check_comments(settings, slurm, jobs)
    assert (finding.check, finding.level) == ("comment", "failure")
    assert "(worker)" in finding.text
    assert finding.advice
    assert list(_check_comments(settings, slurm, jobs[:1])) == []
    assert list(_check_comments(SimpleNamespace(birth_record="file"), slurm, jobs)) == []
