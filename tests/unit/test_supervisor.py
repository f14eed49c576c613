"""What the node agent does between Ray's start and end, as far as it needs no Ray."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest

from ray_slurm_provider.agent import head_watch, kernel, network
from ray_slurm_provider.agent import supervisor as module
from ray_slurm_provider.agent.pace import Pace
from ray_slurm_provider.agent.ray_command import GCS_ADDRESS_VARIABLE
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.agent.supervisor import StartError, Supervisor
from ray_slurm_provider.birth_certificate import BirthCertificate
from ray_slurm_provider.errors import SlurmError, SlurmUnavailable
from ray_slurm_provider.reports import ENDED, READY, NodeReport, ReportPaths, read_reason, read_report, write_report
from ray_slurm_provider.slurm.types import Job, JobState


@pytest.fixture
def make(tmp_path):
    (tmp_path / "state" / "c" / "nodes").mkdir(parents=True)

    def made(node_id="1-abc", **changes):
        spec = AgentSpec("c", "d", str(tmp_path / "state" / "c"))._replace(**changes)
        supervisor = Supervisor(spec, {"RAY_CLOUD_INSTANCE_ID": node_id, "PATH": "/nowhere"})
        supervisor._looking_for_signs = Pace(0)
        return supervisor

    return made


def test_a_sign_is_obeyed_once_and_by_its_own_node_only(make):
    supervisor, paths = make(), make()._paths
    assert supervisor._ordered_to_end() == ""
    paths.stop("1-def").touch()
    paths.restart("1-def").touch()
    assert supervisor._ordered_to_end() == ""
    paths.restart("1-abc").touch()
    assert "restart" in supervisor._ordered_to_end()
    assert not paths.restart("1-abc").exists()
    assert supervisor._ordered_to_end() == ""
    paths.stop("1-abc").touch()
    assert "`ray exec --stop`" in supervisor._ordered_to_end()
    assert not paths.stop("1-abc").exists()


def test_signs_are_looked_for_once_in_a_second_however_much_ray_prints(make):
    supervisor = make()
    supervisor._looking_for_signs = Pace(1000)
    assert supervisor._ordered_to_end() == ""
    supervisor._paths.stop("1-abc").touch()
    assert [supervisor._ordered_to_end() for _ in range(300)] == [""] * 300
    assert supervisor._paths.stop("1-abc").exists()


def test_a_worker_is_ended_by_no_sign(make):
    supervisor = make("2-abc", head="1-abc")
    supervisor._paths.stop("2-abc").touch()
    assert supervisor._ordered_to_end() == ""


def test_a_cancelled_head_is_not_restarted(make):
    supervisor = make()
    supervisor._paths.restart("1-abc").touch()
    supervisor._signals.append(signal.SIGTERM)
    assert "cancelled" in supervisor._ordered_to_end()
    assert not supervisor._restarting


def test_a_deleted_directory_is_told_once_and_ends_nothing(make, caplog):
    supervisor = make("123-abc")
    for path in supervisor._paths.needed:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    supervisor._look_after_directory()
    assert caplog.text == ""
    shutil.rmtree(supervisor._spec.directory)
    for _ in range(3):
        supervisor._look_after_directory()
        supervisor._keep_reports()
    assert caplog.text.count("was deleted") == 1
    assert "`scancel 123`" in caplog.text
    assert "`ray up`" in caplog.text
    assert not supervisor._spec.directory.exists()


class Slurm:
    """A SLURM with the head 1-abc and its workers 2-abc to 4-abc; it may fail."""

    def __init__(self):
        certificates = [BirthCertificate("c", "d", "abc", "" if number == 1 else "1-abc") for number in range(1, 5)]
        self.rows = [Job(str(at), JobState.RUNNING, comment=cert.text()) for at, cert in enumerate(certificates, 1)]
        self.failure = None
        self.cancelled = []
        self.meanwhile = lambda: None

    def jobs(self):
        self.meanwhile()
        if self.failure is not None:
            raise self.failure
        return list(self.rows)

    def cancel(self, job_ids):
        self.cancelled += job_ids


class Ray:
    """A `ray start` whose end takes so long, by a clock that goes only when somebody waits."""

    def __init__(self, clock, ends_after=0.0):
        self.clock, self.ends_after = clock, ends_after
        self.code, self.signals = None, []
        self.stdout, self.pid = None, 2**30

    def poll(self):
        return self.code

    def send_signal(self, number):
        self.signals.append(number)

    def terminate(self):
        self.signals.append(signal.SIGTERM)

    def wait(self, timeout):
        self.clock.now += min(timeout, self.ends_after)
        if self.ends_after > timeout:
            raise subprocess.TimeoutExpired("ray", timeout)
        self.code = 0


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


@pytest.fixture
def killing(monkeypatch, clock):
    """How long what is left was given to die; all of that time is taken."""
    given = []

    def end_descendants(timeout_s):
        given.append(timeout_s)
        clock.now += timeout_s

    monkeypatch.setattr(kernel, "end_descendants", end_descendants)
    return given


@pytest.fixture
def node(make, clock, killing):
    """A node with Ray up."""

    def made(node_id="1-abc", **changes):
        supervisor = make(node_id, **changes)
        supervisor._slurm = supervisor._siblings._slurm = Slurm()
        supervisor._child = Ray(clock)
        supervisor._report = supervisor._report._replace(phase=READY, ready_at=1.0)
        return supervisor

    return made


WORKER = {"node_id": "2-abc", "head": "1-abc", "gcs_address": "127.0.0.1:1"}


@pytest.mark.parametrize("slurm_takes", [0.0, 1.0, 60.0])
def test_a_head_ends_within_the_shortest_kill_wait(node, clock, slurm_takes):
    """Whatever Ray does, and however long SLURM takes for the first of its two answers."""
    supervisor = node()
    began, supervisor._child.ends_after = clock.now, 100.0

    def take_time_once():
        clock.now += slurm_takes
        supervisor._slurm.meanwhile = lambda: None

    supervisor._slurm.meanwhile = take_time_once
    supervisor._finish("because", 0)
    assert supervisor._child.signals == [signal.SIGTERM]
    assert clock.now - began < max(5.0, slurm_takes + 2.0)


def test_a_head_says_that_it_ends_before_it_cancels_and_again_after_ray(node):
    supervisor = node()
    paths, seen = supervisor._paths, []
    supervisor._slurm.meanwhile = lambda: seen.append((read_report(paths.head).phase, supervisor._child.code))
    supervisor._finish("because", 0)
    assert seen == [(ENDED, None), (ENDED, 0)]
    assert supervisor._slurm.cancelled == ["2", "3", "4"] * 2
    assert read_report(paths.head).reason == "because"


def test_ray_does_not_wait_for_slurm_to_be_told_to_end_and_slurm_is_asked_once_when_it_is_away(node):
    supervisor, seen = node(), []
    supervisor._slurm.failure = SlurmUnavailable(["squeue"], None, "", "no answer in 60 s")
    supervisor._slurm.meanwhile = lambda: seen.append(list(supervisor._child.signals))
    supervisor._finish("because", 0)
    assert seen == [[signal.SIGTERM]]
    assert supervisor._child.signals == [signal.SIGTERM]


@pytest.mark.parametrize("failure", [SlurmUnavailable(["squeue"], 1, "", "away"), SlurmError(["squeue"], 1, "", "no")])
def test_a_head_ends_also_when_slurm_does_not_answer(node, failure, killing):
    supervisor = node()
    supervisor._slurm.failure = failure
    supervisor._finish("because", 1)
    assert killing
    assert read_report(supervisor._paths.head).phase == ENDED


def test_a_worker_that_ends_for_a_reason_of_its_own_ends_alone(node):
    supervisor = node(**WORKER)
    supervisor._finish("the raylet ended", 0)
    assert supervisor._slurm.cancelled == []
    assert read_report(supervisor._paths.report("2-abc")).phase == ENDED


def test_a_node_that_never_was_up_leaves_its_reason_unless_there_is_a_better_one(node):
    supervisor = node(**WORKER)
    supervisor._report = supervisor._report._replace(ready_at=0.0)
    supervisor._finish("no ray here", 1)
    supervisor._finish("something else", 1)
    assert read_reason(supervisor._paths.reason("2-abc")) == "no ray here"


def test_ray_that_ended_ends_the_node_with_its_code(node):
    supervisor = node(**WORKER)
    supervisor._head.why_gone = lambda: ""
    assert supervisor._reason_to_end() is None
    supervisor._child.code = 3
    assert supervisor._reason_to_end() == ("ray start ended with exit code 3", 3)
    supervisor._child.code = 0
    assert supervisor._reason_to_end()[1] == 1


def test_before_the_time_limit_ray_is_told_once_and_its_end_is_no_failure(node):
    supervisor = node(**WORKER)
    supervisor._head.why_gone = lambda: ""
    supervisor._signals.append(signal.SIGUSR1)
    assert supervisor._reason_to_end() is None
    assert supervisor._reason_to_end() is None
    assert supervisor._child.signals == [signal.SIGTERM]
    supervisor._child.code = 1
    assert supervisor._reason_to_end() == ("the time limit was near, and Ray has moved its work away", 0)


@pytest.fixture
def refusing(monkeypatch):
    """Every connection is refused, and that for long enough."""
    monkeypatch.setattr(network.Line, "open", lambda *_: "refused")
    monkeypatch.setattr(head_watch, "_REFUSED_S", 0.0)


@pytest.mark.parametrize("evidence", ["", "SLURM", "the head"])
def test_a_running_worker_that_the_head_refuses_ends_alone_unless_there_is_better_evidence(node, refusing, evidence):
    supervisor = node(**WORKER)
    _give(supervisor, evidence)
    reason, code = supervisor._reason_to_end()
    assert "the head 1-abc" in reason
    assert code == 0
    assert supervisor._slurm.cancelled == (["3", "4"] if evidence else [])


@pytest.mark.parametrize("evidence", ["", "SLURM", "the head"])
def test_a_starting_worker_that_the_head_refuses_ends_alone_unless_there_is_better_evidence(
    node, refusing, evidence, monkeypatch
):
    supervisor = node(**WORKER, login_node=False)
    _give(supervisor, evidence)
    monkeypatch.setattr(supervisor, "_resources", dict)
    monkeypatch.setattr(supervisor, "_choose_address", lambda: "127.0.0.1")
    with pytest.raises(StartError, match="the head 1-abc"):
        supervisor._prepare()
    supervisor._place.give_back()
    assert supervisor._slurm.cancelled == (["3", "4"] if evidence else [])


def _give(supervisor, evidence):
    if evidence == "SLURM":
        supervisor._slurm.rows[0] = supervisor._slurm.rows[0]._replace(state=JobState.FAILED)
    if evidence == "the head":
        write_report(ReportPaths(supervisor._spec.directory), NodeReport("1-abc", ENDED), head=True)


def test_only_the_autoscaler_of_a_head_is_told_that_it_is_one(node, monkeypatch):
    supervisor = node()
    monkeypatch.setattr(supervisor, "_choose_address", lambda: "10.0.0.1")
    monkeypatch.setattr(supervisor, "_resources", dict)
    try:
        _, environment = supervisor._prepare()
    finally:
        supervisor._place.give_back()
    told = supervisor._new_monitor(environment)._environ
    assert GCS_ADDRESS_VARIABLE not in environment
    assert told[GCS_ADDRESS_VARIABLE].startswith("10.0.0.1:")
    assert told["RAY_AUTH_TOKEN_PATH"] == environment["RAY_AUTH_TOKEN_PATH"]
