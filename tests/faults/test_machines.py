"""The test bed itself: machines that can be lost, a controller that can fail, and the command that rehearses it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import machines_are_allowed, wait_for

from faults.machines import MachineSandbox
from ray_slurm_provider.sandbox.daemons import processes_of

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not machines_are_allowed(), reason="the kernel does not let us make namespaces"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place():
    path = Path(tempfile.mkdtemp(prefix="rst-"))
    path.chmod(0o755)
    yield path / "s"
    MachineSandbox(path / "s").down()
    shutil.rmtree(path)


def _type(place, *words):
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.rehearsal", "--state-dir", place, *map(str, words)],
        text=True,
        capture_output=True,
        timeout=120,
        cwd=ROOT,
    )


def _nothing_is_left(place):
    box = MachineSandbox(place)
    assert processes_of(box.paths) == []
    assert box.machines.members() == []
    assert not place.exists()


def test_the_nodes_are_machines_that_can_be_lost_and_the_controller_can_fail(place):
    box = MachineSandbox(place)

    def do(*words):
        done = _type(place, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(*words):
        return do("run", "--", *words)

    def state(node):
        return run("sinfo", "-h", "-N", "-n", node, "-o", "%T").strip()

    do("up", "--nodes", 2)
    look = "hostname; ip -o -4 addr show eth0; ls /dev/shm; touch /dev/shm/mine; ls /proc | grep -c '^[0-9]'"
    run("srun", "-w", "c2", "sh", "-c", look)
    name, address, processes = run("srun", "-w", "c1", "sh", "-c", look).splitlines()
    assert name == "c1"
    assert " 10.77.1.1/" in address
    assert int(processes) < 20
    assert not Path("/dev/shm/mine").exists()

    do("node", "c1", "cut")
    wait_for(lambda: state("c1").startswith("down"), 40, "SLURM to notice")
    do("node", "c1", "join")
    wait_for(lambda: state("c1") == "idle", 60, "the node to come back")

    run("sbatch", "-w", "c2", "--no-requeue", "-o", "/dev/null", "--wrap", "sleep 600")
    wait_for(lambda: run("squeue", "-h", "-o", "%T").split() == ["RUNNING"], 20, "the job")
    do("node", "c2", "crash")
    assert not [p for p in processes_of(box.paths) if b"SLURMD_NODENAME=c2" in p.read("environ")]
    assert _type(place, "node", "c2", "crash").returncode == 1
    do("node", "c2", "boot")
    wait_for(lambda: state("c2") == "idle", 60, "the node to come back")
    wait_for(lambda: not run("squeue", "-h"), 60, "the job's end")

    run("sbatch", "-H", "-o", "/dev/null", "--wrap", "true")
    for words, kept in ((["stop"], True), (["crash"], True), (["stop"], False)):
        if words == ["crash"]:
            # What it knows is on disk after five seconds at most.
            wait_for(lambda: (place / "ctld" / "job_state").stat().st_size > 0, 20, "the state")
        do("controller", *words)
        assert not box.status().healthy
        do("controller", "start", *([] if kept else ["--forget-jobs"]))
        assert bool(run("squeue", "-h")) == kept
    do("controller", "freeze")
    assert not box.status().controller
    do("controller", "thaw")
    wait_for(lambda: box.status().healthy, 60, "everything to be well")
    for words, said in (
        (["node", "nope", "crash"], "there are c1, c2"),
        (["node", "c1", "boot"], "runs already"),
        (["controller", "start"], "runs already"),
        (["controller", "stop", "--forget-jobs"], "goes with start"),
        (["controller", "explode"], "explode"),
    ):
        done = _type(place, *words)
        assert done.returncode in {1, 2}
        assert said in done.stderr
    do("down")
    _nothing_is_left(place)


def test_it_needs_no_root(public_place, users, site_prefix):
    if subprocess.run(["unshare", "-U", "-r", "true"], user=users[0], capture_output=True).returncode:
        pytest.skip("the kernel does not let users make namespaces")
    # Others need not be able to read the clone.
    (public_place / "faults").mkdir()
    for name in ("__init__.py", "machines.py", "machine.sh", "rehearsal.py"):
        shutil.copy(Path(__file__).with_name(name), public_place / "faults")
    place = public_place / "machines"

    def run(*words):
        done = subprocess.run(
            [str(site_prefix / "bin" / "python"), "-m", "faults.rehearsal", "--state-dir", place, *words],
            user=users[0],
            group=users[0],
            extra_groups=[],
            env={"PATH": "/usr/bin:/bin", "HOME": str(public_place / users[0])},
            cwd=public_place,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place.mkdir()
    shutil.chown(place, users[0], users[0])
    try:
        run("up", "--nodes", "1")
        assert run("run", "--", "srun", "sh", "-c", "hostname; id -un").split() == ["c1", users[0]]
        for fault in ("cut", "join", "crash", "boot"):
            run("node", "c1", fault)
        wait_for(lambda: run("run", "--", "sinfo", "-h", "-o", "%T").split() == ["idle"], 60, "the node to come back")
    finally:
        run("down")
    box = MachineSandbox(place)
    assert processes_of(box.paths) == box.machines.members() == []
