"""Patience with node types and hosts where starts fail."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ray_slurm_provider.backoff import (
    FAILURES_BEFORE_BACKOFF,
    FIRST_WAIT_S,
    HOST_AVOIDED_S,
    HOST_FAILURES,
    LIMIT,
    LONGEST_WAIT_S,
    QUEUE_LIMIT_RETRY_S,
    Backoff,
    read_backoff,
)


def _wait(backoff, now):
    """Seconds until the type may be tried again."""
    began = now
    while backoff.delay_reason("w", now):
        now += 1
    return now - began


def test_the_first_failures_are_free_and_then_the_wait_doubles_up_to_a_limit():
    backoff = Backoff()
    for _ in range(FAILURES_BEFORE_BACKOFF):
        backoff.failed("w", "x", 100)
        assert backoff.delay_reason("w", 100) is None
    waits = []
    for _ in range(10):
        backoff.failed("w", "x", 100)
        waits.append(_wait(backoff, 100))
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert max(waits) == waits[-1] == LONGEST_WAIT_S


def test_a_success_forgives_everything_and_types_are_apart():
    backoff = Backoff()
    for _ in range(FAILURES_BEFORE_BACKOFF + 1):
        backoff.failed("w", "setup[0] failed", 100, host="c1")
    assert "setup[0] failed" in str(backoff.delay_reason("w", 100))
    assert backoff.delay_reason("other", 100) is None
    assert backoff.succeeded("w", "c1")
    assert backoff.delay_reason("w", 100) is None
    assert backoff.avoided(100) == []
    assert not backoff.succeeded("w", "c1")


def test_jobs_of_one_round_that_fail_together_count_once():
    backoff = Backoff()
    for _ in range(8):
        backoff.failed("w", "x", 200, submitted_at=150)
    assert backoff.types["w"].failures == 1
    backoff.failed("w", "x", 300, submitted_at=250)
    assert backoff.types["w"].failures == 2


def test_after_some_failures_in_a_row_it_pauses_until_a_person_says_so():
    backoff = Backoff()
    for number in range(4):
        backoff.failed("w", f"reason {number}", 100 + number, log=["last words"], pause_after=4)
    obstacle = backoff.delay_reason("w", 10**9)
    assert obstacle.launch_category == "slurm-paused"
    for word in ("4 starts", "reason 3", "| last words", "ray-slurm resume"):
        assert word in str(obstacle)
    # One of the same round that fails later changes nothing about that.
    backoff.failed("w", "late", 110, submitted_at=50, pause_after=4)
    assert backoff.delay_reason("w", 10**9).launch_category == "slurm-paused"
    assert backoff.resume("other") == []
    assert backoff.resume("w") == ["w"]
    assert backoff.delay_reason("w", 100) is None


def test_a_host_where_starts_fail_again_and_again_is_avoided_for_a_while():
    backoff = Backoff()
    for _ in range(HOST_FAILURES):
        assert backoff.avoided(100) == []
        backoff.failed("w", "x", 100, host="c1")
    assert backoff.avoided(100) == ["c1"]
    assert backoff.avoided(100 + HOST_AVOIDED_S) == []
    assert backoff.resume("other") == ["c1"]
    assert backoff.avoided(100) == []


def test_what_fails_everywhere_is_not_the_hosts_fault():
    backoff = Backoff()
    for host in ("c1", "c1", "c2", "c2", "c3"):
        backoff.failed("w", "x", 100, host=host)
    assert backoff.avoided(100) == []


def test_slurms_own_limit_is_no_failure():
    backoff = Backoff()
    backoff.refused("w", "QOSMaxSubmitJobPerUserLimit", 100, LIMIT)
    obstacle = backoff.delay_reason("w", 101)
    assert obstacle.launch_category == "slurm-limit"
    assert "QOSMaxSubmitJobPerUserLimit" in str(obstacle)
    assert backoff.types["w"].failures == 0
    assert backoff.delay_reason("w", 100 + QUEUE_LIMIT_RETRY_S) is None


def test_a_clock_that_is_set_back_keeps_nothing_waiting_for_longer():
    backoff = Backoff()
    for _ in range(FAILURES_BEFORE_BACKOFF + 1):
        backoff.failed("w", "x", 10**9, host="c1")
    assert backoff.delay_reason("w", 10**9) is not None
    assert backoff.delay_reason("w", 0) is None
    assert backoff.avoided(0) == []


def test_it_survives_json():
    backoff = Backoff()
    backoff.failed("w", "x", 100.5, host="c1", log=["a"], submitted_at=1, pause_after=1)
    backoff.refused("v", "y", 100, "slurm-partition")
    assert read_backoff(json.loads(json.dumps(backoff.as_json()))) == backoff


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
    backoff = read_backoff(value)
    for node_type in [*backoff.types, "w"]:
        str(backoff.delay_reason(node_type, 100.0))
        backoff.failed(node_type, "x", 100.0, host="c1", pause_after=6)
        backoff.succeeded(node_type, "c1")
    backoff.avoided(100.0)
    json.dumps(backoff.as_json())
    backoff.resume()
