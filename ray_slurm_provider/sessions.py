"""What two of Ray's commands mean here: `ray exec --stop` and `ray submit`. Pure functions."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

# What `ray exec --stop` puts behind the command (ray/autoscaler/_private/commands.py, exec_cluster).
STOP_TAIL = "; ray stop; ray teardown ~/ray_bootstrap_config.yaml --yes --workers-only; sudo shutdown -h now"
_BREAKS = re.compile(r"[\s'\"\\;&|<>()`#]")


def with_stop(cmd: str, sign: Path) -> str:
    """Return a command of Ray's in which the cluster is ended by the agent, with the command's exit code."""
    return cmd.replace(STOP_TAIL, f"; ray_slurm_code=$?; touch {shlex.quote(str(sign))}; exit $ray_slurm_code")


def submission(cmd: str, words: Sequence[str]) -> str:
    """Return the command of ``ray submit`` with its words quoted, which Ray only joins by blanks.

    A word without blanks and quotes is left to the shell on the node, as Ray leaves it: ``$HOME/data``.
    """
    if not words:
        return cmd
    name, *arguments = (PurePath(words[0]).name, *words[1:])
    joined = " ".join(["python", f"~/{name}", *arguments])
    if not cmd.startswith(joined):
        return cmd
    return " ".join(["python", f"~/{_quoted(name)}", *map(_quoted, arguments)]) + cmd[len(joined) :]


def _quoted(word: str) -> str:
    return shlex.quote(word) if not word or _BREAKS.search(word) else word
