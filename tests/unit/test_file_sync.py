"""Copies as rsync makes them."""

from __future__ import annotations

import pytest

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.file_sync import SyncOptions, copy, is_shared

EVERYTHING = SyncOptions()


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "so urce"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b'\".txt").write_text("b")
    (source / "skip.pyc").write_text("x")
    return source


def test_a_directory_with_a_slash_means_its_content(tree, tmp_path):
    copy(f"{tree}/", f"{tmp_path}/goal/", EVERYTHING)
    assert (tmp_path / "goal" / "sub" / "b'\".txt").read_text() == "b"


def test_a_directory_without_one_means_itself(tree, tmp_path):
    copy(str(tree), str(tmp_path / "go al"), EVERYTHING)
    assert (tmp_path / "go al" / "so urce" / "a.txt").read_text() == "a"


def test_a_file_goes_to_a_new_name_or_into_a_directory(tree, tmp_path):
    copy(str(tree / "a.txt"), str(tmp_path / "new" / "na'me.txt"), EVERYTHING)
    copy(str(tree / "a.txt"), f"{tmp_path}/other/", EVERYTHING)
    assert (tmp_path / "new" / "na'me.txt").read_text() == "a"
    assert (tmp_path / "other" / "a.txt").read_text() == "a"


def test_patterns_are_rsyncs(tree, tmp_path):
    (tree / "sub" / "a.txt").write_text("deep")
    copy(f"{tree}/", str(tmp_path / "goal"), SyncOptions(exclude=["*.pyc", "/a.txt"]))
    found = {str(path.relative_to(tmp_path / "goal")) for path in (tmp_path / "goal").rglob("*") if path.is_file()}
    assert found == {"sub/a.txt", "sub/b'\".txt"}


def test_files_of_patterns_in_the_tree_are_followed(tree, tmp_path):
    (tree / ".gitignore").write_text("*.pyc\n")
    (tree / "sub" / ".gitignore").write_text("b*\n")
    copy(f"{tree}/", str(tmp_path / "goal"), SyncOptions(filters=[".gitignore"]))
    assert not (tmp_path / "goal" / "skip.pyc").exists()
    assert not list((tmp_path / "goal" / "sub").glob("b*"))
    assert (tmp_path / "goal" / "a.txt").exists()


def test_a_pattern_of_names_may_be_the_source(tree, tmp_path):
    copy(f"{tree}/*.txt", f"{tmp_path}/goal/", EVERYTHING)
    assert [path.name for path in (tmp_path / "goal").iterdir()] == ["a.txt"]


def test_what_does_not_exist_is_said(tmp_path):
    with pytest.raises(StateError, match="does not exist"):
        copy(str(tmp_path / "nothing"), str(tmp_path / "goal"), EVERYTHING)


def test_the_same_place_is_left_alone(tree):
    copy(str(tree / "a.txt"), str(tree / "a.txt"), EVERYTHING)
    copy(f"{tree}/", str(tree), EVERYTHING)
    assert (tree / "a.txt").read_text() == "a"


def test_memory_file_systems_are_not_shared_and_the_state_directory_is(tmp_path):
    assert is_shared(str(tmp_path / "not yet" / "there"), tmp_path)
    assert not is_shared("/dev/shm/x", tmp_path)


def test_a_network_file_system_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_slurm_provider.file_sync._mounts", lambda: iter([("/", "ext4"), ("/dev/shm", "nfs4")]))
    assert is_shared("/dev/shm/x", tmp_path)
