"""Fixtures: one sandbox per test session, and clusters in it that are always taken down."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

sys.path.insert(0, str(Path(__file__).parent))

from fake.harness import FakeSlurm
from support import UserCluster, cluster_config, user_environment

from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true", help="the long fault tests, too (up to an hour)")
    parser.addoption("--fault-times", type=float, default=1.0, help="have faults last so many times as long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all-faults"):
        return
    long = [item for item in items if item.get_closest_marker("all_faults")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in set(long)]


# A shell that runs the tests in the background has them ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sandbox():
    """A real SLURM: 4 nodes of 4 CPUs, one with two GPUs besides."""
    parent = Path(tempfile.mkdtemp(prefix="rst-"))
    parent.chmod(0o755)
    box = Sandbox(parent / "s")
    try:
        box.up(usual_spec(nodes=4, gpu_nodes=1, gpus_per_node=2, cpus=4, memory="8G"))
        yield box
    finally:
        box.down()
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture(scope="session")
def sandbox_environment(sandbox):
    return sandbox.environment()


def _home(parent):
    home = parent / "home"
    (home / "tmp").mkdir(parents=True)
    return home


@pytest.fixture(scope="session")
def public_place():
    """A directory that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="rsu-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def users(public_place):
    """Two Unix users; only root may make such."""
    made = []
    try:
        for name in ("rsp-alice", "rsp-bob"):
            home = public_place / name
            subprocess.run(["useradd", "--create-home", "--home-dir", home, "--shell", "/bin/bash", name], check=True)
            made.append(name)
            home.chmod(0o700)
        yield made
    finally:
        for name in made:
            subprocess.run(["userdel", "--force", name], check=True, capture_output=True)


@pytest.fixture(scope="session")
def site_prefix(public_place):
    """Ray and this package as an admin installs them for everybody."""
    prefix = public_place / "apps" / "ray"
    script = Path(__file__).parents[1] / "deploy" / "install_site.sh"
    done = subprocess.run(
        [script, prefix, "--python", "/usr/bin/python3", "--ray", ray.__version__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return prefix


@pytest.fixture
def make_cluster(sandbox_environment, tmp_path):
    """Make clusters for one test."""
    made = []
    home = _home(tmp_path)

    def make(name, **parts):
        config = cluster_config(name, tmp_path / "state", **parts)
        made.append(UserCluster(tmp_path, user_environment(sandbox_environment, home), config))
        return made[-1]

    yield make
    for cluster in made:
        cluster.destroy()


@pytest.fixture(scope="module")
def module_cluster(sandbox_environment, tmp_path_factory):
    """Make clusters that the tests of a module share."""
    made = []

    def make(name, **parts):
        parent = tmp_path_factory.mktemp(name)
        config = cluster_config(name, parent / "state", **parts)
        made.append(UserCluster(parent, user_environment(sandbox_environment, _home(parent)), config))
        return made[-1]

    yield make
    for cluster in made:
        cluster.destroy()


@pytest.fixture
def fake_slurm(tmp_path):
    """The SLURM tools in miniature, on a PATH of their own, with switches for faults."""
    return FakeSlurm(tmp_path / "slurm")
