"""Patience with node types whose nodes do not come up."""

from __future__ import annotations

from ray_slurm_provider.backoff import FIRST_PAUSE_S, FREE_FAILURES, LONGEST_PAUSE_S, LaunchBackoff


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def _pause(backoff, clock):
    """Seconds until the type may be tried again."""
    began = clock.now
    while backoff.why_not_now("w"):
        clock.now += 1
    return clock.now - began


def test_the_first_failures_are_free_and_then_the_pause_doubles_up_to_a_limit():
    clock = Clock()
    backoff = LaunchBackoff(clock)
    for _ in range(FREE_FAILURES):
        backoff.failed("w", "x")
        assert backoff.why_not_now("w") == ""
    pauses = []
    for _ in range(10):
        backoff.failed("w", "x")
        pauses.append(_pause(backoff, clock))
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert max(pauses) == pauses[-1] == LONGEST_PAUSE_S


def test_a_success_forgives_everything_and_types_are_apart():
    backoff = LaunchBackoff(Clock())
    for _ in range(FREE_FAILURES + 1):
        backoff.failed("w", "setup[0] failed")
    assert "setup[0] failed" in backoff.why_not_now("w")
    assert backoff.why_not_now("other") == ""
    backoff.succeeded("w")
    assert backoff.why_not_now("w") == ""
