"""An old YAML becomes one that Ray and the provider take, and nothing is lost in silence."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import RAY_SLURM

from ray_slurm_provider.bootstrap import resolve
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.ray_contract import prepare_config

SCRIPT = Path(__file__).parents[2] / "deploy" / "migrate.py"


def _load():
    spec = importlib.util.spec_from_file_location("migrate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks there for its annotations.
    sys.modules["migrate"] = module
    spec.loader.exec_module(module)
    return module.migrate


migrate = _load()

OLD = """
cluster_name: slurm-cluster
min_workers: 1
max_workers: 2
upscaling_speed: 1.0
idle_timeout_minutes: 5
provider:
  type: external
  module: ray.autoscaler._private.slurm.node_provider.NodeProvider
  temp_folder_name: /shared/temp_script
  template_path: /shared/templates
  gcs_port: "6379"
  ray_client_port: "10001"
  dashboad_port: "8265"
  head_ip_lookup: x
head_node_type: head_node
available_node_types:
  head_node:
    max_workers: 0
    resources: {"CPU": 0, "GPU": 0}
    node_config:
      head_node: 1
      under_slurm: 0
      head_ip: 10.0.0.1
      init_commands: [module load x]
      additional_slurm_commands: ["#SBATCH --partition=login"]
  worker_node:
    min_workers: 0
    max_workers: 2
    resources: {"CPU": 16, "GPU": 2}
    node_config:
      head_node: 0
      under_slurm: 1
      init_commands: ["source ~/venv/bin/activate", 'export A="b c"']
      additional_slurm_commands:
        - "#SBATCH --partition=gpu"
        - "#SBATCH -A proj123"
        - "#SBATCH -t 02:00:00   # two hours"
        - "#SBATCH --mem 64G"
        - "#SBATCH --job-name=mine"
        - "#SBATCH --exclusive"
        - "#SBATCH --some-site-option='a b'"
        - "#SBATCH -Z"
  pod:
    max_workers: 1
    node_config: {node_type: K8S, id: 1}
head_start_ray_commands: []
worker_start_ray_commands: ["ray start"]
cluster_synced_files: ["/x"]
"""


def test_everything_that_has_a_place_here_gets_it():
    new = migrate(yaml.safe_load(OLD)).config
    assert new["provider"]["slurm"] == {"state_dir": "/shared/temp_script"}
    head, worker = (new["available_node_types"][name] for name in ("head_node", "worker_node"))
    assert head["node_config"] == {"placement": "login_node", "setup": ["module load x"]}
    assert worker["max_workers"] == 2
    assert worker["node_config"] == {
        "setup": ["source ~/venv/bin/activate", 'export A="b c"'],
        "sbatch": {
            "partition": "gpu",
            "account": "proj123",
            "time": "02:00:00",
            "mem": "64G",
            "exclusive": True,
            "cpus_per_task": 16,
            "gres": "gpu:2",
        },
        "sbatch_extra": ["--some-site-option='a b'"],
    }
    assert "pod" not in new["available_node_types"]


def test_what_has_none_is_told():
    notes = "\n".join(migrate(yaml.safe_load(OLD)).notes)
    for word in (
        "min_workers",
        "gcs_port, ray_client_port, dashboad_port",
        "template_path",
        "provider.head_ip_lookup",
        "head_ip 10.0.0.1",
        "--job-name",
        "-Z",
        "pod",
        "worker_start_ray_commands",
        "cluster_synced_files",
        "no job; its #SBATCH lines",
        "time limit",
        "exclusive",
    ):
        assert word in notes, word


def _run(*words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def test_the_result_is_taken_by_ray_and_by_us(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    done = _run(sys.executable, SCRIPT, "old.yaml", cwd=tmp_path)
    assert done.returncode == 0
    config = resolve(prepare_config(yaml.safe_load(done.stdout)))
    assert config["available_node_types"]["worker_node"]["resources"]["GPU"] == 2
    assert "pod was left out" in done.stderr


def test_the_command_names_the_script_with_an_interpreter_that_can_run_it(tmp_path):
    (tmp_path / "old one.yaml").write_text(OLD)
    done = _run(*RAY_SLURM, "migrate", "old one.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    words = shlex.split(done.stderr.partition("command: ")[2])
    assert words[1:] == [str(SCRIPT), "old one.yaml"]
    assert "worker_node" in _run(*words, cwd=tmp_path).stdout
    for words in ([], ["--help"], ["--x", "y"]):
        assert str(SCRIPT) in _run(*RAY_SLURM, "migrate", *words).stderr
    assert "migrate" not in _run(*RAY_SLURM, "--help").stdout


@pytest.mark.parametrize("words", [[], ["--help"], ["/nowhere.yaml"], [SCRIPT], ["a", "b"]])
def test_the_script_refuses_bad_input_in_one_sentence(words):
    done = _run(sys.executable, SCRIPT, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) <= 6
    assert "Traceback" not in done.stderr


def test_an_interpreter_without_the_package_is_told(tmp_path):
    done = _run(sys.executable, "-S", SCRIPT, "old.yaml", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "lacks yaml" in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("node_config", ["x"]),
        ("node_config", {"additional_slurm_commands": ["#SBATCH --x='"]}),
        ("resources", {"CPU": "x"}),
    ],
)
def test_what_is_no_such_yaml_is_refused(key, value):
    old = yaml.safe_load(OLD)
    old["available_node_types"]["worker_node"][key] = value
    with pytest.raises(ConfigError, match="is not one of"):
        migrate(old)


def test_a_head_under_slurm_is_a_job():
    old = yaml.safe_load(OLD)
    old["available_node_types"]["head_node"]["node_config"]["under_slurm"] = 1
    head = migrate(old).config["available_node_types"]["head_node"]
    assert head["node_config"]["sbatch"] == {"partition": "login"}
