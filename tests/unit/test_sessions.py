"""Ray's commands with sessions, as they run on the node."""

from __future__ import annotations

import shlex

import pytest

from ray_slurm_provider.agent.requests import Requests
from ray_slurm_provider.sessions import STOP_TAIL, on_the_node, submission

ASK = '"$RAY_SLURM_PYTHON" -m ray_slurm_provider.agent.ask'


def test_a_plain_command_stays_as_it_is():
    assert on_the_node("echo 'tmux new -d'", "/s") == "echo 'tmux new -d'"


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
    for start in ("tmux new -d bash -c ", "screen -L -dm -Logfile /x bash -c "):
        assert submission(start + shlex.quote(f"{joined}; exec bash"), words) == start + shlex.quote(
            f"{typed}; exec bash"
        )
    assert submission("something else", words) == "something else"


@pytest.mark.parametrize("start", ["tmux new -d", "screen -L -dm", "screen -L -dm -Logfile /x"])
def test_a_session_is_started_by_the_agent(start):
    command = f"{start} bash -c " + shlex.quote("echo 'it' \"is\"; exec bash")
    assert on_the_node(command, "/a b/s") == f"{ASK} '/a b/s' run {shlex.quote(command)}"


@pytest.mark.parametrize("command", ["tmux attach || tmux new", "tmux new", "screen -L -xRR", "screen -L"])
def test_one_attaches_to_what_the_agent_has_started(command):
    text = on_the_node(command, "/s")
    assert text.index(f"{ASK} /s run") < text.rindex("exec ")


def test_the_end_of_the_cluster_is_asked_for_after_the_command_also_in_a_session():
    assert on_the_node(f"work{STOP_TAIL}", "/s") == (f"work; ray_slurm_code=$?; {ASK} /s end; exit $ray_slurm_code")
    text = on_the_node(f"tmux new -d bash -c {shlex.quote(f'work{STOP_TAIL}; exec bash')}", "/s")
    assert "/s end" in text
    assert "sudo" not in text


def test_the_agent_runs_commands_with_the_streams_of_who_asks(tmp_path):
    import os
    import subprocess
    import sys
    import time

    (tmp_path / "exports").write_text("export WHO=agent\n")
    requests = Requests(tmp_path / "sock", tmp_path / "exports")
    words = [sys.executable, "-m", "ray_slurm_provider.agent.ask", str(tmp_path / "sock")]
    child = subprocess.Popen(
        [*words, "run", "read x; echo $WHO $x; exit 7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdin.write(b"input\n")
    child.stdin.close()
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        requests.serve(None)
        requests.reap()
    assert child.stdout.read() == b"agent input\n"
    assert child.returncode == 7
    later = subprocess.Popen([*words, "restart"])
    while later.poll() is None and time.monotonic() < deadline:
        requests.serve(None)
    assert (later.returncode, requests.asked) == (0, ["restart"])
    requests.close()
    done = subprocess.run([*words, "end"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert not os.path.exists(tmp_path / "sock")
