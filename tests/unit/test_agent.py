"""The pieces of the node agent: addresses, ports, temporary directories, the command line of Ray."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import wait_for

from ray_slurm_provider import procfs
from ray_slurm_provider.agent import network, ray_command, temp_dirs
from ray_slurm_provider.agent.ray_command import HEAD_PORTS, shell_environment, start_command, start_environment
from ray_slurm_provider.agent.spec import SPEC_VARIABLE, AgentSpec, read_spec, take_spec
from ray_slurm_provider.files import write_atomically, write_json


def test_a_literal_address_of_the_slurm_node_is_taken_also_on_loopback():
    assert network.choose_address("", "n1", lambda node: "127.0.1.3") == "127.0.1.3"


def test_a_name_that_resolves_to_loopback_is_a_trap(monkeypatch):
    monkeypatch.setattr(network, "_resolve", lambda name: ["127.0.1.1"])
    monkeypatch.setattr(network, "_towards_default_route", lambda: ["10.1.2.3"])
    monkeypatch.setattr(network, "is_local", lambda address: True)
    assert network.choose_address("", "n1", lambda node: "n1") == "10.1.2.3"


def test_an_address_of_another_host_is_not_taken(monkeypatch):
    monkeypatch.setattr(network, "_resolve", lambda name: ["203.0.113.7"])
    monkeypatch.setattr(network, "_towards_default_route", list)
    assert network.choose_address("", "n1", lambda node: "203.0.113.7") == "127.0.0.1"


def test_an_interface_is_taken_by_name_and_a_wrong_one_told():
    assert network.choose_address("lo", "", lambda node: "") == "127.0.0.1"
    assert network.choose_address("ib9, lo", "", lambda node: "") == "127.0.0.1"
    with pytest.raises(ValueError, match="there are .*lo"):
        network.choose_address("ib9", "", lambda node: "")


def test_only_a_refused_connection_says_that_nobody_is_there():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert network.connection_state("127.0.0.1", port, 1) == "refused"
        server.listen()
        assert network.connection_state("127.0.0.1", port, 1) == "open"
    assert network.connection_state("no.such.host.invalid", 1, 1) == "unknown"


def test_a_line_notices_the_end_of_the_other_side():
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = network.Line("127.0.0.1", server.getsockname()[1])
        assert not line.holds()
        assert line.open(1) == "open"
        connection, _ = server.accept()
        assert line.holds()
        connection.send(b"hello")
        assert line.holds()
        connection.close()
        wait_for(lambda: not line.holds(), 5, "the end of the line")
    assert line.open(1) == "refused"
    line.close()


@pytest.mark.parametrize(("text", "wanted"), [("1.2.3.4:5", ("1.2.3.4", 5)), ("[fe80::1]:5", ("fe80::1", 5))])
def test_addresses_are_split(text, wanted):
    assert network.split_address(text) == wanted


@pytest.fixture
def base():
    """A short place for temporary directories."""
    path = Path(tempfile.mkdtemp(prefix="rst-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_a_temp_dir_is_private_and_short_and_goes_with_its_node(base, tmp_path):
    path = temp_dirs.make_temp_dir(str(base))
    assert path.stat().st_mode & 0o777 == 0o700
    assert len(str(path)) <= temp_dirs.MAX_LENGTH
    temp_dirs.leave_temp_dir(path)
    assert not path.exists()
    long = tmp_path / ("x" * 60)
    long.mkdir()
    with pytest.raises(ValueError, match="107 bytes"):
        temp_dirs.make_temp_dir(str(long))


def test_a_temp_dir_may_name_variables(base, monkeypatch):
    monkeypatch.setenv("WHERE", str(base))
    assert temp_dirs.make_temp_dir("$WHERE").parents[1] == base


def test_only_what_a_killed_job_left_is_swept(base):
    living, dead, old, elsewhere = (temp_dirs.make_temp_dir(str(base)).parent for _ in range(4))
    (base / "rsp-strange").mkdir()
    note = json.loads((living / "user.json").read_text())
    write_json(dead / "user.json", {**note, "start": "1"})
    write_json(old / "user.json", {**note, "boot": "an earlier one"})
    write_json(elsewhere / "user.json", {**note, "start": "1", "boot": "another", "host": "another"})
    assert sorted(temp_dirs.sweep_temp_dirs(str(base))) == sorted([dead, old])
    assert sorted(path for path in base.iterdir()) == sorted([living, elsewhere, base / "rsp-strange"])


HEAD = AgentSpec("c", "d", "/shared/c")
WORKER = AgentSpec(
    "c", "d", "/shared/c", head="1-a", gcs_address="1.2.3.4:5", labels={"a": "b"}, ray_start_args=("--x=1",)
)
PORTS = {name: number for number, name in enumerate(HEAD_PORTS, start=1)}


def test_the_head_gets_its_ports_and_rays_patience():
    command = start_command(HEAD, "1.2.3.4", PORTS, "/tmp/t")
    for word in (
        "--head",
        "--block",
        "--port=1",
        "--dashboard-port=3",
        "--temp-dir=/tmp/t",
        "--dashboard-host=1.2.3.4",
    ):
        assert word in command
    environ = start_environment(HEAD, {"CPU": 0}, PORTS, {"usage_stats": False})
    assert environ["RAY_enable_autoscaler_v2"] == "1"
    assert environ["RAY_AUTH_MODE"] == "token"
    assert environ["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"].isdigit()
    assert environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"


def test_a_broken_connection_is_noticed_soon_unless_somebody_wants_it_otherwise():
    name = "RAY_grpc_client_keepalive_time_ms"
    assert start_environment(WORKER, {"CPU": 2}, {}, {})[name] == "60000"
    assert f"export {name}=60000\n" in shell_environment({}, {})
    assert f"export {name}=5\n" in shell_environment({name: "5"}, {})


ODD_NAMES = ["été", "变量", "BASH_FUNC_x%%", "a.b", "a-b", "1a", "", "é\udcff", "A B", "ﬁ"]
READ_ONLY = ["UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO"]


@pytest.mark.parametrize("name", [*ODD_NAMES, *READ_ONLY])
def test_a_variable_that_the_shell_cannot_export_keeps_no_command_from_running(tmp_path, name):
    environ = {name: "5", "GOOD": "it's", "RAW": os.fsdecode(b"caf\xe9 \xff")}
    # One alone, and as the last that is exported.
    for access in ({"RAY_ADDRESS": "x"}, {}):
        write_atomically(tmp_path / "exports", shell_environment(environ, access))
        command = f'. {tmp_path}/exports && printf "%s\\0" "$GOOD" "$RAW"'
        done = subprocess.run(["bash", "-c", command], env={"PATH": os.environ["PATH"]}, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == b"it's\0caf\xe9 \xff\0"


@pytest.mark.parametrize(
    ("max_workers", "period_ms"), [(0, "200"), (8, "200"), (49, "500"), (99, "1000"), (5000, "1000"), (None, "1000")]
)
def test_the_head_of_a_small_cluster_asks_its_nodes_more_often(max_workers, period_ms):
    environ = start_environment(HEAD, {}, PORTS, {"max_workers": max_workers})
    assert environ["RAY_gcs_pull_resource_loads_period_milliseconds"] == period_ms


def test_without_a_token_the_dashboard_stays_on_the_host():
    assert "--dashboard-host=127.0.0.1" in start_command(
        AgentSpec("c", "d", "/x", token_auth=False), "1.2.3.4", PORTS, "/t"
    )


def test_a_worker_joins_its_head():
    command = start_command(WORKER, "1.2.3.5", PORTS, "/tmp/t")
    assert "--address=1.2.3.4:5" in command
    assert command[-1] == "--x=1"
    environ = start_environment(WORKER, {"CPU": 2}, {}, {})
    assert json.loads(environ["RAY_OVERRIDE_LABELS"]) == {"a": "b"}
    assert "RAY_enable_autoscaler_v2" not in environ
    assert json.loads(environ["RAY_OVERRIDE_RESOURCES"]) == {"CPU": 2}


@pytest.mark.parametrize(("version", "fits"), [("2.54.1", False), ("1.99.0", False), ("2.55.0", True), ("3.0.0", True)])
def test_a_ray_that_is_too_old_is_named(tmp_path, monkeypatch, version, fits):
    (tmp_path / "_version.py").write_text(f'commit = "1"\nversion = "{version}"\n')
    monkeypatch.setattr(ray_command, "_ray_package", lambda: tmp_path)
    said = ray_command.unfit_ray()
    assert (said == "") == fits
    assert fits or f"has Ray {version}, and ray-slurm-provider needs 2.55 or newer" in said


def test_worker_processes_get_ports_of_the_range():
    command = start_command(WORKER._replace(worker_ports="21000-21999"), "1.2.3.5", PORTS, "/tmp/t")
    assert {"--min-worker-port=21000", "--max-worker-port=21999"} <= set(command)


def test_metrics_are_closed_unless_they_are_wanted():
    closed = start_environment(HEAD, {}, PORTS, {})
    assert (closed["RAY_enable_metrics_collection"], closed["AUTOSCALER_METRIC_PORT"]) == ("0", "-1")
    wanted = start_environment(HEAD._replace(metrics=True), {}, PORTS, {})
    assert "RAY_enable_metrics_collection" not in wanted
    assert wanted["AUTOSCALER_METRIC_PORT"] == str(PORTS["autoscaler_metrics"])


def test_a_login_node_takes_the_address_towards_the_compute_nodes(monkeypatch):
    routes = {"10.0.0.5": ["10.0.0.1"], "10.0.0.6": ["10.0.0.1"], "198.51.100.7": ["198.51.100.1"]}
    monkeypatch.setattr(network, "_resolve", lambda name: {"n1": ["10.0.0.5"], "n2": ["10.0.0.6"]}.get(name, [name]))
    monkeypatch.setattr(network, "_towards", lambda address: routes.get(address, []))
    monkeypatch.setattr(network, "is_local", lambda address: True)
    assert network.choose_login_address("", lambda: ["198.51.100.7", "n1", "n2"]) == "10.0.0.1"


def test_a_login_node_is_on_loopback_only_when_every_compute_node_is():
    assert network.choose_login_address("", lambda: ["127.0.1.1", "127.0.1.2"]) == "127.0.0.1"
    other = network.choose_login_address("", lambda: ["127.0.1.1", "198.51.100.7"])
    assert not network.is_loopback(other) or not network._towards_default_route()


def test_only_addresses_are_loopback_addresses():
    assert all(map(network.is_loopback, ["127.0.0.1", "127.0.1.1", "::1"]))
    assert not any(map(network.is_loopback, ["128.0.0.1", "::2", "fe80::1", "localhost", ""]))


def test_an_interface_has_the_address_that_the_kernel_says():
    assert network.address_of_interface("lo") == "127.0.0.1"
    assert network.address_of_interface("no-such, lo") == "127.0.0.1"
    with pytest.raises(ValueError, match="there are .*lo"):
        network.address_of_interface("no-such")
    assert "127.0.0.1" in network.own_addresses()


def test_link_local_addresses_are_passed_over(monkeypatch):
    monkeypatch.setattr(network, "_resolve", lambda name: ["fe80::1", "fd00::5"])
    monkeypatch.setattr(network, "is_local", lambda address: True)
    assert network.choose_address("", "n1", lambda node: "n1") == "fd00::5"


@pytest.fixture
def dual_stack(monkeypatch):
    """Names with addresses of both kinds; the resolver prefers IPv6 (RFC 6724)."""
    found = [("fd00::5", 0, 0, 0), ("fe80::1%eth0", 0, 0, 2), ("10.1.2.3", 0)]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", address) for address in found])
    monkeypatch.setattr(network, "is_local", lambda address: True)
    monkeypatch.setattr(network, "_towards", lambda address: ["fd00::9" if ":" in address else "10.9.9.9"])
    return found


def test_of_a_name_with_both_kinds_of_address_ipv4_is_taken(dual_stack):
    assert network.choose_address("", "n1", lambda node: "n1") == "10.1.2.3"
    assert network.choose_login_address("", lambda: ["n1", "n2"]) == "10.9.9.9"


def test_ipv6_is_taken_when_slurm_says_so_or_when_there_is_nothing_else(dual_stack):
    assert network.choose_address("", "n1", lambda node: "fd00::7") == "fd00::7"
    del dual_stack[-1]
    assert network.choose_address("", "n1", lambda node: "n1") == "fd00::5"


def test_a_variable_that_only_jobs_have_is_no_matter_on_the_login_node(base, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert temp_dirs._expanded("$NO_SUCH_VARIABLE/x") == temp_dirs.DEFAULT_BASE
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE"):
        temp_dirs.make_temp_dir("${NO_SUCH_VARIABLE}/x")


def test_a_spec_comes_back_as_it_was():
    assert read_spec(json.dumps(WORKER.as_json())) == WORKER


# What a job says whose script the first release has written; the fields that it has may be dropped, and others added, but
# jobs that wait in queues shall start.
FIRST_RELEASE = {
    "cluster": "c",
    "home": "0123456789",
    "cluster_dir": "/shared/c",
    "login_node": False,
    "head": "1-abcdef",
    "gcs_address": "1.2.3.4:5",
    "resources": {"CPU": 4},
    "written": ["CPU"],
    "labels": {"a": "b"},
    "ray_start_args": ["--x=1"],
    "epilogue": ["echo bye"],
    "interface": "ib0",
    "temp_dir": "/scratch",
    "token_auth": True,
    "tls": False,
    "metrics": False,
    "service_ports": "20000-20999",
    "worker_ports": "",
    "update_interval_s": 2,
    "withdraw_after_s": 300,
    "drain_s": 60,
    "slurm_bin": "",
    "clusters": "",
    "command_timeout_s": 60,
}


def test_a_spec_of_the_first_release_is_understood():
    spec = read_spec(json.dumps(FIRST_RELEASE))
    assert (spec.head, spec.resources, spec.epilogue) == ("1-abcdef", {"CPU": 4}, ("echo bye",))
    assert not spec.is_head


def test_what_another_release_has_written_into_a_spec_is_passed_over_and_told(caplog):
    newer = {**WORKER.as_json(), "of_tomorrow": {"x": [1]}, "renamed_s": 5}
    assert read_spec(json.dumps(newer)) == WORKER
    assert "['of_tomorrow', 'renamed_s']" in caplog.text


def test_what_another_release_has_not_written_into_a_spec_has_its_default():
    spec = read_spec(
        '{"cluster": "c", "home": "d", "cluster_dir": "/shared/c", "head": "1-a", "gcs_address": "1.2.3.4:5"}'
    )
    assert spec == AgentSpec("c", "d", "/shared/c", head="1-a", gcs_address="1.2.3.4:5")


def test_a_spec_is_taken_from_the_environment_once():
    environ = {SPEC_VARIABLE: json.dumps(WORKER.as_json()), "RAY_SLURM_DIR": "/shared/c", "A": "b"}
    assert take_spec(environ) == WORKER
    assert environ == {"RAY_SLURM_DIR": "/shared/c", "A": "b"}


def test_a_spec_of_a_script_of_the_first_release_is_its_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["agent", json.dumps(FIRST_RELEASE)])
    assert take_spec({}).head == "1-abcdef"


@pytest.mark.parametrize("name", [b"caf\xc3\xa9", b"caf\xe9", b"\xe6\xbc\xa2", b"\xff"])
@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["UTF-8", "C", "ASCII"],
)
def test_a_node_finds_the_clusters_directory_in_any_locale(tmp_path, name, locale):
    """Its script has the bytes, the spec a text that `ray up` has read in its own locale."""
    root = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(root)
    spec = AgentSpec("c", "d", os.fsdecode(root))
    code = (
        "import os; from ray_slurm_provider.agent.spec import take_spec; from ray_slurm_provider import reports as r;"
        "d = take_spec(os.environ).directory; p = r.ReportPaths(d); p.nodes.mkdir();"
        "r.write_report(p, r.NodeReport('1-a', 'ready', reason=str(d)), head=True); assert r.read_report(p.head)"
    )
    environ = {"PATH": os.environ["PATH"], **locale, "RAY_SLURM_DIR": os.fsdecode(root)}
    environ[SPEC_VARIABLE] = json.dumps(spec.as_json())
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.path.exists(root + b"/nodes/1-a.json")


def test_the_epilogue_runs_last_and_stands_in_no_argument(tmp_path):
    """Everybody on the host may read arguments."""
    lines = [
        "secret=it\\'s",
        f"tr '\\0' '\\n' < /proc/$$/cmdline > {tmp_path}/arguments",
        f'echo "$secret" > {tmp_path}/ran',
    ]
    spec = AgentSpec("c", "d", str(tmp_path), epilogue=lines)
    program = (
        "import sys; from ray_slurm_provider.agent import __main__ as m;"
        "m.run_guarded = lambda *_: 3; sys.exit(m.main())"
    )
    environ = {**os.environ, SPEC_VARIABLE: json.dumps(spec.as_json()), "RAY_CLOUD_INSTANCE_ID": "1-a"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "ran").read_text() == "it's\n"
    assert "secret" not in (tmp_path / "arguments").read_text()


def test_the_agent_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import ray_slurm_provider.agent.__main__;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ray_slurm_provider']"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_processes_are_told_apart_from_zombies_and_from_later_ones():
    child = subprocess.Popen(["sleep", "60"])
    process = procfs.find(child.pid)
    assert process in procfs.descendants(os.getpid())
    assert procfs.alive(process)
    child.kill()
    # Not waited for: a zombie.
    assert procfs.wait_until(lambda: not procfs.alive(process), 5)
    child.wait()


@pytest.mark.parametrize(
    ("agent", "code", "cleaned"),
    [("lambda: 3", 3, ""), ("lambda: 255", 255, ""), ("lambda: os.kill(os.getpid(), 9)", 137, "cleaned")],
)
def test_the_guard_passes_the_exit_code_on_and_cleans_up_after_a_killed_agent(agent, code, cleaned):
    program = (
        "import os, sys; from ray_slurm_provider.agent.guard import run_guarded;"
        f"sys.exit(run_guarded({agent}, lambda: print('cleaned')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (code, cleaned)
