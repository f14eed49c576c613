"""Ray's own commands, with the head in a job and on the login node."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import RAY, RAY_SLURM, tasks_script, wait_for

from ray_slurm_provider.agent.ports import reserve

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]


IN_SLURM = {"resources": {"CPU": 0}, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "2G"}}}
ON_LOGIN_NODE = {"node_config": {"placement": "login_node"}}


@pytest.fixture(scope="module")
def ssh_args(tmp_path_factory):
    """An sshd on loopback, and the arguments that lead to it."""
    home = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    port = reserve(["sshd"]).ports["sshd"]
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
    )
    if os.getuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    log = (home / "log").open("w")
    path = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    server = subprocess.Popen([path, "-D", "-e", "-f", home / "config"], stderr=log, stdin=subprocess.DEVNULL)
    wait_for(lambda: "listening" in (home / "log").read_text(), 20, "sshd")
    options = {
        "HostName": "127.0.0.1",
        "Port": port,
        "IdentityFile": home / "user",
        "UserKnownHostsFile": home / "known",
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    yield ["-F", "/dev/null", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture(scope="module", params=["slurm", "login_node", "ssh"])
def cluster(request, module_cluster):
    slurm = {}
    if request.param == "ssh":
        slurm = {"command_runner": "ssh", "ssh_args": request.getfixturevalue("ssh_args")}
    head = ON_LOGIN_NODE if request.param == "login_node" else IN_SLURM
    # A worker that cannot start for an hour (the autoscaler counts on what it has: nothing), and two that can.
    waiting = {"sbatch": {"mem": "1G", "begin": "now+1hour"}}
    queued = {"resources": {"CPU": 0}, "min_workers": 1, "max_workers": 1, "node_config": waiting}
    worker = {"max_workers": 2, "node_config": {"sbatch": {"cpus_per_task": 1, "mem": "1G"}}}
    cluster = module_cluster(
        f"commands-{request.param}", head=head, slurm=slurm, types={"queued": queued, "worker": worker}
    )
    cluster.up()
    return cluster


@pytest.fixture(autouse=True)
def _what_ssh_does_not_change(request, cluster):
    if request.node.get_closest_marker("same_by_ssh") and cluster.settings.command_runner == "ssh":
        pytest.skip("shown already: commands by ssh do nothing new here")


def _on_login_node(cluster):
    return cluster.head()["id"].startswith("login-")


def _nodes(cluster):
    return json.loads(cluster.ray_slurm("nodes", "--json", cluster.yaml).stdout)


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
        cluster,
        'read line; echo "got $line at ${SLURMD_NODENAME:-login}, it\'s ok"; echo oops >&2; exit 3',
        input="hello\n",
    )
    assert done.returncode == 3
    # By srun one is in the job; a login node and ssh know nothing of it.
    in_job = not _on_login_node(cluster) and cluster.settings.command_runner == "srun"
    place = cluster.head_job().nodes if in_job else "login"
    assert f"got hello at {place}, it's ok" in done.stdout
    assert "oops" in done.stderr
    assert "Traceback" not in done.stderr


def test_exec_has_the_environment_of_the_head_and_nothing_of_another_cluster(cluster):
    other = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_USE_TLS": "1", "RAY_ADDRESS": "192.0.2.9:1"}
    cluster.environ.update(other)
    try:
        done = _exec(cluster, "which python; ray status >/dev/null && echo status=$?")
        status = subprocess.run([*RAY, "status"], env=cluster.access(), text=True, capture_output=True, timeout=60)
    finally:
        for name in other:
            del cluster.environ[name]
    assert "status=0" in done.stdout
    assert "Node status" in status.stdout
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
    script = tmp_path / "a script's.py"
    script.write_text("import sys; print('ARGS', sys.argv[1:])")
    done = cluster.ray("submit", "--no-config-cache", cluster.yaml, script, "--", "--one", "it's two")
    assert "ARGS ['--one', \"it's two\"]" in done.stdout


@pytest.mark.same_by_ssh
def test_files_go_up_and_down_as_rsync_says(cluster, tmp_path):
    source = tmp_path / "up dir"
    source.mkdir()
    (source / "f").write_text("x")
    (source / "skipped").write_text("x")
    cluster.config["rsync_exclude"] = ["skip*"]
    try:
        cluster.ray("rsync-up", cluster.yaml, f"{source}/", f"{tmp_path}/there/")
        cluster.ray("rsync-up", cluster.yaml, source, f"{tmp_path}/there/")
    finally:
        del cluster.config["rsync_exclude"]
    there = tmp_path / "there"
    assert {str(path.relative_to(there)) for path in there.rglob("*")} == {"f", "up dir", "up dir/f"}
    cluster.ray("rsync-down", cluster.yaml, f"{tmp_path}/there/f", f"{tmp_path}/back/")
    assert (tmp_path / "back" / "f").read_text() == "x"
    done = cluster.ray("rsync-up", cluster.yaml, f"{tmp_path}/nothing", f"{tmp_path}/there/", check=False)
    assert done.returncode == 1
    assert "does not exist" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_what_only_the_heads_host_sees_is_copied_there_and_refused_elsewhere(cluster, tmp_path):
    (tmp_path / "f").write_text("x")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="rst-") as private:
        if _on_login_node(cluster):
            cluster.ray("rsync-up", cluster.yaml, tmp_path / "f", f"{private}/it's/ne w")
            assert Path(private, "it's", "ne w").read_text() == "x"
            cluster.ray("rsync-down", cluster.yaml, f"{private}/it's/", f"{tmp_path}/back/")
            assert (tmp_path / "back" / "ne w").read_text() == "x"
            return
        for words in (("rsync-up", tmp_path / "f", f"{private}/f"), ("rsync-down", private, tmp_path / "back")):
            done = cluster.ray(words[0], cluster.yaml, *words[1:], check=False)
            assert done.returncode == 1
            assert f"{private}" in done.stderr
            assert (
                f"only its own host sees: use a path that all hosts share, or `ray exec {cluster.yaml} " in done.stderr
            )
            assert "Traceback" not in done.stdout + done.stderr
        assert os.listdir(private) == []


def test_rays_logs_come_down_from_where_they_are(cluster, tmp_path):
    log = "/tmp/ray/session_latest/logs/monitor.log"
    # All hosts of the sandbox see that directory.
    cluster.ray("rsync-down", cluster.yaml, log, f"{tmp_path}/")
    assert "Autoscaler" in (tmp_path / "monitor.log").read_text()
    # What is told to do where they do not.
    cluster.ray("exec", cluster.yaml, f"cp -r {log} {tmp_path}/copy")
    assert "Autoscaler" in (tmp_path / "copy").read_text()


@pytest.mark.same_by_ssh
def test_status_and_jobs_work_from_the_login_node(cluster):
    environ = {**cluster.environ, **cluster.access()}
    status = subprocess.run([*RAY, "status"], env=environ, text=True, capture_output=True, timeout=60)
    assert "Node status" in status.stdout
    words = ["job", "submit", "--", "sh", "-c", "echo $((40 + 2))-done"]
    done = subprocess.run([*RAY, *words], env=environ, text=True, capture_output=True, timeout=90)
    assert "42-done" in done.stdout, done.stdout + done.stderr


@pytest.mark.same_by_ssh
def test_ray_client_connects_from_the_login_node(cluster):
    text = cluster.ray_slurm("env", "--client", cluster.yaml).stdout
    assert "ray://" in text
    program = "import ray; ray.init(); print('NODES', len(ray.nodes())); ray.shutdown()"
    command = ["bash", "-c", f"{text}\n{shlex.quote(RAY[0])} -c {shlex.quote(program)}"]
    for _ in range(3):
        done = subprocess.run(command, env=cluster.environ, text=True, capture_output=True, timeout=90)
        # Now and then the process that Ray's client server forks for a client is a zombie at once.
        if "ZombieProcess" not in done.stderr:
            break
    assert "NODES 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.same_by_ssh
def test_tasks_run_on_workers_and_not_on_the_head(cluster, tmp_path):
    seen = cluster.run_on_head(tasks_script(tmp_path, 2))
    assert len({task["job"] for task in seen}) == 2
    worker = next(row for row in _nodes(cluster) if row["type"] == "worker")
    with _Terminal(cluster, "attach", cluster.yaml, "--no-config-cache", "--node-ip", worker["id"]) as terminal:
        terminal.write("echo own=$RAY_CLOUD_INSTANCE_ID; ray status >/dev/null && echo done=$((40+2))\n")
        terminal.read_until("done=42")
    assert f"own={worker['id']}" in terminal.seen


@pytest.mark.same_by_ssh
def test_sessions_are_refused_with_another_way(cluster, tmp_path):
    script = tmp_path / "s.py"
    script.write_text("")
    for words in (("exec", cluster.yaml, "--tmux", "true"), ("submit", "--screen", cluster.yaml, script)):
        done = cluster.ray(*words, check=False)
        assert done.returncode == 1
        assert "ray job submit" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr


def test_a_port_is_forwarded_while_the_command_runs(cluster, tmp_path):
    (tmp_path / "page").write_text("hello")
    address = cluster.ray("get-head-ip", cluster.yaml).stdout.split()[-1]
    port = reserve(["port"]).ports["port"]
    server = f"cd {tmp_path} && exec python -m http.server --bind {address} {port}"
    child = cluster.start("exec", cluster.yaml, "--no-config-cache", "--port-forward", port, server)

    def page():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=5).read()
        except OSError:
            return None

    assert wait_for(page, 60, "the forwarded port") == b"hello"
    child.send_signal(signal.SIGINT)
    child.wait(30)
    wait_for(lambda: page() is None, 30, "the end of the server")


@pytest.mark.same_by_ssh
def test_addresses_are_told_also_of_a_worker_that_waits(cluster):
    head = cluster.ray("get-head-ip", cluster.yaml).stdout.split()[-1]
    assert cluster.access()["RAY_ADDRESS"].startswith(f"{head}:")
    wait_for(cluster.workers, 30, "the queued worker")
    addresses = cluster.ray("get-worker-ips", cluster.yaml).stdout.split()
    assert len([address for address in addresses if re.fullmatch(r"slurm-job-\d+-\w+", address)]) == 1


@pytest.mark.same_by_ssh
def test_the_dashboard_is_forwarded_and_asks_for_the_token(cluster):
    port = reserve(["local"]).ports["local"]
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


@pytest.mark.same_by_ssh
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


class _Terminal:
    """A `ray` command in a terminal of its own."""

    def __init__(self, cluster, *words):
        self.seen = ""
        self._pid, self._handle = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also when the tests run under nohup
            environ = {**cluster.environ, "SHELL": "/bin/bash", "TERM": "xterm"}
            os.execvpe(RAY[0], [*RAY, *map(str, words)], environ)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._handle)

    def write(self, text):
        os.write(self._handle, text.encode())

    def read_until(self, word, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while word not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._handle], [], [], 1)[0]:
                self.seen += os.read(self._handle, 65536).decode(errors="replace")


def test_attach_gives_a_terminal_with_the_clusters_environment(cluster):
    with _Terminal(cluster, "attach", cluster.yaml, "--no-config-cache") as terminal:
        terminal.write("tty; echo address=$RAY_ADDRESS; ray status >/dev/null && echo done=$((40+2))\n")
        terminal.read_until("done=42")
    assert "/dev/pts/" in terminal.seen
    assert f"address={cluster.access()['RAY_ADDRESS']}" in terminal.seen


@pytest.mark.same_by_ssh
def test_ray_stop_as_a_command_is_refused_with_the_reason(cluster):
    done = _exec(cluster, "ray stop")
    assert done.returncode == 1
    assert "use `ray down`" in done.stderr
    assert cluster.access()


@pytest.mark.same_by_ssh
def test_a_second_ray_up_finds_the_head_and_restart_only_restarts_ray(cluster):
    before = cluster.head(), cluster.access()
    cluster.up()
    assert (cluster.head()["id"], cluster.access()) == (before[0]["id"], before[1])
    cluster.ray("up", cluster.yaml, "--no-config-cache", "-y", "--restart-only")
    assert cluster.head()["id"] == before[0]["id"]
    assert cluster.access()["RAY_ADDRESS"] != before[1]["RAY_ADDRESS"]
    assert "Node status" in _exec(cluster, "ray status").stdout


@pytest.mark.same_by_ssh
def test_workers_go_and_the_head_asks_for_the_minimum_again(cluster, tmp_path):
    cluster.run_on_head(tasks_script(tmp_path, 1))
    before = {job.job_id for job in cluster.workers()}
    for words in (["--workers-only", "--keep-min-workers"], ["--keep-min-workers"]):
        done = cluster.ray("down", "-y", cluster.yaml, *words, check=False)
        assert done.returncode == 1
        assert f"use `ray down --workers-only {cluster.yaml}`" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert {job.job_id for job in cluster.workers()} == before
    cluster.ray("down", "-y", cluster.yaml, "--workers-only")
    assert cluster.head()["ray"] == "up"

    def queued_again():
        return [job for job in cluster.workers() if job.name.endswith("-queued") and job.job_id not in before]

    wait_for(queued_again, 60, "the queued worker that min_workers asks for")
    assert not before & {job.job_id for job in cluster.workers()}


@pytest.mark.same_by_ssh
def test_logs_are_printed_by_any_name_and_followed(cluster):
    head = cluster.head()
    assert "Ray is up" in cluster.ray_slurm("logs", cluster.yaml).stdout
    for name in (head["id"], head["id"][:-2], head["address"]):
        assert cluster.ray_slurm("logs", cluster.yaml, name, "-n", "1").stdout.count("\n") <= 2
    done = cluster.ray_slurm("logs", cluster.yaml, "nobody", check=False)
    assert done.returncode == 1
    assert head["id"] in done.stderr
    words = [*RAY_SLURM, "logs", str(cluster.yaml), "-f"]
    with subprocess.Popen(
        words, env=cluster.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        wait_for(lambda: "Ray is up" in child.stdout.readline(), 30, "the log", poll_s=0)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0


@pytest.mark.same_by_ssh
def test_the_tunnel_line_names_the_ports_of_this_cluster(cluster):
    done = cluster.ray_slurm("ssh-command", cluster.yaml, "--login-host", "login.example", "--user", "me")
    words = shlex.split(done.stdout)
    report = json.loads((cluster.root / "head.json").read_text())
    assert words[:2] == ["ssh", "-N"]
    assert words[-1] == "me@login.example"
    assert f"8265:{report['address']}:{report['ports']['dashboard']}" in words
    assert f"10001:{report['address']}:{report['ports']['client']}" in words
    assert (cluster.root / "auth_token").read_text() not in done.stdout + done.stderr


@pytest.mark.same_by_ssh
def test_all_clusters_are_listed_wherever_their_directory_is(cluster):
    rows = json.loads(cluster.ray_slurm("clusters", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == cluster.config["cluster_name"]]
    assert (row["state"], row["directory"]) == ("up", str(cluster.root))
    assert row["address"] == cluster.access()["RAY_ADDRESS"]
    assert row["queued"] >= 1
    assert cluster.config["cluster_name"] in cluster.ray_slurm("clusters").stdout


def test_stop_ends_the_cluster_after_the_command_and_passes_its_exit_code_on(cluster):
    done = _exec(cluster, "ls /tmp/ray/session_latest/logs; echo last words; (exit 4)", "--stop")
    assert done.returncode == 4
    assert "last words" in done.stdout
    assert "monitor.log" in done.stdout
    wait_for(lambda: cluster.head() is None and not cluster.jobs(), 60, "the end of the cluster")
    cluster.wait_until_no_process_is_left(30)
    cluster.down()
    assert not cluster.root.exists()
    for words in (("exec", cluster.yaml, "true"), ("attach", cluster.yaml), ("get-head-ip", cluster.yaml)):
        done = cluster.ray(*words, check=False)
        assert done.returncode == 1
        assert "has no head; start it with `ray up`" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
