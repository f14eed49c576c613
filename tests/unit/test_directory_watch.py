"""How the head's agent looks after the cluster's directory."""

from __future__ import annotations

import os
import shutil

import pytest

from ray_slurm_provider.agent import directory_watch
from ray_slurm_provider.agent.directory_watch import DirectoryWatch
from ray_slurm_provider.reports import ReportPaths

DAY_S = 86400.0


@pytest.fixture
def paths(tmp_path):
    paths = ReportPaths(tmp_path / "state" / "c")
    for path in paths.needed[:2]:
        path.mkdir(parents=True)
    paths.needed[2].write_text("secret")
    return paths


def test_what_is_deleted_is_missed(paths):
    watch = DirectoryWatch(paths.root)
    assert not watch.is_deleted()
    shutil.rmtree(paths.root)
    assert watch.is_deleted()


def test_a_file_system_that_is_away_is_not_taken_for_a_deleted_directory(paths, monkeypatch):
    watch = DirectoryWatch(paths.root)
    shutil.rmtree(paths.root)
    for device in (-1, None):
        monkeypatch.setattr(directory_watch, "_device", lambda path, device=device: device)
        assert not watch.is_deleted()
    monkeypatch.undo()
    shutil.rmtree(paths.root.parent)
    assert not watch.is_deleted()


def test_an_error_of_the_file_system_says_nothing(tmp_path, paths):
    watch = DirectoryWatch(paths.root)
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    (tmp_path / "state").write_text("a file in its place")
    assert not watch.is_deleted()


def test_files_are_touched_once_a_day_a_few_at_a_time(paths, monkeypatch):
    monkeypatch.setattr(directory_watch, "_FILES_AT_ONCE", 2)
    now = [0.0]
    watch = DirectoryWatch(paths.root, lambda: now[0])
    for name in ("nodes/1-a.json", "logs/1-a.log", "state.json"):
        (paths.root / name).write_text("")
    files = [path for path in paths.root.rglob("*") if path.is_file()]
    (paths.root / "link").symlink_to("nowhere")

    def age():
        for path in files:
            os.utime(path, (1, 1))

    def old():
        return sum(path.stat().st_mtime == 1 for path in files)

    age()
    watch.keep_young()
    assert old() >= 2
    watch.keep_young()
    watch.keep_young()
    assert old() == 0
    age()
    now[0] = DAY_S - 1
    watch.keep_young()
    assert old() == len(files)
    now[0] = DAY_S
    for _ in range(3):
        watch.keep_young()
    assert old() == 0


def test_files_of_others_are_left_alone(paths, monkeypatch):
    os.utime(paths.needed[2], (1, 1))
    monkeypatch.setattr(os, "getuid", lambda: -1)
    DirectoryWatch(paths.root).keep_young()
    assert paths.needed[2].stat().st_mtime == 1


def test_files_that_cannot_be_touched_do_not_matter(paths):
    watch = DirectoryWatch(paths.root)
    shutil.rmtree(paths.root)
    watch.keep_young()
