"""The wheel holds what it must."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(place.glob("*.whl"))


def test_the_wheel_holds_templates_scripts_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {f"ray_slurm_provider/cluster_configs/{path.name}" for path in (ROOT / "cluster_configs").glob("*.yaml")}
    wanted |= {
        "ray_slurm_provider/scripts/job.sh",
        "ray_slurm_provider/py.typed",
        "ray_slurm_provider/agent/__main__.py",
    }
    assert wanted <= names
    assert not any(name.startswith("tests/") for name in names)


def test_what_pip_installs_says_where_its_migrate_script_is_and_that_runs_there(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "ray_slurm_provider.cli", "migrate", "old.yaml"]
    done = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    named = shlex.split(done.stderr.partition("command: ")[2])
    assert named[1].startswith(f"{tmp_path}/ray_slurm_provider/")
    (tmp_path / "old.yaml").write_text("provider: {}\navailable_node_types: {w: {resources: {CPU: 3}}}\n")
    done = subprocess.run(named, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert "cpus_per_task: 3" in done.stdout, done.stderr


def test_what_the_package_imports_is_declared():
    section = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [\n")[2].partition("\n]")[0]
    declared = set(re.findall(r'^ *"([\w-]+)', section, re.MULTILINE))
    imported = set()
    for path in (ROOT / "ray_slurm_provider").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"ray_slurm_provider"}
    distributions = packages_distributions()
    providers = {name: {found.lower().replace("_", "-") for found in distributions.get(name, ())} for name in foreign}
    assert {name for name, found in providers.items() if not found & declared} == set()
