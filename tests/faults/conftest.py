"""Fixtures of the fault tests."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from support import machines_are_allowed

from faults.bed import PATIENT, Bed


def _require_machines():
    if not machines_are_allowed():
        pytest.skip("the kernel does not let us make namespaces")


@pytest.fixture(scope="session")
def patient_bed():
    """A sandbox whose SLURM gives a silent machine time, as sites do."""
    _require_machines()
    bed = Bed(**PATIENT)
    try:
        yield bed
    finally:
        bed.down()


@pytest.fixture(scope="session")
def bed():
    """A sandbox of four machines; a lost one is noticed after about 11 s."""
    _require_machines()
    disk = Path(tempfile.mkdtemp(prefix="rst-disk-"))
    if os.geteuid() == 0:
        # Machines see the mounts that were there before them.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", disk], check=True)
    # SLURM as it is without further settings: it takes jobs that it would never start.
    bed = Bed(EnforcePartLimits="NO")
    bed.small_disk = disk
    try:
        yield bed
    finally:
        bed.down()
        if os.geteuid() == 0:
            subprocess.run(["umount", disk], check=True)
        disk.rmdir()


@pytest.fixture
def small_disk(bed):
    """A file system of 8 MB that all machines share."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount it")
    return bed.small_disk


@pytest.fixture
def healthy_bed(bed):
    yield bed
    bed.heal()
    bed.wait_until_healthy()


@pytest.fixture
def make(healthy_bed, tmp_path):
    """Make clusters for one test."""
    made = []

    def make(name="c", **parts):
        made.append(healthy_bed.cluster(tmp_path / f"of-{len(made)}", name, **parts))
        return made[-1]

    yield make
    for cluster in made:
        cluster.destroy()
