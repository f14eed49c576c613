"""Which SLURM answers."""

from __future__ import annotations

import pytest

from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import Completed, SlurmTools
from ray_slurm_provider.slurm.types import SlurmIdentity


@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        (SlurmIdentity("a", ("h1:6817",)), True),
        (SlurmIdentity("a", ("h2:6817", "h1:6817")), True),  # another host may take over now
        (SlurmIdentity("a", ("h2:6817",)), False),
        (SlurmIdentity("a", ("h1:6818",)), False),  # two on one host
        (SlurmIdentity("b", ("h1:6817",)), False),
    ],
)
def test_one_slurm_has_one_name_and_a_host_in_common(theirs, same):
    ours = SlurmIdentity("a", ("h1:6817",))
    assert ours.is_same(theirs) is same
    assert theirs.is_same(ours) is same


def test_it_is_read_from_the_configuration(monkeypatch):
    text = (
        "Configuration data as of 2026-01-01T00:00:00\n"
        "ClusterName             = hpc\n"
        "SlurmctldHost[0]        = ctl1(10.0.0.1)\n"
        "SlurmctldHost[1]        = ctl2\n"
        "SlurmctldPort           = 6817-6820\n"
    )
    monkeypatch.setattr(SlurmTools, "run", lambda _, argv: Completed(tuple(argv), text, ""))
    assert SlurmClient(SlurmTools()).identity() == SlurmIdentity("hpc", ("ctl1:6817-6820", "ctl2:6817-6820"))
