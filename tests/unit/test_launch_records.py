"""Patience with node types and hosts where starts fail."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ray_slurm_provider.launch_records import (
    FIRST_WAIT_S,
    FREE_FAILURES,
    HOST_AVOIDED_S,
    HOST_FAILURES,
    LONGEST_WAIT_S,
    NOT_NOW_S,
    LaunchRecords,
    read_launch_records,
)


def _wait(records, now):
    """Seconds until the type may be tried again."""
    began = now
    while records.why_not_now("w", now):
        now += 1
    return now - began


def test_the_first_failures_are_free_and_then_the_wait_doubles_up_to_a_limit():
    records = LaunchRecords()
    for _ in range(FREE_FAILURES):
        records.failed("w", "x", 100)
        assert records.why_not_now("w", 100) is None
    waits = []
    for _ in range(10):
        records.failed("w", "x", 100)
        waits.append(_wait(records, 100))
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert max(waits) == waits[-1] == LONGEST_WAIT_S


def test_a_success_forgives_everything_and_types_are_apart():
    records = LaunchRecords()
    for _ in range(FREE_FAILURES + 1):
        records.failed("w", "setup[0] failed", 100, host="c1")
    assert "setup[0] failed" in str(records.why_not_now("w", 100))
    assert records.why_not_now("other", 100) is None
    assert records.succeeded("w", "c1")
    assert records.why_not_now("w", 100) is None
    assert records.avoided(100) == []
    assert not records.succeeded("w", "c1")


def test_jobs_of_one_round_that_fail_together_count_once():
    records = LaunchRecords()
    for _ in range(8):
        records.failed("w", "x", 200, born=150)
    assert records.types["w"].failures == 1
    records.failed("w", "x", 300, born=250)
    assert records.types["w"].failures == 2


def test_after_some_failures_in_a_row_it_pauses_until_a_person_says_so():
    records = LaunchRecords()
    for number in range(4):
        records.failed("w", f"reason {number}", 100 + number, log=["last words"], pause_after=4)
    obstacle = records.why_not_now("w", 10**9)
    assert obstacle.category == "slurm-paused"
    for word in ("4 starts", "reason 3", "| last words", "ray-slurm resume"):
        assert word in str(obstacle)
    # One of the same round that fails later changes nothing about that.
    records.failed("w", "late", 110, born=50, pause_after=4)
    assert records.why_not_now("w", 10**9).category == "slurm-paused"
    assert records.resume("other") == []
    assert records.resume("w") == ["w"]
    assert records.why_not_now("w", 100) is None


def test_a_host_where_starts_fail_again_and_again_is_avoided_for_a_while():
    records = LaunchRecords()
    for _ in range(HOST_FAILURES):
        assert records.avoided(100) == []
        records.failed("w", "x", 100, host="c1")
    assert records.avoided(100) == ["c1"]
    assert records.avoided(100 + HOST_AVOIDED_S) == []
    assert records.resume("other") == ["c1"]
    assert records.avoided(100) == []


def test_what_fails_everywhere_is_not_the_hosts_fault():
    records = LaunchRecords()
    for host in ("c1", "c1", "c2", "c2", "c3"):
        records.failed("w", "x", 100, host=host)
    assert records.avoided(100) == []


def test_slurms_own_limit_is_no_failure():
    records = LaunchRecords()
    records.not_now("w", "QOSMaxSubmitJobPerUserLimit", 100)
    obstacle = records.why_not_now("w", 101)
    assert obstacle.category == "slurm-limit"
    assert "QOSMaxSubmitJobPerUserLimit" in str(obstacle)
    assert records.types["w"].failures == 0
    assert records.why_not_now("w", 100 + NOT_NOW_S) is None


def test_a_clock_that_is_set_back_keeps_nothing_waiting_for_longer():
    records = LaunchRecords()
    for _ in range(FREE_FAILURES + 1):
        records.failed("w", "x", 10**9, host="c1")
    assert records.why_not_now("w", 10**9) is not None
    assert records.why_not_now("w", 0) is None
    assert records.avoided(0) == []


def test_it_survives_json():
    records = LaunchRecords()
    records.failed("w", "x", 100.5, host="c1", log=["a"], born=1, pause_after=1)
    records.refused("v", "y", 100, "slurm-partition")
    assert read_launch_records(json.loads(json.dumps(records.as_json()))) == records


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
_fields = st.dictionaries(
    st.sampled_from(["failures", "until", "paused", "category", "reason", "log", "hosts", "counted"]), json_values
)


@given(
    st.one_of(
        json_values,
        st.fixed_dictionaries(
            {"types": st.dictionaries(st.text(), _fields | json_values), "hosts": st.dictionaries(st.text(), _fields)}
        ),
    )
)
def test_whatever_is_in_the_file_it_can_be_worked_with(value):
    records = read_launch_records(value)
    for node_type in [*records.types, "w"]:
        str(records.why_not_now(node_type, 100.0))
        records.failed(node_type, "x", 100.0, host="c1", pause_after=6)
        records.succeeded(node_type, "c1")
    records.avoided(100.0)
    json.dumps(records.as_json())
    records.resume()
