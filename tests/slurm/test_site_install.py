"""The admin installs once and writes a site file; a user has five lines, and a home that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from support import UserCluster, tasks_script, user_environment

from ray_slurm_provider.deployment.site_document import user_yaml

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.cluster,
    pytest.mark.skipif(os.getuid() != 0, reason="makes users, which only root may"),
]


def _files(directory):
    return {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}


def test_from_the_installation_to_a_users_five_lines(site_prefix, public_place, users, sandbox_environment):
    user = users[0]
    scratch, home, directory = (public_place / name for name in ("scratch", "read-only-home", "five-lines"))
    for place, mode in ((scratch, 0o1777), (home, 0o555), (directory, 0o755), (scratch / "tmp", 0o1777)):
        place.mkdir()
        place.chmod(mode)
    environ = {
        **user_environment(sandbox_environment, home),
        "PATH": f"{site_prefix}/bin:/usr/bin:/bin",
        "TMPDIR": str(scratch / "tmp"),
        "USER": user,
    }
    admin = subprocess.run(
        [
            site_prefix / "bin" / "ray-slurm",
            *("deploy", "--site", "--yes", "--site-name", "Example HPC", "--contact", "help@example.org"),
            *("--state-dir", f"{scratch}/$USER/ray", "--lock", "state_dir"),
            *("--max-queued-jobs", "3", "--no-login-node-head"),
        ],
        env={**environ, "HOME": "/root"},
        capture_output=True,
        text=True,
    )
    site_file = site_prefix / "etc" / "ray-slurm" / "site.yaml"
    try:
        assert admin.returncode == 0, admin.stdout + admin.stderr
        site = yaml.safe_load(site_file.read_text())
        assert site["locked"]["slurm"] == {"state_dir": f"{scratch}/$USER/ray"}
        assert set(site["limits"]) == {"max_nodes", "max_queued_jobs", "login_node_head"}
        assert (site["limits"]["max_queued_jobs"], site["limits"]["login_node_head"]) == (3, False)
        before = _files(site_prefix)
        config = yaml.safe_load(user_yaml())
        python = str(site_prefix / "bin" / "python")
        cluster = UserCluster(directory, environ, config, python, user, user_yaml())
        _use_it(cluster, scratch, scratch / user / "ray" / "mine")
        # Nobody can have written there, and nothing was.
        assert {path: time for path, time in _files(site_prefix).items() if before.get(path) != time} == {}
        assert list(home.iterdir()) == []
    finally:
        subprocess.run(["scancel", "--user", user], env=environ, check=True)
        site_file.unlink(missing_ok=True)


def _use_it(cluster, scratch, root):
    checked = cluster.ray_slurm("check", "--json", cluster.write())
    levels = {finding["level"]: finding["check"] for finding in json.loads(checked.stdout)}
    assert set(levels) <= {"ok", "warning"}
    assert any(finding["check"] == "home of head" for finding in json.loads(checked.stdout))
    cluster.up()
    assert root.is_dir()
    work = Path(scratch) / "work"
    work.mkdir(mode=0o1777)
    work.chmod(0o1777)
    script = tasks_script(work, 1, "num_cpus=3")
    script.chmod(0o644)
    next(path for path in work.iterdir() if path.is_dir()).chmod(0o1777)
    (task,) = cluster.run_on_head(script)
    assert task["job"]
    # A way around the rules is refused before anything happens to the cluster that runs.
    cluster.text = user_yaml().replace("max_workers: 4", "max_workers: 400")
    refused = cluster.ray("up", cluster.yaml, "--no-config-cache", "-y", check=False)
    assert refused.returncode == 1
    assert "limits.max_nodes of Example HPC" in refused.stderr
    assert "help@example.org" in refused.stderr
    assert "Traceback" not in refused.stderr
    cluster.text = user_yaml()
    cluster.down()
    assert not root.exists()
