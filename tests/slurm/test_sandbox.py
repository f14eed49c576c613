"""The sandbox: a real SLURM that comes and goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import RAY_SLURM, machines_are_allowed, wait_for

from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox import lifecycle
from ray_slurm_provider.sandbox.daemons import daemons_of, processes_of
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox

pytestmark = pytest.mark.slurm


@pytest.fixture
def parent():
    path = Path(tempfile.mkdtemp(prefix="rst-"))
    path.chmod(0o755)
    yield path
    for state in path.iterdir():
        if (state / "sandbox.json").exists():
            Sandbox(state).down()
    shutil.rmtree(path)


def _type(*words, **options):
    environ = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    return subprocess.run(
        [*RAY_SLURM, "sandbox", *map(str, words)], text=True, capture_output=True, timeout=120, env=environ, **options
    )


def _gone(box):
    assert processes_of(box.paths) == []
    assert not box.paths.root.exists()


def test_two_sandboxes_live_side_by_side_and_leave_nothing(parent):
    one, two = parent / "one", parent / "two"
    assert _type("up", "--nodes", 2, "--state-dir", one).returncode == 0
    assert _type("up", "--nodes", 1, "--gpu-nodes", 1, "--gpus-per-node", 1, "--state-dir", two).returncode == 0
    assert len(_type("run", "--state-dir", one, "--", "sinfo", "-h", "-N").stdout.splitlines()) == 2
    names = _type("run", "--state-dir", two, "--", "sinfo", "-h", "-N", "-o", "%N").stdout.split()
    assert names == ["c1", "g1"]
    status = _type("status", "--state-dir", one)
    assert (status.returncode, "DOWN" in status.stdout) == (0, False)

    # A GPU is scheduled: the second job for the only one waits.
    command = [
        "sbatch",
        "--parsable",
        "-p",
        "gpu",
        "--gres=gpu:1",
        "--wrap",
        "echo gpu=$CUDA_VISIBLE_DEVICES; sleep 60",
    ]
    for _ in range(2):
        assert _type("run", "--state-dir", two, "--", *command, cwd=parent).returncode == 0
    states = ["run", "--state-dir", two, "--", "squeue", "-h", "-o", "%T", "-S", "i"]
    wait_for(lambda: _type(*states).stdout.split() == ["RUNNING", "PENDING"], 20, "one job at a time")
    wait_for(lambda: (parent / "slurm-1.out").read_text() == "gpu=0\n", 20, "the job's output")

    assert _type("down", "--state-dir", two).returncode == 0
    _gone(Sandbox(two))
    assert _type("status", "--state-dir", one).returncode == 0
    assert _type("down", "--state-dir", one).returncode == 0
    _gone(Sandbox(one))
    (parent / "slurm-1.out").unlink()


@pytest.mark.parametrize("daemon", ["slurmctld", "slurmd", "munged"])
def test_down_leaves_nothing_after_the_crash_of_a_daemon(parent, daemon):
    box = Sandbox(parent / "s")
    box.up(usual_spec(nodes=1))
    environ = {**os.environ, **box.environment()}
    # A job whose processes do not want to go.
    script = "#!/bin/bash\n(trap '' TERM; setsid sleep 600) &\nexec sleep 600\n"
    subprocess.run(
        ["sbatch", "-o", "/dev/null"], input=script, text=True, env=environ, cwd="/tmp", check=True, capture_output=True
    )
    wait_for(lambda: sum(process.name == "sleep" for process in processes_of(box.paths)) >= 2, 20, "the job")
    os.kill(daemons_of(box.paths)[daemon][0], signal.SIGKILL)
    wait_for(lambda: not daemons_of(box.paths)[daemon], 10, "the crash")
    assert _type("status", "--state-dir", box.paths.root).returncode == 1
    box.down()
    _gone(box)
    box.up(usual_spec(nodes=1))
    box.down()
    _gone(box)


def test_a_missing_binary_is_one_line_that_names_the_packages(parent):
    done = subprocess.run(
        [*RAY_SLURM, "sandbox", "up", "--state-dir", str(parent / "s")],
        text=True,
        capture_output=True,
        env={"PATH": str(parent), "HOME": str(parent)},
    )
    # Where the daemons lie in /usr/sbin they are found all the same; the tools of the client are not.
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "apt-get install slurmctld slurmd slurm-client munge" in done.stderr


def test_a_sandbox_that_does_not_start_is_cleaned_up_and_names_its_logs(parent, monkeypatch):
    box = Sandbox(parent / "s")
    render = lifecycle.render_slurm_conf
    monkeypatch.setattr(
        lifecycle, "render_slurm_conf", lambda *parts: render(*parts) + "AccountingStorageTRES=gres/gpu\n"
    )
    monkeypatch.setattr(lifecycle, "_STARTUP_TIMEOUT_S", 3.0)
    with pytest.raises(SandboxError, match="logs: ") as error:
        box.up(usual_spec(nodes=1))
    logs = Path(str(error.value).rpartition("logs: ")[2])
    assert "slurmdbd is required" in (logs / "slurmctld.log").read_text()
    shutil.rmtree(logs)
    _gone(box)


def test_a_directory_that_is_no_sandbox_is_left_alone(parent):
    precious = parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    for verb in ("up", "down"):
        done = _type(verb, "--state-dir", precious)
        assert done.returncode == 1
        assert "not a sandbox" in done.stderr
    assert (precious / "file").read_text() == "x"
    shutil.rmtree(precious)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--nodes", "0"], "at least one node"),
        (["up", "--cpus", "0"], "--cpus"),
        (["up", "--memory", "lots"], "memory: Value error, 'lots' is not a memory size"),
        (["up", "--state-dir", "/tmp/" + "x" * 80], "too long"),
        (["up", "--state-dir", "/tmp/rst a b"], "without blanks"),
        (["status", "--state-dir", "/tmp/rst-nowhere"], "there is no sandbox"),
        (["env", "--state-dir", "/tmp/rst-nowhere"], "there is no sandbox"),
        (["run", "--state-dir", "/tmp/rst-nowhere", "--", "true"], "there is no sandbox"),
    ],
)
def test_bad_input_gets_one_clear_message(words, said):
    done = _type(*words)
    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_down_where_nothing_is_says_so():
    done = _type("down", "--state-dir", "/tmp/rst-nowhere")
    assert done.returncode == 0
    assert "There is no sandbox" in done.stdout


def test_run_passes_the_exit_code_on(sandbox):
    root = str(sandbox.paths.root)
    assert _type("run", "--state-dir", root, "--", sys.executable, "-c", "raise SystemExit(3)").returncode == 3
    assert "no-such-command" in _type("run", "--state-dir", root, "--", "no-such-command").stderr


def _run(box, *words):
    """Run a command on the login machine, and return what it printed."""
    done = _type("run", "--state-dir", box.paths.root, "--", *words, cwd="/tmp")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _state(box, node):
    return _run(box, "sinfo", "-h", "-N", "-n", node, "-o", "%T").strip()


@pytest.mark.skipif(not machines_are_allowed(), reason="the kernel does not let us make namespaces")
def test_the_nodes_of_an_isolated_sandbox_are_machines_that_can_be_lost(parent):
    box = Sandbox(parent / "s")
    assert _type("up", "--isolated", "--nodes", 2, "--state-dir", box.paths.root).returncode == 0

    def fault(*words):
        done = _type(*words, "--state-dir", box.paths.root)
        assert done.returncode == 0, done.stderr

    look = "hostname; ip -o -4 addr show eth0; ls /dev/shm; touch /dev/shm/mine; ls /proc | grep -c '^[0-9]'"
    _run(box, "srun", "-w", "c2", "sh", "-c", look)
    name, address, processes = _run(box, "srun", "-w", "c1", "sh", "-c", look).splitlines()
    assert name == "c1"
    assert " 10.77.1.1/" in address
    assert int(processes) < 20
    assert not Path("/dev/shm/mine").exists()
    assert "ip link" not in _type("env", "--state-dir", box.paths.root).stdout

    fault("node", "c1", "cut")
    wait_for(lambda: _state(box, "c1").startswith("down"), 40, "SLURM to notice")
    fault("node", "c1", "join")
    wait_for(lambda: _state(box, "c1") == "idle", 60, "the node to come back")

    _run(box, "sbatch", "-w", "c2", "--no-requeue", "-o", "/dev/null", "--wrap", "sleep 600")
    wait_for(lambda: _run(box, "squeue", "-h", "-o", "%T").split() == ["RUNNING"], 20, "the job")
    fault("node", "c2", "crash")
    assert not [p for p in processes_of(box.paths) if b"SLURMD_NODENAME=c2" in p.read("environ")]
    assert _type("node", "c2", "crash", "--state-dir", box.paths.root).returncode == 1
    fault("node", "c2", "boot")
    wait_for(lambda: _state(box, "c2") == "idle", 60, "the node to come back")
    wait_for(lambda: not _run(box, "squeue", "-h"), 60, "the job's end")

    _run(box, "sbatch", "-H", "-o", "/dev/null", "--wrap", "true")
    for words, kept in ((["stop"], True), (["crash"], True), (["stop"], False)):
        if words == ["crash"]:
            # What it knows is on disk after five seconds at most.
            wait_for(lambda: (box.paths.root / "ctld" / "job_state").stat().st_size > 0, 20, "the state")
        fault("controller", *words)
        assert _type("status", "--state-dir", box.paths.root).returncode == 1
        fault("controller", "start", *([] if kept else ["--forget-jobs"]))
        assert bool(_run(box, "squeue", "-h")) == kept
    fault("controller", "freeze")
    assert "DOWN" in _type("status", "--state-dir", box.paths.root).stdout
    fault("controller", "thaw")
    wait_for(lambda: _type("status", "--state-dir", box.paths.root).returncode == 0, 60, "everything to be well")
    box.down()
    _gone(box)


def test_an_isolated_sandbox_needs_no_root(public_place, users, site_prefix):
    if subprocess.run(["unshare", "-U", "-r", "true"], user=users[0], capture_output=True).returncode:
        pytest.skip("the kernel does not let users make namespaces")
    place = public_place / "isolated"
    command = [str(site_prefix / "bin" / "ray-slurm"), "sandbox"]

    def run(*words):
        done = subprocess.run(
            [*command, *words],
            user=users[0],
            group=users[0],
            extra_groups=[],
            env={"PATH": "/usr/bin:/bin", "HOME": str(public_place / users[0]), "RAY_SLURM_SANDBOX": str(place)},
            cwd="/tmp",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place.mkdir()
    shutil.chown(place, users[0], users[0])
    try:
        run("up", "--isolated", "--nodes", "1")
        assert run("run", "--", "srun", "sh", "-c", "hostname; id -un").split() == ["c1", users[0]]
        for fault in ("cut", "join", "crash", "boot"):
            run("node", "c1", fault)
        wait_for(lambda: "c1         idle" in run("status"), 60, "the node to come back")
    finally:
        run("down")
    assert processes_of(Sandbox(place).paths) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["node", "c1", "cut"], "--isolated"),
        (["node", "nope", "crash"], "there are c1, c2"),
        (["controller", "start"], "runs already"),
        (["controller", "stop", "--forget-jobs"], "goes with start"),
        (["controller", "explode"], "explode"),
    ],
)
def test_a_fault_that_cannot_be_made_says_why(sandbox, words, said):
    done = _type(*words, "--state-dir", sandbox.paths.root)
    assert done.returncode in {1, 2}
    assert said in done.stderr


def test_up_where_one_is_up_says_how_to_end_it(sandbox):
    done = _type("up", "--state-dir", sandbox.paths.root)
    assert done.returncode == 1
    assert "sandbox down" in done.stderr
