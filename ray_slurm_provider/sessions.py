"""tmux and screen sessions on the head: they outlive the command that starts them. Pure functions.

A command on the head is a step of its job, and SLURM ends whatever the step started. So a session is
started by the node agent, on request, and commands only attach to it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# What `ray exec --stop` puts behind the command (ray/autoscaler/_private/commands.py, exec_cluster).
STOP_TAIL = "; ray stop; ray teardown ~/ray_bootstrap_config.yaml --yes --workers-only; sudo shutdown -h now"
_BREAKS = re.compile(r"[\s'\"\\;&|<>()`#]")
_DETACHED = re.compile(r"(tmux new -d|screen -L -dm)\b")


def on_the_node(cmd: str, agent_socket: str) -> str:
    """Return what runs on the node for a command of Ray's: sessions and the end of the cluster by the agent.

    Args:
        cmd: Ray's command, as it would run through ssh.
        agent_socket: Where the node's agent listens.
    """
    cmd = cmd.replace(STOP_TAIL, f"; ray_slurm_code=$?; {_ask(agent_socket, 'end')}; exit $ray_slurm_code")
    if _DETACHED.match(cmd):
        return _ask(agent_socket, "run", cmd)
    return _attach(cmd, agent_socket)


def submission(cmd: str, words: Sequence[str]) -> str:
    """Return the command of ``ray submit`` with its words quoted, which Ray only joins by blanks.

    A word without blanks and quotes is left to the shell on the node, as Ray leaves it: ``$HOME/data``.

    Args:
        cmd: Ray's command, in a session or not.
        words: Path of the script and its arguments, as they were typed.
    """
    if not words:
        return cmd
    name, *arguments = (PurePath(words[0]).name, *words[1:])
    joined = " ".join(["python", f"~/{name}", *arguments])
    quoted = " ".join(["python", f"~/{_quoted(name)}", *map(_quoted, arguments)])
    if cmd.startswith(joined):
        return quoted + cmd[len(joined) :]
    if _DETACHED.match(cmd):
        inner = shlex.split(cmd)[-1]
        if inner.startswith(joined):
            return cmd.replace(shlex.quote(inner), shlex.quote(quoted + inner[len(joined) :]))
    return cmd


def _quoted(word: str) -> str:
    return shlex.quote(word) if not word or _BREAKS.search(word) else word


def _attach(cmd: str, agent_socket: str) -> str:
    """Return the commands of `ray attach` so that the session is there before anybody attaches to it."""
    if cmd == "tmux attach || tmux new":
        return f"{_ask(agent_socket, 'run', 'tmux has-session 2>/dev/null || tmux new -d')} && exec tmux attach"
    if cmd == "tmux new":
        name = _ask(agent_socket, "run", "tmux new -d -P -F '#{session_name}'")
        return f'ray_slurm_session=$({name}) && exec tmux attach -t "$ray_slurm_session"'
    if cmd == "screen -L -xRR":
        return f"{_ask(agent_socket, 'run', 'screen -ls >/dev/null || screen -L -dm')} && exec screen -xRR"
    if cmd == "screen -L":
        new = "name=ray-$$; screen -L -dmS $name && echo $name"
        return f'ray_slurm_session=$({_ask(agent_socket, "run", new)}) && exec screen -x "$ray_slurm_session"'
    return cmd


def _ask(agent_socket: str, do: str, command: str = "") -> str:
    words = [agent_socket, do, *([command] if command else [])]
    return f'"$RAY_SLURM_PYTHON" -m ray_slurm_provider.agent.ask {shlex.join(words)}'
