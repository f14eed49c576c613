"""Reasons for waiting, in plain words."""

from __future__ import annotations

import pytest

from ray_slurm_provider.slurm.reasons import in_words, waits_for_ever


@pytest.mark.parametrize(
    ("reason", "said", "for_ever"),
    [
        ("Priority", "Priority (other jobs come first)", False),
        ("PartitionTimeLimit", "it will never start", True),
        ("ReqNodeNotAvail, UnavailableNodes:c[1-2]", "are down, drained or reserved", False),
        ("BadConstraints", "no node fulfils what the job asks for; it will never start", True),
        ("SomethingNew", "SomethingNew", False),
        ("", "", False),
    ],
)
def test_a_reason_says_what_it_means(reason, said, for_ever):
    assert said in in_words(reason)
    assert in_words(reason).startswith(reason)
    assert waits_for_ever(reason) is for_ever
