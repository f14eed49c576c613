"""The memory of the cluster's directory."""

from __future__ import annotations

import shutil

import pytest

from ray_slurm_provider.agent.keeper import DirectoryKeeper


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "state" / "c"
    for name in ("nodes", "logs", "births", "tls"):
        (root / name).mkdir(parents=True)
    (root / "auth_token").write_text("secret")
    (root / "ray_bootstrap_config.yaml").write_text("a: 1")
    (root / "births" / "abcdef.birth").write_text("certificate")
    return root


def test_what_was_deleted_comes_back_as_it_was_last(root):
    keeper = DirectoryKeeper(root)
    assert not keeper.tend()
    (root / "ray_bootstrap_config.yaml").write_text("a: 2")
    (root / "births" / "ghijkl.birth").write_text("another")
    assert not keeper.tend()
    shutil.rmtree(root.parent)
    assert keeper.tend()
    assert (root / "ray_bootstrap_config.yaml").read_text() == "a: 2"
    assert (root / "auth_token").read_text() == "secret"
    assert (root / "auth_token").stat().st_mode & 0o777 == 0o600
    assert root.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in (root / "births").iterdir()} == {"abcdef.birth", "ghijkl.birth"}
    assert (root / "nodes").is_dir()
    assert (root / "logs").is_dir()
    assert not keeper.tend()


def test_a_record_that_was_struck_out_stays_away(root):
    (root / "births" / "other.birth").write_text("{}")
    keeper = DirectoryKeeper(root)
    keeper.tend()
    (root / "births" / "abcdef.birth").unlink()
    assert not keeper.tend()
    shutil.rmtree(root)
    keeper.tend()
    assert not (root / "births" / "abcdef.birth").exists()
    assert (root / "births" / "other.birth").exists()


def test_records_come_back_although_somebody_made_their_directory_again(root):
    keeper = DirectoryKeeper(root)
    keeper.tend()
    shutil.rmtree(root)
    (root / "births").mkdir(parents=True)
    (root / "births" / "new.birth").write_text("{}")
    keeper.tend()
    assert (root / "births" / "abcdef.birth").exists()
    assert (root / "births" / "new.birth").exists()


@pytest.mark.parametrize("name", ["auth_token", "ray_bootstrap_config.yaml"])
def test_a_single_file_comes_back(root, name):
    keeper = DirectoryKeeper(root)
    keeper.tend()
    text = (root / name).read_text()
    (root / name).unlink()
    assert keeper.tend()
    assert (root / name).read_text() == text


def test_a_file_system_that_fails_does_not_end_the_agent(root, caplog):
    keeper = DirectoryKeeper(root)
    keeper.tend()
    shutil.rmtree(root)
    root.write_text("a file in its place")
    keeper.tend()
    assert "cannot be kept" in caplog.text
    root.unlink()
    assert keeper.tend()
    assert (root / "auth_token").read_text() == "secret"
