"""Ray's commands as they run on the node."""

from __future__ import annotations

import subprocess

import click
import pytest
from ray.scripts import scripts

from ray_slurm_provider.node_provider import _refuse_sessions
from ray_slurm_provider.ray_contract import ray_command
from ray_slurm_provider.sessions import STOP_TAIL, submission, with_stop


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["/x/s.py", "--n=1", "$HOME/data"], "python ~/s.py --n=1 $HOME/data"),
        (["/x y/my s.py", "it's", ""], "python ~/'my s.py' 'it'\"'\"'s' ''"),
    ],
)
def test_submitted_words_arrive_as_they_were_typed(words, typed):
    joined = " ".join(["python", f"~/{words[0].rpartition('/')[2]}", *words[1:]])
    assert submission(joined, words) == typed
    assert submission(joined + STOP_TAIL, words) == typed + STOP_TAIL
    assert submission("something else", words) == "something else"


def test_a_plain_command_stays_as_it_is(tmp_path):
    assert with_stop("echo 'it; ray stop'", tmp_path) == "echo 'it; ray stop'"


def test_the_end_of_the_cluster_is_asked_for_after_the_command_which_gives_the_exit_code(tmp_path):
    sign = tmp_path / "it's 1-abc.stop"
    done = subprocess.run(["bash", "-c", with_stop(f"cd /; (exit 4){STOP_TAIL}", sign)], capture_output=True)
    assert (done.returncode, done.stderr) == (4, b"")
    assert sign.exists()


@pytest.mark.parametrize("tool", ["tmux", "screen"])
@pytest.mark.parametrize(
    ("command", "words"), [("exec", ["x.yaml", "true"]), ("submit", ["x.yaml", "s.py"]), ("attach", ["x.yaml"])]
)
def test_sessions_are_refused_with_another_way(command, words, tool):
    context = getattr(scripts, command).make_context(command, [f"--{tool}", *words])
    with context, pytest.raises(click.ClickException, match="ray job submit") as refused:
        _refuse_sessions(ray_command())
    assert f"--{tool} does not work here" in str(refused.value)
    assert 'eval "$(ray-slurm env x.yaml)"' in str(refused.value)
    assert refused.value.exit_code == 1


def test_a_scripts_own_option_is_none_of_ours():
    with scripts.submit.make_context("submit", ["x.yaml", "s.py", "--", "--tmux"]):
        _refuse_sessions(ray_command())
    _refuse_sessions(ray_command())
