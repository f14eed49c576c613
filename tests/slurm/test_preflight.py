"""`ray-slurm check` on a real SLURM: each planted defect is named, and a good YAML is not blamed."""

from __future__ import annotations

import json
import os

import pytest

pytestmark = pytest.mark.slurm


def _check(cluster, code):
    cluster.write()
    done = cluster.ray_slurm("check", cluster.yaml, "--json", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def _worker(cluster):
    return cluster.config["available_node_types"]["worker"]["node_config"]


def test_a_good_yaml_passes_in_both_placements_and_submits_nothing(make_cluster):
    cluster = make_cluster("fine")
    findings = _check(cluster, 0)
    assert {finding["level"] for finding in findings} == {"ok"}
    assert any("could start at" in finding["text"] for finding in findings)
    cluster.config["available_node_types"]["head"] = {"node_config": {"placement": "login_node"}}
    assert any("workers connect to" in finding["text"] for finding in _check(cluster, 0))
    assert cluster.jobs(everything=True) == []
    assert not cluster.root.exists()
    text = cluster.ray_slurm("check", cluster.yaml).stdout
    assert text.startswith("ok       yaml:")


def _defects():
    def set_worker(**sbatch):
        return lambda cluster: _worker(cluster)["sbatch"].update(sbatch)

    def set_slurm(**settings):
        return lambda cluster: cluster.config["provider"]["slurm"].update(settings)

    return [
        ("yaml", "did you mean partition", set_worker(partitions="cpu")),
        ("tools", "not found", set_slurm(slurm_bin="/nowhere")),
        ("controller", "SLURM_CONF names", lambda cluster: cluster.environ.update(SLURM_CONF="/nowhere/slurm.conf")),
        ("partition of worker", "there is no partition", set_worker(partition="nosuch")),
        ("partition of worker", "waits for ever", set_worker(time="30-00:00:00")),
        ("job of worker", "sbatch refuses it", set_worker(mem="900G")),
        ("job of worker", "sbatch refuses it", set_worker(constraint="unicorn")),
        ("python", "does not exist", set_slurm(python="/nowhere/python")),
        ("temp_dir", "bytes too long", set_slurm(temp_dir="/tmp/" + "x" * 80)),
        ("state_dir", "", set_slurm(state_dir="/proc/nowhere")),
    ]


@pytest.mark.parametrize(
    ("check", "words", "plant"), _defects(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_defect_is_named(make_cluster, check, words, plant):
    cluster = make_cluster("defect")
    environ = dict(cluster.environ)
    plant(cluster)
    failures = [finding for finding in _check(cluster, 1) if finding["level"] == "failure"]
    cluster.environ = environ
    assert check in {finding["check"] for finding in failures}, failures
    assert any(words in finding["text"] + finding["advice"] for finding in failures if finding["check"] == check), (
        failures
    )


def test_what_only_warns_does_not_fail(make_cluster):
    cluster = make_cluster("warned")
    cluster.environ["PATH"] = f"{os.path.dirname(cluster.python)}:{_only_slurm(cluster)}"
    (finding,) = [finding for finding in _check(cluster, 0) if finding["level"] != "ok"]
    assert (finding["check"], finding["level"]) == ("rsync", "warning")


def _only_slurm(cluster):
    """A directory with SLURM's tools and nothing else."""
    place = cluster.directory / "slurm-bin"
    place.mkdir()
    for tool in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        (place / tool).symlink_to(f"/usr/bin/{tool}")
    return place
