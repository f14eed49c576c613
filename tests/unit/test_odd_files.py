"""Whatever lies where a node's agent reads, and whatever the file system says: nothing of it ends the node."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from ray_slurm_provider import files, procfs, tls
from ray_slurm_provider.agent import network, temp_dirs
from ray_slurm_provider.agent.directory_watch import DirectoryWatch
from ray_slurm_provider.agent.monitor import Monitor
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.agent.supervisor import Supervisor
from ray_slurm_provider.birth_certificate import read_certificate
from ray_slurm_provider.birth_records import BirthRecords
from ray_slurm_provider.cluster_dir import ClusterDir, log_tail
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.reports import BOOTSTRAP_CONFIG, NodeReport, read_reason, read_report, write_report
from ray_slurm_provider.slurm.process import SlurmTools

ODD = {
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00swp"),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "far too large": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "nested": lambda path: path.write_text("[" * 200_000),
    "numbers": lambda path: path.write_text(
        json.dumps({"node_id": 1, "phase": 2, "ports": {"gcs": float("inf")}, "time": 10**400, "pid": "x", "start": 1})
    ),
    "a dead link": lambda path: path.symlink_to(path.parent / "nothing"),
    "a loop": lambda path: path.symlink_to(path),
}


@pytest.fixture(autouse=True)
def _in_time():
    """What waits for ever fails."""

    def late(*_):
        raise AssertionError("it still waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=ODD)
def odd(request):
    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        ODD[request.param](path)
        return path

    return put


@pytest.fixture
def head(tmp_path, fake_slurm):
    (tmp_path / "c" / "nodes").mkdir(parents=True)
    environ = {**fake_slurm.environ, "RAY_CLOUD_INSTANCE_ID": "1-abcdef"}
    return Supervisor(AgentSpec("c", "d", str(tmp_path / "c"), temp_dir=str(tmp_path / "t")), environ)


def _look_around(head):
    """What a head's agent does with the cluster's directory while Ray runs."""
    assert head._ordered_to_end() == ""
    head._publish()
    head._keep_reports()
    head._look_after_directory()
    head._siblings.cancel()
    assert head._replaced() in (True, False)


def test_no_odd_file_in_the_clusters_directory_ends_a_head(head, odd, tmp_path):
    paths = head._paths
    for path in (paths.head, paths.report("1-abcdef"), paths.environment("1-abcdef"), paths.go("abcdef")):
        odd(path)
        odd(path.with_name(f".{path.name}.swp"))
    for name in ("tls/ca.crt", "tls/.ca.crt.swp", "births/aaaaaa.birth", "births/.x.swp", "state.json", "auth_token"):
        odd(tmp_path / "c" / name)
    _look_around(head)


@pytest.mark.parametrize("sign", ["stop", "restart"])
def test_a_directory_is_no_sign(head, sign):
    getattr(head._paths, sign)("1-abcdef").mkdir()
    assert head._ordered_to_end() == ""


def test_an_odd_file_is_no_report_no_record_and_no_reason(odd, tmp_path):
    path = odd(tmp_path / "aaaaaa.birth")
    assert files.read_json_object(path) is None or path.read_text()
    assert read_report(path) is None
    assert isinstance(read_reason(path), str)
    assert BirthRecords(tmp_path).of_job("ray-c-w-aaaaaa") is None
    assert isinstance(log_tail(path), list)


def test_an_odd_diary_or_configuration_is_known_to_the_autoscaler(odd, tmp_path):
    directory = ClusterDir(tmp_path, "c")
    odd(tmp_path / "c" / "state.json")
    odd(tmp_path / "c" / BOOTSTRAP_CONFIG)
    assert directory.diary().tags == {}
    assert directory.head_node_config() is None


def test_an_odd_authority_is_told(odd, tmp_path):
    pytest.importorskip("cryptography")
    odd(tmp_path / "tls" / "ca.crt")
    with pytest.raises(StateError, match="no certificate can be made"):
        tls.make_certificate(tmp_path / "tls", tmp_path / "x.pem", [])


def test_an_odd_configuration_is_not_copied_and_ends_nothing(odd, tmp_path):
    copy = tmp_path / "copy"
    copy.write_text("a: 1")
    monitor = Monitor(["sleep", "60"], dict(os.environ), odd(tmp_path / "written"), copy)
    assert monitor.tend() == ""
    monitor.end()
    assert copy.read_text()


def test_an_odd_note_beside_a_temporary_directory_keeps_no_node_from_starting(odd, tmp_path):
    odd(tmp_path / "rsp-aaaaaaaa" / "user.json")
    note = {"pid": "x", "start": "1", "host": socket.gethostname(), "boot": procfs.boot_id()}
    files.write_json(_made(tmp_path / "rsp-bbbbbbbb") / "user.json", note)
    temp_dirs.sweep_temp_dirs(str(tmp_path))


def _made(path):
    path.mkdir()
    return path


def test_directories_a_thousand_deep_are_no_trouble(tmp_path, monkeypatch):
    def walk(top):
        yield str(top), [], ["state.json"]
        raise RecursionError

    monkeypatch.setattr(os, "walk", walk)
    DirectoryWatch(tmp_path).keep_young()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ENFILE])
def test_a_file_system_that_fails_ends_no_node(head, monkeypatch, number):
    write_report(head._paths, NodeReport("1-abcdef", "ready"), head=True)
    root = str(head._spec.directory)

    def failing(function):
        def call(path, *args, **kwargs):
            if str(path).startswith(root):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **kwargs)

        return call

    for name in ("open", "stat", "lstat", "utime", "unlink", "replace", "scandir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    _look_around(head)


def test_a_slurm_configuration_that_cannot_be_looked_at_is_the_tools_own_matter(fake_slurm, monkeypatch):
    stat = Path.stat

    def stale(path, **kwargs):
        if path.name == "slurm.conf":
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **kwargs)

    monkeypatch.setattr(Path, "stat", stale)
    assert SlurmTools(environ={**fake_slurm.environ, "SLURM_CONF": "/x/slurm.conf"}).run(["squeue"])


def test_a_process_lives_as_long_as_nobody_can_look(monkeypatch):
    own = procfs.find(os.getpid())
    assert own is not None

    def no_files(_):
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(Path, "read_bytes", no_files)
    assert procfs.alive(own)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 10**6), ("127.0.0.1", -1), ("a\0b", 1), ("x" * 300, 1)])
def test_what_is_no_address_is_not_refused(host, port):
    assert network.connection_state(host, port, 1) == "unknown"


def test_a_comment_of_a_thousand_brackets_is_no_certificate():
    assert read_certificate("ray-slurm:1:" + "[" * 100_000 + ',"t":"a"}') is None


def test_bytes_that_are_no_utf_8_come_back_as_they_were(tmp_path):
    raw = b"\xff caf\xe9"
    files.write_atomically(tmp_path / "f", os.fsdecode(raw))
    assert (tmp_path / "f").read_bytes() == raw
