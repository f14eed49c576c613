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
from support import RAY_SLURM, wait_for

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


@pytest.mark.parametrize(
    "words",
    [
        ["up", "--isolated"],
        ["up", "--layout", "site.yaml"],
        ["node", "c1", "cut"],
        ["controller", "start", "--forget-jobs"],
        ["controller", "--help"],
    ],
)
def test_who_asks_for_machines_and_faults_is_told_where_they_are_now(words, tmp_path):
    (tmp_path / "site.yaml").write_text("{nodes: [{name: c}], partitions: [{name: p, groups: [c]}], isolated: true}")
    done = _type(*words, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "python -m tests.faults.rehearsal" in done.stderr


def test_what_is_gone_is_not_in_the_help():
    assert "controller" not in _type("--help").stdout
    assert "isolated" not in _type("up", "--help").stdout


def test_up_where_one_is_up_says_how_to_end_it(sandbox):
    done = _type("up", "--state-dir", sandbox.paths.root)
    assert done.returncode == 1
    assert "sandbox down" in done.stderr
