"""The import rules of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ray_slurm_provider

ROOT = Path(ray_slurm_provider.__file__).parent
PACKAGE = "ray_slurm_provider"
RAY_RING = {"node_provider", "command_runner", "bootstrap", "ray_contract"}
# A module may import from its own layer and from those after it.
LAYERS = [
    {"cli"},
    {"garbage"},
    {"node_provider", "command_runner", "node_table", "sandbox.commands"},
    {"preflight", "yaml_schema", "deployment.commands"},
    {"deployment.deploy", "deployment.site_document"},
    {"deployment.probing", "deployment.document"},
    {"deployment.proposal"},
    {"deployment.survey", "deployment", "canaries"},
    {"bootstrap", "head_wait", "progress", "forward", "clusters", "node_logs", "tunnel", "sandbox.lifecycle"},
    {
        "ray_contract",
        "cluster_yaml",
        "file_sync",
        "sessions",
        "sandbox.daemons",
        "sandbox.layout",
        "sandbox",
    },
    {"access", "cluster", "shells"},
    {"listing"},
    {"worker_launcher"},
    {"launch_control", "deferred_launches"},
    {"nodes", "report_cache"},
    {"backends.places"},
    {"backends.slurm_jobs", "backends.login_process"},
    {"backends.launch_script"},
    {"backends.base", "backends"},
    {"site_file"},
    {"batch_script", "cluster_dir", "resources"},
    {"config", "agent.__main__"},
    {"site_rules"},
    {"sbatch_options"},
    {"fields"},
    {"backoff"},
    {"agent.supervisor", "agent.canary"},
    {"agent.place"},
    {
        "agent.head_watch",
        "agent.ray_command",
        "agent.temp_dirs",
        "agent.host_checks",
        "agent.directory_watch",
        "agent.monitor",
    },
    {
        "agent.spec",
        "agent.allocation",
        "agent.network",
        "agent.ports",
        "agent.kernel",
        "agent.guard",
        "agent.pace",
        "agent",
    },
    {"agent.siblings"},
    {"birth_records"},
    {"birth_certificate", "reports", "slurm.client", "locks"},
    {"slurm.parse", "slurm.process"},
    {"slurm.types", "slurm.reasons", "slurm"},
    {"tls"},
    {"files", "procfs", "errors", "findings", "tls_certificates", "__init__"},
]
STANDARD_LIBRARY_ONLY = (
    "locks",
    "agent",
    "slurm",
    "birth_certificate",
    "reports",
    "files",
    "procfs",
    "errors",
    "findings",
    "tls",
)


def _modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }


def _imports(path):
    """Absolute names imported at run time, also inside functions; those for type checkers only do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _ours(name):
    """The module of ours that an imported name lives in, without the package."""
    parts = name.split(".")[1:]
    known = _modules()
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in known:
            return ".".join(parts[:length])
    return "__init__"


def _layer(module):
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer():
    assert set(_modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(_modules()))
def test_dependencies_point_down(module):
    for name in _imports(_modules()[module]):
        if name.split(".")[0] == PACKAGE and module != "__init__":
            assert _layer(_ours(name)) >= _layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(_modules()))
def test_only_the_ray_ring_imports_ray(module):
    imported = {name.split(".")[0] for name in _imports(_modules()[module])}
    assert "ray" not in imported or module in RAY_RING


@pytest.mark.parametrize("module", sorted(_modules()))
def test_what_runs_in_the_job_needs_the_standard_library_only(module):

    if module.split(".")[0] in STANDARD_LIBRARY_ONLY:
        imported = {name.split(".")[0] for name in _imports(_modules()[module])}
        assert imported <= sys.stdlib_module_names | {PACKAGE}


def test_only_one_module_imports_cryptography_and_only_a_node_with_tls_loads_it():
    import subprocess

    for module, path in _modules().items():
        imported = {name.split(".")[0] for name in _imports(path)}
        assert "cryptography" not in imported or module == "tls_certificates"
    script = "import sys, ray_slurm_provider.agent.supervisor; sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_processes_are_started_in_few_places():
    for module, path in _modules().items():
        if "subprocess" in set(_imports(path)):
            assert module in {
                "slurm.process",
                "sandbox.lifecycle",
                "agent.supervisor",
                "agent.monitor",
                "backends.login_process",
                "file_sync",
                "shells",
            }


def test_our_command_line_starts_without_ray():
    code = "import sys, ray_slurm_provider.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
