"""What the command runner refuses, before it asks anybody."""

from __future__ import annotations

import click
import pytest
from ray.scripts import scripts

from ray_slurm_provider import command_runner
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.command_runner import SlurmCommandRunner
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.reports import NodeReport, write_report


@pytest.fixture
def runner(tmp_path):
    """A head in a job whose Ray writes below /dev/shm, which no other host sees."""
    cluster = Cluster("c", SlurmSettings(state_dir=str(tmp_path / "state")))
    cluster.directory.prepare()
    write_report(cluster.directory.reports, NodeReport("7-abc", "ready", temp_dir="/dev/shm/rsp-x/r"), head=False)
    return SlurmCommandRunner(cluster, "7-abc")


def test_what_only_a_nodes_host_sees_is_refused_with_the_other_way(runner, tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(click.ClickException, match="only its own host sees") as refusal:
        runner.run_rsync_up(str(tmp_path / "f"), "/dev/shm/it")
    assert refusal.value.exit_code == 1
    assert "cp -r SHARED_PATH /dev/shm/it" in refusal.value.message
    assert "\n" not in refusal.value.message
    with pytest.raises(click.ClickException, match=r"SHARED_PATH '\"'\"'/dev/shm/my dir") as refusal:
        runner.run_rsync_up(str(tmp_path / "f"), "/dev/shm/my dir")
    # Ray's updater prints such an exception without a traceback.
    assert {"cmd", "returncode", "stderr"} <= vars(refusal.value).keys()
    with pytest.raises(click.ClickException, match="/tmp/ray/session_latest/logs is on .* 'cp -r /tmp/ray/session_lat"):
        runner.run_rsync_down("/tmp/ray/session_latest/logs", str(tmp_path / "down"))
    assert not (tmp_path / "down").exists()


def test_what_is_shared_is_copied_here(runner, tmp_path):
    (tmp_path / "f").write_text("x")
    runner.run_rsync_up(str(tmp_path / "f"), f"{tmp_path}/up/")
    runner.run_rsync_down(f"{tmp_path}/up/", f"{tmp_path}/down/")
    assert (tmp_path / "down" / "f").read_text() == "x"


def test_a_script_whose_home_is_not_shared_is_run_from_where_it_is_shared(runner):
    with scripts.submit.make_context("submit", ["x.yaml", "s.py"]).scope():
        submitting = SlurmCommandRunner(runner._cluster, "7-abc")
    with pytest.raises(click.ClickException, match=r"`ray exec x.yaml 'python SHARED_PATH/s.py'`"):
        submitting.run_rsync_up("s.py", "/dev/shm/s.py")


def test_a_program_that_has_a_command_of_its_own_named_submit_is_not_ray(runner, monkeypatch):
    monkeypatch.setattr(SlurmCommandRunner, "_shell", lambda _: None)
    ran = []
    monkeypatch.setattr(command_runner, "run", lambda _, text, **__: ran.append(text) or (0, ""))
    with click.Context(click.Command("submit")):
        SlurmCommandRunner(runner._cluster, "7-abc").run("echo hi")
    assert ran == ["echo hi"]
