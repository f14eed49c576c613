"""Copies as rsync makes them, on a shared file system and through a shell."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.file_sync import SyncOptions, copy, fetch, is_shared, send
from ray_slurm_provider.shells import LocalShell

EVERYTHING = SyncOptions()


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "so urce"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b'\".txt").write_text("b")
    (source / "skip.pyc").write_text("x")
    return source


@pytest.fixture(params=["copy", "send", "fetch"])
def sync(request):
    """The three ways; the far side of a shell is this host too."""
    shell = LocalShell(Path("/dev/null"))
    return {
        "copy": copy,
        "send": lambda source, target, options: send(source, target, options, shell),
        "fetch": lambda source, target, options: fetch(source, target, options, shell),
    }[request.param]


def test_a_directory_with_a_slash_means_its_content(tree, tmp_path, sync):
    sync(f"{tree}/", f"{tmp_path}/goal/", EVERYTHING)
    assert (tmp_path / "goal" / "sub" / "b'\".txt").read_text() == "b"


def test_a_directory_without_one_means_itself(tree, tmp_path, sync):
    sync(str(tree), str(tmp_path / "go al"), EVERYTHING)
    assert (tmp_path / "go al" / "so urce" / "a.txt").read_text() == "a"


def test_a_file_goes_to_a_new_name_or_into_a_directory(tree, tmp_path, sync):
    sync(str(tree / "a.txt"), str(tmp_path / "new" / "na'me.txt"), EVERYTHING)
    sync(str(tree / "a.txt"), f"{tmp_path}/other/", EVERYTHING)
    assert (tmp_path / "new" / "na'me.txt").read_text() == "a"
    assert (tmp_path / "other" / "a.txt").read_text() == "a"


def test_patterns_are_rsyncs(tree, tmp_path, sync):
    (tree / "sub" / "a.txt").write_text("deep")
    sync(f"{tree}/", str(tmp_path / "goal"), SyncOptions(exclude=["*.pyc", "/a.txt"]))
    found = {str(path.relative_to(tmp_path / "goal")) for path in (tmp_path / "goal").rglob("*") if path.is_file()}
    assert found == {"sub/a.txt", "sub/b'\".txt"}


def test_files_of_patterns_in_the_tree_are_followed(tree, tmp_path, sync):
    (tree / ".gitignore").write_text("*.pyc\n")
    (tree / "sub" / ".gitignore").write_text("b*\n")
    sync(f"{tree}/", str(tmp_path / "goal"), SyncOptions(filters=[".gitignore"]))
    assert not (tmp_path / "goal" / "skip.pyc").exists()
    assert not list((tmp_path / "goal" / "sub").glob("b*"))
    assert (tmp_path / "goal" / "a.txt").exists()


def test_a_pattern_of_names_may_be_the_source(tree, tmp_path, sync):
    sync(f"{tree}/*.txt", f"{tmp_path}/goal/", EVERYTHING)
    assert [path.name for path in (tmp_path / "goal").iterdir()] == ["a.txt"]


def test_what_does_not_exist_is_said(tmp_path, sync):
    with pytest.raises(StateError, match=r"does not exist|No such file"):
        sync(str(tmp_path / "nothing"), str(tmp_path / "goal"), EVERYTHING)


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
