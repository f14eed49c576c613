"""Ray's own commands on a cluster whose head is a job."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from support import RAY, wait_for

from ray_slurm_provider.agent.network import free_ports

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster(module_cluster):
    # A worker that cannot start: no node is that large while others run there.
    queued = {"min_workers": 1, "max_workers": 1, "node_config": {"sbatch": {"mem": "1G", "begin": "now+1hour"}}}
    cluster = module_cluster("commands", types={"queued": queued})
    cluster.up()
    return cluster


def _exec(cluster, command, *options, **parts):
    return subprocess.run(
        [*RAY, "exec", str(cluster.yaml), "--no-config-cache", *options, command],
        env=cluster.environ,
        text=True,
        capture_output=True,
        timeout=90,
        **parts,
    )


def test_exec_passes_output_input_and_exit_code_on(cluster):
    done = _exec(
        cluster, 'read line; echo "got $line at $SLURMD_NODENAME, it\'s ok"; echo oops >&2; exit 3', input="hello\n"
    )
    assert done.returncode == 3
    assert f"got hello at {cluster.head_job().nodes}, it's ok" in done.stdout
    assert "oops" in done.stderr
    assert "Traceback" not in done.stderr


def test_exec_has_the_environment_of_the_head(cluster):
    done = _exec(cluster, "which python; ray status >/dev/null && echo status=$?")
    assert "status=0" in done.stdout
    assert done.stdout.count(os.path.dirname(RAY[0])) >= 1


def test_exec_streams_a_hundred_megabytes(cluster):
    done = subprocess.run(
        [*RAY, "exec", str(cluster.yaml), "--no-config-cache", "head -c 100000000 /dev/zero | tr '\\0' x"],
        env=cluster.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout.count(b"x") >= 100_000_000


def test_an_interrupted_exec_ends_the_command_on_the_head(cluster):
    child = cluster.start("exec", cluster.yaml, "--no-config-cache", "echo started; exec sleep 4242")
    wait_for(lambda: "started" in child.stdout.readline(), 60, "the command", poll_s=0)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) != 0

    def left():
        return [p for p in cluster.processes() if p.name == "sleep" and b"4242" in p.read("cmdline")]

    wait_for(lambda: not left(), 30, "the end of the command on the head")


def test_submit_runs_a_script_with_its_arguments(cluster, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('ARGS', sys.argv[1:])")
    done = cluster.ray("submit", "--no-config-cache", cluster.yaml, script, "one", "two")
    assert "ARGS ['one', 'two']" in done.stdout


def test_files_go_up_and_down(cluster, tmp_path):
    source = tmp_path / "up dir"
    source.mkdir()
    (source / "f").write_text("x")
    cluster.ray("rsync-up", cluster.yaml, f"{source}/", f"{tmp_path}/there/")
    assert (tmp_path / "there" / "f").read_text() == "x"
    cluster.ray("rsync-down", cluster.yaml, f"{tmp_path}/there/f", f"{tmp_path}/back/")
    assert (tmp_path / "back" / "f").read_text() == "x"
    done = cluster.ray("rsync-up", cluster.yaml, f"{tmp_path}/nothing", f"{tmp_path}/there/", check=False)
    assert done.returncode == 1
    assert "does not exist" in done.stdout + done.stderr


def test_addresses_are_told_also_of_a_worker_that_waits(cluster):
    head = cluster.ray("get-head-ip", cluster.yaml).stdout.split()[-1]
    assert cluster.access()["RAY_ADDRESS"].startswith(f"{head}:")
    wait_for(cluster.workers, 30, "the queued worker")
    (address,) = cluster.ray("get-worker-ips", cluster.yaml).stdout.split()
    assert re.fullmatch(r"slurm-job-\d+-\w+", address)


def test_the_dashboard_is_forwarded_and_asks_for_the_token(cluster):
    port = free_ports(["local"], "127.0.0.1")["local"]
    child = cluster.start("dashboard", cluster.yaml, "--no-config-cache", "--port", port)
    token = (cluster.root / "auth_token").read_text()

    def answer(**headers):
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api/version", headers=headers)
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, b""
        except OSError:
            return None

    status, body = wait_for(lambda: answer(Authorization=f"Bearer {token}"), 60, "the forwarded dashboard")
    assert status == 200
    assert b"ray_version" in body
    assert answer()[0] in {401, 403}
    assert answer(Authorization="Bearer " + "0" * 64)[0] in {401, 403}
    child.send_signal(signal.SIGINT)
    assert child.wait(30) is not None
    assert answer() is None


def test_a_port_that_is_taken_is_said(cluster):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cluster.ray(
            "dashboard", cluster.yaml, "--no-config-cache", "--port", taken.getsockname()[1], check=False
        )
    assert done.returncode != 0
    assert "cannot be forwarded" in done.stdout + done.stderr


def test_monitor_follows_the_autoscalers_log(cluster):
    child = cluster.start("monitor", cluster.yaml)
    wait_for(lambda: "cloud instance" in child.stdout.readline(), 60, "a line of the autoscaler's log", poll_s=0)
    child.send_signal(signal.SIGINT)
    child.wait(30)


def test_attach_gives_a_terminal_with_the_clusters_environment(cluster):
    pid, terminal = pty.fork()
    if pid == 0:
        command = [*RAY, "attach", str(cluster.yaml), "--no-config-cache"]
        os.execvpe(command[0], command, {**cluster.environ, "SHELL": "/bin/bash", "TERM": "xterm"})
    seen = b""
    try:
        time_limit = time.monotonic() + 60
        os.write(terminal, b"tty; echo address=$RAY_ADDRESS; echo done=$((40+2)); exit 5\n")
        while b"done=42" not in seen and time.monotonic() < time_limit:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    assert b"done=42" in seen
    assert b"/dev/pts/" in seen
    assert f"address={cluster.access()['RAY_ADDRESS']}".encode() in seen
