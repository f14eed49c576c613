"""A head on the login node: a real process, its record, and what is believed when they disagree."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from ray_slurm_provider import procfs
from ray_slurm_provider.agent.directory_watch import DirectoryWatch
from ray_slurm_provider.backends import login_process
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import NodeConfig, ResolvedNode, SlurmSettings
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.nodes import TAG_KIND, TAG_STATUS, TAG_TYPE
from ray_slurm_provider.reports import NodeReport, write_report

HEAD = {TAG_KIND: "head", TAG_TYPE: "head", TAG_STATUS: "uninitialized"}
# Stands in for the agent, in the same process as the script.
STEPS = [["setup", "echo hello; exec sleep 300"]]
CONFIG = NodeConfig(placement="login_node", resolved=ResolvedNode(steps=STEPS))


@pytest.fixture
def make(tmp_path, fake_slurm):
    """The cluster as each `ray` command sees it: nothing is shared but files and processes."""
    settings = SlurmSettings(state_dir=str(tmp_path / "state dir"), default_python="/usr/bin/python3")
    return lambda: Cluster("c", settings, fake_slurm.environ)


@pytest.fixture
def head(make):
    cluster = make()
    node_id = cluster.create_head("head", CONFIG, HEAD)
    cluster.let_head_start(node_id, usage_stats=False)
    pid = int(node_id.split("-")[-2])
    assert procfs.wait_until(lambda: (found := procfs.find(pid)) is not None and found.name == "sleep", 10)
    yield node_id
    for process in [procfs.find(pid)]:
        if process is not None:
            procfs.end([process], 5)


def _pid(node_id):
    return int(node_id.split("-")[-2])


def _record(make):
    return make().directory.root / "login_head.json"


def test_every_command_sees_the_head_with_its_tags(make, head):
    node = make().nodes()[head]
    assert node.is_head
    assert node.tags == HEAD
    assert (node.seen.state, node.seen.place) == ("RUNNING", login_process.host_name())
    assert node.label == f"process {head}"
    assert "hello" in make().log_of(head).read_text()


def test_it_has_no_terminal_and_a_session_of_its_own(head):
    stat = procfs.find(_pid(head)).read("stat").rpartition(b")")[2].split()
    session, terminal = int(stat[3]), int(stat[4])
    assert session == _pid(head)
    assert terminal == 0


def test_it_carries_nothing_of_a_job(head):
    variables = procfs.find(_pid(head)).read("environ").split(b"\0")
    assert not [variable for variable in variables if variable.startswith(b"SLURM_JOB")]


@pytest.mark.parametrize("damage", ["removed", "broken", "with its log"])
def test_a_head_whose_record_is_lost_is_found_again_and_no_second_one_started(make, head, damage):
    if damage == "with its log":
        write_report(make().directory.reports, NodeReport(head, "starting"), head=True)
        make().log_of(head).unlink()
    if damage == "broken":
        _record(make).write_text('{"pid": ')
    else:
        _record(make).unlink()
    assert make().create_head("head", CONFIG, HEAD) == head
    node = make().nodes()[head]
    assert node.tags == HEAD
    assert json.loads(_record(make).read_text())["pid"] == _pid(head)
    make().terminate([head])
    assert procfs.find(_pid(head)) is None


def _stranger(number, token="abcdef"):
    return f"login-{login_process.host_name()}-{number}-{token}"


def test_a_record_in_which_another_release_has_written_more_is_understood(make, head):
    record = json.loads(_record(make).read_text())
    _record(make).write_text(json.dumps({**record, "of_tomorrow": 1}))
    assert make().directory.login_head().node_id == head


def test_without_a_record_a_process_is_the_head_only_with_its_certificate(make, head):
    _record(make).unlink()
    make().log_of(head).unlink()
    # One that has ended and whose number another process has got, and one that ended before it.
    for stranger in (os.getpid(), 2**22 + 1):
        make().log_of(_stranger(stranger)).touch()
    assert make().nodes() == {}
    make().directory.reports.head.write_text(json.dumps({"node_id": _stranger("9" * 5000), "phase": "ready"}))
    assert make().nodes() == {}


@pytest.mark.parametrize("said", ["", "7-abcdef"])
def test_without_a_record_a_living_head_is_found_among_what_earlier_ones_left(make, head, said):
    _record(make).unlink()
    for token in ("000000", "zzzzzz"):
        make().log_of(_stranger(os.getpid(), token)).touch()
    if said:
        write_report(make().directory.reports, NodeReport(said, "ready"), head=True)
    # All files are touched once a day, in whatever order.
    DirectoryWatch(make().directory.root).keep_young()
    for token in ("000000", "zzzzzz"):
        os.utime(make().log_of(_stranger(os.getpid(), token)), (time.time() + 60,) * 2)
    assert make().create_head("head", CONFIG, HEAD) == head


def test_a_daemon_that_the_setup_commands_left_is_not_taken_for_the_head(make, head):
    environ = dict(
        variable.decode().split("=", 1) for variable in procfs.find(_pid(head)).read("environ").split(b"\0") if variable
    )
    assert "RAY_SLURM_CERTIFICATE" in environ
    os.kill(_pid(head), signal.SIGKILL)
    assert procfs.wait_until(lambda: procfs.find(_pid(head)) is None, 5)
    _record(make).unlink()
    daemon = subprocess.Popen(["sleep", "300"], env=environ, start_new_session=True)
    try:
        assert make().nodes() == {}
        make().terminate([head])
        assert daemon.poll() is None
    finally:
        daemon.kill()
        daemon.wait()


def test_a_head_can_move_between_the_login_node_and_a_job(make, head, monkeypatch):
    make().terminate([head])
    monkeypatch.setattr(login_process, "host_name", lambda: "a-compute-node")
    write_report(make().directory.reports, NodeReport(head, "ended", time=time.time()), head=False)
    job = make().create_head("head", NodeConfig(), HEAD)
    assert set(make().nodes()) == {job}
    monkeypatch.undo()
    make().terminate([job])
    assert make().nodes() == {}
    again = make().create_head("head", CONFIG, HEAD)
    assert set(make().nodes()) == {again}
    make().terminate([again])


def test_the_log_of_an_earlier_head_elsewhere_does_not_hinder_a_head_in_a_job(make, fake_slurm):
    job = make().create_head("head", NodeConfig(), HEAD)
    make().log_of("login-otherhost-123-abcdef").touch()
    with pytest.raises(StateError, match="log in to otherhost"):
        make().nodes()  # nobody has said yet which head it is
    write_report(make().directory.reports, NodeReport(job, "ready"), head=True)
    os.utime(make().log_of("login-otherhost-123-abcdef"), (time.time() + 60,) * 2)
    assert set(make().nodes()) == {job}


@pytest.mark.parametrize("method", ["glob", "read_text", "read_bytes"])
def test_a_directory_that_cannot_be_read_now_hides_no_head_in_a_job(make, monkeypatch, method):
    job = make().create_head("head", NodeConfig(), HEAD)

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, method, fail)
    assert set(make().nodes()) == {job}


def test_a_directory_that_cannot_be_seen_now_is_not_taken_for_deleted(make, monkeypatch):
    cluster = make()
    cluster.create_head("head", NodeConfig(), HEAD)
    cluster.nodes()

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", fail)
    assert cluster.lost_directory() == ""


def test_the_head_that_died_is_gone_and_its_end_is_told(make, head):
    os.kill(_pid(head), signal.SIGKILL)
    assert procfs.wait_until(lambda: not make().nodes(), 5)
    assert f"process {_pid(head)} is gone" in make().obituary(head)


def test_another_process_with_its_number_is_not_the_head(make, head):
    record = json.loads(_record(make).read_text())
    _record(make).write_text(json.dumps({**record, "start": "1"}))
    assert make().nodes() == {}
    make().terminate([head])
    assert procfs.find(_pid(head)) is not None


def test_after_a_reboot_it_is_gone_whatever_has_its_number(make, head):
    record = json.loads(_record(make).read_text())
    _record(make).write_text(json.dumps({**record, "boot_id": "an earlier one"}))
    assert make().nodes() == {}
    assert "was rebooted" in make().obituary(head)


def test_ending_it_ends_what_is_below_it_and_nothing_else(make, head):
    bystander = login_process.subprocess.Popen(["sleep", "300"])
    make().terminate([head])
    assert procfs.find(_pid(head)) is None
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    make().terminate([head])


class TestFromAnotherLoginNode:
    @pytest.fixture
    def elsewhere(self, make, head, monkeypatch):
        monkeypatch.setattr(login_process, "host_name", lambda: "other")
        return make

    def test_unknown_is_an_error_that_names_the_host(self, elsewhere):
        with pytest.raises(StateError, match=f"log in to {socket.gethostname().partition('.')[0]}"):
            elsewhere().nodes()

    def test_without_its_record_it_is_unknown_too_and_gone_only_by_its_own_word(self, elsewhere, head):
        _record(elsewhere).unlink()
        cluster = elsewhere()
        for _ in range(2):
            with pytest.raises(StateError, match=f"log in to {socket.gethostname().partition('.')[0]}"):
                cluster.nodes()
        with pytest.raises(StateError):
            elsewhere().create_head("head", CONFIG, HEAD)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            report = NodeReport(head, "ready", address="127.0.0.1", ports={"gcs": server.getsockname()[1]})
            write_report(cluster.directory.reports, report, head=True)
            with pytest.raises(StateError, match="the record of the head on .* was lost"):
                elsewhere().nodes()
        write_report(cluster.directory.reports, NodeReport(head, "ended", reason="done"), head=True)
        assert elsewhere().nodes() == {}

    def test_an_open_port_is_life_and_a_refused_one_tells_nothing(self, elsewhere, head):
        paths = elsewhere().directory.reports
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            report = NodeReport(head, "ready", address="127.0.0.1", ports={"gcs": server.getsockname()[1]})
            write_report(paths, report, head=True)
            assert elsewhere().nodes()[head].ready
        with pytest.raises(StateError, match="log in to"):
            elsewhere().nodes()

    def test_its_own_word_on_its_end_is_believed(self, elsewhere, head):
        write_report(
            elsewhere().directory.reports, NodeReport(head, "ended", reason="done", time=time.time()), head=True
        )
        assert elsewhere().nodes() == {}
        assert "done" in elsewhere().obituary(head)

    def test_an_earlier_one_does_not_hinder_the_head_that_took_its_place(self, elsewhere, head):
        paths, now = elsewhere().directory.reports, time.time()
        write_report(paths, NodeReport("7-abcdef", "ended", time=now - 60), head=True)
        write_report(paths, NodeReport(head, "ready", time=now - 30), head=False)
        with pytest.raises(StateError, match="log in to"):
            elsewhere().nodes()  # what an even earlier one has left tells nothing
        for own_words in (True, False):
            if not own_words:
                paths.report(head).unlink()  # it died before it said anything
            write_report(paths, NodeReport("9-abcdef", "starting", time=time.time()), head=True)
            assert elsewhere().nodes() == {}
        job = elsewhere().create_head("head", NodeConfig(), HEAD)
        assert set(elsewhere().nodes()) == {job}
        assert "head 9-abcdef has taken its place" in elsewhere().obituary(head)

    def test_it_is_asked_to_end(self, elsewhere, head):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            report = NodeReport(head, "ready", address="127.0.0.1", ports={"gcs": server.getsockname()[1]})
            write_report(elsewhere().directory.reports, report, head=True)
            elsewhere().terminate([head])
        assert elsewhere().directory.reports.stop(head).exists()
        assert procfs.find(_pid(head)) is not None
