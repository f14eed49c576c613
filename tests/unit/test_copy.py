"""Copies on the shared file system, as rsync would make them."""

from __future__ import annotations

import click
import pytest

from ray_slurm_provider.command_runner import copy


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "so urce"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b'\".txt").write_text("b")
    (source / "skip.pyc").write_text("x")
    return source


def test_a_directory_with_a_slash_means_its_content(tree, tmp_path):
    copy(f"{tree}/", f"{tmp_path}/goal/")
    assert (tmp_path / "goal" / "sub" / "b'\".txt").read_text() == "b"


def test_a_directory_without_one_means_itself(tree, tmp_path):
    copy(str(tree), str(tmp_path / "goal"))
    assert (tmp_path / "goal" / "so urce" / "a.txt").read_text() == "a"


def test_a_file_goes_to_a_new_name_or_into_a_directory(tree, tmp_path):
    copy(str(tree / "a.txt"), str(tmp_path / "new" / "name.txt"))
    copy(str(tree / "a.txt"), f"{tmp_path}/other/")
    assert (tmp_path / "new" / "name.txt").read_text() == "a"
    assert (tmp_path / "other" / "a.txt").read_text() == "a"


def test_excluded_names_are_left_out(tree, tmp_path):
    copy(f"{tree}/", str(tmp_path / "goal"), ["*.pyc", "sub/"])
    assert [path.name for path in (tmp_path / "goal").iterdir()] == ["a.txt"]


def test_the_same_place_is_left_alone(tree):
    copy(str(tree / "a.txt"), str(tree / "a.txt"))
    copy(f"{tree}/", str(tree))
    assert (tree / "a.txt").read_text() == "a"


def test_what_does_not_exist_is_said(tmp_path):
    with pytest.raises(click.ClickException, match="does not exist"):
        copy(str(tmp_path / "nothing"), str(tmp_path / "goal"))
