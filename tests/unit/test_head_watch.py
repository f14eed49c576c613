"""When a worker believes that its head is gone, and when it only cannot tell."""

from __future__ import annotations

import pytest

from ray_slurm_provider.agent import head_watch, network
from ray_slurm_provider.agent.head_watch import HeadWatch
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.reports import NodeReport, ReportPaths, write_report


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(head_watch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(head_watch.time, "sleep", self.advance)

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def state(monkeypatch):
    """What the head's port answers."""
    answers = {"state": "open", "connections": 0}

    class Line:
        def __init__(self, *_):
            self.connected = False

        def open(self, _):
            answers["connections"] += 1
            self.connected = answers["state"] == "open"
            return answers["state"]

        def holds(self):
            self.connected &= answers["state"] == "open"
            return self.connected

    monkeypatch.setattr(network, "Line", Line)
    return answers


@pytest.fixture
def watch(tmp_path, clock, state):
    (tmp_path / "nodes").mkdir()
    spec = AgentSpec("c", "d", str(tmp_path), head="1-a", gcs_address="10.0.0.1:5")
    return HeadWatch(spec, lambda: state.get("job ended", False))


def _head_says(tmp_path, node_id, phase, time=0.0):
    write_report(ReportPaths(tmp_path), NodeReport(node_id, phase, time=time), head=True)


def test_a_head_that_answers_is_there(watch):
    assert watch.why_not_start([]) == ""
    assert not watch.why_gone()


def test_a_head_that_cannot_be_reached_is_gone_when_slurm_says_so(watch, state, clock):
    state["state"] = "unreachable"
    assert not watch.why_gone()
    state["job ended"] = True
    clock.advance(6)
    assert not watch.why_gone()  # SLURM is not asked every time
    clock.advance(16)
    assert "has ended" in watch.why_gone()
    clock.advance(16)
    assert "has ended" in watch.why_not_start([])


def test_only_refusals_for_a_while_are_enough(watch, state, clock):
    state["state"] = "refused"
    assert not watch.why_gone()
    clock.advance(14)
    assert not watch.why_gone()
    clock.advance(6)
    assert "refused connections for 15 s" in watch.why_gone()


def test_refusals_for_a_while_keep_a_node_from_starting_and_one_does_not(watch, state, clock, monkeypatch):
    began, state["state"] = clock.now, "refused"
    assert "or a firewall" in watch.why_not_start([])
    assert 14 < clock.now - began < 18
    state["state"] = "open"
    assert watch.why_not_start([]) == ""
    state["state"] = "refused"

    def sleep(seconds):
        clock.advance(seconds)
        state["state"] = "open"

    monkeypatch.setattr(head_watch.time, "sleep", sleep)
    assert watch.why_not_start([]) == ""


def test_a_head_that_comes_back_is_forgiven(watch, state, clock):
    for answer in ("refused", "open", "refused"):
        state["state"] = answer
        clock.advance(10)
        assert not watch.why_gone()


def test_what_cannot_be_reached_is_not_gone_but_keeps_a_node_from_starting(watch, state, clock):
    state["state"] = "unknown"
    for _ in range(100):
        clock.advance(60)
        assert not watch.why_gone()
    began = clock.now
    assert "provider.slurm.interface" in watch.why_not_start([])
    assert 15 < clock.now - began < 40


def test_a_cancelled_job_does_not_wait_for_the_head(watch, state, clock):
    state["state"] = "unknown"
    began = clock.now
    assert "cancelled" in watch.why_not_start([15])
    assert clock.now - began < 2


@pytest.mark.parametrize(("node_id", "phase"), [("1-a", "ended"), ("2-b", "ready")])
def test_its_own_word_and_another_head_are_evidence(watch, clock, tmp_path, node_id, phase):
    _head_says(tmp_path, "1-a", "ready")
    for _ in range(2):
        clock.advance(10)
        assert not watch.why_gone()
    _head_says(tmp_path, node_id, phase, time=1.0)
    clock.advance(60)
    assert "has ended" in watch.why_gone()


@pytest.mark.parametrize("phase", ["ready", "ended"])
@pytest.mark.parametrize("own_word", [True, False])
def test_the_report_of_the_head_before_is_no_evidence(watch, clock, tmp_path, phase, own_word):
    """The disk was full when the present head should have written its own over it."""
    _head_says(tmp_path, "1-a", "ready", time=2.0)
    if not own_word:
        ReportPaths(tmp_path).report("1-a").unlink()
    _head_says(tmp_path, "0-z", phase, time=1.0)
    assert watch.why_not_start([]) == ""
    clock.advance(60)
    assert not watch.why_gone()


def test_a_head_that_goes_in_order_is_gone_at_once(watch, state, clock, tmp_path):
    assert not watch.why_gone()
    _head_says(tmp_path, "1-a", "ended")
    state["state"] = "refused"
    clock.advance(6)
    assert "has ended" in watch.why_gone()


def test_a_head_that_stays_is_connected_to_once(watch, state, clock):
    for _ in range(100):
        clock.advance(1)
        assert not watch.why_gone()
    assert state["connections"] == 1
