"""Nobody else can write to the TMPDIR that Ray reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ray_slurm_provider import preflight
from ray_slurm_provider.access import private_temp_dir
from ray_slurm_provider.backends.launch_script import job_environment

ROOT = Path(__file__).parents[2]
STUBS = """
foreach name {module-whatis conflict prepend-path} {proc $name args {}}
proc setenv {name value} {puts "$name=$value"}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    directory = tmp_path / "tmp"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return directory


def test_a_temp_dir_of_the_users_own_stays(place):
    assert private_temp_dir() == {}


def test_one_that_others_write_to_is_replaced(place):
    place.chmod(0o1777)
    own = place.parent / ".cache" / "ray-slurm"
    assert private_temp_dir() == {"TMPDIR": str(own), "RAY_TMPDIR": "/tmp"}
    assert own.stat().st_mode & 0o777 == 0o700
    assert private_temp_dir()["TMPDIR"] == str(own)


def test_without_a_home_nothing_is_said(place, monkeypatch):
    place.chmod(0o1777)
    (place.parent / ".cache").write_text("")
    assert private_temp_dir() == {}


def test_a_cached_yaml_of_another_user_is_warned_of(place, monkeypatch):
    (place / "ray-config-abc").write_text("{}")
    assert list(preflight._config_cache(None)) == []
    monkeypatch.setattr(os, "getuid", lambda: -1)
    (finding,) = preflight._config_cache(None)
    assert (finding.level, finding.check) == ("warning", "TMPDIR")
    assert str(place / "ray-config-abc") in finding.text


def test_the_jobs_get_their_own(monkeypatch):
    assert job_environment({"TMPDIR": "/here", "A": "b"}) == {"A": "b"}


@pytest.mark.parametrize("present", ["", "/usr/tmp"])
def test_the_environment_module_sets_one_where_there_is_none(tmp_path, present):
    if not shutil.which("tclsh"):
        pytest.skip("tclsh is not here")
    script = (ROOT / "deploy/install_site.sh").read_text()
    document = re.search(r"<<MODULE\n.*?^MODULE$", script, re.DOTALL | re.MULTILINE)[0]
    command = f"prefix=/p version=1 templates=/t; cat {document}"
    module = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    (tmp_path / "module.tcl").write_text(STUBS + module)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **({"TMPDIR": present} if present else {})}
    own = tmp_path / ".cache" / "ray-slurm"
    for _ in range(2):
        done = subprocess.run(["tclsh", tmp_path / "module.tcl"], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ([] if present else [f"TMPDIR={own}", "RAY_TMPDIR=/tmp"])
        assert own.stat().st_mode & 0o777 == 0o700
