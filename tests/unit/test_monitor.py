"""Ray's autoscaler as a child of the agent."""

from __future__ import annotations

import os
import signal

import pytest
from support import wait_for

from ray_slurm_provider.agent import monitor as module
from ray_slurm_provider.agent.monitor import Monitor


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a stand-in, a shell script; it writes its process id into a file."""
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 0.01)
    pids = tmp_path / "pids"
    made = []
    written, copy = tmp_path / "written", tmp_path / "copy"
    written.write_text("a: 0")

    def start(script):
        made.append(Monitor(["bash", "-c", f"echo $$ >> {pids}; {script}"], dict(os.environ), written, copy))
        return made[-1]

    start.pids = lambda: [int(line) for line in pids.read_text().split()] if pids.exists() else []
    yield start
    for monitor in made:
        monitor.end()


def test_one_that_is_killed_is_started_again(start):
    monitor = start("exec sleep 60")
    assert monitor.tend() == ""
    (pid,) = wait_for(start.pids, 10, "the first")
    os.kill(pid, signal.SIGKILL)

    def second():
        assert monitor.tend() == ""
        return len(start.pids()) == 2

    wait_for(second, 10, "the second", poll_s=0.02)


def test_one_that_cannot_work_is_told(start):
    monitor = start("exit 1")
    assert monitor.tend() == ""
    said = wait_for(monitor.tend, 10, "the reason", poll_s=0.02)
    assert "exit code 1" in said
    assert "monitor.err" in said


def test_one_that_worked_once_is_tried_again_whatever_happens(start, tmp_path):
    # Killed the first time, failing later: the reason may pass.
    monitor = start(f"[ -e {tmp_path}/failing ] && exit 1; touch {tmp_path}/failing; kill -9 $$")

    def often():
        assert monitor.tend() == ""
        return len(start.pids()) >= 3

    wait_for(often, 10, "the third", poll_s=0.02)


def test_after_its_end_nothing_of_it_is_left(start):
    monitor = start("trap '' TERM; while :; do sleep 0.1; done")
    monitor.tend()
    (pid,) = wait_for(start.pids, 10, "its start")
    monitor.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    monitor.end()


def test_it_reads_what_was_written_last_also_when_that_is_deleted(start, tmp_path):
    written, copy = tmp_path / "written", tmp_path / "copy"
    written.write_text("a: 1")
    monitor = start("exec sleep 60")
    monitor.tend()
    assert copy.read_text() == "a: 1"
    written.write_text("a: 2")
    os.utime(written, ns=(1, 1))
    monitor.tend()
    assert copy.read_text() == "a: 2"
    written.unlink()
    assert monitor.tend() == ""
    assert copy.read_text() == "a: 2"


def test_it_is_not_started_without_its_configuration_and_that_ends_no_head(start, tmp_path, caplog):
    (tmp_path / "written").unlink()
    monitor = start("exec sleep 60")
    assert monitor.tend() == ""
    assert "cannot be started now" in caplog.text
    assert start.pids() == []
    (tmp_path / "written").write_text("a: 1")

    def begun():
        assert monitor.tend() == ""
        return start.pids()

    wait_for(begun, 10, "its start", poll_s=0.02)


def test_a_host_that_has_no_process_left_for_it_ends_no_head(start, monkeypatch):
    monitor = start("exec sleep 60")

    def no_process(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(module.subprocess, "Popen", no_process)
        assert monitor.tend() == ""

    def begun():
        assert monitor.tend() == ""
        return start.pids()

    wait_for(begun, 10, "its start", poll_s=0.02)
