"""What the sandbox writes, believes and refuses, without a SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_slurm_provider.cli import cli
from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox import lifecycle
from ray_slurm_provider.sandbox.layout import render_cgroup_conf
from ray_slurm_provider.sandbox.lifecycle import SandboxStatus

QUICKSTART = Path(__file__).parents[2] / "deploy" / "quickstart.sh"
_SPEC = {"nodes": [{"name": "c"}], "partitions": [{"name": "p", "groups": ["c"]}]}
VERBS = [["up"], ["down"], ["status"], ["env"], ["run", "--", "true"]]


@pytest.fixture
def short_place():
    with tempfile.TemporaryDirectory(prefix="rst-", dir="/tmp") as place:
        yield Path(place)


@pytest.fixture
def planted(short_place):
    """A directory that looks like a sandbox, with a slurm.conf of somebody's own."""
    root = short_place / "s"
    root.mkdir(mode=0o755)
    (root / "sandbox.json").write_text(json.dumps({"spec": {}, "port": 20000}))
    (root / "slurm.conf").write_text("ClusterName=theirs\n")
    return root


def _refused(root, words, monkeypatch):
    monkeypatch.setattr(lifecycle, "_check_tools", lambda: None)
    done = CliRunner().invoke(cli, ["sandbox", words[0], "--state-dir", str(root), *words[1:]])
    assert done.exit_code == 1
    assert "must be yours" in str(done.exception) + done.output
    assert "theirs" in (root / "slurm.conf").read_text()


@pytest.mark.parametrize("words", VERBS)
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_directory_that_others_may_write_to_is_refused(planted, words, bit, monkeypatch):
    planted.chmod(0o755 | bit)
    _refused(planted, words, monkeypatch)


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away, which only root may")
@pytest.mark.parametrize("words", VERBS)
def test_a_directory_of_another_user_is_refused(planted, words, monkeypatch):
    os.chown(planted, 65534, 65534)
    _refused(planted, words, monkeypatch)


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away, which only root may")
@pytest.mark.parametrize("words", VERBS)
def test_a_link_of_another_user_is_refused(planted, words, short_place, monkeypatch):
    link = short_place / "link"
    link.symlink_to(planted)
    os.lchown(link, 65534, 65534)
    _refused(link, words, monkeypatch)


@pytest.mark.parametrize("words", VERBS)
@pytest.mark.parametrize("link", [False, True])
def test_a_path_that_cannot_be_looked_at_is_one_clear_message(short_place, words, link, monkeypatch):
    monkeypatch.setattr(lifecycle, "_check_tools", lambda: None)
    (short_place / "file").touch()
    (short_place / "loop").symlink_to(short_place / "loop")
    root = short_place / "loop" if link else short_place / "file" / "s"
    done = CliRunner().invoke(cli, ["sandbox", words[0], "--state-dir", str(root), *words[1:]])
    assert isinstance(done.exception, SandboxError)
    assert str(done.exception).startswith(f"{root}: ")


@pytest.mark.parametrize("words", VERBS)
def test_without_root_a_directory_above_that_others_may_write_to_is_refused(planted, words, short_place, monkeypatch):
    monkeypatch.setattr(lifecycle, "_ROOTLESS", True)
    short_place.chmod(0o777)
    _refused(planted, words, monkeypatch)


def test_where_everybody_may_write_but_not_rename_a_sandbox_is_private(planted, short_place, monkeypatch):
    monkeypatch.setattr(lifecycle, "_ROOTLESS", True)
    short_place.chmod(0o1777)
    assert lifecycle.Sandbox(planted).environment() == {"SLURM_CONF": str(planted / "slurm.conf")}


def test_a_start_that_fails_is_cleared_away_though_somebody_has_taken_a_name_for_its_logs(short_place, monkeypatch):
    monkeypatch.setattr(lifecycle, "_check_tools", lambda: None)
    monkeypatch.setattr(lifecycle.Sandbox, "start_munged", lambda _: lifecycle.write_json(short_place / "no" / "x", {}))
    (short_place / "s.failed-logs").symlink_to("/")
    with pytest.raises(SandboxError, match="did not start"):
        lifecycle.Sandbox(short_place / "s").up(lifecycle.SandboxSpec.model_validate(_SPEC))
    assert not (short_place / "s").exists()


@pytest.mark.parametrize(
    ("state", "healthy"),
    [
        *((state, True) for state in ("idle", "mixed", "mixed-", "allocated+", "planned", "completing", "mixed+")),
        *((state, True) for state in ("reserved", "maint", "mixed$")),
        *((state, False) for state in ("idle*", "down", "drained", "idle~", "unknown", "slurmd is dead")),
    ],
)
def test_states_of_a_node_that_is_well(state, healthy):
    assert SandboxStatus(controller=True, munged=True, nodes={"c1": "idle", "c2": state}).healthy is healthy


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("slurm-wlm 20.11.4", ""),
        ("slurm-wlm 22.05.8", "CgroupPlugin=cgroup/v1\n"),
        ("slurm 24.05.3", "CgroupPlugin=cgroup/v1\n"),
        ("slurm 24.11.5", "CgroupPlugin=disabled\n"),
        ("slurm 26.05.5", "CgroupPlugin=disabled\n"),
        ("", ""),
    ],
)
def test_without_cgroup_v1_slurmd_starts_without_its_plugin_for_v2(version, text):
    assert render_cgroup_conf(version) == text


def test_the_release_of_slurm_is_asked_before_there_are_machines(short_place, monkeypatch):
    class OfMachines(lifecycle.Sandbox):
        def prefix(self, node=""):
            raise SandboxError(f"the machine {node} does not run")

    (short_place / "s").mkdir()
    (short_place / "sinfo").write_text("#!/bin/sh\necho slurm 24.11.5\n")
    (short_place / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(short_place), prepend=":")
    monkeypatch.setattr(lifecycle, "_CGROUP_V2", short_place)
    OfMachines(short_place / "s")._write_files(lifecycle.SandboxSpec.model_validate(_SPEC), 20000)
    assert (short_place / "s" / "cgroup.conf").read_text() == "CgroupPlugin=disabled\n"


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away, which only root may")
@pytest.mark.parametrize("door", ["another owner", "writable", "a link"])
def test_the_quickstart_refuses_a_directory_that_somebody_else_may_have_filled(planted, short_place, door):
    work = planted
    if door == "another owner":
        os.chown(work, 65534, 65534)
    elif door == "writable":
        work.chmod(0o777)
    else:
        work = short_place / "link"
        work.symlink_to(planted)
    done = subprocess.run(
        [QUICKSTART],
        env={**os.environ, "RAY_SLURM_QUICKSTART_DIR": str(work)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "must be a directory of yours" in done.stderr
    assert done.stdout == ""
    assert (planted / "sandbox.json").exists()
