"""What nodes said, without asking their files again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_slurm_provider import report_cache
from ray_slurm_provider.backends.base import Sighting
from ray_slurm_provider.report_cache import ReportCache
from ray_slurm_provider.reports import ENDED, READY, STARTING, NodeReport, ReportPaths, write_report


class Desk:
    """A cache over a directory, with a clock that is set by hand and the files that were opened."""

    def __init__(self, root, monkeypatch):
        self.paths = ReportPaths(root)
        self.paths.nodes.mkdir()
        self.now = 0.0
        self.opened = []
        self.cache = ReportCache(self.paths, lambda: self.now, eager=False)
        read = report_cache.read_report
        monkeypatch.setattr(report_cache, "read_report", lambda path: self.opened.append(path.stem) or read(path))

    def say(self, node_id, phase):
        write_report(self.paths, NodeReport(node_id, phase), head=False)

    def phases(self, *sightings, after=1.0):
        self.now += after
        self.cache.has_news()
        self.opened.clear()
        found = self.cache.read(sightings)
        return {node_id: report and report.phase for node_id, report in found.items()}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    return Desk(tmp_path, monkeypatch)


def _runs(node_id):
    return Sighting(node_id, "h")


def test_a_file_is_opened_again_only_while_its_node_starts(desk):
    desk.say("a", READY)
    desk.say("b", STARTING)
    assert desk.phases(_runs("a"), _runs("b"), _runs("c")) == {"a": READY, "b": STARTING, "c": None}
    desk.phases(_runs("a"), _runs("b"), _runs("c"), after=10)
    desk.say("b", READY)
    assert desk.phases(_runs("a"), _runs("b"), _runs("c"))["b"] == READY
    assert sorted(desk.opened) == ["b", "c"]
    for _ in range(5):
        desk.phases(_runs("a"), _runs("b"), _runs("c"), after=10)
    assert desk.opened == []


def test_a_look_without_news_says_so(desk):
    desk.say("a", READY)
    desk.phases(_runs("a"))
    desk.now += 100
    desk.cache.has_news()
    desk.phases(_runs("a"))
    desk.now += 100
    assert not desk.cache.has_news()
    desk.say("a", ENDED)
    assert desk.cache.has_news()


def test_two_changes_within_one_tick_of_the_file_systems_clock_are_both_seen(desk, monkeypatch):
    real = Path.stat

    class Frozen:
        st_mtime_ns = 42

    monkeypatch.setattr(Path, "stat", lambda path, **how: Frozen() if path == desk.paths.nodes else real(path, **how))
    desk.say("a", STARTING)
    assert desk.phases(_runs("a")) == {"a": STARTING}
    desk.say("a", READY)
    assert desk.phases(_runs("a")) == {"a": READY}


def test_nodes_that_are_up_are_read_again_now_and_then(desk):
    desk.say("a", READY)
    assert desk.phases(_runs("a")) == {"a": READY}
    desk.say("a", ENDED)
    assert desk.phases(_runs("a")) == {"a": READY}
    assert desk.phases(_runs("a"), after=30) == {"a": ENDED}


def test_the_last_word_is_read_when_a_node_has_ended_and_then_no_more(desk):
    desk.say("a", READY)
    desk.phases(_runs("a"))
    desk.say("a", ENDED)
    gone = Sighting("a", "h", alive=False)
    assert desk.phases(gone) == {"a": ENDED}
    for _ in range(3):
        desk.say("b", READY)
        desk.phases(gone, after=40)
        assert desk.opened == []


def test_a_report_that_cannot_be_read_now_leaves_what_was_said(desk):
    desk.say("a", READY)
    assert desk.phases(_runs("a")) == {"a": READY}
    desk.paths.report("a").unlink()
    desk.paths.report("a").symlink_to("a.json")  # too many levels of symbolic links
    assert desk.phases(_runs("a"), after=30) == {"a": READY}
    assert desk.phases(Sighting("a", "h", alive=False)) == {"a": READY}
    assert desk.opened == ["a"]


def test_nodes_in_the_queue_have_said_nothing(desk):
    desk.say("a", STARTING)
    assert desk.phases(Sighting("a", "h", queued=True)) == {}
    assert desk.opened == []
