"""The batch script: what it says, and that bash and sbatch understand it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_slurm_provider.batch_script import JobSpec, directive_values, render, static_part
from ray_slurm_provider.birth_certificate import BirthCertificate, job_id_of, new_token, read_certificate
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.sbatch_options import SbatchOptions

NASTY = [
    "plain",
    "a b",
    "q\"uo'te",
    "back\\slash",
    "$HOME `id` $(id)",
    "#hash;&|",
    "é ü 漢字",
    "%j%%",
    "-dash",
    "'",
    '"',
    "\\",
]


def _spec(**parts):
    values = {
        "job_name": "ray-c-w",
        "comment": "cert",
        "token": "tok",
        "node_type": "w",
        "cluster_dir": Path("/shared/c"),
        "options": SbatchOptions(
            partition="cpu", cpus_per_task=2, mem="1G", time="1:00:00", exclusive=True, hold=False
        ),
        "python": "/env/bin/python",
        "path_prefix": "/env/bin",
        "agent": {"cluster": "c"},
    }
    return JobSpec(**{**values, **parts})


def test_the_script_of_a_worker():
    text = render(_spec(steps=[("setup_commands[0]", "module load x")], env={"B": "2", "A": 1.5}, drain_s=60))
    own = [line for line in text.replace(static_part().rstrip(), "STATIC").splitlines() if line]
    assert own == [
        "#!/bin/bash",
        "#SBATCH --comment=cert",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --exclusive",
        "# --hold is off",
        "#SBATCH --job-name=ray-c-w",
        "#SBATCH --mem=1G",
        "#SBATCH --no-requeue",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/shared/c/logs/%A-tok.log",
        "#SBATCH --partition=cpu",
        "#SBATCH --signal=B:USR1@60",
        "#SBATCH --time=1:00:00",
        '# Ray node of type "w"; made by ray-slurm-provider.',
        "export RAY_SLURM_DIR=/shared/c",
        'export RAY_CLOUD_INSTANCE_ID="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}-tok"',
        "export RAY_NODE_TYPE_NAME=w",
        'export PATH=/env/bin:"$PATH"',
        "cd || :",
        "STATIC",
        "export A=1.5",
        "export B=2",
        "ray_slurm_step 'setup_commands[0]' 'module load x'",
        'ray_slurm_become_agent /env/bin/python \'{"cluster": "c"}\'',
    ]


def test_a_site_may_leave_directives_out_and_add_others():
    text = render(_spec(skip=["mem", "no-requeue", "ntasks"], extra=["--gres-flags=enforce-binding", "--nice=5"]))
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not [
        line for line in lines if line.startswith(("#SBATCH --mem", "#SBATCH --no-requeue", "#SBATCH --ntasks"))
    ]
    assert lines[-2:] == ["#SBATCH --gres-flags=enforce-binding", "#SBATCH --nice=5"]
    assert "#SBATCH --nodes=1" in lines


def test_a_signal_that_would_come_at_once_is_left_out():
    assert "signal" not in directive_values(_spec(options=SbatchOptions(time="2"), drain_s=60))
    assert "signal" in directive_values(_spec(options=SbatchOptions(), drain_s=60))


@pytest.mark.parametrize("nasty", NASTY)
def test_values_reach_the_job_unchanged(nasty, tmp_path):
    """Run by bash with an agent that shows what it got."""
    python = tmp_path / "bin dir" / "py'thon"
    python.parent.mkdir()
    python.write_text(
        '#!/bin/bash\n[ "$1" = -c ] && exit 0\nprintf "%s\\0" "$X" "$RAY_NODE_TYPE_NAME" "$Y" "$RAY_SLURM_SPEC" "$*"\n'
    )
    python.chmod(0o755)
    (tmp_path / "nodes").mkdir()
    spec = _spec(
        node_type=nasty,
        cluster_dir=tmp_path,
        env={"X": nasty},
        steps=[("s", f"export Y={_quoted_for_user(nasty)}")],
        python=str(python),
        agent={"key": nasty},
    )
    done = subprocess.run(
        ["bash"],
        input=render(spec),
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_ID": "5"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    values = done.stdout.split("\n", 1)[1].split("\0")
    assert values[:3] == [nasty, nasty, nasty]
    assert json.loads(values[3]) == {"key": nasty}
    # Everybody on the host may read arguments.
    assert values[4] == "-u -m ray_slurm_provider.agent"


def _quoted_for_user(text):
    return "'" + text.replace("'", "'\\''") + "'"


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("exit 4", 4, "the job ended with exit code 4 in here"),
        ("false", 1, "here failed with exit code 1: false"),
        ("(exit 3)", 3, "here failed with exit code 3: (exit 3)"),
        ("set -e; false; true", 1, "the job ended with exit code 1 in here"),
        ("nosuchcommand", 127, "here failed with exit code 127: nosuchcommand"),
    ],
)
def test_a_failing_step_ends_the_job_with_its_reason(command, code, reason, tmp_path):
    (tmp_path / "nodes").mkdir()
    script = render(_spec(cluster_dir=tmp_path, steps=[("here", command), ("after", f"touch {tmp_path}/after")]))
    done = subprocess.run(
        ["bash"],
        input=script,
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "SLURM_JOB_ID": "5"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == code
    assert (tmp_path / "nodes" / "5-tok.reason").read_text().strip() == reason
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("option", ["job_name", "comment"])
@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\x1bb"])
def test_control_characters_in_a_directive_are_refused(option, value):
    with pytest.raises(ConfigError):
        render(_spec(**{option: value}))


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here")
def test_shellcheck_has_nothing_to_say_about_a_script():
    script = render(_spec(steps=[("s", "echo 'a' \"b\"")], env={"A": "b c"}, wait_for_go=True))
    done = subprocess.run([SHELLCHECK, "--severity=warning", "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=6), st.text(max_size=30))
def test_a_certificate_comes_back_as_it_was(tags, cluster):
    certificate = BirthCertificate(cluster, "0123456789", new_token(), "1-abc", tags)
    try:
        text = certificate.text()
    except ValueError:
        return
    assert text.isascii()
    assert text.isprintable()
    assert "'" not in text
    assert read_certificate(text) == certificate


@given(st.text())
def test_no_comment_makes_the_reader_fail(text):
    assert read_certificate(text) is None
    read_certificate("ray-slurm:1:" + text)


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "ray-slurm:1:",
        "ray-slurm:1:[]",
        "ray-slurm:1:{}",
        'ray-slurm:1:{"c":1,"d":2,"t":3,"h":4,"g":[]}',
        "ray-slurm:2:{}",
    ],
)
def test_what_is_no_certificate_is_none(comment):
    assert read_certificate(comment) is None


def test_a_certificate_that_slurm_would_refuse_is_an_error():
    with pytest.raises(ValueError, match="1024"):
        BirthCertificate("c", "d", "t", "", {"k": "x" * 1100}).text()


def test_the_job_id_in_a_node_id():
    assert job_id_of(BirthCertificate("c", "d", "tok").node_id("12_3")) == "12_3"
