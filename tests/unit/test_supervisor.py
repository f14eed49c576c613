"""What the node agent does between Ray's start and end, as far as it needs no Ray."""

from __future__ import annotations

import shutil
import signal

import pytest

from ray_slurm_provider.agent.pace import Pace
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.agent.supervisor import Supervisor


@pytest.fixture
def make(tmp_path):
    (tmp_path / "state" / "c" / "nodes").mkdir(parents=True)

    def made(node_id="1-abc", **changes):
        spec = AgentSpec("c", "d", str(tmp_path / "state" / "c"))._replace(**changes)
        supervisor = Supervisor(spec, {"RAY_CLOUD_INSTANCE_ID": node_id, "PATH": "/nowhere"})
        supervisor._looking_for_signs = Pace(0)
        return supervisor

    return made


def test_a_sign_is_obeyed_once_and_by_its_own_node_only(make):
    supervisor, paths = make(), make()._paths
    assert supervisor._ordered_to_end() == ""
    paths.stop("1-def").touch()
    paths.restart("1-def").touch()
    assert supervisor._ordered_to_end() == ""
    paths.restart("1-abc").touch()
    assert "restart" in supervisor._ordered_to_end()
    assert not paths.restart("1-abc").exists()
    assert supervisor._ordered_to_end() == ""
    paths.stop("1-abc").touch()
    assert "`ray exec --stop`" in supervisor._ordered_to_end()
    assert not paths.stop("1-abc").exists()


def test_signs_are_looked_for_once_in_a_second_however_much_ray_prints(make):
    supervisor = make()
    supervisor._looking_for_signs = Pace(1000)
    assert supervisor._ordered_to_end() == ""
    supervisor._paths.stop("1-abc").touch()
    assert [supervisor._ordered_to_end() for _ in range(300)] == [""] * 300
    assert supervisor._paths.stop("1-abc").exists()


def test_a_worker_is_ended_by_no_sign(make):
    supervisor = make("2-abc", head="1-abc")
    supervisor._paths.stop("2-abc").touch()
    assert supervisor._ordered_to_end() == ""


def test_a_cancelled_head_is_not_restarted(make):
    supervisor = make()
    supervisor._paths.restart("1-abc").touch()
    supervisor._signals.append(signal.SIGTERM)
    assert "cancelled" in supervisor._ordered_to_end()
    assert not supervisor._restarting


def test_a_deleted_directory_is_told_once_and_ends_nothing(make, caplog):
    supervisor = make("123-abc")
    for path in supervisor._paths.needed:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    supervisor._look_after_directory()
    assert caplog.text == ""
    shutil.rmtree(supervisor._spec.directory)
    for _ in range(3):
        supervisor._look_after_directory()
        supervisor._keep_reports()
    assert caplog.text.count("was deleted") == 1
    assert "`scancel 123`" in caplog.text
    assert "`ray up`" in caplog.text
    assert not supervisor._spec.directory.exists()
